"""Tests of the counter-based random generator."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.system.counter_rng import mix, stream, uniforms

_SEED_OF_REFERENCE = 1234567


_REFERENCE = (  # SplitMix64's published outputs for that seed
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
)


def test_stream_gives_the_published_splitmix64_outputs() -> None:
    assert stream(np.uint64(_SEED_OF_REFERENCE), 5).tolist() == list(_REFERENCE)


def test_streams_of_many_keys_equal_those_of_each_key() -> None:
    keys = np.array([[0, 1, _SEED_OF_REFERENCE], [2**63, 2**64 - 1, 5]], dtype=np.uint64)
    many = stream(keys, 7)
    assert many.shape == (2, 3, 7)
    assert many.dtype == np.uint64
    for place in np.ndindex(keys.shape):
        assert many[place].tolist() == stream(keys[place], 7).tolist()


def test_a_stream_does_not_depend_on_its_length() -> None:
    assert stream(np.uint64(3), 100)[:9].tolist() == stream(np.uint64(3), 9).tolist()


def test_mix_is_injective_and_turns_half_the_bits() -> None:
    keys = np.arange(1 << 14, dtype=np.uint64)
    mixed = mix(keys)
    assert len(np.unique(mixed)) == len(keys)
    for bit in range(64):
        changed = mixed ^ mix(keys ^ np.uint64(1 << bit))
        share = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(64 * len(keys))


@pytest.mark.filterwarnings("error")
def test_mix_wraps_around_silently_at_the_largest_key() -> None:
    assert int(mix(2**64 - 1)) == 0xE4D971771B652C20


def test_uniforms_are_the_upper_53_bits_below_one() -> None:
    values = uniforms(np.arange(1000, dtype=np.uint64), 50)
    assert values.dtype == np.float64
    assert values.shape == (1000, 50)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert uniforms(np.uint64(_SEED_OF_REFERENCE), 5).tolist() == [(word >> 11) / 2**53 for word in _REFERENCE]


def test_uniforms_stay_below_one_for_the_largest_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.system.counter_rng.stream", lambda key, count: np.full(count, 2**64 - 1, np.uint64))
    assert uniforms(np.uint64(0), 1)[0] == 1.0 - 2.0**-53

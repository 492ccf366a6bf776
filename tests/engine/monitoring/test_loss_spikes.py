"""Clean losses are never flagged, whatever their trend; spikes are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.monitoring.loss_spikes import CALM, WINDOW, SpikeWatch
from tests.conftest import Figure

STEPS = 10_000
SKEWED = "10,000 clean losses of skewed noise; a 10σ spike"


def noise(kind: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    white = generator.standard_normal(STEPS)
    if kind == "drifting":  # most of a step's noise is the last step's
        out = np.empty(STEPS)
        out[0] = white[0]
        for i in range(1, STEPS):
            out[i] = 0.95 * out[i - 1] + math.sqrt(1 - 0.95**2) * white[i]
        return out
    return np.exp(0.25 * white) if kind == "skewed" else white


def trend(kind: str) -> np.ndarray:
    steps = np.arange(STEPS)
    return {
        "level": np.full(STEPS, 6.0),
        "falling": 3.0 + 5.0 * np.exp(-steps / 1500),
        "rising": 3.0 + 5.0 * (1 - np.exp(-steps / 300)),
    }[kind]


@pytest.mark.reliability
def test_spikes_are_flagged_and_clean_losses_are_not(figure: Figure) -> None:
    alarms, caught = {"skewed": 0, "even": 0}, dict[tuple[str, str], list[bool]]()
    for seed, shape in enumerate(("level", "falling", "rising")):
        for scale, kind in ((0.05, "white"), (0.3, "white"), (0.05, "drifting"), (0.04, "skewed")):
            deviations = scale * noise(kind, seed)
            losses = trend(shape) + deviations
            watch = SpikeWatch()
            alarms["skewed" if kind == "skewed" else "even"] += sum(
                watch.add(part) is not None for part in losses.reshape(-1, 50)
            )
            for at in range(500, STEPS, 500):
                watch = SpikeWatch()
                watch._window.extend(losses[at - WINDOW : at])
                flagged = watch.add([float(losses[at]) + 10 * float(deviations.std())]) is not None
                caught.setdefault((shape, kind), []).append(flagged)
    shares = {case: sum(flags) / len(flags) for case, flags in caught.items()}
    for fault, skewed, courses in (("10,000 clean losses; a 10σ spike", False, 9), (SKEWED, True, 3)):
        rates = ", ".join(f"{s} with {k} noise {v:.0%}" for (s, k), v in shares.items() if (k == "skewed") == skewed)
        count = alarms["skewed" if skewed else "even"]
        figure(fault, f"{count} alarms in {courses} times {STEPS}; caught: {rates}")
    assert alarms == {"skewed": 0, "even": 0}
    assert all(share >= 0.6 if kind == "skewed" else share == 1 for (_, kind), share in shares.items()), shares


def test_spike_is_flagged_once_and_the_next_again() -> None:
    watch, losses = SpikeWatch(), 5 + 0.1 * np.random.default_rng(0).standard_normal(WINDOW)
    assert watch.add(losses) is None
    warning = watch.add([50.0])
    assert warning is not None
    assert "leapt to 50 from 4.99" in warning
    assert watch.add([50.0, math.nan, 50.0]) is None
    assert watch.add(losses[:CALM]) is None
    assert watch.add([50.0]) is not None


def test_loaded_state_continues_like_the_watch() -> None:
    losses = 5 + 0.1 * np.random.default_rng(0).standard_normal(150)
    watch, again = SpikeWatch(), SpikeWatch()
    watch.add(losses)
    again.load_state_dict(watch.state_dict())
    assert again.add([50.0]) == watch.add([50.0]) is not None
    assert SpikeWatch().add([*losses[:50], 50.0]) is None  # too few to compare with

"""Malicious encoder files: no more memory than their size, no code run, refused in one line."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from engine.weights.load import load_encoder
from methods.registry import build_backbone
from pipeline.system.errors import InputError
from tests.hostile import Outcome, record, reliability, survived

State = dict[str, torch.Tensor]


def _resnet(width: float = 0.125) -> State:
    return build_backbone("resnet18", stem="small", width=width).state_dict()


def _load(path: Path, **options: Any) -> Outcome:
    """Load a file in a child process; return its outcome, with messages that are short."""
    outcome = survived(lambda _: load_encoder(path, **options), seconds=30)
    assert all(len(text) < 2000 for text in outcome.messages), outcome
    return outcome


def _refused(path: Path, message: str, mebibytes: float = 60) -> None:
    outcome = _load(path)
    assert outcome.kinds == {"refused": 1}, outcome
    assert message in outcome.messages[0]
    assert outcome.mebibytes < mebibytes


@pytest.mark.parametrize(
    "described",
    [
        '{"width": 1e9}',
        '{"width": 1e300}',
        '{"width": 0.25}',
        '{"width": -1}',
        '{"width": NaN}',
        '{"width": Infinity}',
        '{"width": "1e9"}',
        '{"width": [1]}',
        '{"width": null}',
        '{"width": 0.125, "width": 1}',
        '{"size": 1000000000}',
        '{"size": 1e400}',
        '{"size": -3}',
        '{"size": {}}',
        '{"mean": [0.5, 0.5]}',
        '{"mean": [0.5, 0.5, 1e400]}',
        '{"mean": [0.5, 0.5, [0.5]]}',
        '{"mean": "x"}',
        '{"mean": [NaN, 0, 0]}',
        '{"std": [0.5, 0.5, 0]}',
        '{"std": [0.5, -0.5, 0.5]}',
        '{"std": 1}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "junk",
        "9" * 5000,
    ],
)
def test_a_stated_architecture_is_verified(described: str, tmp_path: Path) -> None:
    save_file(_resnet(), tmp_path / "x.safetensors", metadata={"millrace": described})
    _refused(tmp_path / "x.safetensors", "x.safetensors: ")


@pytest.mark.parametrize("heads", [7, 5000, -1])
def test_heads_must_divide_the_dimensions(heads: int, tmp_path: Path) -> None:
    torch.save(build_backbone("vit_small", size=32).state_dict(), tmp_path / "x.pth")
    with pytest.raises(InputError, match=f"{heads} heads do not divide 384 dimensions: give other --heads"):
        load_encoder(tmp_path / "x.pth", heads=heads)


def _expanded(*shape: int) -> torch.Tensor:
    """Return a tensor of any shape that stores one number."""
    return torch.zeros(1).expand(*shape) if shape else torch.zeros(())


def _wide() -> State:
    return _resnet() | {"conv1.weight": _expanded(10**8, 3, 3, 3)}


def _wide_and_consistent() -> State:
    """Return all layers of a network 1000 times as wide as published."""
    with torch.device("meta"):
        like = build_backbone("resnet18", stem="small", width=1000.0).state_dict()
    return {name: _expanded(*value.shape) for name, value in like.items()}


def _long_positions() -> State:
    state = build_backbone("vit_small", size=32).state_dict()
    return state | {"pos_embed": _expanded(1, 10**8 + 1, 384)}


@pytest.mark.parametrize("make", [_wide, _wide_and_consistent, _long_positions])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_shapes_larger_than_the_file_are_refused(make: Callable[[], State], legacy: bool, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert (tmp_path / "x.pth").stat().st_size < 100e6
    _refused(tmp_path / "x.pth", "its tensors are larger than the file by their shapes", mebibytes=200)


def test_a_wide_first_layer_is_refused_before_the_network_is_built(tmp_path: Path) -> None:
    """400 KB of a first layer 64 times as wide as published."""
    save_file(_resnet() | {"conv1.weight": torch.zeros(4096, 3, 3, 3)}, tmp_path / "x.safetensors")
    _refused(tmp_path / "x.safetensors", "have shapes of other layers")
    save_file(_resnet() | {"conv1.weight": torch.zeros(12_800, 3, 3, 3)}, tmp_path / "x.safetensors")
    _refused(tmp_path / "x.safetensors", "shapes that no encoder here has (width 200)")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "make",
    [
        lambda value: value.to("meta"),
        lambda value: value.to_sparse(),
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    ],
    ids=["meta", "sparse", "quantized"],
)
def test_tensors_without_plain_numbers_are_missing(
    make: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    torch.save(_resnet() | {"conv1.weight": make(torch.zeros(8, 3, 3, 3))}, tmp_path / "x.pth")
    _refused(tmp_path / "x.pth", "conv1.weight of the backbone is missing")


def _repacked(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Rewrite a file of torch.save with other bytes or another compression."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save(_resnet() | {"more": torch.zeros(10_000_000)}, tmp_path / "x.pth")
    _repacked(tmp_path / "x.pth", lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.pth").stat().st_size < 3e6
    _refused(tmp_path / "x.pth", "is compressed, which torch.save never does")


def test_a_storage_that_claims_more_than_its_record_is_refused(tmp_path: Path) -> None:
    """Values after the end of the record would be other memory of the process."""
    torch.save({"conv1.weight": torch.zeros(12345)}, tmp_path / "x.pth")
    for claimed in (12346, 2**30, 2**31 - 1):
        path = tmp_path / f"{claimed}.pth"
        path.write_bytes((tmp_path / "x.pth").read_bytes())

        def claim(name: str, data: bytes) -> bytes:
            return data.replace(b"M90", b"J" + struct.pack("<i", claimed)) if name.endswith("data.pkl") else data  # noqa: B023

        _repacked(path, claim)
        _refused(path, "cannot be read" if claimed > 12346 else "is missing")  # 12346 is within the file


def test_a_legacy_file_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(12345)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pth").read_bytes()
    assert data.count(b"M90") == 2
    for claimed in (12346, 2**30, 2**31 - 1):
        (tmp_path / "y.pth").write_bytes(data.replace(b"M90", b"J" + struct.pack("<i", claimed)))
        _refused(tmp_path / "y.pth", "cannot be read")


def _pickled(*parts: bytes) -> bytes:
    """Return a file of torch's legacy format with these opcodes."""
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + b"\x80\x02" + b"".join(parts) + b"."


HOSTILE = {
    "nested lists": _pickled(b"]" * 200_000 + b"a" * 199_999),
    "doubling": _pickled(b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(200))),
    "a text of terabytes": _pickled(b"\x8d" + struct.pack("<Q", 2**43)),
    "a long of gigabytes": _pickled(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "a bytearray of terabytes": _pickled(b"cbuiltins\nbytearray\n(\x8a\x06" + bytes(5) + b"\x7ftR"),
    "a tensor of terabytes": _pickled(b"ctorch\nTensor\n(J\0\0\x10\0J\0\0\x10\0tR"),
    "eval": _pickled(b"cbuiltins\neval\n(X\x01\0\0\x001tR"),
    "memo": _pickled(b"j\xff\xff\xff\xff"),
    "nothing on the stack": _pickled(b"tRb"),
}


@reliability
def test_hostile_files_of_tensors_are_refused(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    for name, data in HOSTILE.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(data)
        outcome = _load(path)
        assert outcome.kinds == {"refused": 1}, (name, outcome)
        assert outcome.mebibytes < 100, name
    record(record_property, f"{len(HOSTILE)} hostile pickles of encoders: {len(HOSTILE)} refused")


def _safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"conv1.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


FORGED = {
    "length": _safetensors({}, length=2**63),
    "length of a gigabyte": _safetensors({}, length=2**30),
    "beyond the end": _safetensors(_one([1000], [0, 4000])),
    "negative": _safetensors(_one([-1], [0, 4]), bytes(4)),
    "overflow": _safetensors(_one([2**40, 2**40], [0, 4]), bytes(4)),
    "offsets turned": _safetensors(_one([1], [4, 0]), bytes(4)),
    "too small for its shape": _safetensors(_one([8, 3, 3, 3], [0, 4]), bytes(4)),
    "overlap": _safetensors({n: _one([1], [0, 4])["conv1.weight"] for n in ("a", "b")}, bytes(4)),
    "hole": _safetensors(_one([1], [4, 8]), bytes(8)),
    "twice": _safetensors(
        b'{"conv1.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"conv1.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "dtype": _safetensors(_one([1], [0, 4], "OBJECT"), bytes(4)),
    "deep": _safetensors(b'{"a":' * 100_000),
    "no mapping": _safetensors(b"[]"),
    "not UTF-8": _safetensors(b'{"\xff": 1}'),
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED)
def test_a_forged_header_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    _refused(tmp_path / "x.safetensors", "x.safetensors: ")


@pytest.mark.parametrize("suffix", [pytest.param(".pth", marks=pytest.mark.slow), ".safetensors"])
def test_random_changes_to_an_encoder_do_no_harm(suffix: str, tmp_path: Path) -> None:
    written = io.BytesIO()
    torch.save(_resnet(), written)
    data = written.getvalue() if suffix == ".pth" else save(_resnet())
    path = tmp_path / f"x{suffix}"

    def one(number: int) -> None:
        draw, changed = random.Random(number), bytearray(data)
        front = 20_000 if draw.random() < 0.7 else len(data)
        for _ in range(draw.choice([1, 1, 3])):
            changed[draw.randrange(min(front, len(data)))] = draw.randrange(256)
        if suffix == ".pth" and draw.random() < 0.4:
            changed[-draw.randrange(1, 20_000)] = draw.randrange(256)
        path.write_bytes(changed[: draw.randrange(len(changed)) if draw.random() < 0.05 else None])
        load_encoder(path)

    outcome = survived(one, 200, seconds=20)
    assert outcome.bad == 0, outcome
    assert outcome.mebibytes < 200


def test_hostile_keys_are_escaped_in_messages(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x9b31m"
    state = _resnet() | {f"{evil}{i}.{'x' * 100_000}": torch.zeros(1) for i in range(50)}
    torch.save(state | {f"layer1.{evil}": torch.zeros(1), f"fc.{evil}": torch.zeros(1)}, tmp_path / "x.pth")
    loaded = load_encoder(tmp_path / "x.pth")
    for text in (loaded.summary(), *loaded.warnings):
        assert text.isprintable()
        assert len(text) < 10_000
    torch.save({evil + "x" * 10**6: torch.zeros(1)}, tmp_path / "x.pth")
    _refused(tmp_path / "x.pth", "no backbone")

"""A pickle that would create a file, instead of every file that is read: it is never run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file

from benchmarks import plan
from engine.checkpoint import storage
from engine.config.cli import parse
from engine.config.settings import Model, Settings
from engine.evaluate import features, linear_fast, semi_supervised, svm
from engine.evaluate.resume import EpochCheckpoint, save_cached
from engine.evaluate.trainer import sgd
from engine.export import model_card
from engine.monitoring.metrics_logger import MetricsLogger
from engine.weights.load import load_encoder
from methods.registry import build_backbone
from pipeline.beton import Beton
from pipeline.columns import Columns
from pipeline.manifest import columns_path, manifest_path
from pipeline.prepare import prepare
from pipeline.stage import stage
from pipeline.storage.in_place import Direct
from pipeline.system.errors import InputError
from tests.hostile import Payload, hostile_pickle, record, reliability, survived
from tests.pipeline.conftest import picture, saved, tar_bytes

Slot = tuple[Path, Callable[[], Any]]


@pytest.fixture
def slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Slot]:
    """Every file that is read, and what reads it."""
    PartialState(cpu=True)  # which log lines of evaluations need
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, beton, tar = tmp_path / "run", tmp_path / "x.beton", tmp_path / "x.tar"
    prepare("synthetic:40", beton, workers=1, quiet=True)
    tar.write_bytes(tar_bytes({f"a/{i}.jpg": saved(picture(seed=i)) for i in range(3)}))
    Direct(tar)
    settings = Settings(model=Model(arch="resnet18", stem="small", width=0.125))
    backbone = build_backbone("resnet18", stem="small", width=0.125).state_dict()
    state = {
        f"{side}.backbone.{name}": value.clone() for side in ("online", "target") for name, value in backbone.items()
    }
    about = {"loader": {}, "monitor": {}, "settings": settings.as_dict()}
    saved_at = storage.write(run / "checkpoints", 10, {"model": state, "optimizer": {"a|b": torch.zeros(2)}}, about)
    settings.write(run / "config.yaml")
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 1}\n')
    (run / "evaluation").mkdir()
    for name in ("x.pth", "x.pth.tar", "x.safetensors", "names.txt", "cat_trainval.txt", "m.yaml", "r.json"):
        (tmp_path / name).write_bytes(b"")
    head = torch.nn.Linear(3, 2)
    evaluation: Any = SimpleNamespace(out=run / "evaluation", is_main=True, device=torch.device("cpu"))
    epochs = EpochCheckpoint(evaluation, "linear", head, sgd([{"params": list(head.parameters())}]), {"lr": 1})
    epochs.save(3)
    classifier = run / "evaluation" / "linear" / "step_00000003"
    partial, position = run / ".f.npy.partial.npy", run / ".f.npy.partial.0of1.safetensors"
    save_cached(position, {}, {"ids": torch.tensor([1])})
    np.lib.format.open_memmap(partial, "w+", np.float32, (40, 8)).flush()

    evaluation.backbone, evaluation.train = SimpleNamespace(features=8), range(40)
    cache = run / "evaluation" / "linear_fast" / "center.safetensors"
    save_cached(cache, {}, {"features": torch.zeros(40, 8, dtype=torch.bfloat16), "ids": torch.arange(40)})

    def reopened() -> None:
        features.resume(partial, position, (40, 8), {})
        assert np.lib.format.open_memmap(partial, "r").shape == (40, 8)

    def resumed() -> None:
        storage.newest(run / "checkpoints")
        storage.load(saved_at)

    return {
        "checkpoint: model": (saved_at / "model.safetensors", resumed),
        "checkpoint: optimizer": (saved_at / "optimizer.safetensors", resumed),
        "checkpoint: state": (saved_at / "state.json", resumed),
        "checkpoint: latest": (run / "checkpoints" / "latest", resumed),
        "run: model": (saved_at / "model.safetensors", lambda: load_encoder(run)),
        "run: config": (run / "config.yaml", lambda: parse(["--config", str(run / "config.yaml")])),
        "run: metrics": (run / "metrics.jsonl", lambda: MetricsLogger(Accelerator(cpu=True), run, 10, 2).start(1, 0)),
        "run: evaluation": (run / "evaluation" / "x.json", lambda: model_card._metrics(saved_at)),
        "beton": (beton, lambda: Beton(beton)),
        "beton: manifest": (manifest_path(beton), lambda: Beton(beton)),
        "beton: columns": (columns_path(manifest_path(beton)), lambda: Beton(beton)),
        "beton: staged": (tmp_path / "disk" / "x.beton", lambda: stage(beton, tmp_path / "disk")),
        "tar": (tar, lambda: Direct(tar)),
        "tar: prepared": (tar, lambda: prepare(str(tar), tmp_path / "y.beton", workers=1, quiet=True)),
        "image": (tmp_path / "images" / "a.jpg", lambda: prepare(str(tmp_path / "images"), tmp_path / "y.beton")),
        "tar: cache": (next((tmp_path / "cache" / "millrace").iterdir()), lambda: Direct(tar)),
        "encoder: .pth": (tmp_path / "x.pth", lambda: load_encoder(tmp_path / "x.pth")),
        "encoder: .pth.tar": (tmp_path / "x.pth.tar", lambda: load_encoder(tmp_path / "x.pth.tar")),
        "encoder: .safetensors": (tmp_path / "x.safetensors", lambda: load_encoder(tmp_path / "x.safetensors")),
        "classifier: state": (classifier / "state.safetensors", epochs._read),
        "classifier: json": (classifier / "state.json", epochs._read),
        "classifier: pass": (cache, lambda: linear_fast.load_pass(evaluation, cache, {})),
        "features": (partial, reopened),
        "features: position": (position, reopened),
        "names": (tmp_path / "names.txt", lambda: semi_supervised.find_named(Beton(beton), tmp_path / "names.txt")),
        "VOC": (tmp_path / "cat_trainval.txt", lambda: svm.read_multi_labels(tmp_path, "trainval", Beton(beton))),
        "machine": (tmp_path / "m.yaml", lambda: plan.load_machine(str(tmp_path / "m.yaml"))),
        "result": (
            tmp_path / "r.json",
            lambda: plan.load_rates(plan.load_machine("h100x8"), tmp_path / "r.json", None),
        ),
    }


def _payloads(target: Path) -> Iterator[bytes]:
    """Yield the pickle as it is, in both formats of torch.save, as an array of objects, as YAML and as JSON."""
    yield hostile_pickle(target)
    for new in (True, False):
        written = io.BytesIO()
        torch.save({"state_dict": Payload(target)}, written, _use_new_zipfile_serialization=new)
        yield written.getvalue()
    array = io.BytesIO()
    np.save(array, np.array([Payload(target)], object), allow_pickle=True)
    yield array.getvalue()
    yield f"!!python/object/apply:os.system ['touch {target}']\n".encode()
    yield json.dumps({"py/reduce": [{"py/function": "os.system"}, {"py/tuple": [f"touch {target}"]}]}).encode()


@reliability
def test_planted_payload_is_never_run(
    slots: dict[str, Slot], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    owned = tmp_path / "owned"
    tried, refused = 0, 0
    for slot, (path, read) in slots.items():
        path.parent.mkdir(exist_ok=True)
        before = path.read_bytes() if path.exists() else None
        for payload in _payloads(owned):
            path.write_bytes(payload)
            tried += 1
            try:
                read()
            except InputError:
                refused += 1
            assert not owned.exists(), slot
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    record(record_property, f"{tried} payloads in {len(slots)} slots: 0 executed, {refused} refused")
    assert refused > 0.6 * tried


def test_payload_runs_where_it_is_allowed(tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    import pickle

    for number, payload in enumerate(_payloads(tmp_path / "owned")):
        with contextlib.suppress(Exception):
            if number == 0:
                pickle.loads(payload)
            elif number < 3:
                torch.load(io.BytesIO(payload), weights_only=False)
            elif number == 3:
                np.load(io.BytesIO(payload), allow_pickle=True)
            else:
                break
        assert (tmp_path / "owned").exists(), number
        (tmp_path / "owned").unlink()


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
def test_slots_neither_block_nor_fill_memory(kind: str, slots: dict[str, Slot]) -> None:
    odd = []
    for slot, (path, read) in slots.items():
        path.parent.mkdir(exist_ok=True)
        kept = path.with_name(f"{path.name}.kept")
        if path.exists():
            path.rename(kept)
        os.mkfifo(path) if kind == "pipe" else path.mkdir() if kind == "folder" else path.symlink_to(kind)
        outcome = survived(lambda _: read(), seconds=15)  # noqa: B023
        if outcome.bad or outcome.mebibytes > 100:
            odd.append((slot, outcome))
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if kept.exists():
            kept.rename(path)
    assert not odd


# ---- files of runs and their evaluations ----


@pytest.mark.parametrize(
    "line",
    [b"[1]\n", b"null\n", b"3\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"step": 2, "epo', b"", b"\0\0\n"],
)
def test_metrics_end_at_the_first_invalid_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "epoch": 1.0}\n' + line)
    MetricsLogger(Accelerator(cpu=True), tmp_path, 10, 2).start(5, 0)
    assert path.read_bytes() == b'{"step": 1, "epoch": 1.0}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"{}\n", b'{"step": "x", "epoch": 1}\n', b'{"step": 1}\n', b"x" * (2 << 20) + b"\n"])
def test_other_files_named_like_metrics_are_left_unchanged(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "epoch": 1.0}\n' + line)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        MetricsLogger(Accelerator(cpu=True), tmp_path, 10, 2).start(5, 0)
    assert path.read_bytes() == b'{"step": 1, "epoch": 1.0}\n' + line


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ({}, {"ids": torch.tensor([41])}),
        ({}, {"ids": torch.tensor([-1])}),
        ({}, {"ids": torch.tensor([True])}),
        ({}, {"ids": torch.tensor([0.5])}),
        ({}, {"ids": torch.zeros(41, dtype=torch.int64)}),
        ({}, {"ids": torch.zeros(1, 1, dtype=torch.int64)}),
        ({}, {"other": torch.tensor([0])}),
        ({}, {}),
        ({"other": 1}, {"ids": torch.tensor([0])}),
        (None, {"ids": torch.tensor([0])}),
    ],
)
def test_impossible_position_starts_anew(settings: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    PartialState(cpu=True)
    partial, position = tmp_path / "x.partial.npy", tmp_path / "x.safetensors"
    save_cached(position, settings, tensors)
    np.lib.format.open_memmap(partial, "w+", np.float32, (40, 8))[:] = 1
    assert features.resume(partial, position, (40, 8), {}) == []
    assert load_file(position)["ids"].tolist() == []
    assert (np.load(partial) == 0).all()


@pytest.mark.parametrize("rows", [np.ones((40, 9), "f4"), np.ones((39, 8), "f4"), np.ones((40, 8)), np.ones(3, "f4")])
def test_features_of_another_shape_start_anew(rows: np.ndarray, tmp_path: Path) -> None:
    partial, position = tmp_path / "x.partial.npy", tmp_path / "x.safetensors"
    save_cached(position, {}, {"ids": torch.tensor([1, 2])})
    np.save(partial, rows)
    assert features.resume(partial, position, (40, 8), {}) == []
    assert load_file(position)["ids"].tolist() == []
    assert np.load(partial).shape == (40, 8)


def test_classifier_of_other_shapes_is_refused(tmp_path: Path) -> None:
    evaluation: Any = SimpleNamespace(out=tmp_path, is_main=True, device=torch.device("cpu"))

    def checkpoint(inputs: int) -> EpochCheckpoint:
        head = torch.nn.Linear(inputs, 2)
        return EpochCheckpoint(evaluation, "linear", head, sgd([{"params": list(head.parameters())}]), {})

    checkpoint(1).save(3)
    assert checkpoint(1)._read() is not None
    with pytest.raises(InputError, match="its tensors are not those of this network"):
        checkpoint(5)._read()


@pytest.mark.parametrize("text", ["a 300", "a 2", "a x", "a", "a 1 1", "a 99999999999999999999", "a \u0661"])
def test_voc_labels_are_1_0_or_minus_1(text: str, tmp_path: Path, drawn: Path) -> None:
    (tmp_path / "cat_trainval.txt").write_text(f"{text}\n")
    with pytest.raises(InputError, match="not lines of an image and 1, 0 or -1"):
        svm.read_multi_labels(tmp_path, "trainval", Beton(drawn))


def test_names_are_read_as_printed(tmp_path: Path, drawn: Path) -> None:
    beton = Beton(drawn)
    names = [beton.name(index) for index in range(len(beton))]
    names[3:5] = ["a/\u202eodd\x1b.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape")]
    beton.columns = Columns.from_lists(names, [0] * len(names))
    (tmp_path / "names.txt").write_bytes("\u202eodd\x1b.jpg\n".encode() + b"caf\xe9.jpg\n")
    assert semi_supervised.find_named(beton, tmp_path / "names.txt").tolist() == [3, 4]


def test_zip_of_a_checkpoint_has_no_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("data.pkl", hostile_pickle(tmp_path / "owned"))
    with pytest.raises(InputError, match="no image in it"):
        prepare(str(tmp_path / "x.zip"), tmp_path / "x.beton")
    assert not (tmp_path / "owned").exists()

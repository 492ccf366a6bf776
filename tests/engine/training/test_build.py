"""Runs that cannot work are refused before anything slow; settings that work badly are warned of."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.settings import Data, Model, Settings
from engine.parallel import accelerator
from engine.parallel.rendezvous import rank
from engine.training import build as building
from engine.training import loop
from engine.training.build import build, check_batch, list_warnings
from pipeline.system.errors import InputError
from tests.engine.training.runs import settings
from tests.gloo import on_ranks

CPU = torch.device("cpu")

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "fp16"}, "precision 'fp16': needs a GPU"),
    "parts": ({"gradient_accumulation_steps": 32}, "gradient_accumulation_steps 32: does not divide"),
    "batch": ({"data.batch": 201}, "a batch of 201 from 200 samples"),
    "a file": ({"out": "{file}/run"}, "out '{file}/run': Not a directory: choose another folder"),
    "a run": ({"out": "{run}"}, "already holds a run: add --resume auto"),
    "in use": ({"out": "{used}", "resume": "auto"}, "another run is writing into it"),
}


def wrong(case: str, beton: Path, places: dict[str, str]) -> Settings:
    """Return settings of a run that cannot work, whose data are to be verified."""
    chosen = settings(beton, "plain")
    changed = {key: v.format(**places) if isinstance(v, str) else v for key, v in WRONG[case][0].items()}
    data = {key.removeprefix("data."): changed.pop(key) for key in list(changed) if key.startswith("data.")}
    return replace(chosen, data=replace(chosen.data, verify="full", **data), **changed)


def not_to_be_called(*_: object) -> None:
    raise AssertionError("verified")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_launch_is_refused_before_the_data_are_verified(
    case: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: str(tmp_path / name) for name in ("file", "run", "used")}
    (tmp_path / "file").touch()
    (tmp_path / "run" / "checkpoints" / "step_4").mkdir(parents=True)
    (tmp_path / "used").mkdir()
    monkeypatch.setattr(building, "verify_datasets", not_to_be_called)
    chosen, message = wrong(case, drawn, places), WRONG[case][1].format(**places)
    with open(tmp_path / "used" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=message):
            loop.train(chosen)


def launch_wrongly(beton: str, out: str) -> None:
    """Launch three runs that cannot work: without the GPU they need, with a folder in a file, with an odd batch."""
    building.verify_datasets = not_to_be_called
    chosen = settings(Path(beton), "plain")
    chosen = replace(chosen, data=replace(chosen.data, verify="full"), out=f"{out}/new")
    odd = replace(chosen, data=replace(chosen.data, batch=31))
    messages = []
    for each in (replace(chosen, precision="fp16"), replace(chosen, out=f"{out}/file/run"), odd):
        with pytest.raises(InputError) as raised:
            loop.train(each)
        messages.append(str(raised.value))
    Path(out, f"{rank()}.json").write_text(json.dumps(messages))


def test_wrong_launch_is_refused_on_all_ranks(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    on_ranks(2, launch_wrongly, str(drawn), str(tmp_path))
    one, other = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert one == other
    assert [message.partition(":")[0].split(" ")[0] for message in one] == ["precision", "rank", "data.batch"], one


def count_agreements(beton: str, out: str) -> None:
    """Train, and note the number of exchanges between ranks before the first step."""
    from engine.parallel import consensus

    counts: list[int] = []
    step = loop.train_on

    def train_on(*arguments: Any, **options: Any) -> None:
        counts.append(consensus._exchanges)
        step(*arguments, **options)

    loop.train_on = train_on
    loop.train(replace(settings(Path(beton), "plain"), out=f"{out}/run"))
    Path(out, f"{rank()}.txt").write_text(str(counts[0]))


def test_ranks_agree_four_times_before_the_first_step(drawn: Path, tmp_path: Path) -> None:
    on_ranks(2, count_agreements, str(drawn), str(tmp_path))
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(2)] == ["4", "4"]


def test_parts_of_a_single_sample_are_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match="gradient_accumulation_steps 32"):
        check_batch(replace(settings(drawn, "plain"), gradient_accumulation_steps=32))


def test_refused_run_is_not_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: False)
    with pytest.raises(InputError, match="no such file"):
        build(replace(settings(Path("nowhere.beton"), "plain"), precision="bf16"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "bn", "warned"),
    [(64, "shuffle", False), (40, "shuffle", False), (42, "shuffle", True), (42, "plain", False)],
)
def test_batch_that_batchnorms_parts_do_not_divide_is_warned_of(batch: int, bn: str, warned: bool, drawn: Path) -> None:
    chosen = settings(drawn, bn)
    warnings = list_warnings(replace(chosen, data=replace(chosen.data, batch=batch)), CPU)
    assert ("does not divide into the 8 parts" in " ".join(warnings)) == warned


@pytest.mark.parametrize(
    ("width", "sizes", "arch", "warned"),
    [
        (0.125, [64], "resnet18", True),
        (0.25, [64], "resnet18", False),
        (0.125, [48], "resnet18", False),
        (0.125, [64, 32], "resnet18", True),
        (1.0, [64], "vit_small", False),
    ],
)
def test_few_channels_are_warned_of_on_a_cpu(width: float, sizes: list[int], arch: Any, warned: bool) -> None:
    chosen = Settings(model=Model(arch=arch, width=width), data=Data(size=sizes[-1]))
    chosen.data.sizes = sizes
    assert ("choose 0.25 or more" in " ".join(list_warnings(chosen, CPU))) == warned
    assert "choose 0.25 or more" not in " ".join(list_warnings(chosen, torch.device("cuda")))


def test_queue_larger_than_the_data_set_is_warned_of(drawn: Path) -> None:
    warnings = [list_warnings(settings(drawn, "plain"), CPU, samples) for samples in (None, 70, 69)]
    assert [len(each) for each in warnings] == [0, 0, 1]
    assert "method.queue_size 70 is larger than the data set's 69 images" in warnings[2][0]

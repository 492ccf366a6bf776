"""The detectron2 recipe: wrong input is refused first, and settings equal those of `detect`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
import yaml

from engine.evaluate.detection import detect
from engine.transfer import detectron2_voc
from engine.weights.architecture import Architecture
from methods.encoders import resnet
from pipeline.system.errors import InputError
from tests import processes


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """VOCdevkit with lists of its sets only."""
    for year, name in detectron2_voc._SETS:
        lists = tmp_path / "kit" / year / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{name}.txt").write_text("000001\n")
    return tmp_path / "kit"


def _main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must fail; return its error."""
    monkeypatch.setattr(sys, "argv", ["detectron2_voc", *arguments])
    with pytest.raises(SystemExit) as ended:
        detectron2_voc.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_missing_input_is_one_line(
    kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    error = _main(monkeypatch, capsys, "x.pth", "--data", str(tmp_path), "--out", out)
    assert "VOC2007/ImageSets/Main/trainval.txt: give the folder that contains VOC2007 and VOC2012" in error
    assert "--gpus 9" in _main(monkeypatch, capsys, "x.pth", "--data", str(kit), "--out", out, "--gpus", "9")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last_checkpoint").touch()
    assert "already contains a run: add --resume" in _main(
        monkeypatch, capsys, "x.pth", "--data", str(kit), "--out", out
    )
    out = str(tmp_path / "new")
    monkeypatch.setitem(sys.modules, "detectron2", None)
    error = _main(monkeypatch, capsys, "x.pth", "--data", str(kit), "--out", out)
    assert "detectron2 is not installed: pip install 'git+https://github.com/facebookresearch/detectron2.git'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arch", "width", "message"), [("resnet18", 1, "needs one of resnet50"), ("resnet50", 0.5, "width 0.5")]
)
def test_encoders_that_do_not_fit_c4_are_refused(
    arch: str,
    width: float,
    message: str,
    kit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", argparse)  # any module: it is not used
    torch.save(resnet(arch, width=width).state_dict(), tmp_path / "x.pth")
    error = _main(monkeypatch, capsys, str(tmp_path / "x.pth"), "--data", str(kit), "--out", str(tmp_path / "out"))
    assert message in error
    assert not (tmp_path / "out").exists()


def test_the_recipe_equals_the_settings_of_detect() -> None:
    recipe = yaml.safe_load(detectron2_voc.RECIPE.read_text())
    solver, model = recipe["SOLVER"], recipe["MODEL"]
    assert tuple(recipe["INPUT"]["MIN_SIZE_TRAIN"]) == detect.SIZES
    assert solver["IMS_PER_BATCH"] == detect.BATCH
    for step in (0, 50, *solver["STEPS"], *(step - 1 for step in (*solver["STEPS"], solver["MAX_ITER"]))):
        warm = min(1.0, 0.001 + 0.999 * step / solver["WARMUP_ITERS"])
        drops = sum(step >= at for at in solver["STEPS"])
        assert detect.rate(solver["BASE_LR"], step, solver["MAX_ITER"]) == pytest.approx(0.02 * warm * 0.1**drops)
    assert (model["BACKBONE"]["FREEZE_AT"], model["RESNETS"]["STRIDE_IN_1X1"], recipe["INPUT"]["FORMAT"]) == (
        0,
        False,
        "RGB",
    )


def test_help_needs_no_detectron2() -> None:
    ended = processes.run([sys.executable, "-m", "engine.transfer.detectron2_voc", "--help"])
    assert ended.returncode == 0
    assert "--dry-run" in ended.stdout


def test_detectron2_accepts_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("detectron2.config", exc_type=ImportError)
    args = argparse.Namespace(out=tmp_path, iterations=240, dry_run=False, settings=["SEED", "7"])
    cfg = detectron2_voc.config(Architecture("resnet101"), args, tmp_path)
    assert (cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS), cfg.SEED) == (240, (180, 220), 7)
    assert (101, str(tmp_path / "backbone.pth")) == (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.WEIGHTS)
    assert list(cfg.MODEL.RESNETS.OUT_FEATURES) == ["res4"]  # its default: C4
    args.settings = ["SOLVER.NO_SUCH_KEY", "7"]
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        detectron2_voc.config(Architecture("resnet50"), args, tmp_path)

"""MoCo's detection on PASCAL VOC 2007+2012 by detectron2, from an encoder; AP, AP50 and AP75 on VOC07 test.

    python -m engine.transfer.detectron2_voc RUN --data VOCdevkit --out DIR --gpus 8 [--settings KEY VALUE ...]

The recipe is `voc_r50_c4.yaml`, which `--settings` change. `engine.evaluate.detection.detect` does the same with
torchvision.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from engine.export.formats import export, refuse
from engine.weights.load import Architecture, Loaded, load_encoder
from pipeline.system.errors import InputError, command
from pipeline.system.files import write_json

RECIPE = Path(__file__).with_name("voc_r50_c4.yaml")
_DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152}
_SETS = (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test"))
_STEPS = (18 / 24, 22 / 24)
_DRY = 2  # iterations
_INSTALL = (
    "pip install 'git+https://github.com/facebookresearch/detectron2.git', which builds it for the torch installed"
)


def config(architecture: Architecture, args: argparse.Namespace, out: Path) -> Any:
    """Return detectron2's settings: the recipe, then the command line. Raises InputError for keys it has not."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(RECIPE))
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(out / "backbone.pth"), str(out)
    cfg.MODEL.RESNETS.DEPTH = _DEPTHS[architecture.arch]
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if args.iterations:
        cfg.SOLVER.MAX_ITER = args.iterations
        cfg.SOLVER.STEPS = tuple(sorted({int(share * args.iterations) for share in _STEPS} - {0}))
    if args.dry_run:
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.DATASETS.TEST, cfg.TEST.PRECISE_BN.ENABLED = _DRY, (), (), False
    try:
        cfg.merge_from_list(args.settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"--settings {' '.join(args.settings)}: {error}: give KEY VALUE as detectron2's settings have them"
        ) from None
    return cfg


def register_heads() -> None:
    """Make the recipe's heads known to detectron2: its own of conv5, with a BatchNorm behind (appendix A.1)."""
    from detectron2.layers import get_norm
    from detectron2.modeling import ROI_HEADS_REGISTRY
    from detectron2.modeling.roi_heads import Res5ROIHeads

    if "Res5WithNorm" in ROI_HEADS_REGISTRY:
        return

    class Res5WithNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg: Any) -> tuple[torch.nn.Sequential, int]:
            stage, channels = super()._build_res5_block(cfg)
            stage.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
            return stage, channels

    ROI_HEADS_REGISTRY.register(Res5WithNorm)


def train(cfg: Any, resume: bool) -> None:
    """Train, or go on, in one process a GPU, and write the scores. Called by detectron2's `launch`."""
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import PascalVOCDetectionEvaluator
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: Any, name: str) -> Any:
            return PascalVOCDetectionEvaluator(name)

    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    register_heads()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    latest = trainer.storage.latest()
    found = {name: latest[f"bbox/{name}"][0] for name in ("AP", "AP50", "AP75") if f"bbox/{name}" in latest}
    if found and comm.is_main_process():
        write_json(Path(cfg.OUTPUT_DIR, "detectron2_voc.json"), found)
        print("detection, detectron2: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


def check(args: argparse.Namespace) -> None:
    """Raise InputError for what is not there."""
    missing = [args.data / year / "ImageSets" / "Main" / f"{name}.txt" for year, name in _SETS]
    missing = [path for path in missing if not path.is_file()]
    if missing:
        raise InputError(f"--data {args.data}: no {missing[0]}: give the folder that holds VOC2007 and VOC2012")
    if args.gpus > max(1, torch.cuda.device_count()):
        raise InputError(f"--gpus {args.gpus}: this machine has {torch.cuda.device_count()}")
    if (args.out / "last_checkpoint").exists() and not (args.resume or args.dry_run):
        raise InputError(f"--out {args.out}: already holds a run: add --resume, or choose another")
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: {_INSTALL}") from None


def _arguments() -> argparse.Namespace:
    what = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m engine.transfer.detectron2_voc", description=what)
    parser.add_argument("checkpoint", type=Path, help="run or checkpoint folder, .safetensors, .pth, .pth.tar")
    parser.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="that holds VOC2007 and VOC2012")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for checkpoints and scores")
    parser.add_argument("--gpus", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--iterations", type=int, help="in place of 24,000; the steps move with them")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY VALUE", help="detectron2's, such as SEED 1")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--dry-run", action="store_true", help="two iterations, no test; keeps nothing")
    return parser.parse_args()


@command
def main() -> None:
    args = _arguments()
    check(args)
    loaded = load_encoder(args.checkpoint, args.which)
    refuse(loaded.architecture, "detectron2", "detectron2")
    if loaded.architecture.arch not in _DEPTHS:
        raise InputError(f"{args.checkpoint}: {loaded.architecture}: R50-C4 wants one of {', '.join(_DEPTHS)}")
    print(loaded.summary())
    with tempfile.TemporaryDirectory(prefix="millrace-") if args.dry_run else nullcontext(args.out) as out:
        start(loaded, args, Path(out))


def start(loaded: Loaded, args: argparse.Namespace, out: Path) -> None:
    """Export the encoder into `out`, and have detectron2 train from it there, in a process a GPU."""
    out.mkdir(parents=True, exist_ok=True)
    export(loaded, "detectron2", out / "backbone.pth")
    os.environ["DETECTRON2_DATASETS"] = str(args.data)  # read where detectron2 is imported, in each process
    from detectron2.engine import launch

    launch(train, args.gpus, dist_url="auto", args=(config(loaded.architecture, args, out), args.resume))


if __name__ == "__main__":
    main()

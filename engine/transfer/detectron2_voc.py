"""MoCo's detection on PASCAL VOC 2007+2012 by detectron2, from an encoder; AP, AP50 and AP75 on VOC07 test.

    python -m engine.transfer.detectron2_voc RUN --data VOCdevkit --out DIR --gpus 8 [--settings KEY VALUE ...]

The recipe is `voc_r50_c4.yaml`; `--settings` change it. `engine.evaluate.detection.detect` does the same with
torchvision.
"""

import argparse
import logging
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from engine.export.formats import export, refuse
from engine.weights.architecture import Architecture
from engine.weights.load import load_encoder
from pipeline.augment.color import IMAGENET, Statistics
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, command
from pipeline.system.files import write_json

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).with_name("voc_r50_c4.yaml")
_DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152}
_SETS = (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test"))
_MILESTONES = (18 / 24, 22 / 24)
_DRY_ITERATIONS = 2
_INSTALL = (
    "pip install 'git+https://github.com/facebookresearch/detectron2.git', which builds it for the torch installed"
)


def config(architecture: Architecture, args: argparse.Namespace, out: Path, statistics: Statistics = IMAGENET) -> Any:
    """Return detectron2's settings: the recipe, then the command line. Raises InputError for an unknown key."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(RECIPE))
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(out / "backbone.pth"), str(out)
    cfg.MODEL.RESNETS.DEPTH = _DEPTHS[architecture.arch]
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = ([round(255 * value, 3) for value in values] for values in statistics)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if args.iterations:
        cfg.SOLVER.MAX_ITER = args.iterations
        cfg.SOLVER.STEPS = tuple(sorted({int(milestone * args.iterations) for milestone in _MILESTONES} - {0}))
    if args.dry_run:
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = _DRY_ITERATIONS, ()
        cfg.DATASETS.TEST, cfg.TEST.PRECISE_BN.ENABLED = (), False
    try:
        cfg.merge_from_list(args.settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"--settings {' '.join(args.settings)}: {error}: give KEY VALUE of detectron2's settings"
        ) from None
    return cfg


def register_heads() -> None:
    """Register the recipe's heads in detectron2: its heads of conv5, followed by a BatchNorm (appendix A.1)."""
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
    """Train, or resume, and write the scores. detectron2's `launch` calls it once for each GPU."""
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
    scores = {name: latest[f"bbox/{name}"][0] for name in ("AP", "AP50", "AP75") if f"bbox/{name}" in latest}
    if scores and comm.is_main_process():
        write_json(Path(cfg.OUTPUT_DIR, "detectron2_voc.json"), scores)
        print("detection, detectron2: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))


def check(args: argparse.Namespace) -> None:
    """Raise InputError for missing data, GPUs or packages, or for a folder that contains a run."""
    files = [args.data / year / "ImageSets" / "Main" / f"{name}.txt" for year, name in _SETS]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise InputError(f"--data {args.data}: no {missing[0]}: give the folder that contains VOC2007 and VOC2012")
    if args.gpus > max(1, torch.cuda.device_count()):
        raise InputError(f"--gpus {args.gpus}: this machine has {torch.cuda.device_count()}")
    if (args.out / "last_checkpoint").exists() and not (args.resume or args.dry_run):
        raise InputError(f"--out {args.out}: already contains a run: add --resume, or choose another")
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: {_INSTALL}") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description = (__doc__ or "").splitlines()[0]
    made = ArgumentParser(prog="python -m engine.transfer.detectron2_voc", description=description)
    made.add_argument("checkpoint", type=Path, help="run or checkpoint folder, .safetensors, .pth, .pth.tar")
    made.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    made.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="contains VOC2007 and VOC2012")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of checkpoints and scores")
    made.add_argument("--gpus", type=int, default=1, help="(default: %(default)s)")
    made.add_argument("--iterations", type=int, help="replace 24,000; milestones scale")
    made.add_argument("--settings", nargs="+", default=[], metavar="KEY VALUE", help="detectron2's, such as SEED 1")
    made.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --out")
    made.add_argument("--dry-run", action="store_true", help="two iterations, no test; saves nothing")
    return made


@command
def main() -> None:
    args = parser().parse_args()
    check(args)
    encoder = load_encoder(args.checkpoint, args.which)
    refuse(encoder.architecture, "detectron2", "detectron2")
    if encoder.architecture.arch not in _DEPTHS:
        raise InputError(f"{args.checkpoint}: {encoder.architecture}: R50-C4 needs one of {', '.join(_DEPTHS)}")
    logger.info("%s", encoder.summary())
    with tempfile.TemporaryDirectory(prefix="millrace-") if args.dry_run else nullcontext(args.out) as folder:
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        export(encoder, "detectron2", out / "backbone.pth")
        os.environ["DETECTRON2_DATASETS"] = str(args.data)  # read on import of detectron2, in each process
        from detectron2.engine import launch

        settings = config(encoder.architecture, args, out, encoder.statistics)
        launch(train, args.gpus, dist_url="auto", args=(settings, args.resume))


if __name__ == "__main__":
    main()

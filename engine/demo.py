"""Demo: images to beton, preview, MoCo v2 pretraining on the machine's device, and kNN before and after.

./millrace demo                 # ten classes of drawn images
./millrace demo DATA            # a folder, tar, zip or beton of yours
"""

import itertools
import json
import logging
import math
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table

from engine.config.settings import Data, Knn, Method, Model, Optim, Settings
from engine.evaluate.online_knn import Knn as KnnEvaluation
from engine.evaluate.online_knn import RawPixels
from engine.parallel.accelerator import bfloat16_on_cpu, bfloat16_on_gpu, choose_device, now
from engine.report.gallery import GalleryOptions
from engine.report.page import report, write
from engine.report.plotting import curves
from engine.report.run_folder import read_runs
from engine.training.build import build
from methods.encoders import place
from methods.registry import build_backbone
from pipeline.beton import Beton
from pipeline.inspect import preview
from pipeline.prepare import prepare
from pipeline.sources.archives import open_source
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, command
from pipeline.system.files import write_json
from pipeline.system.text import counted
from pipeline.views import AUGMENTATIONS

logger = logging.getLogger(__name__)

_TRAIN_IMAGES, _TEST_IMAGES = 5000, 1000  # drawn
_SMALL_PIXELS = 96  # images of at most this side are trained on at 32 pixels
_MIN_IMAGES = 16
_MAX_EPOCHS = 60
_RATE_STEPS = 20
_ENOUGH_PAIRS = 125_000  # 140,000 synthetic images gave a kNN top-1 of 75 %, 40,000 gave 31 %
_KNN_LIMIT = 10000
_MIN_STEPS = 78  # steps of an epoch, given enough images: a queue learns in many small steps, not in few large ones
_MAX_IMAGES = 20000  # images taken from a folder or archive, evenly spread: an epoch ends in a few minutes anywhere


def _sources(data: str | None) -> list[tuple[str, str | None]]:
    """Return sources and subsets to prepare, for training and, if any, for evaluation; none for a beton."""
    if data is None:
        return [(f"synthetic:{_TRAIN_IMAGES}", None), (f"synthetic:{10 * _TRAIN_IMAGES}:{_TEST_IMAGES}", None)]
    if data.endswith(".beton"):
        Beton(data)
        return []
    subsets = _subsets(data)
    open_source(data, subsets[0])
    return [(data, subset) for subset in subsets]


def _prepared(sources: list[tuple[str, str | None]], out: Path) -> tuple[Path, Path]:
    """Write training and evaluation betons into `out`; return their paths.

    With one source both are the same file, and every tenth image is evaluated.
    """
    written = []
    for (source, subset), name in zip(sources, ("train.beton", "eval.beton"), strict=False):
        logger.info(f"preparing {source}{f', {subset}' if subset else ''} ...")
        manifest = prepare(source, out / name, subset=subset, skip_bad=100, limit=_MAX_IMAGES)
        for image, reason in manifest.skipped:
            logger.warning(f"left out: {image}: {reason}")
        written.append(out / name)
    return written[0], written[-1]


def _subsets(data: str) -> list[str | None]:
    for test in ("test", "val", "validation"):
        try:
            for subset in ("train", test):
                open_source(data, subset)
        except InputError:
            continue
        return ["train", test]
    return [None]


def _settings(train: Path, evaluation: Path, out: Path, cpu: bool = False) -> Settings:
    """Return settings of a small MoCo v2 run for these data and this machine, their epochs still open."""
    beton, gpus = Beton(train), _gpus(cpu)
    if len(beton) < _MIN_IMAGES:
        raise InputError(f"{train}: {len(beton)} images: give at least {_MIN_IMAGES}, better a thousand")
    small = beton.longest_side <= _SMALL_PIXELS
    devices = 2 * max(1, gpus)
    batch = max(devices, min(256, len(beton) // _MIN_STEPS) // devices * devices)
    labeled = bool((beton.labels >= 0).all() and (Beton(evaluation).labels >= 0).all())
    return Settings(
        data=Data(
            train=str(train),
            eval=str(evaluation) if labeled else "",
            augmentation="moco_v2_32" if small else "moco_v2",
            size=32 if small else 96,
            batch=batch,
            eval_crop_ratio=1.0 if small else 0.875,
        ),
        model=Model(arch="resnet18", stem="small" if small else "imagenet", width=1.0 if gpus else 0.25, bn="shuffle"),
        method=Method(temperature=0.1, ema_momentum=0.99, queue_size=max(batch, min(4096, len(beton) // 2))),
        optim=Optim(
            lr=0.12 * math.sqrt(batch / 256), weight_decay=5e-4, epochs=1, schedule="cosine", schedule_interval="step"
        ),
        knn=Knn(every=1, k=20, limit=_KNN_LIMIT),
        out=str(out / "run"),
        log_every=max(1, len(beton) // batch // 2),
        precision=_precision(gpus > 0),
        cpu=cpu,
    )


def _precision(gpu: bool) -> Literal["no", "fp16", "bf16"]:
    """Return the fastest precision of this machine."""
    if gpu:
        return "bf16" if bfloat16_on_gpu() else "fp16"
    return "bf16" if bfloat16_on_cpu() else "no"


def _with_epochs(settings: Settings, minutes: float) -> Settings:
    """Set the number of epochs to fit into `minutes`, by the rate of a few steps; return the settings."""
    rate = measure_rate(settings) * max(1, _gpus(settings.cpu))
    samples = len(Beton(settings.data.train))
    epochs = int(min(max(rate * minutes * 60 / samples, 1), _MAX_EPOCHS))
    settings.optim.epochs = epochs
    settings.optim.warmup_epochs = 1.0 if epochs > 4 else 0.0
    settings.knn.every = max(1, epochs // 10)
    minutes = samples * epochs / rate / 60
    length = f"{counted(epochs, 'epoch')} of {samples} images, about {minutes:.1f} min"
    logger.info(f"{rate:.0f} pairs/s here: training {length}")
    if samples * epochs < _ENOUGH_PAIRS:
        needed = math.ceil(_ENOUGH_PAIRS / rate / 60)
        logger.warning(f"that is little to learn from: {_ENOUGH_PAIRS} pairs take --minutes {needed} here")
    return settings


def measure_rate(settings: Settings) -> float:
    """Return the pairs per second of a run with these settings on this machine, over 20 steps after 20 of warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(replace(settings, out=folder, tracker="none"))
        try:
            for number, batch in enumerate(itertools.islice(run.loader.endless(), 2 * _RATE_STEPS)):
                if number == _RATE_STEPS:
                    start = now(run.accelerator.device)
                run.model.step(batch)
            return _RATE_STEPS * settings.data.batch / (now(run.accelerator.device) - start)
        finally:
            run.close()
            run.accelerator.free_memory()


def _baselines(settings: Settings) -> dict[str, float]:
    """Return kNN top-1 of raw pixels and of the untrained encoder."""
    data, knn, model, device = settings.data, settings.knn, settings.model, _device(settings.cpu)
    options: dict[str, Any] = {"k": knn.k, "temperature": knn.temperature, "limit": knn.limit, "device": device}
    options |= {"size": data.size, "batch": 256, "crop_ratio": data.eval_crop_ratio}
    evaluation = KnnEvaluation(Beton(data.train), Beton(data.eval), **options)
    set_seed(settings.seed)
    untrained = place(build_backbone(model.arch, stem=model.stem, width=model.width), device)
    return {"raw pixels": evaluation.top1(RawPixels()), "untrained encoder": evaluation.top1(untrained)}


def _gpus(cpu: bool) -> int:
    """Return the number of GPUs to train on."""
    return 0 if cpu else torch.cuda.device_count()


def _device(cpu: bool) -> torch.device:
    return torch.device("cuda" if _gpus(cpu) else "cpu")


def _launch(config: Path, gpus: int) -> None:
    """Train by the recipe `config`, like a user.

    Raises KeyboardInterrupt after Ctrl-C, once the training, which receives it too, has ended with its checkpoint.
    """
    arguments = [str(Path(__file__).with_name("run.py")), "--config", str(config)]
    command, shown = [sys.executable], "python"
    if gpus > 1:
        options = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(gpus)]
        launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--mixed_precision", "no"]
        command += launcher + options
        shown = f"accelerate launch {' '.join(options)}"
    shown = f"{shown} {shlex.join(arguments)}"
    logger.info(f"$ {shown}")
    interrupted, training = False, subprocess.Popen([*command, *arguments])
    while training.poll() is None:
        try:
            training.wait()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        logger.info(f"resume its training with: {shown} --resume auto")
        raise KeyboardInterrupt
    if training.returncode:
        raise InputError(f"training failed (see the lines above): its settings are in {config}")


def _count_evaluated(train: Path, evaluation: Path) -> int:
    """Return the number of images that kNN classifies."""
    count = len(Beton(evaluation))
    return min(-(-count // 10), _KNN_LIMIT) if train == evaluation else count


def _table(rows: dict[str, float], summary: dict[str, Any], evaluated: int) -> Table:
    """Return kNN top-1 before and after training, and figures of the training."""
    table = Table(title="Millrace demo", show_header=False)
    for name, top1 in rows.items():
        table.add_row(f"kNN top-1, {name}", f"{top1:.1%}")
    if rows:
        table.add_row("evaluated on", f"{evaluated} images")
    else:
        table.add_row("kNN top-1", "none: the images have no labels")
    table.add_row("loss", f"{summary['loss']:.3f}")
    epochs = f"{summary['epoch']:.0f} epoch{'s' * (summary['epoch'] > 1)}"
    table.add_row("training", f"{summary['training_seconds']:.0f} s, {epochs}, on {summary['device']}")
    table.add_row("pairs/s", f"{summary['pairs_per_second']:.0f}")
    table.add_row("data-wait", f"{summary['data_wait_fraction']:.1%}")
    return table


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="./millrace demo", description="Prepare, preview, pretrain, evaluate.")
    made.add_argument("data", metavar="DATA", nargs="?", help="folder, .tar, .zip or .beton (default: drawn images)")
    made.add_argument("--out", type=Path, help="folder for everything (default: runs/demo-DATE-TIME)")
    made.add_argument("--minutes", type=float, default=3.5, help="target training time (default %(default)s)")
    made.add_argument("--cpu", action="store_true", help="do not use the GPU")
    return made


@command
def main() -> None:
    args = parser().parse_args()
    if not 0 < args.minutes <= 10000:
        raise InputError(f"--minutes {args.minutes}: give a number above 0")
    out = args.out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    choose_device(Settings(precision="no", tracker="none", cpu=args.cpu))  # raises where CUDA does not answer
    sources = _sources(args.data)
    if (out / "run").exists():
        raise InputError(f"{out}: already holds a demo: choose another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}): choose another folder with --out") from None
    train, evaluation = _prepared(sources, out) if sources else (Path(args.data), Path(args.data))
    settings = _settings(train, evaluation, out, args.cpu)
    picture = out / "preview.png"
    preview(Beton(train), AUGMENTATIONS[settings.data.augmentation], size=settings.data.size).save(picture)
    rows = _baselines(settings) if settings.data.eval else {}
    settings = _with_epochs(settings, args.minutes)
    settings.write(out / "recipe.yaml")
    _launch(out / "recipe.yaml", _gpus(args.cpu))
    run = Path(settings.out)
    summary = json.loads((run / "summary.json").read_text())
    curves(run / "metrics.jsonl", out / "curve.png", levels=rows)
    if "knn_top1" in summary:
        rows |= {"trained encoder": summary["knn_top1"]}
    write_json(out / "demo.json", rows)
    Console().print(_table(rows, summary, _count_evaluated(train, evaluation)))
    options = GalleryOptions("", 8, _TEST_IMAGES, settings.seed, "online", _device(args.cpu))
    write(report(read_runs([run]), options), out / "report.html")
    files = {"run folder": run, "preview": picture, "curve": out / "curve.png", "report": out / "report.html"}
    for name, path in files.items():
        print(f"{name:11s} {path}")


if __name__ == "__main__":
    main()

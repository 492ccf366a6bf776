"""Demo: images to beton, preview, MoCo v3 pretraining on the machine's device, and kNN before and after.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState
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
from methods.registry import Backbone, build_backbone
from pipeline.beton import Beton
from pipeline.inspect import preview
from pipeline.prepare import prepare
from pipeline.sources.images import list_images
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, RunFailed, command
from pipeline.system.files import write_json
from pipeline.system.text import counted

logger = logging.getLogger(__name__)

_TRAIN_IMAGES, _TEST_IMAGES = 3000, 1000  # drawn
_DRAWN_PIXELS, _SMALL_PIXELS, _LARGE_PIXELS = 24, 32, 96  # views of drawn images, of small ones, and of others
_MAX_SMALL_SIDE = 96  # pixels of a small image
_MIN_IMAGES = 16
_MIN_LIMIT = 500  # images taken, however few the minutes
_MAX_IMAGES = 20000  # taken from a folder or archive, evenly spread
_IMAGES_A_MINUTE = 2500  # of a source at most: preparing them takes a fifth of the minutes on two cores, or less
_MAX_EPOCHS = 200
_WARM_UP_STEPS, _RATE_STEPS = 5, 20
_RATE_SHARE = 0.05  # of the minutes, to measure the rate
_RATE_MARGIN = 0.9  # a run's rate, in those of its first steps
_EVALUATION_SHARE, _MAX_EVALUATIONS = 0.1, 10  # of the training's time; and number of evaluations
_START_SECONDS, _PAGE_SECONDS = 8.0, 15.0  # until the training process takes its first step; for the page at the end
_ENOUGH_PAIRS = 90_000  # of drawn images
_BATCH, _MIN_BATCH, _GPU_BATCH = 64, 16, 256
_MIN_STEPS = 46  # of an epoch, given enough images: many small steps teach more than few large ones
_KNN_LIMIT = 10000
_LOG_LINES = 40


def _sources(data: str | None, limit: int) -> list[tuple[str, str | None]]:
    """Return sources and subsets to prepare, for training and, if any, for evaluation; none for a beton.

    limit: drawn images at most.
    """
    if data is None:
        train, test = min(_TRAIN_IMAGES, limit), min(_TEST_IMAGES, limit)
        return [(f"synthetic:{train}", None), (f"synthetic:{10 * _TRAIN_IMAGES}:{test}", None)]
    if data.endswith(".beton"):
        Beton(data)
        return []
    subsets = _subsets(data)
    list_images([data], subsets[0])
    return [(data, subset) for subset in subsets]


def _prepared(sources: list[tuple[str, str | None]], out: Path, limit: int) -> tuple[Path, Path]:
    """Write training and evaluation betons of at most `limit` images into `out`; return their paths.

    With one source both are the same file, and every tenth image is evaluated.
    """
    written = []
    for (source, subset), name in zip(sources, ("train.beton", "eval.beton"), strict=False):
        logger.info(f"preparing {source}{f', {subset}' if subset else ''} ...")
        manifest = prepare(source, out / name, subset=subset, skip_bad=100, limit=limit)
        for image, reason in manifest.skipped:
            logger.warning(f"left out: {image}: {reason}")
        written.append(out / name)
    return written[0], written[-1]


def _subsets(data: str) -> list[str | None]:
    for test in ("test", "val", "validation"):
        try:
            for subset in ("train", test):
                list_images([data], subset)
        except InputError:
            continue
        return ["train", test]
    return [None]


def _settings(
    train: Path, evaluation: Path, out: Path, *, drawn: bool = False, cpu: bool = False, seed: int = 0
) -> Settings:
    """Return settings of a small MoCo v3 run for these data and this machine, their epochs still open.

    In-batch negatives, and a momentum encoder that follows closely, teach within a thousand steps; a queue does not.
    """
    beton, gpus = Beton(train), _gpus(cpu)
    if len(beton) < _MIN_IMAGES:
        raise InputError(f"{train}: {len(beton)} images: give at least {_MIN_IMAGES}, better a thousand")
    small = beton.longest_side <= _MAX_SMALL_SIDE
    size = _DRAWN_PIXELS if drawn else _SMALL_PIXELS if small else _LARGE_PIXELS
    devices = 2 * max(1, gpus)
    batch = min(_GPU_BATCH if gpus else _BATCH, max(_MIN_BATCH, len(beton) // _MIN_STEPS))
    batch = max(devices, batch // devices * devices)
    labeled = bool((beton.labels >= 0).all() and (Beton(evaluation).labels >= 0).all())
    return Settings(
        data=Data(
            train=str(train),
            eval=str(evaluation) if labeled else "",
            augmentation="moco_v2_32" if small else "moco_v2",
            size=size,
            batch=batch,
            eval_crop_ratio=1.0 if small else 0.875,
        ),
        model=Model(
            arch="resnet10" if small else "resnet18",
            stem="medium" if small else "imagenet",
            width=1.0 if gpus else 0.25,
            dim=64,
            mlp_dim=256,
            zero_init_residual=False,
        ),
        method=Method(name="moco_v3", temperature=0.2, ema_momentum=0.9),
        optim=Optim(
            lr=0.4 * math.sqrt(batch / 256), weight_decay=5e-4, epochs=1, schedule="cosine", schedule_interval="step"
        ),
        knn=Knn(every=1, k=20, limit=_KNN_LIMIT),
        out=str(out / "run"),
        seed=seed,
        precision=_precisions(gpus > 0)[0],
        cpu=cpu,
    )


def _precisions(gpu: bool) -> list[Literal["no", "fp16", "bf16"]]:
    """Return the precisions one of which is this machine's fastest."""
    if gpu:
        return ["bf16"] if bfloat16_on_gpu() else ["fp16"]
    return ["no", "bf16"] if bfloat16_on_cpu() else ["no"]


@dataclass
class Budget:
    """The minutes of the demo, from its creation."""

    minutes: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def images(self) -> int:
        """Images to prepare at most, of each source."""
        return max(_MIN_LIMIT, min(_MAX_IMAGES, int(_IMAGES_A_MINUTE * self.minutes)))

    @property
    def left(self) -> float:
        """Seconds left for training."""
        return 60 * self.minutes - (time.perf_counter() - self.start) - _START_SECONDS - _PAGE_SECONDS


def _with_epochs(settings: Settings, budget: Budget, evaluation_seconds: float) -> Settings:
    """Set precision, epochs and evaluations to fit into the budget, by the rate of a few steps; return the settings."""
    rate = _with_precision(settings, 60 * _RATE_SHARE * budget.minutes) * _RATE_MARGIN
    samples, left = len(Beton(settings.data.train)), budget.left
    evaluations = max(1, min(_MAX_EVALUATIONS, int(_EVALUATION_SHARE * left / max(evaluation_seconds, 1e-3))))
    epochs = int(min(max((left - evaluations * evaluation_seconds) * rate / samples, 1), _MAX_EPOCHS))
    settings.optim.epochs = epochs
    settings.optim.warmup_epochs = 1.0 if epochs > 4 else 0.0
    settings.knn.every = math.ceil(epochs / evaluations)
    settings.log_every = max(1, epochs * samples // settings.data.batch // _LOG_LINES)
    seconds = samples * epochs / rate
    length = f"{counted(epochs, 'epoch')} of {samples} images, about {seconds / 60:.1f} min"
    logger.info(f"{rate:.0f} pairs/s here: training {length}")
    spent = 60 * budget.minutes - left
    if seconds + evaluations * evaluation_seconds > left:
        needed = _minutes_for_epoch(samples, budget, rate, spent + evaluation_seconds)
        logger.warning(f"--minutes {budget.minutes:g} is too short for an epoch: one takes --minutes {needed} here")
    if samples * epochs < _ENOUGH_PAIRS:
        logger.warning(f"that is little to learn from: {_remedy(samples, epochs, rate, spent)}")
    return settings


def _remedy(samples: int, epochs: int, rate: float, spent: float) -> str:
    """Return what to change to train on more pairs. spent: seconds besides training."""
    if epochs == _MAX_EPOCHS:
        return f"give more than {samples} images"
    minutes = math.ceil((spent + _ENOUGH_PAIRS / rate / (1 - _EVALUATION_SHARE)) / 60)
    return f"{_ENOUGH_PAIRS} pairs take --minutes {minutes} here"


def _minutes_for_epoch(samples: int, budget: Budget, rate: float, spent: float) -> int:
    """Return the minutes that an epoch takes, with the images that are then prepared. spent: seconds besides it."""
    for minutes in itertools.count(math.ceil(budget.minutes)):
        images = samples if samples < budget.images else max(samples, Budget(minutes).images)
        if spent + images / rate <= 60 * minutes:
            return minutes
    raise AssertionError


def _with_precision(settings: Settings, seconds: float) -> float:
    """Set the fastest precision; return its pairs per second on all GPUs. seconds: for all measurements."""
    gpus = _gpus(settings.cpu)
    precisions, ranks = _precisions(gpus > 0), max(1, gpus)
    share = replace(settings, data=replace(settings.data, batch=settings.data.batch // ranks))
    limit = seconds / len(precisions)
    rates = {precision: measure_rate(replace(share, precision=precision), limit) for precision in precisions}
    settings.precision = max(precisions, key=lambda precision: rates[precision])
    return rates[settings.precision] * ranks


def measure_rate(settings: Settings, seconds: float = math.inf) -> float:
    """Return the pairs per second of a run with these settings on this machine.

    Over 20 steps after 5 of warm-up, or the steps that fit into `seconds`, at least one.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = build(replace(settings, out=folder, tracker="none"))
        try:
            device, steps, start = run.accelerator.device, 0, math.inf
            for number, batch in enumerate(itertools.islice(run.loader.endless(), _WARM_UP_STEPS + _RATE_STEPS)):
                if number == _WARM_UP_STEPS:
                    start = now(device)
                run.model.step(batch)
                steps = number + 1 - _WARM_UP_STEPS
                if steps > 0 and now(device) - start > seconds:
                    break
            return steps * settings.data.batch / (now(device) - start)
        finally:
            run.close()
            run.accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)  # else the next Accelerator keeps this precision


def _untrained(settings: Settings) -> Backbone:
    """Return the backbone as it is before training, on the CPU."""
    model = settings.model
    set_seed(settings.seed)
    return build_backbone(
        model.arch, stem=model.stem, width=model.width, zero_init_residual=bool(model.zero_init_residual)
    )


def _baselines(settings: Settings, untrained: Backbone) -> tuple[dict[str, float], float]:
    """Return kNN top-1 of raw pixels and of the untrained encoder, and the seconds of the latter evaluation.

    Without `data.eval` none; it is set to none for images of which kNN can classify none.
    """
    if not settings.data.eval:
        return {}, 0.0
    data, knn, device = settings.data, settings.knn, _device(settings.cpu)
    options: dict[str, Any] = {"k": knn.k, "temperature": knn.temperature, "limit": knn.limit, "device": device}
    options |= {"size": data.size, "batch": 256, "crop_ratio": data.eval_crop_ratio}
    try:
        evaluation = KnnEvaluation(Beton(data.train), Beton(data.eval), **options)
    except InputError as error:
        logger.warning(f"no kNN: {error}")
        data.eval = ""
        return {}, 0.0
    rows = {"raw pixels": evaluation.top1(RawPixels())}
    start = time.perf_counter()
    rows["untrained encoder"] = evaluation.top1(place(untrained, device))
    return rows, time.perf_counter() - start


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
    command = [sys.executable]
    if gpus > 1:
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--mixed_precision", "no"]
        command += ["--multi_gpu", "--num_machines", "1", "--num_processes", str(gpus)]
    shown = shlex.join([*command, *arguments])
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
    if training.returncode == 2:
        raise InputError(f"training was refused (see the line above): its settings are in {config}")
    if training.returncode or not (config.parent / "run" / "summary.json").exists():
        raise RunFailed(f"training ended early (see the lines above): resume it with {shown} --resume auto")


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
    epochs = counted(round(summary["epoch"]), "epoch")
    table.add_row("training", f"{summary['training_seconds']:.0f} s, {epochs}, on {summary['device']}")
    table.add_row("pairs/s", f"{summary['pairs_per_second']:.0f}")
    table.add_row("data-wait", f"{summary['data_wait_fraction']:.1%}")
    return table


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="./millrace demo", description="Prepare, preview, pretrain, evaluate.")
    made.add_argument("data", metavar="DATA", nargs="?", help="source of prepare, or a beton (default: drawn images)")
    made.add_argument("--out", type=Path, help="folder for everything (default: runs/demo-DATE-TIME)")
    made.add_argument("--minutes", type=float, default=4.5, help="for all of it (default %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of weights, order and views (default %(default)s)")
    made.add_argument("--cpu", action="store_true", help="do not use the GPU")
    return made


@command
def main() -> None:
    args = parser().parse_args()
    if not 0 < args.minutes <= 10000:
        raise InputError(f"--minutes {args.minutes:g}: give a number above 0, up to 10000")
    out = args.out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    choose_device(Settings(precision="no", tracker="none", cpu=args.cpu))  # raises where CUDA does not answer
    budget = Budget(args.minutes)
    sources = _sources(args.data, budget.images)
    if (out / "run").exists():
        raise InputError(f"{out}: already holds a demo: choose another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}): choose another folder with --out") from None
    train, evaluation = _prepared(sources, out, budget.images) if sources else (Path(args.data), Path(args.data))
    settings = _settings(train, evaluation, out, drawn=args.data is None, cpu=args.cpu, seed=args.seed)
    picture = out / "preview.png"
    preview(Beton(train), settings.data.augmentations, size=settings.data.size).save(picture)
    untrained = _untrained(settings)
    rows, evaluation_seconds = _baselines(settings, untrained)
    settings = _with_epochs(settings, budget, evaluation_seconds)
    settings.write(out / "recipe.yaml")
    _launch(out / "recipe.yaml", _gpus(args.cpu))
    run = Path(settings.out)
    summary = json.loads((run / "summary.json").read_text())
    curves(run / "metrics.jsonl", out / "curve.png", levels=rows)
    baselines = dict(rows)
    if "knn_top1" in summary:
        rows |= {"trained encoder": summary["knn_top1"]}
    write_json(out / "demo.json", rows)
    Console().print(_table(rows, summary, _count_evaluated(train, evaluation)))
    options = GalleryOptions("", 8, _TEST_IMAGES, settings.seed, "online", _device(args.cpu), untrained)
    write(report(read_runs([run]), options, baselines=baselines), out / "report.html")
    files = {"run folder": run, "preview": picture, "curve": out / "curve.png", "report": out / "report.html"}
    for name, path in files.items():
        print(f"{name:11s} {path}")


if __name__ == "__main__":
    main()

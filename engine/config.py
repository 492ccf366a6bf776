"""Settings: typed, each with a line of help, checked here, complete in a run's `config.yaml`.

A recipe is a YAML file of these; any field can be set on the command line as `--section.field value`.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from pipeline.errors import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _require(holds: bool, key: str, value: Any, remedy: str) -> None:
    if not holds:
        raise InputError(f"{key} {value!r}: {remedy}")


def _finite(**values: float) -> None:
    for key, value in values.items():
        _require(math.isfinite(value), key.replace("__", "."), value, "give a finite number")


@dataclass
class Data:
    """Where images come from and what their views are."""

    train: str = ""
    """Beton to train on; write one with python -m pipeline.prepare."""
    eval: str = ""
    """Labelled beton for kNN, neighbours from `train` (of one file: every tenth image by the others). None: no kNN."""
    backend: Literal["ffcv"] = "ffcv"
    """What decodes and crops."""
    augmentation: str = "moco_v2"
    """Two-view augmentation: moco_v1, moco_v2, moco_v3, simclr, or one of these with _32 (no blur) for small images."""
    size: int = 224
    """Side of a view, pixels."""
    batch: int = 256
    """Images a step, over all processes and accumulated parts."""
    workers: int = 0
    """Loader threads a process; 0: its share of the machine's cores."""
    ahead: int = 3
    """Batches prepared in advance."""
    stall_timeout: float = 60.0
    """Seconds without a batch after which the run ends with an error."""
    eval_share: float = 0.875
    """Centre crop for evaluation, as a share of the shorter side; 1 for small images."""

    def __post_init__(self) -> None:
        from pipeline.views import AUGMENTATIONS

        known = ", ".join(AUGMENTATIONS)
        _require(
            self.augmentation in AUGMENTATIONS,
            "data.augmentation",
            self.augmentation,
            f"choose one of {known}",
        )
        _require(8 <= self.size <= 1024, "data.size", self.size, "choose 8 to 1024 pixels")
        _require(self.batch >= 2, "data.batch", self.batch, "choose 2 or more: contrast needs other samples")
        _require(0 <= self.workers <= 1024, "data.workers", self.workers, "choose 0 (automatic) to 1024")
        _require(1 <= self.ahead <= 64, "data.ahead", self.ahead, "choose 1 to 64 batches")
        _finite(data__stall_timeout=self.stall_timeout)
        _require(
            self.stall_timeout > 0,
            "data.stall_timeout",
            self.stall_timeout,
            "choose a number of seconds above 0",
        )
        _require(0 < self.eval_share <= 1, "data.eval_share", self.eval_share, "choose a share above 0, up to 1")


@dataclass
class Model:
    """The encoder."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Backbone."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """First layers: imagenet (7x7 stride 2, pooling) or small (3x3) for images of 32 to 64 pixels."""
    width: float = 1.0
    """Share of the published channel counts."""
    dim: int = 128
    """Dimensions of the embeddings."""
    bn: Literal["plain", "split", "sync"] = "split"
    """BatchNorm statistics: of each process's batch, of 8 parts of it (keys shuffled), or of all processes'."""

    def __post_init__(self) -> None:
        _require(0.05 <= self.width <= 8, "model.width", self.width, "choose 0.05 to 8")
        _require(2 <= self.dim <= 65536, "model.dim", self.dim, "choose 2 to 65536")


@dataclass
class Method:
    """The contrastive objective."""

    name: Literal["moco_v2"] = "moco_v2"
    """Base method."""
    temperature: float = 0.2
    """Softmax temperature."""
    momentum: float = 0.999
    """Of the momentum encoder: the share of itself it keeps each step."""
    queue: int = 65536
    """Keys in the queue."""
    symmetric: bool = False
    """Average the loss with that of the views exchanged."""

    def __post_init__(self) -> None:
        _finite(method__temperature=self.temperature, method__momentum=self.momentum)
        _require(
            self.temperature > 0,
            "method.temperature",
            self.temperature,
            "choose a number above 0, such as 0.2",
        )
        _require(0 <= self.momentum <= 1, "method.momentum", self.momentum, "choose 0 to 1, such as 0.999")
        _require(
            0 < self.queue <= 2**24,
            "method.queue",
            self.queue,
            "choose a number of keys above 0, such as 65536",
        )


@dataclass
class Optim:
    """The optimiser (SGD) and its schedule."""

    lr: float = 0.03
    """Learning rate at its highest, for the whole batch."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 1e-4
    """On all parameters, as MoCo's."""
    epochs: int = 200
    """Epochs to train."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up."""
    by: Literal["epoch", "step"] = "epoch"
    """The cosine moves once an epoch, as MoCo's, or every step."""

    def __post_init__(self) -> None:
        _finite(optim__lr=self.lr, optim__weight_decay=self.weight_decay, optim__warmup_epochs=self.warmup_epochs)
        _require(self.lr > 0, "optim.lr", self.lr, "choose a number above 0, such as 0.03")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "choose 0 to 1, such as 0.9")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "choose 0 or more, such as 1e-4")
        _require(self.epochs >= 1, "optim.epochs", self.epochs, "choose 1 or more")
        fits = 0 <= self.warmup_epochs < self.epochs
        _require(
            fits,
            "optim.warmup_epochs",
            self.warmup_epochs,
            f"choose 0 or more, below optim.epochs {self.epochs}",
        )


@dataclass
class Knn:
    """Weighted k-nearest-neighbour classification of backbone features while training (1805.01978)."""

    every: int = 1
    """Evaluate after every so many epochs, and after the last; 0: never."""
    k: int = 200
    """Neighbours."""
    temperature: float = 0.1
    """Of the votes exp(cosine / temperature)."""
    limit: int = 0
    """Use at most this many training images as neighbours, evenly spread; 0: all."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "knn.every", self.every, "choose a number of epochs, or 0 for never")
        _require(self.k >= 1, "knn.k", self.k, "choose 1 or more, such as 200")
        _require(self.temperature > 0, "knn.temperature", self.temperature, "choose a number above 0, such as 0.1")
        _require(self.limit >= 0, "knn.limit", self.limit, "choose a number of images, or 0 for all")


@dataclass
class Settings:
    """A run."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    optim: Optim = field(default_factory=Optim)
    knn: Knn = field(default_factory=Knn)
    out: str = "runs/run"
    """Run folder: settings, metrics, checkpoints."""
    resume: str = ""
    """`auto`: go on from the newest whole checkpoint in the run folder, if any; or the path of a checkpoint."""
    seed: int = 0
    """Of weights, sample order and augmentation."""
    precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Mixed precision."""
    accumulate: int = 1
    """Parts in which a process computes its share of a batch, one after another, to save memory."""
    log_every: int = 50
    """Steps between metrics lines."""
    save_every: int = 0
    """Steps between checkpoints; 0: one an epoch. There is always one at the end."""
    keep: int = 2
    """Checkpoints to keep, newest first; 0: all."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "choose 0 to 4294967295")
        _require(bool(self.out), "out", self.out, "name a folder")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "choose 1 or more")
        _require(self.log_every >= 1, "log_every", self.log_every, "choose 1 or more steps")
        _require(
            self.save_every >= 0,
            "save_every",
            self.save_every,
            "choose a number of steps, or 0 for every epoch",
        )
        _require(self.keep >= 0, "keep", self.keep, "choose 1 or more, or 0 for all")

    def as_dict(self) -> dict[str, Any]:
        """Return all settings as nested plain values."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write all settings to `path`, YAML that `--config` takes."""
        path.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="accelerate launch engine/run.py",
        description="Pretrain an image encoder by momentum contrast. Every field below can stand in the --config file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="recipe, such as engine/recipes/moco_v2_in1k.yaml")
    parser.add_class_arguments(Settings)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line (`sys.argv` by default). Raises InputError, naming key and remedy."""
    parser = _parser()
    try:
        chosen = parser.instantiate(parser.parse_args(_recipe_first(arguments))).as_dict()
    except ArgumentError as error:
        raise InputError(_explain(parser, str(error))) from None
    chosen.pop("config", None)
    return Settings(**chosen)


def _recipe_first(arguments: Sequence[str] | None) -> list[str]:
    """Return the arguments with --config before all others, so that these win over the recipe wherever they stand."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    first: list[str] = []
    for number, argument in enumerate(rest):
        if argument == "--config" or argument.startswith("--config="):
            length = 2 if argument == "--config" else 1
            first, rest = rest[number : number + length], rest[:number] + rest[number + length :]
            break
    return first + rest


def _explain(parser: ArgumentParser, message: str) -> str:
    """Return jsonargparse's message in one line, with the remedy."""
    flat = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --?([\w.]+)", flat)
    nested = re.search(r"Group '([\w.]*)' does not accept option '([\w.]+)'", flat)
    found = unknown or nested
    if found:
        name = ".".join(part for part in found.groups() if part)
        return f"{name}: no such setting{_suggestion(parser, name)}: see --help for all of them"
    wrong = re.search(r'Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*)', flat)
    if wrong:
        choices = re.search(r"Literal\[(.*)\]", wrong.group(2))
        if choices:
            return f"{wrong.group(1)} {wrong.group(3)!r}: choose one of {choices.group(1)}"
        return f"{wrong.group(1)} {wrong.group(3)!r}: wrong type: give a value of type {_type_name(wrong.group(2))}"
    missing = re.search(r'Parser key "config": (.*)', flat)
    if missing:
        return f"--config: {missing.group(1)}: give the path of a recipe, such as engine/recipes/moco_v2_in1k.yaml"
    if flat.startswith("Problems parsing config"):
        return f"--config: not valid YAML: {flat.partition(': ')[2]}: correct it there"
    return f"{flat}: see --help"


def _suggestion(parser: ArgumentParser, name: str) -> str:
    known = [action.dest for action in parser._actions]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # the right field in the wrong section
        close = [key for key in known if key.split(".")[-1] == name.split(".")[-1]][:1]
    return f", did you mean {close[0]}" if close else ""


def _type_name(text: str) -> str:
    return text.replace("<class '", "").replace("'>", "").replace("typing.", "")

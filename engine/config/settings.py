"""Settings: typed, each with a line of help, checked here, complete in a run's `config.yaml`.

`engine.config.cli` reads them from recipes and the command line.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from methods.base import Base, IncompatibleTerm
from methods.norm import SHUFFLED
from methods.registry import BASES, Terms, build_objective
from methods.vit import PATCH, VITS
from pipeline.system.errors import InputError
from pipeline.system.files import write_atomic
from pipeline.views import AUGMENTATIONS


def _require(holds: bool, key: str, value: Any, remedy: str) -> None:
    if not holds:
        raise InputError(f"{key} {value!r}: {remedy}")


_LONGEST_WAIT = 10**7  # seconds: four months
LONGEST = 4096
"""Characters of a setting: those of a path."""


def _check_bounds(key: str, value: Any) -> None:
    """Refuse numbers, texts and lists beyond what any setting can mean."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_bounds(f"{key}.{name}".removeprefix("."), inner)
    elif isinstance(value, list):
        _require(len(value) <= 1000, key, f"of {len(value)} values", "give at most 1000")
        for inner in value:
            _check_bounds(key, inner)
    elif isinstance(value, str):
        plain = len(value) <= LONGEST and not any(unicodedata.category(letter) == "Cc" for letter in value)
        _require(plain, key, value[:40], f"give at most {LONGEST} characters, and no control characters")
    elif isinstance(value, int):
        _require(abs(value) <= 2**53, key, float(min(abs(value), 2**1000)), "give a smaller number")


def _finite(**values: float) -> None:
    for key, value in values.items():
        _require(math.isfinite(value), key.replace("__", "."), value, "give a finite number")


@dataclass
class Data:
    """Where images come from and what their views are."""

    train: str = ""
    """Beton to train on, which python -m pipeline.prepare writes; or a folder, a .tar, or a pattern of .tar files, of
    JPEGs that are read as they are."""
    eval: str = ""
    """Labeled beton for kNN, with neighbors from `train`; where both are one file, every tenth image of a class is
    classified by the others. Empty: no kNN."""
    backend: Literal["auto", "ffcv", "ffcv_gpu", "dali", "resident"] = "auto"
    """Decoder: ffcv decodes and crops on the CPU; ffcv_gpu decodes on the CPU and crops on the GPU; dali decodes on the
    GPU where there is one; resident decodes all images once, into the device's memory. auto: resident where the images
    take at most half of the free memory; else ffcv without a GPU, ffcv_gpu with one, or dali with too few cores."""
    hw_decoder_load: float = 0.9
    """Share of the JPEGs that dali gives to the GPU's hardware decoder, where it has one; its other cores take the
    rest."""
    on_bad: Literal["error", "skip"] = "error"
    """What a damaged record is: an error that names it; or passed over, for the next whole one in the file, and counted
    in the metrics as `substituted`."""
    verify: Literal["quick", "full"] = "quick"
    """What is checked before training: quick, sizes, tables and the header's CRC32, and each record's as it is read;
    full: every record first, on all cores, so that damage in the last of them does not show after days."""
    augmentation: str = "moco_v2"
    """Two-view augmentation: moco_v1, moco_v2, moco_v3, simclr, byol; with _32 (no blur) for small images."""
    order: Literal["random", "quasi_random"] = "random"
    """Of an epoch's samples: random; or, for sets larger than memory, quasi_random, which shuffles within windows of
    2,048 chunks of 16 neighbors in the file, each chunk read once."""
    size: int = 224
    """Side of a view, pixels."""
    sizes: list[int] = field(default_factory=list)
    """Sides of the views as training goes on, each for an equal share of the epochs, such as [160, 192, 224]; []:
    `size` throughout."""
    batch: int = 256
    """Images a step, over all processes and accumulated parts."""
    workers: int = 0
    """Loader threads a process; 0: its share of the machine's cores."""
    prefetch_factor: int = 3
    """Batches prepared in advance."""
    stall_timeout: float = 60.0
    """Seconds without a batch after which the run ends with an error."""
    eval_crop_ratio: float = 0.875
    """Center crop for evaluation, as a share of the shorter side; 1 for small images."""
    samples: int = 0
    """Images that --dry-run counts steps with where `train` is not set."""

    def __post_init__(self) -> None:
        known = ", ".join(name for name, views in AUGMENTATIONS.items() if len(views) == 2)
        _require(
            self.augmentation in AUGMENTATIONS,
            "data.augmentation",
            self.augmentation,
            f"choose one of {known}",
        )
        count = len(AUGMENTATIONS[self.augmentation])
        remedy = f"it has {count} views, and the methods here take two: choose another"
        _require(count == 2, "data.augmentation", self.augmentation, remedy)
        _require(8 <= self.size <= 1024, "data.size", self.size, "choose 8 to 1024 pixels")
        sides = all(8 <= size <= 1024 for size in self.sizes) and self.sizes[-1:] in ([], [self.size])
        _require(sides, "data.sizes", self.sizes, f"give sides of 8 to 1024 pixels that end with data.size {self.size}")
        sensible = 2 <= self.batch <= 2**20
        _require(sensible, "data.batch", self.batch, "choose 2 or more, contrast needs other samples, to 1048576")
        _require(0 <= self.workers <= 1024, "data.workers", self.workers, "choose 0 (automatic) to 1024")
        _require(
            1 <= self.prefetch_factor <= 64, "data.prefetch_factor", self.prefetch_factor, "choose 1 to 64 batches"
        )
        remedy = f"choose a number of seconds above 0, up to {_LONGEST_WAIT}"
        _require(0 < self.stall_timeout <= _LONGEST_WAIT, "data.stall_timeout", self.stall_timeout, remedy)
        _require(
            0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", self.hw_decoder_load, "choose a share from 0 to 1"
        )
        _require(self.samples >= 0, "data.samples", self.samples, "choose a number of images, or 0 for unknown")
        _require(
            0 < self.eval_crop_ratio <= 1,
            "data.eval_crop_ratio",
            self.eval_crop_ratio,
            "choose a share above 0, up to 1",
        )


@dataclass
class Model:
    """The encoder. What is left open (null) is as published for the base method."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "vit_small", "vit_base"] = "resnet50"
    """Backbone."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """First layers of a ResNet: imagenet (7x7 stride 2, pooling) or small (3x3) for images of 32 to 64 pixels."""
    width: float = 1.0
    """Share of a ResNet's published channel counts."""
    dim: int | None = None
    """Dimensions of the embeddings."""
    mlp_dim: int | None = None
    """Width of the heads' hidden layers."""
    bn: Literal["plain", "shuffle", "split", "sync"] | None = None
    """BatchNorm statistics: of each process's batch; of 8 parts of the global batch, keys' samples shuffled over all of
    it; of 8 parts of each process's batch, shuffled within it; or of all processes' batches."""
    zero_init_residual: bool | None = None
    """Begin a ResNet's blocks as the identity: scale 0 in their last BatchNorm."""
    stop_grad_conv1: bool = True
    """Leave a transformer's patch projection as initialized."""

    def __post_init__(self) -> None:
        _require(0.05 <= self.width <= 8, "model.width", self.width, "choose 0.05 to 8")
        for key in ("dim", "mlp_dim"):
            value = getattr(self, key)
            _require(value is None or 2 <= value <= 65536, f"model.{key}", value, "choose 2 to 65536")
        largest = (self.dim or 0) * (self.mlp_dim or 0)
        remedy = f"{self.mlp_dim} by {self.dim} parameters a layer are more than 2^28: choose fewer"
        _require(largest <= 2**28, "model.mlp_dim", self.mlp_dim, remedy)
        if self.arch in VITS:
            plain = self.stem == "imagenet" and self.width == 1
            _require(plain, "model.arch", self.arch, "model.stem and model.width are of ResNets: leave them out")


@dataclass
class Method:
    """The base method. What is left open (null) is as published for it."""

    name: Literal["moco_v1", "moco_v2", "moco_v3", "simclr", "byol"] = "moco_v2"
    """Base method."""
    temperature: float | None = None
    """Softmax temperature (not byol)."""
    ema_momentum: float | None = None
    """Of the momentum encoder: the share of itself it keeps each step (not simclr)."""
    ema_schedule: Literal["constant", "cosine"] | None = None
    """Whether that share stays, or rises to 1 by a cosine over the run."""
    queue_size: int | None = None
    """Keys in the queue (moco_v1, moco_v2)."""
    queue_dtype: Literal["float32", "bfloat16"] = "float32"
    """How they are stored; bfloat16 changes a similarity by at most 0.002."""
    symmetric: bool | None = None
    """Whether the loss is the mean over both views as queries (a choice for moco_v1, moco_v2)."""

    def __post_init__(self) -> None:
        for key in ("temperature", "ema_momentum"):
            if getattr(self, key) is not None:
                _finite(**{f"method__{key}": getattr(self, key)})
        positive = self.temperature is None or self.temperature > 0
        _require(positive, "method.temperature", self.temperature, "choose a number above 0, such as 0.2")
        share = self.ema_momentum is None or 0 <= self.ema_momentum <= 1
        _require(share, "method.ema_momentum", self.ema_momentum, "choose 0 to 1, such as 0.999")
        sensible = self.queue_size is None or 0 < self.queue_size <= 2**24
        _require(sensible, "method.queue_size", self.queue_size, "choose a number of keys above 0, such as 65536")


@dataclass
class Optim:
    """The optimizer and its schedule."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd and adamw decay all parameters, lars all but biases and BatchNorm, which it does not scale either."""
    lr: float = 0.03
    """Learning rate at its highest, for a batch of 256 or, by lr_rule none, for the batch as it is."""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """How it grows with the batch: not, as batch / 256, or as the square root of that."""
    momentum: float = 0.9
    """Of sgd and lars; adamw has 0.9 and 0.999."""
    weight_decay: float = 1e-4
    """Of the optimizer's parameters."""
    trust_coefficient: float = 0.001
    """Trust coefficient of lars."""
    clip_grad_norm: float = 0.0
    """Largest norm of the whole gradient, which is scaled down to it; 0: any."""
    epochs: int = 200
    """Epochs to train."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """Learning rate after warm-up."""
    milestones: list[float] = field(default_factory=list)
    """Epochs from which on schedule steps multiplies the rate by `gamma`."""
    gamma: float = 0.1
    """See milestones."""
    schedule_interval: Literal["epoch", "step"] = "epoch"
    """The schedule after warm-up moves once an epoch or every step."""

    def __post_init__(self) -> None:
        _finite(optim__lr=self.lr, optim__weight_decay=self.weight_decay, optim__warmup_epochs=self.warmup_epochs)
        _finite(
            optim__clip_grad_norm=self.clip_grad_norm,
            optim__trust_coefficient=self.trust_coefficient,
            optim__gamma=self.gamma,
        )
        _require(self.lr > 0, "optim.lr", self.lr, "choose a number above 0, such as 0.03")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "choose 0 or more, below 1, such as 0.9")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "choose 0 or more, such as 1e-4")
        _require(
            self.trust_coefficient > 0,
            "optim.trust_coefficient",
            self.trust_coefficient,
            "choose a number above 0, such as 0.001",
        )
        _require(
            self.clip_grad_norm >= 0,
            "optim.clip_grad_norm",
            self.clip_grad_norm,
            "choose a norm above 0, or 0 for none",
        )
        _require(self.gamma > 0, "optim.gamma", self.gamma, "choose a number above 0, such as 0.1")
        _require(1 <= self.epochs <= 100_000, "optim.epochs", self.epochs, "choose 1 to 100000")
        fits = 0 <= self.warmup_epochs < self.epochs
        remedy = f"choose 0 or more, below optim.epochs {self.epochs}"
        _require(fits, "optim.warmup_epochs", self.warmup_epochs, remedy)
        stepped = bool(self.milestones) == (self.schedule == "steps")
        _require(stepped, "optim.milestones", self.milestones, "give epochs with schedule steps, and only with it")
        rising = self.milestones == sorted(set(self.milestones)) and all(0 < m < self.epochs for m in self.milestones)
        remedy = f"give epochs above 0 in rising order, below optim.epochs {self.epochs}"
        _require(rising, "optim.milestones", self.milestones, remedy)


@dataclass
class Knn:
    """Weighted k-nearest-neighbor classification of backbone features while training (1805.01978)."""

    every: int = 1
    """Evaluate after every so many epochs, and after the last; 0: never."""
    k: int = 200
    """Neighbors."""
    temperature: float = 0.1
    """Of the votes exp(cosine / temperature)."""
    limit: int = 0
    """Use at most this many training images as neighbors, evenly spread; 0: all."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "knn.every", self.every, "choose a number of epochs, or 0 for never")
        _require(1 <= self.k <= 2**16, "knn.k", self.k, "choose 1 to 65536, such as 200")
        _require(self.temperature > 0, "knn.temperature", self.temperature, "choose a number above 0, such as 0.1")
        _require(self.limit >= 0, "knn.limit", self.limit, "choose a number of images, or 0 for all")


@dataclass
class Settings:
    """A run."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    terms: Terms = field(default_factory=Terms)
    optim: Optim = field(default_factory=Optim)
    knn: Knn = field(default_factory=Knn)
    out: str = "runs/run"
    """Run folder: settings, metrics, checkpoints."""
    resume: str = ""
    """`auto`: go on from the newest whole checkpoint in the run folder, if any; or the path of a checkpoint."""
    allow_change: list[str] = field(default_factory=list)
    """Settings in which a resumed run may differ from its checkpoint, such as [optim.lr, optim.epochs]. Those that do
    not bear on what is computed may always: paths, workers, backend, logging, evaluation, number of processes."""
    seed: int = 0
    """Of weights, sample order and augmentation."""
    precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Mixed precision."""
    compile: bool = False
    """Compile the backbones with torch.compile: a minute or more at the start, for faster steps."""
    cuda_graph: bool = False
    """Replay each step as one CUDA graph, on one GPU, so that Python and launches cost nothing; steps that are logged
    run as usual, and need as much memory again."""
    gradient_accumulation_steps: int = 1
    """Parts in which a process computes its share of a batch, one after another, to save memory. Each part has its own
    batch statistics, and meets the keys of the whole batch."""
    micro_batch: int = 0
    """Samples a process computes at once, at most: `gradient_accumulation_steps` then follows from the number of
    processes. 0: as given."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks for the backward pass, and compute the rest again: for ResNet-50
    0.4 of the activations' memory, and a quarter more time."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which processes exchange gradients; bfloat16 halves what is sent, and rounds to three digits."""
    collective_timeout: float = 600.0
    """Seconds that processes wait for each other before the run ends with an error."""
    step_timeout: float = 1200.0
    """Seconds without a step after which a process prints every thread's stack and ends; 0 for never."""
    log_every: int = 50
    """Steps between metrics lines."""
    gradient_shares: bool = False
    """Log each part's share of the gradient's norm at the online embeddings."""
    save_every: int = 0
    """Steps between checkpoints; 0: one an epoch. There is always one at the end, and one before each evaluation."""
    keep: int = 2
    """Checkpoints to keep, newest first; 0: all."""
    keep_every: int = 0
    """Keep also those of every so many steps; 0: none besides."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    def __post_init__(self) -> None:
        _check_bounds("", self.as_dict())
        _require(0 <= self.seed < 2**32, "seed", self.seed, "choose 0 to 4294967295")
        _require(bool(self.out), "out", self.out, "name a folder")
        _require(
            self.gradient_accumulation_steps >= 1,
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            "choose 1 or more",
        )
        waits, remedy = (self.step_timeout, self.collective_timeout), f"up to {_LONGEST_WAIT}"
        _require(0 <= waits[0] <= _LONGEST_WAIT, "step_timeout", waits[0], f"choose a number of seconds {remedy}, or 0")
        _require(0 < waits[1] <= _LONGEST_WAIT, "collective_timeout", waits[1], f"choose a number above 0, {remedy}")
        micro = self.micro_batch == 0 or self.micro_batch >= 2
        _require(micro, "micro_batch", self.micro_batch, "choose 2 or more, or 0")
        _require(self.keep_every >= 0, "keep_every", self.keep_every, "choose a number of steps, or 0 for none")
        _require(self.log_every >= 1, "log_every", self.log_every, "choose 1 or more steps")
        if self.cuda_graph and self.log_every == 1:
            raise InputError(
                "cuda_graph true: log_every 1 measures every step, and those run without: choose 2 or more"
            )
        _require(
            self.save_every >= 0,
            "save_every",
            self.save_every,
            "choose a number of steps, or 0 for every epoch",
        )
        _require(self.keep >= 0, "keep", self.keep, "choose 1 or more, or 0 for all")
        self._fill_published()
        self._check_terms()
        self._refuse_without_effect()
        self._refuse_impossible()

    def _fill_published(self) -> None:
        """Set what was left open to the base method's published value."""
        base, transformer = BASES[self.method.name], self.model.arch in VITS
        for dotted, value in {**base.published, "method.symmetric": base.symmetric}.items():
            section, key = dotted.split(".")
            if getattr(getattr(self, section), key) is None and not (transformer and key == "zero_init_residual"):
                setattr(getattr(self, section), key, value)

    def _refuse_without_effect(self) -> None:
        """Raise InputError for settings that would change nothing."""
        base, method, model = self.base, self.method, self.model
        queue_dtype = method.queue_dtype if method.queue_dtype != "float32" else None
        for key, value, has, why in (
            ("method.queue_size", method.queue_size, base.queue, f"{base.name} has no queue"),
            ("method.queue_dtype", queue_dtype, base.queue, f"{base.name} has no queue"),
            ("method.ema_momentum", method.ema_momentum, base.momentum_encoder, f"{base.name} has no momentum encoder"),
            (
                "method.ema_schedule",
                method.ema_schedule,
                base.momentum_encoder,
                f"{base.name} has no momentum encoder",
            ),
            ("method.temperature", method.temperature, base.contrastive, f"{base.name} has no softmax"),
            ("model.mlp_dim", model.mlp_dim, base.name != "moco_v1", f"{base.name}'s head is one layer"),
            (
                "model.zero_init_residual",
                model.zero_init_residual,
                model.arch not in VITS,
                f"{model.arch} has no such blocks",
            ),
        ):
            if value is not None and not has:
                raise InputError(f"{key} {value!r}: {why}: leave it out, or null")

    def _refuse_impossible(self) -> None:
        """Raise InputError for combinations that cannot work."""
        base = self.base
        keys = (self.method.queue_size or 0) * (self.model.dim or 0)
        remedy = f"{self.model.dim} numbers a key are more than 2^30 in all: choose fewer keys"
        _require(keys <= 2**30, "method.queue_size", self.method.queue_size, remedy)
        if not base.symmetric and not base.queue:
            raise InputError(f"method.symmetric False: {base.name} is symmetric: leave it out, or null")
        if self.model.bn in SHUFFLED and not base.momentum_encoder:
            raise InputError(f"model.bn {self.model.bn!r}: {base.name} has no keys to shuffle: choose plain or sync")
        if self.model.arch in VITS and self.data.size % PATCH:
            remedy = f"{self.model.arch} has patches of {PATCH} pixels: choose a multiple of {PATCH}"
            raise InputError(f"data.size {self.data.size}: {remedy}")
        if self.model.arch in VITS and self.data.sizes:
            raise InputError(
                f"data.sizes {self.data.sizes}: {self.model.arch} has positions for one size: leave it out"
            )
        if len(self.data.sizes) > self.optim.epochs:
            raise InputError(
                f"data.sizes {self.data.sizes}: more than optim.epochs {self.optim.epochs}: give at most one an epoch"
            )
        try:
            needs = build_objective(base, self.terms).needs
        except IncompatibleTerm as error:
            raise InputError(f"terms.{error}") from None
        for key, value, parts in (
            ("gradient_accumulation_steps", self.gradient_accumulation_steps, 1),
            ("micro_batch", self.micro_batch, 0),
        ):
            if value > parts and any(name[0] == "Q" for name in needs):
                own = any(name[0] == "Q" for name in base.loss().needs(base))
                who = base.name if own else "terms.xmoco.cross"
                raise InputError(f"{key} {value}: {who} compares all queries of a batch at once: choose {parts}")

    def _check_terms(self) -> None:
        """Raise InputError for a parameter out of range: weights are 0 or more, temperatures above 0."""
        for part in fields(self.terms):
            term = getattr(self.terms, part.name)
            for parameter in fields(term) if term is not None else ():
                key, value = f"terms.{part.name}.{parameter.name}", getattr(term, parameter.name)
                _require(value is not None or "None" in str(parameter.type), key, value, "give a value")
                if isinstance(value, float):
                    _require(math.isfinite(value), key, value, "give a finite number")
                if "temperature" in parameter.name and value is not None:
                    _require(value > 0, key, value, "choose a number above 0")
                elif parameter.name == "weight":
                    _require(value > 0, key, value, "choose a number above 0, or leave the term out")

    @property
    def objective(self) -> str:
        """The base method and its terms, as `moco_v2 + co2`."""
        return " + ".join([self.method.name, *(name for name, term in self.as_dict()["terms"].items() if term)])

    @property
    def base(self) -> Base:
        """The base method, as these settings have it."""
        base, method = BASES[self.method.name], self.method
        return replace(base, symmetric=bool(method.symmetric), temperature=method.temperature or base.temperature)

    @property
    def size_of_epochs(self) -> list[int]:
        """Side of the views in each epoch."""
        sizes, epochs = self.data.sizes or [self.data.size], self.optim.epochs
        return [sizes[epoch * len(sizes) // epochs] for epoch in range(epochs)]

    def parts(self, world: int) -> int:
        """Return the parts in which each of `world` processes computes its share of a batch."""
        share = self.data.batch // world
        if not self.micro_batch:
            return self.gradient_accumulation_steps
        return next((n for n in range(1, share + 1) if share % n == 0 and share // n <= self.micro_batch), 1)

    def as_dict(self) -> dict[str, Any]:
        """Return all settings as nested plain values."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write all settings to `path`, YAML that `--config` takes."""
        write_atomic(path, yaml.safe_dump(self.as_dict(), sort_keys=False))

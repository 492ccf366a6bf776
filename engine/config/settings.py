"""Settings: typed, each with a line of help, validated at construction, complete in a run's `config.yaml`.

`engine.config.cli` reads them from recipes and the command line.
"""

import math
import re
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, WithJsonSchema

from engine.config.names import Names
from engine.config.renamed import former
from engine.config.setting_error import SettingError
from engine.config.validation import choose, section
from methods.base import Base, IncompatibleTerm
from methods.custom import is_custom
from methods.encoders import RESNETS
from methods.norm import SHUFFLED, BatchNormKind
from methods.registry import BASES, Terms, build_objective
from methods.vit import PATCH, VITS
from pipeline.augment.color import IMAGENET, Statistics
from pipeline.sampling.order import Order
from pipeline.system.files import write_atomic
from pipeline.system.text import counted
from pipeline.views import AUGMENTATIONS, View, ViewError, changed_views

_VIEWS = 2  # that every method takes

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
"""Accelerate's trackers."""


def _is_reference(arch: str) -> bool:
    """Return whether `arch` has the form of timm:NAME or package.module:function."""
    return re.fullmatch(r"timm:[\w./:@-]+|[^\W\d][\w.]*:[^\W\d][\w.]*", arch) is not None


def _require(valid: bool, key: str, value: Any, remedy: str) -> None:
    if not valid:
        raise SettingError(key, repr(value), remedy)


def _listed(default: tuple[float, ...]) -> Any:
    """Return pydantic's record of a default list."""
    return Field(json_schema_extra={"default": list(default)})


@section
class Data:
    """Images and their views."""

    train: str = ""
    """Training images: a beton, which python -m pipeline.prepare writes, or several as one set, by a pattern or divided
    by commas; or JPEGs, read in place, in a folder, a .tar or a pattern of .tar files."""
    eval: str = ""
    """Labeled beton for kNN, with neighbors from `train`. If both are one file, every tenth image of a class is
    classified by the others. Empty: no kNN."""
    backend: Literal["auto", "ffcv", "ffcv_gpu", "dali", "resident"] = "auto"
    """ffcv: decode and crop on the CPU. ffcv_gpu: decode on the CPU, crop on the GPU. dali: decode on the GPU, if there
    is one. resident: decode all images once, into the device's memory. auto: resident if the images take at most half
    of the free memory; else ffcv without a GPU, ffcv_gpu with one, or dali with too few cores for the GPU."""
    hw_decoder_load: Annotated[float, choose("a share from 0 to 1", ge=0, le=1)] = 0.9
    """Share of the JPEGs that dali gives to the GPU's hardware decoder, if it has one; its other cores decode the
    rest."""
    on_bad: Literal["error", "skip"] = "error"
    """Damaged records. error: end with an error that names them. skip: use the next intact record in the file, and log
    their number as `substituted`."""
    verify: Literal["quick", "full"] = "quick"
    """Verification before training. quick: sizes, tables and the header's CRC32; each record's CRC32 is verified when
    it is read. full: every record first, on all cores, so that no damage shows only after days."""
    augmentation: str = "moco_v2"
    """Two-view augmentation: moco_v1, moco_v2, moco_v3, simclr, byol; with _32 (no blur) for small images."""
    views: list[dict[str, Any]] = field(default_factory=list)
    """The two views where they differ from `augmentation`, each a mapping of changes such as {hue: 0}. Keys: preset
    (another augmentation), crop_scale, crop_ratio, hflip, vflip, brightness, contrast, saturation, hue, jitter_p,
    gray_p, blur_p, blur_sigma, solarize_p, solarize_threshold. []: the views of `augmentation`."""
    mean: Annotated[list[float] | Literal["auto"], _listed(IMAGENET.mean)] = field(
        default_factory=lambda: list(IMAGENET.mean)
    )
    """Means of red, green and blue, for values of 0 to 1: subtracted from all images, in training and evaluation. auto:
    as python -m pipeline.prepare measured them."""
    std: Annotated[list[float] | Literal["auto"], _listed(IMAGENET.std)] = field(
        default_factory=lambda: list(IMAGENET.std)
    )
    """Standard deviations, by which they are divided then. auto: as measured."""
    order: Order = "random"
    """Order of an epoch's samples. random: a full shuffle. quasi_random, for sets larger than memory: a shuffle within
    windows of 2,048 chunks of 16 samples, each chunk read once."""
    size: Annotated[int, choose("8 to 1024 pixels", ge=8, le=1024)] = 224
    """Side of a view, pixels."""
    sizes: list[int] = field(default_factory=list)
    """Sides of the views over the training, each for an equal share of the epochs, such as [160, 192, 224]. []: `size`
    throughout."""
    batch: Annotated[int, choose("2 or more, contrast needs other samples, to 1048576", ge=2, le=2**20)] = 256
    """Global batch: images a step, over all ranks and accumulated parts."""
    workers: Annotated[int, choose("0 (automatic) to 1024", ge=0, le=1024)] = 0
    """Loader threads of each rank. 0: its share of the machine's cores."""
    prefetch_factor: Annotated[int, choose("1 to 64 batches", ge=1, le=64)] = 3
    """Batches prepared in advance."""
    stall_timeout: Annotated[float, choose("a number of seconds above 0, up to 10000000", gt=0, le=10**7)] = 60.0
    """Seconds without a batch before the run ends with an error."""
    eval_crop_ratio: Annotated[float, choose("a share above 0, up to 1", gt=0, le=1)] = 0.875
    """Side of the center crop for evaluation over the image's shorter side; 1 for small images."""
    samples: Annotated[int, choose("a number of images, or 0 for unknown", ge=0)] = 0
    """Images in the training set, for --dry-run without `train`."""

    def __post_init__(self) -> None:
        two_views = [name for name, views in AUGMENTATIONS.items() if len(views) == 2]
        remedy = f"choose one of two views: {', '.join(two_views)}"
        _require(self.augmentation in two_views, "data.augmentation", self.augmentation, remedy)
        remedy = f"{counted(len(self.views), 'view')}, and every method takes two: list two, such as [{{hue: 0}}, {{}}]"
        if self.views and len(self.views) != _VIEWS:
            raise SettingError("data.views", "", remedy)
        try:
            changed_views(self.views, self.augmentation)
        except ViewError as error:
            raise SettingError("data.views", error.given, error.remedy) from None
        for name, lowest, words in (("mean", 0.0, "from 0 to 1"), ("std", 1e-4, "above 0, up to 1")):
            values = getattr(self, name)
            fits = values == "auto" or (len(values) == 3 and all(lowest <= value <= 1 for value in values))
            _require(fits, f"data.{name}", values, f"give three numbers {words}, or auto")
        sides = all(8 <= size <= 1024 for size in self.sizes) and self.sizes[-1:] in ([], [self.size])
        _require(sides, "data.sizes", self.sizes, f"give sides of 8 to 1024 pixels that end with data.size {self.size}")

    @property
    def augmentations(self) -> tuple[View, ...]:
        """The distribution of each view."""
        return changed_views(self.views, self.augmentation) or AUGMENTATIONS[self.augmentation]

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation for normalization; neither is `auto` any more."""
        mean, std = self.mean, self.std
        assert mean != "auto"
        assert std != "auto"
        return Statistics((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


@section
class Model:
    """Encoder. null: the base method's published value."""

    arch: str = "resnet50"
    """Backbone: resnet10, 18, 34, 50, 101, 152 or wide_resnet50_2; vit_tiny, small, base or large, or MoCo v3's
    vit_conv_small and base; timm:NAME, of timm; or package.module:function, of your own code, which returns a module
    from images [B, 3, S, S] to features [B, F] or maps [B, F, h, w]."""
    stem: Literal["imagenet", "medium", "small"] = "imagenet"
    """First layers of a ResNet: imagenet (7x7 stride 2, pooling), medium (5x5 stride 2) for images of 64 to 128 pixels,
    or small (3x3) for 32 to 64. A larger stem on smaller images is faster and loses detail."""
    width: Annotated[float, choose("0.05 to 8", ge=0.05, le=8)] = 1.0
    """Factor on a ResNet's published channel counts."""
    dim: Annotated[int | None, choose("2 to 65536", ge=2, le=65536)] = None
    """Dimensions of the embeddings."""
    mlp_dim: Annotated[int | None, choose("2 to 65536", ge=2, le=65536)] = None
    """Width of the hidden layers of projector and predictor."""
    bn: BatchNormKind | None = None
    """BatchNorm statistics. plain: over each rank's batch. shuffle: over 8 parts of the global batch, with the keys'
    samples shuffled across it. split: over 8 parts of each rank's batch, shuffled within it. sync: over the global
    batch."""
    zero_init_residual: bool | None = None
    """Start a ResNet's blocks as the identity: scale 0 in their last BatchNorm."""
    stop_grad_conv1: bool = True
    """Freeze a transformer's patch projection at its initialization."""
    args: dict[str, Any] | None = None
    """Arguments of timm's model or your function, such as {drop_path_rate: 0.1}."""
    init: str = ""
    """Start from the weights in this file: a run, a checkpoint or an exported encoder of ours; official MoCo v1, v2, v3
    or SimSiam; torchvision, timm, detectron2. Both encoders start from its backbone; optimizer and schedule are new.
    Empty: random weights."""
    init_which: Literal["online", "momentum"] = "online"
    """Encoder of that file."""
    init_heads: bool = False
    """Start from its projector and predictor too, as far as they have the run's shapes."""
    init_prefix: str = ""
    """Prefix of the backbone's keys in a file of no known kind, such as module.encoder."""

    def __post_init__(self) -> None:
        largest = (self.dim or 0) * (self.mlp_dim or 0)
        remedy = f"{self.mlp_dim} by {self.dim} parameters a layer are more than 2^28: choose fewer"
        _require(largest <= 2**28, "model.mlp_dim", self.mlp_dim, remedy)
        known = f"choose {', '.join([*RESNETS, *VITS])}, timm:NAME or package.module:function"
        _require(self.arch in [*RESNETS, *VITS] or _is_reference(self.arch), "model.arch", self.arch, known)
        plain = self.arch in RESNETS or (self.stem == "imagenet" and self.width == 1)
        _require(plain, "model.arch", self.arch, "model.stem and model.width are of ResNets: leave them out")
        named = all(str(key).isidentifier() for key in self.args or ())
        _require(named, "model.args", self.args, "give a mapping of arguments by name, such as {drop_path_rate: 0.1}")


@section
class Method:
    """Base method. null: its published value."""

    name: Literal["moco_v1", "moco_v2", "moco_v3", "simclr", "byol"] = "moco_v2"
    """Base method."""
    temperature: Annotated[float | None, choose("a number above 0, such as 0.2", gt=0)] = None
    """Softmax temperature (not byol)."""
    ema_momentum: Annotated[float | None, choose("0 to 1, such as 0.999", ge=0, le=1)] = None
    """Momentum of the momentum encoder's moving average (not simclr)."""
    ema_schedule: Literal["constant", "cosine"] | None = None
    """Momentum over the run: constant, or rising to 1 by a cosine (not simclr)."""
    queue_size: Annotated[int | None, choose("a number of keys above 0, such as 65536", gt=0, le=2**24)] = None
    """Keys in the queue (moco_v1, moco_v2)."""
    queue_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the keys; bfloat16 changes a similarity by at most 0.002."""
    symmetric: bool | None = None
    """Average the loss over both views as queries (a choice for moco_v1, moco_v2)."""


@section
class Optim:
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd and adamw decay all parameters; lars neither decays nor scales biases and BatchNorm."""
    lr: Annotated[float, choose("a number above 0, such as 0.03", gt=0)] = 0.03
    """Peak learning rate: for a batch of 256, or, with lr_rule none, for the batch as it is."""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """Scaling of the rate with the batch. none; linear: by batch / 256; sqrt: by the square root of that."""
    momentum: Annotated[float, choose("0 or more, below 1, such as 0.9", ge=0, lt=1)] = 0.9
    """Momentum of sgd and lars; adamw has 0.9 and 0.999."""
    weight_decay: Annotated[float, choose("0 or more, such as 1e-4", ge=0)] = 1e-4
    """Weight decay of the optimizer's parameters."""
    trust_coefficient: Annotated[float, choose("a number above 0, such as 0.001", gt=0)] = 0.001
    """Trust coefficient of lars."""
    clip_grad_norm: Annotated[float, choose("a norm above 0, or 0 for none", ge=0)] = 0.0
    """Scale the gradient down to at most this norm, over all parameters. 0: no limit."""
    epochs: Annotated[int, choose("1 to 100000", ge=1, le=100_000)] = 200
    """Epochs to train."""
    warmup_epochs: Annotated[float, choose("0 or more, below optim.epochs", ge=0)] = 0.0
    """Epochs of linear warm-up from 0."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """Learning rate after warm-up."""
    milestones: list[float] = field(default_factory=list)
    """Epochs at which schedule steps multiplies the rate by `gamma`."""
    gamma: Annotated[float, choose("a number above 0, such as 0.1", gt=0)] = 0.1
    """Factor on the rate at each milestone."""
    schedule_interval: Literal["epoch", "step"] = "epoch"
    """Update the rate after warm-up once an epoch, or every step."""

    def __post_init__(self) -> None:
        remedy = f"choose 0 or more, below optim.epochs {self.epochs}"
        _require(self.warmup_epochs < self.epochs, "optim.warmup_epochs", self.warmup_epochs, remedy)
        stepped = bool(self.milestones) == (self.schedule == "steps")
        _require(stepped, "optim.milestones", self.milestones, "give epochs with schedule steps, and only with it")
        rising = self.milestones == sorted(set(self.milestones)) and all(0 < m < self.epochs for m in self.milestones)
        remedy = f"give epochs above 0 in rising order, below optim.epochs {self.epochs}"
        _require(rising, "optim.milestones", self.milestones, remedy)


@section
class Knn:
    """Weighted k-nearest-neighbor classification of backbone features during training (1805.01978)."""

    every: Annotated[int, choose("a number of epochs, or 0 for never", ge=0)] = 1
    """Epochs between evaluations; the last epoch is always evaluated. 0: never."""
    k: Annotated[int, choose("1 to 65536, such as 200", ge=1, le=2**16)] = 200
    """Neighbors."""
    temperature: Annotated[float, choose("a number above 0, such as 0.1", gt=0)] = 0.1
    """Temperature of the votes, exp(cosine / temperature)."""
    limit: Annotated[int, choose("a number of images, or 0 for all", ge=0)] = 0
    """Use at most this many training images as neighbors, evenly spread. 0: all."""
    bank: str = ""
    """Labeled beton of the neighbors, where the training images have no labels or others. Empty: `data.train`."""


@section
class Probe:
    """Linear classification of detached backbone features by a probe that trains along, on the batches' labels."""

    every: Annotated[int, choose("a number of steps, or 0 for never", ge=0)] = 0
    """Steps between updates of the probe; its top-1 on `data.eval` is measured with kNN's. 0: no probe."""
    lr: Annotated[float, choose("a number above 0, such as 1", gt=0)] = 1.0
    """Learning rate of the probe's SGD."""


@section
class Tracking:
    """The run as its trackers show it."""

    project: str = "millrace"
    """Project, experiment or repository of the run there."""
    name: str = ""
    """Name of the run. Empty: that of its folder."""
    group: str = ""
    """Group of runs, such as the seeds of one setting."""
    tags: Names = field(default_factory=list)
    """Tags, such as [moco_v2, imagenet]."""
    images: bool = False
    """Log images too: augmented views at the start, and the curves of the report at the end."""

    def __post_init__(self) -> None:
        _require(bool(self.project), "tracking.project", self.project, "give a name")


@section
class Settings:
    """A run."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    terms: Terms = field(default_factory=Terms)
    optim: Optim = field(default_factory=Optim)
    knn: Knn = field(default_factory=Knn)
    probe: Probe = field(default_factory=Probe)
    tracking: Tracking = field(default_factory=Tracking)
    out: str = "runs/run"
    """Run folder: settings, metrics, checkpoints."""
    resume: str = ""
    """auto: resume from the newest intact checkpoint in the run folder, if any. Or the path of a checkpoint."""
    allow_change: list[str] = field(default_factory=list)
    """Settings in which a resumed run may differ from its checkpoint, such as [optim.lr, optim.epochs]. Those without
    effect on the training may always differ: paths, workers, backend, logging, evaluation, number of ranks."""
    seed: Annotated[int, choose("0 to 4294967295", ge=0, lt=2**32)] = 0
    """Seed of weights, sample order and augmentation."""
    precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Mixed precision."""
    compile: bool = False
    """Compile the backbones with torch.compile: a minute or more at the start, on a CPU several, for faster steps."""
    cuda_graph: bool = False
    """Replay each step as one CUDA graph, on one GPU, at no cost of Python or kernel launches. Logged steps run
    eagerly, and need as much memory again."""
    gradient_accumulation_steps: Annotated[int, choose("1 or more", ge=1)] = 1
    """Parts in which a rank computes its share of a batch, one after another, to save memory. Each part has its own
    batch statistics, and the keys of the global batch."""
    micro_batch: Annotated[int, choose("2 or more, or 0", ge=0)] = 0
    """Samples that a rank computes at once, at most; gradient_accumulation_steps then follows from the number of ranks.
    0: gradient_accumulation_steps as set."""
    activation_checkpointing: bool = False
    """Store only the inputs of the backbone's blocks for the backward pass, and compute the rest again: for ResNet-50
    0.4 of the activations' memory, and a quarter more time."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which ranks exchange gradients; bfloat16 halves the traffic, and rounds to three digits."""
    collective_timeout: Annotated[float, choose("a number of seconds above 0, up to 10000000", gt=0, le=10**7)] = 600.0
    """Seconds that ranks wait for each other before the run ends with an error."""
    step_timeout: Annotated[float, choose("a number of seconds up to 10000000, or 0", ge=0, le=10**7)] = 1200.0
    """Seconds without a step before a rank prints the stacks of all threads and ends. 0: never."""
    log_every: Annotated[int, choose("1 or more steps", ge=1)] = 50
    """Steps between lines of metrics."""
    gradient_shares: bool = False
    """Log each term's share of the gradient's norm at the online embeddings."""
    save_every: Annotated[int, choose("a number of steps, or 0 for every epoch", ge=0)] = 0
    """Steps between checkpoints. 0: one an epoch. One is always saved at the end, and before each evaluation."""
    keep: Annotated[int, choose("1 or more, or 0 for all", ge=0)] = 2
    """Newest checkpoints to keep. 0: all."""
    keep_every: Annotated[int, choose("a number of steps, or 0 for none", ge=0)] = 0
    """Also keep the checkpoints of steps that are a multiple of this. 0: none."""
    tracker: Annotated[Names, WithJsonSchema({"type": "array", "default": ["tensorboard"]})] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Trackers of metrics, next to metrics.jsonl: any of tensorboard, wandb, mlflow, trackio, comet_ml, aim, clearml,
    dvclive, swanlab, such as [tensorboard, wandb]; or none. A resumed run continues its curves."""
    cpu: bool = False
    """Train on the CPU even if there is a GPU."""
    require_gpu: bool = False
    """End with an error where there is no GPU, unless `cpu`. So does `accelerate launch` without its own --cpu."""

    def __post_init__(self) -> None:
        _require(bool(self.out), "out", self.out, "name a folder")
        _require(self.micro_batch != 1, "micro_batch", self.micro_batch, "choose 2 or more, or 0")
        if list(self.tracker) == ["none"]:
            self.tracker = []
        unknown = [name for name in self.tracker if name not in TRACKERS]
        _require(not unknown, "tracker", ", ".join(unknown), f"choose some of {', '.join(TRACKERS)}, or none")
        for key in self.allow_change:
            if renamed := former(key):
                raise SettingError("allow_change", "", str(renamed))
        if self.cuda_graph and self.log_every == 1:
            remedy = "log_every 1 logs every step, and those run eagerly: choose 2 or more"
            raise SettingError("cuda_graph", "true", remedy)
        self._fill_published()
        self._check_terms()
        self._refuse_without_effect()
        self._refuse_impossible()

    def _fill_published(self) -> None:
        """Set every setting that is null to the base method's published value."""
        base, no_resnet = BASES[self.method.name], self.model.arch not in RESNETS
        for dotted, value in {**base.published, "method.symmetric": base.symmetric}.items():
            part, key = dotted.split(".")
            if getattr(getattr(self, part), key) is None and not (no_resnet and key == "zero_init_residual"):
                setattr(getattr(self, part), key, value)

    def _check_terms(self) -> None:
        """Raise SettingError for a term's parameter out of range: weights and temperatures are above 0."""
        for part in fields(self.terms):
            term = getattr(self.terms, part.name)
            for parameter in fields(term) if term is not None else ():
                key, value = f"terms.{part.name}.{parameter.name}", getattr(term, parameter.name)
                if isinstance(value, float):
                    _require(math.isfinite(value), key, value, "give a finite number")
                if "temperature" in parameter.name and value is not None:
                    _require(value > 0, key, value, "choose a number above 0")
                elif parameter.name == "weight":
                    _require(value > 0, key, value, "choose a number above 0, or leave the term out")

    def _refuse_without_effect(self) -> None:
        """Raise SettingError for settings that would change nothing."""
        base, method, model = self.base, self.method, self.model
        queue_dtype = method.queue_dtype if method.queue_dtype != "float32" else None
        no_queue, no_teacher = f"{base.name} has no queue", f"{base.name} has no momentum encoder"
        no_blocks = f"{model.arch} has no such blocks"
        no_file = "model.init names no file"
        custom, trainable = is_custom(model.arch), None if model.stop_grad_conv1 else False
        for key, value, applies, reason in (
            ("knn.bank", self.knn.bank or None, bool(self.data.eval and self.knn.every), "kNN classifies no images"),
            ("model.init_which", "momentum" if model.init_which == "momentum" else None, bool(model.init), no_file),
            ("model.init_heads", model.init_heads or None, bool(model.init), no_file),
            ("model.init_prefix", model.init_prefix or None, bool(model.init), no_file),
            ("method.queue_size", method.queue_size, base.queue, no_queue),
            ("method.queue_dtype", queue_dtype, base.queue, no_queue),
            ("method.ema_momentum", method.ema_momentum, base.momentum_encoder, no_teacher),
            ("method.ema_schedule", method.ema_schedule, base.momentum_encoder, no_teacher),
            ("method.temperature", method.temperature, base.contrastive, f"{base.name} has no softmax"),
            ("model.mlp_dim", model.mlp_dim, base.name != "moco_v1", f"{base.name}'s head is one layer"),
            ("model.zero_init_residual", model.zero_init_residual, model.arch in RESNETS, no_blocks),
            ("model.args", model.args or None, custom, f"{model.arch} takes none"),
            ("model.stop_grad_conv1", trainable, not custom, f"{model.arch} is not one of ours"),
            ("activation_checkpointing", self.activation_checkpointing or None, not custom, no_blocks),
        ):
            remedy = f"remove {key}" + ("" if isinstance(value, bool) else ", or set it to null")
            _require(value is None or applies, key, value, f"{reason}: {remedy}")

    def _refuse_impossible(self) -> None:
        """Raise SettingError for combinations that cannot work."""
        base, arch, size, sizes = self.base, self.model.arch, self.data.size, self.data.sizes
        keys = (self.method.queue_size or 0) * (self.model.dim or 0)
        remedy = f"{self.model.dim} numbers a key are more than 2^30 in all: choose fewer keys"
        _require(keys <= 2**30, "method.queue_size", self.method.queue_size, remedy)
        remedy = f"{base.name} is symmetric: remove method.symmetric, or set it to null"
        _require(base.symmetric or base.queue, "method.symmetric", False, remedy)
        remedy = f"{base.name} has no keys to shuffle: choose plain or sync"
        _require(base.momentum_encoder or self.model.bn not in SHUFFLED, "model.bn", self.model.bn, remedy)
        if arch in VITS:
            remedy = f"{arch} has patches of {PATCH} pixels: choose a multiple of {PATCH}"
            _require(size % PATCH == 0, "data.size", size, remedy)
            _require(not sizes, "data.sizes", sizes, f"{arch} has positions for one size: leave data.sizes out")
        remedy = f"more than optim.epochs {self.optim.epochs}: give at most one an epoch"
        _require(len(sizes) <= self.optim.epochs, "data.sizes", sizes, remedy)
        try:
            needs = build_objective(base, self.terms).needs
        except IncompatibleTerm as error:
            raise SettingError(f"terms.{error.key}", error.value, error.remedy) from None
        for key, one_part in (("gradient_accumulation_steps", 1), ("micro_batch", 0)):
            if (value := getattr(self, key)) > one_part and any(name[0] == "Q" for name in needs):
                by_base = any(name[0] == "Q" for name in base.loss().needs(base))
                term = base.name if by_base else "terms.xmoco.cross"
                remedy = f"{term} compares all queries of a batch at once: choose {one_part}"
                raise SettingError(key, str(value), remedy)

    @property
    def objective(self) -> str:
        """The base method and its terms, as `moco_v2 + co2`."""
        return " + ".join([self.method.name, *(name for name, term in self.as_dict()["terms"].items() if term)])

    @property
    def base(self) -> Base:
        """The base method with these settings."""
        base, method = BASES[self.method.name], self.method
        return replace(base, symmetric=bool(method.symmetric), temperature=method.temperature or base.temperature)

    @property
    def size_of_epochs(self) -> list[int]:
        """Side of the views in each epoch."""
        sizes, epochs = self.data.sizes or [self.data.size], self.optim.epochs
        return [sizes[epoch * len(sizes) // epochs] for epoch in range(epochs)]

    def micro_batches(self, world: int) -> int:
        """Return the number of micro-batches in which each of `world` ranks computes its share of a batch."""
        share = self.data.batch // world
        if not self.micro_batch:
            return self.gradient_accumulation_steps
        return next((n for n in range(1, share + 1) if share % n == 0 and share // n <= self.micro_batch), 1)

    def as_dict(self) -> dict[str, Any]:
        """Return all settings as nested plain values."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write all settings to `path`, as YAML for `--config`."""
        write_atomic(path, yaml.safe_dump(self.as_dict(), sort_keys=False))

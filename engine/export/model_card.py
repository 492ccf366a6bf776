"""Model card of an exported encoder."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from engine.checkpoint.provenance import commit
from engine.report.run_folder import read_runs
from engine.weights.architecture import Architecture
from engine.weights.load import LoadedEncoder, digest
from methods.custom import needs_trust
from methods.encoders import STEMS
from methods.vit import VITS
from pipeline.augment.color import Statistics
from pipeline.system.packages import version
from pipeline.system.text import printable

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_PATHS = ("train", "eval", "bank", "init", "out", "resume")
_HEADLINES = {"top1": "top-1", "map": "mAP", "miou": "mIoU", "ap": "AP"}
"""Names of evaluations' main scores, by their key in the result file."""


class _Metric(NamedTuple):
    """A result of a run, as the card names it."""

    evaluation: str
    key: str
    value: float
    note: str

    def __str__(self) -> str:
        return f"- {self.evaluation}: {_HEADLINES[self.key]} {self.value:.2%}{self.note}"


def card(encoder: LoadedEncoder, format: str, path: Path, distance: float, *, hub: str = "") -> str:
    """Return a model card, in Markdown: recipe, data, metrics, commit, and code that loads the file.

    distance: of the features when the file was read back, relative to the largest. hub: name on the Hugging Face Hub.
    """
    architecture, metrics = encoder.architecture, _metrics(encoder.path)
    data = printable(Path(str(encoder.settings.get("data", {}).get("train", ""))).name)
    front = ModelCardData(
        library_name=format if format == "timm" else "pytorch",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised", "millrace", architecture.arch],
        model_name=hub.rpartition("/")[2] or str(architecture),
        eval_results=[
            EvalResult(
                "image-classification",
                dataset_type=data,
                dataset_name=data,
                metric_type="accuracy",
                metric_name=f"{metric.evaluation}, top-1",
                metric_value=round(metric.value, 4),
            )
            for metric in metrics
            if metric.key == "top1"
        ]
        or None,
    )
    mean, std = encoder.statistics
    trained = f" Its checkpoint was written by {_program(encoder.origin)}." if "version" in encoder.origin else ""
    exporter = {"version": version("millrace") or "unknown"} | ({"commit": commit()} if commit() else {})
    made = ModelCard.from_template(
        front,
        template_path=str(_TEMPLATE),
        title=str(architecture),
        origin=f"The backbone, without heads, of the {encoder.which} encoder in {encoder.kind}, `{encoder.path.name}`: "
        f"from images of {architecture.size} pixels, RGB from 0 to 1, normalized by mean {mean} and standard deviation "
        f"{std}, to {encoder.backbone.features} features. In evaluations, their center crop has "
        f"{encoder.preprocess.crop_ratio:g} of the image's shorter side.",
        versions=f"SHA-256 of the weights: `{digest(encoder.backbone)}`.{trained} Exported by {_program(exporter)}, "
        f"torch {torch.__version__}, as {format}. Read back, its features differ by {distance:.1e} of the largest.",
        loading=_loading(encoder, format, path, hub),
        data=_data(encoder) if encoder.settings else "",
        metrics="\n".join(map(str, metrics)),
        recipe=yaml.safe_dump(_public(encoder.settings) if hub else encoder.settings, sort_keys=False)
        if encoder.settings
        else "",
    )
    return f"{made}\n"


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without the folders of this machine's files."""
    public: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = _public(value)
        public[key] = Path(value).name if key in _PATHS and isinstance(value, str) else value
    return public


def _program(origin: dict[str, Any]) -> str:
    """Return Millrace's version and commit, as text."""
    version = f" {origin['version']}" if "version" in origin else ""
    return f"Millrace{version}, commit {origin.get('commit', 'unknown')}"


def _data(encoder: LoadedEncoder) -> str:
    """Return the training data: name, and, if recorded, size, classes, fingerprint, and the weights started from."""
    name = printable(Path(str(encoder.settings.get("data", {}).get("train", ""))).name)
    more = [f"{encoder.origin['images']} images"] if "images" in encoder.origin else []
    if classes := encoder.origin.get("classes"):
        more.append(f"of {classes} classes")
    if "fingerprint" in encoder.origin:
        more.append(f"fingerprint `{encoder.origin['fingerprint']}`")
    source = f" Started from {encoder.origin['started_from']}." if "started_from" in encoder.origin else ""
    return f"Trained on `{name}`, without labels" + (f": {', '.join(more)}." if more else ".") + source


def _metrics(path: Path) -> list[_Metric]:
    """Return the run's results for this checkpoint: its evaluations, and kNN during training."""
    folder, metrics = path.resolve().parents[1], []
    if not (folder / "checkpoints").is_dir():
        return []
    (run,) = read_runs([folder])
    for result in run.evaluations:
        key = next((key for key in _HEADLINES if isinstance(result.get(key), float)), None)
        if key and Path(str(result.get("checkpoint", ""))).name == path.name:
            note = f" ({result.get('which')} encoder)"
            metrics.append(_Metric(str(result["evaluation"]), key, result[key], note))
    step = path.name.removeprefix("step_").lstrip("0")
    for line in run.lines:
        for key, name in (("knn_top1", "kNN"), ("probe_top1", "linear probe")):
            if f"{line['step']:.0f}" == step and key in line:
                metrics.append(_Metric(f"{name} during training, after step {step}", "top1", line[key], ""))
    return metrics


def timm_name(architecture: Architecture) -> str:
    """Return the name of timm's model of this architecture, without a tag of weights."""
    name = architecture.arch.removeprefix("timm:").partition(".")[0]
    return f"{name}_patch16_224" if architecture.transformer else name


def timm_args(encoder: LoadedEncoder) -> dict[str, Any]:
    """Return the arguments of timm's model of this encoder, but for `num_classes`."""
    architecture = encoder.architecture
    if architecture.transformer:
        return {"img_size": architecture.size, "num_heads": architecture.heads}
    described = getattr(getattr(encoder.backbone, "net", None), "pretrained_cfg", {})
    fixed = {"img_size": architecture.size} if described.get("fixed_input_size") else {}
    return fixed | architecture.own_args


def _loading(encoder: LoadedEncoder, format: str, path: Path, hub: str = "") -> str:
    """Return Python code that loads the file in its library, strictly where possible, with its imports."""
    code = _code(encoder, format, path, hub)
    modules = ("onnxruntime", "safetensors.torch", "timm", "torch", "torchvision")
    imports = [f"import {name}\n" for name in modules if re.search(rf"(?<![\w.]){re.escape(name)}\.", code)]
    return "".join(imports) + "\n" * bool(imports) + code


def _code(encoder: LoadedEncoder, format: str, path: Path, hub: str) -> str:
    architecture = encoder.architecture
    name, file = architecture.arch, path.name
    if hub and format == "timm":
        return f'model = timm.create_model("hf_hub:{hub}", pretrained=True)'
    if hub:
        fetch = f'from huggingface_hub import hf_hub_download\n\nfile = hf_hub_download("{hub}", "{file}")\n'
        return fetch + _code(encoder, format, path, "").replace(f'"{file}"', "file")
    if format == "onnx":
        return f'session = onnxruntime.InferenceSession("{file}")\nsession.run(["features"], {{"images": images}})'
    if format == "safetensors":
        trust = ", trust_recipe=True" * needs_trust(architecture.arch)
        return f'from engine import load_encoder\n\nbackbone = load_encoder("{file}"{trust}).backbone'
    if format == "detectron2":
        return f'cfg.MODEL.WEIGHTS = "{file}"\n' + (
            _pixels(encoder.statistics)
            if not architecture.transformer
            else "# a ViTDet whose backbone has use_cls_token's positions"
        )
    if format == "mmdet":
        kind = "mmpretrain.VisionTransformer" if architecture.transformer else "ResNet"
        return f'backbone = dict(type="{kind}", ..., init_cfg=dict(type="Pretrained", checkpoint="{file}"))'
    load = f'model.load_state_dict(torch.load("{file}", weights_only=True))'
    if format == "timm":
        load = f'model.load_state_dict(safetensors.torch.load_file("{file}"))'
        if architecture.custom:
            given = "".join(f", {key}={value!r}" for key, value in {"num_classes": 0, **timm_args(encoder)}.items())
            return f'model = timm.create_model("{timm_name(architecture)}"{given})\n{load}'
    if architecture.transformer:
        return f"{_transformer(encoder, format)}\n{load}"
    library = "torchvision.models." if format == "torchvision" else "timm.create_model("
    build = f"model = {library}{name}()" if format == "torchvision" else f'model = {library}"{name}", num_classes=0)'
    kernel, stride = STEMS[architecture.stem]
    stem = f"model.conv1 = torch.nn.Conv2d(3, 64, {kernel}, {stride}, {kernel // 2}, bias=False)\n"
    stem += "model.maxpool = torch.nn.Identity()\n"
    head = "model.fc = torch.nn.Identity()\n" if format == "torchvision" else ""
    return f"{build}\n{head}{stem if architecture.stem != 'imagenet' else ''}{load}"


def _transformer(encoder: LoadedEncoder, format: str) -> str:
    architecture = encoder.architecture
    if format == "timm":
        args = "".join(f", {key}={value}" for key, value in timm_args(encoder).items())
        return f'model = timm.create_model("{timm_name(architecture)}"{args}, num_classes=0)'
    dim, depth, *_ = VITS[architecture.arch]
    return (
        f"model = torchvision.models.VisionTransformer({architecture.size}, 16, {depth}, {architecture.heads}, {dim}, "
        f"{4 * dim})\nmodel.heads = torch.nn.Identity()"
    )


def _pixels(statistics: Statistics) -> str:
    """Return detectron2's settings for this normalization (facebookresearch/moco `detection/configs`)."""
    mean, std = ([round(255 * value, 3) for value in values] for values in statistics)
    return (
        f"cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = {mean}, {std}\n"
        'cfg.INPUT.FORMAT = "RGB"\ncfg.MODEL.RESNETS.STRIDE_IN_1X1 = False'
    )

"""Model card of an exported encoder."""

from pathlib import Path
from typing import Any

import torch
import yaml

from engine.checkpoint.provenance import commit
from engine.report.run_folder import read_runs
from engine.weights.load import TRANSFORMERS, Architecture, LoadedEncoder, digest
from methods.encoders import STEMS
from pipeline.augment.color import Statistics
from pipeline.system.packages import version
from pipeline.system.text import printable

_HEADLINES = {"top1": "top-1", "map": "mAP", "miou": "mIoU", "ap": "AP"}
"""Names of evaluations' main scores, by their key in the result file."""


def card(encoder: LoadedEncoder, format: str, path: Path, distance: float) -> str:
    """Return a model card, in Markdown: recipe, data, metrics, commit, and code that loads the file.

    distance: of the features when the file was read back, relative to the largest.
    """
    architecture = encoder.architecture
    front = {"library_name": format if format == "timm" else "pytorch", "pipeline_tag": "image-feature-extraction"}
    front["tags"] = ["self-supervised", "millrace", architecture.arch]  # type: ignore[assignment]
    mean, std = encoder.statistics
    trained = f" Its checkpoint was written by {_program(encoder.origin)}." if "version" in encoder.origin else ""
    exporter = {"version": version("millrace") or "unknown"} | ({"commit": commit()} if commit() else {})
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {architecture}",
        f"The backbone, without heads, of the {encoder.which} encoder in {encoder.kind}, `{encoder.path.name}`: from "
        f"images of {architecture.size} pixels, RGB from 0 to 1, normalized by mean {mean} and deviation {std}, to "
        f"{encoder.backbone.features} features.",
        f"SHA-256 of the weights: `{digest(encoder.backbone)}`.{trained} Exported by {_program(exporter)}, torch "
        f"{torch.__version__}, as {format}. Read back, its features differ by {distance:.1e} of the largest.",
        f"## Loading\n\n```python\n{_loading(encoder, format, path)}\n```",
    ]
    if encoder.settings:
        lines.append(f"## Data\n\n{_data(encoder)}")
    if metrics := _metrics(encoder.path):
        lines.append("## Metrics\n\n" + "\n".join(metrics))
    if encoder.settings:
        lines.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(encoder.settings, sort_keys=False)}```")
    return "\n\n".join(lines) + "\n"


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


def _metrics(path: Path) -> list[str]:
    """Return the run's results for this checkpoint: its evaluations, and kNN during training."""
    folder, lines = path.resolve().parents[1], []
    if not (folder / "checkpoints").is_dir():
        return []
    (run,) = read_runs([folder])
    for result in run.evaluations:
        key = next((key for key in _HEADLINES if isinstance(result.get(key), float)), None)
        if key and Path(str(result.get("checkpoint", ""))).name == path.name:
            score = f"{_HEADLINES[key]} {result[key]:.2%}"
            lines.append(f"- {result['evaluation']}: {score} ({result.get('which')} encoder)")
    step = path.name.removeprefix("step_").lstrip("0")
    for line in run.lines:
        if f"{line['step']:.0f}" == step and "knn_top1" in line:
            lines.append(f"- kNN during training, after step {step}: top-1 {line['knn_top1']:.2%}")
    return lines


def _loading(encoder: LoadedEncoder, format: str, path: Path) -> str:
    """Return Python code that loads the file in its library, strictly where possible."""
    architecture, file = encoder.architecture, path.name
    name = architecture.arch
    if format == "onnx":
        return f'session = onnxruntime.InferenceSession("{file}")\nsession.run(["features"], {{"images": images}})'
    if format == "safetensors":
        return f'from engine.weights.load import load_encoder\n\nbackbone = load_encoder("{file}").backbone'
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
    if architecture.transformer:
        return f"{_transformer(architecture, format)}\n{load}"
    library = "torchvision.models." if format == "torchvision" else "timm.create_model("
    build = f"model = {library}{name}()" if format == "torchvision" else f'model = {library}"{name}", num_classes=0)'
    kernel, stride = STEMS[architecture.stem]
    stem = f"model.conv1 = torch.nn.Conv2d(3, 64, {kernel}, {stride}, {kernel // 2}, bias=False)\n"
    stem += "model.maxpool = torch.nn.Identity()\n"
    head = "model.fc = torch.nn.Identity()\n" if format == "torchvision" else ""
    return f"{build}\n{head}{stem if architecture.stem != 'imagenet' else ''}{load}"


def _transformer(architecture: Architecture, format: str) -> str:
    if format == "timm":
        return (
            f'model = timm.create_model("{architecture.arch}_patch16_224", img_size={architecture.size}, '
            f"num_heads={architecture.heads}, num_classes=0)"
        )
    dim, depth, _ = TRANSFORMERS[architecture.arch]
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

"""The model card that goes with an exported encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from engine.checkpoint.provenance import commit
from engine.weights.load import DIMENSIONS, Architecture, Loaded, digest
from pipeline.augment.color import IMAGENET
from pipeline.system.errors import InputError
from pipeline.system.limits import RESULT_BYTES, json_lines, read_json
from pipeline.system.packages import version
from pipeline.system.text import printable

_FIGURES = {"top1": "top-1", "map": "mAP", "miou": "mIoU", "ap": "AP"}
"""Of evaluations, by the key that holds the one for a table."""


def card(loaded: Loaded, format: str, path: Path, distance: float) -> str:
    """Return a model card, in Markdown: recipe, data, metrics, commit, and how the file is loaded.

    distance: how far features moved when the file was read back.
    """
    architecture = loaded.architecture
    front = {"library_name": format if format == "timm" else "pytorch", "pipeline_tag": "image-feature-extraction"}
    front["tags"] = ["self-supervised", "millrace", architecture.arch]  # type: ignore[assignment]
    mean, std = IMAGENET
    trained = f" Its checkpoint was written by {_told(loaded.origin)}." if "version" in loaded.origin else ""
    here = {"version": version("millrace") or "unknown"} | ({"commit": commit()} if commit() else {})
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {architecture}",
        f"The backbone alone, without heads: the {loaded.which} encoder of {loaded.kind}, `{loaded.path.name}`. Images "
        f"of {architecture.size} pixels, RGB from 0 to 1 less the mean {mean}, over the deviation {std}, give "
        f"{loaded.backbone.features} features.",
        f"SHA-256 of the weights: `{digest(loaded.backbone)}`.{trained} Exported by {_told(here)}, torch "
        f"{torch.__version__}, as {format}; read back, its features differ by {distance:.1e} of the largest at most.",
        f"## Loading\n\n```python\n{_loading(architecture, format, path)}\n```",
    ]
    if loaded.settings:
        lines.append(f"## Data\n\n{_data(loaded)}")
    if metrics := _metrics(loaded.path):
        lines.append("## Metrics\n\n" + "\n".join(metrics))
    if loaded.settings:
        lines.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(loaded.settings, sort_keys=False)}```")
    return "\n\n".join(lines) + "\n"


def _told(origin: dict[str, Any]) -> str:
    """Return which Millrace that is, of version and commit."""
    version = f" {origin['version']}" if "version" in origin else ""
    return f"Millrace{version}, commit {origin.get('commit', 'unknown')}"


def _data(loaded: Loaded) -> str:
    """Return what the run was trained on: name, size and fingerprint, as far as the checkpoint says."""
    name = printable(Path(str(loaded.settings.get("data", {}).get("train", ""))).name)
    more = [f"{loaded.origin['images']} images"] if "images" in loaded.origin else []
    if classes := loaded.origin.get("classes"):
        more.append(f"of {classes} classes")
    if "fingerprint" in loaded.origin:
        more.append(f"fingerprint `{loaded.origin['fingerprint']}`")
    return f"Trained on `{name}`, without labels" + (f": {', '.join(more)}." if more else ".")


def _metrics(path: Path) -> list[str]:
    """Return what the run that a checkpoint is of has measured: its last metrics, and its evaluations."""
    run, lines = path.resolve().parents[1], []
    if not (run / "checkpoints").is_dir():
        return []
    for kept in sorted((run / "evaluation").glob("*.json")):
        found = _json(kept)
        if Path(str(found.get("checkpoint", ""))).name != path.name:
            continue
        figure = next((key for key in _FIGURES if isinstance(found.get(key), float)), None)
        if figure:
            name = _FIGURES[figure]
            lines.append(f"- {found.get('evaluation')}: {name} {found[figure]:.2%} ({found.get('which')} encoder)")
    metrics = run / "metrics.jsonl"
    step = int(path.name.removeprefix("step_")) if path.name.startswith("step_") else None
    for _, found in json_lines(metrics) if metrics.is_file() else ():
        if found.get("step") == step and isinstance(found.get("knn_top1"), float):
            lines.append(f"- kNN while training, after step {step}: top-1 {found['knn_top1']:.2%}")
    return lines


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, RESULT_BYTES, "remove it")
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _loading(architecture: Architecture, format: str, path: Path) -> str:
    """Return Python that loads the file where it belongs, strictly where the library can."""
    name, file = architecture.arch, path.name
    if format == "onnx":
        return f'session = onnxruntime.InferenceSession("{file}")\nsession.run(["features"], {{"images": images}})'
    if format == "safetensors":
        return f'from engine.weights.load import load_encoder\n\nbackbone = load_encoder("{file}").backbone'
    if format == "detectron2":
        return f'cfg.MODEL.WEIGHTS = "{file}"\n' + (
            _pixels() if not architecture.transformer else "# a ViTDet whose backbone has use_cls_token's positions"
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
    made = f"model = {library}{name}()" if format == "torchvision" else f'model = {library}"{name}", num_classes=0)'
    stem = "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)\nmodel.maxpool = torch.nn.Identity()\n"
    head = "model.fc = torch.nn.Identity()\n" if format == "torchvision" else ""
    return f"{made}\n{head}{stem if architecture.stem == 'small' else ''}{load}"


def _transformer(architecture: Architecture, format: str) -> str:
    dim = DIMENSIONS[architecture.arch]
    if format == "timm":
        return (
            f'model = timm.create_model("{architecture.arch}_patch16_224", img_size={architecture.size}, '
            f"num_heads={architecture.heads}, num_classes=0)"
        )
    depth = 24 if architecture.arch == "vit_large" else 12
    return (
        f"model = torchvision.models.VisionTransformer({architecture.size}, 16, {depth}, {architecture.heads}, {dim}, "
        f"{4 * dim})\nmodel.heads = torch.nn.Identity()"
    )


def _pixels() -> str:
    """Return detectron2's settings for torchvision's images (facebookresearch/moco `detection/configs`)."""
    mean, std = ([round(255 * value, 3) for value in values] for values in IMAGENET)
    return (
        f"cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = {mean}, {std}\n"
        'cfg.INPUT.FORMAT = "RGB"\ncfg.MODEL.RESNETS.STRIDE_IN_1X1 = False'
    )

"""An exported encoder on the Hugging Face Hub: weights, configuration and model card, where timm finds them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from engine.export.formats import export, refuse
from engine.export.model_card import card, timm_args, timm_name
from engine.weights.load import Architecture, LoadedEncoder
from pipeline.system.errors import InputError, describe_error
from pipeline.system.files import write_atomic

FORMATS = ("timm", "safetensors")
WEIGHTS = "model.safetensors"


def check_name(name: str) -> None:
    """Raise InputError unless `name` is USER/NAME, as the Hub has it."""
    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"--push-to {name}: give USER/NAME, of letters, digits, -, _ and .")


def choose_format(architecture: Architecture) -> str:
    """Return timm where it has the architecture, else our own format."""
    try:
        refuse(architecture, "timm", "timm")
    except InputError:
        return "safetensors"
    return "timm"


def write_folder(encoder: LoadedEncoder, format: str, folder: Path, name: str) -> float:
    """Write the repository `name` to `folder`; return how far the features of its weights move, as `export` does.

    With format timm, `timm.create_model("hf_hub:NAME", pretrained=True)` loads it, or "local-dir:FOLDER" from there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}): choose another --out") from None
    distance = export(encoder, format, folder / WEIGHTS)
    (folder / f"{WEIGHTS}.md").unlink()
    config = timm_config(encoder) if format == "timm" else {"library": "millrace", **asdict(encoder.architecture)}
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_atomic(folder / "README.md", card(encoder, format, folder / WEIGHTS, distance, hub=name))
    return distance


def timm_config(encoder: LoadedEncoder) -> dict[str, Any]:
    """Return timm's `config.json` of an encoder: architecture, arguments and preprocessing."""
    architecture, size = encoder.architecture, encoder.architecture.size
    args, (mean, std) = timm_args(encoder), encoder.statistics
    timms = getattr(getattr(encoder.backbone, "net", None), "pretrained_cfg", {})
    described = {
        "custom_load": False,
        "input_size": [3, size, size],
        "fixed_input_size": "img_size" in args,
        "interpolation": "bilinear",
        "crop_pct": encoder.preprocess.crop_ratio,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        "classifier": timms.get("classifier", "head" if architecture.transformer else "fc"),
    }
    return {
        "architecture": timm_name(architecture),
        "num_classes": 0,
        "num_features": encoder.backbone.features,
        "model_args": args,
        "pretrained_cfg": described,
    }


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload the folder to the repository `name`, made if it is missing; return its address. Raises InputError."""
    api = HfApi(library_name="millrace")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the encoder")
    except (HfHubHTTPError, OSError, ValueError) as error:  # no login is an OSError, no network too
        problem = describe_error(error)
        raise InputError(f"--push-to {name}: {problem}: log in with hf auth login, or see {folder} with --dry-run"
                         ) from None  # fmt: skip
    return str(address)

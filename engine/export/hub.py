"""An exported encoder on the Hugging Face Hub: weights, configuration and model card, where timm finds them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from engine.export.formats import export, refuse
from engine.export.model_card import card, timm_args, timm_name
from engine.weights.architecture import Architecture
from engine.weights.load import LoadedEncoder
from pipeline.system.errors import InputError, describe_error
from pipeline.system.files import write_atomic

FORMATS = ("timm", "safetensors")
WEIGHTS = "model.safetensors"
_CONFIG, _CARD = "config.json", "README.md"
_FILES = (WEIGHTS, _CONFIG, _CARD)


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
        check_format(architecture, "timm")
    except InputError:
        return "safetensors"
    return "timm"


def check_format(architecture: Architecture, format: str) -> None:
    """Raise InputError for a format of which the Hub's libraries cannot build this architecture."""
    if format not in FORMATS:
        loaded = " and ".join(FORMATS)
        raise InputError(f"--format {format}: the Hub's libraries load {loaded}: choose one of them")
    if format == "timm":
        refuse(architecture, "timm", "timm")
        if architecture.stem != "imagenet":  # which its configuration cannot state
            raise InputError(f"--format timm: has no {architecture} by name: choose safetensors")


def write_folder(encoder: LoadedEncoder, format: str, folder: Path, name: str) -> float:
    """Write the repository `name` to `folder`; return how far the features of its weights move, as `export` does.

    With format timm, `timm.create_model("hf_hub:NAME", pretrained=True)` loads it, or "local-dir:FOLDER" from there.
    Raises InputError for a folder with other files, all of which would be replaced or uploaded.
    """
    check_format(encoder.architecture, format)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if others := sorted({path.name for path in folder.iterdir()} - set(_FILES)):
            raise InputError(f"{folder}: has other files, such as {others[0]}: choose another --out")
        distance = export(encoder, format, folder / WEIGHTS)
        (folder / f"{WEIGHTS}.md").unlink()
        config = timm_config(encoder) if format == "timm" else _own_config(encoder)
        write_atomic(folder / _CONFIG, json.dumps(config, indent=2) + "\n")
        write_atomic(folder / _CARD, card(encoder, format, folder / WEIGHTS, distance, hub=name))
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise InputError(f"{folder}: {problem}: choose another --out") from None
    return distance


def _own_config(encoder: LoadedEncoder) -> dict[str, Any]:
    preprocess = {**encoder.statistics._asdict(), "crop_ratio": encoder.preprocess.crop_ratio}
    return {"library": "millrace", **asdict(encoder.architecture), **preprocess}


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
    """Upload the folder's files to the repository `name`, made if it is missing; return its address.

    Raises InputError.
    """
    api = HfApi(library_name="millrace")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(_FILES), commit_message="Add the encoder"
        )
    except Exception as error:  # of the library, its HTTP client or the system: no login, no right, no network
        remedy = f"log in with hf auth login and try again; {folder} is written"
        raise InputError(f"--push-to {name}: {describe_error(error)}: {remedy}") from None
    return str(address)

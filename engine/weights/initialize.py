"""Start of a run from the weights in a file."""

from pathlib import Path
from typing import Any

from engine.config.settings import Settings
from engine.weights.architecture import Architecture
from engine.weights.custom import UntrustedCode
from engine.weights.load import LoadedEncoder, digest, load_encoder
from methods.custom import is_custom
from methods.encoders import base_channels
from methods.heads import Encoder
from methods.vit import VITS
from pipeline.system.errors import InputError


def initialize(encoder: Encoder, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Load the weights that `model.init` names into the online encoder; return a record of them, and log lines.

    The backbone always, projector and predictor with `model.init_heads`. The record: file, its kind, which encoder,
    keys matched, heads loaded, SHA-256 of the backbone. Raises InputError where the file has another backbone than the
    run, or with `init_heads` no head of the run's shapes.
    """
    model, path = settings.model, Path(settings.model.init)
    own = _own_architecture(settings)
    custom = own if own.custom else None
    try:
        loaded = load_encoder(path, model.init_which, prefix=model.init_prefix, heads=own.heads, custom=custom)
    except UntrustedCode as error:  # which this run's own backbone is not
        raise InputError(f"model.init {path}: has {error.arch}: choose model.arch {error.arch}") from None
    except InputError as error:
        raise InputError(f"model.init: {error}") from None
    if remedy := _remedy(loaded.architecture, own):
        raise InputError(f"model.init {path}: has {loaded.architecture}, and this run trains {own}: choose {remedy}")
    encoder.backbone.load_state_dict(loaded.backbone.state_dict())
    heads, problems = _load_heads(encoder, loaded) if model.init_heads else ([], [])
    record = {"file": str(path), "kind": loaded.kind, "which": loaded.which, "matched": loaded.matched}
    record |= {"heads": heads, "sha256": digest(loaded.backbone)}
    lines = [f"model.init: {loaded.summary()}", *loaded.warnings]
    lines += [f"model.init_heads: {', '.join(heads)} loaded{''.join(f'; {each}' for each in problems)}"] * bool(heads)
    return record, lines


def _own_architecture(settings: Settings) -> Architecture:
    model = settings.model
    if model.arch in VITS:
        return Architecture(model.arch, size=settings.data.size, heads=VITS[model.arch].heads)
    if is_custom(model.arch):
        return Architecture(model.arch, size=settings.data.size, args=model.args)
    return Architecture(model.arch, model.stem, model.width)


def _remedy(theirs: Architecture, own: Architecture) -> str:
    """Return the settings with which the run has the file's backbone; empty if it has."""
    keys = {"model.arch": "arch", "model.stem": "stem"}
    keys |= {"data.size": "size", "a file of as many heads": "heads"} if own.transformer else {}
    if base_channels(theirs.width) != base_channels(own.width):
        keys |= {"model.width": "width"}
    values = [(key, getattr(theirs, name)) for key, name in keys.items()]
    return ", ".join(f"{key} {value}" for key, value in values if value != getattr(own, keys[key]))


def _load_heads(encoder: Encoder, loaded: LoadedEncoder) -> tuple[list[str], list[str]]:
    """Load the heads that the file has and the run has too; return their names, and why others were not loaded.

    Raises InputError for none.
    """
    problems, names = [], []
    for name, head in (("projector", encoder.projector), ("predictor", encoder.predictor)):
        if head is None:
            continue
        state, expected = loaded.heads.get(name, {}), head.state_dict()
        missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
        differing = [key for key in expected if key in state and state[key].shape != expected[key].shape]
        if not state:
            problems.append(f"no {name}")
        elif missing or differing or state.keys() - expected.keys():
            key = (missing + differing + sorted(state.keys() - expected.keys()))[0]
            wanted, given = (list(part[key].shape) if key in part else "missing" for part in (expected, state))
            problems.append(f"another {name}: {key} is {given}, and {wanted} in this run")
        else:
            head.load_state_dict(state, strict=False)
            names.append(name)
    if not names:
        raise InputError(
            f"model.init_heads true: {loaded.path} has {'; '.join(problems)}: leave model.init_heads out, or set "
            "method.name, model.dim and model.mlp_dim to the file's"
        )
    return names, problems

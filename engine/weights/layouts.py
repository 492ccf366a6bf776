"""Layouts of files of encoders: the key prefixes by which a kind of file is recognized."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from engine.weights.architecture import State
from engine.weights.key_maps import to_ours
from pipeline.system.errors import InputError

Which = Literal["online", "momentum"]
MAX_CHARACTERS, MAX_PARTS = 200, 20
"""Characters of a key, and keys listed, in messages."""
_FIRST = r"conv1\.weight|patch_embed\.proj\.(?:0\.)?weight|stem\.conv1\.weight|conv_proj\.weight"
_ROOTS = r"conv1\.|bn1\.|layer\d\.|cls_token$|pos_embed$|patch_embed\.|blocks\.|norm\."


class Layout(NamedTuple):
    """Key prefixes of the encoders in a kind of file."""

    name: str
    online: str
    momentum: str | None
    published_heads: bool = False
    """Whether a small transformer has MoCo v3's 12 attention heads."""
    pretraining: bool = True
    """Whether the file has projection heads and other encoders or a queue."""
    projectors: tuple[tuple[str, str], ...] = ()
    """Prefixes of the online and the momentum encoder's projector: one of these pairs."""
    predictor: str = ""
    """Prefix of the predictor; empty: there is none."""
    marker: str = ""
    """Prefix of a key that every such file has."""


LAYOUTS = (
    Layout("a Millrace checkpoint", "online.backbone.", "target.backbone.", True,
            projectors=(("online.projector.", "target.projector."),), predictor="online.predictor."),
    Layout("an official MoCo v1 or v2 checkpoint", "encoder_q.", "encoder_k.",
            projectors=(("encoder_q.fc.", "encoder_k.fc."),)),
    Layout("an official MoCo v3 checkpoint", "base_encoder.", "momentum_encoder.", True,
            projectors=tuple((f"base_encoder.{head}.", f"momentum_encoder.{head}.") for head in ("fc", "head")),
            predictor="predictor."),
    Layout("an official SimSiam checkpoint", "encoder.", None,
            projectors=(("encoder.fc.", ""),), predictor="predictor.", marker="predictor."),
    Layout("a state dict", "encoder.", None, pretraining=False),
    Layout("a state dict", "backbone.", None, pretraining=False),
    Layout("a state dict", "", None, pretraining=False),
)  # fmt: skip


class BackbonePart(NamedTuple):
    """The part of a state that is a backbone's."""

    layout: Layout
    prefix: str
    values: State
    """Tensors by their keys without the prefix, under the backbone's names."""


def layouts(prefix: str) -> tuple[Layout, ...]:
    """Return the known layouts, or that of a state dict with the given prefix."""
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    given = Layout(f"a state dict with the prefix {prefix}", prefix, None, pretraining=False)
    return (given,) if prefix else LAYOUTS


def strip(state: State, prefix: str) -> State:
    """Return the part of a state under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def find_layout(state: State, path: Path, prefix: str) -> tuple[Layout, State]:
    """Return the layout, and the online encoder's part under our names. Raises InputError for a state without one."""
    for layout in layouts(prefix):
        part = to_ours(strip(state, layout.online))
        if not any(key.startswith(layout.marker) for key in state):
            continue
        if any(re.match(_ROOTS, key) for key in part):
            return layout, part
    content = f"its keys are {list_keys(list(state)[:3], '')} ..." if state else "it contains no tensors"
    if prefixes := _prefixes(state):
        content += f"; prefixes of such keys: {', '.join(prefixes[:MAX_PARTS])}"
    where = f" under {prefix.rstrip('.')}." if prefix else ""
    raise InputError(
        f"{path}: no backbone of a ResNet or a vision transformer{where} ({content}): give one with such keys, or "
        "their prefix"
    )


def _prefixes(state: Iterable[str]) -> list[str]:
    """Return the prefixes of the keys of a backbone's first layer, not of its blocks."""
    matches = (re.fullmatch(rf"(.+\.)({_FIRST})", key[:MAX_CHARACTERS]) for key in state)
    prefixes = dict.fromkeys(match[1] for match in matches if match)
    return [prefix for prefix in prefixes if not re.search(r"(layer|stage|res|block)s?\d*\.", prefix)]


def find_heads(state: State, layout: Layout, which: Which) -> dict[str, State]:
    """Return the state dicts of the heads in the file; the projector is that of the encoder `which`."""
    prefixes = [("projector", pair[which == "momentum"]) for pair in layout.projectors]
    prefixes.append(("predictor", layout.predictor))
    parts = [(name, strip(state, prefix)) for name, prefix in prefixes if prefix]
    return {name: part for name, part in parts if part}


def list_keys(keys: list[str], prefix: str) -> str:
    """Return the first keys as text, shortened."""
    return ", ".join((prefix + key)[:MAX_CHARACTERS] for key in keys[:4]) + (" ..." if len(keys) > 4 else "")

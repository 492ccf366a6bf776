"""Files with a backbone of timm or of the user's code: what they state, and which of their keys are its."""

from collections.abc import Iterator
from pathlib import Path

import torch

from engine.weights.architecture import Architecture, State, checked_size
from engine.weights.key_maps import to_ours
from engine.weights.layouts import BackbonePart, Layout, Which, layouts, list_keys, strip
from engine.weights.readers import Contents, unwrapped
from methods.custom import CustomBackbone, build_timm, is_custom, needs_trust
from methods.vit import VITS
from pipeline.system.errors import InputError
from pipeline.system.text import printable

_MAX_GROWTH = 4  # of a network that a file states, over the file's tensors


def stated_architecture(contents: Contents, trust_recipe: bool) -> Architecture | None:
    """Return the architecture of timm or of the user's code that a file states, if any."""
    stated, path = contents.described, contents.path
    arch, args = str(stated.get("arch", "")), stated.get("args")
    if not is_custom(arch):
        return None
    if needs_trust(arch) and not trust_recipe:
        raise UntrustedCode(path, arch)
    if args is not None and not (isinstance(args, dict) and all(str(key).isidentifier() for key in args)):
        raise InputError(f"{path}: arguments of {printable(arch)} that are no mapping: give another file")
    try:
        architecture = Architecture(arch, size=checked_size(int(stated.get("size", 224))), args=args)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: states an impossible size of images ({error}): give another file") from None
    if not trust_recipe and args:
        _check_stated_size(architecture, contents)
    return architecture


class UntrustedCode(InputError):
    """A file whose backbone would import code, or let timm fetch files."""

    def __init__(self, path: Path, arch: str) -> None:
        self.arch = printable(arch)
        remedy = "add --trust-recipe (in Python, trust_recipe=True) if you trust it"
        super().__init__(f"{path}: has the backbone {self.arch!r}, which would import code or fetch files: {remedy}")


def _check_stated_size(architecture: Architecture, contents: Contents) -> None:
    """Raise InputError for a network that is much larger than the file's tensors, or of unknown size."""
    held = sum(value.numel() for value in contents.state.values())
    try:
        with torch.device("meta"):  # allocates nothing
            net = build_timm(architecture.arch, architecture.own_args, architecture.size)
        stated = sum(parameter.numel() for parameter in net.parameters())
    except Exception:
        raise UntrustedCode(contents.path, str(architecture)) from None
    if stated > _MAX_GROWTH * held:
        problem = f"states {printable(str(architecture))} of {stated} parameters, and has {held}"
        raise InputError(f"{contents.path}: {problem}: give another file")


def find_part(
    contents: Contents, architecture: Architecture, expected: State, which: Which, prefix: str
) -> BackbonePart:
    """Return the part of a file with the most keys of a backbone, `expected`. Raises InputError for none."""
    state = contents.state

    def matched(part: BackbonePart) -> int:
        return len(expected.keys() & part.values.keys())

    best = max(_candidates(state, which, unwrapped(prefix)), key=matched, default=None)
    if best is None or not matched(best):
        theirs, ours = (list_keys(list(keys)[:3], "") for keys in (state, expected))
        where = f" under {prefix}" if prefix else f", {which} encoder"
        problem = f"no key of {architecture}{where} (the file's are {theirs} ..., the backbone's {ours} ...)"
        raise InputError(f"{contents.path}: {problem}: give another file, or the prefix of its keys")
    return best


def _candidates(state: State, which: Which, prefix: str) -> Iterator[BackbonePart]:
    """Yield the parts of a state that may be a custom backbone's."""
    for layout in layouts(prefix):
        start = layout.online if which == "online" else layout.momentum
        if start is not None and any(key.startswith(layout.marker) for key in state):
            for inner in ("net.", ""):
                part = strip(state, start + inner)
                yield BackbonePart(layout, start + inner, part)
                yield BackbonePart(layout, start + inner, to_ours(part))


def check_attention_heads(backbone: CustomBackbone, contents: Contents, layout: Layout) -> None:
    """Raise InputError for weights of a transformer of other attention heads, which no key or shape shows."""
    blocks = getattr(backbone.net, "blocks", None)
    own = getattr(getattr(next(iter(blocks), None), "attn", None), "num_heads", 0) if blocks else 0
    stated = contents.described
    arch, heads = str(stated.get("arch", "")), stated.get("heads")
    published = VITS[arch].heads if arch in VITS else VITS["vit_small"].heads if layout.published_heads else 0
    theirs = heads if type(heads) is int and heads else 0 if is_custom(arch) else published
    if own and theirs and own != theirs:
        problem = f"has {theirs} attention heads, and this run's backbone {own}"
        raise InputError(f"{contents.path}: {problem}: choose model.args {{num_heads: {theirs}}}")

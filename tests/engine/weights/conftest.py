"""States of backbones."""

from __future__ import annotations

import functools

import torch

from methods.registry import build_backbone

State = dict[str, torch.Tensor]


@functools.cache
def _drawn(arch: str) -> State:
    torch.manual_seed(0)
    state = build_backbone(arch).state_dict()
    for name, value in state.items():
        if "running_var" in name:
            value.uniform_(0.5, 2)
    return state


def backbone(arch: str) -> State:
    """Return a backbone's state, with running statistics and positions of its own seed."""
    return {name: value.clone() for name, value in _drawn(arch).items()}


def prefixed(state: State, prefix: str) -> State:
    """Return a state whose names begin with a prefix."""
    return {prefix + name: value for name, value in state.items()}

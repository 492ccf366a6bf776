"""Other projects' loops, against MoCo by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from benchmarks.common import peers
from engine.training.model import build_model
from tests.engine.small import settings


def build(peer: Any) -> Any:
    chosen = settings("moco_v2")
    return peer(build_model(chosen, Accelerator(cpu=True)).step.encoder, chosen, torch.device("cpu"), None)


def test_the_official_loop_is_moco() -> None:
    """Its first loss by hand, the queue's next columns, and the moving average before the keys."""
    official = build(peers.Official)
    views = (torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    queue, online = official._queue.clone(), copy.deepcopy(official._online)
    loss = official.step(views)
    q, k = (F.normalize(online(view)[0], dim=1) for view in views)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
    assert loss == pytest.approx(F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).item(), rel=1e-4)
    assert torch.allclose(official._queue[:, :8], k.T, atol=1e-4)
    assert torch.equal(official._queue[:, 8:], queue[:, 8:])


def test_lightlys_loop_is_moco() -> None:
    """Its second loss by hand, from its networks and memory bank."""
    pytest.importorskip("lightly.loss")
    lightly = build(peers.Lightly)
    views = (torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    lightly.step(views)  # the first step creates the bank
    bank = lightly._criterion.memory_bank.bank.clone()
    online = copy.deepcopy((lightly._backbone, lightly._head))
    momentum = copy.deepcopy((lightly._backbone_momentum, lightly._head_momentum))
    loss = lightly.step(views)
    with torch.no_grad():
        for ours, follows in zip(online, momentum, strict=True):
            for p, m in zip(ours.parameters(), follows.parameters(), strict=True):
                m.copy_(0.999 * m + 0.001 * p)
        networks = zip((online, momentum), views, strict=True)
        q, k = (F.normalize(head(backbone(view).flatten(1)), dim=1) for (backbone, head), view in networks)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.T], 1) / 0.2
    assert loss == pytest.approx(F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).item(), rel=1e-3)

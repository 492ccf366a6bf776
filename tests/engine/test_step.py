"""The training step against a plain transcription of MoCo's algorithm."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn import functional as F

from engine.config import Optim
from engine.optim import build_optimiser
from engine.step import Step
from methods.encoders import resnet
from methods.heads import Encoder, moco_v2_head
from methods.moco import MoCo
from methods.momentum import momentum_copy
from methods.norm import norm_layer
from methods.queue import KeyQueue

EMA, TEMPERATURE, LENGTH, BATCH = 0.9, 0.2, 20, 8


def parts(bn: str = "plain") -> tuple[Encoder, nn.Module, KeyQueue]:
    torch.manual_seed(0)
    backbone = resnet("resnet18", stem="small", width=0.125, norm=norm_layer(bn))
    online = Encoder(backbone, moco_v2_head(backbone.features, 16)).double()
    return online, momentum_copy(online), KeyQueue(LENGTH, 16).double()


def make_step(online: Encoder, target: nn.Module, queue: KeyQueue, **options: Any) -> tuple[Step, Any]:
    accelerator = Accelerator(cpu=True)
    symmetric = options.pop("symmetric", False)
    wrapped, optimiser = accelerator.prepare(online, build_optimiser(online, Optim(lr=0.1)))
    method = MoCo(TEMPERATURE, symmetric)
    return Step(accelerator, wrapped, target, queue, method, optimiser, ema=EMA, **options), optimiser


def views(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, b


def transcription(steps: int) -> tuple[nn.Module, nn.Module, torch.Tensor, list[float]]:
    """MoCo's Algorithm 1 (1911.05722), with its queue as a list of columns, SGD and EMA by hand."""
    f_q, f_k, started = parts()
    queue = started.keys.clone()
    at, losses = 0, []
    velocity = {name: torch.zeros_like(p) for name, p in f_q.named_parameters()}
    for step in range(steps):
        x_q, x_k = views(step)
        q = F.normalize(f_q.head(f_q.backbone(x_q)), dim=1)
        with torch.no_grad():
            k = F.normalize(f_k.head(f_k.backbone(x_k)), dim=1)
        l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        l_neg = torch.einsum("nc,kc->nk", q, queue.clone())
        logits = torch.cat([l_pos, l_neg], dim=1) / TEMPERATURE
        loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        f_q.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in f_q.named_parameters():
                assert p.grad is not None
                velocity[name] = 0.9 * velocity[name] + p.grad + 1e-4 * p
                p -= 0.1 * velocity[name]
            for p_q, p_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
                p_k.copy_(EMA * p_k + (1 - EMA) * p_q)
        for row in k:
            queue[at] = row
            at = (at + 1) % LENGTH
    return f_q, f_k, queue, losses


def test_three_steps_equal_the_published_algorithm() -> None:
    online, target, queue = parts()
    step, _ = make_step(online, target, queue)
    losses = [step(views(i), i)["info_nce"].item() for i in range(3)]
    f_q, f_k, keys, expected = transcription(3)
    assert losses == pytest.approx(expected, abs=1e-12)
    for ours, theirs in ((online, f_q), (target, f_k)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-12, rtol=0)
    assert torch.allclose(queue.keys, keys, atol=1e-12, rtol=0)


def test_only_needed_embeddings_are_computed() -> None:
    for symmetric, online_views, target_views in ((False, 1, 1), (True, 2, 2)):
        online, target, queue = parts()
        counts = {"online": 0, "target": 0}

        def count(name: str, counts: dict[str, int] = counts) -> Any:
            return lambda *_: counts.__setitem__(name, counts[name] + 1)

        online.backbone.register_forward_hook(count("online"))
        target.backbone.register_forward_hook(count("target"))
        step, _ = make_step(online, target, queue, symmetric=symmetric)
        step(views(0), 0)
        assert counts == {"online": online_views, "target": target_views}


def test_momentum_parameters_and_queue_get_no_gradient() -> None:
    online, target, queue = parts()
    step, _ = make_step(online, target, queue)
    step(views(0), 0)
    assert all(p.grad is None for p in target.parameters())
    assert queue.keys.grad is None


def test_accumulated_parts_give_the_gradient_and_the_keys_of_the_whole_batch() -> None:
    """With BatchNorm in evaluation mode, since batch statistics are those of a part."""
    ends = []
    for accumulate in (1, 4):
        online, target, queue = parts()
        online.eval()
        target.eval()
        step, _ = make_step(online, target, queue, accumulate=accumulate)
        loss = step(views(0), 0)["info_nce"].item()
        ends.append((loss, queue.keys.clone(), queue.position, [p.detach().clone() for p in online.parameters()]))
    (loss_a, keys_a, at_a, p_a), (loss_b, keys_b, at_b, p_b) = ends
    assert (loss_a, at_a) == (pytest.approx(loss_b, abs=1e-12), at_b)
    assert torch.allclose(keys_a, keys_b, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(p_a, p_b, strict=True))


def test_an_overflowed_step_leaves_parameters_optimiser_momentum_encoder_and_queue() -> None:
    """With a real gradient scaler: a loss that is not finite, then a good one."""
    online, target, queue = parts()
    for module in (online, target):
        module.float().eval()  # running statistics are no part of the promise
    queue.float()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    optimiser = AcceleratedOptimizer(build_optimiser(online, Optim(lr=0.1), fused=False), scaler=accelerator.scaler)
    step = Step(accelerator, online, target, queue, MoCo(TEMPERATURE, False), optimiser, ema=EMA)
    before = copy.deepcopy((online.state_dict(), target.state_dict(), queue.keys, queue.position))
    good = tuple(view.float() for view in views(0))
    step((good[0] * float("inf"), good[1]), 0)
    assert optimiser.step_was_skipped
    assert not optimiser.state
    assert torch.equal(queue.keys, before[2])
    assert queue.position == before[3]
    for module, old in ((online, before[0]), (target, before[1])):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
    step(good, 1)
    assert not optimiser.step_was_skipped
    assert all(p.isfinite().all() for p in online.parameters())
    assert not torch.equal(queue.keys, before[2])


def test_shuffled_keys_return_to_their_own_samples() -> None:
    """With statistics over the whole batch, shuffling changes nothing but the order inside the momentum encoder."""
    ends = []
    for shuffle in (False, True):
        online, target, queue = parts()
        order: list[np.ndarray] = []
        target.backbone.register_forward_pre_hook(lambda _, x, order=order: order.append(x[0].sum((1, 2, 3)).numpy()))
        step, _ = make_step(online, target, queue, shuffle_keys=shuffle)
        step(views(0), 0)
        ends.append((queue.keys.clone(), order[0]))
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-10)
    assert not np.allclose(ends[0][1], ends[1][1])
    assert np.allclose(np.sort(ends[0][1]), np.sort(ends[1][1]))

"""The training step against plain transcriptions of the published algorithms, and its other promises."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from engine.config.settings import Optim
from engine.parallel import collectives
from engine.training.model import Model, build_model
from methods.co2 import CO2, consistency
from methods.dcl import DCL
from methods.flat import Buffers
from methods.moco import info_nce
from methods.registry import Terms
from methods.residual import Residual, gap
from methods.xmoco import XMoCo
from pipeline.sampling.order import shuffled_rows
from tests.engine.small import BATCH, LENGTH, batch_of, built, everything, settings, views

EMA, TEMPERATURE, RATE = 0.9, 0.2, 0.1
TERMS: dict[str, Any] = {"co2": CO2(), "xmoco": XMoCo(), "residual": Residual(), "dcl": DCL()}


def equal(ours: Any, theirs: Any, atol: float = 1e-12) -> bool:
    return all(torch.allclose(a, b, atol=atol, rtol=0) for a, b in zip(ours, theirs, strict=True))


def moco_v2_transcribed(f_q: nn.Module, f_k: nn.Module, queue: torch.Tensor, steps: int) -> list[float]:
    """MoCo's Algorithm 1 (1911.05722), with its queue as a list of rows, SGD and EMA by hand."""
    at, losses = 0, []
    velocity = {name: torch.zeros_like(p) for name, p in f_q.named_parameters()}
    for step in range(steps):
        x_q, x_k = views(step)
        q = F.normalize(f_q.projector(f_q.backbone(x_q)), dim=1)
        with torch.no_grad():
            k = F.normalize(f_k.projector(f_k.backbone(x_k)), dim=1)
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
                p -= RATE * velocity[name]
            for p_q, p_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
                p_k.copy_(EMA * p_k + (1 - EMA) * p_q)
        for row in k:
            queue[at] = row
            at = (at + 1) % LENGTH
    return losses


def test_three_steps_of_moco_v2_equal_the_published_algorithm() -> None:
    model = built(settings())
    f_q, f_k, keys = copy.deepcopy((model.online, model.target, model.queue.keys))
    losses = [model.step(batch_of(*views(i))).parts["loss"].item() for i in range(3)]
    assert losses == pytest.approx(moco_v2_transcribed(f_q, f_k, keys, 3), abs=1e-12)
    assert equal(model.online.parameters(), f_q.parameters())
    assert equal(model.target.parameters(), f_k.parameters())
    assert torch.allclose(model.queue.keys, keys, atol=1e-12, rtol=0)


def moco_v3_transcribed(base: nn.Module, momentum: nn.Module, settings: Optim, steps: int, m: float) -> list[float]:
    """MoCo v3's Algorithm 1 (2104.02057) and LARS, parameter by parameter; m_s = 1 - (1 - m)(1 + cos(pi s/S))/2."""
    losses = []
    velocity = {name: torch.zeros_like(p) for name, p in base.named_parameters()}

    def ctr(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        return 2 * TEMPERATURE * F.cross_entropy(logits / TEMPERATURE, torch.arange(len(q)))

    for step in range(steps):
        share = 1 - (1 - m) * (1 + np.cos(np.pi * step / steps)) / 2
        with torch.no_grad():
            for name, p_m in momentum.named_parameters():
                p_m.copy_(p_m * share + base.get_parameter(name) * (1 - share))
        x1, x2 = views(step)
        q1, q2 = (base.predictor(base.projector(base.backbone(x))) for x in (x1, x2))
        with torch.no_grad():
            k1, k2 = (momentum.projector(momentum.backbone(x)) for x in (x1, x2))
        loss = ctr(q1, k2) + ctr(q2, k1)
        base.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in base.named_parameters():
                g = p.grad.clone()
                if p.ndim > 1:
                    g += settings.weight_decay * p
                    g *= 0.001 * p.norm() / g.norm()
                velocity[name] = 0.9 * velocity[name] + g
                p -= settings.lr * velocity[name]
    return losses


def test_three_steps_of_moco_v3_with_lars_equal_the_published_algorithm() -> None:
    optim = Optim(name="lars", lr=3.0, weight_decay=1e-2, epochs=3, schedule="constant")
    chosen = replace(settings("moco_v3", temperature=TEMPERATURE, ema_schedule="cosine"), optim=optim)
    model = built(chosen)
    base, momentum = copy.deepcopy((model.online, model.target))
    before = [p.detach().clone() for p in base.parameters()]
    shares = [1 - 0.1 * (1 + np.cos(np.pi * (i + 1) / 3)) / 2 for i in range(3)]
    losses = [model.step(batch_of(*views(i))).parts["loss"].item() for i in range(3)]
    assert losses == pytest.approx(moco_v3_transcribed(base, momentum, optim, 3, 0.9), abs=1e-12)
    assert equal(model.online.parameters(), base.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True) if a.ndim > 1)
    with torch.no_grad():  # the transcription updates its momentum encoder at the beginning of the next step
        for name, p in momentum.named_parameters():
            p.copy_(p * shares[2] + base.get_parameter(name) * (1 - shares[2]))
    assert equal(model.target.parameters(), momentum.parameters())


def count_views(model: Model) -> dict[str, int]:
    """Return counts of the views through the online and the momentum backbone, updated by hooks."""
    counts = {"online": 0, "target": 0}
    for name, module in (("online", model.online), ("target", model.target)):
        if module is not None:
            module.backbone.register_forward_hook(
                lambda _, inputs, __, name=name: counts.__setitem__(name, counts[name] + len(inputs[0]) // BATCH)
            )
    return counts


@pytest.mark.parametrize(
    ("name", "terms", "symmetric", "online", "target"),
    [
        ("moco_v2", [], False, 1, 1),
        ("moco_v2", ["co2"], False, 1, 1),
        ("moco_v2", ["xmoco"], False, 1, 1),
        ("moco_v2", ["residual"], False, 1, 2),
        ("moco_v2", ["co2", "xmoco", "residual", "dcl"], False, 1, 2),
        ("moco_v2", [], True, 2, 2),
        ("moco_v2", ["residual"], True, 2, 2),
        ("moco_v3", ["residual", "co2"], True, 2, 2),
        ("byol", [], True, 2, 2),
        ("simclr", ["xmoco"], True, 2, 0),
    ],
)
def test_only_needed_embeddings_are_computed(
    name: str, terms: list[str], symmetric: bool, online: int, target: int
) -> None:
    model = built(settings(name, Terms(**{term: TERMS[term] for term in terms}), symmetric=symmetric))
    counts = count_views(model)
    model.step(batch_of(*views(0)))
    assert counts == {"online": online, "target": target}


def test_measures_cost_a_momentum_view_for_the_gap_and_change_nothing() -> None:
    ends = []
    for measured in (False, True):
        model = built(settings())
        counts = count_views(model)
        results = [model.step(batch_of(*views(i)), measured=measured) for i in range(2)]
        assert counts == {"online": 2, "target": 4 if measured else 2}
        assert ("student_teacher_gap" in results[0].measures) == measured
        ends.append([*model.online.state_dict().values(), *model.target.state_dict().values(), model.queue.keys])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_momentum_encoder_and_queue_get_no_gradient() -> None:
    model = built(settings(terms=Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual())))
    model.step(batch_of(*views(0)))
    assert all(p.grad is None for p in model.target.parameters())
    assert model.queue.keys.grad is None


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("moco_v2", Terms()),
        ("moco_v2", Terms(co2=CO2(), xmoco=XMoCo(cross=0), residual=Residual())),
        ("moco_v3", Terms()),
        ("moco_v3", Terms(co2=CO2(), xmoco=XMoCo(cross=0), residual=Residual(), dcl=DCL())),
        ("byol", Terms(co2=CO2())),
    ],
)
def test_accumulated_parts_equal_the_batch(name: str, terms: Terms) -> None:
    """BatchNorm is in evaluation mode, as batch statistics are those of a part."""
    ends = []
    for accumulate in (1, 4):
        model = built(replace(settings(name, terms), gradient_accumulation_steps=accumulate))
        model.online.eval()
        model.target.eval()
        loss = model.step(batch_of(*views(0))).parts["loss"].item()
        ends.append((loss, model.queue.keys.clone() if model.queue else None, list(model.online.parameters())))
    (loss_a, keys_a, p_a), (loss_b, keys_b, p_b) = ends
    assert loss_a == pytest.approx(loss_b, abs=1e-12)
    assert equal(p_a, p_b)
    if keys_a is not None:
        assert torch.allclose(keys_a, keys_b, atol=1e-12)


def test_accumulated_parts_equal_the_batch_in_float32() -> None:
    """The tolerance is 1e-6; the queue moves once."""
    ends = []
    for accumulate in (1, 4):
        chosen = replace(settings("moco_v2", Terms(co2=CO2())), gradient_accumulation_steps=accumulate)
        model = build_model(chosen, Accelerator(cpu=True))
        model.online.eval()
        model.target.eval()
        loss = model.step(batch_of(*(view.float() for view in views(0)))).parts["loss"]
        assert model.queue.position.item() == BATCH
        ends.append([loss, model.queue.keys, *model.online.parameters()])
    assert all(a.dtype == torch.float32 for a in ends[0])
    assert equal(*ends, atol=1e-6)


def overflow(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.index_fill(0, torch.tensor([1]), torch.inf)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("cause", ["loss", "gradient", "scaled gradient"])
@pytest.mark.parametrize(
    ("name", "optimizer", "accumulate"),
    [
        ("moco_v2", "sgd", 1),
        ("moco_v2", "sgd", 2),
        ("moco_v3", "lars", 1),
        ("simclr", "adamw", 1),
        ("byol", "adamw", 2),
    ],
)
def test_non_finite_step_changes_nothing(name: str, optimizer: Any, accumulate: int, cause: str, at: int) -> None:
    """A loss or one gradient is not finite, with fp16's scaler or without; the next steps do not depend on it."""
    optim = Optim(name=optimizer, lr=0.1, epochs=6, warmup_epochs=2, clip_grad_norm=1.0)
    momentum = {} if name == "simclr" else {"ema_schedule": "cosine"}
    chosen = replace(settings(name, **momentum), optim=optim, gradient_accumulation_steps=accumulate)
    ends = []
    for disturbed in (True, False):
        accelerator = Accelerator(cpu=True)
        if cause == "scaled gradient":
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model = built(chosen, accelerator)
        losses = []
        for step in range(4):
            if disturbed and step == at:
                before = everything(model)
                x1, x2 = views(9)
                hook = next(model.online.parameters()).register_hook(overflow)
                result = model.step(batch_of(x1 * float("inf") if cause == "loss" else x1, x2))
                hook.remove()
                assert result.parts["loss"].isfinite() == (cause != "loss")
                assert not result.taken
                assert model.step.schedule.skipped.item() == 1
                after = everything(model)
                assert before.keys() == after.keys()
                assert all(torch.equal(after[key], value) for key, value in before.items())
                assert accelerator.scaler is None or accelerator.scaler.get_scale() == 512
            result = model.step(batch_of(*views(step)))
            assert result.taken
            losses.append(result.parts["loss"].item())
        assert model.step.schedule.skipped.item() == 0
        ends.append((losses, everything(model)))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][key], value) for key, value in ends[1][1].items())


@pytest.mark.parametrize("symmetric", [False, True])
def test_shuffled_keys_return_to_their_samples(symmetric: bool) -> None:
    """Shuffling changes only the order inside the momentum encoder, as statistics are over the batch."""
    ends = []
    order = shuffled_rows(0, 0, BATCH)
    for shuffle in (False, True):
        model = built(settings(symmetric=symmetric))
        seen: list[np.ndarray] = []
        model.target.backbone.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].sum((1, 2, 3))))
        x1, x2 = views(0)
        more = {"shuffled": {0: collectives.exchange(x1, order), 1: collectives.exchange(x2, order)}, "order": order}
        loss = model.step(batch_of(x1, x2, **(more if shuffle else {}))).parts["loss"].item()
        ends.append((loss, model.queue.keys.clone(), list(model.online.parameters()), seen[-1]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-10)
    assert torch.allclose(ends[0][1], ends[1][1], atol=1e-10)
    assert equal(ends[0][2], ends[1][2], atol=1e-10)
    assert not torch.equal(ends[0][3], ends[1][3])
    plain, shuffled = (end[3].split(BATCH)[-1] for end in ends)  # the last view
    assert torch.allclose(plain[order], shuffled)


def test_gradient_is_clipped_to_the_norm() -> None:
    plain, clipped = (
        built(settings()),
        built(replace(settings(), optim=Optim(lr=0.1, weight_decay=0, clip_grad_norm=0.01))),
    )
    before = [p.detach().clone() for p in plain.online.parameters()]
    moves = []
    for model in (plain, clipped):
        model.step(batch_of(*views(0)))
        moves.append(torch.cat([(p - b).flatten() for p, b in zip(model.online.parameters(), before, strict=True)]))
    assert moves[1].norm().item() == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert moves[0].norm() > 2 * moves[1].norm()
    assert F.cosine_similarity(moves[0], moves[1], dim=0) > 0.99


def test_gradient_shares_are_of_each_weighted_part_at_the_embeddings() -> None:
    chosen = replace(settings(terms=Terms(co2=CO2(weight=2.0), residual=Residual())), gradient_shares=True)
    shares = {
        name.removeprefix("gradient_share_"): value.item()
        for name, value in built(chosen).step(batch_of(*views(0)), measured=True).measures.items()
        if name.startswith("gradient_share_")
    }
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    model = built(chosen)
    x1, x2 = views(0)
    q = model.online(x1)[0].detach().requires_grad_()
    k1, k2 = (model.target(x)[0] for x in (x1, x2))
    losses = {
        "info_nce": info_nce(q, k2, model.queue.keys, 0.2),
        "co2": 2 * consistency(q, k2, model.queue.keys, 0.05),
        "residual": gap(q, k1),
    }
    norms = {name: torch.autograd.grad(loss, q)[0].norm().item() for name, loss in losses.items()}
    assert shares == pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()}, abs=1e-10)


def test_gaps_key_shares_its_querys_batch_statistics() -> None:
    """So that the gap is 0 at the start, where student and teacher are the same; with the term and without."""
    for terms in (Terms(), Terms(residual=Residual())):
        chosen = settings(terms=terms, bn="shuffle", batch=16)
        x1, x2 = views(0, 16)
        order = shuffled_rows(0, 0, 16)
        shuffled = {0: collectives.exchange(x1, order), 1: collectives.exchange(x2, order)}
        result = built(chosen).step(batch_of(x1, x2, shuffled=shuffled, order=order), measured=True)
        assert result.measures["student_teacher_gap"].item() == pytest.approx(0, abs=1e-12)


def test_result_has_the_spread_of_the_first_views_online_embeddings() -> None:
    model = built(settings())
    x1, x2 = views(0)
    q = copy.deepcopy(model.online)(x1)[0]
    expected = np.std(q.detach().numpy(), axis=0, ddof=1).mean() * q.shape[1] ** 0.5
    assert model.step(batch_of(x1, x2)).spread.item() == pytest.approx(expected, abs=1e-12)


def test_symmetric_moco_enqueues_the_second_views_keys() -> None:
    model = built(settings(symmetric=True))
    x1, x2 = views(0)
    expected = copy.deepcopy(model.target)(x2)[0]
    model.step(batch_of(x1, x2))
    assert torch.allclose(model.queue.keys[:BATCH], expected, atol=1e-12)


def test_non_finite_batch_gives_nan_measures_and_no_error() -> None:
    x1, x2 = views(0)
    result = built(settings()).step(batch_of(x1 * float("inf"), x2), measured=True)
    assert not result.parts["loss"].isfinite()
    assert result.measures["effective_rank"].isnan()


def test_simclrs_queries_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    monkeypatch.setattr(collectives, "gather_with_gradient", lambda q: gathered.append(q) or q)
    built(settings("simclr", Terms(co2=CO2(), xmoco=XMoCo()))).step(batch_of(*views(0)))
    assert len(gathered) == 2


def test_parameters_that_were_moved_after_the_build_are_refused() -> None:
    """The momentum encoder would no longer follow, or skipped steps would change statistics."""
    for change in ("parameters", "buffers", "second step"):
        model = built(settings())
        model.step(batch_of(*views(0)), measured=True)
        if change == "parameters":
            model.online.projector.float().double()
        elif change == "buffers":
            model.target.backbone.bn1.running_mean.data = torch.zeros(8, dtype=torch.float64)
        else:
            Buffers(model.online)
        with pytest.raises(RuntimeError, match="have left their common buffer"):
            model.step(batch_of(*views(0)), measured=True)

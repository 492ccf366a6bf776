"""Gradients in buckets against autograd's own, and against their mean over two ranks."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.parallel import collectives
from engine.parallel.accelerator import build_accelerator
from engine.parallel.gradients import Gradients
from engine.parallel.rendezvous import rank
from engine.training.low_precision import LowPrecisionWeights
from tests.engine.small import settings
from tests.gloo import on_ranks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def images(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def reference(*batches: torch.Tensor) -> list[torch.Tensor]:
    """Return autograd's gradients of the sum of the losses of batches."""
    model = network()
    for x in batches:
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_gradients_are_autograds_in_one_buffer() -> None:
    """Of one backward pass, of two that add up, and with a layer that the loss does not depend on."""
    model = network()
    unused = nn.Linear(2, 3)
    parameters = [*model.parameters(), *unused.parameters()]
    gradients = Gradients(parameters)
    gradients.flat.fill_(torch.nan)
    for batches in ([images(0)], [images(1), images(2)]):
        for number, x in enumerate(batches):
            gradients.begin(first=number == 0, last=x is batches[-1])
            model(x).square().sum().backward()
            gradients.finish()
        for p, expected in zip(model.parameters(), reference(*batches), strict=True):
            assert torch.equal(p.grad, expected)  # type: ignore[arg-type]
            assert p.grad.stride() == p.stride()  # type: ignore[union-attr]
            assert p.grad.untyped_storage().data_ptr() == gradients.flat.untyped_storage().data_ptr()  # type: ignore[union-attr]
        assert all(p.grad is not None and not p.grad.any() for p in unused.parameters())
        for p in parameters:
            p.grad = None  # as the optimizer's zero_grad does


def test_model_is_freed_with_its_gradients() -> None:
    model = network()
    gradients = Gradients(list(model.parameters()))
    alive = [weakref.ref(p) for p in model.parameters()]
    del model, gradients
    gc.collect()
    assert not any(reference() for reference in alive)


def test_interrupted_pass_leaves_nothing_behind() -> None:
    model = network()
    gradients = Gradients(list(model.parameters()))
    gradients.begin(first=True, last=True)
    handle = model[0].weight.register_hook(lambda g: 1 / 0)  # the last gradient of all
    with pytest.raises(ZeroDivisionError):
        model(images(0)).square().sum().backward()
    handle.remove()
    gradients.discard()
    gradients.begin(first=True, last=True)
    model(images(1)).square().sum().backward()
    gradients.finish()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), reference(images(1)), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("passes", [1, 2])
def test_weights_cast_once_train_like_those_that_autocast_casts(passes: int) -> None:
    plain, cast = network(), network()
    weights = LowPrecisionWeights(cast, torch.bfloat16)
    gradients = Gradients(list(cast.parameters()), weights.leaves)
    weights.update()
    outputs = []
    for number in range(passes):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(plain(images(number)))
            with weights.applied():
                outputs.append(cast(images(number)))
        gradients.begin(first=number == 0, last=number == passes - 1)
        outputs[-2].square().sum().backward()
        outputs[-1].square().sum().backward()
        gradients.finish()
        assert torch.equal(outputs[-2], outputs[-1])
    for a, b in zip(plain.parameters(), cast.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    assert all(isinstance(p, nn.Parameter) for layer in cast for p in layer._parameters.values())


def run_averaged(out: str) -> None:
    build_accelerator(replace(settings(), cpu=True, tracker="none"))
    model = network()
    if rank() == 1:
        for p in model.parameters():
            p.data.zero_()
    collectives.broadcast_parameters(model)
    gradients = Gradients(list(model.parameters()))
    gradients.begin(first=True, last=True)
    model(images(rank())).square().sum().backward()
    gradients.finish()
    one, other = reference(images(0)), reference(images(1))
    for p, a, b in zip(model.parameters(), one, other, strict=True):
        assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-6)  # type: ignore[arg-type]
    Path(out, str(rank())).touch()


def test_gradients_are_means_over_ranks_that_begin_with_rank_0s_weights(tmp_path: Path) -> None:
    on_ranks(2, run_averaged, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2

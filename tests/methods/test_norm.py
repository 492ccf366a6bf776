"""BatchNorm by parts of a batch against torch's on each part, in torch's operations and in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from methods import norm, norm_cpu, norm_kernels
from methods.norm import BatchNorm, SplitBatchNorm, count_batches


@pytest.mark.parametrize(("batch", "groups"), [(16, 8), (12, 8), (7, 4), (2, 8)])
def test_each_part_has_its_own_statistics(batch: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = SplitBatchNorm(5, groups).double()
    nn.init.uniform_(layer.weight)
    x = torch.randn(batch, 5, 4, 4, dtype=torch.float64)
    parts = max(g for g in range(1, groups + 1) if batch % g == 0 and (batch // g >= 2 or g == 1))
    expected = []
    for part in x.chunk(parts):
        mean = part.mean(dim=(0, 2, 3), keepdim=True)
        var = part.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
        expected.append((part - mean) / (var + 1e-5).sqrt() * layer.weight.view(1, -1, 1, 1))
    assert torch.allclose(layer(x), torch.cat(expected), atol=1e-12)


def test_running_statistics_move_as_far_as_in_one_update() -> None:
    layer, plain = SplitBatchNorm(3, 4), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 8, 8).repeat(4, 1, 1, 1) + 2  # equal parts, so that the statistics agree
    layer(x)
    plain(x)
    assert torch.allclose(layer.running_mean, plain.running_mean, atol=1e-6)
    count_batches(layer, 2)
    assert layer.num_batches_tracked == 2


def test_evaluation_equals_plain_batchnorm() -> None:
    layer, plain = SplitBatchNorm(3, 4), nn.BatchNorm2d(3)
    layer(torch.randn(8, 3, 4, 4))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_vectors_are_split_like_images() -> None:
    torch.manual_seed(0)
    layer = SplitBatchNorm(5, 2, affine=False).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    expected = [(p - p.mean(0)) / (p.var(0, unbiased=False) + 1e-5).sqrt() for p in x.chunk(2)]
    assert torch.allclose(layer(x), torch.cat(expected), atol=1e-12)
    assert layer.weight is None


class Copies:
    """Ranks with the same batch as this one."""

    def __init__(self, world: int) -> None:
        self.world = world

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        return torch.cat([local] * self.world)

    def sum(self, local: torch.Tensor) -> torch.Tensor:
        return self.world * local


def _results(layer: BatchNorm, x: torch.Tensor, slope: torch.Tensor, normalized: torch.Tensor) -> list[torch.Tensor]:
    """Return output, gradients and running statistics."""
    parameters = [p for p in (x, layer.weight, layer.bias) if p is not None]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return [normalized.detach(), *torch.autograd.grad(normalized, parameters, slope), *layer.buffers()][:-1]


@pytest.mark.parametrize("operations", [norm._TorchOperations, norm_kernels], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("shape", "views", "groups", "affine"),
    [((8, 5, 3, 3), 1, 4, True), ((8, 70, 3, 3), 2, 1, True), ((12, 130), 1, 3, False), ((4, 3, 7, 9), 1, 1, True)],
)
def test_one_operation_equals_torchs_batchnorm_of_each_part(
    shape: tuple[int, ...], views: int, groups: int, affine: bool, operations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 to 1e-12: values, gradients and running statistics."""
    if operations is norm_kernels and torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU")
    torch.manual_seed(0)
    monkeypatch.setattr(norm, "_operations", lambda x: operations)
    x = (2 * torch.randn(shape, dtype=torch.float64) + 3).requires_grad_()
    if x.ndim == 4:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    slope = torch.randn(shape, dtype=torch.float64)
    layer, alone, plain = (BatchNorm(shape[1], groups, affine=affine).double() for _ in range(3))
    if affine:
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
    for other in (alone, plain):
        other.load_state_dict(layer.state_dict())
    layer.views = alone.views = views
    momentum = 1 - 0.9 ** (1 / groups)
    parts = [
        F.batch_norm(part, plain.running_mean, plain.running_var, plain.weight, plain.bias, True, momentum, 1e-5)
        for part in x.chunk(views * groups)
    ]
    expected = _results(plain, x, slope, torch.cat(parts))
    exchanged = _results(layer, x, slope, layer.normalize(x, layer.statistics(x)))
    local = _results(alone, x, slope, alone._normalize_parts(x, views * groups, momentum))
    for actual in (exchanged, local):
        for value, reference in zip(actual, expected, strict=True):
            assert torch.allclose(value, reference, rtol=1e-12, atol=1e-12 * float(reference.abs().max()))
    with torch.no_grad():
        assert torch.equal(alone._normalize_parts(x, views * groups, momentum), local[0])


class Function:
    """Stands in for a Triton function: notes what it compiles for, and what its compiled code is called with."""

    def __init__(self) -> None:
        self.compiled, self.launched = list[tuple[Any, ...]](), list[tuple[Any, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*args: Any, **options: Any) -> Any:
            self.compiled.append(args)
            return {grid: lambda *args: self.launched.append(args)}

        return compile_and_launch


def test_kernel_is_compiled_anew_for_all_that_triton_compiles_for() -> None:
    function, grid = Function(), (1, 1, 1)
    kernel, x = norm_kernels._Kernel(function), torch.zeros(32)
    for tensor, number in ((x, 16), (x.double(), 16), (x, 17)):
        before = len(function.compiled)
        kernel(grid, (x, tensor), (number, 0.5))
        kernel(grid, (x, tensor), (number, 0.5))
        assert len(function.compiled) - before == 1
        assert function.launched[-1] == function.compiled[-1] == (x, tensor, number, 0.5)
    for _ in range(2):  # an address that 16 does not divide is left to Triton
        kernel(grid, (x, x[1:]), (16, 0.5))
    assert len(function.compiled) == 5
    assert len(function.launched) == 3


def test_statistics_of_ranks_are_those_of_their_batches_together() -> None:
    torch.manual_seed(0)
    x, slope = torch.randn(6, 5, 4, 4, dtype=torch.float64), torch.randn(6, 5, 4, 4, dtype=torch.float64)
    layer, plain = BatchNorm(5).double(), nn.BatchNorm2d(5).double()
    layer.ranks = Copies(3)
    x.requires_grad_()
    together = torch.cat([x] * 3)
    (expected,) = torch.autograd.grad(plain(together), x, torch.cat([slope] * 3))  # of all ranks' losses
    (actual,) = torch.autograd.grad(layer(x), x, slope)
    assert torch.allclose(3 * actual, expected, atol=1e-12)
    assert torch.allclose(layer(x), plain(together)[:6], atol=1e-12)
    assert torch.allclose(layer.running_var, plain.running_var, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(24, 16, 5, 3), (24, 7, 1, 1), (18, 33)], ids=str)
def test_compiled_parts_are_as_precise_as_torchs_batchnorm_of_each_part(
    shape: tuple[int, ...], affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by float64, which runs by torch's own code; also with a mean that is large against the deviation."""
    torch.manual_seed(0)
    layer = SplitBatchNorm(shape[1], 6, affine=affine)
    if affine:
        nn.init.uniform_(layer.weight)
        nn.init.normal_(layer.bias)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x, slope = torch.randn(shape) + 20, torch.randn(shape)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        other = SplitBatchNorm(shape[1], 6, affine=affine).to(dtype)
        other.load_state_dict(state)
        images = x.to(dtype, copy=True).requires_grad_()
        return _results(other, images, slope.to(dtype), other(images))

    compiled, exact = run(torch.float32), run(torch.float64)
    monkeypatch.setattr(norm_cpu, "numba", None)
    for result, torchs, value in zip(compiled, run(torch.float32), exact, strict=True):
        assert result.shape == value.shape
        assert (result - value).abs().max() <= 2 * (torchs - value).abs().max() + 1e-6


def test_compiled_sums_stay_precise_over_many_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 2, 128, 128) + 100
    out = norm_cpu.normalize(x, None, None, None, None, 3, 0.1, 1e-5)
    parts = x.double().view(3, 4, 2, -1)
    var, mean = torch.var_mean(parts, dim=(1, 3), keepdim=True, correction=0)
    expected = ((parts - mean) / (var + 1e-5).sqrt()).view(x.shape)
    assert (out.double() - expected).abs().max() < 1e-4


def test_compiled_parts_are_used_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(norm_cpu, "normalize", lambda x, *rest: called.append(x.shape) or x)
    layer = SplitBatchNorm(4, 4)
    layer(torch.randn(8, 4, 2, 2))
    assert called == [(8, 4, 2, 2)]
    for x in (torch.randn(8, 4, 2, 2).double(), torch.randn(8, 4, 2, 2).bfloat16(), torch.randn(4, 4, 2, 2)):
        SplitBatchNorm(4, 4).to(torch.float64 if x.dtype == torch.float64 else torch.float32)(x)
    assert len(called) == 1
    layer.weight.data = layer.weight.data.bfloat16()
    assert not norm_cpu.available(torch.randn(8, 4, 2, 2), layer.weight)  # its memory would be read as float32
    layer.weight.data = layer.weight.data.float()
    monkeypatch.setattr(norm_cpu, "numba", None)
    assert layer(torch.randn(8, 4, 2, 2)).shape == (8, 4, 2, 2)
    assert len(called) == 1


def test_compiled_part_with_one_value_a_channel_is_refused_as_by_torch() -> None:
    layer = BatchNorm(5)
    layer.views = 3
    assert norm_cpu.available(torch.randn(3, 5))
    with pytest.raises(ValueError, match="more than one value"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match="more than 1 value"):
        layer.double()(torch.randn(3, 5).double())

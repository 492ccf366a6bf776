"""Many tensors in one buffer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods.flat import Buffers, check_views, flatten


def test_flatten_preserves_values_shapes_and_strides() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = copy.deepcopy(net)
    flat = flatten(net.parameters())
    for ours, theirs in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert ours.data_ptr() % 64 == 0
        assert ours.untyped_storage().data_ptr() == flat.data_ptr()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(images), before(images))
    flat.mul_(2)
    assert all(torch.equal(a, 2 * b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    assert flat.abs().sum() == pytest.approx(
        sum(2 * float(p.detach().abs().sum()) for p in before.parameters()), rel=1e-5
    )


def test_flat_parameters_train_and_load() -> None:
    net = nn.Linear(3, 2)
    flat = flatten(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    assert torch.equal(flat[:6], net.weight.detach().flatten())
    net.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert flat.sum() == 8


def test_flatten_accepts_nothing_and_rejects_several_dtypes() -> None:
    assert flatten([]).numel() == 0
    with pytest.raises(ValueError, match="several dtypes"):
        flatten([torch.zeros(2), torch.zeros(2, dtype=torch.int64)])


def test_flatten_rejects_tensors_with_gaps() -> None:
    for tensor in (torch.zeros(4, 4)[:, :2], torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="has gaps"):
            flatten([tensor])
    flatten([torch.zeros(2, 0), torch.zeros(()), torch.zeros(3, 2, 4, 4).to(memory_format=torch.channels_last)])


@pytest.mark.parametrize("moved", ["cast", "assigned", "flattened again", None])
def test_check_views_detects_new_memory(moved: str | None) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    flat = flatten(net.parameters())
    if moved == "cast":
        net[1].double()
    elif moved == "assigned":
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    elif moved == "flattened again":
        flatten(net[1].parameters())
    else:
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    if moved is None:
        check_views(net.parameters(), flat)
        return
    with pytest.raises(RuntimeError, match=r"[24] tensors have left their common buffer"):
        check_views(net.parameters(), flat)


def test_buffers_are_restored_unless_the_condition_is_true() -> None:
    net = nn.BatchNorm1d(3)
    buffers = Buffers(net, nn.Linear(2, 2))
    snapshot, before = buffers.snapshot(), copy.deepcopy(net.state_dict())
    net(torch.full((4, 3), torch.nan))
    moved = copy.deepcopy(net.state_dict())
    buffers.restore_unless(torch.tensor(True), snapshot)
    assert net.running_mean is not None
    assert net.running_mean.isnan().all()
    assert net.num_batches_tracked == moved["num_batches_tracked"] == 1
    buffers.restore_unless(torch.tensor(False), snapshot)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(torch.ones(4, 3))
    buffers.restore(snapshot)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

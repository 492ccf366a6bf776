"""Times of kernels come from the device's events alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from benchmarks.common import kernels

CPU, CUDA = DeviceType.CPU, DeviceType.CUDA


class Profile:
    """Stands in for the profiler of a GPU on which two calls were recorded."""

    def __init__(self, activities: list[Any]) -> None:
        recorded = [("one", 3, CUDA), ("two", 9, CUDA), ("one", 4, CUDA), ("aten::op", 20, CPU)]
        events = [
            FunctionEvent(
                i,
                name,
                0,
                100 * i,
                100 * i + microseconds,
                use_device="cuda",
                device_type=device,
                stack=[],
            )
            for i, (name, microseconds, device) in enumerate(recorded)
        ]
        events[-1].append_kernel("one", 0, 3)  # which has an event of its own, too
        self.events = EventList(events, use_device="cuda")
        self.events._build_tree()

    def __enter__(self) -> EventList:
        return self.events

    def __exit__(self, *_: object) -> None:
        pass


def test_times_of_kernels_are_means_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    times = kernels.kernel_times(lambda: None, torch.device("cuda"), runs=2)
    assert list(times) == ["two", "one"]
    assert times["one"] == {"milliseconds": 0.0035, "calls": 1.0}
    assert times["two"] == {"milliseconds": 0.0045, "calls": 0.5}

"""Times of single kernels, by torch's profiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def kernel_times(call: Callable[[], Any], device: torch.device, runs: int) -> dict[str, dict[str, float]]:
    """Return milliseconds and number of calls of each kernel in one call, the longest first; on a CPU of operations.

    The mean of `runs` calls, after one that is not counted.
    """
    on_gpu = device.type == "cuda"
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    return {
        event.key: {"milliseconds": microseconds(event) / runs / 1000, "calls": event.count / runs}
        for event in sorted(events, key=microseconds, reverse=True)
        if microseconds(event) > 0
    }

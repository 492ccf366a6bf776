"""The cores and the memory that this process may use."""

import os
from pathlib import Path


def control_group(name: str) -> list[str]:
    """Return the fields of a control group's file, such as cpu.max or memory.max; [] where there is none."""
    try:
        return Path("/sys/fs/cgroup", name).read_text().split()
    except OSError:
        return []


def available_cores() -> int:
    """Return the number of cores this process may use, by its affinity and the container's limit."""
    cores = len(os.sched_getaffinity(0))
    limit = control_group("cpu.max")
    if len(limit) == 2 and limit[0].isdigit():
        cores = min(cores, max(1, int(limit[0]) // int(limit[1])))
    return cores


def free_memory() -> int | None:
    """Return the bytes of free memory, within the container's limit; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit, used = control_group("memory.max"), control_group("memory.current")
    if limit and used and limit[0].isdigit():
        cached = dict(zip(*[iter(control_group("memory.stat"))] * 2, strict=False)).get("inactive_file", "0")
        free.append(max(0, int(limit[0]) - int(used[0]) + int(cached)))
    return min(free, default=None)

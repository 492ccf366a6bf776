"""What this machine lacks for training: `python -m pipeline.doctor [BETON]`.

Every check looks at one thing and returns a `Finding`. Libraries are imported only inside the check that is
about them, so a missing one is reported instead of ending the program.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pipeline.system.cores import available_cores, free_memory
from pipeline.system.packages import installed as _installed

GIB = 2**30
MIN_CORES_PER_GPU = 6
"""Cores that decode and augment fast enough for one GPU."""
MIN_SHM = 1 * GIB
MIN_OPEN_FILES = 4096

_SETUP = "run ./millrace setup (where that changes nothing, delete .venv first)"
_HEADERS = "apt-get install libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config g++ python3-dev"
_CUDA_PATTERN = re.compile(r"CUDA (?:\w+ )?Version\s*:\s*(\d+)\.(\d+)")
_OTHER_PACKAGES = {
    "accelerate": "accelerate",
    "jinja2": "jinja2",
    "markdown": "markdown",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "pillow": "PIL",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "PyYAML": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "setuptools": "setuptools",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
    "typing-extensions": "typing_extensions",
}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    """Of the thing looked at."""
    ok: bool | None
    """True if it is in order, False if it is broken; None is a warning where there is a remedy, else information."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty if nothing is to be done."""

    @property
    def state(self) -> str:
        """The finding in one word: ok, BROKEN, warning or info."""
        if self.ok is None:
            return "warning" if self.remedy else "info"
        return "ok" if self.ok else "BROKEN"


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory: int
    """Bytes; 0 where they are not known."""


# Probes: each asks the machine one thing. The checks below judge the answers.


def _output(*command: str) -> str | None:
    """The output of a command, or None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _load(name: str) -> ModuleType:
    return importlib.import_module(name)


def _version(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "") or "version unknown")


def _reason(error: BaseException) -> str:
    """The first line of an error's text."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _missing_headers() -> list[str]:
    """What a compilation of FFCV, and of jpeg.c, would not find."""
    missing = [
        name for name in ("opencv4", "libturbojpeg", "libjpeg") if _output("pkg-config", "--exists", name) is None
    ]
    if shutil.which("pkg-config") is None:
        missing = ["pkg-config"]
    if shutil.which("g++") is None:
        missing.append("g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h")
    return missing


def _gpus() -> list[Gpu]:
    """The machine's GPUs as the driver names them, or as PyTorch does where there is no nvidia-smi."""
    listing = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    if listing is None:
        return _torch_gpus()
    rows = [line.rsplit(",", 1) for line in listing.splitlines() if "," in line]
    return [Gpu(name.strip(), _mebibytes(memory)) for name, memory in rows]


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.strip().isdigit() else 0


def _torch_gpus() -> list[Gpu]:
    try:
        cuda = _load("torch").cuda
        devices = [cuda.get_device_properties(place) for place in range(cuda.device_count())]
    except Exception:
        return []
    return [Gpu(device.name, device.total_memory) for device in devices]


def _driver_tool() -> bool:
    return shutil.which("nvidia-smi") is not None


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver runs, or None if it does not say."""
    found = _CUDA_PATTERN.search(_output("nvidia-smi") or "")
    return (int(found[1]), int(found[2])) if found else None


def _shm_size() -> int | None:
    """Bytes that /dev/shm holds when empty, or None if there is none."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def _open_files() -> int | None:
    """How many files one process may open, or None for no limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


# Checks


def check_headers() -> Finding:
    """The compiler and the headers that FFCV is built with; once it is built they may be missing."""
    name = "compiler and headers"
    missing = _missing_headers()
    if not missing:
        return Finding(name, True, "g++, Python, OpenCV and libjpeg-turbo found")
    needed = False if not _installed("ffcv") else None
    return Finding(name, needed, f"missing: {', '.join(missing)}; FFCV is built with them", _HEADERS)


def check_torch() -> Finding:
    """PyTorch can be imported."""
    try:
        torch = _load("torch")
    except Exception as error:
        return Finding("torch", False, _reason(error), _SETUP)
    return Finding("torch", True, _version(torch))


def check_ffcv() -> Finding:
    """FFCV can be imported, and its C library loads and has the functions that are called."""
    try:
        _load("ffcv")
        library = ctypes.CDLL(str(_load("ffcv._libffcv").__file__))
        _ = (library.resize, library.imdecode)
    except ModuleNotFoundError as error:
        return Finding("ffcv", False, _reason(error), _SETUP)
    except Exception as error:
        remedy = f"build it anew on this machine: {_HEADERS}; rm -rf .venv; ./millrace setup"
        return Finding("ffcv", False, _reason(error), remedy)
    return Finding("ffcv", True, "imported, C library loaded")


def check_jpeg() -> Finding:
    """The function that decodes a part of a JPEG was built."""
    try:
        _load("pipeline.native._jpeg")
    except Exception as error:
        remedy = f"build it on this machine: {_HEADERS}; rm -rf .venv; ./millrace setup"
        return Finding("JPEG decoder", None, f"{_reason(error)}; FFCV's is used: slower, and less exact", remedy)
    return Finding("JPEG decoder", True, "decodes what the crops show, as Pillow does")


def check_dali() -> Finding:
    """NVIDIA DALI can be imported."""
    try:
        dali = _load("nvidia.dali")
    except Exception as error:
        return Finding("nvidia.dali", False, _reason(error), _SETUP)
    return Finding("nvidia.dali", True, _version(dali))


def check_numba() -> Finding:
    """numba can be imported and may use every core, as FFCV's own loader does."""
    try:
        threads = int(_load("numba").config.NUMBA_NUM_THREADS)
    except Exception as error:
        return Finding("numba", False, _reason(error), _SETUP)
    cores = available_cores()
    if threads < cores:
        detail = f"{threads} threads on {cores} cores: FFCV's own loader gets no more than {threads}"
        return Finding("numba", None, detail, "unset NUMBA_NUM_THREADS")
    return Finding("numba", True, f"{threads} threads")


def check_packages() -> Finding:
    """The other packages that the project imports are installed."""
    missing = [name for name, module in _OTHER_PACKAGES.items() if not _installed(module)]
    if missing:
        return Finding("other packages", False, f"missing: {', '.join(missing)}", _SETUP)
    return Finding("other packages", True, f"{len(_OTHER_PACKAGES)} installed")


def check_gpus(gpus: Sequence[Gpu]) -> Finding:
    """The GPUs by name and memory; none is no fault, unless the driver's tool is there and finds none."""
    if not gpus and _driver_tool():
        return Finding("GPUs", None, "nvidia-smi is installed but lists no GPU", "run nvidia-smi: it says why")
    if not gpus:
        return Finding("GPUs", None, "none found: training runs on the CPU")
    kinds = [f"{gpu.name} ({gpu.memory / GIB:.0f} GiB)" if gpu.memory else gpu.name for gpu in gpus]
    counts = [f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)]
    return Finding("GPUs", True, ", ".join(counts))


def check_cuda(gpus: Sequence[Gpu]) -> Finding:
    """The driver runs the CUDA version that PyTorch was built with, and PyTorch finds a GPU."""
    try:
        torch = _load("torch")
    except Exception as error:
        return Finding("CUDA", None, f"not known without torch ({_reason(error)})")
    build = torch.version.cuda
    if not gpus:
        return Finding("CUDA", None, f"no GPU; torch is built for {f'CUDA {build}' if build else 'CPUs only'}")
    if build is None:
        remedy = "point pip at an index that has the CUDA build of torch; rm -rf .venv; ./millrace setup"
        return Finding("CUDA", False, f"torch {_version(torch)} is built for CPUs only", remedy)
    return _judge_driver(build, _driver_cuda(), torch.cuda.is_available())


def _judge_driver(build: str, driver: tuple[int, int] | None, available: bool) -> Finding:
    known = f"CUDA {driver[0]}.{driver[1]}" if driver else "no CUDA version given"
    detail = f"torch is built for CUDA {build}; driver: {known}"
    needed = int(build.split(".")[0])
    if driver and driver[0] < needed:
        return Finding("CUDA", False, detail, f"install an NVIDIA driver that runs CUDA {needed} or later")
    if not available:
        remedy = "see that `nvidia-smi` works and CUDA_VISIBLE_DEVICES is unset or right"
        return Finding("CUDA", False, f"{detail}; torch finds no usable GPU", remedy)
    return Finding("CUDA", True, detail)


def check_cores(gpus: Sequence[Gpu]) -> Finding:
    """Enough cores for the GPUs: images are decoded and augmented on the CPU."""
    cores = available_cores()
    if not gpus:
        return Finding("cores", True, str(cores))
    detail = f"{cores} for {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}"
    if cores < MIN_CORES_PER_GPU * len(gpus):
        remedy = f"give the job {MIN_CORES_PER_GPU} or more cores a GPU; with fewer the GPU waits for data"
        return Finding("cores", None, detail, remedy)
    return Finding("cores", True, detail)


def check_memory(beton: Path | None) -> Finding:
    """The data set fits into the page cache."""
    free = free_memory()
    if free is None:
        return Finding("memory", None, "free memory is not known on this system")
    if beton is None:
        return Finding("memory", True, f"{_gib(free)} free for the page cache")
    size = beton.stat().st_size
    detail = f"{beton.name} has {_gib(size)}, {_gib(free)} free for the page cache"
    if size > free:
        remedy = "every epoch reads the disk: use a fast local one, smaller images or a machine with more memory"
        return Finding("memory", None, detail, remedy)
    return Finding("memory", True, detail)


def check_beton(beton: Path) -> Finding:
    """The data set can be opened: its header, its tables, its manifest."""
    try:
        count = len(_load("pipeline.beton").Beton(beton))
    except Exception as error:
        return Finding(
            "data set", False, str(error), f"python -m pipeline.inspect {beton} --verify lists what is wrong"
        )
    return Finding("data set", True, f"{beton.name}: {count} images; its records were not looked at")


def check_shm() -> Finding:
    """Shared memory, through which NCCL's processes exchange on one machine, is not tiny."""
    size = _shm_size()
    if size is None:
        return Finding("/dev/shm", None, "none on this system")
    if size < MIN_SHM:
        remedy = "start the container with --shm-size=8g, or: mount -o remount,size=8g /dev/shm"
        return Finding("/dev/shm", None, _gib(size), remedy)
    return Finding("/dev/shm", True, _gib(size))


def check_open_files() -> Finding:
    """One process may open enough files."""
    limit = _open_files()
    if limit is not None and limit < MIN_OPEN_FILES:
        return Finding("open files", None, f"at most {limit} a process", "ulimit -n 65536")
    return Finding("open files", True, "no limit" if limit is None else f"at most {limit} a process")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def examine(beton: Path | None = None) -> list[Finding]:
    """Make every check, on `beton` too where one is given."""
    gpus = _gpus()
    return [
        check_headers(),
        check_torch(),
        check_ffcv(),
        check_jpeg(),
        check_dali(),
        check_numba(),
        check_packages(),
        check_gpus(gpus),
        check_cuda(gpus),
        check_cores(gpus),
        *([check_beton(beton)] if beton else []),
        check_memory(beton),
        check_shm(),
        check_open_files(),
    ]


# The report


def _show(findings: Sequence[Finding]) -> None:
    """Print the findings as a table, or as plain lines where rich is missing."""
    try:
        _show_table(findings)
    except ImportError:
        for finding in findings:
            print(f"{finding.state:8} {finding.name}: {finding.detail}")
            if finding.remedy:
                print(f"{'':8} remedy: {finding.remedy}")


def _show_table(findings: Sequence[Finding]) -> None:
    _load("rich")
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "BROKEN": "bold red", "warning": "yellow", "info": "cyan"}
    table = Table("check", "state", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("finding", overflow="fold")
    for finding in findings:
        text = Text(finding.detail)
        if finding.remedy:
            text.append(f"\nremedy: {finding.remedy}", style="italic")
        table.add_row(Text(finding.name), Text(finding.state, style=colors[finding.state]), text)
    Console().print(table)


def _summary(findings: Sequence[Finding]) -> str:
    states = [finding.state for finding in findings]
    broken, warnings = states.count("BROKEN"), states.count("warning")
    return f"{broken or 'nothing'} broken, {warnings or 'no'} warning{'' if warnings == 1 else 's'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the machine lacks; return the exit status: 0 if nothing is broken, 1 if something is, 2 for no data.

    arguments: the command line without the program's name; None for the process's own.
    """
    parser = argparse.ArgumentParser(prog="millrace doctor", description="Say what this machine lacks.")
    parser.add_argument("beton", nargs="?", type=Path, metavar="BETON", help="data set to compare with the memory")
    beton: Path | None = parser.parse_args(arguments).beton
    if beton is not None and not beton.is_file():
        print(f"millrace doctor: no data set {beton}: name an existing .beton file", file=sys.stderr)
        return 2
    findings = examine(beton)
    _show(findings)
    print(_summary(findings))
    return 1 if any(finding.ok is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())

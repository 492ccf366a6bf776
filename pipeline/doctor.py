"""Report what this machine lacks for training: `python -m pipeline.doctor [BETON]`.

Each check returns one `Finding`. A library is imported only inside its own check, so that a missing one is reported and
does not end the program; this module itself needs no package.
"""

import ctypes
import importlib
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

from pipeline.system.cli import ArgumentParser
from pipeline.system.cores import available_cores, free_memory
from pipeline.system.driver import driver_version, explain_missing_cuda, has_gpu
from pipeline.system.errors import InputError, command
from pipeline.system.packages import version as _package_version
from pipeline.system.text import binary

GIB = 2**30
MIN_CORES_PER_GPU = 6
"""Cores that decode and augment fast enough for one GPU."""
MIN_SHM_BYTES = 1 * GIB
MIN_OPEN_FILES = 4096

_MARKS = ("millrace.stamp", "millrace.unfinished", "millrace.environment")  # of an environment of the launcher's
_OWN = any(Path(sys.prefix, mark).exists() for mark in _MARKS)
_SETUP = f"run ./millrace {'setup (if that changes nothing, delete .venv first)' if _OWN else '--system setup'}"
_APT_INSTALL = "apt-get install libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config g++ python3-dev"
_AFRESH = "rm -rf .venv; ./millrace setup" if _OWN else "rm -rf .system; ./millrace --system setup"
_BUILD_AGAIN = f"build it on this machine: {_APT_INSTALL}; {_AFRESH}"
_PILLOW_COST = "1.3 times the CPU time a pair"  # decoded, cropped and augmented at 224 pixels
_TERMINAL_COLORS = {"ok": 32, "BROKEN": 31, "warning": 33, "info": 36}  # green, red, yellow, cyan


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool | None
    """True: in order; False: broken; None: a warning if there is a remedy, else information."""
    detail: str
    remedy: str = ""
    """Empty if there is nothing to do."""

    @property
    def state(self) -> str:
        """ok, BROKEN, warning or info."""
        if self.ok is None:
            return "warning" if self.remedy else "info"
        return "ok" if self.ok else "BROKEN"


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory: int
    """Bytes; 0 if unknown."""


# ---- probes: each asks the machine one thing ----


def _output(*command: str) -> str | None:
    """Return the output of a command, or None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _load(name: str) -> ModuleType:
    return importlib.import_module(name)


def _version(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "") or "version unknown")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _dependencies() -> list[str] | None:
    """Return the packages that the project needs, without its extras; None where it is not installed."""
    try:
        requirements = metadata.requires("millrace") or []
    except metadata.PackageNotFoundError:
        return None
    return [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]


def _missing_headers() -> list[str]:
    """Return the missing tools and headers for compiling FFCV and jpeg.c."""
    libraries = ("opencv4", "libturbojpeg", "libjpeg")
    missing = [name for name in libraries if _output("pkg-config", "--exists", name) is None]
    if shutil.which("pkg-config") is None:
        missing = ["pkg-config"]
    if shutil.which("g++") is None:
        missing.append("g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h")
    return missing


def _gpus() -> list[Gpu]:
    """Return the GPUs that the driver lists, or PyTorch where there is no nvidia-smi."""
    listing = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    if listing is not None:
        rows = [line.rsplit(",", 1) for line in listing.splitlines() if "," in line]
        return [Gpu(name.strip(), int(mib) * 2**20 if mib.strip().isdigit() else 0) for name, mib in rows]
    try:
        cuda = _load("torch").cuda
        devices = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    except Exception:
        return []
    return [Gpu(device.name, device.total_memory) for device in devices]


# ---- checks: each judges the answers of the probes ----


def _judge(name: str, in_order: bool, detail: str, remedy: str) -> Finding:
    """Return a finding that is ok if `in_order`, else a warning with the remedy."""
    return Finding(name, True, detail) if in_order else Finding(name, None, detail, remedy)


def check_headers() -> Finding:
    """Check compiler and headers for building FFCV and jpeg.c, without which training is slower."""
    missing = _missing_headers()
    in_order, needed_by = "g++, Python, OpenCV and libjpeg-turbo found", "FFCV and the JPEG decoder are built with them"
    detail = f"missing: {', '.join(missing)}; {needed_by}" if missing else in_order
    return _judge("compiler and headers", not missing, detail, _APT_INSTALL)


def check_import(name: str) -> Finding:
    """Check that a module can be imported."""
    try:
        return Finding(name, True, _version(_load(name)))
    except Exception as error:
        return Finding(name, False, _first_line(error), _SETUP)


def check_ffcv() -> Finding:
    """Check optional FFCV: it can be imported, and its C library loads and has the functions used here."""
    try:
        _load("ffcv")
        library = ctypes.CDLL(str(_load("ffcv._libffcv").__file__))
        _ = (library.resize, library.imdecode)
    except Exception as error:
        instead = f"the JPEG decoder of the next line is as fast, Pillow's takes {_PILLOW_COST}"
        detail = f"{_first_line(error)}; optional: {instead}"
        remedy = _SETUP if isinstance(error, ModuleNotFoundError) else _BUILD_AGAIN
        return Finding("ffcv", None, detail, remedy)
    return Finding("ffcv", True, "imported, C library loaded")


def check_jpeg() -> Finding:
    """Check that jpeg.c, which decodes a part of a JPEG, was built."""
    try:
        _load("pipeline.native._jpeg")
    except Exception as error:
        instead = f"FFCV's is as fast and a little less exact, Pillow's takes {_PILLOW_COST}"
        detail = f"{_first_line(error)}; {instead}"
        return Finding("JPEG decoder", None, detail, _BUILD_AGAIN)
    return Finding("JPEG decoder", True, "decodes the cropped part only, with Pillow's pixels")


def check_dali() -> Finding:
    """Check DALI, which is optional."""
    finding = check_import("nvidia.dali")
    if finding.ok:
        return finding
    lost = "without it nothing decodes on the GPU or reads images outside one file (data.backend dali)"
    return replace(finding, ok=None, detail=f"{finding.detail}; {lost}")


def check_numba() -> Finding:
    """Check that numba can be imported and may use every core, as FFCV's own loader does."""
    try:
        threads = int(_load("numba").config.NUMBA_NUM_THREADS)
    except Exception as error:
        return Finding("numba", False, _first_line(error), _SETUP)
    cores, detail = available_cores(), f"{threads} threads"
    if threads < cores:
        detail += f" on {cores} cores: FFCV's own loader gets no more than {threads}"
    return _judge("numba", threads >= cores, detail, "unset NUMBA_NUM_THREADS")


def check_packages() -> Finding:
    """Check that the project's dependencies are installed; optional FFCV and DALI have checks of their own."""
    dependencies = _dependencies()
    if dependencies is None:
        return Finding("packages", False, "millrace is not installed in this environment", _SETUP)
    missing = [name for name in dependencies if _package_version(name) is None]
    if missing:
        return Finding("packages", False, f"missing: {', '.join(missing)}", _SETUP)
    return Finding("packages", True, f"{len(dependencies)} installed")


def check_gpus(gpus: Sequence[Gpu]) -> Finding:
    """List the GPUs. None is information, but a warning where nvidia-smi is installed."""
    if not gpus and shutil.which("nvidia-smi"):
        return Finding("GPUs", None, "nvidia-smi is installed but lists no GPU", "run nvidia-smi: it says why")
    if not gpus:
        return Finding("GPUs", None, "none found: training runs on the CPU")
    kinds = [f"{gpu.name} ({gpu.memory / GIB:.0f} GiB)" if gpu.memory else gpu.name for gpu in gpus]
    return Finding("GPUs", True, ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)))


def check_cuda(gpus: Sequence[Gpu]) -> Finding:
    """Check that PyTorch finds a GPU; if there is one and it does not, explain why."""
    try:
        torch = _load("torch")
    except Exception as error:
        return Finding("CUDA", None, f"unknown without torch ({_first_line(error)})")
    build = torch.version.cuda
    built = f"torch is built for {f'CUDA {build}' if build else 'CPUs only'}"
    if torch.cuda.is_available():
        return Finding("CUDA", True, f"{built}; NVIDIA driver {driver_version() or 'of unknown version'}")
    if not gpus and not has_gpu():
        return Finding("CUDA", None, f"no GPU; {built}")
    return Finding("CUDA", False, *explain_missing_cuda(_version(torch), build))


def check_cores(gpus: Sequence[Gpu]) -> Finding:
    """Check that there are enough cores to decode for the GPUs."""
    cores = available_cores()
    detail = f"{cores} for {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else str(cores)
    remedy = f"give the job {MIN_CORES_PER_GPU} or more cores for each GPU; with fewer the GPU waits for data"
    return _judge("cores", cores >= MIN_CORES_PER_GPU * len(gpus), detail, remedy)


def check_memory(beton: Path | None) -> Finding:
    """Check that the data set fits into the page cache."""
    free = free_memory()
    if free is None:
        return Finding("memory", None, "free memory is unknown on this system")
    detail = f"{binary(free)} free for the page cache"
    if beton is None:
        return Finding("memory", True, detail)
    size = beton.stat().st_size
    remedy = "every epoch reads the disk: use a fast local one, smaller images or a machine with more memory"
    return _judge("memory", size <= free, f"{beton.name} has {binary(size)}, {detail}", remedy)


def check_beton(beton: Path) -> Finding:
    """Check header, tables and manifest of the data set."""
    try:
        count = len(_load("pipeline.beton").Beton(beton))
    except Exception as error:
        remedy = f"list the damage with python -m pipeline.inspect {beton} --verify"
        return Finding("data set", False, str(error), remedy)
    return Finding("data set", True, f"{beton.name}: {count} images; the records were not checked")


def check_shm() -> Finding:
    """Check that shared memory, which NCCL uses within a machine, is not tiny."""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("/dev/shm", None, "none on this system")
    remedy = "start the container with --shm-size=8g, or: mount -o remount,size=8g /dev/shm"
    return _judge("/dev/shm", size >= MIN_SHM_BYTES, binary(size), remedy)


def check_open_files() -> Finding:
    """Check that a process may open enough files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", True, "no limit")
    return _judge("open files", limit >= MIN_OPEN_FILES, f"at most {limit} for each process", "ulimit -n 65536")


def examine(beton: Path | None = None) -> list[Finding]:
    """Make every check, with a data set those of it too."""
    gpus = _gpus()
    return [
        check_headers(),
        check_import("torch"),
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


def show(findings: Sequence[Finding]) -> None:
    """Print the findings, in color on a terminal, and how many are broken or warnings."""
    for finding in findings:
        state = f"{finding.state:8}"
        if sys.stdout.isatty():
            state = f"\033[{_TERMINAL_COLORS[finding.state]}m{state}\033[0m"
        print(f"{state} {finding.name}: {finding.detail}")
        if finding.remedy:
            print(f"{'':8} remedy: {finding.remedy}")
    states = [finding.state for finding in findings]
    broken, warnings = states.count("BROKEN"), states.count("warning")
    print(f"{broken or 'nothing'} broken, {warnings or 'no'} warning{'' if warnings == 1 else 's'}")


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="millrace doctor", description="Report what this machine lacks.")
    parser.add_argument("beton", nargs="?", type=Path, metavar="BETON", help="data set to check")
    return parser


@command
def main() -> int:
    beton: Path | None = parser().parse_args().beton
    if beton is not None and not beton.is_file():
        raise InputError(f"{beton}: no such file: name an existing .beton file")
    findings = examine(beton)
    show(findings)
    return int(any(finding.ok is False for finding in findings))


if __name__ == "__main__":
    main()

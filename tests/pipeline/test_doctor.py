"""Tests of the doctor: each check on a faked machine, and the command's exit status."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import GIB, Finding, Gpu
from tests import ROOT

H200 = Gpu("NVIDIA H200", 141 * GIB)


def answer(monkeypatch: pytest.MonkeyPatch, **probes: Any) -> None:
    """Give probes fixed answers."""
    shared = {"cores": "available_cores", "free_memory": "free_memory"}
    for name, value in probes.items():
        monkeypatch.setattr(doctor, shared.get(name, f"_{name}"), lambda *_, value=value: value)


def offer(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Let only these modules be imported; one that is an exception is raised."""

    def load(name: str) -> Any:
        module = modules.get(name, ModuleNotFoundError(f"No module named {name!r}"))
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(doctor, "_load", load)


def fake_torch(cuda: str | None, available: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: available),
    )


# ---- the checks ----


@pytest.mark.parametrize(("missing", "state"), [([], "ok"), (["g++", "opencv4"], "warning")])
def test_headers(monkeypatch: pytest.MonkeyPatch, missing: list[str], state: str) -> None:
    answer(monkeypatch, missing_headers=missing)
    finding = doctor.check_headers()
    assert finding.state == state
    assert all(name in finding.detail for name in missing)
    assert ("apt-get install" in finding.remedy) == bool(missing)


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = {"pkg-config": "/bin/pkg-config", "g++": None}
    monkeypatch.setattr(doctor.shutil, "which", tools.get)
    monkeypatch.setattr(doctor, "_output", lambda *command: "" if command[-1] == "opencv4" else None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    assert doctor._missing_headers() == ["libturbojpeg", "libjpeg", "g++", "Python.h"]
    (tmp_path / "Python.h").touch()
    tools["pkg-config"] = None
    assert doctor._missing_headers() == ["pkg-config", "g++"]


@pytest.mark.parametrize(
    ("module", "check", "state"),
    [("torch", lambda: doctor.check_import("torch"), "BROKEN"), ("nvidia.dali", doctor.check_dali, "warning")],
)
def test_import(monkeypatch: pytest.MonkeyPatch, module: str, check: Callable[[], Finding], state: str) -> None:
    """DALI is optional."""
    offer(monkeypatch, **{module: SimpleNamespace(__version__="7.8.9")})
    assert check() == Finding(module, True, "7.8.9")
    offer(monkeypatch, **{module: OSError("libcuda.so.1: cannot open\nmore lines")})
    finding = check()
    assert finding.state == state
    assert finding.detail.partition(";")[0] == "OSError: libcuda.so.1: cannot open"
    assert ("data.backend dali" in finding.detail) == (module == "nvidia.dali")
    assert "./millrace setup" in finding.remedy


def test_ffcv_and_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, **{"ffcv": ModuleType("ffcv"), "ffcv._libffcv": SimpleNamespace(__file__="/x/lib.so")})
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda path: SimpleNamespace(resize=1, imdecode=path))
    assert doctor.check_ffcv().ok is True
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda _: SimpleNamespace(resize=1))
    finding = doctor.check_ffcv()
    assert finding.state == "warning"
    assert "imdecode" in finding.detail
    assert "libopencv-dev" in finding.remedy


def test_a_missing_jpeg_decoder_is_a_warning_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, **{"pipeline.native._jpeg": ModuleType("_jpeg")})
    assert doctor.check_jpeg().state == "ok"
    offer(monkeypatch)
    finding = doctor.check_jpeg()
    assert finding.state == "warning"
    assert "libjpeg-dev" in finding.remedy


def test_missing_ffcv_has_another_remedy_than_unloadable_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    missing = doctor.check_ffcv()
    offer(monkeypatch, ffcv=ImportError("libopencv_imgproc.so.406: cannot open shared object file"))
    unloadable = doctor.check_ffcv()
    assert missing.state == unloadable.state == "warning"
    assert "Pillow's takes 1.3 times the CPU time" in missing.detail
    assert missing.remedy.startswith("run ./millrace setup")
    assert "rm -rf .venv" in unloadable.remedy
    assert "libopencv_imgproc" in unloadable.detail


@pytest.mark.parametrize(("threads", "state"), [(8, "ok"), (16, "ok"), (7, "warning")])
def test_numba(monkeypatch: pytest.MonkeyPatch, threads: int, state: str) -> None:
    answer(monkeypatch, cores=8)
    offer(monkeypatch, numba=SimpleNamespace(config=SimpleNamespace(NUMBA_NUM_THREADS=threads)))
    finding = doctor.check_numba()
    assert finding.state == state
    assert str(threads) in finding.detail


def test_numba_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    assert doctor.check_numba().ok is False


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, package_version="1.0", dependencies=["numpy", "pillow", "PyYAML"])
    assert doctor.check_packages() == Finding("packages", True, "3 installed")
    monkeypatch.setattr(doctor, "_package_version", lambda name: None if name in ("pillow", "PyYAML") else "1.0")
    finding = doctor.check_packages()
    assert finding.ok is False
    assert finding.detail == "missing: pillow, PyYAML"
    answer(monkeypatch, dependencies=None)
    assert doctor.check_packages().ok is False


def test_every_dependency_is_checked() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.partition("\ndependencies = [\n")[2].partition("\n]\n")[0]
    names = set(re.findall(r'^ +"([\w-]+)', listed, re.MULTILINE))
    assert len(names) > 10
    assert names <= set(doctor._dependencies() or [])
    assert not {name for name in names if "ffcv" in name or "dali" in name}  # optional


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.check_gpus([H200, H200]) == Finding("GPUs", True, "2 × NVIDIA H200 (141 GiB)")
    assert doctor.check_gpus([Gpu("NVIDIA GB10", 0)]).detail == "1 × NVIDIA GB10"
    assert doctor.check_gpus([]).state == "info"
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: f"/bin/{tool}")
    assert doctor.check_gpus([]).state == "warning"


@pytest.mark.parametrize(("build", "state"), [("13.0", "ok"), (None, "BROKEN")])
def test_cuda_with_a_gpu(monkeypatch: pytest.MonkeyPatch, build: str | None, state: str) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: "580.65.06")
    offer(monkeypatch, torch=fake_torch(build, available=build is not None))
    finding = doctor.check_cuda([H200])
    assert finding.state == state
    expected = (
        "torch is built for CUDA 13.0; NVIDIA driver 580.65.06" if build else "torch 2.13.0 is built without CUDA"
    )
    assert finding.detail == expected


def test_silent_cuda_is_explained_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device file is enough; detail and remedy are those of a refused run."""
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    monkeypatch.setattr(doctor, "explain_missing_cuda", lambda torch, cuda: (f"{torch} for {cuda}", "mend it"))
    offer(monkeypatch, torch=fake_torch("13.0", available=False))
    assert doctor.check_cuda([]) == Finding("CUDA", False, "2.13.0 for 13.0", "mend it")


def test_cuda_is_information_without_gpu_or_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    offer(monkeypatch, torch=fake_torch("13.0", available=False))
    assert doctor.check_cuda([]) == Finding("CUDA", None, "no GPU; torch is built for CUDA 13.0")
    offer(monkeypatch)
    assert doctor.check_cuda([H200]).state == "info"


@pytest.mark.parametrize(("cores", "gpus", "state"), [(2, 0, "ok"), (12, 2, "ok"), (11, 2, "warning")])
def test_cores(monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, state: str) -> None:
    answer(monkeypatch, cores=cores)
    assert doctor.check_cores([H200] * gpus).state == state


@pytest.mark.parametrize(("free", "state"), [(4096, "ok"), (4095, "warning"), (None, "info")])
def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int | None, state: str) -> None:
    answer(monkeypatch, free_memory=free)
    beton = tmp_path / "train.beton"
    beton.write_bytes(bytes(4096))
    assert doctor.check_memory(beton).state == state


def test_memory_without_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, free_memory=3 * GIB)
    assert doctor.check_memory(None) == Finding("memory", True, "3.0 GiB free for the page cache")


@pytest.mark.parametrize(("size", "state"), [(GIB, "ok"), (GIB - 1, "warning"), (None, "info")])
def test_shm(monkeypatch: pytest.MonkeyPatch, size: int | None, state: str) -> None:
    def disk_usage(path: str) -> SimpleNamespace:
        if size is None:
            raise FileNotFoundError(path)
        return SimpleNamespace(total=size)

    monkeypatch.setattr(doctor.shutil, "disk_usage", disk_usage)
    assert doctor.check_shm().state == state


@pytest.mark.parametrize(("limit", "state"), [(4096, "ok"), (doctor.resource.RLIM_INFINITY, "ok"), (4095, "warning")])
def test_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, state: str) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (limit, limit))
    finding = doctor.check_open_files()
    assert finding.state == state
    assert ("ulimit -n 65536" in finding.remedy) == (state == "warning")


# ---- the probes ----


def test_output_of_a_failing_or_missing_command() -> None:
    assert doctor._output("true") == ""
    assert doctor._output("false") is None
    assert doctor._output("no-such-command-here") is None


def test_gpus_listed_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, output="NVIDIA A10, rev 2, 23028\nNVIDIA GB10, [N/A]\n")
    assert doctor._gpus() == [Gpu("NVIDIA A10, rev 2", 23028 * 2**20), Gpu("NVIDIA GB10", 0)]


def test_gpus_listed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, output=None)
    offer(monkeypatch)
    assert doctor._gpus() == []
    device = SimpleNamespace(name="NVIDIA L4", total_memory=5)
    cuda = SimpleNamespace(device_count=lambda: 1, get_device_properties=lambda _: device)
    offer(monkeypatch, torch=SimpleNamespace(cuda=cuda))
    assert doctor._gpus() == [Gpu("NVIDIA L4", 5)]


def test_it_runs_without_any_package() -> None:
    """Python without its site-packages: every missing package is reported."""
    command = [sys.executable, "-S", "-m", "pipeline.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "torch" in done.stdout
    assert "broken" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr


# ---- the command ----


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
    with pytest.raises(SystemExit) as exit_:
        doctor.main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize(
    ("oks", "status", "summary"),
    [
        ([True, True], 0, "nothing broken, no warnings"),
        ([True, None], 0, "nothing broken, 1 warning"),
        ([False, None, None], 1, "1 broken, 2 warnings"),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    oks: list[bool | None],
    status: int,
    summary: str,
) -> None:
    findings = [Finding(f"thing {number}", ok, "as found", "" if ok else "mend") for number, ok in enumerate(oks)]
    monkeypatch.setattr(doctor, "examine", lambda _: findings)
    assert run(monkeypatch) == status
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == summary
    assert printed.count("remedy: mend") == oks.count(False) + oks.count(None)


def test_a_missing_data_set_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(tmp_path / "none.beton")) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/none.beton: no such file: name an existing .beton file\n"


def test_every_library_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError

    offer(monkeypatch)
    answer(monkeypatch, package_version=None)
    monkeypatch.setattr(subprocess, "run", fail)
    beton = tmp_path / "train.beton"
    beton.touch()
    assert run(monkeypatch, str(beton)) == 1
    printed = capsys.readouterr().out
    assert "BROKEN   torch: ModuleNotFoundError" in printed
    assert "train.beton has 0.0 MiB" in printed


def test_states_are_in_color_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("thing", False, "pip said [test]", "do this")]
    doctor.show(findings)
    assert capsys.readouterr().out.startswith("BROKEN   thing: pip said [test]\n         remedy: do this\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    doctor.show(findings)
    assert capsys.readouterr().out.startswith("\033[31mBROKEN  \033[0m thing: ")


def test_a_beton_is_opened(drawn: Path, tmp_path: Path) -> None:
    assert doctor.check_beton(drawn).ok is True
    (tmp_path / "cut.beton").write_bytes(drawn.read_bytes()[:5000])
    finding = doctor.check_beton(tmp_path / "cut.beton")
    assert finding.ok is False
    assert "not an intact beton" in finding.detail
    assert "--verify" in finding.remedy

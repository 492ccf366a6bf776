"""Whatever cuts a save short, what was saved before can still be had."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import storage
from pipeline.system.errors import InputError
from tests.conftest import Figure
from tests.engine.checkpoint.test_storage import STATE, tensors_of, write
from tests.engine.test_run import ENVIRONMENT, RUN, SMALL, main, metrics
from tests.hostile import survived

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a child; return its exit code, -9 if it was killed."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(count: int, folder: Path, action: Callable[[], Any]) -> int:
    """Run `action` in a child that is killed before its file operation number `count` in `folder`."""

    def cut() -> None:
        left = count

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in OPERATIONS and str(folder) in str(arguments[0]):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()

    return in_child(cut)


@pytest.mark.reliability
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step"])
def test_kill_at_any_file_operation_leaves_an_intact_checkpoint(again: bool, tmp_path: Path, figure: Figure) -> None:
    cuts, status = 0, -9
    while status == -9:
        cuts += 1
        folder = tmp_path / str(cuts)
        for step in (1, 2, 3) if again else (1, 2):
            write(folder, step)
        before = bytes_of(folder / "step_00000002")
        status = killed_before(cuts, folder, lambda: write(folder, 3, keep=2))  # noqa: B023 - called at once
        assert status in (0, -9)
        storage.clear_up(folder)
        newest, broken = storage.newest(folder)
        assert broken == []
        assert newest is not None
        assert storage.step_of(newest) in ((3,) if again else (2, 3))
        storage.load(newest)
        assert bytes_of(folder / "step_00000002") == before
        assert not list(folder.glob(".*"))
        assert (status == 0) <= (newest.name == "step_00000003")
        shutil.rmtree(folder)
    kind = "a step saved again" if again else "a new step"
    figure(
        "kill after every file operation of a save", f"{kind}: an intact checkpoint at {cuts - 1} of {cuts - 1} cuts"
    )
    assert cuts > 10


@pytest.mark.reliability
@pytest.mark.parametrize("limit", [0, 1, 300, 2000])
def test_file_that_cannot_be_written_loses_nothing(
    limit: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], figure: Figure
) -> None:
    """The system refuses to let a file grow over a limit, as it does without space."""
    write(tmp_path, 1)
    notes = tmp_path.with_name("notes")

    def fail() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = storage.Writer(tmp_path, keep=1)
        large = {"model": {"w": torch.zeros(10_000)}}
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))
        writer.save(2, large, STATE)
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        notes.write_text(f"{writer.problem}, {storage.newest(tmp_path)}")
        writer.save(3, large, STATE)
        writer.wait()
        assert not writer.problem

    assert in_child(fail) == 0
    assert notes.read_text().startswith(f"{os.strerror(errno.EFBIG)}, ")
    assert notes.read_text().endswith("step_00000001'), [])")
    assert [path.name for path in tmp_path.glob("*step_*")] == ["step_00000003"]
    if limit >= 300:  # else stderr, a file here, cannot be written either
        warning = "warning: step 2: the checkpoint could not be written (File too large): training continues"
        assert warning in capfd.readouterr().err
    figure("no space, I/O error in a save", f"no file over {limit} bytes: 0 lost")


@pytest.mark.reliability
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO], ids=["no space", "I/O error"])
@pytest.mark.parametrize("at", ["write", "fsync"])
def test_run_continues_where_a_save_fails(
    at: str,
    fault: int,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figure: Figure,
) -> None:
    """The second of three checkpoints has the fault in its second file."""
    checkpoints, then = tmp_path / "checkpoints", []
    fsync, opened = os.fsync, open

    def fails(path: Any) -> bool:
        failing = str(path).endswith("step_00000004.writing/optimizer.safetensors")
        if failing:
            then.append(storage.newest(checkpoints))
            storage.load(checkpoints / "step_00000002")
        return failing

    def synced(number: int) -> None:
        if at == "fsync" and fails(os.readlink(f"/proc/self/fd/{number}")):
            raise OSError(fault, os.strerror(fault))
        fsync(number)

    def writable(path: Any, mode: str = "r") -> Any:
        file = opened(path, mode)
        if at == "write" and "w" in mode and fails(path):
            raw = os.dup(file.fileno())
            file.close()
            return Failing(raw, fault)
        return file

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(storage, "open", writable, raising=False)
    arguments = ["--data.train", str(drawn), *SMALL, "--optim.epochs", "1", "--save_every", "2", "--keep", "1"]
    assert main(monkeypatch, *arguments, "--out", str(tmp_path)) == 0
    warning = (
        f"the checkpoint could not be written ({os.strerror(fault)}): training continues; the newest is step_00000002"
    )
    assert f"warning: step 4: {warning}" in capsys.readouterr().err
    assert then == [(checkpoints / "step_00000002", [])]
    assert [path.name for path in checkpoints.glob("*step_*")] == ["step_00000005"]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    storage.load(checkpoints / "step_00000005")
    figure(
        "no space, I/O error in a save",
        f"{os.strerror(fault)} at {at}, in a run: warned of, trained to the end, 0 lost",
    )


@pytest.mark.reliability
def test_old_checkpoint_that_cannot_be_removed_leaves_the_new_one_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], figure: Figure
) -> None:
    remove = shutil.rmtree

    def stuck(path: Any, **options: Any) -> None:
        if str(path).endswith(".leaving"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        remove(path, **options)

    write(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", stuck)
    writer = storage.Writer(tmp_path, keep=1)
    writer.save(2, tensors_of(2), STATE)
    writer.finish()
    assert storage.newest(tmp_path) == (tmp_path / "step_00000002", [])
    assert (tmp_path / "latest").read_text() == "step_00000002"
    warning = "step 2: the checkpoint is written, but earlier checkpoints could not be removed (Input/output error)"
    assert warning in capsys.readouterr().err
    figure("no space, I/O error in a save", "I/O error where old ones are removed: warned of, the new one is intact")


@pytest.mark.reliability
@pytest.mark.slow
def test_run_trains_to_its_end_on_a_full_disk(drawn: Path, tmp_path: Path, figure: Figure) -> None:
    """A file system of two pages: one for the settings, one for the first metrics, none for a checkpoint or the log."""
    mount = f"mount -t tmpfs -o size=8k tmpfs {tmp_path} && exec "
    command = [sys.executable, str(RUN), "--data.train", str(drawn), *SMALL, "--optim.epochs", "8"]
    command += ["--out", str(tmp_path / "out")]
    isolated = ["unshare", "-rm", "sh", "-c", mount + shlex.join(command)]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    done = subprocess.run(isolated, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert "step 40/40" in done.stderr, done.stderr[-3000:]
    assert done.returncode == 1
    assert done.stderr.count("metrics.jsonl: could not be written (No space left on device)") == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'out' / 'checkpoints'}: the last checkpoint could"
    )
    assert "Traceback" not in done.stderr
    figure("no space, I/O error in a save", "a full disk after the first epoch: trained to the end, then an error")


class Failing(io.BufferedWriter):
    """A file that takes half of each write, and then fails."""

    def __init__(self, number: int, fault: int) -> None:
        super().__init__(io.FileIO(number, "wb"))
        self._fault = fault

    def write(self, content: Any) -> int:
        super().write(content[: len(content) // 2])
        raise OSError(self._fault, os.strerror(self._fault))


@pytest.mark.reliability
def test_missing_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], figure: Figure
) -> None:
    good = write(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    writer = storage.Writer(tmp_path, keep=1)
    writer.save(2, {"model": {"w": torch.zeros(1000)}}, STATE)
    writer.wait()
    assert "MB are needed" in writer.problem
    assert "the newest is step_00000001" in capsys.readouterr().err
    assert storage.newest(tmp_path) == (good, [])
    assert not list(tmp_path.glob(".step*"))
    figure("no space, I/O error in a save", "too little space, found before anything is written: 0 lost")


@pytest.mark.reliability
def test_every_flip_and_truncation_is_detected(tmp_path: Path, figure: Figure) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    draw, count, detected = random.Random(0), 200, 0
    for _ in range(count):
        path = draw.choice(sorted(bad.iterdir()))
        intact = path.read_bytes()
        damaged = bytearray(intact)
        if draw.random() < 0.5:
            damaged[draw.randrange(len(intact))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(intact)) :]
        path.write_bytes(damaged)
        newest, broken = storage.newest(tmp_path)
        detected += newest == good and len(broken) == 1 and "step_00000002" in broken[0]
        with pytest.raises(InputError, match="step_00000002"):
            storage.load(bad)
        path.write_bytes(intact)
    figure("200 random flips and truncations of checkpoint files", f"{detected}/{count} named, the one before used")
    assert detected == count


@pytest.mark.reliability
def test_missing_or_junk_file_is_never_loaded(tmp_path: Path, figure: Figure) -> None:
    good, other, bad = (write(tmp_path / name, step) for name, step in (("run", 1), ("other", 7), ("run", 2)))
    refused, cases = 0, 0
    for path in sorted(bad.iterdir()):
        intact = path.read_bytes()
        for junk in (None, b"", b"junk", b"{}", b"null", b"[]", intact[::-1], (other / path.name).read_bytes()):
            path.unlink()
            if junk is not None:
                path.write_bytes(junk)
            cases += 1
            with pytest.raises(InputError, match="step_00000002"):
                storage.load(bad)
            newest, broken = storage.newest(tmp_path / "run")
            refused += newest == good and len(broken) == 1
            path.write_bytes(intact)
    storage.load(bad)
    figure("each state file deleted or junk", f"{refused}/{cases} refused by name, the one before used")
    assert refused == cases


def test_checkpoint_is_written_from_a_copy_during_training(tmp_path: Path) -> None:
    writer = storage.Writer(tmp_path, keep=0)
    tensors = tensors_of(5)
    expected = {name: value.clone() for name, value in tensors["model"].items()}
    writer.save(5, tensors, STATE)
    for value in tensors["model"].values():
        value.zero_()
    writer.finish()
    loaded, _ = storage.load(tmp_path / "step_00000005")
    assert all(torch.equal(loaded["model"][name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.reliability
def test_training_waits_little_for_a_checkpoint(tmp_path: Path, figure: Figure) -> None:
    """A ResNet-50's 800 MB: training waits for the copy."""
    tensors = {"model": {str(i): torch.randn(1 << 20) for i in range(200)}}
    writer = storage.Writer(tmp_path, keep=1)
    begin = time.perf_counter()
    writer.save(1, tensors, STATE)
    waited = time.perf_counter() - begin
    writer.finish()
    total = time.perf_counter() - begin
    figure("overhead of guard and checkpointing", f"800 MB: training waits for {waited:.2f} s of {total:.2f} s")
    assert waited < 0.25 * total


def forged(folder: Path, **changes: Any) -> Path:
    """Return a checkpoint with a changed state and valid hashes."""
    path = write(folder, 1) / "state.json"
    state = json.loads(path.read_text()) | changes
    del state["sha256"]
    path.write_text(json.dumps(state | {"sha256": storage._hash_of(state)}))
    return path.parent


def nested(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(levels):
        document = {"a": document}
    return document


@pytest.mark.parametrize(
    "changes", [{"step": -1}, {"step": 2**70}, {"settings": nested(900)}, {"monitor": nested(900)}]
)
def test_state_out_of_range_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """Hashes show damage, not origin; code that followed such a nesting by recursion would crash."""
    with pytest.raises(InputError, match=r"state\.json: (step is out of range|cannot be read \(more than 20 levels\))"):
        storage.load(forged(tmp_path, **changes))


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_state_that_is_no_regular_file_is_refused_and_an_older_checkpoint_used(kind: str, tmp_path: Path) -> None:
    """Reading one would wait forever, the other would fill all memory: both have a size of 0."""
    good, bad = write(tmp_path, 1), write(tmp_path, 2) / "state.json"
    bad.unlink()
    os.mkfifo(bad) if kind == "pipe" else bad.symlink_to(kind)

    def newest(_: int) -> None:
        assert storage.newest(tmp_path)[0] == good
        storage.load(bad.parent)

    outcome = survived(newest, seconds=10)
    assert outcome.kinds == {"refused": 1}, outcome
    assert "not a regular file" in outcome.messages[0]
    assert outcome.mebibytes < 50

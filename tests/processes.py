"""Python commands and functions in processes that are forked from a server, which has imported the project already.

A process that starts this way costs some milliseconds, not the seconds that importing torch takes. It gets its own
arguments, environment, working directory, output and signal handlers, and ends like any Python process, except that
no module is torn down. The server imports modules and starts no thread. One server serves all workers of pytest-xdist
(tests/conftest.py starts it). Modules that read the environment when imported have read the server's: that of pytest.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import os
import pickle
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from tests import ROOT

_IMPORTED = ("torch", "torch.distributed", "torch._dynamo", "accelerate", "engine.run")
_ADDRESS = "MILLRACE_TEST_SERVER"
_MAX_REQUEST_BYTES = 2**17
_server: subprocess.Popen[bytes] | None = None


# ---- in the tests' process ----


class Process:
    """A process with the interface of `subprocess.Popen`, in text mode; output goes to files.

    command: `[sys.executable, SCRIPT | "-m", MODULE | "-c", CODE, *arguments]`, or a function of module level and its
        arguments.
    merge: write stderr to the same file as stdout.
    new_session: make the process the leader of a session.
    """

    def __init__(
        self,
        command: Sequence[str] | tuple[Callable[..., None], tuple[Any, ...]],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        merge: bool = False,
        new_session: bool = False,
    ) -> None:
        if not callable(command[0]) and command[0] != sys.executable:
            raise ValueError(f"{command[0]} is not the tests' Python")
        self.args, self.returncode = command, None
        self._out = tempfile.TemporaryFile("a+")  # noqa: SIM115 (read while the process writes)
        self._err = self._out if merge else tempfile.TemporaryFile("a+")  # noqa: SIM115
        environment = dict(os.environ if env is None else env)
        request = pickle.dumps((pickle.dumps(command), environment, str(cwd or os.getcwd()), new_session))
        self._connection = _connect()
        socket.send_fds(self._connection, [request], [self._out.fileno(), self._err.fileno()])
        self.pid = int(self._connection.recv(32))

    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(None if timeout is None else max(timeout, 1e-6))
            try:
                self.returncode = int(self._connection.recv(32))
            except TimeoutError:
                raise subprocess.TimeoutExpired(str(self.args), timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; return stdout and stderr."""
        self.wait(timeout)
        return _text(self._out), _text(self._err)

    def wait_for_line(self, line: str, timeout: float = 120) -> None:
        """Wait until stdout has that line; raise AssertionError if the process ends before."""
        deadline = time.monotonic() + timeout
        while f"{line}\n" not in _text(self._out):
            assert self.poll() is None, _text(self._err)
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _text(file: IO[str]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def run(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a Python command; return its exit status and output. Raises TimeoutExpired after `timeout` seconds."""
    process = Process(command, env, cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def call(function: Callable[..., None], *arguments: Any, env: Mapping[str, str] | None = None) -> Process:
    """Start `function(*arguments)`, of module level."""
    return Process((function, arguments), env)


def start_server() -> None:
    """Start the server, for this process and its children."""
    global _server
    folder = tempfile.mkdtemp(prefix="millrace-tests-")
    address = os.path.join(folder, "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        code = f"from tests import processes; processes._serve({listener.fileno()})"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        _server = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
    os.environ[_ADDRESS] = address


def stop_server() -> None:
    """End the server that this process started, and all processes forked from it."""
    global _server
    if _server is not None:
        address = Path(os.environ.pop(_ADDRESS))
        address.unlink()
        address.parent.rmdir()
        assert _server.stdin is not None
        _server.stdin.close()
        _server.wait()
        _server = None


def _connect() -> socket.socket:
    if _ADDRESS not in os.environ:
        start_server()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(os.environ[_ADDRESS])
    return connection


# ---- in the server ----


def _serve(listener_fd: int) -> NoReturn:
    """Fork a process for each request, and send its exit status, until stdin is closed."""
    path = sys.path[1:]  # without the working directory
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # collections in the forked processes leave these objects' pages shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wakes = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    listener = socket.socket(fileno=listener_fd)
    children: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for source in (0, woken, listener):
        selector.register(source, selectors.EVENT_READ)
    while True:
        for source in [key.fileobj for key, _ in selector.select()]:
            if source == 0:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            if source == woken:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
                _reap(children, selector)
            elif source is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
            else:
                assert isinstance(source, socket.socket)
                request, descriptors, *_ = socket.recv_fds(source, _MAX_REQUEST_BYTES, 2)
                if not request:  # its tests need this process no more
                    for pid in [pid for pid, client in children.items() if client is source]:
                        os.kill(pid, signal.SIGKILL)
                        del children[pid]
                    selector.unregister(source)
                    source.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    inherited = [key.fileobj for key in selector.get_map().values() if key.fileobj != 0]
                    selector.close()
                    for other in inherited:
                        os.close(other) if isinstance(other, int) else other.close()  # type: ignore[union-attr]
                    os.close(wakes)
                    _end(functools.partial(_become, request, descriptors, path))
                for descriptor in descriptors:
                    os.close(descriptor)
                children[pid] = source
                source.send(str(pid).encode())


def _reap(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Send the exit statuses of all processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if (client := children.pop(ended[0], None)) is not None:
                with contextlib.suppress(OSError):
                    client.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
                selector.unregister(client)
                client.close()


def _end(run: Callable[[], None]) -> NoReturn:
    """Run, then end this process as the interpreter does, without the second that freeing all modules takes."""
    status, interrupted = 0, False
    try:
        run()
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 255)


def _become(request: bytes, descriptors: list[int], path: list[str]) -> None:
    """Set this process up as a new interpreter is, and run the command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pickled, environment, folder, new_session = pickle.loads(request)
    if new_session:
        os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in zip([null, *descriptors], (0, 1, 2), strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None
    importlib.import_module("numba").config.reload_config()  # its variables of the environment
    search = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [str(ROOT), *search, *path]  # the first is replaced below
    command = pickle.loads(pickled)
    if callable(command[0]):
        function, arguments = command
        function(*arguments)
        return
    _, first, *arguments = command
    if first == "-m":
        sys.argv, sys.path[0] = arguments, folder
        sys.modules.pop(arguments[0], None)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[1:]], ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(arguments[0], main.__dict__)
    else:
        sys.argv, sys.path[0] = [first, *arguments], os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")

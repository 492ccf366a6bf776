"""Compiled functions kept on disk, safely: several processes may meet an empty cache at once, and one may be killed.

Numba (0.68) gives a function's compiled code a symbol by its qualified name and its number in the process that compiled
it. Two variants made by one closure, each compiled in another process, then have one symbol, and whoever loads both
runs one for the other ever after. So each function here has a name of its own. Numba also names the files of a cache by
counting those there are, without a lock, and takes what it finds under a name for what was to be there. So one process
at a time reads or writes, and names hold a hash of every source the compiled code is made of: the function's file,
the files of this package that it imports, and the C code. A stale entry is never loaded.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_PACKAGE = Path(__file__).resolve().parents[1]


def compiled(variant: str = "", **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: `numba.njit(cache=True, **options)`, with a cache that processes share safely.

    variant: to be another where the same source calls other functions, as where some C code is not there.

    It raises ValueError for a function within a function whose qualified name was not set to one of its own.
    """

    def compile_(function: Callable[..., Any]) -> Any:
        if "<locals>" in function.__qualname__:
            raise ValueError(f"{function.__qualname__}: set its __qualname__ to one that no other variant has")
        dispatcher = numba.njit(**options)(function)
        with contextlib.suppress(RuntimeError):  # nowhere to write: compiled anew each time
            dispatcher._cache = _Cache(function, variant)
        return dispatcher

    return compile_


def external(name: str, function: Any, signature: Any) -> Any:
    """Return a C function, as ctypes has it, for compiled code to call; it holds on to no GIL.

    By its name, which is to be one that nothing else has: what knows it by its address, as numba knows functions of
    ctypes, cannot be kept on disk. Addresses are passed as integers, truth values as uint32.
    """
    llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return numba.types.ExternalFunction(name, signature)


def _imported_sources(path: Path) -> set[Path]:
    """Return `path` and every file of the pipeline package that it imports, directly or not.

    Compiled code holds its callees and the constants of their modules, so it is stale once any of these files changes.
    """
    files: set[Path] = set()
    pending = [path]
    while pending:
        file = pending.pop()
        if file not in files and file.is_file():
            files.add(file)
            pending += _imports(file)
    return files


@cache
def _imports(path: Path) -> list[Path]:
    """Return where the modules of the pipeline package that `path` imports would be."""
    imported = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE.name:
            module = _PACKAGE.parent.joinpath(*str(node.module).split("."))
            imported += [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]
    return imported


@cache
def _source_hash(path: Path) -> bytes:
    """Return a hash of the sources of `path`, of the built C code, and of numba's version."""
    digest = hashlib.sha256(numba.__version__.encode())
    for file in [*sorted(_imported_sources(path)), *sorted(_PACKAGE.rglob("*.so"))]:
        digest.update(file.read_bytes())
    return digest.digest()


class _Cache(FunctionCache):
    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        super().__init__(function)
        code = _source_hash(Path(inspect.getfile(function)).resolve()) + variant.encode()
        name = f"{self._impl.filename_base}-{hashlib.sha256(code).hexdigest()[:12]}"
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = IndexDataCacheFile(cache_path=self._cache_path, filename_base=name, source_stamp=stamp)
        self._lock = Path(self._cache_path) / f".{name}.lock"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with self._alone():
            return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        with self._alone():
            super().save_overload(sig, data)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from these files meanwhile; where the lock cannot be written, nor can they."""
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

"""Compiled functions kept on disk, safely: several processes may meet an empty cache at once, and one may be killed.

Numba (0.68) gives a function's compiled code a symbol by its qualified name and its number in the process that compiled
it. Two variants made by one closure, each compiled in another process, then have one symbol, and whoever loads both
runs one for the other ever after. So each function here has a name of its own. Numba also names the files of a cache by
counting those there are, without a lock, and takes what it finds under a name for what was to be there. So one process
at a time reads or writes, and names hold a hash of all that compiled code may be made of: the file itself, this
package's modules, and its C code. What an older one left is never met.
"""

from __future__ import annotations

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


@cache
def _package() -> bytes:
    """Return a hash of what this package is made of: its modules, and its C code as it was built."""
    here, digest = Path(__file__).parent, hashlib.sha256(numba.__version__.encode())
    for path in sorted([*here.rglob("*.py"), *here.glob("*.so")]):
        digest.update(path.read_bytes())
    return digest.digest()


class _Cache(FunctionCache):
    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        super().__init__(function)
        code = Path(inspect.getfile(function)).read_bytes() + _package() + variant.encode()
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

"""An on-disk cache of compiled functions that several processes can share, even where one of them is killed.

It works around two defects of numba's cache (0.68):
- The symbol of compiled code is the function's qualified name and a number that counts within the process. Two variants
  of one closure, compiled by two processes, get one symbol; a third process that loads both runs one for the other. So
  each function here needs a unique name.
- Cache files are numbered without a lock, and a wrong file under a number is loaded unnoticed. So one process at a time
  reads or writes, and file names contain a hash of all sources of the compiled code: the function's file, the files of
  this package that it imports, and the C code. A stale entry is never loaded.
"""

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
from numba.core.compiler_lock import global_compiler_lock

_PACKAGE = Path(__file__).resolve().parents[1]


def compiled(variant: str = "", slp: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: `numba.njit(cache=True, **options)`, with a cache that processes share safely.

    variant: distinguishes builds in which the same source calls other functions, as where some C code is missing.
    slp: use LLVM's straight-line vectorizer, which numba has for all functions or none. It packs the lanes of a pixel,
    but breaks loops up that would be vectorized over pixels.
    The decorator raises ValueError for a nested function whose `__qualname__` was not set to a unique one.
    """

    def compile_(function: Callable[..., Any]) -> Any:
        if "<locals>" in function.__qualname__:
            raise ValueError(f"{function.__qualname__}: set its __qualname__ to one that no other variant has")
        dispatcher = numba.njit(**options)(function)
        if slp:
            dispatcher.compile = _with_slp(dispatcher.compile)
        with contextlib.suppress(RuntimeError):  # no writable folder: compiled in each process
            dispatcher._cache = _Cache(function, variant)
        return dispatcher

    return compile_


def _with_slp(compile_: Callable[..., Any]) -> Callable[..., Any]:
    def compile_with_slp(*args: Any) -> Any:
        with global_compiler_lock:
            before, numba.config.SLP_VECTORIZE = numba.config.SLP_VECTORIZE, 1  # type: ignore[attr-defined]
            try:
                return compile_(*args)
            finally:
                numba.config.SLP_VECTORIZE = before  # type: ignore[attr-defined]

    return compile_with_slp


def external(name: str, function: Any, signature: Any) -> Any:
    """Return a C function, given by ctypes, for compiled code to call; it does not take the GIL.

    Compiled code refers to it by `name`, which must be unique: an address, as numba uses for ctypes functions, cannot
    be cached on disk. Addresses are passed as integers, truth values as uint32.
    """
    llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return numba.types.ExternalFunction(name, signature)


def _imported_sources(path: Path) -> set[Path]:
    """Return `path` and every file of the pipeline package that it imports, directly or not.

    Compiled code contains its callees and the constants of their modules: it is stale once any of these files changes.
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
    """Return the possible files of the pipeline modules that `path` imports, and of the packages that contain them."""
    modules: list[Path] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            modules += [_PACKAGE.parent.joinpath(*alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else _PACKAGE.parent
            module = base.joinpath(*(node.module or "").split("."))
            modules += [module, *(module / alias.name for alias in node.names)]
    modules = [module for module in modules if module.is_relative_to(_PACKAGE)]
    packages = {folder for module in modules for folder in (module, *module.parents) if folder.is_relative_to(_PACKAGE)}
    return [*(module.with_suffix(".py") for module in modules), *(folder / "__init__.py" for folder in packages)]


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
        with self._locked():
            return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        with self._locked():
            super().save_overload(sig, data)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock these files during the block; where the lock cannot be written, nor can the files."""
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

"""Variants of a compiled function stay apart in the cache, whoever writes it when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
from numba.core.caching import IndexDataCacheFile
{decorator}
# Both read that the cache is empty; the second is the last to write the index, the first to write its code.
index, code, first = IndexDataCacheFile._save_index, IndexDataCacheFile._save_data, sys.argv[1:] == ["1"]
IndexDataCacheFile._save_index = lambda *arguments: (time.sleep(1.5 if first else 2.0), index(*arguments))
IndexDataCacheFile._save_data = lambda *arguments: (time.sleep(1.5 if first else 0.0), code(*arguments))

def adds(number):
    def add(x):
        return x + number
    return decorated(add)

one, two = adds(1), adds(2)
print(*[{{"1": one, "2": two}}[which](0) for which in sys.argv[1:]])
"""
OURS = "from pipeline.compiled import compiled\ndecorated = compiled(nogil=True)"


def results(script: Path, cache: Path) -> str:
    """Have two processes compile a variant each at once; return what a third then gets from the cache for both."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, str(script), which], env=env) for which in "12"]
    assert [process.wait(60) for process in both] == [0, 0]
    return subprocess.run([sys.executable, str(script), "1", "2"], env=env, capture_output=True, text=True).stdout


def test_variants_compiled_at_once_are_not_mixed_up(tmp_path: Path) -> None:
    script = tmp_path / "variants.py"
    script.write_text(SCRIPT.format(decorator=OURS))
    assert results(script, tmp_path / "cache") == "1 2\n"


def test_another_source_is_compiled_anew(tmp_path: Path) -> None:
    script, env = tmp_path / "variants.py", os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for number in (3, 4):
        script.write_text(SCRIPT.format(decorator=OURS).replace("adds(1)", f"adds({number})"))
        os.utime(script, (1e9, 1e9))  # of the same time and size
        found = subprocess.run([sys.executable, str(script), "1"], env=env, capture_output=True, text=True)
        assert found.stdout == f"{number}\n", found.stderr

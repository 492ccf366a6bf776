"""Without FFCV, DALI and jpeg.c: the pipeline imports, writes, reads and decodes, by Pillow."""

from __future__ import annotations

import io
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import processes

CODE = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("pipeline", "ffcv")]:
    del sys.modules[name]  # of the server
sys.modules |= dict.fromkeys(["ffcv", "nvidia", *sys.argv[4:]])  # None: importing them fails
import numpy as np, torch
from pipeline import backends
from pipeline.augment.plan import Plan
from pipeline.backends.base import BackendConfig
from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.storage import decode
from pipeline.system.errors import InputError

out, expected, names = sys.argv[1:4]
assert decode.DECODER == expected, decode.DECODER
prepare("synthetic:6", out, workers=1, quiet=True)
beton = Beton(out)
np.savez(out + ".npz", *[decode.decode(beton, index) for index in range(6)])
config = BackendConfig((16, 16), 4, 2, 1, torch.device("cpu"))
boxes = np.array([[[5, 27, 10, 20]] * 4, [[12, 23, 30, 9]] * 4], np.int32)
views = []
for name in names.split():
    backend = backends.build(name, beton, config)
    backend.submit(Plan(np.arange(4), boxes, np.zeros((2, 4), np.uint8), (16, 16)))
    views.append(torch.stack(backend.receive(60)))
    backend.close()
assert all(torch.equal(views[0], other) for other in views)
for damaged in (b"", b"no JPEG", beton.record(0)[:-300].tobytes()):
    assert not decode.decodes(np.frombuffer(damaged, np.uint8), 48, 48)
assert not decode.decodes(beton.record(0), 48, 47)
try:
    backends.build("dali", beton, config)
except InputError as error:
    print(error)
assert not [name for name, module in sys.modules.items() if name.startswith("ffcv") and module]
"""


BACKENDS = "ffcv ffcv_gpu resident"


@pytest.mark.parametrize(
    ("decoder", "backends"),
    [
        ("pillow", ""),
        pytest.param("pillow", BACKENDS, marks=pytest.mark.slow),
        pytest.param("partial", BACKENDS, marks=pytest.mark.slow),
    ],
)
def test_the_pipeline_imports_writes_and_decodes(decoder: str, backends: str, tmp_path: Path) -> None:
    blocked = ["pipeline.native._jpeg"] if decoder == "pillow" else []
    run = processes.run([sys.executable, "-c", CODE, str(tmp_path / "x.beton"), decoder, backends, *blocked])
    assert run.returncode == 0, run.stderr
    assert "DALI is not installed: pip install nvidia-dali-cuda130, or choose auto" in run.stdout
    from pipeline.beton import Beton

    beton = Beton(tmp_path / "x.beton")
    assert beton.crc32 is not None
    decoded = np.load(tmp_path / "x.beton.npz")
    for index in range(6):
        data = beton.record(index).tobytes()
        assert zlib.crc32(data) == beton.crc32[index]
        assert np.array_equal(decoded[f"arr_{index}"], np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))

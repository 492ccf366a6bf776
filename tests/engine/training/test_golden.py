"""A hundred training steps with fixed losses: from the beton's records to the queue, all terms, float32.

Losses are compared exactly on the machines and versions in `golden.json`; elsewhere, where sums are rounded in another
order, to four digits; with vectors of another length (AVX2, AVX-512), where a few pixels of a batch round to the next
of 255 levels, to two. To add a machine, or after an intended change: python -m tests.engine.training.test_golden
"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from engine.training.model import build_model
from methods.co2 import CO2
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.beton import Beton
from pipeline.loader import Loader
from pipeline.prepare import prepare
from pipeline.views import AUGMENTATIONS
from tests.engine.small import settings

GOLDEN = Path(__file__).with_name("golden.json")
STEPS, BATCH = 100, 20


def describe_machine() -> dict[str, str]:
    """Return all that the last bit of a float32 sum depends on."""
    names = ("cpu family", "model", "model name", "stepping")
    lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    values = {key.strip(): value.strip() for key, value in lines if key.strip() in names}
    return values | {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}


def losses(beton: Path) -> list[float]:
    """Train like a run; return the losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    terms = Terms(co2=CO2(weight=0.3), xmoco=XMoCo(), residual=Residual())
    chosen = settings("moco_v2", terms, batch=BATCH, ema_momentum=0.99)
    model = build_model(replace(chosen, cpu=True), Accelerator(cpu=True))
    values: list[float] = []
    loader = Loader(Beton(beton), AUGMENTATIONS["moco_v2_32"], size=16, batch=BATCH, workers=1)
    try:
        while len(values) < STEPS:
            values += [float(model.step(batch).parts["loss"]) for batch in loader]
    finally:
        loader.close()
        torch.set_num_threads(threads)
    return values[:STEPS]


def test_losses_are_the_golden_ones(drawn: Path) -> None:
    values = losses(drawn)
    for golden in json.loads(GOLDEN.read_text()):
        expected = [float.fromhex(value) for value in golden["losses"]]
        if golden["made_on"] == describe_machine():
            assert values == expected
        alike = golden["made_on"]["capability"] == describe_machine()["capability"]
        assert values == pytest.approx(expected, rel=1e-4 if alike else 1e-2)
    if describe_machine() not in [golden["made_on"] for golden in json.loads(GOLDEN.read_text())]:
        warnings.warn("compared to two or four digits only: golden.json has no losses of such a machine", stacklevel=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        prepare("synthetic:200", Path(folder, "drawn.beton"), workers=1, quiet=True)
        values = [loss.hex() for loss in losses(Path(folder, "drawn.beton"))]
    others = [golden for golden in json.loads(GOLDEN.read_text()) if golden["made_on"] != describe_machine()]
    GOLDEN.write_text(json.dumps([*others, {"made_on": describe_machine(), "losses": values}], indent=1) + "\n")

"""Trains like engine/run.py, then writes each rank's modules; started by test_run.py under Accelerate."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from safetensors.torch import save_file  # noqa: E402

from engine.parallel.rendezvous import rank  # noqa: E402
from engine.training import loop  # noqa: E402
from engine.training.resume import modules  # noqa: E402

runs = []
build = loop.build
loop.build = lambda *arguments: runs.append(build(*arguments)) or runs[-1]
loop.train()
state = {key: value.contiguous() for key, value in modules(runs[0]).state_dict().items()}
save_file(state, Path(os.environ["MILLRACE_TEST_QUEUE"]) / f"rank{rank()}.safetensors")

"""A failure of the training is raised as its cause."""

from __future__ import annotations

import re

import pytest
import torch

from engine.fault_tolerance.diagnosis import translate_failures
from engine.fault_tolerance.heartbeat import Heartbeat
from pipeline.system.errors import InputError, LoaderStalled, RunFailed


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (LoaderStalled("no batch"), r"rank 0 on \S+, step 3: no batch; the stack of every thread is above"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), r"step 3, memory of the GPU is full \(CUDA out of mem"),
        (InputError("wrong"), "wrong"),
        (RuntimeError("gloo: on one rank it is no lost rank"), "gloo: on one rank"),
    ],
)
def test_failure_is_raised_as_its_cause(error: Exception, cause: str, capfd: pytest.CaptureFixture[str]) -> None:
    heartbeat = Heartbeat(60.0)
    heartbeat.step = 3
    with pytest.raises((RunFailed, InputError, RuntimeError)) as raised, translate_failures(heartbeat):
        raise error
    assert re.match(cause, str(raised.value))
    assert ("most recent call first" in capfd.readouterr().err) == isinstance(error, LoaderStalled)

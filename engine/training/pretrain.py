"""Pretraining from Python."""

import logging
from collections.abc import Sequence
from typing import Any

from accelerate.state import AcceleratorState

from engine.config.settings import Settings
from engine.monitoring.callback import Callback
from engine.parallel.rendezvous import world
from engine.training.loop import train
from pipeline.system import logs


def pretrain(settings: Settings, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Pretrain an encoder; return the run's summary, as in `OUT/summary.json`.

    In a script, a notebook's cell, or a function that `accelerate.notebook_launcher` starts on several GPUs. Raises
    InputError for settings or data that cannot work, Stopped after Ctrl-C, with a checkpoint to resume from, and
    RunFailed or Diverged for a failure. Log lines go to stderr unless logging is configured already.
    """
    if not logging.getLogger().handlers:
        logs.configure()
    try:
        return train(settings, callbacks=callbacks)
    finally:
        if world() == 1:  # Accelerate keeps a process's first device and precision
            AcceleratorState._reset_state(reset_partial_state=True)

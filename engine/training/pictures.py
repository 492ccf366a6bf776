"""Pictures of a run for its trackers: augmented views, and the report's curves. One that fails costs no training."""

import io
from collections.abc import Callable

import numpy as np
from accelerate.logging import get_logger
from PIL import Image

from engine.parallel.rendezvous import rank
from engine.training.build import Run
from pipeline.inspect import preview
from pipeline.system.errors import describe_error

logger = get_logger(__name__)


def log_views(run: Run) -> None:
    """Give the trackers the first images with their augmented views, where `tracking.images` asks for pictures."""
    data, seed = run.settings.data, run.settings.seed
    backend = "ffcv" if run.data.train.in_one_file else "dali"
    _log(run, "views", lambda: preview(run.data.train, data.augmentations, size=data.size, seed=seed, backend=backend))


def log_curves(run: Run) -> None:
    """Give the trackers the curves of the report, where `tracking.images` asks for pictures."""

    def draw() -> Image.Image:
        from engine.report.curves import draw_all  # with matplotlib, which takes a second

        return Image.open(io.BytesIO(draw_all([run.folder.path])))

    _log(run, "curves", draw)


def _log(run: Run, name: str, draw: Callable[[], Image.Image]) -> None:
    trackers = run.monitor.trackers
    if rank() or not run.settings.tracking.images or not run.settings.tracker or trackers is None:
        return
    try:
        pixels = np.asarray(draw().convert("RGB"))
    except Exception as error:  # of any kind: the run is worth more than a picture of it
        logger.warning(f"tracking.images: no picture of the {name} ({describe_error(error)}): training continues")
        return
    trackers.image(run.done, name, pixels)

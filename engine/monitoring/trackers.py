"""The trackers of a run: Accelerate's, given settings and labels. A tracker that fails costs no training."""

import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from engine.config.cli import flat
from engine.config.settings import Settings
from pipeline.system.errors import InputError, describe_error
from pipeline.system.files import write_json
from pipeline.system.limits import read_json

logger = get_logger(__name__)

_PACKAGES = {"comet_ml": "comet-ml"}  # names for pip that differ from the tracker's
_IDS, _IDS_BYTES = "trackers.json", 1 << 16
_REST = 10  # a failed call is followed by a rest of so many times its duration: at most a tenth of the time is lost
_MLFLOW = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # its own: 7 of 120 s each
Line = tuple[int, bool]
"""Step of a metrics line, and whether it is an evaluation's."""


def check_trackers(settings: Settings) -> None:
    """Raise InputError for a tracker whose package is not installed."""
    for name in settings.tracker:
        if name not in map(str, get_available_trackers()):
            package = _PACKAGES.get(name, name)
            remedy = f"pip install {package}, or choose another, such as tensorboard"
            raise InputError(f"tracker {name!r}: the package {package} is not installed: {remedy}")


@dataclass
class _Label:
    """A run, as a tracker receives it."""

    project: str
    name: str
    group: str
    tags: list[str]
    config: dict[str, Any]
    """All settings by dotted name: numbers, booleans and texts, others as JSON."""
    out: Path
    step: int
    """Steps trained before."""
    id: str
    """The tracker's id of this run, if it was started before, else empty."""


@dataclass
class _Active:
    """A tracker that was started."""

    name: str
    tracker: GeneralTracker
    sent: Collection[Line] = ()
    """Lines that it has from an earlier process."""
    failing: bool = False
    rests_until: float = 0.0

    def attempt(self, step: int, action: Callable[[], object]) -> None:
        """Run `action`. Warns of the first of several failures in a row, and rests after each."""
        began = time.monotonic()
        if began < self.rests_until:
            return
        try:
            action()
            self.failing = False
        except Exception as error:  # of any kind: packages and servers of others
            self.rests_until = time.monotonic() + _REST * (time.monotonic() - began)
            if not self.failing:
                problem = f"tracker {self.name}: could not be written ({describe_error(error)})"
                logger.warning(f"step {step}: {problem}: training continues, its metrics have a gap")
            self.failing = True


class Trackers:
    """The trackers that `settings.tracker` names. Used by rank 0 alone.

    Their ids are in `OUT/trackers.json`, so that a resumed run continues its curves: TensorBoard drops the steps that
    a killed process logged after its checkpoint, the others keep them and receive none of them twice. Lines that it had
    not sent yet are missing there: W&B writes its offline file every 15 s, others send from a thread.
    """

    def __init__(self, settings: Settings, out: Path) -> None:
        self._settings, self._out = settings, out
        self._active: list[_Active] = []
        self._step = 0  # the last one written

    def start(self, step: int, later: Collection[Line] = ()) -> None:
        """Start the trackers of a run of `step` steps; later: the lines that an earlier process wrote beyond these.

        One that does not start is warned of and left out. Raises InputError where the ids cannot be read or written.
        """
        path, resumed = self._out / _IDS, bool(self._settings.resume)
        remedy = "remove it: the trackers then start new curves"
        ids = read_json(path, _IDS_BYTES, remedy) if resumed and path.exists() else {}
        if not isinstance(ids, dict):
            raise InputError(f"{path}: has no ids by tracker: {remedy}")
        for name in dict.fromkeys(self._settings.tracker):
            label = self._label(step, str(ids.get(name, "")))
            try:
                tracker, ids[name] = _start(name, label)
            except Exception as error:
                problem = f"tracker {name}: did not start ({describe_error(error)})"
                logger.warning(f"{problem}: training continues without it; metrics.jsonl has all metrics")
                continue
            continued = resumed and (label.id or name == "tensorboard")
            self._active.append(_Active(name, tracker, _lines_there(name, step, later) if continued else ()))
        if ids := {name: value for name, value in ids.items() if value}:
            write_json(path, ids)

    def _label(self, step: int, identity: str) -> _Label:
        chosen, settings = self._settings.tracking, flat(self._settings.as_dict())
        config = {
            key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in settings.items()
        }
        name = chosen.name or self._out.absolute().name
        return _Label(chosen.project, name, chosen.group, list(chosen.tags), config, self._out, step, identity)

    def write(self, line: Mapping[str, Any], *, evaluation: bool) -> None:
        """Log a metrics line, `step` and other metrics."""
        self._step = step = line["step"]
        values = {key: value for key, value in line.items() if key != "step"}
        for active in self._active:
            if (step, evaluation) not in active.sent:
                active.attempt(step, lambda active=active: active.tracker.log(values, step=step))  # type: ignore[misc]

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log a picture, uint8 [H, W, 3]."""
        for active in self._active:
            active.attempt(step, lambda active=active: _log_image(active, step, name, pixels))  # type: ignore[misc]

    def finish(self, *, failed: bool = False) -> None:
        """End the trackers' runs; failed: where a tracker knows that state, as failed. Again: does nothing."""
        active, self._active = self._active, []
        for one in active:
            one.rests_until = 0.0
            one.attempt(self._step, lambda one=one: _finish(one, failed))  # type: ignore[misc]


def _lines_there(name: str, step: int, later: Collection[Line]) -> Collection[Line]:
    """Return those of the lines beyond `step` that a resumed tracker still has, and is not to receive again."""
    if name == "tensorboard":  # which drops all after `step`
        return {line for line in later if line[0] <= step}
    if name == "wandb":  # which keeps a step open until the next one; had it closed the last, it would ignore it now
        return {line for line in later if line[0] < max(later)[0]}
    return later


def _start(name: str, label: _Label) -> tuple[GeneralTracker, str]:
    """Return a started tracker with labels and settings, and its id of the run; empty: it has none."""
    if name == "mlflow":
        for key, limit in _MLFLOW.items():
            os.environ.setdefault(key, limit)
    kind = LOGGER_TYPE_TO_CLASS[name]
    arguments, id = _arguments(name, label)
    first = {"tensorboard": "millrace", "aim": label.name}.get(name, label.project)
    places = [str(label.out)] if kind.requires_logging_directory else []
    tracker = kind(first, *places, **arguments)
    tracker.start()
    if not label.id:
        _describe(name, tracker, label)
    source = {"mlflow": "info.run_id", "trackio": "name", "aim": "hash", "clearml": "id"}.get(name)
    if source is not None:
        value: Any = tracker.tracker
        for attribute in source.split("."):
            value = getattr(value, attribute)
        id = str(value)
    return tracker, id


def _arguments(name: str, label: _Label) -> tuple[dict[str, Any], str]:
    """Return the arguments of a tracker's own init, and the id that they give the run, if they do."""
    key, group, config = label.id or secrets.token_hex(16), label.group or None, label.config
    if name == "tensorboard":
        return {"purge_step": label.step + 1}, ""
    if name == "wandb":
        place = {"dir": str(label.out), "id": key, "resume": "allow"}
        return {**place, "name": label.name, "group": group, "tags": label.tags, "config": config}, key
    if name == "mlflow":
        return ({"run_id": label.id} if label.id else {"run_name": label.name}), ""
    if name == "trackio":  # whose id is the name
        resume = "allow" if label.id else "never"
        return {"name": label.id or label.name, "group": group, "config": config, "resume": resume}, ""
    if name == "comet_ml":
        from comet_ml import ExperimentConfig

        named = ExperimentConfig(name=label.name, tags=label.tags + [label.group] * bool(group))
        return {"experiment_key": key, "experiment_config": named}, key
    if name == "aim":
        return {"run_hash": label.id or None, "experiment": label.project}, ""
    if name == "clearml":
        known: dict[str, Any] = {"reuse_last_task_id": label.id or False}
        known |= {"continue_last_task": 0} if label.id else {}  # with steps as they are, not moved behind the last
        return {"task_name": label.name, "tags": label.tags + [label.group] * bool(group), **known}, ""
    if name == "dvclive":
        return {"dir": str(label.out / "dvclive"), "resume": bool(label.id)}, "dvclive"
    key = key[:21]  # SwanLab's ids have that length
    tags = label.tags + [label.group] * bool(group)
    place = {"logdir": str(label.out / "swanlog"), "id": key, "resume": "allow"}
    return {**place, "experiment_name": label.name, "tags": tags, "config": config}, key


def _describe(name: str, tracker: GeneralTracker, label: _Label) -> None:
    """Store the settings, and the labels that the tracker's init does not take, with a new run."""
    tags = label.tags + [label.group] * bool(label.group)
    if name == "tensorboard":  # Accelerate's would start a second run next to it
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(label.config, {}):
            tracker.tracker.file_writer.add_summary(summary)
        tracker.tracker.flush()
    elif name in ("mlflow", "comet_ml", "aim", "clearml", "dvclive"):
        tracker.store_init_configuration(label.config)
    if name == "mlflow":
        import mlflow

        mlflow.set_tags(({"group": label.group} if label.group else {}) | dict.fromkeys(label.tags, "true"))
    elif name == "aim":
        for tag in tags:
            tracker.tracker.add_tag(tag)


def _log_image(active: _Active, step: int, name: str, pixels: np.ndarray) -> None:
    """Log a picture, uint8 [H, W, 3]: Accelerate's trackers differ in what they take."""
    tracker: Any = active.tracker
    if active.name == "tensorboard":
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        tracker.tracker.flush()
    elif active.name in ("wandb", "swanlab"):
        tracker.log_images({name: [pixels]}, step=step)
    elif active.name == "clearml":
        tracker.log_images({name: pixels}, step=step)
    elif active.name == "aim":
        tracker.log_images({name: Image.fromarray(pixels)}, step=step)
    elif active.name == "mlflow":
        import mlflow

        mlflow.log_image(pixels, artifact_file=f"{name}_{step}.png")
    elif active.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(pixels)}, step=step)
    elif active.name == "comet_ml":
        tracker.tracker.log_image(Image.fromarray(pixels), name=name, step=step)
    else:
        tracker.tracker.log_image(f"{name}.png", Image.fromarray(pixels))


def _finish(active: _Active, failed: bool) -> None:
    """End a tracker's run."""
    if failed and active.name == "wandb":
        active.tracker.tracker.finish(exit_code=1)
    elif failed and active.name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    else:
        active.tracker.finish()

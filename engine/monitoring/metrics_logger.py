"""The metrics of a run: in metrics.jsonl, in trackers, and as one progress line."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from engine.monitoring.accumulator import Accumulator
from engine.monitoring.callback import Callback
from engine.monitoring.step_result import Result
from engine.monitoring.trackers import Line, Trackers
from engine.parallel.rendezvous import rank
from pipeline.system.errors import InputError, describe_error
from pipeline.system.files import write_atomic
from pipeline.system.limits import json_lines
from pipeline.system.progress import tqdm

logger = get_logger(__name__)

_LASTING = ("knn_top1", "probe_top1")  # metrics that stay valid where no step was taken since


class MetricsLogger:
    """Accumulates steps, and writes a line every logging interval and every evaluation."""

    def __init__(
        self, accelerator: Accelerator, out: Path, steps: int, epochs: int, trackers: Trackers | None = None
    ) -> None:
        self._accumulator = Accumulator(accelerator.device)
        self._writer = MetricsWriter(out / "metrics.jsonl", steps, epochs, trackers)
        self.trackers = trackers
        self.last: dict[str, Any] = {}
        """Newest value of every metric."""
        self.pairs, self.seconds, self.waited = 0, 0.0, 0.0
        """Pairs trained, seconds of training and seconds waited for data, since this process started."""
        self.skipped = 0
        """Steps skipped since the run's first step."""
        self.callbacks: Sequence[Callback] = ()
        self._start_interval()

    def start(self, step: int, evaluated: int) -> None:
        """Start at `step`, the last evaluation after `evaluated` epochs: later lines leave the file. For rank 0."""
        self._writer.start(step, evaluated)
        self._start_interval()

    def _start_interval(self) -> None:
        self._since, self._pairs, self._waited = time.perf_counter(), 0, 0.0

    def add(self, result: Result, pairs: int, waited: float, substituted: int | None = None) -> None:
        """Add a step: its result, pairs over all ranks, seconds waited for data, `substituted` of `Accumulator.add`."""
        self._accumulator.add(result, substituted)
        self._pairs += pairs
        self._waited += waited
        self._writer.advance()

    def log(self, step: int, epoch: float, measures: Mapping[str, torch.Tensor], **values: float) -> None:
        """Write the means since the last line, the measures of the last step, and `values`. Waits for the device."""
        count = self._accumulator.count
        means, warnings = self._accumulator.fetch(measures)
        seconds = time.perf_counter() - self._since
        rates = {
            "pairs_per_second": round(self._pairs / seconds, 1),
            "data_wait_fraction": round(self._waited / seconds, 4),
        }
        self.pairs, self.seconds = self.pairs + self._pairs, self.seconds + seconds
        self.waited += self._waited
        self._start_interval()
        if "loss" not in means:
            self.last = {key: value for key, value in self.last.items() if key in _LASTING}
        self._write({"step": step, "epoch": round(epoch, 4), **means, **values, **rates}, seconds / count)
        if skipped := int(means.get("skipped", 0)):
            self.skipped += skipped
            warnings.insert(0, f"{skipped} steps were skipped, as loss or gradients were not finite")
        for warning in warnings:
            logger.warning(f"step {step}: {warning}")

    def evaluation(self, step: int, epoch: float, **values: float) -> None:
        """Write the result of an evaluation."""
        self._write({"step": step, "epoch": round(epoch, 4), **values})

    def _write(self, line: dict[str, Any], seconds_per_step: float | None = None) -> None:
        """Write a line; seconds_per_step: None of an evaluation."""
        self.last.update(line)
        if rank() == 0:
            self._writer.write(line)
            self._writer.show(self.last, seconds_per_step)
        metrics = {key: value for key, value in line.items() if key != "step"}
        for callback in self.callbacks:
            hook = callback.on_evaluation if seconds_per_step is None else callback.on_step
            hook(line["step"], metrics)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Return a context whose duration does not count as training time."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def finish(self) -> None:
        """End the trackers' runs."""
        if self.trackers is not None:
            self.trackers.finish()

    def close(self) -> None:
        """End the progress line, and the trackers' runs as failed unless they are finished."""
        self._writer.close()
        if self.trackers is not None:
            self.trackers.finish(failed=True)

    def state_dict(self) -> dict[str, Any]:
        """Return sums and newest metrics as plain values. Called by all ranks; waits for the device."""
        return {**self._accumulator.state_dict(), "last": self.last, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `state`."""
        self._accumulator.load_state_dict(state)
        self.last, self.skipped = dict(state["last"]), state["skipped"]


class MetricsWriter:
    """Writes metrics lines to a file and to the trackers, and shows progress. Only rank 0 starts and writes."""

    def __init__(self, path: Path, steps: int, epochs: int, trackers: Trackers | None = None) -> None:
        self._path, self._trackers = path, trackers
        self._steps, self._epochs = steps, epochs
        self._bar: tqdm | None = None
        self._seconds_per_step = 0.0
        self._failing = False  # the last line could not be written

    def start(self, step: int, evaluated: int) -> None:
        """Remove later lines, left by a killed run, from the file; start trackers and the progress line at `step`."""
        later = _truncate(self._path, step, evaluated)
        if self._trackers is not None:
            self._trackers.start(step, later)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._steps, initial=step, unit="step", disable=not terminal, dynamic_ncols=True)

    def advance(self) -> None:
        """Advance the progress line by a step."""
        if self._bar is not None:
            self._bar.update()

    def write(self, line: dict[str, Any]) -> None:
        """Write a line, `step` and other metrics. A full disk costs the line, not the run: warns the first time."""
        try:
            _append(self._path, json.dumps(line) + "\n")
            self._failing = False
        except OSError as error:
            if not self._failing:
                problem = f"{self._path}: could not be written ({describe_error(error)})"
                logger.warning(f"step {line['step']}: {problem}: training continues, its metrics have a gap")
            self._failing = True
        if self._trackers is not None:
            self._trackers.write(line, evaluation=_is_evaluation(line))

    def show(self, last: dict[str, Any], seconds_per_step: float | None) -> None:
        """Show the newest metrics: in a terminal's progress line, else as a log line, short after an evaluation."""
        if self._bar is None:
            return
        self._seconds_per_step = seconds_per_step or self._seconds_per_step
        shown = [f"epoch {last['epoch']:.2f}/{self._epochs}", f"loss {last.get('loss', float('nan')):.3f}"]
        if "knn_top1" in last:
            shown.append(f"kNN {last['knn_top1']:.1%}")
        if "pairs_per_second" in last:
            shown += [f"{last['pairs_per_second']:.0f} pairs/s", f"data-wait {last['data_wait_fraction']:.1%}"]
        if self._bar.disable and seconds_per_step is None:
            probe = f", probe {last['probe_top1']:.1%}" if "probe_top1" in last else ""
            logger.info(f"epoch {last['epoch']:g}: kNN top-1 {last['knn_top1']:.1%}{probe}")
        elif self._bar.disable:
            step = last["step"]
            left = tqdm.format_interval((self._steps - step) * self._seconds_per_step)
            logger.info(f"step {step}/{self._steps}  {'  '.join(shown)}  left {left}")
        else:
            self._bar.set_postfix_str(", ".join(shown))

    def close(self) -> None:
        """End the progress line."""
        if self._bar is not None:
            self._bar.close()


def _append(path: Path, text: str) -> None:
    """Append a line. Raises OSError, and then leaves the file as it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return not line.keys().isdisjoint(_LASTING)


def _truncate(path: Path, step: int, evaluated: int) -> set[Line]:
    """Remove the lines of later steps and evaluations, and a last line that was cut off; return those of later ones.

    Raises InputError.
    """
    if not path.exists():
        return set()
    lines, later = [], set()
    try:
        for line, metrics in json_lines(path):
            evaluation, repeated = _is_evaluation(metrics), metrics["epoch"] > evaluated
            if metrics["step"] <= step and not (evaluation and repeated):
                lines.append(line)
            else:
                later.add((int(metrics["step"]), evaluation))
        write_atomic(path, b"".join(lines))
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a run's metrics ({error!r}): put it elsewhere") from None
    return later

"""What a run says of itself: metrics.jsonl, trackers, and one progress line.

Losses are summed on the device and fetched once a logging interval, with the measures of that interval's last step;
nothing else here touches the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from engine.monitoring.collapse import CollapseWatch
from engine.monitoring.loss_spikes import SpikeWatch
from engine.monitoring.step_result import Result
from engine.parallel import collectives
from pipeline.system.errors import InputError, describe_error, tell
from pipeline.system.limits import json_lines
from pipeline.system.progress import tqdm

_LASTING = ("knn_top1",)  # metrics that still hold where no step was taken since
_SUBSTITUTED, _TAKEN = "substituted", "taken"


class Monitor:
    """Accumulates a step's parts, and writes a line every logging interval and every evaluation."""

    def __init__(self, accelerator: Accelerator, out: Path, steps: int, epochs: int) -> None:
        self._accelerator, self._path = accelerator, out / "metrics.jsonl"
        self._steps, self._epochs = steps, epochs
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._collapse = CollapseWatch(accelerator.device)
        self._spikes, self._losses = SpikeWatch(), list[torch.Tensor]()
        self.last: dict[str, Any] = {}
        """Newest value of every metric."""
        self._bar: tqdm | None = None
        self._seconds_a_step = 0.0
        self._begin()
        self.pairs, self.seconds, self.waited = 0, 0.0, 0.0
        """Pairs trained, time it took and time waited for data, seconds, of this process's whole life."""
        self.skipped = 0
        """Steps skipped in the whole run."""
        self._unwritten = set[str]()
        """What could not be written the last time."""

    def start(self, step: int, evaluated: float = math.inf) -> None:
        """Begin or go on at `step`, evaluated for the last time after `evaluated` epochs.

        Later lines, of a run that was killed, are taken out of the file.
        """
        if self._accelerator.is_main_process:
            _truncate(self._path, step, evaluated)
            terminal = sys.stderr.isatty()
            self._bar = tqdm(total=self._steps, initial=step, unit="step", disable=not terminal, dynamic_ncols=True)
        self._begin()

    def _begin(self) -> None:
        """Begin a logging interval."""
        self._since, self._pairs, self._waited = time.perf_counter(), 0, 0.0

    def add(self, result: Result, pairs: int, waited: float, substituted: int | None = None) -> None:
        """Add a step: what it tells of itself, pairs over all processes, seconds waited for data.

        substituted: this process's samples that stood in for damaged ones; None where there cannot be any.
        """
        self._collapse.add(result.q)
        if substituted is not None:
            before = self._sums.get(_SUBSTITUTED, torch.zeros((), dtype=torch.float64, device=result.q.device))
            self._sums[_SUBSTITUTED] = before + substituted
        for name, value in {**result.parts, _TAKEN: torch.ones_like(result.taken)}.items():
            value = torch.where(result.taken, value.double(), 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._losses.append(torch.where(result.taken, result.parts["loss"].double(), torch.nan))
        self._newest = result.taken
        self._count += 1
        self._pairs += pairs
        self._waited += waited
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, epoch: float, measures: Mapping[str, torch.Tensor] | None = None, **values: float) -> None:
        """Write the means since the last line, the measures of the last step, both over all processes, and `values`.

        Steps that were skipped are left out, and counted as `skipped` where there are any. Waits for the device.
        """
        taken = self._sums.pop(_TAKEN)
        own = {name: value / taken for name, value in self._sums.items()} | dict(measures or {})
        if _SUBSTITUTED in own:
            own[_SUBSTITUTED] = self._sums[_SUBSTITUTED] * collectives.world()  # a sum, not a mean
        every = (taken, self._newest, *own.values(), *self._losses)
        fetched = collectives.mean(torch.stack([value.double() for value in every])).tolist()
        spike, self._losses = self._spikes.add(fetched[2 + len(own) :]), []
        means = dict(zip(own, fetched[2 : 2 + len(own)], strict=True))
        means = self._without_skipped(means, measures or {}, *fetched[:2])
        seconds = time.perf_counter() - self._since
        rates = {
            "pairs_per_second": round(self._pairs / seconds, 1),
            "data_wait_fraction": round(self._waited / seconds, 4),
        }
        self._seconds_a_step = seconds / self._count
        self.pairs, self.seconds, self.waited = (
            self.pairs + self._pairs,
            self.seconds + seconds,
            self.waited + self._waited,
        )
        self._sums, self._count = {}, 0
        self._begin()
        if "loss" not in means:
            self.last = {key: value for key, value in self.last.items() if key in _LASTING}
        self._write({"step": step, "epoch": round(epoch, 4), **means, **values, **rates})
        self._show(step)
        if skipped := int(means.get("skipped", 0)):
            self.skipped += skipped
            if self._accelerator.is_main_process:
                says = f"{skipped} steps were skipped, as loss or gradients were not finite"
                tell(f"warning: step {step}: {says}")
        for warning in (self._collapse.warning(), spike):
            if warning and self._accelerator.is_main_process:
                tell(f"warning: step {step}: {warning}")

    def _without_skipped(
        self, means: dict[str, float], measures: Mapping[str, Any], taken: float, newest: float
    ) -> dict[str, float]:
        """Return the metrics without means, where no step was taken, and without measures, where the newest was not."""
        left_out = set() if newest else set(measures)
        if not taken:
            left_out |= self._sums.keys() - {_SUBSTITUTED}
        counted = {"skipped": self._count - int(taken)} if taken < self._count else {}
        return {name: value for name, value in means.items() if name not in left_out} | counted

    def evaluation(self, step: int, epoch: float, **values: float) -> None:
        """Write the result of an evaluation; the time it took is no part of the training rates."""
        self._write({"step": step, "epoch": round(epoch, 4), **values})
        self._show(step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose duration does not count as training time."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self) -> None:
        """End the progress line."""
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        """Return every process's sums since the last line, and the newest metrics, as plain values.

        Called by all processes; waits for the device.
        """
        sums: dict[str, list[float]] = {}
        if self._sums:
            everyone = collectives.gather(torch.stack(list(self._sums.values()))[None])  # [world, parts]
            sums = {name: column.tolist() for name, column in zip(self._sums, everyone.T, strict=True)}
        collapse = self._collapse.state_dict()
        return {
            "sums": sums,
            "count": self._count,
            "collapse": collapse,
            "last": self.last,
            "skipped": self.skipped,
            "spikes": self._spikes.state_dict(),
            "losses": collectives.mean(torch.stack(self._losses)).tolist() if self._losses else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; on another number of processes with the mean of theirs, equal but for rounding."""
        device, rank, world = (getattr(self._accelerator, k) for k in ("device", "process_index", "num_processes"))
        self._sums = {}
        for name, sums in state["sums"].items():
            others = world if name == _SUBSTITUTED else len(sums)  # which is a sum over them, not a mean
            own = sums[rank] if len(sums) == world else sum(sums) / others
            self._sums[name] = torch.tensor(own, dtype=torch.float64, device=device)
        self._count, self.last, self.skipped = state["count"], dict(state["last"]), state["skipped"]
        self._collapse.load_state_dict(state["collapse"])
        self._spikes.load_state_dict(state["spikes"])
        losses = torch.tensor(state["losses"], dtype=torch.float64, device=device)
        self._losses = list(losses.unbind()) if len(losses) else []

    def _write(self, line: dict[str, Any]) -> None:
        self.last.update(line)
        if not self._accelerator.is_main_process:
            return
        step, text = line["step"], json.dumps(line) + "\n"
        self._try(step, str(self._path), lambda: _append(self._path, text))
        values = {key: value for key, value in line.items() if key != "step"}
        self._try(step, "the tracker's files", lambda: self._accelerator.log(values, step=step))

    def _try(self, step: int, where: str, write: Callable[[], None]) -> None:
        """Write; where there is no room, say so the first time, and go on: the run is worth more than a line of it."""
        try:
            write()
            self._unwritten.discard(where)
        except OSError as error:
            if where not in self._unwritten:
                says = (
                    f"{where}: could not be written ({describe_error(error)}): training goes on, its metrics have a gap"
                )
                tell(f"warning: step {step}: {says}")
            self._unwritten.add(where)

    def _show(self, step: int) -> None:
        if self._bar is None:
            return
        last = self.last
        shown = [f"epoch {last['epoch']:.2f}/{self._epochs}", f"loss {last.get('loss', float('nan')):.3f}"]
        if "knn_top1" in last:
            shown.append(f"kNN {last['knn_top1']:.1%}")
        if "pairs_per_second" in last:
            shown += [
                f"{last['pairs_per_second']:.0f} pairs/s",
                f"data-wait {last['data_wait_fraction']:.1%}",
            ]
        if self._bar.disable:
            tell(f"step {step}/{self._steps}  {'  '.join(shown)}  left {self._left(step)}")
        else:
            self._bar.set_postfix_str(", ".join(shown))

    def _left(self, step: int) -> str:
        return tqdm.format_interval((self._steps - step) * self._seconds_a_step)


def _append(path: Path, text: str) -> None:
    """Append a line, or nothing of it. Raises OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _truncate(path: Path, step: int, evaluated: float) -> None:
    """Drop the lines of steps after `step`, of later evaluations, and a last line that was cut off."""
    if not path.exists():
        return
    beside = path.with_name(f".{path.name}.writing")
    try:
        with open(beside, "wb") as file:
            for line, said in json_lines(path):
                later = said["epoch"] > evaluated and said.keys() & set(_LASTING)
                if said["step"] <= step and not later:
                    file.write(line)
        os.replace(beside, path)
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a run's metrics ({error!r}): put it elsewhere") from None

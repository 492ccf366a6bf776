"""Sums of losses and counts since the last metrics line."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from engine.monitoring.collapse import CollapseWatch
from engine.monitoring.loss_spikes import SpikeWatch
from engine.monitoring.step_result import Result
from engine.parallel import collectives
from engine.parallel.rendezvous import rank, world

_SUBSTITUTED, _TAKEN = "substituted", "taken"


class Accumulator:
    """Sums up the steps of a logging interval. Only `fetch` and `state_dict` wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._rows: list[torch.Tensor] = []  # the values of steps, on the device, that are not in the sums yet
        self._sums: dict[str, float] = {}
        self._losses: list[float] = []
        self._newest_taken = 0.0
        self._collapse, self._spikes = CollapseWatch(), SpikeWatch()
        self.count = 0
        """Steps since the last `fetch`."""

    def add(self, result: Result, substituted: int | None) -> None:
        """Add a step: one copy on the device, since a replayed step overwrites its result.

        substituted: this rank's samples that replaced damaged ones, None where there cannot be any.
        """
        if substituted is not None:
            self._sums[_SUBSTITUTED] = self._sums.get(_SUBSTITUTED, 0.0) + substituted
        self._names = [*result.names, _TAKEN]
        self._rows.append(result.values.clone())
        self.count += 1

    def fetch(self, measures: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], list[str]]:
        """Return the means over the interval's steps and all ranks, with the measures of its last step, and warnings.

        Skipped steps are left out, and counted as `skipped` where there are any. Then a new interval begins. Called by
        all ranks: one all-reduce.
        """
        self._add_rows()
        taken_sum = self._sums.pop(_TAKEN)
        local = {name: value / taken_sum if taken_sum else math.nan for name, value in self._sums.items()}
        if _SUBSTITUTED in local:
            local[_SUBSTITUTED] = self._sums[_SUBSTITUTED] * world()  # a sum, not a mean
        local |= dict(zip(measures, _to_host(list(measures.values())), strict=True))
        values = self._tensor([taken_sum, self._newest_taken, *local.values(), *self._losses])
        taken, newest_taken, *rest = collectives.mean(values).tolist()
        means = dict(zip(local, rest, strict=False))
        absent = set() if newest_taken else set(measures)
        if not taken:
            absent |= self._sums.keys() - {_SUBSTITUTED}
        means = {name: value for name, value in means.items() if name not in absent}
        if taken < self.count:
            means["skipped"] = self.count - int(taken)
        spike = self._spikes.add(rest[len(local) :])
        self._sums, self._losses, self.count = {}, [], 0
        return means, [warning for warning in (self._collapse.warning(), spike) if warning]

    def _add_rows(self) -> None:
        """Add the steps that are still on the device to the sums, in their order."""
        rows, self._rows = torch.stack(self._rows).tolist() if self._rows else [], []
        for taken, spread, *values in rows:
            self._collapse.add(spread)
            for name, value in zip(self._names, [*values, 1.0], strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + (value if taken else 0.0)
            self._losses.append(values[0] if taken else math.nan)
            self._newest_taken = taken

    def _tensor(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    def state_dict(self) -> dict[str, Any]:
        """Return every rank's sums since the last line as plain values. Called by all ranks."""
        self._add_rows()
        sums: dict[str, list[float]] = {}
        if self._sums:
            rows = collectives.gather(self._tensor(list(self._sums.values()))[None])  # [world, parts]
            sums = {name: column.tolist() for name, column in zip(self._sums, rows.T, strict=True)}
        return {
            "sums": sums,
            "count": self.count,
            "collapse": self._collapse.state_dict(),
            "spikes": self._spikes.state_dict(),
            "losses": collectives.mean(self._tensor(self._losses)).tolist() if self._losses else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `state`; with another world size the mean over the saved ranks, equal but for rounding."""
        self._rows, self._sums = [], {}
        for name, sums in state["sums"].items():
            divisor = world() if name == _SUBSTITUTED else len(sums)  # which is a sum over ranks, not a mean
            self._sums[name] = sums[rank()] if len(sums) == world() else sum(sums) / divisor
        self.count, self._losses = state["count"], list(state["losses"])
        self._collapse.load_state_dict(state["collapse"])
        self._spikes.load_state_dict(state["spikes"])


def _to_host(values: list[torch.Tensor]) -> list[float]:
    return torch.stack([value.double() for value in values]).tolist() if values else []

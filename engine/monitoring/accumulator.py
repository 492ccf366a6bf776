"""Sums of losses and counts since the last metrics line, on the device."""

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
        self._sums: dict[str, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []
        self._collapse, self._spikes = CollapseWatch(device), SpikeWatch()
        self.count = 0
        """Steps since the last `fetch`."""

    def add(self, result: Result, substituted: int | None) -> None:
        """Add a step; substituted: this rank's samples that replaced damaged ones, None where there cannot be any."""
        self._collapse.add(result.q)
        if substituted is not None:
            before = self._sums.get(_SUBSTITUTED, torch.zeros((), dtype=torch.float64, device=result.q.device))
            self._sums[_SUBSTITUTED] = before + substituted
        for name, value in {**result.parts, _TAKEN: torch.ones_like(result.taken)}.items():
            value = torch.where(result.taken, value.double(), 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._losses.append(torch.where(result.taken, result.parts["loss"].double(), torch.nan))
        self._newest_taken = result.taken
        self.count += 1

    def fetch(self, measures: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], list[str]]:
        """Return the means over the interval's steps and all ranks, with the measures of its last step, and warnings.

        Skipped steps are left out, and counted as `skipped` where there are any. Then a new interval begins. Called by
        all ranks: one all-reduce.
        """
        taken_sum = self._sums.pop(_TAKEN)
        local = {name: value / taken_sum for name, value in self._sums.items()} | dict(measures)
        if _SUBSTITUTED in local:
            local[_SUBSTITUTED] = self._sums[_SUBSTITUTED] * world()  # a sum, not a mean
        values = (taken_sum, self._newest_taken, *local.values(), *self._losses)
        taken, newest_taken, *rest = collectives.mean(torch.stack([value.double() for value in values])).tolist()
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

    def state_dict(self) -> dict[str, Any]:
        """Return every rank's sums since the last line as plain values. Called by all ranks."""
        sums: dict[str, list[float]] = {}
        if self._sums:
            rows = collectives.gather(torch.stack(list(self._sums.values()))[None])  # [world, parts]
            sums = {name: column.tolist() for name, column in zip(self._sums, rows.T, strict=True)}
        return {
            "sums": sums,
            "count": self.count,
            "collapse": self._collapse.state_dict(),
            "spikes": self._spikes.state_dict(),
            "losses": collectives.mean(torch.stack(self._losses)).tolist() if self._losses else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `state`; with another world size the mean over the saved ranks, equal but for rounding."""
        self._sums = {}
        for name, sums in state["sums"].items():
            divisor = world() if name == _SUBSTITUTED else len(sums)  # which is a sum over ranks, not a mean
            local = sums[rank()] if len(sums) == world() else sum(sums) / divisor
            self._sums[name] = torch.tensor(local, dtype=torch.float64, device=self._device)
        self.count = state["count"]
        self._collapse.load_state_dict(state["collapse"])
        self._spikes.load_state_dict(state["spikes"])
        losses = torch.tensor(state["losses"], dtype=torch.float64, device=self._device)
        self._losses = list(losses.unbind()) if len(losses) else []

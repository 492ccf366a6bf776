"""Callbacks on the metrics of a run."""

from collections.abc import Mapping


class Callback:
    """Receives the metrics of a run. Override what you need; every rank calls it, after the line is written.

    metrics: the values of that line of metrics.jsonl, with `epoch`; on other ranks than the first, pairs_per_second and
    data_wait_fraction are of their own clocks. An exception ends the run.
    """

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the means since the last logged step, every `log_every` steps and at the end of an epoch."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the result of an evaluation, such as `knn_top1`."""

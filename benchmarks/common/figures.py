"""The figures that goals and headlines are made of, taken from the results' files and from nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.system.errors import InputError

_NAME = re.compile(r"(\d{4}-\d\d-\d\d)-(.+?)(\.metrics\.jsonl|\.jsonl|\.json|\.md|\.png)")
Found = dict[str, Any]


class Results:
    """A folder of results, `DATE-SERIES.SUFFIX`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder: give one of dated results")
        self._files: dict[str, dict[str, dict[str, Path]]] = {}
        for path in sorted(folder.iterdir()):
            if named := _NAME.fullmatch(path.name):
                date, series, suffix = named.groups()
                self._files.setdefault(series, {}).setdefault(date, {})[suffix] = path

    def series(self) -> list[str]:
        """Return the names of all series, in alphabetical order."""
        return sorted(self._files)

    def files(self, series: str) -> list[dict[str, Path]]:
        """Return a series' files by suffix, the newest date first."""
        dated = self._files.get(series, {})
        return [dated[date] for date in sorted(dated, reverse=True)]

    def every(self, series: str) -> list[tuple[str, Found]]:
        """Return a series' dates and JSON documents, the newest first."""
        dated = self._files.get(series, {})
        with_json = [(date, dated[date][".json"]) for date in sorted(dated, reverse=True) if ".json" in dated[date]]
        return [(date, json.loads(path.read_text())) for date, path in with_json]

    def newest(self, series: str) -> Found | None:
        """Return the newest JSON document of a series."""
        found = self.every(series)
        return found[0][1] if found else None


def where(found: Found) -> str:
    """Return what a result was measured on."""
    about: Any = found if "machine" in found else next((v for v in found.values() if isinstance(v, dict)), {})
    about = about.get("machine", {})
    return str(about.get("gpu") or about.get("processor") or "unknown")


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of a series."""

    what: str
    bound: float
    series: str
    figure: Callable[[Found], float | None]
    unit: str = "×"
    most: bool = False
    """Whether the figure is to be at most the bound, not at least."""
    digits: int = 2

    @property
    def bound_text(self) -> str:
        """The bound, written out."""
        return f"{'≤' if self.most else '≥'} {self._text(self.bound)}"

    def judge(self, results: Results) -> tuple[str, str]:
        """Return what was measured, and the verdict on the newest."""
        told = []
        for date, found in results.every(self.series):
            value = self.figure(found)
            if value is not None:
                told.append((value, f"{self._text(value)} ({where(found)}, {date})"))
        if not told:
            return "–", "not measured"
        reached = [value <= self.bound if self.most else value >= self.bound for value, _ in told]
        verdict = "reached" if reached[0] else "not reached"
        if not reached[0] and any(reached):
            verdict = "not reached on the newest machine"
        return ", ".join(dict.fromkeys(text for _, text in told)), verdict

    def _text(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:,.{self.digits}f}{self.unit}"


def _cpu(found: Found, kind: str, name: str) -> float | None:
    row = found.get(kind, {}).get("paths", {}).get(f"{name}, 1")
    return row["cpu"]["median"] if row else None


def _ratio(kind: str, above: str, below: str) -> Callable[[Found], float | None]:
    def ratio(found: Found) -> float | None:
        a, b = _cpu(found, kind, above), _cpu(found, kind, below)
        return a / b if a and b else None

    return ratio


def _best_step(found: Found) -> float | None:
    """Return how many times as fast as the official loop in float32 the fastest of our ways is."""
    ratios = found.get("ratio_to_official", {})
    return max((_median(ratios[way]) for way in ("eager", "compiled", "graph") if way in ratios), default=None)


def _median(found: Any) -> float:
    """Return the median of a spread; early results have it alone."""
    return float(found["median"] if isinstance(found, dict) else found)


def _worst_prediction(found: Found) -> float:
    return max(abs(row["ratio"] - 1) for row in found["prediction"].values())


def withstood(found: Found) -> tuple[int, int]:
    """Return how many faults of the reliability table ended as expected, and how many there are."""
    faults = [row for row in found["faults"] if row["expected"]]  # not tests that recorded none of them
    return sum(row["verdict"] == "as expected" for row in faults), len(faults)


def _pairs_on_gpu(found: Found) -> float | None:
    rates = found.get("step", {}).get("pairs_per_second", {})
    return max((rates[way]["median"] for way in ("eager", "compiled", "graph") if way in rates), default=None)


_GPU = "gpu-suite"
GOALS = (
    Goal("two crops of ImageNet originals (500 px) on a core, against FFCV decoding twice", 2.3, "loader",
         _ratio("in500", "ffcv", "ffcv-twice")),
    Goal("the same at 256 px", 1.9, "loader", _ratio("in256", "ffcv", "ffcv-twice")),
    Goal("decoding alone, for a GPU that crops, against FFCV decoding twice", 3.3, "loader",
         _ratio("in500", "decode-only", "ffcv-twice")),
    Goal("decoding alone against the official pipeline: originals", 12, "loader",
         _ratio("in500", "decode-only", "official")),
    Goal("the same, all of quality 90", 12, "loader", _ratio("q90", "decode-only", "official")),
    Goal("CPU step, ResNet-18 at 32 px, against the official loop", 2.4, "step-resnet18-cpu", _best_step),
    Goal("CPU step, ResNet-50 at 224 px, against the official loop", 3.0, "step-resnet50-cpu", _best_step),
    Goal("training on real data against the bare step, CPU", 0.97, "train-cpu", lambda f: f["ratio"]["median"]),
    Goal("plans of runs on two cores: farthest from what they took, small batches", 0.15, "scaling-decode-cpu",
         _worst_prediction, "%", most=True),
    Goal("the same, larger images", 0.15, "scaling-compute-cpu", _worst_prediction, "%", most=True),
    Goal("faults of the reliability table provoked, and withstood", 1.0, "reliability",
         lambda f: withstood(f)[0] / withstood(f)[1], "%"),
    Goal("one H200, ResNet-50 at 224 px, MoCo v2", 3500, _GPU, _pairs_on_gpu, " pairs/s", digits=0),
    Goal("training on JPEGs against the bare step on that GPU", 0.97, _GPU,
         lambda f: f.get("train", {}).get("ratio", {}).get("median")),
    Goal("resident CIFAR-10 on that GPU", 200_000, _GPU,
         lambda f: next((row["wall"]["median"] for row in f.get("resident", {}).get("paths", {}).values()), None),
         " pairs/s", digits=0),
)  # fmt: skip
"""What the project set out to reach."""


def _loader_headline(results: Results) -> tuple[str, str] | None:
    found = results.newest("loader")
    if found is None:
        return None
    rates = [_cpu(found, kind, "ffcv") or 0.0 for kind in ("in500", "q90")]
    ratios = [_ratio(kind, "ffcv", "ffcv-twice")(found) or 0.0 for kind in ("in500", "q90")]
    official = [_ratio(kind, "ffcv", "official")(found) or 0.0 for kind in ("in500", "q90")]
    what = "two 224-pixel crops of ImageNet images (500 px), one core, by CPU time: originals, and all of quality 90"
    says = "**{:.0f} and {:.0f} pairs/s**, {:.1f} and {:.1f} times FFCV's own loader decoding twice, {:.1f} and {:.1f} "
    says += "times the official MoCo pipeline, which colors them too"
    return what, f"{says.format(*rates, *ratios, *official)} ({where(found)})"


def _decoding_headline(results: Results) -> tuple[str, str] | None:
    found = results.newest("loader")
    if found is None:
        return None
    kinds = ("in500", "q90")
    rates = [_cpu(found, kind, "decode-only") or 0.0 for kind in kinds]
    ratios = [_ratio(kind, "decode-only", "ffcv-twice")(found) or 0.0 for kind in kinds]
    official = [_ratio(kind, "decode-only", "official")(found) or 0.0 for kind in kinds]
    says = "**{:.0f} and {:.0f} pairs/s**, {:.1f} and {:.1f} times FFCV decoding twice, {:.1f} and {:.1f} times the "
    says += "official MoCo pipeline, which crops and colors too"
    return "the same, decoding alone, where a GPU crops", f"{says.format(*rates, *ratios, *official)} ({where(found)})"


def _step_headline(results: Results) -> tuple[str, str] | None:
    told = []
    for series, name in (("step-resnet18-cpu", "ResNet-18 at 32 px"), ("step-resnet50-cpu", "ResNet-50 at 224 px")):
        machines: dict[str, str] = {}
        for _, found in results.every(series):
            if (best := _best_step(found)) is not None:
                own = best / _median(found["ratio_to_official"]["official-amp"])
                machines.setdefault(where(found), f"**{best:.1f}** and {own:.1f} ({where(found)})")
        if machines:
            told.append(f"{name} {', '.join(machines.values())}")
    what = "a training step on the CPU in bf16, times as fast as the official loop in float32, and in bf16"
    return (what, "; ".join(told)) if told else None


def _train_headline(results: Results) -> tuple[str, str] | None:
    found = results.newest("train-cpu")
    if found is None:
        return None
    ratio = found["ratio"]
    says = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}, {where(found)})"
    return "training on real data, as a share of the bare step's rate, CPU", says


def _scaling_headline(results: Results) -> tuple[str, str] | None:
    told = []
    for series, name in (("scaling-plain-cpu", "32 px"), ("scaling-compute-cpu", "64 px")):
        if found := results.newest(series):
            told.append(f"{name} {found['efficiency']['in all']['median']:.2f}")
    what = "two processes on two cores against one on one: efficiency (gloo)"
    return (what, ", ".join(told)) if told else None


def _study_headline(results: Results) -> tuple[str, str] | None:
    found = results.newest("study-cifar10-cpu")
    if found is None:
        return None
    told = []
    for row in found["rows"]:
        if row["knn"]["mean"] is not None:
            deviation = row["knn"]["deviation"]
            spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
            told.append(f"{row['name']} {100 * row['knn']['mean']:.1f}{spread}")
    what = f"CIFAR-10, a few minutes of each on {found['device']}: kNN top-1, % (mean ± deviation over seeds)"
    return what, "; ".join(told)


def _reliability_headline(results: Results) -> tuple[str, str] | None:
    found = results.newest("reliability")
    if found is None:
        return None
    return "faults provoked: kills, full disks, damage, hostile files, …", "{} of {} withstood".format(
        *withstood(found)
    )


def _walk_headline(results: Results) -> tuple[str, str] | None:
    found = results.newest("walk")
    if found is None or len(found["demo"]) < 3:
        return None
    says = "{:.1f}, {:.1f}, **{:.1f} %**".format(*(100 * top1 for top1 in found["demo"].values()))
    return "`./millrace demo`: kNN top-1 of raw pixels, untrained, trained encoder", f"{says} ({where(found)})"


HEADLINES: tuple[Callable[[Results], tuple[str, str] | None], ...] = (
    _loader_headline,
    _decoding_headline,
    _step_headline,
    _train_headline,
    _scaling_headline,
    _walk_headline,
    _study_headline,
    _reliability_headline,
)
"""Rows of the README's table; those whose result is not there are left out."""

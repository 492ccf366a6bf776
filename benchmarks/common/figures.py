"""Goals and headlines, computed from the files of results."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import Difference
from pipeline.system.errors import InputError

_NAME = re.compile(r"(\d{4}-\d\d-\d\d)-(.+?)(\.metrics\.jsonl|\.jsonl|\.json|\.md|\.png)")
Result = dict[str, Any]
Figure = Callable[[Result], "float | None"]


class Results:
    """A folder of results, `DATE-SERIES.SUFFIX`. Raises InputError if there is none."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder: give one of dated results")
        self._files: dict[str, dict[str, dict[str, Path]]] = {}
        matches = [(match, path) for path in sorted(folder.iterdir()) if (match := _NAME.fullmatch(path.name))]
        for match, path in sorted(matches, key=lambda pair: pair[0][1], reverse=True):  # the newest date first
            date, series, suffix = match.groups()
            self._files.setdefault(series, {}).setdefault(date, {})[suffix] = path

    def series(self) -> list[str]:
        """Return the names of all series, sorted."""
        return sorted(self._files)

    def files(self, series: str) -> list[dict[str, Path]]:
        """Return a series' files by suffix, the newest date first."""
        return [dict(files) for files in self._files.get(series, {}).values()]

    def documents(self, series: str) -> list[tuple[str, Result]]:
        """Return a series' dates and JSON documents, the newest first."""
        dated = self._files.get(series, {}).items()
        return [(date, json.loads(files[".json"].read_text())) for date, files in dated if ".json" in files]

    def newest(self, series: str) -> Result | None:
        """Return the newest JSON document of a series."""
        return next((result for _, result in self.documents(series)), None)


def hardware(result: Result) -> str:
    """Return the GPU or else the processor of a result, or of its first part."""
    part: Any = result if "machine" in result else next((v for v in result.values() if isinstance(v, dict)), {})
    about = part.get("machine", {})
    return str(about.get("gpu") or about.get("processor") or "unknown")


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of a series."""

    title: str
    bound: float
    series: str
    figure: Figure
    unit: str = "×"
    most: bool = False
    """The bound is an upper one."""
    digits: int = 2

    @property
    def bound_text(self) -> str:
        """The bound as text."""
        return f"{'≤' if self.most else '≥'} {self._text(self.bound)}"

    def judge(self, results: Results) -> tuple[str, str]:
        """Return all measurements, and the verdict on the newest."""
        figures = [(self.figure(result), result, date) for date, result in results.documents(self.series)]
        measured = [(figure, f"{hardware(result)}, {date}") for figure, result, date in figures if figure is not None]
        if not measured:
            return "–", "not measured"
        reached = [figure <= self.bound if self.most else figure >= self.bound for figure, _ in measured]
        verdict = "reached" if reached[0] else "not reached"
        if not reached[0] and any(reached):
            verdict = "not reached on the newest machine"
        return ", ".join(dict.fromkeys(f"{self._text(figure)} ({where})" for figure, where in measured)), verdict

    def _text(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:,.{self.digits}f}{self.unit}"


def _cpu(result: Result, images: str, loader: str) -> float | None:
    """Return a loader's pairs a second of one core."""
    row = result.get(images, {}).get("paths", {}).get(f"{loader}, 1")
    return row["cpu"]["median"] if row else None


def _ratio(images: str, above: str, below: str) -> Figure:
    """Return a figure: the ratio of two loaders."""

    def ratio(result: Result) -> float | None:
        a, b = _cpu(result, images, above), _cpu(result, images, below)
        return a / b if a and b else None

    return ratio


def _fastest(spreads: Mapping[str, Any]) -> float | None:
    """Return the highest median of our steps."""
    return max(
        (_median(spreads[name]) for name in ("eager", "eager-graph", "compiled", "graph") if name in spreads),
        default=None,
    )


def _best_step(result: Result) -> float | None:
    """Return the speed of our fastest step, relative to the official loop in float32."""
    return _fastest(result.get("ratio_to_official", {}))


def _pairs_on_gpu(result: Result) -> float | None:
    rates = [_fastest(result.get(name, {}).get("pairs_per_second", {})) for name in ("step", "compiled")]
    return max((rate for rate in rates if rate is not None), default=None)


def _median(spread: Any) -> float:
    """Return the median of a spread; early results are the median alone."""
    return float(spread["median"] if isinstance(spread, dict) else spread)


def _worst_prediction(result: Result) -> float:
    return max(abs(row["ratio"] - 1) for row in result["prediction"].values())


def _demo_top1(result: Result, name: str) -> list[float]:
    """Return kNN top-1 of the demo's `raw pixels`, `untrained encoder` or `trained encoder`, for each seed."""
    return [row["top1"][name] for row in result["rows"]]


def _demo_minutes(result: Result) -> float:
    """Return the longest training of the demo."""
    return max(float(row["training_seconds"]) for row in result["rows"]) / 60


def withstood(result: Result) -> tuple[int, int]:
    """Return how many faults of the reliability table ended as expected, and how many it has."""
    faults = [row for row in result["faults"] if row["expected"]]  # others are tests that recorded no fault
    return sum(row["verdict"] == "as expected" for row in faults), len(faults)


Row = tuple[str, str, str]
"""What was measured, the values, and the machine."""
Headline = Callable[[Results], list[Row]]
_GPU = "gpu-suite"
GOALS = (
    Goal("two crops of ImageNet originals (500 px) on one core, against FFCV decoding twice", 2.3, "loader",
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
    Goal("predicted rates of runs on two cores: largest error, 16 px", 0.15, "scaling-decode-cpu",
         _worst_prediction, "%", most=True),
    Goal("the same, 64 px", 0.15, "scaling-compute-cpu", _worst_prediction, "%", most=True),
    Goal("the demo on two cores with AVX2, kNN top-1, worst of three seeds", 0.65, "demo-avx2",
         lambda f: min(_demo_top1(f, "trained encoder")), "%"),
    Goal("the same, raw pixels and untrained encoder", 0.35, "demo-avx2",
         lambda f: max(_demo_top1(f, "raw pixels") + _demo_top1(f, "untrained encoder")), "%", most=True),
    Goal("the same, training", 4, "demo-avx2", _demo_minutes, " min", most=True, digits=1),
    Goal("faults of the reliability table withstood", 1.0, "reliability",
         lambda f: withstood(f)[0] / withstood(f)[1], "%"),
    Goal("one H200, ResNet-50 at 224 px, MoCo v2", 3500, _GPU, _pairs_on_gpu, " pairs/s", digits=0),
    Goal("training on JPEGs against the bare step on that GPU", 0.97, _GPU,
         lambda f: f.get("train", {}).get("ratio", {}).get("median")),
    Goal("resident CIFAR-10 on that GPU", 200_000, _GPU,
         lambda f: next((row["wall"]["median"] for row in f.get("resident", {}).get("paths", {}).values()), None),
         " pairs/s", digits=0),
)  # fmt: skip
"""The project's goals."""


_PEERS = ("ffcv-twice", "official")


def _crops_headline(loader: str, title: str) -> Headline:
    """Return a headline: a loader's rate on two kinds of images, and its ratios to FFCV's and the official loader."""

    def headline(results: Results) -> list[Row]:
        result = results.newest("loader")
        if result is None:
            return []
        rows = []
        for kind, images in (("in500", "originals"), ("q90", "quality 90")):
            rate, ffcv, peer = (_cpu(result, kind, loader), *(_ratio(kind, loader, name)(result) for name in _PEERS))
            text = f"**{rate or 0:.0f} pairs/s**: {ffcv or 0:.1f} × FFCV, {peer or 0:.1f} × official MoCo"
            rows.append((f"{title}, {images}", text, hardware(result)))
        return rows

    return headline


def _step_headline(results: Results) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for series, name in (("step-resnet18-cpu", "ResNet-18 at 32 px"), ("step-resnet50-cpu", "ResNet-50 at 224 px")):
        for _, result in results.documents(series):
            if (best := _best_step(result)) is not None:
                in_bf16 = best / _median(result["ratio_to_official"]["official-amp"])
                text = f"**{best:.1f}** × official in float32, {in_bf16:.1f} × official in bf16"
                machine = hardware(result)
                rows.setdefault((name, machine), (f"rate of training steps in bf16, {name}", text, machine))
    return list(rows.values())


def _train_headline(results: Results) -> list[Row]:
    result = results.newest("train-cpu")
    if result is None:
        return []
    ratio = result["ratio"]
    text = f"**{ratio['median']:.2f}** × the bare step ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return [("rate of training on real data", text, hardware(result))]


def _scaling_headline(results: Results) -> list[Row]:
    rows = []
    for series, name in (("scaling-plain-cpu", "32 px"), ("scaling-compute-cpu", "64 px")):
        if result := results.newest(series):
            efficiency = f"**{result['efficiency']['in all']['median']:.2f}**"
            rows.append(
                (f"efficiency of two ranks on two cores against one on one, {name}", efficiency, hardware(result))
            )
    return rows


def _reliability_headline(results: Results) -> list[Row]:
    result = results.newest("reliability")
    if result is None:
        return []
    passed, count = withstood(result)
    title = "faults provoked: kills, full disks, damage, hostile files, …"
    return [(title, f"**{passed} of {count}** withstood", hardware(result))]


def _demo_headline(results: Results) -> list[Row]:
    rows = []
    for series, cores in (("demo-avx2", "two cores with AVX2"), ("demo", "two cores")):
        if (result := results.newest(series)) is not None:
            worst = min(_demo_top1(result, "trained encoder"))
            before = [
                f"{name} {100 * max(_demo_top1(result, name)):.1f} %" for name in ("raw pixels", "untrained encoder")
            ]
            text = f"**{100 * worst:.1f} %** after {_demo_minutes(result):.1f} minutes; {', '.join(before)}"
            title = f"kNN top-1 after `./millrace demo` on {cores}, worst of {len(result['rows'])} seeds"
            rows.append((title, text, hardware(result)))
    return rows


HEADLINES: tuple[Headline, ...] = (
    _crops_headline("ffcv", "two 224-px crops of an ImageNet JPEG (500 px)"),
    _crops_headline("decode-only", "decoding alone, for a GPU that crops"),
    _step_headline,
    _train_headline,
    _scaling_headline,
    _demo_headline,
    _reliability_headline,
)
"""Rows of the README's first table; those without a result are left out."""
CONDITIONS = """Rates of crops are per second of CPU time on one core; FFCV's loader decodes each JPEG twice, and the
official MoCo loader also changes colors. Ranks exchange over gloo."""


def study_table(results: Results) -> str:
    """Return kNN top-1 of the newest study of methods as Markdown, empty if there is none.

    Runs compared with a base have their difference from it.
    """
    result = results.newest("study-cifar10-cpu")
    if result is None:
        return ""
    compared = any("differences" in row for row in result["rows"])
    rows = []
    for row in result["rows"]:
        mean, deviation = row["knn"]["mean"], row["knn"]["deviation"]
        if mean is not None:
            spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
            values = row.get("differences", {}).get("knn")
            difference = f" {Difference(**values).in_points() if values else ''} |" * compared
            rows.append(f"| {row['name']} | {100 * mean:.1f}{spread} |{difference}")
    title = f"CIFAR-10, a few minutes of each on {result['device']}, mean ± deviation over seeds"
    heading = " against its base, points (95 % interval) |" * compared
    return "\n".join([f"| {title} | kNN top-1, % |{heading}", "|---|--:|" + "--:|" * compared, *rows])

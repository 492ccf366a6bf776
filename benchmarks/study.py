"""Methods, terms and seeds on one data set and one budget, one run after another, and what each came to.

    python -m benchmarks.study STUDY --train TRAIN --test TEST --out DIR [--at-once N] [--only NAME ...] [--seeds 0,1]
        [--launch "accelerate launch ..."] [--json F] [--markdown F] [--png F] [any setting of all runs]

STUDY is a file of `benchmarks/studies/`, by its name, or one like it: recipes, what they share, seeds, and how their
encoders are evaluated besides kNN. Runs lie in DIR, each in a folder of its own; given again, the command goes on where
it was. Peers are trained where they are installed, on the same files, by their authors' settings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine
from engine.report.compare import rates
from engine.report.plotting import LIGHT, draw_lines, sheet, style_of
from engine.report.run_folder import RunFiles, curve, number, read_runs
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command
from pipeline.system.limits import read_yaml

_HERE = Path(__file__).parent
_ROOT = _HERE.parent
_RECIPES = _ROOT / "engine" / "recipes"
COLUMNS = ("knn", "linear", "gap_midway", "gap", "seconds", "rate", "reached")
"""Figures of a run: kNN and linear top-1, the gap half-way and at the end, seconds of training, pairs a second, and
seconds of training until its kNN top-1 is what another run of the study ends with."""


@dataclass
class Study:
    """What is trained."""

    runs: dict[str, dict[str, Any]]
    """By name: `recipe`, of `engine/recipes/`, and `settings` over it."""
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    """Over all recipes, by their dotted names."""
    linear: list[str | int | float] = field(default_factory=list)
    """Options of `engine.evaluate linear`; none: kNN alone."""
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: `module`, of `benchmarks/` with `_moco` after it, and its options."""
    reach: str = ""
    """The run or peer whose last kNN top-1, the mean over seeds, others are timed to."""


@dataclass(frozen=True)
class Job:
    """One run of one seed."""

    name: str
    seed: int
    folder: Path
    train: list[str]
    evaluate: list[str]
    """Empty for no evaluation besides kNN."""

    @property
    def label(self) -> str:
        """As it is told."""
        return f"{self.name}, seed {self.seed}"


def load_study(name: str) -> Study:
    """Return the study of that name or file. Raises InputError."""
    path = _HERE / "studies" / f"{name}.yaml" if "/" not in name and not name.endswith(".yaml") else Path(name)
    known = ", ".join(sorted(file.stem for file in (_HERE / "studies").glob("*.yaml")))
    if not path.is_file():
        raise InputError(f"{name}: no such study: choose of {known}, or give a file like theirs")
    found = read_yaml(path, f"write it as {_HERE / 'studies'} has them")
    try:
        study = Study(**found)
        wrong = [name for name, run in study.runs.items() if not _makes_sense(run)]
        known_runs = {"", *study.runs, *study.peers}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a study ({error}): write runs, seeds, settings") from None
    if wrong:
        raise InputError(f"{path}: run {wrong[0]!r}: give a recipe of engine/recipes, and settings")
    if study.reach not in known_runs or not study.runs:
        raise InputError(f"{path}: not a study (no runs, or reach is none of them): write runs, seeds, settings")
    return study


def _makes_sense(run: dict[str, Any]) -> bool:
    return not set(run) - {"recipe", "settings"} and (_RECIPES / f"{run['recipe']}.yaml").is_file()


def jobs_of(study: Study, args: argparse.Namespace, rest: Sequence[str]) -> list[Job]:
    """Return all runs of a study, peers after the others, seed by seed."""
    seeds = machine.numbers(args.seeds, "--seeds", 0) if args.seeds else study.seeds
    names = args.only or [*study.runs, *study.peers]
    if unknown := set(names) - {*study.runs, *study.peers}:
        known = ", ".join((*study.runs, *study.peers))
        raise InputError(f"--only {sorted(unknown)[0]!r}: not of the study, which has {known}")
    found = []
    for seed in seeds:
        for name in names:
            folder = args.out / f"{name} {seed}".replace(" + ", "+").replace(" ", "-").replace("'", "")
            make = _run if name in study.runs else _peer
            found.append(make(study, name, seed, folder, args, rest))
    return [job for job in found if job is not None]


def _run(study: Study, name: str, seed: int, folder: Path, args: argparse.Namespace, rest: Sequence[str]) -> Job:
    run = study.runs[name]
    settings = {**study.settings, **run.get("settings", {})}
    train = [*shlex.split(args.launch), str(_ROOT / "engine" / "run.py")]
    train += ["--config", str(_RECIPES / f"{run['recipe']}.yaml")]
    train += ["--data.train", args.train, "--data.eval", args.test, "--seed", str(seed)]
    train += ["--out", str(folder), "--resume", "auto", "--data.workers", str(_threads(args))]
    train += [part for key, value in settings.items() for part in (f"--{key}", _written(value))]
    evaluate = [*shlex.split(args.launch), "-m", "engine.evaluate", "linear", str(folder), "--train", args.train]
    evaluate += ["--test", args.test, "--seed", str(seed), "--workers", str(_threads(args)), *map(str, study.linear)]
    return Job(name, seed, folder, [*train, *rest], evaluate if study.linear else [])


def _peer(
    study: Study, name: str, seed: int, folder: Path, args: argparse.Namespace, rest: Sequence[str]
) -> Job | None:
    options = dict(study.peers[name])
    module = options.pop("module")
    if importlib.util.find_spec(module) is None:
        return None
    train = [sys.executable, "-m", f"benchmarks.common.{module}_moco", "--train", args.train, "--test", args.test]
    train += ["--seed", str(seed), "--workers", str(_cores(args)), "--out", str(folder)]
    return Job(name, seed, folder, train + [part for k, v in options.items() for part in (f"--{k}", str(v))], [])


def _written(value: Any) -> str:
    """Return a setting's value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _cores(args: argparse.Namespace) -> int:
    return max(1, available_cores() // args.at_once)


def _threads(args: argparse.Namespace) -> int:
    """Return the threads of a run's loader; 0 where a launcher's processes share the cores out among themselves."""
    return _cores(args) if args.launch == sys.executable else 0


def carry_out(jobs: Sequence[Job], args: argparse.Namespace) -> dict[str, str]:
    """Train and evaluate what is not done, `at_once` at a time; return what went wrong, by the runs' labels."""
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    if threads := _threads(args):
        environment["OMP_NUM_THREADS"] = str(threads)
    with ThreadPoolExecutor(args.at_once) as pool:
        problems = list(pool.map(lambda job: _carry_out(job, environment), jobs))
    return {job.label: problem for job, problem in zip(jobs, problems, strict=True) if problem}


def _carry_out(job: Job, environment: dict[str, str]) -> str:
    """Do one job; return what went wrong, or nothing."""
    kept = [path for path in (job.folder / "evaluation").glob("linear*.json") if path.is_file()]
    summary = job.folder / "summary.json"
    for what, call, done in (
        ("training", job.train, summary.exists()),
        ("evaluation", job.evaluate, bool(kept) or not job.evaluate),
    ):
        if done:
            continue
        if what == "evaluation" and not summary.exists():
            return "training was stopped before its end"
        began, log = time.monotonic(), job.folder.with_name(f"{job.folder.name}.log")
        with log.open("a") as file:
            status = subprocess.run(call, stdout=file, stderr=file, env=environment, cwd=_ROOT, check=False).returncode
        said = "done" if not status else f"failed (status {status}, see {log})"
        print(f"{job.label}: {what} {said}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if status:
            return f"{what} failed: {_last_line(log)}"
    return ""


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error")), lines[-1] if lines else "no output")


def seconds_to(run: RunFiles, top1: float) -> float | None:
    """Return the seconds of training until kNN top-1 is first that, None where it never is."""
    lines, seconds = run.timed()
    for line, until in zip(lines, np.cumsum(seconds), strict=True):
        if line.get("knn_top1", -1.0) >= top1:
            return float(until)
    return None


def figures(run: RunFiles) -> dict[str, float | None]:
    """Return the `COLUMNS` of a run, None for what there is not; `reached` is for `gather` to say."""
    gap = curve(run.lines, "student_teacher_gap")
    half = gap.values[gap.epochs <= run.done / 2]
    taken = rates(run)
    linear = [found.get("top1") for found in run.evaluations if str(found.get("evaluation", "")).startswith("linear")]
    return {
        "knn": run.last("knn_top1"),
        "linear": number(linear[-1]) if linear else None,
        "gap_midway": float(half[-1]) if len(half) else None,
        "gap": float(gap.values[-1]) if len(gap.values) else None,
        "seconds": None if taken.hours is None else 3600 * taken.hours,
        "rate": taken.pairs_per_second,
        "reached": None,
    }


def gather(jobs: Sequence[Job], reach: str = "") -> list[dict[str, Any]]:
    """Return a row for each name: its seeds' figures, and mean and deviation (n - 1) of each over those that ended.

    reach: the row whose mean of the last kNN top-1 others are timed to.
    """
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[RunFiles]] = {}
    for job in jobs:
        row = rows.setdefault(job.name, {"name": job.name, "seeds": [], "every": [], "curve": []})
        if not (job.folder / "summary.json").exists():
            continue
        (run,) = read_runs([job.folder])
        row["seeds"].append(job.seed)
        row["every"].append(figures(run))
        runs.setdefault(job.name, []).append(run)
        row["curve"].append([array.tolist() for array in curve(run.lines, "knn_top1")])
    ends = [found["knn"] for found in rows[reach]["every"] if found["knn"] is not None] if reach in rows else []
    for row in rows.values():
        for found, run in zip(row["every"], runs.get(row["name"], []), strict=True):
            found["reached"] = seconds_to(run, float(np.mean(ends))) if ends else None
        for column in COLUMNS:
            values = [found[column] for found in row["every"] if found[column] is not None]
            row[column] = {
                "mean": float(np.mean(values)) if values else None,
                "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            }
    return list(rows.values())


_FORMS = {"knn": 100.0, "linear": 100.0, "gap_midway": 1.0, "gap": 1.0, "seconds": 1.0, "rate": 1.0, "reached": 1.0}
_DIGITS = {"knn": 1, "linear": 1, "gap_midway": 4, "gap": 4, "seconds": 0, "rate": 0, "reached": 1}


def _told(row: dict[str, Any], column: str) -> str:
    """Return a cell of the table, with how many seeds it is of where these are not all."""
    count = sum(found[column] is not None for found in row["every"])
    partly = f" ({count} of {len(row['seeds'])} seeds)" if column == "reached" and 0 < count < len(row["seeds"]) else ""
    return _cell(row[column], column) + partly


def _cell(found: dict[str, float | None], column: str) -> str:
    if found["mean"] is None:
        return "–"
    digits, factor = _DIGITS[column], _FORMS[column]
    text = f"{factor * found['mean']:.{digits}f}"
    return text if found["deviation"] is None else f"{text} ± {factor * found['deviation']:.{digits}f}"


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table of a result."""
    headings = ["", "seeds", "kNN top-1, %", "linear top-1, %", "gap midway", "gap", "training, s", "pairs/s"]
    headings += [f"s to {result['reach']}"] * bool(result["reach"])
    shown = COLUMNS if result["reach"] else COLUMNS[:-1]
    rows = [[row["name"], str(len(row["seeds"])), *(_told(row, column) for column in shown)] for row in result["rows"]]
    notes = [f"mean ± standard deviation over seeds; {result['at_once']} runs at a time on {result['device']}"]
    notes += [f"{name}: {problem}" for name, problem in result["problems"].items()]
    if result["left_out"]:
        notes.append(f"not installed, and left out: {', '.join(result['left_out'])}")
    return machine.Report(f"Study {result['study']}", headings, rows, notes)


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw kNN top-1 over epochs, the mean over seeds of each row, and what the rows ended with, to a PNG."""
    shown = [row for row in rows if row["curve"]]

    def over_epochs(axes: Any) -> None:
        for index, row in enumerate(shown):
            curves = [
                curve([{"epoch": e, "v": 100 * v} for e, v in zip(*one, strict=True)], "v") for one in row["curve"]
            ]
            draw_lines(axes, curves, style_of(LIGHT, index), label=row["name"], marked=True)
        axes.set(xlabel="epoch", ylabel="kNN top-1, %")

    def ends(axes: Any) -> None:
        for index, row in enumerate(shown):
            style = style_of(LIGHT, index)
            for key, marker in (("knn", style.marker), ("linear", "_")):
                values = [100 * one[key] for one in row["every"] if one[key] is not None]
                axes.plot([index] * len(values), values, marker, color=style.color, markersize=7)
        axes.set(ylabel="top-1, %", xticks=range(len(shown)))
        axes.set_xticklabels([row["name"] for row in shown], rotation=60, ha="right")

    out.parent.mkdir(parents=True, exist_ok=True)
    parts = [("while training", over_epochs), ("each seed: kNN (marks), linear (dashes)", ends)]
    out.write_bytes(sheet(parts, LIGHT, (5.4, 3.6), 2))


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description="Train and compare methods.")
    parser.add_argument("study", metavar="STUDY", help="name or file of a study")
    parser.add_argument("--train", required=True, metavar="DATA", help="labeled beton to train on")
    parser.add_argument("--test", required=True, metavar="DATA", help="labeled beton to test on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of all runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the study's runs (default: all)")
    parser.add_argument("--seeds", help="such as 0,1,2 (default: the study's)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time, which share the machine")
    parser.add_argument("--launch", default=sys.executable, help="starts runs and evaluations (default: this Python)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw curves and results here")
    machine.add_outputs(parser)
    return parser.parse_known_args()


@command
def main() -> int:
    args, rest = _arguments()
    if not 1 <= args.at_once <= available_cores():
        raise InputError(f"--at-once {args.at_once}: choose 1 to {available_cores()}, the cores here")
    args.out, about, study = args.out.resolve(), machine.describe(), load_study(args.study)
    args.train, args.test = (str(Path(path).resolve()) for path in (args.train, args.test))
    jobs = jobs_of(study, args, rest)
    problems = carry_out(jobs, args)
    left_out = sorted(set(args.only or study.peers) & set(study.peers) - {job.name for job in jobs})
    result = {
        "machine": about,
        "study": args.study,
        "arguments": rest,
        "at_once": args.at_once,
        "device": about["gpu"] or f"{about['cores']} cores",
        "reach": study.reach,
        "rows": gather(jobs, study.reach),
        "problems": problems,
        "left_out": left_out,
    }
    machine.tell(report(result), result, args)
    if args.png is not None:
        draw(result["rows"], args.png)
    return int(bool(problems))


if __name__ == "__main__":
    main()

"""Methods, terms and seeds on one data set and one budget: scores, differences, embeddings and time of each.

    python -m benchmarks.study STUDY --train TRAIN --test TEST --out DIR [--at-once N] [--only NAME ...] [--seeds 0,1]
        [--launch "accelerate launch ..."] [--json F] [--markdown F] [--png F] [any setting of all runs]

STUDY is a file of `benchmarks/studies/`, given by name, or a file like them: recipes, shared settings, seeds, and the
options of linear evaluation, if any. Runs that name their `base` are compared with it, seed by seed. Each run has a
folder in DIR; the same command again resumes unfinished ones.
Peers that are installed train on the same files with their authors' settings.
"""

import argparse
import importlib.util
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, numbers, yaml_file
from benchmarks.common.intervals import Difference, paired_difference
from benchmarks.common.study_report import COLUMNS, COMPARED, draw, report
from benchmarks.common.table import publish
from engine.report.compare import rates
from engine.report.run_folder import RunFiles, curve, number, read_runs
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command
from pipeline.system.files import write_json
from pipeline.system.limits import read_yaml

logger = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_ROOT = _HERE.parent
_CPU_SECONDS = "cpu_seconds.json"
_RECIPES = _ROOT / "engine" / "recipes"
_LAST = 0.2  # share of the epochs over which kNN's gain and the embeddings' measures are taken


@dataclass
class Study:
    """Runs to train and compare."""

    runs: dict[str, dict[str, Any]]
    """Each run's `recipe`, of `engine/recipes/`, `settings` that override it, and `base`, the run to compare it with,
    by name."""
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    """Overrides of all recipes, by dotted name."""
    linear: list[str | int | float] = field(default_factory=list)
    """Options of `engine.evaluate linear`; none: kNN alone."""
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each peer's `module`, for `benchmarks/common/MODULE_moco.py`, and its options, by name."""
    reach: str = ""
    """A run or peer. Others are timed until they reach its final kNN top-1, the mean over seeds."""


@dataclass(frozen=True)
class Job:
    """One run of one seed."""

    name: str
    seed: int
    folder: Path
    train: list[str]
    evaluate: list[str]
    """Empty: kNN alone."""

    @property
    def label(self) -> str:
        """Name and seed, for messages."""
        return f"{self.name}, seed {self.seed}"


def load_study(name: str) -> Study:
    """Return the study of a name or file. Raises InputError."""
    path = yaml_file(name, _HERE / "studies", "study")
    content = read_yaml(path, f"write it like those of {_HERE / 'studies'}")
    try:
        study = Study(**content)
        wrong = [name for name, run in study.runs.items() if not _is_run(run)]
        names = {"", *study.runs, *study.peers}
        bases = {name: run["base"] for name, run in study.runs.items() if not _has_base(name, run, study.runs)}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a study ({error}): write runs, seeds, settings") from None
    if wrong:
        raise InputError(f"{path}: run {wrong[0]!r}: give a recipe of engine/recipes, settings, and a base")
    if bases:
        name, base = next(iter(bases.items()))
        raise InputError(f"{path}: run {name!r}, base {base!r}: name another run of the study")
    if study.reach not in names or not study.runs:
        raise InputError(f"{path}: not a study (no runs, or reach is none of them): write runs, seeds, settings")
    return study


def _is_run(run: dict[str, Any]) -> bool:
    return not set(run) - {"recipe", "settings", "base"} and (_RECIPES / f"{run['recipe']}.yaml").is_file()


def _has_base(name: str, run: dict[str, Any], runs: Mapping[str, Any]) -> bool:
    """Return whether a run has no base, or another run."""
    return "base" not in run or (run["base"] in runs and run["base"] != name)


def jobs_of(study: Study, args: argparse.Namespace, rest: Sequence[str]) -> list[Job]:
    """Return the jobs of a study, seed by seed, peers last. Peers that are not installed are left out."""
    seeds = numbers(args.seeds, "--seeds", 0) if args.seeds else study.seeds
    names = args.only or [*study.runs, *study.peers]
    if unknown := set(names) - {*study.runs, *study.peers}:
        known = ", ".join((*study.runs, *study.peers))
        raise InputError(f"--only {sorted(unknown)[0]!r}: not in the study, which has {known}")
    jobs = []
    for seed in seeds:
        for name in names:
            folder = args.out / f"{name} {seed}".replace(" + ", "+").replace(" ", "-").replace("'", "")
            make = _run if name in study.runs else _peer
            jobs.append(make(study, name, seed, folder, args, rest))
    return [job for job in jobs if job is not None]


def _run(study: Study, name: str, seed: int, folder: Path, args: argparse.Namespace, rest: Sequence[str]) -> Job:
    run = study.runs[name]
    settings = {**study.settings, **run.get("settings", {})}
    train = [*shlex.split(args.launch), str(_ROOT / "engine" / "run.py")]
    train += ["--config", str(_RECIPES / f"{run['recipe']}.yaml")]
    train += ["--data.train", args.train, "--data.eval", args.test, "--seed", str(seed)]
    train += ["--out", str(folder), "--resume", "auto", "--data.workers", str(_threads(args))]
    train += [part for key, value in settings.items() for part in (f"--{key}", _as_argument(value))]
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


def _as_argument(value: Any) -> str:
    """Return a setting's value as a command-line argument."""
    return value if isinstance(value, str) else json.dumps(value)


def _cores(args: argparse.Namespace) -> int:
    return max(1, available_cores() // args.at_once)


def _threads(args: argparse.Namespace) -> int:
    """Return the loader threads of a run; 0 with a launcher, whose processes divide the cores themselves."""
    return _cores(args) if args.launch == sys.executable else 0


def run_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> dict[str, str]:
    """Train and evaluate unfinished jobs, `at_once` at a time; return the problems, by the jobs' labels."""
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    if threads := _threads(args):
        environment["OMP_NUM_THREADS"] = str(threads)
    with ThreadPoolExecutor(args.at_once) as pool:
        problems = list(pool.map(lambda job: _run_job(job, environment), jobs))
    return {job.label: problem for job, problem in zip(jobs, problems, strict=True) if problem}


def _run_job(job: Job, environment: dict[str, str]) -> str:
    """Train and evaluate, unless done before; return the problem, or an empty string."""
    summary, log = job.folder / "summary.json", job.folder.with_name(f"{job.folder.name}.log")
    evaluated = any(path.is_file() for path in (job.folder / "evaluation").glob("linear*.json"))
    for task, call, done in (
        ("training", job.train, summary.exists()),
        ("evaluation", job.evaluate, evaluated or not job.evaluate),
    ):
        if done:
            continue
        if task == "evaluation" and not summary.exists():
            return "training was stopped before its end"
        begin, fresh = time.monotonic(), task == "training" and not job.folder.exists()
        before = None if task == "evaluation" else 0.0 if fresh else _cpu_seconds(job.folder)
        if before is not None:
            (job.folder / _CPU_SECONDS).unlink(missing_ok=True)  # unknown if this process is killed meanwhile
        status, cpu_seconds = _call(call, log, environment)
        if before is not None and job.folder.exists():
            write_json(job.folder / _CPU_SECONDS, before + cpu_seconds)
        outcome = "done" if not status else f"failed (status {status}, see {log})"
        logger.info(f"{job.label}: {task} {outcome}, {time.monotonic() - begin:.0f} s")
        if status:
            return f"{task} failed: {_last_line(log)}"
    return ""


def _call(call: Sequence[str], log: Path, environment: dict[str, str]) -> tuple[int, float]:
    """Run a command, its output appended to `log`; return its status, and its CPU seconds with its children's."""
    with log.open("a") as file:
        process = subprocess.Popen(call, stdout=file, stderr=file, env=environment, cwd=_ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def _cpu_seconds(folder: Path) -> float | None:
    """Return the CPU seconds of a run's training, None where a process ended uncounted."""
    file = folder / _CPU_SECONDS
    return number(json.loads(file.read_text())) if file.is_file() else None


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error")), lines[-1] if lines else "no output")


def seconds_to(run: RunFiles, top1: float) -> float | None:
    """Return the seconds of training until kNN top-1 first reaches `top1`, None if it never does."""
    lines, seconds = run.timed()
    for line, until in zip(lines, np.cumsum(seconds), strict=True):
        if line.get("knn_top1", -1.0) >= top1:
            return float(until)
    return None


def figures(run: RunFiles) -> dict[str, float | None]:
    """Return the `COLUMNS` of a run, None for missing ones. `gather` fills in `reached`."""
    gap = curve(run.lines, "student_teacher_gap")
    first_half = gap.values[gap.epochs <= run.done / 2]
    speed = rates(run)
    linear = [row.get("top1") for row in run.evaluations if str(row.get("evaluation", "")).startswith("linear")]
    return {
        "knn": run.last("knn_top1"),
        "linear": number(linear[-1]) if linear else None,
        "gain": _gain(run),
        "gap_midway": float(first_half[-1]) if len(first_half) else None,
        "gap": float(gap.values[-1]) if len(gap.values) else None,
        "alignment": _late_mean(run, "alignment"),
        "uniformity": _late_mean(run, "uniformity"),
        "cpu": _cpu_seconds(run.path),
        "seconds": None if speed.hours is None else 3600 * speed.hours,
        "rate": speed.pairs_per_second,
        "reached": None,
    }


def _gain(run: RunFiles) -> float | None:
    """Return what kNN top-1 gained since the last evaluation before the last fifth of epochs."""
    epochs, values = curve(run.lines, "knn_top1")
    before = values[epochs <= (1 - _LAST) * run.epochs + 1e-6]
    return float(values[-1] - before[-1]) if len(before) else None


def _late_mean(run: RunFiles, key: str) -> float | None:
    """Return a metric's mean over the last fifth of epochs."""
    epochs, values = curve(run.lines, key)
    late = values[epochs > (1 - _LAST) * run.epochs + 1e-6]
    return float(late.mean()) if len(late) else None


def gather(jobs: Sequence[Job], reach: str = "", bases: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return a row for each name: figures of its finished seeds, and their means and deviations (n - 1).

    reach: as in `Study`. bases: names of runs to those of their bases; their rows also have `differences` from the
    base, by figure, over the seeds of both.
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
    mark = _mean([seed["knn"] for seed in rows[reach]["every"]]) if reach in rows else None
    for row in rows.values():
        for seed, run in zip(row["every"], runs.get(row["name"], []), strict=True):
            seed["reached"] = None if mark is None else seconds_to(run, mark)
        for column in COLUMNS:
            values = [seed[column] for seed in row["every"] if seed[column] is not None]
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[column] = {"mean": _mean(values), "deviation": deviation}
    for name, base in (bases or {}).items():
        if name in rows and base in rows:
            differences = {column: _difference(rows[name], rows[base], column) for column in COMPARED}
            rows[name] |= {"base": base, "differences": {key: asdict(d) for key, d in differences.items() if d}}
    return list(rows.values())


def _difference(row: dict[str, Any], base: dict[str, Any], column: str) -> Difference | None:
    """Return the difference of a figure between two rows, over the seeds that have it in both."""
    values, others = (
        {seed: every[column] for seed, every in zip(each["seeds"], each["every"], strict=True)} for each in (row, base)
    )
    seeds = [seed for seed, value in values.items() if value is not None and others.get(seed) is not None]
    return paired_difference([values[seed] for seed in seeds], [others[seed] for seed in seeds])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("study", "Train and compare methods.")
    parser.add_argument("study", metavar="STUDY", help="name or file of a study")
    parser.add_argument("--train", required=True, metavar="DATA", help="labeled beton to train on")
    parser.add_argument("--test", required=True, metavar="DATA", help="labeled beton to test on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the study's runs (default: all)")
    parser.add_argument("--seeds", help="such as 0,1,2 (default: the study's)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time, which share the machine")
    parser.add_argument("--launch", default=sys.executable, help="starts runs and evaluations (default: this Python)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw curves and results here")
    return parser


@command
def main() -> int:
    args, rest = parser().parse_known_args()
    if not 1 <= args.at_once <= available_cores():
        raise InputError(f"--at-once {args.at_once}: choose 1 to {available_cores()}, the cores here")
    args.out, about, study = args.out.resolve(), machine.describe(), load_study(args.study)
    args.train, args.test = (str(Path(path).resolve()) for path in (args.train, args.test))
    jobs = jobs_of(study, args, rest)
    problems = run_jobs(jobs, args)
    rows = gather(jobs, study.reach, {name: run["base"] for name, run in study.runs.items() if "base" in run})
    publish(
        report,
        args,
        machine=about,
        study=args.study,
        arguments=rest,
        at_once=args.at_once,
        device=about["gpu"] or f"{about['cores']} cores",
        settings=study.settings,
        runs=study.runs,
        reach=study.reach,
        rows=rows,
        problems=problems,
        left_out=sorted(set(args.only or study.peers) & set(study.peers) - {job.name for job in jobs}),
    )
    if args.png is not None:
        draw(rows, args.png)
    return int(bool(problems))


if __name__ == "__main__":
    main()

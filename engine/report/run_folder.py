"""What a run folder says of itself, read in whatever state it is: unfinished, damaged in part, or somebody else's."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from engine.config.cli import flat
from engine.config.renamed import translate
from pipeline.system.errors import InputError, describe_error
from pipeline.system.limits import RESULT_BYTES, SETTINGS_BYTES, open_regular, parse_yaml

_LARGEST = {".yaml": SETTINGS_BYTES, ".jsonl": 1 << 30, ".json": RESULT_BYTES}  # bytes: more is no such file
Line = dict[str, float]


@dataclass
class RunFiles:
    """A run folder's text files."""

    path: Path
    name: str = ""
    """Short, and no other run's of those that are shown."""
    recipe: str = ""
    """Its config.yaml."""
    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted names; empty where they cannot be read."""
    lines: list[Line] = field(default_factory=list)
    """Of metrics.jsonl."""
    summary: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """A sentence for each thing that is not there or cannot be read."""

    @property
    def epochs(self) -> float:
        """Epochs to train; 0 where that is not known."""
        return number(self.settings.get("optim.epochs")) or 0.0

    @property
    def done(self) -> float:
        """Epochs trained, by the last line of metrics."""
        return self.lines[-1]["epoch"] if self.lines else 0.0

    @property
    def finished(self) -> bool:
        """Whether it was trained to its last epoch."""
        return bool(self.epochs) and self.done >= self.epochs

    def timed(self) -> tuple[list[Line], np.ndarray]:
        """Return the lines that say how fast training was, and the seconds of training since the line before, [n].

        A line's rate is taken to be that of all steps since the line before. Both are empty where that cannot be.
        """
        batch = number(self.settings.get("data.batch"))
        lines = [line for line in self.lines if line.get("pairs_per_second", 0) > 0]
        steps = np.diff([line["step"] for line in lines], prepend=0.0)
        if not batch or not lines or (steps < 0).any():
            return [], np.zeros(0)
        return lines, batch * steps / np.array([line["pairs_per_second"] for line in lines])

    def last(self, key: str) -> float | None:
        """Return the newest value of a metric."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)


class Curve(NamedTuple):
    """Values of a metric over epochs, [n] each."""

    epochs: np.ndarray
    values: np.ndarray


def curve(lines: Sequence[Line], key: str) -> Curve:
    """Return a metric over epochs, from those lines that have it."""
    found = [(line["epoch"], line[key]) for line in lines if key in line]
    return Curve(*np.array(found).reshape(-1, 2).T)


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Return the runs in those folders, each once, under names that tell them apart. Raises InputError."""
    resolved = list(dict.fromkeys(path.resolve() for path in paths if _is_run(path)))
    runs = [_read(path) for path in resolved]
    for run, name in zip(runs, _names(resolved), strict=True):
        run.name = name
    return runs


def _is_run(path: Path) -> bool:
    """Return whether there is a run at `path`. Raises InputError where there is none."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder: give the run folder that training wrote (its --out)")
    if not any((path / part).exists() for part in ("config.yaml", "metrics.jsonl", "checkpoints")):
        raise InputError(
            f"{path}: is no run: it has neither config.yaml nor metrics.jsonl nor checkpoints: give the folder that "
            "training wrote (its --out)"
        )
    return True


def _read(path: Path) -> RunFiles:
    run = RunFiles(path)
    _read_settings(run)
    run.lines, problem = read_metrics(path / "metrics.jsonl")
    run.missing += [problem] if problem else []
    if (path / "summary.json").exists():
        run.summary = _read_object(run, path / "summary.json")
    for file in sorted((path / "evaluation").glob("*.json")):
        if "evaluation" in (found := _read_object(run, file)):
            run.evaluations.append(found)
    if run.lines and run.epochs and not run.finished:
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / "metrics.jsonl").stat().st_mtime))
        run.missing.append(f"Training has not ended: it was at epoch {run.done:.2f} of {run.epochs:g} at {written}.")
    return run


def _read_settings(run: RunFiles) -> None:
    """Read config.yaml."""
    file = run.path / "config.yaml"
    try:
        run.recipe = _text(file)
        run.settings = flat(translate(parse_yaml(run.recipe)))
    except FileNotFoundError:
        run.missing.append("There is no config.yaml, and so no settings to compare.")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        run.missing.append(f"config.yaml cannot be read ({describe_error(error)}).")


def _read_object(run: RunFiles, file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`, empty where there is none, of which the run then says so."""
    try:
        found = mapping(_text(file))
        problem = "" if found else "it is not a whole JSON object"
    except (OSError, ValueError) as error:
        found, problem = {}, describe_error(error)
    if problem:
        run.missing.append(f"{file.relative_to(run.path)} cannot be read ({problem}).")
    return found


def read_metrics(path: Path) -> tuple[list[Line], str]:
    """Return the lines of a metrics.jsonl, as far as they are numbers, and a sentence on what is wrong with it."""
    try:
        text = _text(path)
    except FileNotFoundError:
        return [], "There is no metrics.jsonl: nothing has been logged yet."
    except (OSError, ValueError) as error:
        return [], f"metrics.jsonl cannot be read ({describe_error(error)})."
    rows = text.split("\n")
    found = [_line(row) for row in rows if row.strip()]
    lines = [line for line in found if line is not None]
    cut = bool(found) and found[-1] is None and bool(rows[-1])
    broken = len(found) - len(lines) - cut
    problems = [f"{broken} lines of metrics.jsonl cannot be read, and are left out."] * bool(broken)
    problems += ["The last line of metrics.jsonl is cut off: it is being written, or its writing was ended."] * cut
    if not found:
        problems = ["metrics.jsonl is empty: nothing has been logged yet."]
    return lines, " ".join(problems)


def _line(row: str) -> Line | None:
    """Return the finite numbers of a line, None where it is none of metrics."""
    line = {str(key): value for key, given in mapping(row).items() if (value := number(given)) is not None}
    return line if line.get("epoch", -1) >= 0 and line.get("step", -1) >= 0 else None


def mapping(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`, empty where there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _text(file: Path) -> str:
    """Return a file's text. Raises OSError, and ValueError where it is too large for what it is."""
    with open_regular(file) as opened:
        most = _LARGEST[file.suffix]
        found = opened.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes")
    return found.decode("utf-8", "replace")


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    longest = max((len(path.parts) for path in paths), default=1)
    for count in range(1, longest + 1):
        found = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(found)) == len(found):
            break
    return found

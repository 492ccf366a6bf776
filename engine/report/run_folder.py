"""Text files of a run folder, read in any state: unfinished, partly damaged, or of untrusted origin."""

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

_MAX_BYTES = {".yaml": SETTINGS_BYTES, ".jsonl": 1 << 30, ".json": RESULT_BYTES}
Line = dict[str, float]


@dataclass
class RunFiles:
    """The text files of a run folder."""

    path: Path
    name: str
    """Short, and unique among the runs shown."""
    recipe: str = ""
    """Text of config.yaml."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings by dotted name; empty if unreadable."""
    lines: list[Line] = field(default_factory=list)
    """Lines of metrics.jsonl."""
    summary: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """A sentence on each missing or unreadable part."""

    @property
    def epochs(self) -> float:
        """Epochs to train; 0 if unknown."""
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
        """Return the lines with a training rate, and the seconds of training since the previous such line, [n].

        A line's rate counts for all steps since the previous one. Both are empty without rates, batch or ordered steps.
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
    """Return a metric over epochs, from the lines that have it."""
    points = [(line["epoch"], line[key]) for line in lines if key in line]
    return Curve(*np.array(points).reshape(-1, 2).T)


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Return the runs in these folders, without duplicates, under distinct names. Raises InputError."""
    resolved = list(dict.fromkeys(path.resolve() for path in paths if _is_run(path)))
    return [_read(path, name) for path, name in zip(resolved, _names(resolved), strict=True)]


def _is_run(path: Path) -> bool:
    """Return True for a run folder. Raises InputError for anything else."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder: give the run folder that training wrote (its --out)")
    if not any((path / part).exists() for part in ("config.yaml", "metrics.jsonl", "checkpoints")):
        raise InputError(
            f"{path}: not a run folder: it contains neither config.yaml nor metrics.jsonl nor checkpoints: give the "
            "folder that training wrote (its --out)"
        )
    return True


def _read(path: Path, name: str) -> RunFiles:
    run = RunFiles(path, name)
    _read_settings(run)
    run.lines, problem = read_metrics(path / "metrics.jsonl")
    run.problems += [problem] if problem else []
    if (path / "summary.json").exists():
        run.summary = _read_object(run, path / "summary.json")
    for file in sorted((path / "evaluation").glob("*.json")):
        if "evaluation" in (result := _read_object(run, file)):
            run.evaluations.append(result)
    if run.lines and run.epochs and not run.finished:
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / "metrics.jsonl").stat().st_mtime))
        run.problems.append(f"Training has not ended: at epoch {run.done:.2f} of {run.epochs:g} at {written}.")
    return run


def _read_settings(run: RunFiles) -> None:
    """Read config.yaml."""
    file = run.path / "config.yaml"
    try:
        run.recipe = _text(file)
        run.settings = flat(translate(parse_yaml(run.recipe)))
    except FileNotFoundError:
        run.problems.append("There is no config.yaml, so no settings to compare.")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        run.problems.append(f"config.yaml cannot be read ({describe_error(error)}).")


def _read_object(run: RunFiles, file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; empty, with a problem noted in the run, if there is none."""
    try:
        document = mapping(_text(file))
        problem = "" if document else "it is not a complete JSON object"
    except (OSError, ValueError) as error:
        document, problem = {}, describe_error(error)
    if problem:
        run.problems.append(f"{file.relative_to(run.path)} cannot be read ({problem}).")
    return document


def read_metrics(path: Path) -> tuple[list[Line], str]:
    """Return the valid lines of a metrics.jsonl, and a sentence on its problems, empty if there are none."""
    try:
        text = _text(path)
    except FileNotFoundError:
        return [], "There is no metrics.jsonl: nothing has been logged yet."
    except (OSError, ValueError) as error:
        return [], f"metrics.jsonl cannot be read ({describe_error(error)})."
    rows = text.split("\n")
    parsed = [_line(row) for row in rows if row.strip()]
    lines = [line for line in parsed if line is not None]
    cut = bool(parsed) and parsed[-1] is None and bool(rows[-1])
    broken = len(parsed) - len(lines) - cut
    problems = [f"{broken} lines of metrics.jsonl cannot be read and are left out."] * bool(broken)
    problems += ["The last line of metrics.jsonl is cut off: writing it is in progress, or was interrupted."] * cut
    if not parsed:
        problems = ["metrics.jsonl is empty: nothing has been logged yet."]
    return lines, " ".join(problems)


def _line(row: str) -> Line | None:
    """Return the finite numbers of a line, or None for any other JSON."""
    line = {key: value for key, field in mapping(row).items() if (value := number(field)) is not None}
    return line if line.get("epoch", -1) >= 0 and line.get("step", -1) >= 0 else None


def mapping(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`, empty if there is none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _text(file: Path) -> str:
    """Return a file's text. Raises OSError, and ValueError for a file too large for its kind."""
    with open_regular(file) as opened:
        limit = _MAX_BYTES[file.suffix]
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return content.decode("utf-8", "replace")


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct ends of the paths."""
    longest = max((len(path.parts) for path in paths), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names

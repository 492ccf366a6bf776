"""What a run withstands: every fault of the table provoked by its tests, with the figure that each came to.

    python -m benchmarks.reliability [--quick] [--json OUT] [--markdown OUT] [arguments of pytest]

Runs the tests marked `reliability`, the slow ones too unless `--quick`, and makes the table from what they themselves
recorded. Exit status 1 where a test failed, or a fault was not provoked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.common import machine
from pipeline.system.errors import InputError, command

EXPECTED = {
    "stop and resume in a new process, mid-epoch and at its end, 1 and 2 ranks": "all state and losses equal",
    "SIGKILL of the whole tree at 20 random times": "final state hash as undisturbed",
    "kill after every file operation of a save": "newest whole checkpoint found, earlier bytes untouched",
    "no space, I/O error in a save": "loud, training goes on, previous loads",
    "200 random flips and truncations of checkpoint files": "bad file named, previous used",
    "each state file deleted or junk": "refused, no silent load",
    "SIGTERM to the launcher, to the child; SIGUSR1 at different steps": "one whole checkpoint, same step on all ranks,"
    " no orphan, under 10 s",
    "SIGKILL of one rank; SIGSTOP of one rank": "others end, rank and step named: in 5 s; timeout (6 s) + 2 s",
    "loader worker raises; loader stalls": "error with sample id in 1 s; watchdog at its limit, 10 % more or less",
    "1, 5, 50 damaged records": "verify lists exactly these; policy error refuses, policy skip gives the same "
    "substitutes on 1 and 2 ranks",
    "NaN on one rank in one step": "all skip, everything bit-equal",
    "10,000 clean losses; a 10σ spike": "no false alarm; all caught",
    "10,000 clean losses of skewed noise; a 10σ spike": "no false alarm; 60 % caught",
    "hostile pickle in every slot; path traversal, bomb, YAML tag, forged beton": "refused with a message: nothing "
    "executed, no crash, no read out of bounds",
    "resume with each setting changed": "difference printed, refused or allowed as listed",
    "100 start–kill cycles": "no growth of files, memory, /dev/shm, processes",
    "overhead of guard and checkpointing": "of a step, the guard's and a checkpoint's under 1 %",
}
"""By the fault that tests record, what is to happen."""


@dataclass
class Outcome:
    """What the tests of one fault came to."""

    fault: str
    expected: str
    figures: list[str] = field(default_factory=list)
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    """Names of tests."""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.failed:
            return f"failed: {', '.join(self.failed)}"
        return "as expected" if self.passed else "not provoked"


def outcomes(report: Path) -> list[Outcome]:
    """Return the faults of the table, and others that tests recorded, from pytest's report (JUnit XML)."""
    found = {fault: Outcome(fault, expected) for fault, expected in EXPECTED.items()}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        failed = case.find("failure") is not None or case.find("error") is not None
        told = list(_told(case))
        for fault, figure in told or [("(a test that failed before it recorded a fault)", "")] * failed:
            outcome = found.setdefault(fault, Outcome(fault, ""))
            if figure:
                outcome.figures.append(figure)
            if failed:
                outcome.failed.append(name)
            else:
                outcome.passed += 1
    return list(found.values())


def _told(case: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Yield the faults that a test recorded, each with the figure that follows it."""
    fault = ""
    for item in case.iter("property"):
        name, value = item.get("name"), item.get("value", "")
        if name == "fault":
            fault = value
        elif name == "figure" and fault:
            yield fault, value


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table of a result."""
    rows = [
        [found["fault"], found["expected"], "; ".join(found["figures"]) or "none", found["verdict"]]
        for found in result["faults"]
    ]
    counts = result["tests"]
    notes = [f"{counts['passed']} tests passed, {counts['failed']} failed, in {result['seconds']:.0f} s"]
    if result["quick"]:
        notes.append("without the slow tests")
    return machine.Report("Reliability", ["fault", "expected", "found", ""], rows, notes)


@command
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description="Provoke every fault.")
    parser.add_argument("--quick", action="store_true", help="leave out the slow tests")
    machine.add_outputs(parser)
    args, rest = parser.parse_known_args()
    about, root = machine.describe(), Path(__file__).parents[1]
    if not (root / "tests").is_dir():
        raise InputError(f"{root}: has no tests: run this from a clone of the repository")
    marks = "reliability and not slow" if args.quick else "reliability"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        call = [sys.executable, "-m", "pytest", "-m", marks, f"--junitxml={xml}", "-o", "junit_family=xunit1", *rest]
        alone = {"OMP_NUM_THREADS": "1"}  # as ./millrace test has it: processes are many, and some are forked
        subprocess.run(call, cwd=root, check=False, env=alone | os.environ)
        if not xml.exists():
            raise InputError("pytest wrote no report: see above")
        found = outcomes(xml)
    failed = sorted({name for outcome in found for name in outcome.failed})
    result = {
        "machine": about,
        "quick": args.quick,
        "seconds": time.perf_counter() - began,
        "faults": [asdict(outcome) | {"verdict": outcome.verdict} for outcome in found],
        "tests": {"passed": sum(outcome.passed for outcome in found), "failed": len(failed)},
    }
    machine.tell(report(result), result, args)
    return int(any(outcome.failed or not outcome.passed for outcome in found))


if __name__ == "__main__":
    main()

"""Fault tolerance: the tests of every fault in the table, and the figure that each measured.

    python -m benchmarks.reliability [--quick] [--json OUT] [--markdown OUT] [arguments of pytest]

Runs the tests marked `reliability`, the slow ones too unless `--quick`, and makes the table from the faults and figures
that they record. Exit status 1 if a test failed or a fault was not provoked.
"""

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
from benchmarks.common.command_line import ArgumentParser, benchmark_parser
from benchmarks.common.table import Report, publish
from pipeline.system.errors import InputError, command

EXPECTED = {
    "stop and resume in a new process, mid-epoch and at its end, 1 and 2 ranks": "all state and losses equal",
    "SIGKILL of the whole tree at 20 random times": "final state hash as undisturbed",
    "kill after every file operation of a save": "newest intact checkpoint loads, earlier ones unchanged",
    "no space, I/O error in a save": "warning, training continues, the previous checkpoint loads",
    "200 random flips and truncations of checkpoint files": "bad file named, the previous checkpoint loads",
    "each state file deleted or junk": "refused with an error",
    "SIGTERM to the launcher, to the child; SIGUSR1 at different steps": "one intact checkpoint, same step on all "
    "ranks, no orphan, under 10 s",
    "SIGKILL of one rank; SIGSTOP of one rank": "other ranks end, rank and step named: in 5 s; timeout (6 s) + 2 s",
    "loader worker raises; loader stalls": "error with sample id in 1 s; watchdog at its limit, ± 10 %",
    "1, 5, 50 damaged records": "verify lists exactly these; on_bad error raises, on_bad skip takes the same "
    "substitutes on 1 and 2 ranks",
    "NaN on one rank in one step": "all ranks skip the step, state bit-equal",
    "10,000 clean losses; a 10σ spike": "no false alarm; all caught",
    "10,000 clean losses of skewed noise; a 10σ spike": "no false alarm; 60 % caught",
    "hostile pickle in every slot; path traversal, bomb, YAML tag, forged beton": "refused with a message: nothing "
    "executed, no crash, no read out of bounds",
    "resume with each setting changed": "difference printed; refused or allowed as documented",
    "100 start–kill cycles": "no growth of files, memory, /dev/shm, processes",
    "overhead of guard and checkpointing": "each under 1 % of a step",
}
"""Expected behavior, by the fault that tests record."""


@dataclass
class Outcome:
    """Results of the tests of one fault."""

    fault: str
    expected: str
    figures: list[str] = field(default_factory=list)
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    """Names of failed tests."""

    @property
    def verdict(self) -> str:
        """as expected, failed or not provoked."""
        if self.failed:
            return f"failed: {', '.join(self.failed)}"
        return "as expected" if self.passed else "not provoked"


def outcomes(report: Path) -> list[Outcome]:
    """Return the table's faults, and others that tests recorded, from pytest's report (JUnit XML)."""
    by_fault = {fault: Outcome(fault, expected) for fault, expected in EXPECTED.items()}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        failed = case.find("failure") is not None or case.find("error") is not None
        recorded = list(_recorded(case))
        for fault, figure in recorded or [("(a test that failed before it recorded a fault)", "")] * failed:
            outcome = by_fault.setdefault(fault, Outcome(fault, ""))
            if figure:
                outcome.figures.append(figure)
            if failed:
                outcome.failed.append(name)
            else:
                outcome.passed += 1
    return list(by_fault.values())


def _recorded(case: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Yield the faults that a test recorded, each with the figure after it."""
    fault = ""
    for item in case.iter("property"):
        name, value = item.get("name"), item.get("value", "")
        if name == "fault":
            fault = value
        elif name == "figure" and fault:
            yield fault, value


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows = [
        [row["fault"], row["expected"], "; ".join(row["figures"]) or "none", row["verdict"]] for row in result["faults"]
    ]
    counts = result["tests"]
    notes = [f"{counts['passed']} tests passed, {counts['failed']} failed, in {result['seconds']:.0f} s"]
    if result["quick"]:
        notes.append("without the slow tests")
    return Report("Reliability", ["fault", "expected", "measured", ""], rows, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("reliability", "Provoke every fault.")
    quick = "leave out the slow tests"
    parser.add_argument("--quick", action=argparse.BooleanOptionalAction, default=False, help=quick)
    return parser


@command
def main() -> int:
    args, rest = parser().parse_known_args()
    about, root = machine.describe(), Path(__file__).parents[1]
    if not (root / "tests").is_dir():
        raise InputError(f"{root}: has no tests: run this from a clone of the repository")
    marks = "reliability and not slow" if args.quick else "reliability"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        call = [sys.executable, "-m", "pytest", "-m", marks, f"--junitxml={xml}", "-o", "junit_family=xunit1", *rest]
        # one thread, as in ./millrace test: processes are many, and some are forked
        subprocess.run(call, cwd=root, check=False, env={"OMP_NUM_THREADS": "1"} | os.environ)
        if not xml.exists():
            raise InputError("pytest wrote no report: see above")
        faults = outcomes(xml)
    failed = {name for outcome in faults for name in outcome.failed}
    counts = {"passed": sum(outcome.passed for outcome in faults), "failed": len(failed)}
    rows = [asdict(outcome) | {"verdict": outcome.verdict} for outcome in faults]
    seconds = time.perf_counter() - begin
    publish(report, args, machine=about, quick=args.quick, seconds=seconds, faults=rows, tests=counts)
    return int(any(outcome.failed or not outcome.passed for outcome in faults))


if __name__ == "__main__":
    main()

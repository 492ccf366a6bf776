"""The fault table: recorded figures, and failed tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.reliability import EXPECTED, Outcome, outcomes, report

SUITE = """
import pytest

FIRST, SECOND = {faults!r}

@pytest.mark.parametrize("number", [1, 2])
def test_holds(number, record_property):
    record_property("fault", FIRST)
    record_property("figure", f"{{number}} of 2")

def test_fails(record_property):
    record_property("fault", SECOND)
    record_property("figure", "199/200")
    raise AssertionError

def test_fails_early(record_property):
    raise AssertionError

@pytest.mark.skip
def test_skipped(record_property):
    pass
"""


def test_the_table_has_the_recorded_faults_and_figures(tmp_path: Path) -> None:
    first, second, *others = EXPECTED
    (tmp_path / "test_suite.py").write_text(SUITE.format(faults=(first, second)))
    xml = tmp_path / "report.xml"
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", str(tmp_path)]
    subprocess.run([*call, "-o", "junit_family=xunit1"], cwd=tmp_path, capture_output=True, check=False)
    by_fault = {outcome.fault: outcome for outcome in outcomes(xml)}
    assert list(by_fault)[:-1] == list(EXPECTED)
    assert by_fault[first] == Outcome(first, EXPECTED[first], ["1 of 2", "2 of 2"], 2)
    assert by_fault[first].verdict == "as expected"
    assert by_fault[second].figures == ["199/200"]
    assert by_fault[second].verdict == "failed: test_suite::test_fails"
    assert {by_fault[fault].verdict for fault in others} == {"not provoked"}
    early = list(by_fault.values())[-1]
    assert early.failed == ["test_suite::test_fails_early"]
    faults = [vars(outcome) | {"verdict": outcome.verdict} for outcome in by_fault.values()]
    result = {"faults": faults, "tests": {"passed": 2, "failed": 2}, "seconds": 1.0, "quick": True}
    assert report(result).rows[0] == [first, EXPECTED[first], "1 of 2; 2 of 2", "as expected"]

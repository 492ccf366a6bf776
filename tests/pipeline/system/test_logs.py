"""Tests of log lines."""

from __future__ import annotations

import errno
import logging
import sys

import pytest

from pipeline.system import logs


@pytest.fixture(autouse=True)
def configured() -> None:
    logs.configure()
    logs.configure()


def test_a_line_is_written_once_after_its_level(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("pipeline.somewhere")
    logger.info("resumed from %s", "step_00000004")
    logger.warning("records were skipped")
    logger.debug("left out")
    assert capsys.readouterr() == ("", "resumed from step_00000004\nwarning: records were skipped\n")


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("engine").info("\x1b[2J name")
    assert capsys.readouterr().err == "\\x1b[2J name\n"


class _Full:
    """A stream on a disk that fails with `number`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, "no")

    def flush(self) -> None:
        """Nothing was written."""


def test_a_full_disk_drops_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(sys, "stderr", _Full(errno.ENOSPC))
    logging.getLogger("pipeline").info("lost")


def test_other_loggers_are_not_configured(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("someone_elses").info("nothing")
    assert capsys.readouterr().err == ""

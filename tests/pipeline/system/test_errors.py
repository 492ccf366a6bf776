"""Tests of error lines and exit codes."""

from __future__ import annotations

import errno
import logging

import pytest

from pipeline.system.errors import InputError, RunFailed, command, report


def test_an_error_line_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(InputError("a\x1b[31mb\x9bc\x07 d\udce9 größe\u3000猫\u202e\n e"), 2) == 2
    assert capsys.readouterr().err == "error: a\\x1b[31mb\\x9bc\\x07 d\\udce9 größe 猫\\u202e e\n"


def test_other_ranks_add_their_number_unless_rank_0_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    error = RunFailed("lost")
    assert report(error, 1) == 1
    assert capsys.readouterr().err == "error in rank 3: lost\n"
    error.reported = True  # type: ignore[attr-defined]
    assert report(error, 1) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("result", "status", "line"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (InputError("x: mend it"), 2, "error: x: mend it\n"),
        (RunFailed("lost"), 1, "error: lost\n"),
        (OSError(errno.ENOSPC, "No space left", "/x"), 1, "error: /x: No space left: make room, and give the same"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_command_has_its_exit_codes_and_logs_to_stderr(
    result: BaseException | int | None, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int | None:
        logging.getLogger("pipeline.somewhere").warning("logged")
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as ended:
        command(main)()
    assert (ended.value.code or 0) == status
    assert capsys.readouterr().err.startswith(f"warning: logged\n{line}")

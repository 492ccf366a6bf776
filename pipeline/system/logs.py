"""Log lines on stderr: information plain, anything worse after its level.

Modules log through `logging.getLogger(__name__)`; those of `engine` that run on several ranks through
`accelerate.logging.get_logger(__name__)`. Commands call `configure`. A program that imports the packages decides about
their log itself.
"""

import logging
import sys

from pipeline.system.files import DISK_ERRORS
from pipeline.system.text import printable

_LOGGERS = ("pipeline", "methods", "engine", "benchmarks", "__main__")


class _StderrHandler(logging.Handler):
    """Writes above any progress bar. A line that a full disk refuses is dropped: the run matters more than its log."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        message = record.getMessage().removeprefix("[RANK 0] ")  # which accelerate.logging adds
        line = printable(f"{level}{message}")
        try:
            progress = sys.modules.get("pipeline.system.progress")  # without it there is no bar, and no need of tqdm
            (progress.tqdm.write if progress else print)(line, file=sys.stderr)
            sys.stderr.flush()
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                self.handleError(record)


_HANDLER = _StderrHandler()


def configure() -> None:
    """Send the log lines of this project's packages to stderr. May be called again."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if _HANDLER not in logger.handlers:
            logger.addHandler(_HANDLER)

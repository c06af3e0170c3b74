"""The logger `lark`: everything into run.log, a few lines on the console.

    logger.info(...)            run.log; the console too with verbose=true
    announce("pool", "...")     a stage's one line, on the console and in run.log
    logger.warning(...)         begins with `!` on the console; says the consequence and the remedy

Only rank 0 logs. Without `open_log` (the Python interface) the logger behaves as any library's.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

ANNOUNCE = 25
"""Between INFO and WARNING."""
logging.addLevelName(ANNOUNCE, "ANNOUNCE")
logger = logging.getLogger("lark")


def announce(stage: str, text: str) -> None:
    """Log `text` as the console's line about `stage`."""
    logger.log(ANNOUNCE, "%-10s %s", stage, text)


class _ConsoleHandler(logging.Handler):
    """Lines on stdout, warnings on stderr, between the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        stream = sys.stderr if is_warning else sys.stdout
        with tqdm.external_write_mode(file=stream):
            stream.write(f"{'! ' if is_warning else ''}{record.getMessage()}\n")
            stream.flush()


@contextmanager
def open_log(folder: Path | None, *, verbose: bool = False) -> Iterator[None]:
    """Send what is logged inside the block to the console and, with a folder, to its run.log (appended to)."""
    before = (logger.level, logger.propagate, list(logger.handlers))
    handlers: list[logging.Handler] = []
    if getattr(rank_zero_only, "rank", 0) == 0:
        console = _ConsoleHandler(logging.INFO if verbose else ANNOUNCE)
        handlers.append(console)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(folder / "run.log", encoding="utf-8", delay=True)
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s"))
            handlers.append(file)
    logger.handlers[:] = handlers or [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            handler.close()
        logger.level, logger.propagate = before[0], before[1]
        logger.handlers[:] = before[2]

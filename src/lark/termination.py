"""SIGTERM, by which a scheduler says that the machine is about to be taken away: the process ends with exit code 143,
and in training not before its last step is saved. Lightning's own handling is set aside: it talks to other ranks from
inside the handler, at whatever point each of them happens to be.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

EXIT_CODE = 128 + signal.SIGTERM


class TerminatedError(SystemExit):
    """SIGTERM has come."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class _Signal:
    """There is one a process."""

    terminable = False
    asked = False
    waits = False
    launchers: list[Any] = []  # noqa: RUF012


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises TerminatedError, at once or when training is ready for it."""
    before = signal.getsignal(signal.SIGTERM)
    _Signal.terminable = True
    _take_over()
    try:
        yield
    finally:
        _Signal.terminable = _Signal.asked = _Signal.waits = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def asked() -> bool:
    """Whether SIGTERM has come and has not been obeyed yet."""
    return _Signal.asked


def wait() -> None:
    """From here on SIGTERM is noted only (see `asked`)."""
    _Signal.waits = True


def go_on() -> None:
    """The end of `wait`. Raises TerminatedError if SIGTERM has come meanwhile."""
    _Signal.waits = False
    if _Signal.asked:
        raise TerminatedError


def stop_waiting() -> None:
    """The end of `wait` on the way out of an error."""
    _Signal.waits = False


def _take_over() -> None:
    if threading.current_thread() is threading.main_thread():  # others get no signals
        signal.signal(signal.SIGTERM, _note)


def _note(signum: int, frame: Any) -> None:
    if _Signal.asked:  # schedulers repeat themselves
        return
    _Signal.asked = True
    for launcher in _Signal.launchers:
        launcher.kill(signum)  # the ranks that this one started
    if not _Signal.waits:
        raise TerminatedError


class Signals(Callback):
    """Takes SIGTERM back from a Trainer, which registers its own handler as it starts to run."""

    def _take_back(self, trainer: Trainer, *_: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and launcher not in _Signal.launchers:
            _Signal.launchers.append(launcher)
        if _Signal.terminable:
            _take_over()

    on_sanity_check_start = on_train_start = on_validation_start = on_predict_start = _take_back  # type: ignore[assignment]

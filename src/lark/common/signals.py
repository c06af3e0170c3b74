"""End the process on a signal, in training not before its last step is saved.

SIGTERM, by which a scheduler says that the machine is about to be taken away, ends it with exit code 143, SIGINT
(Ctrl-C) with 130; a second Ctrl-C does not wait for the step. Lightning's own handling is set aside: it talks to other
ranks from inside the handler, at whatever point each of them happens to be. SIGUSR2, by which SLURM tells submitit's
jobs that their time is over, is taken the same way and then left to submitit, which queues the job again.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

PATIENCE = 20.0  # seconds in which the process should have ended; a signal that comes later counts anew


class TerminatedError(SystemExit):
    """The process ends because a signal asked for it."""


class _Signal:
    """There is one a process."""

    is_handled = False
    requested = 0  # its number
    since = 0.0
    is_deferred = False
    requeue: Any = None  # submitit's handler
    launchers: list[Any] = []  # noqa: RUF012


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise TerminatedError on SIGTERM and SIGINT inside the block, at once or when training is ready for it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    _Signal.requeue = before[signal.SIGUSR2] if "SUBMITIT_EXECUTOR" in os.environ else None
    _Signal.is_handled = True
    _register_handlers()
    try:
        yield
    finally:
        _Signal.is_handled, _Signal.requested, _Signal.is_deferred, _Signal.requeue = False, 0, False, None
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def is_requested() -> bool:
    """Tell whether a signal has asked the process to end and it has not ended yet."""
    return bool(_Signal.requested)


def get_signal_name() -> str:
    """Return the name of the signal that has come."""
    return signal.Signals(_Signal.requested or signal.SIGTERM).name


def defer() -> None:
    """Only note signals from here on (see `is_requested`)."""
    _Signal.is_deferred = True


def exit_now() -> NoReturn:
    """Raise TerminatedError; under submitit, rank 0 is queued again, and no other rank's end counts as a failure."""
    if _Signal.requested == signal.SIGUSR2 and _Signal.requeue is not None:
        _Signal.requeue(signal.SIGUSR2, None)  # ends rank 0
        raise TerminatedError(0)
    raise TerminatedError(128 + (signal.SIGINT if _Signal.requested == signal.SIGINT else signal.SIGTERM))


def resume() -> None:
    """End what `defer` began. Raises TerminatedError if a signal has come meanwhile."""
    _Signal.is_deferred = False
    if _Signal.requested:
        exit_now()


def stop_deferring() -> None:
    """End what `defer` began, on the way out of an error."""
    _Signal.is_deferred = False


def _register_handlers() -> None:
    if threading.current_thread() is threading.main_thread():  # others get no signals
        signal.signal(signal.SIGTERM, _note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # ignored in the background of a shell script
            signal.signal(signal.SIGINT, _note)
        if _Signal.requeue is not None:
            signal.signal(signal.SIGUSR2, _note)


def _note(signum: int, frame: Any) -> None:
    if (
        _Signal.requested
        and signum == signal.SIGINT
        and (rank_zero_only.rank == 0 or _Signal.requested == signal.SIGINT)
    ):
        _tell("interrupted")
        for launcher in _Signal.launchers:
            launcher.kill(signal.SIGKILL)  # as Lightning does when it is interrupted
        raise TerminatedError(128 + signum)
    if _Signal.requested and (
        _Signal.is_deferred or time.monotonic() - _Signal.since < PATIENCE
    ):  # schedulers repeat themselves
        return
    _Signal.requested, _Signal.since = signum, time.monotonic()
    for launcher in _Signal.launchers:  # the ranks that this one started; a terminal has told them of Ctrl-C already
        launcher.kill(signal.SIGTERM if signum == signal.SIGINT else signum)
    if _Signal.is_deferred:
        if signum == signal.SIGINT:
            _tell("SIGINT: the step at hand is finished and saved first (Ctrl-C once more: at once)")
        return
    _tell(f"stopped by {get_signal_name()}; what is finished is kept, and the same command goes on from there")
    exit_now()


def _tell(text: str) -> None:
    """From inside a handler, where print may be what was interrupted."""
    if rank_zero_only.rank == 0:
        os.write(2, f"\nlark: {text}\n".encode())


class Signals(Callback):
    """Keeps a Trainer from registering its own handlers, and knows the ranks it started."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and launcher not in _Signal.launchers:
            _Signal.launchers.append(launcher)
        if _Signal.is_handled:
            trainer._signal_connector.register_signal_handlers = lambda: None  # which comes after this

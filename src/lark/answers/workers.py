"""Worker processes in which answers are checked: killed at a time limit, bounded in memory, kept from doing harm."""

import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import types
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from lark.common.errors import LarkError

_WORKER_BYTES = 2 * 1024**3  # far above what a check needs; keeps a tower of exponents from taking the machine down
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill", "os.killpg")
_FORBIDDEN += ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_FORBIDDEN += ("os.chown", "subprocess.Popen", "pty.spawn", "signal.pthread_kill")
ALGEBRA = "lark.answers.algebra"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def start_pool(library: str, workers: int) -> ProcessPool:
    """Start processes with the library imported, by a fork server or spawned.

    Never forked from a process that has threads or a GPU context.
    """
    return ProcessPool(
        max_workers=workers,
        initializer=_start_worker,
        initargs=(library,),
        context=make_process_context([library]),  # pyright: ignore[reportArgumentType]
    )


def is_math_equal(gold: str, answer: str) -> bool:
    """Tell whether two LaTeX expressions are equal (`lark.answers.algebra`, which only workers import)."""
    from lark.answers import algebra

    return algebra.is_math_equal(gold, answer)


def get_outcome(future: Future[bool]) -> tuple[bool, bool]:
    """Return (correct, timed out) of one check; one that took its process down counts as timed out."""
    try:
        return future.result(), False
    except (FutureTimeoutError, TimeoutError, ProcessExpired, MemoryError):
        return False, True


def passes_reasoning_gym(source_dataset: str, entry: dict[str, Any], answer: str) -> bool:
    """Tell whether the verifier of a reasoning_gym data set gives the answer its full score, 1.0.

    Raises:
        LarkError: the verifier fails on the right answer too.
    """
    from reasoning_gym import get_score_answer_fn

    score: Any = get_score_answer_fn(source_dataset)
    try:
        return float(score(answer=answer, entry=entry)) == 1.0
    except MemoryError:
        raise
    except Exception:  # a verifier of somebody else's may raise anything on an answer it cannot read: that one is wrong
        try:
            score(answer=entry["answer"], entry=entry)
        except (
            Exception
        ) as error:  # on the right answer too: the row is incomplete, and all answers would count as wrong
            raise LarkError(
                f"the reasoning_gym verifier of source_dataset={source_dataset!r} fails on the row itself "
                f"({type(error).__name__}: {error}); give the row the metadata reasoning_gym made it with"
            ) from error
        return False


_Process: Any = getattr(multiprocessing.context, "ForkServerProcess", multiprocessing.context.SpawnProcess)


class _WorkerProcess(_Process):
    """A process that does not import the script it was started from: one without a guard would run again in it."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return _Process._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


def make_process_context(libraries: Sequence[str]) -> multiprocessing.context.BaseContext:
    """Make a context whose processes start from a clean one that has imported `libraries`, where there is such."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        # a launcher's worker process (joblib) has a method of its own, which the processes started here do not know
        multiprocessing.set_start_method("spawn", force=True)
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = type(multiprocessing.get_context("forkserver" if has_server else "spawn"))()  # of our own
    context.Process = _WorkerProcess  # type: ignore[assignment]
    if not has_server:
        return context
    # The server imports the library once, so a worker that replaces a killed one is there at once.
    context.set_forkserver_preload(list(libraries))
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the server inherits: Ctrl-C is for this process
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return context


def _start_worker(library: str) -> None:
    """Import the library before the clock of the first check runs, and bound what a check can do."""
    import importlib
    import logging

    module = importlib.import_module(library)
    # math-verify warns on every call that its own time limit is off; ours replaces it.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if library == ALGEBRA:  # the first comparison builds its grammar, a second that is nobody's time
        assert module.is_math_equal("x^2+2x+1", "(x+1)^2"), "algebra works"
    if os.name == "posix":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = _WORKER_BYTES if hard == resource.RLIM_INFINITY else min(_WORKER_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse_harm)


def _refuse_harm(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what writes, connects or starts anything, which no check needs.

    Some verifiers of reasoning_gym evaluate the answer as Python; a process of its own is the limit of what else such
    text can reach.
    """
    if event == "open":
        path, _, flags = arguments
        harmful = bool((flags or 0) & _WRITING) and not isinstance(path, int) and path != os.devnull
    else:
        harmful = event in _FORBIDDEN or event.startswith(("socket.", "shutil.", "ctypes."))
    if harmful:
        raise PermissionError(f"a check may not do this: {event}")

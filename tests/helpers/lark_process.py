"""`python -m lark.run` in a process of its own, which may start further ranks, be killed or be told to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from lark.common.ranks import RUN_VARIABLE

DEADLINE = 240.0  # seconds; a run takes about ten on an idle machine
TWO_DEVICES = ("trainer.accelerator=cpu", "trainer.devices=2")
TWO_RANKS = ("trainer=ddp", *TWO_DEVICES)
_OF_RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", RUN_VARIABLE)


def start(*words: str, program: Sequence[str] = ("-m", "lark.run"), **environment: str) -> subprocess.Popen[str]:
    """The command with `words`, both outputs in one. program: what Python runs instead."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    return subprocess.Popen(
        [sys.executable, *program, *words],
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[str], found: Callable[[], bool]) -> str:
    """SIGKILL to it and its ranks as soon as `found()` is true; what was printed until then."""
    wait_for(process, found)
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate(timeout=DEADLINE)[0]


def terminate_when(process: subprocess.Popen[str], found: Callable[[], bool]) -> str:
    """SIGTERM to the process alone, not to the ranks it started, as soon as `found()` is true; what was printed."""
    wait_for(process, found)
    process.terminate()
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 143, output
    return output


def wait_for(process: subprocess.Popen[str], found: Callable[[], bool]) -> None:
    """Until `found()` is true, which must be before the process ends."""
    deadline = time.monotonic() + DEADLINE
    while not found():
        assert process.poll() is None, f"it ended before it could be stopped:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "nothing to stop it at"
        time.sleep(0.01)

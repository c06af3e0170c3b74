"""A whole run, stopped by SIGTERM and by SIGKILL at random moments, ends with the table of one that was left alone.

LARK_INTERRUPTIONS: how many times (more take longer).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lark.cache import read_json

TIMES = int(os.environ.get("LARK_INTERRUPTIONS", "3"))
COMMAND = (
    *("task.limit=24", "task.held_out=0.25", "logger=csv", "trainer=cpu", "sft.steps=12", "sft.validations=6"),
    *("sft.checkpoint_every=2", "evaluation.samples=1", "probe.shard_rows=50", "evaluation.batch_size=16"),
)
DEADLINE = 300.0


def start(logs: Path) -> subprocess.Popen:
    left_out = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LARK_RUN")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.Popen(
        [sys.executable, "-m", "lark.run", *COMMAND, f"paths.logs={logs}"],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return out


def table(out: str) -> list[str]:
    """The comparison, without the lines that name folders."""
    lines = out[out.index("before") :].splitlines()
    return [line for line in lines if "/" not in line]


def figures(logs: Path) -> set[str]:
    """Of all runs that came to their end."""
    found = [read_json(path) for path in logs.glob("runs/**/summary.json")]
    return {json.dumps(one["sets"], sort_keys=True) for one in found if one["status"] == "finished"}


@pytest.mark.slow
def test_whatever_stops_it_the_table_is_the_same(tmp_path):
    begun = time.monotonic()
    expected = finished(start(tmp_path / "whole"))
    seconds = time.monotonic() - begun
    rng = random.Random(os.environ.get("LARK_INTERRUPTIONS_SEED", "0"))
    stopped = []
    for i in range(TIMES):
        process = start(tmp_path / "parts")
        try:
            process.wait(timeout=rng.uniform(0.2, 0.6) * seconds)
            assert process.returncode == 0
            shutil.rmtree(tmp_path / "parts" / "arms")  # it was done before it could be stopped: train anew
        except subprocess.TimeoutExpired:
            how = (signal.SIGTERM, signal.SIGKILL)[i % 2]
            process.send_signal(how)
            process.communicate(timeout=DEADLINE)
            stopped.append(process.returncode)
    assert -signal.SIGKILL in stopped and {143, -signal.SIGTERM} & set(stopped), stopped  # 143, or still importing
    assert table(finished(start(tmp_path / "parts"))) == table(expected)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")

"""A whole run, stopped by SIGTERM and by SIGKILL at random moments, ends with the table of one that was left alone.

LARK_INTERRUPTIONS: how many times (more take longer).
"""

import json
import os
import random
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


def summary(logs: Path) -> dict:
    found = [read_json(path) for path in logs.glob("runs/**/summary.json")]
    (whole,) = [one for one in found if one["status"] == "finished"]
    return whole


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
            assert process.returncode == 0  # it was done before it could be stopped
        except subprocess.TimeoutExpired:
            how = (signal.SIGTERM, signal.SIGKILL)[i % 2]
            process.send_signal(how)
            process.communicate(timeout=DEADLINE)
            stopped.append(process.returncode)
    assert {143, -signal.SIGKILL} <= set(stopped), stopped
    assert table(finished(start(tmp_path / "parts"))) == table(expected)
    ours, theirs = (json.dumps(summary(tmp_path / name)["sets"], sort_keys=True) for name in ("parts", "whole"))
    assert ours == theirs

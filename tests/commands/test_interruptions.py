"""A whole run, stopped by SIGTERM and by SIGKILL at random moments, ends with the table of one that was left alone.

LARK_INTERRUPTIONS: how many times (more take longer).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import lark_process
import pytest
from lark_process import DEADLINE, finish

from lark.common.cache import read_json

TIMES = int(os.environ.get("LARK_INTERRUPTIONS", "3"))
COMMAND = (
    *("task.limit=24", "task.held_out=0.25", "logger=csv", "trainer=cpu", "sft.steps=12", "sft.validations=6"),
    *("sft.checkpoint_every=2", "evaluation.samples=1", "probe.shard_rows=50", "evaluation.batch_size=16"),
)


def start(logs: Path) -> subprocess.Popen[str]:
    return lark_process.start(*COMMAND, f"paths.logs={logs}")


def table(out: str) -> list[str]:
    """The comparison, without the lines that name folders."""
    lines = out[out.index("before training") :].splitlines()
    return [line for line in lines if "/" not in line]


def figures(logs: Path) -> set[str]:
    """Of all runs that came to their end."""
    found = [read_json(path) for path in logs.glob("runs/**/summary.json")]
    return {json.dumps(one["sets"], sort_keys=True) for one in found if one["status"] == "finished"}


@pytest.mark.slow
def test_whatever_stops_it_the_table_is_the_same(tmp_path):
    begun = time.monotonic()
    expected = finish(start(tmp_path / "whole"))
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
    assert table(finish(start(tmp_path / "parts"))) == table(expected)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")

"""The GPU's benchmark runs at toy sizes without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes():
    done = subprocess.run([sys.executable, str(SCRIPT), "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert len(values) > 10 and values["scoring tiny (tokens/s)"] > 0

"""The examples run as they are, in an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_an_example_runs(path, tmp_path_factory, tmp_path):
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] for cell in cells), "outputs are not kept"
        code = "\n".join("".join(cell["source"]) for cell in cells)
        path = tmp_path / "notebook.py"
        path.write_text(code)
    shared = tmp_path_factory.getbasetemp() / "cache-of-examples"  # one scores for all
    environment = os.environ | {"LARK_CACHE": str(shared)}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

"""The built wheel, unpacked, runs from any folder: conf/, templates and students travel inside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as site-packages would hold the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def lark(installed: Path, cwd: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-m", "lark.run", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_configuration_is_the_wheels_own(installed: Path, tmp_path: Path) -> None:
    shown = lark(installed, tmp_path, "--info", "searchpath")
    assert str(installed / "lark" / "conf") in shown
    assert str(ROOT / "conf") not in shown


def test_run_from_another_folder(installed: Path, tmp_path: Path) -> None:
    words = ["task.limit=10", "task.eval_limit=2", "task.max_new_tokens=4", "sft.steps=1", "logger=csv"]
    out = lark(installed, tmp_path, *words, "baseline=none", "evaluation.samples=1", "evaluation.pass_at=[1]")
    assert "before training" in out
    assert list(tmp_path.glob("logs/runs/arithmetic/tiny/*/summary.json"))

"""The built wheel, unpacked, runs from any folder: conf/, templates and students travel inside it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as site-packages would hold the parsing toolkit of the same name."""
    folder = tmp_path_factory.mktemp("toolkit")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "lark==1.3.1"]
    done = subprocess.run(install, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index cannot be reached: {done.stderr[-200:]}")
    return folder


def start_command(*path: Path, code: str = "import lark_commands; lark_commands.main()") -> subprocess.CompletedProcess:
    """Start `lark-run --version`, as its console script would, where `path` are the folders of packages."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", f"import sys; sys.argv = ['lark-run', '--cfg', 'job']; {code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_toolkit_before_us_is_recognised(installed: Path, toolkit: Path) -> None:
    """As beside an editable installation: site-packages comes before the checkout."""
    done = start_command(toolkit, ROOT / "src")
    assert done.returncode == 1
    assert re.fullmatch(r"lark: .* is the parsing toolkit .*; install LARK .* of its own\n", done.stderr)
    assert start_command(installed, toolkit).returncode == 0  # ours before it


@pytest.mark.parametrize("last", ["ours", "the toolkit"])
def test_the_toolkit_in_the_same_folder_is_recognised(
    last: str, installed: Path, toolkit: Path, tmp_path: Path
) -> None:
    """As beside an installed wheel: whichever was installed last has overwritten files of the other."""
    for one in (toolkit, installed) if last == "ours" else (installed, toolkit):
        shutil.copytree(one, tmp_path / "site", dirs_exist_ok=True)
    done = start_command(tmp_path / "site")
    assert done.returncode == 1
    assert re.fullmatch(r"lark: .* overwrite each other; install LARK .* of its own\n", done.stderr)


def test_what_needs_the_toolkit_is_told(installed: Path) -> None:
    done = start_command(installed, code="from lark import Lark, Transformer")
    assert done.returncode == 1 and "an environment of its own" in done.stderr.splitlines()[-1]

"""Folders that hold a user's own files, and names that no file may have: refused before anything runs."""

import os
import shutil
from pathlib import Path

import pytest
from lark_command import lark

from lark.config import find_conf


def read_files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".hydra")}


@pytest.mark.parametrize("words", [("stop_after=selection",), ("budget=0",)], ids=str)
def test_a_run_leaves_a_users_own_folder_as_it_is(words, tmp_path, monkeypatch):
    """conf/ holds folders called selector and baseline."""
    folder = shutil.copytree(find_conf(), tmp_path / "conf")
    (folder / "summary.json").write_text("[1, 2]")
    before = read_files(folder)
    monkeypatch.chdir(tmp_path)
    done = lark("hydra.run.dir=conf", f"paths.logs={tmp_path / 'logs'}", *words)
    assert done.code == 1 and done.err.startswith("lark: hydra.run.dir=") and len(done.err.splitlines()) == 1
    assert read_files(folder) == before


@pytest.mark.parametrize(
    "word", ["task.eval={a/b: rows.jsonl}", "task.name=../a", "model.name='a:b'", "selector.name=.a"]
)
def test_a_name_that_no_file_may_have_is_refused_before_anything_runs(word, tmp_path, monkeypatch):
    """tests/common/test_cache.py has more of them."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    done = lark("task=jsonl", "task.pool=rows.jsonl", "hydra.run.dir=run", word)
    assert done.code == 1 and word.partition("=")[0] in done.err and len(done.err.splitlines()) == 1, done.err
    assert set(os.listdir("run")) <= {"summary.json", ".hydra"}

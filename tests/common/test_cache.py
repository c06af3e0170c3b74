"""Identities, hashes, locks and atomic files."""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lark.common.cache
from lark.common.cache import (
    atomic_write,
    build_once,
    check_name,
    check_run_folder,
    check_writable,
    file_hash,
    hold_lock,
    identity_hash,
    is_complete,
    read_json,
    remove_path,
    write_json,
    write_text,
)
from lark.common.errors import LarkError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(identity=st.dictionaries(st.text(), PLAIN, max_size=4))
def test_identity_hash_ignores_the_order_of_keys(identity):
    backwards = dict(reversed(identity.items()))
    assert identity_hash(identity) == identity_hash(backwards)
    assert identity_hash(identity) != identity_hash({**identity, "further key": 0, "another": 1})
    assert len(identity_hash(identity)) == 16


def test_identity_hash_is_that_of_the_canonical_json():
    assert identity_hash({"b": [1, 2.5], "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,2.5]}').hexdigest()[:16]


@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1, 2}, b"bytes"])
def test_identity_hash_takes_plain_json_only(value):
    with pytest.raises(AssertionError, match="plain JSON"):
        identity_hash({"value": value})


def test_file_hash(tmp_path):
    (tmp_path / "file").write_bytes(b"\0text" * 300_000)
    assert file_hash(tmp_path / "file") == hashlib.sha256(b"\0text" * 300_000).hexdigest()


def test_json_and_text_are_read_as_written(tmp_path):
    value = {"text": "Zoë\u2028", "list": [1, 2.5, None, True], "deep": {"empty": {}}}
    write_json(tmp_path / "new" / "file.json", value)
    assert read_json(tmp_path / "new" / "file.json") == value
    write_text(tmp_path / "file.txt", "a\r\nb\u2028")
    assert (tmp_path / "file.txt").read_bytes() == "a\r\nb\u2028".encode()


def test_json_is_strict(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    write_json(tmp_path / "file.json", {"nan": [float("nan")], "inf": (float("-inf"), 1.0)})
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"nan": [None], "inf": [None, 1.0]}


def test_replacing_leaves_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent, "a rename is atomic only inside one file system"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_puts_the_new_file_in_place(tmp_path):
    path = tmp_path / "folder" / "file"
    for text in ("first", "second"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "others may read a shared cache"


def test_lock_says_that_it_waits_and_goes_on_when_it_is_free(tmp_path, monkeypatch):
    path = tmp_path / "new" / "arm"
    with hold_lock(path):  # not held: nothing is printed, and it is free again afterwards
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
         "print('held', flush=True); sys.stdin.read()", f"{path}.lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin and holder.stdout
    assert holder.stdout.readline() == b"held\n"
    printed = []

    def let_go(stage, text):
        printed.append(text)
        holder.communicate()  # closes its input, on which it ends

    monkeypatch.setattr(lark.common.cache, "announce", let_go)
    with hold_lock(path):
        assert holder.returncode == 0
    assert len(printed) == 1 and str(path) in printed[0]


def test_nothing_is_removed_that_the_project_did_not_write(tmp_path):
    for name in ("folder", "ours", "target", "empty", "theirs", "listed"):
        (tmp_path / name).mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text('{"files": []}')  # a common name
    (tmp_path / "listed" / "metrics.json").write_text("[1, 2]")
    (tmp_path / "folder" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "theirs", "listed"):
        with pytest.raises(ValueError, match=f"{tmp_path / name} is in the way"):
            remove_path(tmp_path / name)
        assert (tmp_path / name).exists()
    write_json(tmp_path / "ours" / "selection.json", {"inputs": {}})
    (tmp_path / "target" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("ours", "link", "empty", "missing"):
        assert not remove_path(tmp_path / name).exists()
    assert (tmp_path / "target" / "kept").exists()


BAD_NAMES = [
    "",
    ".",
    "..",
    "a/b",
    "../a",
    "a\\b",
    "a\nb",
    "a\0",
    " a",
    "a ",
    "a.",
    "-a",
    ".a",
    "a:b",
    "a*",
    "x" * 101,
    None,
    3,
]


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 3])
def test_names_that_no_file_may_have(name):
    with pytest.raises(LarkError, match=r"task\.eval"):
        check_name(name, "task.eval")


@pytest.mark.parametrize("name", ["a", "AIME 24", "lark+casl", "math_500@2", "v1.2", "größer", "k=4"])
def test_names_that_files_may_have(name):
    assert check_name(name, "task.eval") == name


def test_a_run_does_not_write_over_what_is_not_its_own(tmp_path):
    check_run_folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    check_run_folder(tmp_path)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(LarkError, match=r"hydra\.run\.dir"):
        check_run_folder(tmp_path)
    write_json(tmp_path / "summary.json", {"status": "failed"})
    check_run_folder(tmp_path)


def test_writable(tmp_path):
    assert check_writable(tmp_path / "a" / "b", "paths.cache").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"paths\.cache=.*/file/folder cannot be written .*: set paths\.cache to"):
        check_writable(tmp_path / "file" / "folder", "paths.cache")


def test_complete_means_the_manifest_is_there(tmp_path):
    assert not is_complete(tmp_path / "missing")
    assert not is_complete(tmp_path)
    write_json(tmp_path / "arm.json", {})
    assert not is_complete(tmp_path)
    assert is_complete(tmp_path, "arm.json")


@pytest.mark.parametrize("keep_partial", [False, True])
def test_a_folder_is_built_once_and_after_a_kill_again(tmp_path, keep_partial):
    folder, calls = tmp_path / "tasks" / "a", []

    def make(place, fails=False):
        calls.append(sorted(path.name for path in place.iterdir()))
        (place / "half").touch()
        if fails:
            raise KeyboardInterrupt
        return {"rows": 3}

    with pytest.raises(KeyboardInterrupt):
        build_once(folder, {"seed": 0}, lambda place: make(place, fails=True), keep_partial=keep_partial)
    for _ in range(2):
        manifest = build_once(folder, {"seed": 0}, make, keep_partial=keep_partial)
        assert manifest == {"identity": {"seed": 0}, "rows": 3}
    assert calls == [[], ["half"] if keep_partial else []]


def test_a_folder_that_another_process_finished_meanwhile_is_not_built(tmp_path, monkeypatch):
    @contextmanager
    def finish(folder):
        write_json(folder / "manifest.json", {"rows": 1})
        yield

    monkeypatch.setattr(lark.common.cache, "hold_lock", finish)
    assert build_once(tmp_path / "a", {}, lambda place: pytest.fail("it was built")) == {"rows": 1}

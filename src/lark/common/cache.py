"""Identities, hashes, locks and files that are either whole or absent.

A cache folder is named after the hash of an explicit identity dict and is complete once its manifest exists: the
manifest is written last, by rename, so that a process killed half-way leaves nothing that looks finished.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from lark.common.errors import LarkError
from lark.common.log import announce

MANIFESTS = {
    **dict.fromkeys(("manifest.json", "trained.json"), "identity"),
    "metrics.json": "answers",
    "selection.json": "inputs",
    "summary.json": "status",
}
"""Files of our folders, each with a key that ours has."""
_OF_A_RUN = ("before", "baseline", "selector", "report.html", "run.log", "statistics.parquet", *MANIFESTS)
_NAME = re.compile(r"\w[\w .+@=-]{0,99}(?<![ .])")
"""Matches what may be part of a file's or folder's name, on any system."""


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of the sha256 of `identity` as canonical JSON: sorted keys, no spaces, no NaN.

    Raises AssertionError where `identity` is not plain JSON: what goes into an identity is ours to choose.
    """
    try:
        text = json.dumps(dict(identity), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"an identity holds plain JSON only ({error}): {identity!r}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file to; it becomes `path`, by rename, if the block succeeds.

    On an error the temporary file is removed and an earlier `path` stays as it was. Both the file and its folder are
    synced, so that a file seen under its final name is whole even after a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and a cache may be shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        assert temporary.is_file(), f"nothing was written to {temporary}"
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as JSON, whole or not at all. JSON has no NaN and no infinity: both are written as null."""
    write_text(path, json.dumps(nan_to_none(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def nan_to_none(value: Any) -> Any:
    """Replace every number that is not finite, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return value


def read_json(path: str | Path) -> Any:
    """Read a JSON file in UTF-8."""
    return json.loads(Path(path).read_bytes())


@contextmanager
def hold_lock(path: str | Path) -> Iterator[None]:
    """Hold the lock of `path` (a file `<path>.lock` beside it) against other processes.

    Waits as long as it takes, after a line that says so. The system frees the lock of a process that dies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(f"{path}.lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        announce("waiting", f"for {path}, which another process holds")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def remove_path(path: Path) -> Path:
    """Remove what is at `path`, of a link only the link, and return the path.

    Raises LarkError for what the project did not write: a file, or a folder without a manifest of ours.
    """
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()) and not is_ours(path):
            raise LarkError(
                f"{path} is in the way and not one of ours (no {' or '.join(MANIFESTS)} of ours in it); move it away"
            )
        shutil.rmtree(path)
    elif path.is_file() and not path.is_symlink():
        raise LarkError(f"{path} is in the way: a file where a folder is to be written; move it away")
    path.unlink(missing_ok=True)
    return path


def is_ours(folder: Path) -> bool:
    """Tell whether a folder holds a manifest that the project wrote."""
    for name, key in MANIFESTS.items():
        try:
            known = read_json(folder / name)
        except (OSError, ValueError):  # there is none, or it is not JSON
            continue
        if isinstance(known, dict) and key in known:
            return True
    return False


def check_run_folder(folder: Path) -> None:
    """Check that nothing of the user's own is in the way of a run. Raises LarkError."""
    found = [name for name in _OF_A_RUN if (folder / name).exists()]
    if found and not (folder / "replay.yaml").is_file() and not is_ours(folder):
        raise LarkError(
            f"hydra.run.dir={folder} holds {' and '.join(found[:3])}, which no run wrote; set hydra.run.dir to a new "
            "folder"
        )


def check_name(name: str, setting: str) -> str:
    """Return a name that can be part of a file's name. Raises LarkError naming the setting for another."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LarkError(
            f"{setting}={name!r} cannot be part of a file's name; take 1 to 100 letters, digits and _ . - + @ =, with "
            "a letter or digit first"
        )
    return name


def check_writable(folder: str | Path, setting: str) -> Path:
    """Make the folder if it is missing, try to write to it, and return it.

    setting: the name under which the user chose it, such as "paths.cache".
    Raises LarkError naming setting and folder if nothing can be written there.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell: mounts may be read-only and root may do anything.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LarkError(
            f"{setting}={folder} cannot be written ({error.strerror}): set {setting} to a folder you may write to"
        ) from error
    return folder


def is_complete(folder: str | Path, manifest: str = "manifest.json") -> bool:
    """Tell whether a folder was written to its end: its manifest, which is written last, exists."""
    return (Path(folder) / manifest).is_file()


def build_once(
    folder: Path,
    identity: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any] | None],
    *,
    manifest: str = "manifest.json",
    keep_partial: bool = False,
) -> dict[str, Any]:
    """Return the manifest of `folder`, which the first process to come fills by `make` while the others wait.

    folder: usually named by `identity_hash(identity)`. It is complete once the manifest, written last, exists.
    make: writes files into the folder and returns what the manifest says besides the identity.
    keep_partial: leave what a killed process left for `make` to continue with; otherwise the folder is emptied first.
    """
    if not is_complete(folder, manifest):
        with hold_lock(folder):
            if not is_complete(folder, manifest):  # another process may have finished it while this one waited
                if not keep_partial:
                    shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / manifest, {"identity": dict(identity), **(make(folder) or {})})
    return read_json(folder / manifest)

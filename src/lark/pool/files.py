"""Files of rows: found by a file, folder, pattern with * or list of these; read one row at a time with its place;
written.

A path means what stands at it, brackets and question marks included; only * stands for other characters, where nothing
has that very name.

A reader yields (line, row), with a `RowError` as the row where that row alone is lost, and raises a `RowError` where
the rest of the file is lost as well.
"""

import csv
import difflib
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark.common.cache import atomic_write, file_hash
from lark.common.errors import LarkError
from lark.common.progress_line import show_progress
from lark.pool.rows import RowError, parse_json

JSON_BYTES = 2**30
"""Size of the largest JSON file that is read: a list is parsed whole, into some three times as much memory."""
_PARQUET_ROWS = 200  # rows of a Parquet file held at a time
_PARQUET_BUFFER = 2**20  # bytes; without it a whole row group is held, which may be the whole file

_LITERAL = re.compile(r"[\[?]")  # what `glob` would take for a pattern beside *

Progress = Callable[[float], Any]
"""Called for every row with the bytes that it takes in its file, roughly."""


def find_files(source: str | Path | Sequence[str | Path], *, setting: str) -> dict[str, Path]:
    """Return the files of a file, a folder, a pattern with * or a list of these, in order, each once.

    setting: the name under which the user chose them, such as "task.pool".
    Keys are the names relative to the folder that all files share: unique, and the same wherever that folder lies.
    Raises LarkError naming `setting` for a missing file, an unknown ending, or a folder or pattern without a file.
    """
    sources = [source] if isinstance(source, str | Path) else list(source or [])
    if not sources or not all(map(str, sources)):
        raise LarkError(f"{setting} is not set: set it to a {ENDINGS} file, or to a folder of such files")
    paths: dict[Path, None] = {}  # ordered, and each file once where items of a list overlap
    for item in sources:
        path = Path(item).expanduser().absolute()  # not resolved: a hub cache links to files without an ending
        if not path.exists() and "*" not in str(path):
            raise LarkError(f"{setting}={item} does not exist: {_suggest(path, setting)}")
        matches = (
            [path]
            if path.exists()
            else sorted(map(Path, glob.glob(_LITERAL.sub("[\\g<0>]", str(path)), recursive=True)))
        )
        found = [
            file for match in matches for file in (keep_data_files(match.iterdir()) if match.is_dir() else [match])
        ]
        if not found:
            raise LarkError(f"{setting}={item} holds no {ENDINGS} file: set {setting} to where the rows are")
        paths.update(dict.fromkeys(found))
    for path in paths:
        if path.suffix.lower() not in READERS:
            raise LarkError(f"{setting}={path} has an unknown ending: convert it to (or name it) {ENDINGS}")
    shared = os.path.commonpath([path.parent for path in paths])
    return {path.relative_to(shared).as_posix(): path for path in paths}


def keep_data_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files whose ending says that they hold rows, sorted; hidden ones are left out."""
    return sorted(path for path in paths if path.suffix.lower() in READERS and not path.name.startswith("."))


def _suggest(path: Path, setting: str) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}, correct {setting}"
    names = [other.name for other in keep_data_files(path.parent.iterdir())]
    if close := difflib.get_close_matches(path.name, names, n=1, cutoff=0.4):
        return f"did you mean {path.parent / close[0]}?"
    return f"set {setting} to a {ENDINGS} file ({path.parent} holds {', '.join(names[:5]) or 'none'})"


def hash_files(files: dict[str, Path], *, setting: str) -> list[list[Any]]:
    """Return name, size in bytes and sha256 of each file. Raises LarkError naming `setting` for an unreadable one."""
    contents = []
    with show_progress("comparing files", sum(path.stat().st_size for path in files.values()) / 1e6, "MB") as progress:
        for name, path in files.items():
            status = path.stat()
            try:
                contents.append([name, status.st_size, _hash_file(path, status.st_size, status.st_mtime_ns)])
            except OSError as error:
                raise LarkError(
                    f"{setting}={path} cannot be read ({error.strerror}): set it to a readable file"
                ) from error
            progress.update(status.st_size // 10**6)
    return contents


@cache
def _hash_file(path: Path, size: int, changed: int) -> str:
    """Hash a file once a process, unless it changes: a run asks several times."""
    return file_hash(path)


def read_rows(
    path: Path, progress: Progress = lambda size: None, *, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (line, row) of one file by the ending of its name; rows are whatever JSON stands there, unchecked.

    A JSONL or CSV file is read line by line, a Parquet file a few rows at a time, a JSON list whole; in JSON and
    Parquet the line is the number of the row, from 1. Of CSV all values are texts, and empty ones are absent.

    columns: of a Parquet file read only these; other files give all they have.

    Yields a `RowError` as the row of a line that is broken; raises `RowError` where the rest of the file is lost.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, progress, columns)
    return READERS[path.suffix.lower()](path, progress)


def peek_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return up to `count` of a file's first rows, without the broken ones; an unreadable file has none."""
    try:
        return [row for _, row in islice(read_rows(path), count) if isinstance(row, dict)]
    except RowError:
        return []


def _decode(data: bytes, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")  # a byte order mark may open a file, nothing else
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} (0x{data[error.start]:02x}) is not UTF-8: save the file as UTF-8"
        raise RowError("row", "invalid UTF-8", message) from error


def _read_jsonl(path: Path, progress: Progress) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:  # in bytes: a broken line must not end the file, and only \n ends a line
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            progress(len(data))
            try:
                row = parse_json(_decode(data.rstrip(), first=line == 1), "row")
            except RowError as error:
                row = error
            yield line, row


def _read_json(path: Path, progress: Progress) -> Iterator[tuple[int, Any]]:
    size = path.stat().st_size
    if size > JSON_BYTES:
        message = f"is {size:,} bytes long, and a JSON list is read whole: convert it to JSONL or Parquet"
        raise RowError("row", "large JSON", message)
    text = _decode(path.read_bytes(), first=True)
    rows = parse_json(text, "row") if text.strip() else []
    if not isinstance(rows, list):
        raise RowError("row", "broken JSON", "is not one list of rows: rows one a line belong in a .jsonl file")
    for number, row in enumerate(rows, start=1):
        progress(size / len(rows))
        yield number, row


def _read_csv(path: Path, progress: Progress) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # trajectories are longer than 131,072 characters, the library's default
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    message = f"has more values than the {len(row) - 1} columns: quote what holds commas"
                    yield reader.line_num, RowError("row", "broken CSV", message)
                    continue
                progress(sum(map(len, filter(None, row.values()))))
                yield reader.line_num, {name: value for name, value in row.items() if value}
        except (csv.Error, UnicodeDecodeError) as error:
            message = f"no row from here on can be read as CSV: {error}"
            raise RowError("row", "damaged CSV", message, line=reader.line_num) from error


def _read_parquet(path: Path, progress: Progress, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
    count, size = 0, path.stat().st_size
    try:
        with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as file:
            names = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
                for row in batch.to_pylist():
                    count += 1
                    progress(size / file.metadata.num_rows)
                    yield count, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"no row from here on can be read as Parquet: {error}"
        raise RowError("row", "damaged Parquet", message, line=count + 1) from error


READERS: dict[str, Callable[[Path, Progress], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
ENDINGS = ".jsonl, .json, .parquet or .csv"


def write_rows(path: Path, rows: Iterable[Any], *, default: Callable[[Any], Any] | None = None) -> None:
    """Write rows as JSONL, whole or not at all.

    default: makes plain JSON of what JSON has no form for.
    """
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, default=default) + "\n" for row in rows)


def store_rows(source: Any, folder: Path) -> Any:
    """Return paths as they are, and rows in memory as a file of `folder`, named by its contents.

    source: a path or several; a datasets.Dataset, a pandas.DataFrame or an iterable of rows. Raises LarkError for
    anything else.
    """
    import datasets
    import pandas as pd

    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, list | tuple) and source and all(isinstance(one, str | Path) for one in source):
        return [str(one) for one in source]
    if isinstance(source, datasets.DatasetDict):
        raise LarkError(f"a DatasetDict has several splits: give one of them, {', '.join(map(str, source))}")
    if isinstance(source, Mapping) or not isinstance(source, Iterable | datasets.Dataset | pd.DataFrame):
        raise LarkError(f"rows cannot be read from a {type(source).__name__}: give a path, rows, or a Dataset")
    folder.mkdir(parents=True, exist_ok=True)
    ending = "parquet" if isinstance(source, datasets.Dataset | pd.DataFrame) else "jsonl"
    path = folder / f".{os.getpid()}.{ending}"
    try:
        if isinstance(source, datasets.Dataset):
            source.to_parquet(path)
        elif isinstance(source, pd.DataFrame):
            source.to_parquet(path, index=False)
        else:
            write_rows(path, source, default=_to_json)
        return str(path.rename(folder / f"{file_hash(path)[:16]}.{ending}"))
    finally:
        path.unlink(missing_ok=True)


def _to_json(value: Any) -> Any:
    """Return a NumPy value as JSON knows it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise LarkError(f"a row holds a {type(value).__name__} ({value!r}), which JSON does not know: convert it")

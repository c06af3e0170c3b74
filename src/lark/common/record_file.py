"""Append-only files of JSON records, for what must not be computed or paid for twice."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[Any, ...]


class RecordFile:
    """Append records to a file, one a line below a header line, and find each by its key.

    Only keys and places are in memory. A line that a kill cut off is cut away when the file is opened; a record that
    is added is in the hands of the system when `add` returns. Of several with one key the last one counts. One writer
    at a time (the caller's lock).

    key: the fields that tell records apart.  header: written where the file is new; what the records depend on belongs
    into the file's name.
    """

    def __init__(self, path: Path, header: Record, *, key: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fields = tuple(key)
        self._places: dict[Key, int] = {}
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close)
        whole = 0
        for place, line in _read_lines(path):
            if place > 0:
                self._places[self._key_of(json.loads(line))] = place
            whole = place + len(line)
        self._file.truncate(whole)
        if whole == 0:
            self._append(header)

    def _key_of(self, record: Record) -> Key:
        return tuple(record[name] for name in self._fields)

    def _append(self, record: Record) -> int:
        place = self._file.seek(0, 2)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        return place

    def add(self, record: Record) -> None:
        self._places[self._key_of(record)] = self._append(record)

    def read(self, key: Key) -> Record | None:
        if key not in self._places:
            return None
        self._file.seek(self._places[key])
        return json.loads(self._file.readline())

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: Path) -> Iterator[Record]:
    """Yield the whole records of a file that another process may be writing to."""
    for place, line in _read_lines(path):
        if place > 0:
            yield json.loads(line)


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the place and the bytes of every line that was written to its end."""
    place = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield place, line
            place += len(line)

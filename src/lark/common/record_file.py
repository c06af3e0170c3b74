"""Files of records that grow a line at a time and are never begun again: what was paid for stays."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]


class RecordFile:
    """JSON objects, one a line, below a header line; each is found by its key (problem_id, prompt, sample).

    Only keys and places are in memory. A line that a kill cut off is cut away when the file is opened; a record that
    is added is in the hands of the system when `add` returns. Of several with one key the last one counts. One process
    at a time (the caller's lock).
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._places: dict[Key, int] = {}
        self._failed: set[Key] = set()
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close)
        whole = self._scan()
        if whole == 0:
            self._file.truncate(0)
            self._append(header)
        else:
            self._file.truncate(whole)

    def _scan(self) -> int:
        """Enters every whole line; returns the bytes up to and with the last of them."""
        self._file.seek(0)
        at = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            if number:
                self._enter(json.loads(line), at)
            at += len(line)
        return at

    def _enter(self, record: dict[str, Any], at: int) -> None:
        key = (record["problem_id"], record["prompt"], record["sample"])
        self._places[key] = at
        (self._failed.add if "failure" in record else self._failed.discard)(key)

    def _append(self, record: dict[str, Any]) -> int:
        at = self._file.seek(0, 2)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        return at

    def add(self, record: dict[str, Any]) -> None:
        self._enter(record, self._append(record))

    def read(self, key: Key) -> dict[str, Any] | None:
        if key not in self._places:
            return None
        self._file.seek(self._places[key])
        return json.loads(self._file.readline())

    def failed(self, key: Key) -> bool:
        """Whether its record holds a failure instead of a trajectory."""
        return key in self._failed

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def close(self) -> None:
        self._file.close()

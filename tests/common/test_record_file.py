"""Growing files of records: found by key, whole after a kill, the last of a key counts."""

from pathlib import Path
from typing import Any

import pytest

from lark.common.record_file import RecordFile, read_records


def record(problem: str, sample: int = 0, **more: Any) -> dict[str, Any]:
    return {"problem_id": problem, "sample": sample, **more}


def open_file(path: Path, **header: Any) -> RecordFile:
    return RecordFile(path, header, key=("problem_id", "sample"))


def test_records_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.jsonl"
    with open_file(path, teacher="t") as file:
        assert len(file) == 0 and ("1", 0) not in file and file.read(("1", 0)) is None
        file.add(record("1", content="é\n\u2028"))
        file.add(record("1", 1, failure="empty"))
        file.add(record("1", 1, content="b"))  # the last of a key counts
    with open_file(path, teacher="other") as again:  # the first header stays
        assert path.read_text().splitlines()[0] == '{"teacher": "t"}'
        assert len(again) == 2
        assert again.read(("1", 0)) == record("1", content="é\n\u2028")
        assert again.read(("1", 1)) == record("1", 1, content="b")
    assert len(list(read_records(path))) == 3


@pytest.mark.parametrize("cut", range(1, 80, 7))
def test_a_line_that_was_cut_off_is_cut_away(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    with open_file(path, teacher="t") as file:
        for problem in ("1", "2"):
            file.add(record(problem, content="x"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    known = list(read_records(path))  # as another process sees it
    with open_file(path, teacher="t") as again:
        assert len(again) == len(known)
        for problem in ("1", "2"):
            if (problem, 0) not in again:
                again.add(record(problem, content="x"))
    assert path.read_bytes() == whole

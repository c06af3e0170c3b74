"""Growing files of records: found by key, whole after a kill, the last of a key counts."""

from pathlib import Path
from typing import Any

import pytest

from lark.common.record_file import RecordFile


def record(problem: str, sample: int = 0, **more: Any) -> dict[str, Any]:
    return {"problem_id": problem, "prompt": "p", "sample": sample, **more}


def test_records_are_found_again(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "folder" / "a.jsonl", {"teacher": "t"})
    assert len(file) == 0 and ("1", "p", 0) not in file and file.read(("1", "p", 0)) is None
    file.add(record("1", content="é\n\u2028"))
    file.add(record("1", 1, content="b"))
    file.close()
    again = RecordFile(file.path, {"teacher": "other"})  # the first header stays
    assert file.path.read_text().splitlines()[0] == '{"teacher": "t"}'
    assert list(again) == [("1", "p", 0), ("1", "p", 1)]
    assert again.read(("1", "p", 0)) == record("1", content="é\n\u2028")
    assert again.read(("1", "p", 1)) == record("1", 1, content="b")
    again.close()


def test_a_record_of_the_same_key_takes_the_place_of_a_failure(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "a.jsonl", {})
    file.add(record("1", failure="empty"))
    assert file.failed(("1", "p", 0))
    file.add(record("1", content="now"))
    assert not file.failed(("1", "p", 0)) and len(file) == 1
    file.close()
    again = RecordFile(file.path, {})
    assert again.read(("1", "p", 0)) == record("1", content="now") and not again.failed(("1", "p", 0))
    again.close()


@pytest.mark.parametrize("cut", range(1, 100, 7))
def test_a_line_that_was_cut_off_is_cut_away(tmp_path: Path, cut: int) -> None:
    file = RecordFile(tmp_path / "a.jsonl", {"teacher": "t"})
    for problem in ("1", "2"):
        file.add(record(problem, content="x"))
    file.close()
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-cut])
    again = RecordFile(file.path, {"teacher": "t"})
    for problem in ("1", "2"):
        if (problem, "p", 0) not in again:
            again.add(record(problem, content="x"))
    again.close()
    assert file.path.read_bytes() == whole

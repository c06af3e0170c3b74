"""Sample files of an evaluation: they grow as samples are drawn and are put in order at the end.

While an evaluation goes on, every rank appends to a file of its own, samples-<set>.<identity>.rank<number>.partial; the
identity says what the samples depend on. Whoever goes on with it, with as many ranks or another number, takes what all
of these files hold, and what a finished evaluation of the same identity left in samples-<set>.jsonl.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lark.common.cache import read_json, write_text
from lark.common.record_file import RecordFile, read_records
from lark.generation.transformers_backend import Sample

Record = dict[str, Any]
SAMPLE_FIELDS = tuple(field.name for field in fields(Sample))
_KEY = ("problem_id", "sample")


def open_samples(folder: Path, name: str, identity: str, rank: int) -> RecordFile:
    """Open the file in which a rank's samples of an evaluation set grow."""
    path = folder / f"samples-{name}.{identity}.rank{rank}.partial"
    return RecordFile(path, {"set": name, "identity": identity}, key=_KEY)


def gather_samples(folder: Path, name: str, identity: str) -> dict[tuple[str, int], Record]:
    """Read the samples of this identity that are there, without verdicts, by problem id and number."""
    found = [row for path in find_partial_files(folder, name, identity) for row in read_records(path)]
    evaluation = folder / "evaluation.json"
    if evaluation.exists() and read_json(evaluation)["sets"].get(name, {}).get("samples") == identity:
        found += read_rows(folder / f"samples-{name}.jsonl")
    return {(row["problem_id"], row["sample"]): {field: row[field] for field in SAMPLE_FIELDS} for row in found}


def find_partial_files(folder: Path, name: str, identity: str = "[0-9a-f]{16}") -> list[Path]:
    """Find the growing files of a set, of all ranks, also of earlier ones."""
    pattern = re.compile(rf"samples-{re.escape(name)}\.{identity}\.rank\d+\.partial")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[Record]:
    """Read the rows of a JSONL file, such as samples-<set>.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_verdicts(path: str | Path) -> dict[str, list[bool]]:
    """Read whether each sample of each problem is correct, by problem id and in the order of the samples."""
    correct: dict[str, list[bool]] = {}
    for record in sorted(read_rows(path), key=lambda record: record["sample"]):
        correct.setdefault(record["problem_id"], []).append(record["correct"])
    return correct

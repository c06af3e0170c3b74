"""Sample files: one line a sample, growing as samples are drawn, whole at the end.

While an evaluation goes on, every rank appends to a file of its own, samples-<set>.rank<number>.partial, whose first
line says what the samples depend on. Whoever goes on with it, with as many ranks or another number, takes what all of
these files hold.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lark.generation.transformers_backend import Sample


def partial_file(folder: Path, name: str, rank: int) -> Path:
    """Where a rank's samples of an evaluation set grow."""
    return folder / f"samples-{name}.rank{rank}.partial"


def partial_files(folder: Path, name: str) -> list[Path]:
    """Those of all ranks, also of earlier ones."""
    begins = f"samples-{name}.rank"
    return sorted(path for path in folder.iterdir() if path.name.startswith(begins) and path.suffix == ".partial")


def gather(files: Iterable[Path], identity: str) -> list[Sample]:
    """The samples of `identity` in the partial files, each once; the files are left as they are."""
    found = {(sample.problem_id, sample.sample): sample for path in files for sample in _read(path, identity)[0]}
    return list(found.values())


def resume(partial: Path, identity: str) -> list[Sample]:
    """The samples of a partial file, which is cut to its unbroken lines, or begun anew if of another evaluation."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    samples, kept = _read(partial, identity)
    if not kept:
        if partial.exists() and partial.stat().st_size:
            print(f"{partial} was begun with other prompts, settings or weights: starting it again")
        partial.write_bytes(_header(identity))
        return []
    with open(partial, "r+b") as file:
        file.truncate(kept)
    print(f"going on from {partial}: {len(samples)} samples are there")
    return samples


def _header(identity: str) -> bytes:
    return json.dumps({"identity": identity}).encode() + b"\n"


def _read(partial: Path, identity: str) -> tuple[list[Sample], int]:
    """The samples in unbroken lines, and the bytes that these take; none of a file of another identity."""
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    if not lines or lines[0] != _header(identity):
        return [], 0
    kept, samples = len(lines[0]), []
    for line in lines[1:]:
        if not line.endswith(b"\n"):
            break  # cut off in the middle by a kill
        samples.append(Sample(**json.loads(line)))
        kept += len(line)
    return samples, kept


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The records of a samples.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def per_problem(path: str | Path) -> dict[str, list[bool]]:
    """Whether each sample of each problem is correct, by problem id and in the order of the samples."""
    correct: dict[str, list[bool]] = {}
    for record in sorted(read_samples(path), key=lambda record: record["sample"]):
        correct.setdefault(record["problem_id"], []).append(record["correct"])
    return correct

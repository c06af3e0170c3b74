"""Sample files: one line a sample, growing as samples are drawn, whole at the end."""

import json
from pathlib import Path
from typing import Any

from lark.generate import Sample


def resume(partial: Path, identity: str) -> list[Sample]:
    """The samples of a partial file, which is cut to its unbroken lines, or begun anew if of another evaluation."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"identity": identity}) + "\n"
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    if not lines or lines[0] != header.encode():
        if lines:
            print(f"{partial} was begun with other prompts or settings: starting it again")
        partial.write_bytes(header.encode())
        return []
    kept, samples = len(lines[0]), []
    for line in lines[1:]:
        if not line.endswith(b"\n"):
            break  # cut off in the middle by a kill
        samples.append(Sample(**json.loads(line)))
        kept += len(line)
    with open(partial, "r+b") as file:
        file.truncate(kept)
    print(f"going on from {partial}: {len(samples)} samples are there")
    return samples


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

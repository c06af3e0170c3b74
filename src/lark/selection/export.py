"""Write a selection as selection.jsonl, which TRL and LLaMA-Factory load, and for trainers that read no weight."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import atomic_write, read_json, write_json
from lark.selection.selection import Selection

_TYPES_SETTLED = 8 << 20
"""Bytes. datasets, with which other trainers read selection.jsonl, takes its types from the first 10 MB."""

_DATASET_INFO = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {  # all of them: a tag that is left out is none at all
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "observation",
        "function_tag": "function_call",
    },
}


def export_selection(selection: Selection, read_rows: Callable[[np.ndarray], Any], path: Path, *, name: str) -> None:
    """Write selection.jsonl: one chosen row a line, `messages`, `weight` and `meta`, as TRL loads it; and beside it
    dataset_info.json, by which LLaMA-Factory does (dataset_dir: the folder, dataset: the file's name up to the dot).

    `read_rows` gives an iterable of pool rows for row numbers, so that the pool is never whole in memory. Lines follow
    the pool, but for a field of `meta` that has its first value far down: that line goes to the top.
    """
    valued: set[str] = set()
    late: set[int] = set()
    written = 0
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            rows = zip(read_rows(selection.row), selection.weight, selection.q, selection.score, strict=True)
            for i, (row, weight, q, score) in enumerate(rows):
                meta = {
                    "problem_id": row["problem_id"],
                    "candidate_id": row["candidate_id"],
                    "teacher": row["teacher"],
                    "answer": row["answer"],
                    "correct": row["correct"],
                    "rule": name,
                    "score": float(score),
                    "share": float(q),
                }
                line = {"messages": row["messages"], "weight": float(weight), "meta": meta}
                found = {key for key, value in meta.items() if value is not None} - valued
                if found and written > _TYPES_SETTLED:
                    late.add(i)
                valued |= found
                written += file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        if late:
            _move_up(temporary, late)
    info = path.with_name("dataset_info.json")
    write_json(
        info, (read_json(info) if info.exists() else {}) | {path.stem: {"file_name": path.name, **_DATASET_INFO}}
    )


def plan_repeats(selection: Selection, size: float) -> dict[str, Any] | None:
    """Plan a file for trainers that read no weight: rows repeated as often as their weights say.

    size: lines of the file as a multiple of the selection's rows.
    Returns, for the record, its lines, how many of the rows are in it, the share of the weight on the others, and the
    error, the share of the weight that is on other rows than it should be (total variation); None where all weights
    are equal, so that selection.jsonl is that file.
    """
    if np.allclose(selection.weight, 1):
        return None
    count = count_repeats(selection.weight, round(size * len(selection.row)))
    share = selection.weight / selection.weight.sum()
    return {
        "lines": int(count.sum()),
        "rows": int((count > 0).sum()),
        "weight_left_out": float(share[count == 0].sum()),
        "error": float(np.abs(count / count.sum() - share).sum() / 2),
    }


def export_repeated(
    selection: Selection, read_rows: Callable[[np.ndarray], Any], path: Path, *, name: str, lines: int
) -> None:
    """Write so many lines as `export_selection` does, of weight 1 each; a row comes again after all others."""
    count = count_repeats(selection.weight, lines)
    place = np.concatenate([np.flatnonzero(count > again) for again in range(count.max())])
    q, score, row = selection.q[place], selection.score[place], selection.row[place]
    repeated = replace(selection, row=row, q=q, score=score, weight=np.ones(len(place)))
    export_selection(repeated, read_rows, path, name=name)


def count_repeats(weight: np.ndarray, lines: int) -> np.ndarray:
    """Divide `lines` among rows in proportion to their weights, by largest remainder (ties: the first), int [R]."""
    quota = lines * weight / weight.sum()
    count = np.floor(quota).astype(np.int64)
    count[np.argsort(count - quota, kind="stable")[: lines - int(count.sum())]] += 1
    return count


def _move_up(path: Path, lines: set[int]) -> None:
    """Puts the lines of these numbers first."""
    with atomic_write(path) as temporary, open(path, "rb") as source, open(temporary, "wb") as target:
        for moved in (True, False):
            source.seek(0)
            target.writelines(line for i, line in enumerate(source) if (i in lines) == moved)

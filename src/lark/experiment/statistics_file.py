"""statistics.parquet: the table of statistics and scores that a run leaves."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark.common.cache import atomic_write
from lark.selection.candidates import Candidates
from lark.selection.rule import Rule
from lark.selection.selection import Selection


def write_statistics(
    path: Path, candidates: Candidates, selections: Mapping[str, Selection], rules: Mapping[str, Rule]
) -> None:
    """Write ids, statistics, and every score computed under its rule's name."""
    ids = {name: candidates[name] for name in ("problem_id", "candidate_id", "teacher")}
    scores: dict[str, np.ndarray] = {}
    for name, selection in selections.items():
        title = rules[name].name
        if title in scores and not np.array_equal(scores[title], selection.score_N, equal_nan=True):
            title += f" ({name})"  # two rules of one name, such as two of the user's own
        scores[title] = selection.score_N
    taken = {*ids, *candidates.statistics}
    scores = {f"{title} (score)" if title in taken else title: score_N for title, score_N in scores.items()}
    start = 0
    with atomic_write(path) as temporary, ExitStack() as stack:
        writer = None
        for block in candidates.blocks():  # steps and tokens of all rows need not fit into memory
            rows = slice(start, start := start + len(block["num_tokens"]))
            columns: dict[str, Any] = {name: pa.array(column[rows], pa.string()) for name, column in ids.items()}
            columns |= block
            columns |= {title: score_N[rows] for title, score_N in scores.items()}
            table = pa.table(columns)
            writer = writer or stack.enter_context(pq.ParquetWriter(temporary, table.schema))
            writer.write_table(table)

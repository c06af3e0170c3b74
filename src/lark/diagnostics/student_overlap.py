"""Do two students choose the same? Overlap of the selections that finished runs left, over one pool."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lark.common.errors import LarkError
from lark.common.groups import Groups
from lark.selection.within_problem import Mean, figures, jaccard


def overlap_of_runs(a: str | Path, b: str | Path, *, arm: str = "selector", resamples: int = 1000) -> Mean:
    """Mean over problems of the Jaccard index of what the arm of run folder `a` and that of `b` were given, with what
    random choices of the same sizes would have; over the candidates that both runs chose from (statistics.parquet).

    Raises LarkError where they have no candidate in common, or an arm's selection is not there.
    """
    of_a, of_b = (_candidates(Path(run)) for run in (a, b))
    both = [key for key in of_a if key in of_b]
    if not both:
        raise LarkError(f"the runs {a} and {b} have no candidate in common; compare runs over one pool")
    mask_a, mask_b = (np.array([key in chosen for key in both]) for chosen in (_chosen(Path(r), arm) for r in (a, b)))
    groups = Groups.from_ids([problem for problem, _ in both])
    return figures([jaccard(mask_a, mask_b, groups)], resamples=resamples)[0]


def _candidates(run: Path) -> dict[tuple[str, str], None]:
    table = pq.read_table(run / "statistics.parquet", columns=["problem_id", "candidate_id"])
    return dict.fromkeys(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))


def _chosen(run: Path, arm: str) -> set[tuple[str, str]]:
    path = run / arm / "selection.jsonl"
    if not path.is_file():
        raise LarkError(f"{path} is not there; name a finished run that has the arm {arm}")
    with path.open(encoding="utf-8") as file:
        rows = (json.loads(line)["meta"] for line in file)
        return {(row["problem_id"], row["candidate_id"]) for row in rows}

"""Overlap of what two runs chose from one pool."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark.diagnostics.student_overlap import overlap_of_runs


def write_run(folder, candidates, chosen):
    (folder / "selector").mkdir(parents=True)
    problem, candidate = zip(*candidates, strict=True)
    pq.write_table(pa.table({"problem_id": problem, "candidate_id": candidate}), folder / "statistics.parquet")
    lines = [json.dumps({"meta": {"problem_id": p, "candidate_id": c}}) + "\n" for p, c in chosen]
    (folder / "selector" / "selection.jsonl").write_text("".join(lines))
    return folder


POOL = [(problem, candidate) for problem in "pq" for candidate in "0123"]


def test_over_the_candidates_of_both(tmp_path):
    a = write_run(tmp_path / "a", POOL, [("p", "0"), ("p", "1"), ("q", "0"), ("q", "2")])
    b = write_run(
        tmp_path / "b", [*POOL[::-1], ("r", "0")], [("p", "1"), ("p", "2"), ("q", "0"), ("q", "2"), ("r", "0")]
    )
    found = overlap_of_runs(a, b)
    assert found.mean == pytest.approx((1 / 3 + 1) / 2) and found.problems == 2
    assert found.chance == pytest.approx(1 / 6 * 1 + 4 / 6 * 1 / 3)  # 2 of 4 twice: both, one or none in common


def test_runs_that_cannot_be_compared(tmp_path):
    a = write_run(tmp_path / "a", POOL, POOL[:2])
    other = write_run(tmp_path / "b", [("x", "0")], [("x", "0")])
    with pytest.raises(ValueError, match="no candidate in common"):
        overlap_of_runs(a, other)
    with pytest.raises(ValueError, match=r"baseline/selection.jsonl is not there"):
        overlap_of_runs(a, a, arm="baseline")

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

import lark.selection.candidates
from lark.common.table_cache import Columns
from lark.scoring.passes import LocalWindows
from lark.selection.candidates import Candidates


def candidates(read_column=None) -> Candidates:
    return Candidates(
        problem_id=np.array(["b", "a", "b", "a"], object),
        candidate_id=np.array(["0", "0", "1", "1"], object),
        row_N=np.array([3, 5, 6, 9]),
        statistics={"loss": np.array([0.1, 0.2, 0.3, 0.4])},
        read_column=read_column,
    )


def test_statistics_and_ids_are_columns():
    rows = candidates()
    assert rows["loss"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert rows["problem_id"].tolist() == ["b", "a", "b", "a"]
    assert rows["candidate_id"].tolist() == ["0", "0", "1", "1"]
    assert len(rows) == 4
    assert rows.groups.index_N.tolist() == [0, 1, 0, 1]


def test_a_pool_column_is_read_once_at_the_rows_in_question():
    asked = []

    def read_column(name: str, row_N: np.ndarray) -> np.ndarray:
        asked.append((name, row_N.tolist()))
        return row_N * 10

    rows = candidates(read_column)
    assert not asked
    assert rows["quality"].tolist() == rows["quality"].tolist() == [30, 50, 60, 90]
    assert asked == [("quality", [3, 5, 6, 9])]
    assert rows.where(np.array([False, True, False, True]))["quality"].tolist() == [50, 90]


def test_where_keeps_every_column_of_the_rows_it_keeps():
    rows = candidates().where(np.array([True, False, False, True]))
    assert len(rows) == 2
    assert rows["problem_id"].tolist() == ["b", "a"] and rows["candidate_id"].tolist() == ["0", "1"]
    assert rows["loss"].tolist() == [0.1, 0.4]
    assert rows.row_N.tolist() == [3, 9]
    assert rows.groups.count == 2
    nothing = candidates().where(np.zeros(4, bool))
    assert len(nothing) == nothing.groups.count == len(nothing.row_N) == 0


def test_statistics_are_read_when_asked_for_by_all_views():
    read = []
    lazy = Columns(("loss", "brier"), lambda name: read.append(name) or np.arange(4.0))
    windows = Columns(["window_surprisal"], lambda name: read.append("windows") or np.arange(4.0))
    rows = replace(candidates(), statistics=lazy, passes={LocalWindows(): windows})
    some = rows.where(np.array([True, False, False, True])).as_baseline_for(None)  # type: ignore[arg-type]
    assert read == []
    assert some["brier"].tolist() == [0, 3] and rows["brier"].tolist() == [0, 1, 2, 3]
    assert read == ["brier"]
    assert some.of(LocalWindows())["window_surprisal"].tolist() == [0, 3] and "loss" in some.statistics
    assert read == ["brier", "windows"]


def test_a_column_of_another_length_is_an_error_of_ours():
    with pytest.raises(AssertionError, match="3 values of loss for 4 candidates"):
        replace(candidates(), statistics={"loss": np.zeros(3)})["loss"]
    with pytest.raises(AssertionError, match="2 values of quality for 4 candidates"):
        candidates(lambda name, row_N: row_N[:2])["quality"]


def test_blocks_of_statistics_from_memory_and_from_a_file(monkeypatch):
    monkeypatch.setattr(lark.selection.candidates, "GROUP_ROWS", 3)
    rows = candidates()
    assert [block["loss"].tolist() for block in rows.blocks()] == [[0.1, 0.2, 0.3], [0.4]]
    tables = [pa.table({"loss": [0.1, 0.2, 0.3]}), pa.table({"loss": [0.4]})]
    rows = replace(rows, read_blocks=lambda: iter(tables))
    assert [block["loss"].to_pylist() for block in rows.blocks()] == [[0.1, 0.2, 0.3], [0.4]]
    (block,) = rows.where(np.array([False, True, True, False])).blocks()
    assert block["loss"].tolist() == [0.2, 0.3], "the file holds other rows"


def test_an_unknown_column_is_an_error():
    with pytest.raises(ValueError, match=r"no column 'quality'; they have candidate_id, loss, problem_id"):
        candidates()["quality"]


def test_a_misspelt_column_is_told_what_it_may_have_meant():
    def nothing(name, row_N):
        raise ValueError(f"the pool has no column {name}")

    for wrong, meant in (("los", "loss"), ("corect", "correct")):
        with pytest.raises(ValueError, match=f"no column {wrong}; did you mean {meant}\\?"):
            candidates(nothing)[wrong]

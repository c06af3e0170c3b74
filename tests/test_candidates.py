import numpy as np
import pytest

from lark.candidates import Candidates


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


def test_an_unknown_column_is_an_error():
    with pytest.raises(ValueError, match=r"no column 'quality'; they have candidate_id, loss, problem_id"):
        candidates()["quality"]

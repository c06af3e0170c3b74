"""Columns that are read when they are asked for."""

import numpy as np

from lark.scoring.columns import Columns, where


def columns():
    """Two columns and the list of what has been read."""
    read = []

    def reader(name, values):
        return lambda: read.append(name) or np.array(values)

    return Columns({"a": reader("a", [1.0, 2.0, 3.0]), "b": reader("b", [4.0, 5.0, 6.0])}), read


def test_a_column_is_read_once_and_when_asked_for():
    some, read = columns()
    assert list(some) == ["a", "b"] and len(some) == 2 and "b" in some and "c" not in some
    assert read == []
    assert some["b"].tolist() == some["b"].tolist() == [4, 5, 6]
    assert read == ["b"]


def test_fewer_and_further_columns_share_what_is_read():
    some, read = columns()
    sums = some.also({"sum": lambda: some["a"] + some["b"]})
    assert list(sums) == ["a", "b", "sum"] and list(sums.without("a", "sum")) == ["b"]
    assert read == []
    assert sums["sum"].tolist() == [5, 7, 9]
    assert sums.without("b")["a"] is some["a"] and read == ["a", "b"]


def test_some_rows_of_all_columns():
    some, read = columns()
    kept = where(some, np.array([True, False, True]))
    again = where(kept, np.array([False, True]))
    assert list(again) == ["a", "b"] and read == []
    assert again["a"].tolist() == [3] and kept["a"].tolist() == [1, 3]
    assert read == ["a"]
    assert where({"x": np.arange(3)}, np.array([False, True, False]))["x"].tolist() == [1]

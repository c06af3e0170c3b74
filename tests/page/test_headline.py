"""The page's first sentences: by whose interval excludes 0, and on which side."""

import math
from dataclasses import replace

import pytest
from page_folders import small_sweep

from lark.comparison.comparison import compare
from lark.page.headline import readings
from lark.report import read_summaries


@pytest.fixture
def group(tmp_path):
    small_sweep(tmp_path)
    (found,) = compare(read_summaries([tmp_path])).groups
    return found


def told(group, *intervals, seeds=(0, 1, 2)):
    """The readings if the differences on the one set had these (estimate, low, high)."""
    (name,) = group.sets
    differences = []
    for i, (estimate, low, high) in enumerate(intervals):
        one = group.differences[0]
        interval = replace(one.sets[name].interval, estimate=estimate, low=low, high=high)
        sets = {name: replace(one.sets[name], interval=interval)}
        differences.append(replace(one, selector="mine", baseline=f"rule{i}", seeds=seeds, sets=sets))
    return list(readings(replace(group, differences=tuple(differences))))


def test_each_side_is_named_once_with_the_lowest_difference_first(group):
    (name,) = group.sets
    nan = math.nan
    intervals = [(0.1, 0.05, 0.15), (-0.01, -0.02, 0.01), (0.02, 0.01, 0.03), (-0.3, -0.4, -0.2), (nan, nan, nan)]
    (sentence,) = told(group, *intervals)
    assert sentence == (
        f"{name}, in points, by 95% intervals: mine scores above rule2 (+2.0) and rule0 (+10.0), "
        "scores below rule3 (-30.0), is not told apart from rule1 (-1.0)."
    )
    assert told(group, (-0.5, -0.6, -0.4)) == [f"{name}, in points, by 95% intervals: mine scores below rule0 (-50.0)."]


def test_with_few_seeds_it_says_what_the_intervals_leave_out(group):
    (sentence,) = told(group, (-0.5, -0.6, -0.4), seeds=(0, 1))
    assert sentence.endswith("rule0 (-50.0). Over problems only: the seeds are too few to tell how they vary.")


def test_without_an_interval_nothing_is_told_apart_and_without_a_difference_nothing_is_said(group):
    (sentence,) = told(group, (0.25, math.nan, math.nan))
    assert sentence.endswith("mine is not told apart from rule0 (+25.0).")
    assert told(group, (math.nan, math.nan, math.nan)) == [] == told(group)

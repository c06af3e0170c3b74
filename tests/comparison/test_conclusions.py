"""What differences mean, in a sentence: by whose interval excludes 0, and on which side."""

import math
from dataclasses import replace

from summaries import accuracies, arm, run

from lark.comparison.comparison import compare
from lark.comparison.conclusions import list_conclusions

(GROUP,) = compare(
    [run(selector=arm("mine", "a", accuracies([1.0] * 9)), baseline=arm("rule", "b", accuracies([0.0] * 9)))]
).groups


def concluded(*intervals: tuple[float, float, float], seeds: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """The sentences if the differences had these (estimate, low, high)."""
    (one,) = GROUP.differences
    differences = []
    for i, (estimate, low, high) in enumerate(intervals):
        interval = replace(one.sets["eval"].interval, estimate=estimate, low=low, high=high)
        sets = {"eval": replace(one.sets["eval"], interval=interval, smallest_detectable=0.05)}
        differences.append(replace(one, baseline=f"rule{i}", seeds=seeds, sets=sets))
    return list(map(" ".join, list_conclusions(replace(GROUP, differences=tuple(differences)))))


def test_each_side_is_named_once_with_the_lowest_difference_first() -> None:
    nan = math.nan
    (text,) = concluded(
        (0.1, 0.05, 0.15), (-0.01, -0.02, 0.01), (0.02, 0.01, 0.03), (-0.3, -0.4, -0.2), (nan, nan, nan)
    )
    assert "better than rule2 (+2.0) and rule0 (+10.0), worse than rule3 (-30.0), not told apart from rule1" in text
    assert "on eval (9 problems)" in text


def test_with_few_seeds_it_says_what_to_run() -> None:
    assert "seed=0,1,2" in concluded((-0.5, -0.6, -0.4), seeds=(0, 1))[0]
    assert "seed=0,1,2" not in concluded((-0.5, -0.6, -0.4))[0]


def test_without_an_interval_nothing_is_told_apart_and_without_a_difference_nothing_is_said() -> None:
    assert "not told apart from rule0 (+25.0; detectable: 5.0)" in concluded((0.25, math.nan, math.nan))[0]
    assert concluded((math.nan, math.nan, math.nan)) == [] == concluded()

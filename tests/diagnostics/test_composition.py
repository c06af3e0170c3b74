"""What selections are made of: against plain loops over problems."""

import numpy as np
import pytest

from lark.diagnostics import composition
from lark.selection.candidates import Candidates
from lark.selection.policies import Chi2, Prior, TopB
from lark.selection.rule import Rule
from lark.selection.scores.statistics import Length
from lark.selection.selection import select

PROBLEM = list("ppppqqqrrrrrs")
TEACHER = list("abacabcbbacca")
SCORE = [0.1, 0.9, 0.5, 0.2, 3.0, 3.0, 3.0, 0.5, 0.4, 0.1, 0.3, 0.0, 1.0]


def candidates(**columns):
    pool = {"teacher": TEACHER, "mark": SCORE, "correct": [np.nan] * 13, **columns}
    return Candidates(
        problem_id=np.array(PROBLEM, object),
        candidate_id=np.array([str(i) for i in range(13)], object),
        row_N=100 + np.arange(13),
        statistics={"num_tokens": np.arange(10, 23)},
        read_column=lambda name, row_N: np.array([pool[name][row - 100] for row in row_N], object),
    )


def chosen(policy):
    own = candidates()
    rule = Rule(name="marks", score=lambda c: c["mark"].astype(float), policy=policy)
    selection = select(rule, own, seed=0)
    return own, selection, composition.expand_q(own, selection)


def rows_of(problem):
    return [i for i, one in enumerate(PROBLEM) if one == problem]


def test_shares_are_those_of_the_selection():
    _, selection, q_N = chosen(Chi2(budget=2))
    assert q_N[selection.row - 100] == pytest.approx(selection.q)
    assert q_N.sum() == pytest.approx(4) and (q_N > 0).sum() == len(selection.row)


def test_teachers_beside_a_random_choice():
    own, _, q_N = chosen(TopB(budget=2))
    found = composition.measure_teachers(own, q_N)
    assert list(found) == sorted(found, key=lambda name: -found[name]["share"])
    for name, row in found.items():
        mine = np.array([teacher == name for teacher in TEACHER])
        assert row["share"] == pytest.approx((q_N * mine).sum() / 4)
        assert row["pool"] == pytest.approx(mine.mean())
        assert row["chance"] == pytest.approx(np.mean([mine[rows_of(problem)].mean() for problem in "pqrs"]))
    assert sum(row["chance"] for row in found.values()) == pytest.approx(1)


def test_concentration_by_its_definitions():
    own, _, q_N = chosen(Chi2(budget=2))
    found = composition.measure_concentration(own, q_N, budget=2, resamples=100)
    assert found["effective_sample_size"] == pytest.approx(q_N.sum() ** 2 / np.square(q_N).sum())
    sizes = {problem: len(rows_of(problem)) for problem in "pqrs"}
    chi2 = [sum((q_N[i] - 1 / k) ** 2 * k for i in rows_of(p)) for p, k in sizes.items()]
    assert found["chi2_within_problem"].mean == pytest.approx(np.mean(chi2))
    assert found["effective_within_problem"].mean == pytest.approx(
        np.mean([k / (1 + x) for k, x in zip(sizes.values(), chi2, strict=True)])
    )
    assert found["least_chi2_within_problem"] == pytest.approx(np.mean([4 / 2 - 1, 3 / 2 - 1, 5 / 2 - 1, 0]))
    assert min(np.array(chi2) - [1, 0.5, 1.5, 0]) >= -1e-12
    p_N = np.array([1 / (4 * sizes[problem]) for problem in PROBLEM])
    assert found["chi2_whole"] == pytest.approx(((q_N / 4 - p_N) ** 2 / p_N).sum())


def test_taking_everything_is_no_distance():
    own, _, q_N = chosen(Prior())
    found = composition.measure_concentration(own, q_N, budget=None, resamples=100)
    assert found["chi2_within_problem"].mean == pytest.approx(0, abs=1e-12)
    assert found["chi2_whole"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(found["least_chi2_within_problem"])


def test_gaps_of_the_budget_policy():
    own, selection, _ = chosen(Chi2(budget=2))
    found = composition.measure_gaps(own, selection, Chi2(budget=2), seed=0)
    gaps = {"p": (0.9 + 0.5) / 2 - 0.2, "q": 0.0, "r": (0.5 + 0.4) / 2 - 0.3}  # s has no candidate to exclude
    assert found["problems"] == 3 and found["no_gap"] == 1
    assert found["gap"]["p50"] == pytest.approx(np.median(list(gaps.values())))
    assert found["movable"]["p90"] == pytest.approx(found["gap"]["p90"] / 4)
    relative = [gaps[p] / np.std([SCORE[i] for i in rows_of(p)]) for p in "pr"]
    assert found["gap_over_deviation"]["p50"] == pytest.approx(np.median(relative))


def test_difficulty_bins_keep_equal_problems_together():
    assert composition.bin_difficulty(np.arange(8.0)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert composition.bin_difficulty(np.array([2.0, 1.0, np.nan, 1.0, 1.0])).tolist() == [3, 1, -1, 1, 1]
    assert composition.bin_difficulty(np.full(5, np.nan)).tolist() == [-1] * 5


def test_coverage_by_difficulty():
    correct = [1, 0, 1, 1, 0, 0, 1, np.nan, 1, 1, 1, 1, 1]
    own, _, q_N = chosen(TopB(budget=2))
    loss_N, correct_N = np.repeat([1.0, 4.0, 2.0, 3.0], [4, 3, 5, 1]), np.array(correct, float)
    measures = composition.measure_difficulty(own, {"loss": loss_N, "correct": correct_N})
    assert measures["loss"].tolist() == [1.0, 4.0, 2.0, 3.0]
    assert measures["correct"] == pytest.approx([-3 / 4, -1 / 3, -1, -1])
    rows = composition.measure_coverage(own, q_N, measures["loss"], correct_N)
    for row, problem in zip(rows, "prsq", strict=True):  # from easy to hard
        mine = rows_of(problem)
        taken = [i for i in mine if q_N[i] > 0]
        assert (row["problems"], row["problems_with_choice"], row["chosen"]) == (1, 1, len(taken))
        assert row["chosen_tokens"] == pytest.approx(np.mean([10 + i for i in taken]))
        assert row["pool_tokens"] == pytest.approx(np.mean([10 + i for i in mine]))
        assert row["chosen_correct"] == pytest.approx(np.nanmean(correct_N[taken]))
        assert row["pool_correct"] == pytest.approx(np.nanmean(correct_N[mine]))


def test_problems_without_a_choice_are_counted_as_such():
    own, _, _ = chosen(TopB(budget=1))
    q_N = np.where(np.array(PROBLEM) == "p", 0.25, 0.0)
    rows = composition.measure_coverage(own, q_N, np.arange(4.0), None)
    assert [row["problems_with_choice"] for row in rows] == [1, 0, 0, 0]
    assert np.isnan(rows[1]["chosen_tokens"]) and "chosen_correct" not in rows[0]


def test_overlaps_of_every_pair():
    own = candidates()
    shortest, longest = (Length(sign=sign)(own) for sign in (-1, 1))
    low, high = shortest >= np.sort(shortest)[-6], longest >= np.sort(longest)[-6]
    rows = composition.measure_overlaps({"low": low, "high": high, "low again": low}, own.groups, resamples=100)
    assert [(row["a"], row["b"]) for row in rows] == [("low", "high"), ("low", "low again"), ("high", "low again")]
    assert rows[1]["mean"] == 1.0 and rows[1]["chance"] < 1.0

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from lark.scoring.passes import Statistics
from lark.selection.candidates import Candidates
from lark.selection.policies import TopB
from lark.selection.rule import Rule
from lark.selection.scores import text as pool_scores
from lark.selection.scores.text import Column, Correct, RuleQuality, Teacher, TeacherMatched
from lark.selection.selection import Selection, select


def candidates(problem_id, **columns) -> Candidates:
    """Candidates 0, 1, ... of the pool's rows 100, 101, ... with no statistics at all."""
    rows = len(problem_id)
    columns = {"correct": [np.nan] * rows} | columns
    arrays = {name: np.array(values, np.float64 if name == "correct" else object) for name, values in columns.items()}
    return Candidates(
        problem_id=np.array(problem_id, object),
        candidate_id=np.array([str(i) for i in range(rows)], object),
        row_N=np.arange(rows) + 100,
        statistics={"num_tokens": np.ones(rows, np.int64)},
        read_column=lambda name, row_N: arrays[name][row_N - 100],
    )


@pytest.mark.parametrize("score", [Correct(), Teacher(), RuleQuality(), Column(column="judge"), TeacherMatched(seed=0)])
def test_scores_over_the_pool_need_no_student(score):
    assert score.needs == ()


# --- correct


def test_correct_puts_the_unknown_between_right_and_wrong():
    assert Correct()(candidates(["p"] * 3, correct=[1.0, 0.0, math.nan])).tolist() == [1.0, 0.0, 0.5]


def test_correct_without_any_verdict_is_an_error_and_no_random_choice():
    with pytest.raises(
        ValueError, match=r"^selector correct .* no candidate is known .*; fill in .* `correct` or `ans"
    ):
        Correct()(candidates(["p"] * 2, correct=[math.nan, math.nan]))


# --- teacher


def test_teachers_come_in_their_order_and_the_others_tie_after_them():
    rows = candidates(["p"] * 5, teacher=["b", "c", "a", None, "d"])
    score_N = Teacher(order=["a", "b"])(rows)
    assert score_N[2] > score_N[0] > score_N[1] == score_N[3] == score_N[4]


def test_without_an_order_teachers_come_by_their_share_of_correct_candidates():
    verdicts = {
        "strong": [1, 1, 0],
        "a_tie": [1, 0, math.nan, math.nan],  # known verdicts alone count
        "b_tie": [0, 1],
        "weak": [1, 1, 1, 0, 0, 0, 0],
        "unchecked": [math.nan],
        None: [1, 1],
    }
    teacher, correct = zip(*((name, x) for name, values in verdicts.items() for x in values), strict=True)
    order = np.random.default_rng(0).permutation(len(teacher))
    score_N = Teacher()(
        candidates(["p"] * len(order), teacher=np.array(teacher, object)[order], correct=np.array(correct)[order])
    )
    by_teacher = dict(zip(np.array(teacher, object)[order].tolist(), score_N.tolist(), strict=True))
    assert sorted(by_teacher, key=lambda name: -by_teacher[name])[:4] == ["strong", "a_tie", "b_tie", "weak"]
    assert by_teacher["unchecked"] == by_teacher[None] < by_teacher["weak"]
    assert len(set(zip(np.array(teacher, object)[order], score_N, strict=True))) == len(verdicts)


def test_an_order_of_teachers_that_cannot_be_is_one_sentence():
    rows = candidates(["p"] * 3, teacher=["b", "a", None], correct=[math.nan, math.nan, 1.0])
    with pytest.raises(ValueError, match=r"order=\['a', 'x', 'y'\] names x, y, of which no candidate .* there: a, b$"):
        Teacher(order=["a", "x", "y"])(rows)
    with pytest.raises(ValueError, match=r"order=\['x'\] names x, .* the teachers that are there: none"):
        Teacher(order=["x"])(candidates(["p"], teacher=[None]))
    with pytest.raises(ValueError, match=r"selector\.score\.order=null .* but of no candidate are both .* known; name"):
        Teacher()(rows)
    with pytest.raises(ValueError, match=r"selector\.score\.order=\['a', 'b', 'a'\] names a more than once"):
        Teacher(order=["a", "b", "a"])
    with pytest.raises(ValueError, match=r"selector\.score\.order=\[\] names no teacher"):
        Teacher(order=[])


# --- rule_quality

WORDS = ["check", "Verify", "perhaps", "MIGHT", "therefore", "since", "checks", "sincerely", "recheck", "so", "x=1"]


def rule_quality_by_the_formula(texts: list[list[str]]) -> list[float]:
    """From lists of words, one criterion at a time."""

    def per_word(*counted: str) -> list[float]:
        return [sum(word.lower() in counted for word in words) / len(words) if words else 0.0 for words in texts]

    def z(values: list[float]) -> list[float]:
        spread = 0.0 if len(set(values)) == 1 else statistics.pstdev(values)
        return [(value - statistics.fmean(values)) / spread if spread else 0.0 for value in values]

    criteria = [
        (0.30, z([float(len(words)) for words in texts])),
        (0.20, z(per_word("check", "verify"))),
        (0.25, z(per_word("perhaps", "might"))),
        (0.25, z(per_word("therefore", "since"))),
    ]
    return [math.fsum(weight * values[i] for weight, values in criteria) for i in range(len(texts))]


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=12), min_size=1, max_size=8),
    ends=st.lists(st.sampled_from([" ", ", ", ".\n", ") ", "!?\t"]), min_size=8, max_size=8),
)
def test_rule_quality_equals_its_formula(texts, ends):
    written = [end.join(words) for words, end in zip(texts, ends, strict=False)]
    score_N = RuleQuality()(candidates(["p"] * len(texts), text=written))
    np.testing.assert_allclose(score_N, rule_quality_by_the_formula(texts), rtol=1e-9, atol=1e-9)


def test_rule_quality_in_figures():
    """Words 2, 4 and 6, the other criteria constant but for the checks per word 1/2, 0 and 0."""
    texts = ["Check it", "we look at it", "we look at it again today"]
    words = [-math.sqrt(1.5), 0.0, math.sqrt(1.5)]
    checks = [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)]
    expected = [0.3 * a + 0.2 * b for a, b in zip(words, checks, strict=True)]
    np.testing.assert_allclose(RuleQuality()(candidates(["p", "q", "q"], text=texts)), expected)


def test_rule_quality_of_equal_texts_is_zero():
    texts = ["perhaps we check this, since it might be so"] * 7  # 1/9 a word: the mean of seven such is not 1/9
    assert RuleQuality()(candidates(["p"] * 7, text=texts)).tolist() == [0.0] * 7


def test_rule_quality_reads_a_few_trajectories_at_a_time(monkeypatch):
    texts = [" ".join(["check"] * i + ["so"] * 5) for i in range(10)]
    rows = candidates(["p"] * 10, text=texts)
    whole = RuleQuality()(rows)
    read_column, read = rows.read_column, []

    def counting(name: str, row_N: np.ndarray) -> np.ndarray:
        read.append(row_N.tolist())
        assert read_column is not None
        return read_column(name, row_N)

    monkeypatch.setattr(pool_scores, "BLOCK_ROWS", 4)
    assert RuleQuality()(replace(rows, read_column=counting)).tolist() == whole.tolist()
    assert read == [[100, 101, 102, 103], [104, 105, 106, 107], [108, 109]]


def test_rule_quality_without_a_pool_says_which_columns_there_are():
    rows = replace(candidates(["p"]), read_column=None)
    with pytest.raises(ValueError, match=r"candidates have no column 'text'; they have candidate_id, num_tokens"):
        RuleQuality()(rows)


# --- a column


def test_a_column_is_read_as_numbers_and_misses_what_it_misses():
    rows = candidates(["p"] * 4, judge=[3, None, 0.5, True])
    np.testing.assert_array_equal(Column(column="judge")(rows), [3.0, math.nan, 0.5, 1.0])
    assert Column(column="num_tokens").needs == ()
    assert Column(column="loss").needs == (Statistics(),)


def test_a_column_that_is_not_there_or_holds_no_numbers_is_one_sentence():
    rows = candidates(["p", "p"], judge=["good", "bad"], marks=[[1], [2, 3]])
    for column in ("judge", "marks"):
        with pytest.raises(
            ValueError, match=rf"selector\.score\.column={column} cannot be read as numbers \(.*\); set"
        ):
            Column(column=column)(rows)
    with pytest.raises(ValueError, match=r"selector\.score\.column=elo cannot be read .*have no column 'elo'"):
        Column(column="elo")(replace(rows, read_column=None))


# --- teacher_matched_random


def rule(score: Callable[[Candidates], np.ndarray], budget: int = 2, filter=None) -> Rule:
    return Rule(name="mine", score=score, filter=filter, policy=TopB(budget=budget))


def taking(wanted: dict[str, str], rows: Candidates) -> Selection:
    """A selection that took, of each problem, candidates of the teachers wanted there, one a letter."""
    left = {problem: Counter(teachers) for problem, teachers in wanted.items()}
    score_N = np.full(len(rows), math.nan)
    for i, (problem, teacher) in enumerate(zip(rows["problem_id"], rows["teacher"], strict=True)):
        if left.get(problem, Counter())[teacher] > 0:
            left[problem][teacher] -= 1
            score_N[i] = 1.0
    assert not any(counter.total() for counter in left.values())
    return select(rule(lambda _: score_N, budget=len(rows)), rows, seed=0)


def teachers_of(selection: Selection, rows: Candidates) -> dict[str, str]:
    """The teachers of each problem's chosen rows, sorted, one a letter."""
    chosen = np.isin(rows.row_N, selection.row)
    found: dict[str, str] = {}
    for problem, teacher in zip(rows["problem_id"][chosen], rows["teacher"][chosen], strict=True):
        found[problem] = "".join(sorted(found.get(problem, "") + teacher))
    return found


def pool_of(teachers: dict[str, str]) -> Candidates:
    """Problems with one candidate for each letter."""
    pairs = [(problem, teacher) for problem, letters in teachers.items() for teacher in letters]
    return candidates([problem for problem, _ in pairs], teacher=[teacher for _, teacher in pairs])


PAIRS = ["aa", "ab", "ac", "ad", "bb", "bc", "bd", "cc", "cd", "dd"]
"""What the selector took in ten problems, no two the same, so that a baseline's choice gives its donor away."""


def test_each_problem_gets_the_teachers_of_another_one_every_other_one_as_often():
    rows = pool_of({f"p{i}": "aabbccdd" for i in range(10)})
    selector = taking({f"p{i}": pair for i, pair in enumerate(PAIRS)}, rows)
    donors, seeds = np.zeros((10, 10)), 300
    for seed in range(seeds):
        baseline = select(rule(TeacherMatched(seed=seed)), rows, seed=0, reference_selection=selector)
        for problem, pair in teachers_of(baseline, rows).items():
            donors[int(problem[1:]), PAIRS.index(pair)] += 1
    assert np.diag(donors).tolist() == [0.0] * 10
    others = donors[~np.eye(10, dtype=bool)]
    expected = seeds / 9
    assert ((others - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, 80)  # 10 problems, 9 donors, a sum fixed each


def test_over_many_seeds_teachers_have_the_selectors_shares():
    rng = np.random.default_rng(0)
    rows = pool_of({f"p{i}": "abcd" for i in range(60)})
    took = {f"p{i}": "".join(rng.choice(list("abcd"), 2, replace=False, p=[0.5, 0.3, 0.15, 0.05])) for i in range(60)}
    selector, seeds = taking(took, rows), 60
    share = np.array([[letters.count(t) for t in "abcd"] for letters in took.values()]).mean(0) / 2
    counts_S4 = np.zeros((seeds, 4))
    for seed in range(seeds):
        baseline = select(rule(TeacherMatched(seed=seed)), rows, seed=0, reference_selection=selector)
        joined = "".join(teachers_of(baseline, rows).values())
        counts_S4[seed] = [joined.count(t) / len(joined) for t in "abcd"]
    error = counts_S4.std(0, ddof=1) / math.sqrt(seeds)
    assert (np.abs(counts_S4.mean(0) - share) < 4 * error).all()
    assert np.abs(share - 0.25).max() > 0.15 > 20 * error.max()  # far from a choice at random


def test_which_candidates_of_a_teacher_and_which_of_a_donors_teachers_is_random():
    """The donor gave a and b; a problem with three of a and one of b from which one row is taken."""
    rows = pool_of({"p": "aaab", "q": "ab"})
    selector = taking({"p": "a", "q": "ab"}, rows)
    first, seeds = Counter(), 2000
    for seed in range(seeds):
        first[int(np.argmax(TeacherMatched(seed=seed)(replace(rows, reference_selection=selector))[:4]))] += 1
    expected = np.array([seeds / 6] * 3 + [seeds / 2])
    observed = np.array([first[i] for i in range(4)])
    assert ((observed - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, 3)


def test_what_no_donor_gives_comes_last_but_comes():
    rows = pool_of({"p": "xxx", "q": "ab"})
    score_N = TeacherMatched(seed=0)(replace(rows, reference_selection=taking({"q": "ab"}, rows)))
    assert np.isfinite(score_N).all() and len(set(score_N)) == 5
    alone = select(
        rule(TeacherMatched(seed=0)), rows, seed=0, reference_selection=taking({"p": "xx"}, rows)
    )  # p has no other problem
    assert teachers_of(alone, rows) == {"p": "xx"}


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does():
    rng = np.random.default_rng(0)
    rows = pool_of({f"p{i}": "".join(rng.choice(list("abcde"), rng.integers(2, 7))) for i in range(50)})
    selector = select(rule(lambda rows: np.array([float(t == "a") for t in rows["teacher"]])), rows, seed=0)
    straight = TeacherMatched(seed=3)(replace(rows, reference_selection=selector))
    order = rng.permutation(len(rows))
    shuffled = Candidates(
        problem_id=rows.problem_id[order],
        candidate_id=rows.candidate_id[order],
        row_N=rows.row_N[order],
        statistics={},
        read_column=rows.read_column,
        reference_selection=selector,
    )
    assert TeacherMatched(seed=3)(shuffled).tolist() == straight[order].tolist()
    assert (TeacherMatched(seed=4)(replace(rows, reference_selection=selector)) != straight).all()


def test_a_filter_acts_on_the_donors_too():
    rows = pool_of({f"p{i}": "aabbcc" for i in range(8)})
    selector = taking({f"p{i}": "ab" if i % 2 else "ac" for i in range(8)}, rows)
    no_a = rule(TeacherMatched(seed=0), filter=lambda rows: np.array([t != "a" for t in rows["teacher"]]))
    baseline = teachers_of(select(no_a, rows, seed=0, reference_selection=selector), rows)
    assert set(baseline) == {f"p{i}" for i in range(8)}
    assert all(len(letters) == 2 and "a" not in letters for letters in baseline.values())
    only_d = rule(TeacherMatched(seed=0), filter=lambda rows: ~np.isin(rows.row_N, selector.row))
    with pytest.raises(ValueError, match=r"baseline\.filter lets none of the selector's choice through"):
        select(only_d, rows, seed=0, reference_selection=selector)


def test_it_is_a_control_only_and_needs_teachers():
    rows = pool_of({"p": "ab", "q": "ab"})
    with pytest.raises(ValueError, match="is no selector itself; set baseline=teacher_matched_random and another"):
        select(rule(TeacherMatched(seed=0)), rows, seed=0)
    unknown = candidates(["p", "q", "q"], teacher=["a", None, None])
    selector = select(rule(lambda rows: np.zeros(3)), unknown, seed=0)
    with pytest.raises(
        ValueError, match="needs a teacher in every candidate, 2 of 3 have none; fill the pool's teacher"
    ):
        select(rule(TeacherMatched(seed=0)), unknown, seed=0, reference_selection=selector)

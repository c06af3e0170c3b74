import json
import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import spearmanr

from lark.common.groups import Groups
from lark.selection.candidates import Candidates
from lark.selection.policies import Chi2, Prior, Sample, make_policy
from lark.selection.rule import Rule
from lark.selection.scores.statistics import Constant, Lark, Length, Likelihood, Random
from lark.selection.selection import Selection, compute_mean_spearman, select

TEACHERS = np.array(["terse", "verbose", "careful", "terse", None], object)


def pool(problems=30, seed=0) -> Candidates:
    """Problems p0, p1, ... of 1 to 5 candidates each; row numbers start at 100."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, problems)
    problem_id = np.repeat([f"p{i}" for i in range(problems)], sizes).astype(object)
    candidate_id = np.concatenate([np.arange(size) for size in sizes]).astype(str).astype(object)
    rows = len(problem_id)
    columns = {
        "teacher": TEACHERS[candidate_id.astype(int)],
        "correct": rng.choice([1.0, 0.0, math.nan], rows),
        "quality": np.array([None if x < 0.1 else x for x in rng.random(rows)], object),
        "label": np.array(["good"] * rows, object),
    }
    return Candidates(
        problem_id=problem_id,
        candidate_id=candidate_id,
        row_N=np.arange(rows) + 100,
        statistics={
            "loss": rng.uniform(0.1, 2, rows),
            "brier": rng.uniform(0, 1, rows),
            "num_tokens": rng.integers(1, 500, rows),
        },
        read_column=lambda name, row_N: columns[name][row_N - 100],
    )


def rule(score=None, *, filter=None, name="mine", **policy) -> Rule:
    return Rule(name=name, score=score or Lark(), policy=make_policy(**(policy or {"budget": 2})), filter=filter)


def ids(rows: Candidates, selection: Selection) -> dict[tuple[str, str], float]:
    """Weight by (problem, candidate)."""
    place = {row: i for i, row in enumerate(rows.row_N.tolist())}
    chosen = [place[row] for row in selection.row.tolist()]
    keys = zip(rows["problem_id"][chosen], rows["candidate_id"][chosen], strict=True)
    return dict(zip(keys, selection.weight.tolist(), strict=True))


def counts(selection: Selection) -> dict[str, int]:
    return selection.record["counts"]


POLICIES = [
    {"budget": 2},
    {"tau": 0.05},
    {"radius": 0.5},
    {"kind": "kl", "budget": 3},
    {"kind": "top_b", "budget": 3},
    {"kind": "sample", "budget": 3},
    {"kind": "prior"},
]


@pytest.mark.parametrize("policy", POLICIES)
def test_shares_sum_to_one_per_problem_and_weights_have_mean_one(policy):
    rows = pool()
    selection = select(rule(**policy), rows, seed=0)
    chosen = selection.row - 100
    for problem in set(rows["problem_id"]):
        assert selection.q[rows["problem_id"][chosen] == problem].sum() == pytest.approx(1, rel=1e-12)
    assert selection.weight.mean() == pytest.approx(1, rel=1e-12)
    ratio = selection.weight / selection.q
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert (selection.q > 0).all() and (np.diff(selection.row) > 0).all()
    assert selection.score.tolist() == selection.score_N[chosen].tolist()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("score", [Lark(), Constant(), Random(seed=3)])
def test_shuffling_the_pool_changes_no_selection(score, policy):
    rows = pool()
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = Candidates(
        problem_id=rows.problem_id[order],
        candidate_id=rows.candidate_id[order],
        row_N=rows.row_N[order],
        statistics={name: column[order] for name, column in rows.statistics.items()},
        read_column=rows.read_column,
    )
    straight, mixed = (ids(r, select(rule(score, **policy), r, seed=0)) for r in (rows, shuffled))
    assert straight.keys() == mixed.keys()
    np.testing.assert_allclose([mixed[key] for key in straight], list(straight.values()), rtol=1e-9)


@pytest.mark.parametrize("policy", POLICIES[:6])
def test_a_baseline_takes_as_many_rows_of_each_problem_with_equal_weights(policy):
    rows = pool()
    selector = select(rule(filter="correct", **policy), rows, seed=0)
    baseline = select(rule(Length(sign=1), budget=1), rows, seed=0, reference_selection=selector)
    problem_N = rows["problem_id"]
    taken = [Counter(problem_N[chosen.row - 100]) for chosen in (selector, baseline)]
    assert taken[0] == taken[1] == dict(selector.taken_by_problem)
    chosen = set((baseline.row - 100).tolist())
    for problem, number in taken[0].items():
        longest = sorted(np.flatnonzero(problem_N == problem), key=lambda i: -rows["num_tokens"][i])
        assert chosen & set(longest) == set(longest[:number])
    assert baseline.q == pytest.approx([1 / taken[0][problem] for problem in problem_N[baseline.row - 100]])
    assert counts(baseline)["short_of_selector"] == 0
    assert baseline.record["matched"] and baseline.record["policy"]["kind"] == "top_b"


def test_a_baseline_that_runs_out_of_rows_counts_how_many():
    rows = pool()
    selector = select(rule(budget=3), rows, seed=0)
    baseline = select(rule(Length(sign=1), filter="correct"), rows, seed=0, reference_selection=selector)
    passing = Counter(rows["problem_id"][rows["correct"] == 1])
    short = sum(max(0, number - passing[problem]) for problem, number in selector.taken_by_problem.items())
    assert short > 0
    assert counts(baseline)["short_of_selector"] == short == len(selector.row) - len(baseline.row)
    assert short > 0 and not baseline.record["matched"]


def test_all_takes_every_candidate_with_one_over_k_and_is_unmatched():
    rows = pool()
    selector = select(rule(), rows, seed=0)
    everything = select(rule(Constant(), kind="prior"), rows, seed=0, reference_selection=selector)
    assert everything.row.tolist() == rows.row_N.tolist()
    np.testing.assert_allclose(everything.q, 1 / rows.groups.spread(rows.groups.size))
    assert everything.record["matched"] is False
    assert select(rule(Constant(), kind="prior"), rows, seed=0).record["matched"] is True


def test_rows_of_weight_zero_leave_the_selection_and_are_counted():
    rows = Candidates(
        problem_id=np.array(["p"] * 4, object),
        candidate_id=np.array(list("0123"), object),
        row_N=np.arange(4),
        statistics={"loss": np.array([1.0, 2.0, 2.0, 3.0]), "num_tokens": np.arange(4)},
        read_column=lambda name, row_N: np.full(len(row_N), 1.0 if name == "correct" else "t", object),
    )
    selection = select(rule(Likelihood(), budget=2), rows, seed=0)
    assert selection.row.tolist() == [0]  # the second best ties with the best excluded one
    assert selection.record["policy"]["zero_weight_in_top_b"] == 1
    assert counts(selection)["not_chosen"] == 3


def test_candidates_without_a_score_are_never_chosen_and_are_counted():
    rows = pool()
    missing_N = np.arange(len(rows)) % 3 == 0

    def score(candidates: Candidates) -> np.ndarray:
        missing = (None, math.nan, -math.inf)
        return np.array([missing[i % 9 // 3] if i % 3 == 0 else 1.0 * i for i in range(len(candidates))], object)

    policies = Chi2(budget=5), Prior(), Chi2(tau=1e9), Sample(budget=50)
    for policy in policies:
        selection = select(Rule(name="mine", score=score, policy=policy), rows, seed=0)
        assert not missing_N[selection.row - 100].any()
        assert counts(selection)["dropped_without_score"] == missing_N.sum()
        without = set(rows["problem_id"]) - set(rows["problem_id"][~missing_N])
        assert counts(selection)["problems_without_choice"] == len(without) > 0
    baseline = select(rule(score), rows, seed=0, reference_selection=select(rule(budget=5), rows, seed=0))
    assert not missing_N[baseline.row - 100].any()


def test_the_counts_account_for_every_candidate():
    rows = pool()
    selection = select(rule(Likelihood(), filter="correct"), rows, seed=0)
    figures = counts(selection)
    assert figures["candidates"] == len(rows)
    assert figures["dropped_by_filter"] == int((rows["correct"] != 1).sum())
    parts = ("dropped_by_filter", "dropped_without_score", "chosen", "not_chosen")
    assert sum(figures[part] for part in parts) == len(rows)
    assert figures["problems"] - figures["problems_without_choice"] == len(selection.taken_by_problem)


def test_a_prior_by_teacher_and_by_column():
    rows = pool()
    with pytest.raises(ValueError, match="prior=per_teacher needs a teacher in every candidate"):
        select(rule(Constant(), kind="prior", prior="per_teacher"), rows, seed=0)
    by_quality = select(rule(Constant(), kind="prior", prior="num_tokens"), rows, seed=0)
    tokens_N = rows["num_tokens"].astype(float)
    np.testing.assert_allclose(by_quality.q, tokens_N / rows.groups.spread(rows.groups.sum(tokens_N)))


def test_the_records_figures_by_hand():
    rows = Candidates(
        problem_id=np.array(["p", "p", "p", "q", "q"], object),
        candidate_id=np.array(list("01201"), object),
        row_N=np.arange(5),
        statistics={"loss": np.array([1.0, 2.0, 4.0, 3.0, 1.0]), "num_tokens": np.array([10, 20, 30, 40, 50])},
        read_column=lambda name, row_N: {
            "teacher": np.array(["a", "b", "a", "b", "b"], object),
            "correct": np.array([1.0, 0.0, 0.0, math.nan, 0.0]),
        }[name][row_N],
    )
    selection = select(rule(Likelihood(), budget=2, name="likelihood"), rows, seed=0)
    # p: scores -1, -2 above the threshold -4, so 3 and 2 of 5; q: nothing is excluded, so 1/2 each
    np.testing.assert_allclose(selection.q, [0.6, 0.4, 0.5, 0.5])
    np.testing.assert_allclose(selection.weight, [1.2, 0.8, 1.0, 1.0])
    record = selection.record
    assert record["rule"] == "likelihood" and record["tokens"] == 120
    assert record["effective_sample_size"] == pytest.approx(16 / (1.44 + 0.64 + 2))
    assert list(record["teacher_share"]) == ["b", "a"]
    assert record["teacher_share"] == pytest.approx({"b": 0.7, "a": 0.3})
    assert record["known_wrong"] == pytest.approx({"weight": 0.45, "candidates": 0.6})
    assert record["within_problem_spearman"] == pytest.approx({"loss": -1.0, "num_tokens": 0.0})
    assert record["policy"]["budget"] == 2 and record["policy"]["problems_within_budget"] == 1
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize("policy", POLICIES)
def test_every_record_is_plain_json(policy):
    rows = pool()
    selector = select(rule(**policy), rows, seed=0)
    for selection in (selector, select(rule(Random(seed=0)), rows, seed=0, reference_selection=selector)):
        assert json.loads(json.dumps(selection.record, allow_nan=False)) == selection.record


def test_within_problem_spearman_is_the_mean_of_scipys():
    rng = np.random.default_rng(0)
    problem_N = rng.integers(0, 60, 300)
    a_N, b_N = rng.integers(0, 5, 300).astype(float), rng.integers(0, 5, 300)  # many ties, some constant problems
    a_N[rng.random(300) < 0.2] = math.nan
    each = []
    for problem in range(60):
        inside = (problem_N == problem) & ~np.isnan(a_N)
        if len(set(a_N[inside])) > 1 and len(set(b_N[inside])) > 1:
            each.append(spearmanr(a_N[inside], b_N[inside])[0])
    assert 30 < len(each) < 60
    assert compute_mean_spearman(a_N, b_N, Groups.from_ids(problem_N)) == pytest.approx(np.mean(each), rel=1e-12)


def test_within_problem_spearman_without_a_problem_that_counts_is_none():
    groups = Groups.from_ids(["p", "p", "q"])
    assert compute_mean_spearman(np.full(3, math.nan), np.arange(3), groups) is None
    assert compute_mean_spearman(np.ones(3), np.arange(3), groups) is None

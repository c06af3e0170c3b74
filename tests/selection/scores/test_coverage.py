"""Coverage: lazy greedy in blocks against a naive greedy that computes everything again at each step."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lark.common.groups import tie_hash, unit_hash
from lark.scoring.passes import MeanHidden
from lark.selection.candidates import Candidates
from lark.selection.policies import TopB
from lark.selection.rule import Rule
from lark.selection.scores import coverage
from lark.selection.scores.coverage import Coverage
from lark.selection.selection import select


def candidates(problem_id, vectors, order=None) -> Candidates:
    order = np.arange(len(problem_id)) if order is None else order
    column = np.empty(len(problem_id), object)
    column[:] = [np.array(vectors[i], np.float32) for i in order]
    return Candidates(
        problem_id=np.array([problem_id[i] for i in order], object),
        candidate_id=np.array([str(i) for i in order], object),
        row_N=np.array(order),
        statistics={"num_tokens": np.ones(len(order), np.int64)},
        read_column=lambda name, row_N: np.full(len(row_N), None, object),
        passes={MeanHidden(): {"vector": column}},
    )


def naive(rows: Candidates, score: Coverage) -> list[int]:
    """Greedy by its definition: at each step the gain of every candidate computed again."""
    ties = tie_hash(score.seed, rows["problem_id"], rows["candidate_id"]).tolist()
    draws = unit_hash(score.seed, rows["problem_id"], rows["candidate_id"], salt="coverage")
    reference = sorted(range(len(rows)), key=draws.__getitem__)[: score.reference]
    similarity = cosine(rows)

    def gain(row):
        nearest = [max([-1.0, *(similarity[j][other] for other in order)]) for j in reference]
        total = sum(max(0, similarity[j][row] - near) for near, j in zip(nearest, reference, strict=True))
        return round(total, 9)  # rows that would cover each other are equally good

    order: list[int] = []
    allowed = score.budget
    while len(order) < len(rows):
        left = set(range(len(rows))) - set(order)
        taken = [rows["problem_id"][row] for row in order]
        open_rows = [row for row in left if taken.count(rows["problem_id"][row]) < allowed]
        if open_rows:
            order.append(min(open_rows, key=lambda row: (-gain(row), ties[row])))
        else:
            allowed += score.budget
    return order


def cosine(rows: Candidates) -> np.ndarray:
    vectors = np.stack(list(rows.of(MeanHidden())["vector"])).astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def order_of(score_N: np.ndarray) -> list[int]:
    """Rows by score, best first, after a check that the scores are 0, -1, -2, ..."""
    assert sorted(score_N.tolist(), reverse=True) == [-float(i) for i in range(len(score_N))]
    return np.argsort(-score_N).tolist()


# components of few values: equal vectors, equal similarities and equal sums are frequent
pools = st.integers(1, 3).flatmap(
    lambda size: st.lists(
        st.tuples(st.sampled_from("abcd"), st.lists(st.integers(-2, 2), min_size=size, max_size=size).filter(any)),
        min_size=1,
        max_size=14,
    )
)
rules = st.builds(
    Coverage,
    budget=st.integers(1, 3),
    reference=st.sampled_from([None, 1, 3, 8]),
    seed=st.integers(0, 3),
)


@given(pool=pools, score=rules)
@settings(max_examples=200, deadline=None)
def test_equals_a_naive_greedy_with_ties_and_in_any_order(pool, score):
    problem_id, vectors = zip(*pool, strict=True)
    rows = candidates(problem_id, vectors)
    score_N = score(rows)
    assert order_of(score_N) == naive(rows, score)
    order = np.random.default_rng(0).permutation(len(rows))
    assert score(candidates(problem_id, vectors, order)).tolist() == score_N[order].tolist()


@pytest.mark.parametrize("block", [1, 7, 256])
def test_equals_a_naive_greedy_on_cosines_whatever_the_block(block, monkeypatch):
    monkeypatch.setattr(coverage, "BLOCK", block)
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(12, 5))
    problem = np.repeat(np.arange(12), 5)
    rows = candidates(problem.astype(str).tolist(), centres[problem] + 0.5 * rng.normal(size=(60, 5)))
    score = Coverage(budget=2, reference=20, seed=0)
    assert order_of(score(rows)) == naive(rows, score)


def test_it_takes_the_hub_and_then_what_nothing_is_near_to():
    angles = np.radians([0, 10, 20, 30, 40, 170])
    rows = candidates(list("abcdef"), np.stack([np.cos(angles), np.sin(angles)], 1))
    hub = order_of(Coverage(budget=1, seed=0)(rows))
    assert hub[0] == 3, "the largest sum of cosines: 30 degrees is nearest to the vectors' sum"
    assert hub[1] == 5, "then the one that nothing is near to"


def test_the_first_round_takes_the_budget_of_every_problem_and_any_count_works():
    rng = np.random.default_rng(0)
    problem_id = [str(i) for i in rng.integers(0, 15, 80)]
    rows = candidates(problem_id, rng.normal(size=(80, 4)))
    score = Coverage(budget=2, reference=30, seed=0)
    order = order_of(score(rows))
    sizes = {problem: problem_id.count(problem) for problem in set(problem_id)}
    done = 0
    for allowed in (2, 4, 6):
        first = sum(min(size, allowed) for size in sizes.values())
        round_of = [problem_id[row] for row in order[done:first]]
        expected = [min(size, allowed) - min(size, allowed - 2) for size in sizes.values()]
        assert [round_of.count(problem) for problem in sizes] == expected
        done = first
    for budget in (1, 2, 5):
        rule = Rule(name="coverage", score=score, policy=TopB(budget=budget))
        chosen = select(rule, rows, seed=0)
        assert len(chosen.row) == sum(min(size, budget) for size in sizes.values())


def test_rows_without_a_direction_get_no_score_and_change_no_other():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 3))
    score = Coverage(budget=1, reference=5, seed=0)
    expected = score(candidates(list("abcd") * 3, vectors))
    broken = np.concatenate([vectors, [[0, 0, 0], [np.nan, 1, 0], [np.inf, 1, 0]]])
    score_N = score(candidates([*"abcd"] * 3 + ["a", "b", "e"], broken))
    assert np.isnan(score_N[12:]).all() and score_N[:12].tolist() == expected.tolist()
    assert np.isnan(score(candidates(["a"], [[0, 0]]))).all()


def test_the_seed_draws_another_reference():
    rows = candidates(list("abcdefgh"), np.random.default_rng(0).normal(size=(8, 3)))
    orders = {tuple(order_of(Coverage(budget=1, reference=2, seed=seed)(rows))) for seed in range(8)}
    assert len(orders) > 1


def test_memory_beside_the_vectors_is_bounded():
    vectors = np.random.default_rng(0).normal(size=(2000, 1024)).astype(np.float32)
    rows = candidates([str(i) for i in range(2000)], vectors)
    tracemalloc.start()
    Coverage(budget=1, reference=10, seed=0)(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < vectors.nbytes


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"reference": 0}])
def test_coverage_says_which_setting_is_wrong(wrong):
    with pytest.raises(ValueError, match=rf"selector\.score\.{next(iter(wrong))}="):
        Coverage(**{"budget": 2, "seed": 0} | wrong)

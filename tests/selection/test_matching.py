"""Baselines matched to a selection, row for row or token for token, against plain loops."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lark.common.groups import Groups
from lark.selection.matching import take_tokens, take_top

NAN = float("nan")


def ties(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows).astype(np.uint64)


def test_take_top_takes_what_is_asked_for_with_equal_weights():
    groups = Groups.from_ids(["a", "a", "a", "b", "b", "c"])
    score_N = np.array([1.0, 3.0, 2.0, 5.0, NAN, 1.0])
    q_N, shortfall = take_top(score_N, groups, np.arange(6).astype(np.uint64), np.array([2, 2, 0]))
    assert q_N.tolist() == [0, 0.5, 0.5, 1, 0, 0]
    assert shortfall == 1


def test_take_top_breaks_ties_by_hash():
    groups = Groups.from_ids(["a"] * 3)
    q_N, _ = take_top(np.ones(3), groups, np.array([5, 1, 3], np.uint64), np.array([2]))
    assert q_N.tolist() == [0, 0.5, 0.5]


def test_tokens_are_added_by_the_next_ranked_rows():
    groups = Groups.from_ids(["a", "a", "a", "b", "b", "c", "c"])
    score_N = np.array([3.0, 2.0, 1.0, 3.0, 2.0, 9.0, 8.0])
    tokens_N = np.array([10, 20, 30, 10, 40, 100, 100])
    count_G = np.array([1, 1, 0])
    tie_N = np.arange(7).astype(np.uint64)
    for total, chosen in ((20, [0, 3]), (45, [0, 1, 3]), (85, [0, 1, 3, 4]), (500, [0, 1, 2, 3, 4])):
        q_N, difference = take_tokens(score_N, groups, tie_N, count_G, tokens_N, total)
        assert np.flatnonzero(q_N).tolist() == chosen
        assert difference == tokens_N[chosen].sum() - total
        np.testing.assert_allclose(groups.sum(q_N), [1, 1, 0])


def test_tokens_are_dropped_by_the_last_ranked_rows_and_a_problems_only_row_goes_last():
    groups = Groups.from_ids(["a", "a", "a", "b"])
    score_N, tokens_N = np.array([3.0, 2.0, 1.0, 3.0]), np.array([10, 20, 30, 5])
    tie_N = np.array([3, 2, 1, 0], np.uint64)
    for total, chosen in ((65, [0, 1, 2, 3]), (36, [0, 1, 3]), (14, [0, 3]), (10, [0]), (0, [])):
        q_N, difference = take_tokens(score_N, groups, tie_N, np.array([3, 1]), tokens_N, total)
        assert np.flatnonzero(q_N).tolist() == chosen
        assert difference == tokens_N[chosen].sum() - total


rows = st.lists(
    st.tuples(st.sampled_from("abcd"), st.one_of(st.just(NAN), st.integers(-3, 3).map(float)), st.integers(1, 50)),
    min_size=1,
    max_size=14,
)


def by_turns(problem, score, tokens, tie, count, total):
    """Move one row after the other, always the next in turn, and keep the moment that came nearest to the total."""
    ranked = {
        p: sorted((i for i in range(len(problem)) if problem[i] == p and score[i] == score[i]),
                  key=lambda i: (-score[i], tie[i]))
        for p in dict.fromkeys(problem)
    }  # fmt: skip
    start = {p: min(count[p], len(ranked[p])) for p in ranked}
    taken = {i for p in ranked for i in ranked[p][: start[p]]}
    have = sum(tokens[i] for i in taken)
    moves = []
    for p in ranked:
        if have < total and start[p] > 0:
            moves += [((0, turn, tie[i]), i) for turn, i in enumerate(ranked[p][start[p] :])]
        elif have >= total:
            moves += [((turn == start[p] - 1, turn, tie[i]), i) for turn, i in enumerate(ranked[p][: start[p]][::-1])]
    best, nearest = set(taken), abs(have - total)
    for _, i in sorted(moves):
        taken ^= {i}
        distance = abs(sum(tokens[j] for j in taken) - total)
        if distance < nearest:
            best, nearest = set(taken), distance
    return best


@given(pool=rows, counts=st.lists(st.integers(0, 4), min_size=4, max_size=4), total=st.integers(0, 300))
def test_tokens_against_moving_one_row_after_the_other(pool, counts, total):
    problem, score, tokens = map(list, zip(*pool, strict=True))
    groups, tie_N = Groups.from_ids(problem), ties(len(pool))
    count = dict(zip(dict.fromkeys(problem), counts, strict=False))
    q_N, difference = take_tokens(
        np.array(score), groups, tie_N, np.array(list(count.values())), np.array(tokens), total
    )
    chosen = set(np.flatnonzero(q_N).tolist())
    assert chosen == by_turns(problem, score, tokens, tie_N.tolist(), count, total)
    assert difference == sum(tokens[i] for i in chosen) - total
    for p in count:
        weights = [q_N[i] for i in sorted(chosen) if problem[i] == p]
        np.testing.assert_allclose(weights, [1 / max(len(weights), 1)] * len(weights))

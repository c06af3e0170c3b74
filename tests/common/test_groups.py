import hashlib
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lark.common.groups import Groups, tie_hash, unit_hash

IDS = ["b", "a", "b", "c", "a", "b"]


def everything(groups: Groups) -> np.ndarray:
    return np.ones(groups.index_N.size, bool)


def test_groups_are_numbered_by_first_appearance():
    for ids in (IDS, np.array(IDS), np.array(IDS, object)):
        groups = Groups.from_ids(ids)
        assert groups.index_N.tolist() == [0, 1, 0, 2, 1, 0]
        assert groups.count == 3
        assert groups.size.tolist() == [3, 2, 1]


def test_no_rows_make_no_groups():
    groups = Groups.from_ids([])
    assert groups.count == 0 and groups.size.size == 0
    assert groups.rank(np.zeros(0), np.zeros(0, np.uint64), np.zeros(0, bool)).prefix_sum(np.zeros(0)).size == 0


def test_sum_and_spread_with_an_empty_group():
    groups = Groups(np.array([2, 0, 2]), 3)
    assert groups.sum(np.array([1.0, 2.0, 4.0])).tolist() == [2.0, 0.0, 5.0]
    assert groups.spread(np.array([10.0, 20.0, 30.0])).tolist() == [30.0, 10.0, 30.0]


def test_ranking_is_by_group_then_score_then_tie_hash():
    groups = Groups.from_ids(IDS)
    score_N = np.array([1.0, 5.0, 3.0, 0.0, 5.0, 3.0])
    tie_N = np.array([0, 9, 7, 0, 2, 1], np.uint64)
    ranking = groups.rank(score_N, tie_N, everything(groups))
    assert ranking.row_M.tolist() == [5, 2, 0, 4, 1, 3]
    assert ranking.position.tolist() == [0, 1, 2, 0, 1, 0]
    assert ranking.start.tolist() == [0, 3, 5]


def test_ranking_leaves_invalid_rows_out():
    groups = Groups.from_ids(IDS)
    score_N = np.arange(6.0)
    valid_N = np.array([True, False, False, False, False, True])
    ranking = groups.rank(score_N, np.zeros(6, np.uint64), valid_N)
    assert ranking.row_M.tolist() == [5, 0]
    assert ranking.size.tolist() == [2, 0, 0]
    assert ranking.scatter(np.array([7.0, 8.0]), 6).tolist() == [8.0, 0.0, 0.0, 0.0, 0.0, 7.0]


def test_at_and_previous_stay_inside_their_group():
    groups = Groups.from_ids(IDS)
    ranking = groups.rank(-np.arange(6.0), np.zeros(6, np.uint64), everything(groups))
    x_M = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert ranking.at(x_M, 1, fill=-1.0).tolist() == [2.0, 5.0, -1.0]
    assert ranking.at(x_M, np.array([2, -1, 0]), fill=-1.0).tolist() == [3.0, -1.0, 6.0]
    assert ranking.previous(x_M, first=0.0).tolist() == [0.0, 1.0, 2.0, 0.0, 4.0, 0.0]


@given(st.lists(st.lists(st.integers(-1000, 1000), max_size=12), max_size=8))
def test_prefix_sums_equal_a_running_sum_per_group(rows):
    index_N = np.repeat(np.arange(len(rows)), [len(row) for row in rows]).astype(np.int64)
    x_N = np.array([x for row in rows for x in row], float)
    groups = Groups(index_N, len(rows))
    ranking = groups.rank(np.zeros(x_N.size), np.arange(x_N.size).astype(np.uint64), everything(groups))
    expected = [total for row in rows for total in np.cumsum(row).tolist()]
    assert ranking.prefix_sum(x_N).tolist() == expected


def test_prefix_sums_of_a_million_rows_of_very_different_magnitude():
    rng = np.random.default_rng(0)
    index_N = np.sort(rng.integers(0, 200_000, 1_000_000))
    x_N = rng.random(index_N.size) * 10.0 ** rng.integers(-9, 10, 200_000)[index_N]
    groups = Groups(index_N, 200_000)
    ranking = groups.rank(np.zeros(x_N.size), np.arange(x_N.size).astype(np.uint64), everything(groups))
    total_M = ranking.prefix_sum(x_N)
    for group in range(0, 200_000, 500):
        rows = slice(ranking.start[group], ranking.start[group] + ranking.size[group])
        exact = [math.fsum(x_N[rows][: k + 1]) for k in range(ranking.size[group])]
        np.testing.assert_allclose(total_M[rows], exact, rtol=1e-15)


def test_tie_hash_is_the_first_eight_bytes_of_sha256():
    expected = int.from_bytes(hashlib.sha256(b"7\x1fp1\x1fc2").digest()[:8], "big")
    hash_N = tie_hash(7, ["p1", "p1"], ["c2", "c3"])
    assert hash_N.dtype == np.uint64
    assert int(hash_N[0]) == expected
    assert hash_N[0] != hash_N[1]
    assert tie_hash(8, ["p1"], ["c2"])[0] != hash_N[0]


def test_unit_hash_is_uniform_and_keyed_by_seed_salt_and_ids():
    problem_ids, candidate_ids = ["p"] * 20_000, range(20_000)
    first = unit_hash(0, problem_ids, candidate_ids, salt="random")
    assert first.min() >= 0 and first.max() < 1
    share = np.histogram(first, bins=10, range=(0, 1))[0] / first.size
    np.testing.assert_allclose(share, 0.1, atol=4 * math.sqrt(0.09 / first.size))
    for other in (
        unit_hash(1, problem_ids, candidate_ids, salt="random"),
        unit_hash(0, problem_ids, candidate_ids, salt="sample"),
        tie_hash(0, problem_ids, candidate_ids) / 2.0**64,
    ):
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / math.sqrt(first.size)

"""A baseline's rows, matched to the selection it is compared with: as many of each problem, or as many tokens in all.

Shapes: N rows of the pool, G groups (problems), M valid rows in ranked order (group by group, best first).
"""

import numpy as np

from lark.common.groups import Groups, Ranking


def take_top(score_N: np.ndarray, groups: Groups, tie_N: np.ndarray, count_G: np.ndarray) -> tuple[np.ndarray, int]:
    """Put equal weights on the count_G[g] best valid rows of each group, or on all where fewer are valid.

    It matches a baseline to a selection row for row; scores and ties as in ``compute_weights``. Returns q [N],
    1 / (rows taken) on the rows taken, and how many rows were asked for but not there.
    """
    ranking, taken_G = _rank(score_N, groups, tie_N, count_G)
    q_N = _weigh_equally(ranking, ranking.position < ranking.spread(taken_G), len(score_N))
    return q_N, int((count_G - taken_G).sum())


def take_tokens(
    score_N: np.ndarray,
    groups: Groups,
    tie_N: np.ndarray,
    count_G: np.ndarray,
    tokens_N: np.ndarray,
    total: int,
) -> tuple[np.ndarray, int]:
    """Do as `take_top`, then next-ranked rows are added, or last-ranked ones dropped, until the rows have `total`
    tokens, as nearly as whole rows allow.

    Problems take turns, in the order of the tie hash: none gains or loses a second row before all others have gained or
    lost one, none without a row gains one, and the last row of a problem goes after all others'. Returns q [N] as
    `take_top` does, and the tokens taken minus `total`.
    """
    ranking, taken_G = _rank(score_N, groups, tie_N, count_G)
    tokens_M, tie_M = tokens_N[ranking.row_M].astype(np.int64), tie_N[ranking.row_M]
    count_M = ranking.spread(taken_G)
    taken_M = ranking.position < count_M
    excess = int(tokens_M[taken_M].sum()) - total
    if excess < 0:
        movable_M, turn_M, last_M = ~taken_M & (count_M > 0), ranking.position - count_M, np.zeros_like(taken_M)
    else:
        movable_M, turn_M, last_M = taken_M, count_M - 1 - ranking.position, ranking.position == 0
    order_M = np.flatnonzero(movable_M)
    order_M = order_M[np.lexsort((tie_M[order_M], turn_M[order_M], last_M[order_M]))]
    moved = np.concatenate([[0], np.cumsum(tokens_M[order_M])])
    moves = int(np.argmin(np.abs(abs(excess) - moved)))
    taken_M[order_M[:moves]] ^= True
    difference = int(tokens_M[taken_M].sum()) - total
    return _weigh_equally(ranking, taken_M, len(score_N)), difference


def _rank(score_N: np.ndarray, groups: Groups, tie_N: np.ndarray, count_G: np.ndarray) -> tuple[Ranking, np.ndarray]:
    """Return the ranking, and count_G cut to the valid rows there are."""
    score_N, count_G = np.asarray(score_N, np.float64), np.asarray(count_G)
    assert not np.isposinf(score_N).any()
    assert count_G.shape == (groups.count,) and np.issubdtype(count_G.dtype, np.integer) and (count_G >= 0).all()
    ranking = groups.rank(score_N, tie_N, np.isfinite(score_N))
    return ranking, np.minimum(count_G, ranking.size)


def _weigh_equally(ranking: Ranking, taken_M: np.ndarray, rows: int) -> np.ndarray:
    return ranking.scatter(taken_M / ranking.spread(np.maximum(ranking.sum(taken_M), 1)), rows)

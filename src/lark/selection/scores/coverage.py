"""Coverage: trajectories in the greedy order in which they represent the whole pool, by the student's hidden states.

A row's gain only falls as rows are chosen, so lazy greedy (Minoux 1978) keeps earlier gains as upper bounds and
computes again only what is at the top. Gains are rounded to 9 decimals, so that rows which would cover each other are
tied in whatever order and block they are computed, and fall by the tie hash.

Shapes: N candidates, D hidden size, M reference rows, B rows computed together (at most BLOCK).
"""

import heapq
from dataclasses import dataclass

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import tie_hash, unit_hash
from lark.scoring.passes import MeanHidden
from lark.selection.candidates import Candidates

BLOCK = 256
"""Rows whose gains are computed together."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Minus the position at which greedy facility location takes a candidate (the diversity term of Superfiltering,
    arXiv 2402.00530).

    The next one raises most the sum, over `reference` rows drawn by seeded hash, of the cosine similarity to the most
    similar row chosen so far (-1 before the first). A problem gives at most `budget` rows in each round: when every
    problem has given its budget, the next round allows `budget` more. So each candidate has a position, and ties
    between equal gains fall by the seeded tie hash. The vectors are the student's own mean hidden states
    (`MeanHidden`). NaN (never) where one is zero or not finite.

    Time: N M D multiplications for the first bounds and about 15 times as many in all. On one core, with the default
    reference: 20,000 candidates of 64 dimensions 11 s, of 1,024 dimensions 2 min; 165,000 of 64 dimensions 2 min.
    Memory: beside the vectors 8 M D bytes of the reference and O(N + B (M + D)).
    """

    budget: int
    """Rows of a problem in each round."""
    reference: int | None = 4096
    """Rows that are to be covered; null: the whole pool, whose memory is then not bounded."""
    seed: int

    needs = (MeanHidden(),)

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise LarkError(f"selector.score.budget={self.budget} takes nothing of a problem; set it to at least 1")
        if self.reference is not None and self.reference < 1:
            raise LarkError(
                f"selector.score.reference={self.reference} leaves nothing to cover; set it to at least 1, or to null "
                "for the whole pool"
            )

    def __call__(self, candidates: Candidates) -> np.ndarray:
        vectors = candidates.of(MeanHidden())["vector"]
        norm_N = np.fromiter((np.linalg.norm(v_D.astype(np.float64)) for v_D in vectors), np.float64, len(vectors))
        rows = np.flatnonzero(np.isfinite(norm_N) & (norm_N > 0))
        score_N = np.full(len(candidates), np.nan)
        if len(rows):
            ids = (candidates["problem_id"][rows], candidates["candidate_id"][rows])
            drawn = np.argsort(unit_hash(self.seed, *ids, salt="coverage"), kind="stable")[: self.reference]
            objective = FacilityLocation(vectors[rows], norm_N[rows], drawn)
            order = order_greedily(objective, candidates.groups.index_N[rows], tie_hash(self.seed, *ids), self.budget)
            score_N[rows[order]] = -np.arange(len(rows), dtype=np.float64)
        return score_N


class FacilityLocation:
    """Knows how similar each reference row is to the most similar chosen row, and what a further row would add."""

    def __init__(self, vectors: np.ndarray, norm_N: np.ndarray, reference: np.ndarray):
        self.vectors, self.norm_N = vectors, norm_N
        self.reference_MD = self._normalise(reference)
        self.best_M = np.full(len(reference), -1.0)

    def _normalise(self, rows: np.ndarray) -> np.ndarray:
        """Return the unit vectors of B rows, float64 [B, D]; `vectors` holds an array a row."""
        return np.stack(list(self.vectors[rows])).astype(np.float64) / self.norm_N[rows, None]

    def compute_gains(self, rows: np.ndarray) -> np.ndarray:
        """Return by how much each of B rows raises the sum of similarities, float64 [B]; never rises, never below 0."""
        gain_BM = self._normalise(rows) @ self.reference_MD.T
        gain_BM -= self.best_M
        return np.maximum(gain_BM, 0.0, out=gain_BM).sum(1).round(9)

    def add(self, row: int) -> None:
        """Choose a row."""
        np.maximum(self.best_M, self.reference_MD @ self._normalise(np.array([row]))[0], out=self.best_M)


def order_greedily(objective: FacilityLocation, group_N: np.ndarray, tie_N: np.ndarray, budget: int) -> np.ndarray:
    """Return all rows [N] in the order greedy takes them: the largest gain first, then the smallest tie hash.

    In round r no group gives more than r * `budget` rows in all.
    """
    rows_N, ties = np.arange(len(group_N)), tie_N.tolist()
    blocks = [rows_N[start : start + BLOCK] for start in range(0, len(rows_N), BLOCK)]
    gains = [gain for rows in blocks for gain in objective.compute_gains(rows).tolist()]
    waiting = [(-gain, tie, row) for row, (gain, tie) in enumerate(zip(gains, ties, strict=True))]
    computed_at = np.zeros(len(group_N), np.int64)  # how many rows were chosen when a row's gain was computed
    taken_G = np.zeros(int(group_N.max(initial=-1)) + 1, np.int64)
    order: list[int] = []
    allowed = 0
    while waiting:
        allowed += budget
        heap, waiting, width = waiting, [], 1
        heapq.heapify(heap)
        while heap:
            # Pop stale bounds, a block that doubles as long as none of them turns out to be the largest gain.
            stale: list[int] = []
            while heap and len(stale) < width:
                entry = heapq.heappop(heap)
                row = entry[2]
                if taken_G[group_N[row]] >= allowed:
                    waiting.append(entry)
                elif entry[0] < 0 and computed_at[row] < len(order):
                    stale.append(row)
                elif stale:  # its gain is known, but one of the stale rows may be worth more
                    heapq.heappush(heap, entry)
                    break
                else:
                    objective.add(row)
                    order.append(row)
                    taken_G[group_N[row]] += 1
                    width = 1
            if stale:
                rows = np.array(stale)
                computed_at[rows] = len(order)
                for gain, row in zip(objective.compute_gains(rows).tolist(), stale, strict=True):
                    heapq.heappush(heap, (-gain, ties[row], row))
                width = min(2 * width, BLOCK)
    return np.array(order, np.int64)

"""Coverage: trajectories in the greedy order in which they represent the whole pool, by the student's hidden states.

Both methods' values only fall as rows are chosen, so lazy greedy (Minoux 1978) keeps earlier ones as upper bounds and
computes anew only what is at the top.

Numerics: the cosine distance 1 - cos(u, v) = |u - v|^2 / 2 is taken between unit vectors rounded to multiples of 2^-19.
Distances are then exact in float64, as are sums of up to 4,096 of them: a value depends on no order, block or BLAS, and
what is tied (as two rows that would cover each other are) is exactly tied.

Shapes: N candidates, D hidden size, M reference rows, B rows computed together, C recently chosen rows (both at most
BLOCK).
"""

import heapq
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import tie_hash, unit_hash
from lark.scoring.passes import MeanHidden
from lark.selection.candidates import Candidates

METHODS = ("facility_location", "k_center")
BLOCK = 256  # rows computed together
GRID = 2**19


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Minus the position at which greedy takes a candidate, at most `budget` of a problem in each round: when every
    problem has given its budget, the next round allows `budget` more. So each candidate has a position, the first
    round's come first, and ties between equal values fall by the seeded tie hash.

    facility_location: the next one raises most the sum, over `reference` rows drawn by seeded hash (null: all), of
        the cosine similarity to the most similar row chosen so far (-1 before the first): the diversity term of
        Superfiltering (arXiv 2402.00530).
    k_center: the next one is farthest, in cosine distance, from the nearest row chosen so far (farthest-point
        traversal, Gonzalez 1985; arXiv 1708.00489); the first is the tie hash's. It looks at the whole pool.

    The vectors are the student's own mean hidden states (`MeanHidden`); there is no other encoder to set. NaN (never)
    where one is zero or not finite.
    Time: facility_location takes N M D multiplications for its first bounds and about 15 times as many in all,
    k_center N^2 D. On one core, with the default reference: 20,000 candidates of 64 dimensions 11 s and 4 s, of 1,024
    dimensions 2 min and 47 s; 165,000 of 64 dimensions 2 min by facility_location.
    Memory: beside the vectors 4 N D bytes of unit vectors (float32), 8 M D of the reference (float64; its default
    bounds it, null does not), and O(N + B (M + D)).
    """

    method: str = "facility_location"
    budget: int
    reference: int | None = 4096
    seed: int

    needs = (MeanHidden(),)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LarkError(f"selector.score.method={self.method!r} is unknown; set it to {' or '.join(METHODS)}")
        if self.budget < 1:
            raise LarkError(f"selector.score.budget={self.budget} takes nothing of a problem; set it to at least 1")
        if self.reference is not None and self.reference < 1:
            raise LarkError(
                f"selector.score.reference={self.reference} leaves nothing to cover; set it to at least 1, or to null "
                "for the whole pool"
            )

    def __call__(self, candidates: Candidates) -> np.ndarray:
        vectors = candidates.of(MeanHidden())["vector"]
        norm_N = np.fromiter(map(_norm, vectors), np.float64, len(vectors))
        rows = np.flatnonzero(np.isfinite(norm_N) & (norm_N > 0))
        ids = (candidates["problem_id"][rows], candidates["candidate_id"][rows])
        points = _Points.of(_units(vectors[rows], norm_N[rows]))
        objective: Objective
        if self.method == "k_center":
            objective = _KCenter(points)
        else:
            drawn = np.argsort(unit_hash(self.seed, *ids, salt="coverage"), kind="stable")[: self.reference]
            objective = _FacilityLocation(points, points.at(drawn))
        order = lazy_greedy(objective, candidates.groups.index_N[rows], tie_hash(self.seed, *ids), self.budget)
        score_N = np.full(len(candidates), np.nan)
        score_N[rows[order]] = -np.arange(len(rows), dtype=np.float64)
        return score_N


def _norm(vector_D: np.ndarray) -> float:
    return float(np.linalg.norm(vector_D.astype(np.float64)))


def _units(vectors: np.ndarray, norm_N: np.ndarray) -> np.ndarray:
    """Unit vectors [N, D] in multiples of 1 / GRID (float32 holds these exactly), from an array a row."""
    unit_ND = np.empty((len(vectors), len(vectors[0]) if len(vectors) else 1), np.float32)
    for i, (vector_D, norm) in enumerate(zip(vectors, norm_N.tolist(), strict=True)):
        unit_ND[i] = np.round(vector_D.astype(np.float64) / norm * GRID) / GRID
    return unit_ND


@dataclass(frozen=True, eq=False)
class _Points:
    """Unit vectors [N, D], and half their squared norms [N] (1/2 but for the rounding)."""

    unit_ND: np.ndarray
    half_N: np.ndarray

    @classmethod
    def of(cls, unit_ND: np.ndarray) -> "_Points":
        return cls(unit_ND, np.einsum("nd,nd->n", unit_ND, unit_ND, dtype=np.float64) / 2)

    def at(self, rows: np.ndarray) -> "_Points":
        return _Points(self.unit_ND[rows].astype(np.float64), self.half_N[rows])

    def distances(self, other: "_Points") -> np.ndarray:
        """|u - v|^2 / 2 = 1 - cos(u, v) for each of these [B] and those [M], float64 [B, M]."""
        product_BM = self.unit_ND @ other.unit_ND.T
        np.subtract(self.half_N[:, None], product_BM, out=product_BM)
        product_BM += other.half_N
        return product_BM


class Objective(Protocol):
    """What greedy maximises. A row's value never rises while rows are added, and is never below 0."""

    def values(self, rows: np.ndarray) -> np.ndarray:
        """What each of B rows is worth after those added so far, float64 [B]."""
        ...

    def add(self, row: int) -> None: ...


class _FacilityLocation:
    """A row's value: by how much it lowers the sum, over the reference, of the distance to the nearest chosen row."""

    def __init__(self, points: _Points, reference: _Points):
        self.points, self.reference = points, reference
        self.nearest_M = np.full(len(reference.half_N), 2.0)

    def values(self, rows: np.ndarray) -> np.ndarray:
        gain_BM = self.points.at(rows).distances(self.reference)
        np.subtract(self.nearest_M, gain_BM, out=gain_BM)
        return np.maximum(gain_BM, 0.0, out=gain_BM).sum(1)

    def add(self, row: int) -> None:
        distance_1M = self.points.at(np.array([row])).distances(self.reference)
        np.minimum(self.nearest_M, distance_1M[0], out=self.nearest_M)


class _KCenter:
    """A row's value: its distance to the nearest chosen row, infinite before the first.

    `nearest_N` holds the distances to all chosen rows but the `recent` ones, of which there are at most BLOCK.
    """

    def __init__(self, points: _Points):
        self.points = points
        self.nearest_N = np.full(len(points.half_N), np.inf)
        self.recent: list[int] = []

    def values(self, rows: np.ndarray) -> np.ndarray:
        distance_BC = self.points.at(rows).distances(self.points.at(np.array(self.recent, np.int64)))
        return np.minimum(self.nearest_N[rows], distance_BC.min(1, initial=np.inf))

    def add(self, row: int) -> None:
        self.recent.append(row)
        if len(self.recent) == BLOCK:
            for rows in _blocks(len(self.nearest_N)):
                self.nearest_N[rows] = self.values(rows)
            self.recent = []


def _blocks(rows: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]


def lazy_greedy(objective: Objective, group_N: np.ndarray, tie_N: np.ndarray, budget: int) -> np.ndarray:
    """All rows [N] in the order greedy takes them: the largest value first, then the smallest tie hash; in round r no
    group gives more than r * `budget` rows in all.
    """
    values = [value for rows in _blocks(len(group_N)) for value in objective.values(rows).tolist()]
    ties = tie_N.tolist()
    waiting = [(-value, tie, row) for row, (value, tie) in enumerate(zip(values, ties, strict=True))]
    computed_at = np.zeros(len(group_N), np.int64)  # how many rows were chosen when a row's value was computed
    taken_G = np.zeros(int(group_N.max(initial=-1)) + 1, np.int64)
    order: list[int] = []
    allowed = 0
    while waiting:
        allowed += budget
        heap, waiting, width = waiting, [], 1
        heapq.heapify(heap)
        while heap:
            stale: list[int] = []
            while heap and len(stale) < width:
                entry = heapq.heappop(heap)
                row = entry[2]
                if taken_G[group_N[row]] >= allowed:
                    waiting.append(entry)
                elif entry[0] < 0 and computed_at[row] < len(order):
                    stale.append(row)
                elif stale:  # its value is known, but one of the stale rows may be worth more
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
                for value, row in zip(objective.values(rows).tolist(), stale, strict=True):
                    heapq.heappush(heap, (-value, ties[row], row))
                width = min(2 * width, BLOCK)
    return np.array(order, np.int64)

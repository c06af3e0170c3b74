"""Ragged groups of rows, such as the candidates of one problem, without a Python loop over groups.

Shapes: N rows of the pool, G groups, M rows of a ranking (the valid ones, group by group, best first).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of N rows into `count` groups, some of which may be empty."""

    index_N: np.ndarray
    """Group of each row, int64 in 0 .. count - 1."""
    count: int
    """Number of groups, G."""

    def __post_init__(self) -> None:
        assert self.index_N.ndim == 1 and self.index_N.dtype == np.int64
        assert self.index_N.size == 0 or (self.index_N.min() >= 0 and self.index_N.max() < self.count)

    @classmethod
    def from_ids(cls, ids: Sequence[object] | np.ndarray) -> "Groups":
        """Groups of equal ids, numbered by first appearance: group g is the g-th key of `dict.fromkeys(ids)`."""
        keys = ids.tolist() if isinstance(ids, np.ndarray) else ids
        number = {key: group for group, key in enumerate(dict.fromkeys(keys))}
        return cls(np.fromiter(map(number.__getitem__, keys), np.int64, len(keys)), len(number))

    @cached_property
    def size(self) -> np.ndarray:
        """Rows of each group, int64 [G]."""
        return np.bincount(self.index_N, minlength=self.count)

    def sum(self, x_N: np.ndarray) -> np.ndarray:
        """Sum of x over the rows of each group, float64 [G]; 0 for an empty group."""
        assert x_N.shape == self.index_N.shape
        return np.bincount(self.index_N, weights=x_N, minlength=self.count)

    def average(self, x_N: np.ndarray) -> np.ndarray:
        """Average x over the rows of each group, float64 [G]; NaN for an empty group."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.sum(x_N) / self.size

    def spread(self, x_G: np.ndarray) -> np.ndarray:
        """Each group's value at each of its rows, [N]."""
        assert x_G.shape == (self.count,)
        return x_G[self.index_N]

    def split(self) -> list[np.ndarray]:
        """The rows of each group, ascending."""
        return np.split(np.argsort(self.index_N, kind="stable"), np.cumsum(self.size)[:-1])

    def rank(self, score_N: np.ndarray, tie_N: np.ndarray, valid_N: np.ndarray) -> "Ranking":
        """The valid rows, group by group, by descending score and, among equal scores, ascending tie hash.

        The result depends on the order of the input rows only where two rows of a group share score and hash.
        """
        assert score_N.shape == tie_N.shape == valid_N.shape == self.index_N.shape
        row_M = np.flatnonzero(valid_N)
        row_M = row_M[np.lexsort((tie_N[row_M], -score_N[row_M], self.index_N[row_M]))]
        return Ranking(self.index_N[row_M], self.count, row_M)


@dataclass(frozen=True, eq=False)
class Ranking(Groups):
    """Groups over M ranked rows: contiguous, and best first within each group."""

    row_M: np.ndarray
    """Number of each ranked row in the N rows that were ranked, int64."""

    @cached_property
    def start(self) -> np.ndarray:
        """Place of each group's best row in the ranking, int64 [G]."""
        return np.cumsum(self.size) - self.size

    @cached_property
    def position(self) -> np.ndarray:
        """Place of each row within its group, int64 [M], 0 for the best."""
        return np.arange(self.row_M.size) - self.spread(self.start)

    def at(self, x_M: np.ndarray, position: int | np.ndarray, *, fill: float) -> np.ndarray:
        """x at one position (0 is the best; a number or int64 [G]) of each group, [G]; `fill` where there is none."""
        position_G = np.broadcast_to(position, (self.count,))
        inside_G = (position_G >= 0) & (position_G < self.size)
        picked_G = np.full(self.count, fill, np.float64)
        picked_G[inside_G] = x_M[(self.start + position_G)[inside_G]]
        return picked_G

    def previous(self, x_M: np.ndarray, *, first: float | np.ndarray) -> np.ndarray:
        """x of the next better row of the same group, [M]; `first` (a number or [M]) at each group's best row."""
        return np.where(self.position > 0, np.roll(x_M, 1), first)

    def prefix_sum(self, x_M: np.ndarray) -> np.ndarray:
        """Inclusive prefix sums within each group, float64 [M].

        Summed by doubling steps inside the groups (Hillis and Steele 1986), O(M log K) for K rows in the largest
        group: a running sum over all rows, differenced at group borders, would carry the rounding of large groups
        into small ones.
        """
        total_M = np.array(x_M, np.float64)
        step, largest = 1, self.size.max(initial=0)
        while step < largest:
            total_M[step:] += np.where(self.position[step:] >= step, total_M[:-step], 0.0)
            step *= 2
        return total_M

    def scatter(self, x_M: np.ndarray, rows: int) -> np.ndarray:
        """x back in the order of the N = `rows` rows that were ranked, float64 [N]; 0 for rows left out."""
        x_N = np.zeros(rows)
        x_N[self.row_M] = x_M
        return x_N


def tie_hash(seed: int, problem_ids: Iterable[object], candidate_ids: Iterable[object]) -> np.ndarray:
    """Keys that break ties by neither order nor id, uint64 [N]: the first 8 bytes of sha256(seed, problem, candidate).

    Breaking ties by order or id would always favour the same teacher.
    """
    return _hash(f"{seed}", problem_ids, candidate_ids)


def unit_hash(seed: int, problem_ids: Iterable[object], candidate_ids: Iterable[object], *, salt: str) -> np.ndarray:
    """Uniform draws that depend on nothing but their keys, float64 [N] in [0, 1) with 53 random bits.

    Different salts give independent draws, also independent of `tie_hash`.
    """
    bits_N = _hash(f"{salt}\x1f{seed}", problem_ids, candidate_ids)
    return (bits_N >> np.uint64(11)) * 2.0**-53


def _hash(head: str, problem_ids: Iterable[object], candidate_ids: Iterable[object]) -> np.ndarray:
    digests = b"".join(
        hashlib.sha256(f"{head}\x1f{problem}\x1f{candidate}".encode()).digest()[:8]
        for problem, candidate in zip(problem_ids, candidate_ids, strict=True)
    )
    return np.frombuffer(digests, ">u8").astype(np.uint64)

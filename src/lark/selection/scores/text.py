"""Scores over the pool's own columns, without a student: one number per candidate, higher = first, NaN = never.

Shapes: N candidates, G problems, Q pairs of a problem and a teacher with candidates of it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import Groups, unit_hash
from lark.scoring.passes import Pass
from lark.selection.candidates import Candidates
from lark.selection.scores.statistics import needs_of_column

CHECKING, EXPLORING, CONNECTING = ("check", "verify"), ("perhaps", "might"), ("therefore", "since")
"""The words that `RuleQuality` counts."""

BLOCK_ROWS = 1000  # trajectories in memory at a time


@dataclass(frozen=True, kw_only=True)
class Correct:
    """1 for a correct candidate, 0 for a wrong one, 0.5 where it is not known (arXiv 2601.14249, E.3.1).

    Raises LarkError if it is known of none, as the choice would be a random one.
    """

    needs = ()

    def __call__(self, candidates: Candidates) -> np.ndarray:
        correct_N = _read_verdicts(candidates)
        if np.isnan(correct_N).all():
            raise LarkError(
                "selector correct puts correct candidates before wrong ones, but no candidate is known to be either; "
                "fill in the pool's `correct` or `answer`, or set another selector"
            )
        return np.nan_to_num(correct_N, nan=0.5)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Minus the teacher's place in `order`, so that the first one comes first; the candidates of other teachers, and
    of none, tie after them.

    order: names of teachers, or null for the teachers with a known verdict by their share of correct candidates among
    those with one, best first and ties by name. Both are about the candidates that passed the rule's filter: with a
    filter on `correct` every share is 1, so name an order there.
    Raises LarkError for a name that no candidate has, and without an order if no verdict is known.
    """

    order: list[str] | None = None
    needs = ()

    def __post_init__(self) -> None:
        if self.order is not None and not self.order:
            raise LarkError("selector.score.order=[] names no teacher; name some, or set null for the best first")
        if self.order is not None and len(set(self.order)) < len(self.order):
            twice = ", ".join(name for name, count in Counter(self.order).items() if count > 1)
            raise LarkError(f"selector.score.order={self.order} names {twice} more than once; name each teacher once")

    def decisions(self, candidates: Candidates) -> dict[str, list[str]]:
        """Return the order in force, for the selection's record."""
        if self.order is not None:
            return {"order": self.order}
        return {"order": _order_by_correct(candidates["teacher"].tolist(), _read_verdicts(candidates))}

    def __call__(self, candidates: Candidates) -> np.ndarray:
        teachers = candidates["teacher"].tolist()
        order = self.decisions(candidates)["order"]
        there = set(teachers) - {None}
        if unknown := [name for name in order if name not in there]:
            raise LarkError(
                f"selector.score.order={self.order} names {', '.join(unknown)}, of which no candidate is there to "
                f"choose from; the teachers that are there: {', '.join(sorted(there)) or 'none'}"
            )
        place = {name: i for i, name in enumerate(order)}
        return -np.array([place.get(teacher, len(order)) for teacher in teachers], np.float64)


@dataclass(frozen=True, kw_only=True)
class RuleQuality:
    """.30 z(words) + .20 z(check, verify) + .25 z(perhaps, might) + .25 z(therefore, since): LIMO's rule as in
    arXiv 2601.14249, B.2.

    Words are what white space separates; each pair's occurrences are divided by them. An occurrence is the whole word,
    in any case: inflections (checks, verified) are none. z is over all candidates that passed the rule's filter, with
    the standard deviation of a population; a criterion that is the same for all has z = 0.
    """

    needs = ()

    def __call__(self, candidates: Candidates) -> np.ndarray:
        criteria_N4 = np.fromiter(
            map(_count_criteria, _read_texts(candidates)), np.dtype((np.float64, 4)), len(candidates)
        )
        return np.stack([_standardise(criterion_N) for criterion_N in criteria_N4.T], axis=1) @ [0.30, 0.20, 0.25, 0.25]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A numeric column of the pool (or a statistic), such as a judge's mark; NaN where it is missing.

    Raises LarkError if no candidate has it or a value is no number.
    """

    column: str

    @property
    def needs(self) -> tuple[Pass, ...]:
        return needs_of_column(self.column)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        try:
            return candidates[self.column].astype(np.float64)  # None becomes NaN
        except (TypeError, ValueError) as error:
            raise LarkError(
                f"selector.score.column={self.column} cannot be read as numbers ({error}); set it to a column of the "
                "pool that holds numbers"
            ) from error


@dataclass(frozen=True, kw_only=True)
class TeacherMatched:
    """Control: each problem gets, at random, candidates of the teachers that the selector took in another problem.

    It takes the selector's teachers in the selector's shares and nothing else of its choice, which tells whether a rule
    does more than pick a teacher. A donor is drawn for each problem, uniformly among the other problems in which the
    selector took something; first come candidates of the donor's teachers, as many of each as were taken there (fewer
    if the problem has fewer), then all others; which ones and in which order at random. Every draw is a hash of `seed`
    and the ids, so the order of the rows does not matter.

    Only for a baseline: it reads `candidates.reference_selection`. The rule's own filter acts on the donors too, so
    that of the selector's choice only those rows count that pass it.
    Raises LarkError as a selector, if a candidate has no teacher, and if nothing of the choice passes the filter.
    """

    seed: int
    needs = ()

    def __call__(self, candidates: Candidates) -> np.ndarray:
        if candidates.reference_selection is None:
            raise LarkError(
                "the score TeacherMatched copies the teachers of a selector's choice and is no selector itself; set "
                "baseline=teacher_matched_random and another selector"
            )
        taken_N = np.isin(candidates.row_N, candidates.reference_selection.row)
        if not taken_N.any():
            raise LarkError(
                "baseline.filter lets none of the selector's choice through, so there are no teachers to copy; leave "
                "it out, as filter=... is for both"
            )
        ids = candidates["problem_id"], candidates["candidate_id"]
        order_N = unit_hash(self.seed, *ids, salt="teacher_matched order")
        return order_N + self._is_of_donor(candidates, taken_N)

    def _is_of_donor(self, candidates: Candidates, taken_N: np.ndarray) -> np.ndarray:
        """Return which candidates come first, bool [N]: a random few of each teacher of the problem's donor."""
        groups, teachers = candidates.groups, _group_teachers(candidates)
        pair_N = groups.index_N * teachers.count + teachers.index_N  # of a problem and a teacher
        taken = np.bincount(pair_N[taken_N], minlength=groups.count * teachers.count)
        id_G = np.empty(groups.count, object)
        id_G[groups.index_N] = candidates["problem_id"]
        givers = np.flatnonzero(groups.sum(taken_N))
        givers = givers[np.argsort(id_G[givers])]  # so that a draw means the same in every order of the rows
        unit_G = unit_hash(self.seed, id_G, np.zeros(groups.count, np.int64), salt="teacher_matched donor")
        donor_N = groups.spread(_draw_others(givers, unit_G))
        wanted_N = np.where(donor_N < 0, 0, taken[donor_N * teachers.count + teachers.index_N])
        return self._draw_places(candidates, Groups.from_ids(pair_N)) < wanted_N

    def _draw_places(self, candidates: Candidates, pairs: Groups) -> np.ndarray:
        """Return a random order, from 0, of the candidates that a problem has from one teacher, [N]."""
        ids = candidates["problem_id"], candidates["candidate_id"]
        unit_N = unit_hash(self.seed, *ids, salt="teacher_matched place")
        ranking = pairs.rank(unit_N, np.zeros_like(unit_N), np.ones(unit_N.shape, bool))
        return ranking.scatter(ranking.position, len(unit_N))


def _draw_others(givers: np.ndarray, unit_G: np.ndarray) -> np.ndarray:
    """Draw for each group one of `givers` (groups) but never itself, by a uniform draw; -1 where there is no other."""
    place_G = np.full(unit_G.size, givers.size)
    place_G[givers] = np.arange(givers.size)
    others_G = givers.size - (place_G < givers.size)
    drawn_G = (unit_G * others_G).astype(np.int64)
    drawn_G += drawn_G >= place_G
    return np.where(others_G > 0, givers[np.minimum(drawn_G, givers.size - 1)], -1)


def _read_verdicts(candidates: Candidates) -> np.ndarray:
    """Read what is known of each candidate: 1 correct, 0 wrong, NaN unknown, float64 [N]."""
    return candidates["correct"].astype(np.float64)


def _order_by_correct(teachers: list[str | None], correct_N: np.ndarray) -> list[str]:
    known = [
        (name, verdict) for name, verdict in zip(teachers, correct_N.tolist(), strict=True) if not math.isnan(verdict)
    ]
    checked = Counter(name for name, _ in known if name is not None)
    if not checked:
        raise LarkError(
            "selector.score.order=null orders the teachers by their share of correct candidates, but of no candidate "
            "are both teacher and verdict known; name an order, as in selector.score.order=[strong,weak]"
        )
    correct = Counter(name for name, verdict in known if verdict == 1)
    return sorted(checked, key=lambda name: (-correct[name] / checked[name], name))


def _read_texts(candidates: Candidates) -> Iterator[str]:
    """Read the trajectories, a block at a time: `candidates["text"]` would keep all of them."""
    if candidates.read_column is None:
        yield from candidates["text"]  # raises, saying which columns there are
        return
    for start in range(0, len(candidates), BLOCK_ROWS):
        yield from candidates.read_column("text", candidates.row_N[start : start + BLOCK_ROWS])


_COUNTED = re.compile(rf"\b(?:{'|'.join(CHECKING + EXPLORING + CONNECTING)})\b")


def _count_criteria(text: str) -> tuple[float, ...]:
    """Count words, and checking, exploring and connecting ones per word."""
    words = len(text.split())
    found = Counter(_COUNTED.findall(text.lower()))
    return words, *(sum(found[word] for word in kind) / max(words, 1) for kind in (CHECKING, EXPLORING, CONNECTING))


def _standardise(x_N: np.ndarray) -> np.ndarray:
    if len(x_N) == 0 or x_N.min() == x_N.max():  # the computed deviation of equal numbers need not be 0
        return np.zeros(len(x_N))
    return (x_N - x_N.mean()) / x_N.std()


def _group_teachers(candidates: Candidates) -> Groups:
    """Group the candidates by teacher. Raises LarkError if one has none."""
    missing = sum(teacher is None for teacher in candidates["teacher"])
    if missing:
        raise LarkError(
            f"baseline=teacher_matched_random needs a teacher in every candidate, {missing} of {len(candidates)} have "
            "none; fill the pool's teacher field or set another baseline"
        )
    return Groups.from_ids(candidates["teacher"])

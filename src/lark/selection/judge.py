"""The judge of a race: learns from problems that were scored in full, then says who is given up in the others.

Shapes: K candidates of a problem, N their span tokens, T those of one, C statistics of the race (lark.selection.race). Token
statistics come as [T, 3]: surprisal, Brier score, rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lark.common.groups import Groups
from lark.scoring.forecast import Context, Forecast, context
from lark.selection.contests import Contest, clips
from lark.selection.race import Estimate, Field, Noise, Trial, cuts, margin_of
from lark.student.chat import Encoded

FOLDS = 5  # of the calibration's problems: each gets its forecast from the other folds


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The candidates of a problem: what is known of them before the student reads them.

    tokens_K: T; end_K: the place of the end-of-turn token among the span's (-1: there is none); enters: the candidates
    that pass each contest's filter, [K].
    """

    context: Context
    tokens_K: np.ndarray
    end_K: np.ndarray
    enters: Mapping[Contest, np.ndarray]

    @classmethod
    def of(cls, encoded: Sequence[Encoded], enters: Mapping[Contest, np.ndarray]) -> "Problem":
        first_K = np.array([max(row.prompt_tokens, 1) for row in encoded])  # nothing predicts the very first token
        end_K = np.array([row.end_of_turn + row.prompt_tokens if row.end_of_turn >= 0 else -1 for row in encoded])
        return cls(
            context=context([row.input_ids for row in encoded], first_K.tolist()),
            tokens_K=np.array([len(row.input_ids) for row in encoded]) - first_K,
            end_K=np.where(end_K >= 0, end_K - first_K, -1),
            enters=enters,
        )


Scored = tuple[Problem, Sequence[np.ndarray]]
"""A problem with the token statistics of its candidates, read to their end: [T, 3] each."""


class Judge:
    """Forecast, noise and, for every contest, the margin, from the problems of the `calibration`. `record` says what
    the margins are and how much of the full choice they kept there (JSON).
    """

    def __init__(
        self,
        contests: Sequence[Contest],
        calibration: Sequence[Scored],
        *,
        confidence: float,
    ):
        self.clips = clips(contests)
        self.margins = dict.fromkeys(contests, math.inf)
        self.overlaps = dict.fromkeys(contests, 1.0)
        if confidence < 1 and calibration:
            self._learn(calibration, confidence)

    def _learn(self, calibration: Sequence[Scored], confidence: float) -> None:
        trial, self.noise = rehearsal(calibration, clip=self.clips)
        for contest in self.margins:
            enters_N = np.concatenate([problem.enters[contest] for problem, _ in calibration])
            self.margins[contest], self.overlaps[contest] = margin_of(
                contest, trial, {contest: enters_N}, self.noise, confidence=confidence
            )
        self.forecast = _fit(calibration, self.clips)

    @property
    def gives_up(self) -> bool:
        """Whether any margin is finite."""
        return any(math.isfinite(margin) for margin in self.margins.values())

    @property
    def record(self) -> list[dict[str, Any]]:
        return [
            {
                "rule": contest.rule.name,
                "places": contest.places,
                "margin": margin,  # null: none keeps the confidence
                "overlap_in_calibration": self.overlaps[contest],
            }
            for contest, margin in self.margins.items()
        ]


class Heat:
    """One problem's race before its judge. `out_K`: who has been given up."""

    def __init__(self, judge: Judge, problem: Problem):
        self.judge, self.problem = judge, problem
        self.out_K = np.zeros(len(problem.tokens_K), bool)
        self.expected = _split(judge.forecast(problem.context), problem)
        self.running = [running_sums(x) for x in self.expected]

    def estimate(self, values: Sequence[np.ndarray]) -> Estimate:
        """From the token statistics of what has been read of each candidate, [T, 3] each."""
        value = [clipped(value_T3, self.judge.clips) for value_T3 in values]
        tokens_K, seen_K = self.problem.tokens_K, np.array([len(x) for x in value])
        whole = [v if len(v) == len(e) else e for v, e in zip(value, self.expected, strict=True)]
        field = Field(
            groups=Groups(np.zeros(len(value), np.int64), 1),
            clips=self.judge.clips,
            tokens_N=tokens_K,
            seen_N=seen_K,
            sum_NC=np.array([x.sum(0) for x in value]),
            expected_NC=np.array([x[n] for x, n in zip(self.running, seen_K, strict=True)]),
            expected_total_NC=np.array([x[-1] for x in self.running]),
            end_NC=_ends(whole, self.problem.end_K),
        )
        return field.estimate(self.judge.noise)

    def give_up(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Who is out from here on, [K]; `values` as for `estimate`."""
        estimate, enters = self.estimate(values), self.problem.enters
        beaten = [estimate.beaten(one, enters[one], self.out_K, margin) for one, margin in self.judge.margins.items()]
        self.out_K |= np.logical_and.reduce(beaten) & (estimate.field.seen_N < self.problem.tokens_K)
        return self.out_K

    @property
    def settled(self) -> bool:
        """Whether nobody can be given up any more, as at most the places are left in every contest."""
        return all((enters_K & ~self.out_K).sum() <= one.places for one, enters_K in self.problem.enters.items())


def clipped(value_T3: np.ndarray, clip: Sequence[int | None]) -> np.ndarray:
    """The statistics of the race, float64 [T, C]: surprisal, Brier score, the rank cut at each clip."""
    surprisal_T, brier_T, rank_T = np.asarray(value_T3, np.float64).T
    return np.stack([surprisal_T, brier_T, *(np.minimum(rank_T, np.inf if c is None else c) for c in clip)], 1)


def rehearsal(
    scored: Sequence[Scored], *, clip: tuple[int | None, ...], forecast: Forecast | None = None
) -> tuple[Trial, Noise]:
    """Problems as a trial, and the noise in them; without a `forecast` each problem's is fitted to others of them."""
    forecasts = _from_others(scored, clip) if forecast is None else [forecast] * len(scored)
    expected = [
        one for (problem, _), by in zip(scored, forecasts, strict=True) for one in _split(by(problem.context), problem)
    ]
    value = [clipped(value_T3, clip) for _, values in scored for value_T3 in values]
    problem_N = np.repeat(np.arange(len(scored)), [len(values) for _, values in scored])
    end_N = np.concatenate([problem.end_K for problem, _ in scored])
    tokens_N = np.array([len(x) for x in value])
    cut_J = np.array(cuts(int(tokens_N.max())))
    seen_JN = np.minimum(np.append(cut_J, tokens_N.max())[:, None], tokens_N)
    sum_JNC, expected_JNC = (
        np.stack([running_sums(x)[seen_J] for x, seen_J in zip(columns, seen_JN.T, strict=True)], 1)
        for columns in (value, expected)
    )
    trial = Trial(
        groups=Groups(problem_N, len(scored)),
        clips=clip,
        tokens_N=tokens_N,
        cut_J=cut_J,
        sum_JNC=sum_JNC,
        expected_JNC=expected_JNC,
        observed_end_NC=_ends(value, end_N),
        expected_end_NC=_ends(expected, end_N),
    )
    return trial, Noise.of([v - e for v, e in zip(value, expected, strict=True)], problem_N)


def _from_others(scored: Sequence[Scored], clip: Sequence[int | None]) -> list[Forecast]:
    """For each problem a forecast that was fitted to the other folds' problems."""
    folds = []
    for fold in range(min(FOLDS, len(scored))):
        others = [one for i, one in enumerate(scored) if i % FOLDS != fold]
        folds.append(_fit(others or scored, clip))  # a single problem has no others
    return [folds[i % FOLDS] for i in range(len(scored))]


def _fit(scored: Sequence[Scored], clip: Sequence[int | None]) -> Forecast:
    value_NC = np.concatenate([clipped(value_T3, clip) for _, values in scored for value_T3 in values])
    return Forecast(Context.joined([problem.context for problem, _ in scored]), value_NC)


def _split(value_NC: np.ndarray, problem: Problem) -> list[np.ndarray]:
    return np.split(value_NC, np.cumsum(problem.tokens_K)[:-1])


def running_sums(value_TC: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... T rows, [T + 1, C]."""
    return np.concatenate([np.zeros((1, value_TC.shape[1])), np.cumsum(value_TC, 0)])


def _ends(columns: Sequence[np.ndarray], end_N: np.ndarray) -> np.ndarray:
    """The rows at the end-of-turn tokens, [N, C]; 0 where there is none."""
    return np.array([x[e] if e >= 0 else np.zeros(x.shape[1]) for x, e in zip(columns, end_N.tolist(), strict=True)])

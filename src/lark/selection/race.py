"""Racing: which candidates of a problem can be given up before the student has read them to their end.

All candidates of a problem are scored on growing prefixes. At every cut what is left of each is estimated: from the
text (lark.scoring.forecast), corrected by how far the student's statistics have been from that so far. A candidate is given up
when at least as many others as have to come out exact are ahead of it by more than `margin` standard errors of the
difference. The margin is not taken from a normal distribution but calibrated on problems that are scored in full
(`margin_of`), which makes the confidence a statement about the choice: on problems like these, the expected share of
the full choice that the race chooses is at least the confidence.

Shapes: N candidates, G problems, C statistics (surprisal, Brier score, then a clipped rank for each clip in use), J
cuts, M margins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lark.common.groups import Groups
from lark.selection.candidates import Candidates
from lark.selection.contests import Contest
from lark.selection.scores.statistics import Lark, Learnability, Likelihood, RankSurprisal

FIRST_CUT, LEAST_STEP, GROWTH = 32, 32, 1.5  # tokens, tokens, times
MARGINS = np.linspace(5, 0, 26)  # standard errors, wide to narrow


def cuts(longest: int) -> list[int]:
    """Span tokens after which candidates may be given up, from 0 to below `longest`."""
    found, cut = [0], FIRST_CUT
    while cut < longest:
        found.append(cut)
        cut = max(cut + LEAST_STEP, int(GROWTH * cut))
    return found


def calibration_size(problems: int, confidence: float) -> int:
    """How many of `problems` are scored in full: a twentieth, but 3 to 5 times 1 / (1 - confidence).

    With n of them the calibration allows (n + 1) (1 - confidence) - 1 of their choices to be lost: fewer would hardly
    allow any, more would hardly narrow the margins.
    """
    if confidence == 1:
        return problems
    least, most = (math.ceil(round(times / (1 - confidence), 6)) for times in (3, 5))
    return min(problems, max(least, min(most, problems // 20)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """How statistics differ from their forecast, as covariances [C, C]: a token's, a candidate's mean, a problem's."""

    token_CC: np.ndarray
    candidate_CC: np.ndarray
    problem_CC: np.ndarray

    @classmethod
    def of(cls, residuals: Sequence[np.ndarray], problem_N: np.ndarray) -> "Noise":
        """From residuals of whole candidates, [T, C] each. What two halves of a candidate have in common is its own;
        the rest of a half's spread, times its tokens, is the tokens' (more than they vary singly: neighbours agree).
        """
        halves = [(r[: len(r) // 2], r[len(r) // 2 :]) for r in residuals if len(r) > 1]
        _, index = np.unique(problem_N[[len(r) > 1 for r in residuals]], return_inverse=True)
        groups = Groups(index.astype(np.int64), int(index.max(initial=-1)) + 1)
        first_NC, second_NC = (np.array([half[i].mean(0) for half in halves]) for i in (0, 1))
        whole_NC = np.array([np.concatenate(half).mean(0) for half in halves])
        inverse = np.mean([(1 / len(a) + 1 / len(b)) / 2 for a, b in halves])
        freedom = max(len(halves) - groups.count, 1)
        a_NC, b_NC, c_NC = (x_NC - _mean(groups, x_NC)[groups.index_N] for x_NC in (first_NC, second_NC, whole_NC))
        candidate_CC = _covariance((a_NC.T @ b_NC + b_NC.T @ a_NC) / 2 / freedom)
        token_CC = _covariance(((a_NC.T @ a_NC + b_NC.T @ b_NC) / 2 / freedom - candidate_CC) / inverse)
        mean_GC = _mean(groups, whole_NC)
        problem_CC = mean_GC.T @ mean_GC / groups.count - c_NC.T @ c_NC / freedom * (1 / groups.size).mean()
        return cls(token_CC=token_CC, candidate_CC=candidate_CC, problem_CC=_covariance(problem_CC))


def _mean(groups: Groups, x_NC: np.ndarray) -> np.ndarray:
    return np.stack([groups.sum(column) for column in x_NC.T], 1) / groups.size[:, None]


def _covariance(moment_CC: np.ndarray) -> np.ndarray:
    """The nearest matrix that is one."""
    value_C, vector_CC = np.linalg.eigh((moment_CC + moment_CC.T) / 2)
    return (vector_CC * np.maximum(value_C, 1e-9)) @ vector_CC.T


@dataclass(frozen=True, kw_only=True, eq=False)
class Field:
    """The candidates of some problems at one moment of their race.

    tokens_N: T; seen_N: of these, read so far; sum_NC: statistics summed over the tokens seen; expected_NC: their
    forecast, expected_total_NC that of the whole span; end_NC: of the end-of-turn token, observed or expected.
    """

    groups: Groups
    clips: tuple[int | None, ...]
    tokens_N: np.ndarray
    seen_N: np.ndarray
    sum_NC: np.ndarray
    expected_NC: np.ndarray
    expected_total_NC: np.ndarray
    end_NC: np.ndarray

    def estimate(self, noise: Noise) -> "Estimate":
        """Best linear prediction of the sums over whole spans, given what has been seen of all candidates.

        A candidate's residuals are a problem's shift, its own shift and tokens' noise (Henderson's mixed model).
        """
        left_N = self.tokens_N - self.seen_N
        seen_N = np.maximum(self.seen_N, 1)[:, None, None]
        residual_NC = (self.sum_NC - self.expected_NC) / seen_N[..., 0]
        precision_NCC = np.linalg.inv(noise.candidate_CC + noise.token_CC / seen_N) * (self.seen_N > 0)[:, None, None]
        weighted_NC = np.einsum("nij,nj->ni", precision_NCC, residual_NC)
        width = residual_NC.shape[1]
        total_GCC = np.stack([self.groups.sum(x) for x in precision_NCC.reshape(-1, width**2).T], 1)
        total_GCC = total_GCC.reshape(-1, width, width) + np.linalg.inv(noise.problem_CC)
        weighted_GC = np.stack([self.groups.sum(x) for x in weighted_NC.T], 1)
        problem_NC = np.linalg.solve(total_GCC, weighted_GC[..., None])[self.groups.index_N, :, 0]
        gain_NCC = noise.candidate_CC @ precision_NCC
        own_NC = np.einsum("nij,nj->ni", gain_NCC, residual_NC - problem_NC)
        ahead_NC = self.expected_total_NC - self.expected_NC + left_N[:, None] * (problem_NC + own_NC)
        own_NCC = noise.candidate_CC - gain_NCC @ noise.candidate_CC
        return Estimate(
            field=self,
            total_NC=np.where(left_N[:, None] > 0, np.maximum(self.sum_NC + ahead_NC, self.sum_NC), self.sum_NC),
            covariance_NCC=(left_N**2)[:, None, None] * own_NCC + left_N[:, None, None] * noise.token_CC,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """Sums over the whole spans, and the covariance of what is not known of them (0 of a candidate read to its end)."""

    field: Field
    total_NC: np.ndarray
    covariance_NCC: np.ndarray

    def candidates(self) -> Candidates:
        """As scores read them: with the columns that those in RACED ask for."""
        field, total_NC, end_NC = self.field, self.total_NC, self.field.end_NC
        ranks = {"sum_rank" if c is None else f"sum_rank_{c}": total_NC[:, 2 + i] for i, c in enumerate(field.clips)}
        statistics = {
            "num_tokens": field.tokens_N,
            "loss": total_NC[:, 0] / field.tokens_N,
            "brier": total_NC[:, 1] / field.tokens_N,
            "sum_surprisal": total_NC[:, 0],
            "end_surprisal": end_NC[:, 0],
            **ranks,
            "end_rank": end_NC[:, -1],  # of the widest clip; a score cuts it to its own
        }
        rows = field.groups.index_N
        return Candidates(problem_id=rows, candidate_id=np.arange(len(rows)), row_N=rows, statistics=statistics)

    def scores(self, contest: Contest, enters_N: np.ndarray) -> np.ndarray:
        """[N] in float64, NaN for those that do not enter."""
        score_N = np.full(len(enters_N), np.nan)
        if enters_N.any():
            score_N[enters_N] = contest.rule.scores(self.candidates().where(enters_N))
        return score_N

    def slopes(self, contest: Contest, enters_N: np.ndarray) -> np.ndarray:
        """What a candidate's score changes by with its own sums, [N, C]; what the problem's candidates have in common
        counts as known.
        """
        field, score = self.field, contest.rule.score
        slope_NC = np.zeros(self.total_NC.shape)
        if isinstance(score, Likelihood):
            slope_NC[:, 0] = -score.sign / field.tokens_N
        elif isinstance(score, Learnability):
            scale_N = np.maximum(field.tokens_N, 1.0) ** -score.length_exponent
            surprisal_N = np.maximum(self.total_NC[:, 0], np.finfo(float).tiny)
            with np.errstate(over="ignore"):  # of a candidate that is surely predicted so far
                slope_NC[:, 0] = -scale_N * (self.total_NC[:, 1] / surprisal_N) / surprisal_N
                slope_NC[:, 1] = scale_N / surprisal_N
        elif isinstance(score, Lark):
            loss_N, brier_N = (np.where(enters_N, self.total_NC[:, c] / field.tokens_N, 0.0) for c in (0, 1))
            scale_N = np.maximum(field.tokens_N, 1.0) ** -score.length_exponent
            loss_sum_N, brier_sum_N = (field.groups.spread(field.groups.sum(x)) for x in (loss_N, brier_N * scale_N))
            loss_sum_N = np.maximum(loss_sum_N, np.finfo(float).tiny)
            slope_NC[:, 0] = -brier_sum_N / loss_sum_N**2 / field.tokens_N
            slope_NC[:, 1] = 2 * scale_N / loss_sum_N / field.tokens_N
        else:
            assert isinstance(score, RankSurprisal)
            c = 2 + field.clips.index(score.clip)
            end_rank_N = field.end_NC[:, c]
            surprisal_N = np.maximum(self.total_NC[:, 0] - field.end_NC[:, 0], np.finfo(float).tiny)
            slope_NC[:, 0] = (self.total_NC[:, c] - end_rank_N) / surprisal_N**2
            slope_NC[:, c] = -1 / surprisal_N
        return slope_NC

    def beaten(self, contest: Contest, enters_N: np.ndarray, out_N: np.ndarray, margin: float) -> np.ndarray:
        """Candidates [N] that do not enter the contest, or that at least `places` others, still in the race, are ahead
        of by more than `margin` standard errors.
        """
        if math.isinf(margin):
            return ~enters_N
        score_N, slope_NC = self.scores(contest, enters_N), self.slopes(contest, enters_N)
        variance_N = np.einsum("ni,nij,nj->n", slope_NC, self.covariance_NCC, slope_NC)
        ahead_N = np.zeros(len(score_N), np.int64)
        for rows in self.field.groups.split():
            racing = rows[~out_N[rows] & np.isfinite(score_N[rows])]
            lead = score_N[racing][None] - score_N[rows][:, None]
            error = np.sqrt(variance_N[racing][None] + variance_N[rows][:, None])
            ahead_N[rows] = (lead > margin * error + 1e-12).sum(1)
        return ~enters_N | (np.isfinite(score_N) & (ahead_N >= contest.places))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Whole candidates with their statistics, on which races can be rehearsed.

    cut_J: tokens; sum_JNC, expected_JNC: statistics, and their forecast, summed up to every cut, with the whole spans
    as one cut more. observed_end_NC, expected_end_NC: of the end-of-turn token.
    """

    groups: Groups
    clips: tuple[int | None, ...]
    tokens_N: np.ndarray
    cut_J: np.ndarray
    sum_JNC: np.ndarray
    expected_JNC: np.ndarray
    observed_end_NC: np.ndarray
    expected_end_NC: np.ndarray

    def field(self, cut_N: np.ndarray) -> Field:
        """As it is when each candidate has come to the cut of that number."""
        row_N = np.arange(len(cut_N))
        seen_N = np.minimum(np.append(self.cut_J, np.iinfo(np.int64).max)[cut_N], self.tokens_N)
        return Field(
            groups=self.groups,
            clips=self.clips,
            tokens_N=self.tokens_N,
            seen_N=seen_N,
            sum_NC=self.sum_JNC[cut_N, row_N],
            expected_NC=self.expected_JNC[cut_N, row_N],
            expected_total_NC=self.expected_JNC[-1],
            end_NC=np.where((seen_N == self.tokens_N)[:, None], self.observed_end_NC, self.expected_end_NC),
        )

    def race(
        self, raced: Mapping[Contest, float], enters: Mapping[Contest, np.ndarray], noise: Noise
    ) -> tuple[np.ndarray, np.ndarray, dict[Contest, np.ndarray]]:
        """With the margin of each contest: who is given up [N], tokens read [N], and the final scores of the contests
        (NaN: given up, or does not enter)."""
        out_N = np.zeros(len(self.tokens_N), bool)
        cut_N = np.zeros(len(self.tokens_N), np.int64)
        for j in range(len(self.cut_J)):
            cut_N = np.where(out_N, cut_N, j)
            estimate = self.field(cut_N).estimate(noise)
            beaten = [estimate.beaten(contest, enters[contest], out_N, margin) for contest, margin in raced.items()]
            out_N |= np.logical_and.reduce(beaten) & (estimate.field.seen_N < self.tokens_N)
        cut_N = np.where(out_N, cut_N, len(self.cut_J))
        estimate = self.field(cut_N).estimate(noise)
        final = {one: np.where(out_N, np.nan, estimate.scores(one, enters[one])) for one in raced}
        return out_N, estimate.field.seen_N, final

    def overlap(
        self, contest: Contest, enters: Mapping[Contest, np.ndarray], noise: Noise, score_N: np.ndarray
    ) -> np.ndarray:
        """Share of the full choice that is chosen by `score_N`, [G]; NaN where nobody can be chosen."""
        whole = self.field(np.full(len(self.tokens_N), len(self.cut_J))).estimate(noise)
        full_N = whole.scores(contest, enters[contest])
        chosen_N, right_N = (top(self.groups, x_N, contest.budget) for x_N in (score_N, full_N))
        with np.errstate(invalid="ignore"):
            return self.groups.sum((chosen_N & right_N) * 1.0) / self.groups.sum(right_N * 1.0)


def top(groups: Groups, score_N: np.ndarray, count: int) -> np.ndarray:
    """Whether a candidate is among the `count` best of its problem, [N]."""
    ranking = groups.rank(score_N, np.arange(len(score_N)), np.isfinite(score_N))
    chosen_N = np.zeros(len(score_N), bool)
    chosen_N[ranking.row_M[ranking.position < count]] = True
    return chosen_N


def margin_of(
    contest: Contest, trial: Trial, enters: Mapping[Contest, np.ndarray], noise: Noise, *, confidence: float
) -> tuple[float, float]:
    """The narrowest margin that keeps the confidence (inf: none does), and the overlap it had on the trial's problems.

    Conformal risk control (Angelopoulos et al., arXiv 2208.02814): of n calibration problems with losses l_i = 1 - the
    overlap of the choices, made monotone in the margin, (sum l_i + 1) / (n + 1) <= 1 - confidence. Then the expected
    loss on a problem exchangeable with these is at most 1 - confidence. (Up to this: the forecast and the noise come
    from the same problems, if each problem's forecast in the trial from others.)
    """
    worst_G = np.zeros(trial.groups.count)
    found = (math.inf, 1.0)
    for margin in MARGINS.tolist():
        _, _, final = trial.race({contest: margin}, enters, noise)
        overlap_G = trial.overlap(contest, enters, noise, final[contest])
        worst_G = np.maximum(worst_G, 1 - np.nan_to_num(overlap_G, nan=1.0))
        if (worst_G.sum() + 1) / (len(worst_G) + 1) > 1 - confidence + 1e-12:
            return found
        found = (margin, 1 - float(worst_G.mean()))
    return found

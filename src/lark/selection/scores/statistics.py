"""Scores over the student's statistics: one number per candidate, higher = take it first, NaN = never.

Notation: T span tokens, s_t = -ln p(y_t) in nats, L = mean s_t, r_t the observed token's rank, sums over the valid
candidates of one problem. Every score is a frozen dataclass of its parameters, called with the candidates; `needs`
names the passes (lark.scoring.passes) that it reads. Scores over the pool's own columns are in
lark.selection.scores.text.

Shapes: N candidates, S steps of all candidates, end to end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import Groups, unit_hash
from lark.scoring.passes import ContentAlone, LocalWindows, Pass, Statistics
from lark.selection.candidates import Candidates
from lark.student.token_statistics import RANK_CLIPS

Score = Callable[[Candidates], np.ndarray]

STATISTICS = (
    *("loss", "brier", "entropy", "sum_surprisal", "sum_brier", "sum_entropy", "sum_rank", "top1", "has_end"),
    *("end_surprisal", "end_brier", "end_entropy", "end_rank"),
    *(f"sum_rank_{clip}" for clip in RANK_CLIPS),
)
"""The columns of one number a candidate that exist only after the forward pass (`num_tokens` always does)."""


def needs_of_column(column: str) -> tuple[Pass, ...]:
    """Return the passes that `candidates[column]` rests on: the forward pass for a statistic, none for a pool
    column."""
    return (Statistics(),) if column in STATISTICS else ()


@dataclass(frozen=True, kw_only=True)
class Lark:
    """Learnability gain g_k = (2 B_k - rho_bar L_k) / sum_i L_i with rho_bar = sum_i B_i / sum_i L_i.

    B_k is the mean Brier score, the squared norm of the loss gradient with respect to the logits; rho_k = B_k / L_k
    is the learnability factor (LARK, arXiv 2605.30651, and its released code). sum_k g_k = rho_bar. With
    `length_exponent` a > 0, B_k T_k^-a takes B_k's place (ours): under a mean loss the true squared gradient norm
    falls about as 1/T, which the Brier score alone does not see. Needs L_k > 0; other rows get NaN.
    """

    length_exponent: float = 0.0
    needs = (Statistics(),)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        loss_N, groups = candidates["loss"], candidates.groups
        brier_N = _correct_brier(candidates, self.length_exponent)
        valid_N = np.isfinite(loss_N) & np.isfinite(brier_N) & (loss_N > 0)
        loss_sum_N = groups.spread(groups.sum(np.where(valid_N, loss_N, 0.0)))
        brier_sum_N = groups.spread(groups.sum(np.where(valid_N, brier_N, 0.0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            gain_N = (2 * brier_N - brier_sum_N / loss_sum_N * loss_N) / loss_sum_N
        return np.where(valid_N, gain_N, np.nan)


@dataclass(frozen=True, kw_only=True)
class Learnability:
    """The learnability factor rho_k = B_k T_k^-a / L_k of the trajectory alone, a = `length_exponent` (a rule of ours).

    a = 0: the proxy of ||grad L||^2 / L in LARK (arXiv 2605.30651), whose gain g weighs it by the loss. a = 1: what it
    comes to under a mean loss with tokens that pull apart (docs/theory.md, 2.3). It needs no other candidates. Needs
    L_k > 0; other rows get NaN.
    """

    length_exponent: float = 1.0
    needs = (Statistics(),)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return _divide(_correct_brier(candidates, self.length_exponent), candidates["loss"])


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """sign * -L, the mean log-probability in nats/token: +1 takes the likeliest first (GRAPE, arXiv 2502.04194; "global
    naturalness"), -1 the highest perplexity first (the opposite control)."""

    sign: int = 1
    needs = (Statistics(),)

    def __post_init__(self) -> None:
        _check_sign(self.sign, "likeliest first", "highest perplexity first")

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return -self.sign * candidates["loss"]


@dataclass(frozen=True, kw_only=True)
class Length:
    """sign * T: +1 takes the longest first, -1 the shortest (arXiv 2601.14249, table 6)."""

    sign: int
    needs = ()

    def __post_init__(self) -> None:
        _check_sign(self.sign, "longest first", "shortest first")

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return self.sign * candidates["num_tokens"].astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """sign * the mean entropy of the student's predictions over the span, nats/token: -1 takes the lowest first
    (arXiv 2601.14249, table 14), +1 the highest."""

    sign: int = -1
    needs = (Statistics(),)

    def __post_init__(self) -> None:
        _check_sign(self.sign, "highest entropy first", "lowest entropy first")

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return self.sign * candidates["entropy"]


@dataclass(frozen=True, kw_only=True)
class Rank:
    """-mean_t min(r_t, clip) over the whole span, the end-of-turn token included (arXiv 2601.14249, "rank").

    `clip` is one of the clips the statistics keep (50, 100, 500) or null for none. NaN for an empty span.
    """

    clip: int | None = 100
    needs = (Statistics(),)

    def __post_init__(self) -> None:
        _check_clip(self.clip)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return -_divide(candidates[_name_clipped_sum(self.clip)], candidates["num_tokens"])


@dataclass(frozen=True, kw_only=True)
class RankSurprisal:
    """RSR: -(sum_t min(r_t, clip) / sum_t s_t), the end-of-turn token excluded (arXiv 2601.14249, eq. 7).

    `clip` is one of the clips the statistics keep (50, 100, 500) or null for none. NaN where sum s_t = 0. With
    probe.span=authors the newline after the end-of-turn token counts: no statistic tells its rank apart.
    """

    clip: int | None = 100
    needs = (Statistics(),)

    def __post_init__(self) -> None:
        _check_clip(self.clip)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        end_rank_N = candidates["end_rank"] if self.clip is None else np.minimum(candidates["end_rank"], self.clip)
        surprisal_N = candidates["sum_surprisal"] - candidates["end_surprisal"]
        return -_divide(candidates[_name_clipped_sum(self.clip)] - end_rank_N, surprisal_N)


@dataclass(frozen=True, kw_only=True)
class DropFirst:
    """Mean log-probability (nats/token) without the first `skip` tokens of every step (arXiv 2604.06834).

    The end-of-turn token belongs to no step and stays in, so that skip=0 is `Likelihood`. `skip` must be `probe.skip`,
    at which the statistics tell first tokens apart. NaN if no token is left.
    """

    skip: int
    needs = (Statistics(),)

    def __post_init__(self) -> None:
        _check_skip(self.skip, 0)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        tokens_S, steps = _group_steps(candidates["step_tokens"])
        first_S = _concatenate(candidates["step_first_surprisal"])
        left_N = candidates["num_tokens"] - steps.sum(np.minimum(tokens_S, self.skip))
        return -_divide(candidates["sum_surprisal"] - steps.sum(first_S), left_N)


@dataclass(frozen=True, kw_only=True)
class CausalLikelihood:
    """ASLEC-CASL: M - gamma F, the mean log-probability M of the steps' tokens (nats/token) without what the frequency
    F of first tokens (steps / tokens) does to it (arXiv 2604.06834).

    gamma comes from the least-squares fit M ~ b1 M_rest + b2 M_first + gamma F + c over all candidates that have both,
    with M_first, M_rest the means over the first `skip` tokens of each step and over the others; it is in the
    selection's record. The end-of-turn token belongs to no step. `skip` must be `probe.skip`: 2 as in the authors'
    script, 1 as in the paper. NaN without step tokens; where fewer than four candidates can be fitted, gamma is 0.
    """

    skip: int
    needs = (Statistics(),)

    def __post_init__(self) -> None:
        _check_skip(self.skip, 1)

    def decisions(self, candidates: Candidates) -> dict[str, list[float]]:
        """Return gamma, for the selection's record."""
        return {"gamma": [self._fit(*self._measure(candidates))]}

    def __call__(self, candidates: Candidates) -> np.ndarray:
        measured = self._measure(candidates)
        mean_N, _, _, frequency_N = measured
        return mean_N - self._fit(*measured) * frequency_N

    def _measure(self, candidates: Candidates) -> tuple[np.ndarray, ...]:
        """Return M, M_rest, M_first and F, [N] each; NaN where there is no such token."""
        tokens_S, steps = _group_steps(candidates["step_tokens"])
        tokens_N, first_tokens_N = steps.sum(tokens_S), steps.sum(np.minimum(tokens_S, self.skip))
        total_N = steps.sum(_concatenate(candidates["step_surprisal"]))
        first_N = steps.sum(_concatenate(candidates["step_first_surprisal"]))
        mean_N, frequency_N = -_divide(total_N, tokens_N), _divide(steps.size, tokens_N)
        rest_N = -_divide(total_N - first_N, tokens_N - first_tokens_N)
        return mean_N, rest_N, -_divide(first_N, first_tokens_N), frequency_N

    def _fit(self, mean_N: np.ndarray, rest_N: np.ndarray, first_N: np.ndarray, frequency_N: np.ndarray) -> float:
        design_N4 = np.stack([rest_N, first_N, frequency_N, np.ones_like(mean_N)], axis=1)
        has_all_N = np.isfinite(design_N4).all(1)
        if has_all_N.sum() < design_N4.shape[1]:
            return 0.0
        return float(np.linalg.lstsq(design_N4[has_all_N], mean_N[has_all_N], rcond=None)[0][2])


@dataclass(frozen=True, kw_only=True)
class LocalLikelihood:
    """Mean over steps of the step's mean log-probability (nats/token) given the prompt and only the `steps_before`
    steps before it; every step counts the same (LALP, "local naturalness", arXiv 2510.03988).

    steps_before=0 leaves the prompt alone. The end-of-turn token belongs to no step. NaN where there is no step.
    """

    steps_before: int = 4

    def __post_init__(self) -> None:
        if self.steps_before < 0:
            raise LarkError(f"selector.score.steps_before={self.steps_before} is no number of steps; set 0 or more")

    @property
    def _windows(self) -> LocalWindows:
        return LocalWindows(steps_before=self.steps_before)

    @property
    def needs(self) -> tuple[Pass, ...]:
        return (Statistics(), self._windows)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        tokens_S, steps = _group_steps(candidates["step_tokens"])
        surprisal_S = _concatenate(candidates.of(self._windows)["window_surprisal"])
        assert surprisal_S.shape == tokens_S.shape
        return -_divide(steps.sum(surprisal_S / tokens_S), steps.size)


@dataclass(frozen=True, kw_only=True)
class InstructionDifficulty:
    """IFD = PPL(y given x) / PPL(y), highest first (arXiv 2402.00530): how little the prompt helps to predict the text.

    Both perplexities are over the content tokens that their pass scores: given the prompt the steps' tokens, which
    leave out the end-of-turn token and what probe.span=authors adds after it. Values of `max` and above (the prompt
    does not help at all) are NaN, as in the paper; null keeps them. NaN without content.
    """

    max: float | None = 1.0
    needs = (Statistics(), ContentAlone())

    def __post_init__(self) -> None:
        if self.max is not None and not self.max > 0:
            raise LarkError(f"selector.score.max={self.max} drops every candidate; set it above 0 (the paper: 1)")

    def __call__(self, candidates: Candidates) -> np.ndarray:
        alone = candidates.of(ContentAlone())
        tokens_S, steps = _group_steps(candidates["step_tokens"])
        given_prompt_N = _divide(steps.sum(_concatenate(candidates["step_surprisal"])), steps.sum(tokens_S))
        difficulty_N = np.exp(given_prompt_N - _divide(alone["alone_surprisal"], alone["alone_tokens"]))
        return difficulty_N if self.max is None else np.where(difficulty_N < self.max, difficulty_N, np.nan)


@dataclass(frozen=True, kw_only=True)
class Random:
    """A seeded hash of (seed, problem, candidate): uniform on [0, 1), independent of row order."""

    seed: int
    needs = ()

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return unit_hash(self.seed, candidates["problem_id"], candidates["candidate_id"], salt="random")


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same score for every candidate."""

    needs = ()

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return np.zeros(len(candidates))


def _check_skip(skip: int, least: int) -> None:
    if skip < least:
        raise LarkError(f"selector.score.skip={skip} is no number of tokens; set it to ${{probe.skip}}")


def _check_sign(sign: int, plus: str, minus: str) -> None:
    if sign not in (1, -1):
        raise LarkError(f"selector.score.sign={sign} is neither 1 ({plus}) nor -1 ({minus})")


def _check_clip(clip: int | None) -> None:
    if clip is not None and clip not in RANK_CLIPS:
        known = ", ".join(map(str, RANK_CLIPS))
        raise LarkError(f"selector.score.clip={clip} is not kept by the statistics; set {known} or null")


def _name_clipped_sum(clip: int | None) -> str:
    """Name the statistic that holds sum_t min(r_t, clip)."""
    return "sum_rank" if clip is None else f"sum_rank_{clip}"


def _correct_brier(candidates: Candidates, length_exponent: float) -> np.ndarray:
    """Return B_k T_k^-a, [N]."""
    return candidates["brier"] * np.maximum(candidates["num_tokens"], 1.0) ** -length_exponent


def _divide(x_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """Return x / y where y > 0, else NaN."""
    return np.divide(x_N, y_N, out=np.full(len(x_N), np.nan), where=y_N > 0)


def _group_steps(tokens_N: np.ndarray) -> tuple[np.ndarray, Groups]:
    """Return the tokens of every step, float64 [S], and the steps grouped by candidate, from the ragged column
    `step_tokens`."""
    size_N = np.fromiter(map(len, tokens_N), np.int64, len(tokens_N))
    return _concatenate(tokens_N), Groups(np.repeat(np.arange(len(size_N)), size_N), len(size_N))


def _concatenate(column_N: np.ndarray) -> np.ndarray:
    """Return the arrays of a ragged column end to end, float64 [S]."""
    return np.concatenate([np.zeros(0), *column_N])

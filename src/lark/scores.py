"""Scores: one number per candidate from statistics or text, higher = take it first, NaN = never.

Notation: T span tokens, s_t = -ln p(y_t) in nats, L = mean s_t, r_t the observed token's rank, sums over the valid
candidates of one problem. Every score is a frozen dataclass of its parameters, called with the candidates.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lark.candidates import Candidates
from lark.groups import unit_hash
from lark.stats import RANK_CLIPS

Score = Callable[[Candidates], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Lark:
    """Learnability gain g_k = (2 B_k - rho_bar L_k) / sum_i L_i with rho_bar = sum_i B_i / sum_i L_i.

    B_k is the mean Brier score, the squared norm of the loss gradient with respect to the logits; rho_k = B_k / L_k
    is the learnability factor (LARK, arXiv 2605.30651, and its released code). sum_k g_k = rho_bar. With
    `length_exponent` a > 0, B_k T_k^-a takes B_k's place (ours): under a mean loss the true squared gradient norm
    falls about as 1/T, which the Brier score alone does not see. Needs L_k > 0; other rows get NaN.
    """

    length_exponent: float = 0.0

    def __call__(self, candidates: Candidates) -> np.ndarray:
        loss_N, groups = candidates["loss"], candidates.groups
        brier_N = candidates["brier"] * np.maximum(candidates["num_tokens"], 1.0) ** -self.length_exponent
        valid_N = np.isfinite(loss_N) & np.isfinite(brier_N) & (loss_N > 0)
        loss_sum_N = groups.spread(groups.sum(np.where(valid_N, loss_N, 0.0)))
        brier_sum_N = groups.spread(groups.sum(np.where(valid_N, brier_N, 0.0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            gain_N = (2 * brier_N - brier_sum_N / loss_sum_N * loss_N) / loss_sum_N
        return np.where(valid_N, gain_N, np.nan)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """-L: the mean log-probability (GRAPE, arXiv 2502.04194; "global naturalness")."""

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return -candidates["loss"]


@dataclass(frozen=True, kw_only=True)
class Length:
    """sign * T: +1 takes the longest first, -1 the shortest (arXiv 2601.14249, table 6)."""

    sign: int

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise ValueError(f"selector.score.sign={self.sign} is neither 1 (longest first) nor -1 (shortest first)")

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return self.sign * candidates["num_tokens"].astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class RankSurprisal:
    """RSR: -(sum_t min(r_t, clip) / sum_t s_t), the end-of-turn token excluded (arXiv 2601.14249, eq. 7).

    `clip` is one of the clips the statistics keep (50, 100, 500) or null for none. NaN where sum s_t = 0.
    """

    clip: int | None = 100

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip not in RANK_CLIPS:
            known = ", ".join(map(str, RANK_CLIPS))
            raise ValueError(f"selector.score.clip={self.clip} is not kept by the statistics; set {known} or null")

    def __call__(self, candidates: Candidates) -> np.ndarray:
        clipped_N = candidates["sum_rank" if self.clip is None else f"sum_rank_{self.clip}"]
        end_rank_N = candidates["end_rank"] if self.clip is None else np.minimum(candidates["end_rank"], self.clip)
        surprisal_N = candidates["sum_surprisal"] - candidates["end_surprisal"]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(surprisal_N > 0, -(clipped_N - end_rank_N) / surprisal_N, np.nan)


@dataclass(frozen=True, kw_only=True)
class Random:
    """A seeded hash of (seed, problem, candidate): uniform on [0, 1), independent of row order."""

    seed: int

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return unit_hash(self.seed, candidates["problem_id"], candidates["candidate_id"], salt="random")


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same score for every candidate."""

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return np.zeros(len(candidates))


def imported(path: str, setting: str) -> Callable[[Candidates], np.ndarray]:
    """The function a user names as `module:function`, found as Python finds modules and in the working folder.

    Raises ValueError naming `setting` when there is no such function. What else a module raises while it is imported
    is its author's and passes through.
    """
    module, _, name = path.partition(":")
    if not name or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{setting}={path!r} names no function; set it to module:function, as in my_module:my_score")
    if os.getcwd() not in sys.path:  # an installed command starts without it, `python -m` with it
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{setting}={path!r} could not be imported ({error}); is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"{setting}={path!r} is a {type(function).__name__}, not a function of the candidates")
    return function  # type: ignore[return-value]

"""Metrics over samples, as torchmetrics that add up over batches and ranks.

Shapes: P problems, N samples a problem.
"""

from math import comb
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lark.common.errors import LarkError


def average_at_k(correct_PN: Tensor) -> Tensor:
    """Share of each problem's k = N samples that are correct, [P] in float64 (RSR, arXiv 2601.14249: Acc@4)."""
    _check_shape(correct_PN)
    return correct_PN.to(torch.float64).mean(dim=1)


def pass_at_k(correct_PN: Tensor, k: int) -> Tensor:
    """Probability that k of a problem's N samples, drawn without replacement, contain a correct one, [P] in float64.

    1 - C(N - c, k) / C(N, k) with c correct samples: unbiased for the chance that k new samples contain one (Codex,
    arXiv 2107.03374, equation 1). Binomials are exact integers, so it neither overflows nor loses digits.

    Raises:
        LarkError: k is below 1 or above N.
    """
    _check_shape(correct_PN)
    num_samples = correct_PN.shape[1]
    check_pass_at(k, num_samples)
    by_count = [1.0 - comb(num_samples - c, k) / comb(num_samples, k) for c in range(num_samples + 1)]
    table = torch.tensor(by_count, dtype=torch.float64, device=correct_PN.device)
    return table[correct_PN.to(torch.long).sum(dim=1)]


def majority_at_k(vote_PN: Tensor, correct_PN: Tensor) -> Tensor:
    """Credit of the answer that most of a problem's k = N samples agree on, [P] in float64.

    1 if it is correct, else 0; of answers with equally many votes, the share that is correct, which is what drawing one
    of them would earn on average. Samples without an answer do not vote; a problem without any vote earns 0. (Majority
    voting over samples: self-consistency, arXiv 2203.11171.)

    Args:
        vote_PN: integers; within a problem, equal ones are the same answer, and negative ones no answer (`lark.answers.answer_clusters`).
        correct_PN: in bool; what counts of an answer is the share of its samples that are correct.
    """
    _check_shape(vote_PN)
    assert vote_PN.shape == correct_PN.shape, f"{tuple(vote_PN.shape)} votes, {tuple(correct_PN.shape)} verdicts"
    votes_PN = vote_PN >= 0
    same_PNN = (vote_PN[:, :, None] == vote_PN[:, None, :]) & votes_PN[:, None, :]
    count_PN = same_PNN.sum(dim=2) * votes_PN
    # Every answer of the most votes has equally many samples: the mean over these is the mean over answers.
    tied_PN = votes_PN & (count_PN == count_PN.amax(dim=1, keepdim=True))
    return (tied_PN & correct_PN).sum(dim=1).double() / tied_PN.sum(dim=1).clamp(min=1)


def check_pass_at(k: int, num_samples: int) -> None:
    """LarkError unless pass@k can be estimated from this number of samples."""
    if not 1 <= k <= num_samples:
        raise LarkError(
            f"evaluation.pass_at={k} must lie between 1 and evaluation.samples={num_samples}; "
            "lower it or draw more samples"
        )


class ProblemMean(Metric):
    """Mean over problems of a per-problem value; problems seen on several ranks or in several updates add up."""

    full_state_update = False
    higher_is_better = True
    total: Tensor
    problems: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def per_problem(self, values_PN: Tensor) -> Tensor:
        """The value of each problem, [P] in float64: here the mean over its samples."""
        return average_at_k(values_PN)

    def update(self, values_PN: Tensor) -> None:
        """Adds problems, given what was observed for each of their samples, [P, N] in bool, or numbers."""
        self.add(self.per_problem(values_PN))

    def add(self, value_P: Tensor) -> None:
        self.total += value_P.sum()
        self.problems += len(value_P)

    def compute(self) -> Tensor:
        """The mean over all problems seen, in float64; NaN if there were none."""
        return self.total / self.problems


class AverageAtK(ProblemMean):
    """avg@k: the mean over a problem's k = N samples, then over problems. Takes correct_PN in bool."""


class PassAtK(ProblemMean):
    """pass@k, unbiased from N >= k samples a problem (`pass_at_k`). Takes correct_PN in bool.

    Args:
        k: samples of which one has to be correct.
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def per_problem(self, values_PN: Tensor) -> Tensor:
        return pass_at_k(values_PN, self.k)


class MajorityAtK(ProblemMean):
    """maj@k over all k = N samples of a problem (`majority_at_k`)."""

    def update(self, vote_PN: Tensor, correct_PN: Tensor) -> None:  # type: ignore[override]
        """Adds problems, given the votes and verdicts of each of their samples, both [P, N]."""
        self.add(majority_at_k(vote_PN, correct_PN))


def _check_shape(values_PN: Tensor) -> None:
    assert values_PN.ndim == 2 and values_PN.shape[1] > 0, f"expected [problems, samples], got {tuple(values_PN.shape)}"

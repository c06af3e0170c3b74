"""What the student's statistics of a token will be, foreseen from the text alone.

A token that repeats what its sequence, or another candidate of the problem, has said before is easy; others are as hard
as the same n-gram was elsewhere. Both are counted, and a linear regression fitted on problems that the student has
scored turns the counts into expected statistics. It is no student, but it tells a race much of what is still to come.

Shapes: N span tokens of sequences, end to end; C statistics; F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4  # lengths of the n-grams that are looked for earlier in the sequence and in the other candidates
SHRINKAGE = (10.0, 3.0, 3.0)
"""Of the means by n-gram, for n = 1, 2, ...: that many occurrences weigh as much as the mean by the shorter n-gram."""
FIRST_TOKENS = (2, 8)  # the first ones of a span are harder
FIT_TOKENS = 2**19  # more are thinned out evenly: memory, not accuracy
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is counted of each span token of a problem's candidates.

    repeated_N: (ORDERS + 1) * a + b, where a is the length of the longest n-gram (up to ORDERS) that ends with the
    token and occurred earlier in its sequence, b of that which ends in another candidate's span; position_N: place in
    the span; ngram_ON: a number for the n-gram of each length in SHRINKAGE that ends with the token.
    """

    repeated_N: np.ndarray
    position_N: np.ndarray
    ngram_ON: np.ndarray

    def every(self, step: int) -> "Context":
        return Context(
            repeated_N=self.repeated_N[::step], position_N=self.position_N[::step], ngram_ON=self.ngram_ON[:, ::step]
        )

    @classmethod
    def joined(cls, parts: Sequence["Context"]) -> "Context":
        """Of several problems, end to end."""
        return cls(
            repeated_N=np.concatenate([part.repeated_N for part in parts]),
            position_N=np.concatenate([part.position_N for part in parts]),
            ngram_ON=np.concatenate([part.ngram_ON for part in parts], 1),
        )


def context(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Context:
    """Of the candidates of one problem: their token ids, prompt included, and where their spans start."""
    own, ngrams = [], []
    for ids, start in zip(sequences, starts, strict=True):
        ngram_OL = _ngrams(np.asarray(ids, np.int64))
        own.append(sum(_earlier(ngram_L)[start:] for ngram_L in ngram_OL))
        ngrams.append(ngram_OL[:, start:])
    size = [part.shape[1] for part in ngrams]
    sequence_N, ngram_ON = np.repeat(np.arange(len(size)), size), np.concatenate(ngrams, 1)
    elsewhere_N = sum(_in_several(ngram_N, sequence_N) for ngram_N in ngram_ON)
    return Context(
        repeated_N=(ORDERS + 1) * np.concatenate(own) + elsewhere_N,
        position_N=np.concatenate([np.arange(n) for n in size]),
        ngram_ON=ngram_ON[: len(SHRINKAGE)],
    )


def _ngrams(ids_L: np.ndarray) -> np.ndarray:
    """A number for the n-gram, n = 1 .. ORDERS, that ends at each token, uint64 [ORDERS, L]; equal for equal ones."""
    ngram_OL = np.zeros((ORDERS, len(ids_L)), np.uint64)
    with np.errstate(over="ignore"):
        code_L = np.zeros(len(ids_L), np.uint64)
        for back in range(ORDERS):
            code_L = code_L * _MULTIPLIER
            code_L[back:] += ids_L[: len(ids_L) - back].astype(np.uint64) + np.uint64(1)
            ngram_OL[back] = code_L
    return ngram_OL


def _earlier(ngram_L: np.ndarray) -> np.ndarray:
    """Whether the same n-gram has ended before, int64 [L]."""
    _, first, inverse = np.unique(ngram_L, return_index=True, return_inverse=True)
    return (first[inverse] < np.arange(len(ngram_L))).astype(np.int64)


def _in_several(ngram_N: np.ndarray, sequence_N: np.ndarray) -> np.ndarray:
    """Whether an n-gram occurs in more than one sequence, int64 [N]."""
    _, inverse = np.unique(ngram_N, return_inverse=True)
    count = int(sequence_N.max(initial=0)) + 1
    sequences = np.bincount(np.unique(inverse * count + sequence_N) // count)
    return (sequences > 1)[inverse].astype(np.int64)


class Forecast:
    """Expected statistics of tokens, fitted to `value_NC` of tokens with `known` context.

    The mean by n-gram is shrunk to that of the next shorter one; for the fit a token's own value is left out of it.
    """

    def __init__(self, known: Context, value_NC: np.ndarray, *, ridge: float = 1.0):
        step = -(-len(value_NC) // FIT_TOKENS)
        known, value_NC = known.every(step), value_NC[::step].astype(np.float64)
        self.mean_C = value_NC.mean(0)
        self.shifts: list[tuple[np.ndarray, np.ndarray]] = []
        expected_NC, by_ngram = np.broadcast_to(self.mean_C, value_NC.shape), []
        for ngram_N, shrinkage in zip(known.ngram_ON, SHRINKAGE, strict=True):
            ngrams, inverse, count = np.unique(ngram_N, return_inverse=True, return_counts=True)
            residual_NC = value_NC - expected_NC
            total_MC = np.stack([np.bincount(inverse, column) for column in residual_NC.T], 1)
            self.shifts.append((ngrams, total_MC / (count + shrinkage)[:, None]))
            expected_NC = expected_NC + (total_MC[inverse] - residual_NC) / (count - 1 + shrinkage)[inverse, None]
            by_ngram.append(expected_NC)
        feature_NF = _features(known, by_ngram)
        normal_FF = feature_NF.T @ feature_NF + ridge * np.eye(feature_NF.shape[1])
        self.weight_FC = np.linalg.solve(normal_FF, feature_NF.T @ value_NC)

    def __call__(self, of: Context) -> np.ndarray:
        """float64 [N, C]."""
        expected_NC, by_ngram = np.broadcast_to(self.mean_C, (len(of.repeated_N), len(self.mean_C))), []
        for ngram_N, (ngrams, shift_MC) in zip(of.ngram_ON, self.shifts, strict=True):
            place_N = np.minimum(np.searchsorted(ngrams, ngram_N), len(ngrams) - 1)
            expected_NC = expected_NC + np.where((ngrams[place_N] == ngram_N)[:, None], shift_MC[place_N], 0.0)
            by_ngram.append(expected_NC)
        return _features(of, by_ngram) @ self.weight_FC


def _features(of: Context, by_ngram: Sequence[np.ndarray]) -> np.ndarray:
    repeated_NF = np.eye((ORDERS + 1) ** 2)[of.repeated_N]
    return np.column_stack([repeated_NF, *(of.position_N < first for first in FIRST_TOKENS), *by_ngram])

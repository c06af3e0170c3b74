"""Rules: a filter, a score and a policy, each of ours or of the user's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from lark.common.errors import LarkError
from lark.scoring.passes import Pass, needs_of
from lark.selection.candidates import Candidates
from lark.selection.own_functions import import_function, locate_errors, to_numbers
from lark.selection.policies import Policy
from lark.selection.policy_weights import get_prior_column
from lark.selection.scores.statistics import Score, needs_of_column

NOT_WRONG = "not_wrong"
"""Name of the filter that leaves out what is known to be wrong; a candidate of unknown verdict passes."""


LARGEST_SCORE = 1e307
"""Magnitude of a score: differences, which policies take, are still numbers."""


@dataclass(frozen=True, kw_only=True)
class Between:
    """A filter: min <= value <= max; what has no value does not pass.

    The value is a `column`, that is a statistic (num_tokens, loss) or a numeric column of the pool, or a `score` of all
    candidates: exactly one of both.
    """

    column: str | None = None
    score: Score | None = None
    min: float = -np.inf
    max: float = np.inf

    def __post_init__(self) -> None:
        if (self.column is None) == (self.score is None):
            raise LarkError(
                f"selector.filter.column={self.column} and selector.filter.score={self.score} are "
                f"{'neither' if self.column is None else 'both'} set; set one of them"
            )
        if not (self.score is None or callable(self.score)):
            raise LarkError(f"selector.filter.score={self.score!r} is not a score; set its _target_")
        if not self.min <= self.max:
            raise LarkError(f"selector.filter.min={self.min} is above selector.filter.max={self.max}; exchange them")

    @property
    def needs(self) -> tuple[Pass, ...]:
        return needs_of(self.score) if self.column is None else needs_of_column(self.column)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        name = "score" if self.column is None else "column"
        value = getattr(self, name)
        values = candidates[value] if self.column is not None else value(candidates)
        values_N = to_numbers(values, len(candidates), f"selector.filter.{name}={value}")
        return (values_N >= self.min) & (values_N <= self.max)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Chooses: filter, score, policy. Higher score = first."""

    name: str
    score: Score | str
    """A score (lark.selection.scores) or `module:function`, called with the Candidates, giving one number a row."""
    policy: Policy
    """Turns the scores of one problem's candidates into weights; top_b takes its place when the rule is a baseline."""
    filter: Callable[[Candidates], np.ndarray] | str | None = None
    """null, `not_wrong`, a boolean column of the pool (`correct`), a Between, or `module:function` giving a mask.

    It acts before scoring, so scores that depend on the other candidates are computed on the survivors."""

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            object.__setattr__(self, "score", import_function(self.score, "selector.score"))
        if isinstance(self.filter, str) and ":" in self.filter:
            object.__setattr__(self, "filter", import_function(self.filter, "selector.filter"))
        if not callable(self.score):
            raise LarkError(f"selector.score={self.score!r} is not a score; set a score or module:function")
        if not (self.filter is None or isinstance(self.filter, str) or callable(self.filter)):
            raise LarkError(
                f"selector.filter={self.filter!r} is not a filter; set null, not_wrong, a column or module:function"
            )

    @property
    def needs(self) -> tuple[Pass, ...]:
        """The passes that score, filter and prior need; a column of the pool needs none."""
        asked = [*needs_of(self.score), *needs_of_column(self.policy.prior)]
        if self.filter is not None:
            asked += needs_of_column(self.filter) if isinstance(self.filter, str) else needs_of(self.filter)
        return tuple(dict.fromkeys(asked))

    @property
    def columns(self) -> list[str]:
        """The columns of the pool that the rule names in its settings."""
        filtered = self.filter if isinstance(self.filter, str) else getattr(self.filter, "column", None)
        scores = (self.score, getattr(self.filter, "score", None))
        of_scores = [getattr(score, name, None) for score in scores for name in ("column", "subtask")]
        named = [get_prior_column(self.policy.prior), None if filtered == NOT_WRONG else filtered, *of_scores]
        return [name for name in named if name is not None and name != "num_tokens" and not needs_of_column(name)]

    def compute_mask(self, candidates: Candidates) -> np.ndarray:
        """Return which candidates the filter lets through, bool [N]; a missing value does not pass."""
        if self.filter is None:
            return np.ones(len(candidates), bool)
        if self.filter == NOT_WRONG:
            return to_numbers(candidates["correct"], len(candidates), "correct") != 0  # NaN, which is unknown, passes
        what = f"the filter of selector {self.name}"
        with locate_errors(self.filter, what):
            values = candidates[self.filter] if isinstance(self.filter, str) else self.filter(candidates)
        pass_N = to_numbers(values, len(candidates), what)
        other_N = ~(np.isnan(pass_N) | (pass_N == 0) | (pass_N == 1))
        if other_N.any():
            raise LarkError(
                f"{what} must be true, false or missing, but is {pass_N[other_N][0]} for a row; set a boolean column, "
                "or lark.selection.rule.Between for a numeric one"
            )
        return pass_N == 1

    def compute_scores(self, candidates: Candidates) -> np.ndarray:
        """Return the scores [N] in float64 of candidates that passed the filter; NaN means never."""
        assert callable(self.score)
        what = f"the score of selector {self.name}"
        with locate_errors(self.score, what):
            values = self.score(candidates)
        score_N = to_numbers(values, len(candidates), what)
        if (np.isposinf(score_N) | (np.isfinite(score_N) & (np.abs(score_N) > LARGEST_SCORE))).any():
            raise LarkError(
                f"{what} is +inf or beyond {LARGEST_SCORE:g} for some rows, where differences are none; return smaller "
                "numbers, or NaN"
            )
        return score_N


def describe_part(part: Any) -> str:
    """Describe a part of a rule: a column, `module:function`, or a class with its settings."""
    if isinstance(part, str):
        return part
    if is_dataclass(part):
        given = ((field.name, getattr(part, field.name)) for field in fields(part) if field.init)
        shown = ", ".join(f"{name}={describe_part(value) if callable(value) else value}" for name, value in given)
        return f"{type(part).__qualname__}({shown})"
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


@contextmanager
def prefix_errors(group: str) -> Iterator[None]:
    """Name the settings of `group` in errors of a rule and its parts, which speak of `selector.<setting>`."""
    try:
        yield
    except LarkError as error:
        if group == "selector" or "selector." not in str(error):
            raise
        raise LarkError(str(error).replace("selector.", f"{group}.")) from error

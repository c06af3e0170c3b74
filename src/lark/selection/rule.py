"""Rules: a filter, a score and a policy, and what a user reads when one of his own functions fails."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.errors import LarkError
from lark.scoring.passes import Pass, needs_of
from lark.selection.candidates import Candidates
from lark.selection.policies import Policy
from lark.selection.scores.statistics import Score, imported, needs_of_column


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
            raise LarkError(
                f"selector.filter.score={self.score!r} is no score; set _target_ to one of lark.selection.scores.statistics"
            )
        if not self.min <= self.max:
            raise LarkError(f"selector.filter.min={self.min} is above selector.filter.max={self.max}; exchange them")

    @property
    def needs(self) -> tuple[Pass, ...]:
        return needs_of(self.score) if self.column is None else needs_of_column(self.column)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        if self.column is None:
            assert self.score is not None
            values_N = _numbers(self.score(candidates), len(candidates), f"selector.filter.score={self.score}")
        else:
            values_N = _numbers(candidates[self.column], len(candidates), f"selector.filter.column={self.column}")
        return (values_N >= self.min) & (values_N <= self.max)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How to choose. Higher score = first.

    score: a score (lark.selection.scores.statistics) or `module:function`, called with the Candidates, giving one number a row.
    policy: turns the scores of one problem's candidates into weights; replaced by top_b when the rule is a baseline.
    filter: null, a boolean column of the pool (`correct`), a Between, or `module:function` giving a mask. It acts
        before scoring, so scores that depend on the other candidates are computed on the survivors.
    """

    name: str
    score: Score | str
    policy: Policy
    filter: Callable[[Candidates], np.ndarray] | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            object.__setattr__(self, "score", imported(self.score, "selector.score"))
        if isinstance(self.filter, str) and ":" in self.filter:
            object.__setattr__(self, "filter", imported(self.filter, "selector.filter"))
        if not callable(self.score):
            raise LarkError(f"selector.score={self.score!r} is no score; set a score or module:function")
        if not (self.filter is None or isinstance(self.filter, str) or callable(self.filter)):
            raise LarkError(f"selector.filter={self.filter!r} is no filter; set null, a column or module:function")

    @property
    def takes_all(self) -> bool:
        return self.policy.kind == "prior"

    @property
    def needs(self) -> tuple[Pass, ...]:
        """The passes that score, filter and prior need; a column of the pool needs none."""
        asked = [*needs_of(self.score), *needs_of_column(self.policy.prior)]
        if self.filter is not None:
            asked += needs_of_column(self.filter) if isinstance(self.filter, str) else needs_of(self.filter)
        return tuple(dict.fromkeys(asked))

    @property
    def columns(self) -> list[str]:
        """Columns of the pool that the rule names in its settings."""
        prior = {"uniform": None, "per_teacher": "teacher"}.get(self.policy.prior, self.policy.prior)
        filtered = [self.filter] if isinstance(self.filter, str) else [getattr(self.filter, "column", None)]
        scores = (self.score, getattr(self.filter, "score", None))
        named = [prior, *filtered, *(getattr(score, of, None) for score in scores for of in ("column", "subtask"))]
        return [name for name in named if name is not None and name != "num_tokens" and not needs_of_column(name)]

    def keep(self, candidates: Candidates) -> np.ndarray:
        """Mask [N] of the candidates the filter lets through; a missing value does not pass."""
        if self.filter is None:
            return np.ones(len(candidates), bool)
        with _errors_of(self.filter, f"the filter of selector {self.name}"):
            values = candidates[self.filter] if isinstance(self.filter, str) else self.filter(candidates)
        pass_N = _numbers(values, len(candidates), f"the filter of selector {self.name}")
        other_N = ~(np.isnan(pass_N) | (pass_N == 0) | (pass_N == 1))
        if other_N.any():
            raise LarkError(
                f"the filter of selector {self.name} must be true, false or missing, but is {pass_N[other_N][0]} for a "
                "row; set a boolean column, or lark.selection.rule.Between for a numeric one"
            )
        return pass_N == 1

    def scores(self, candidates: Candidates) -> np.ndarray:
        """Scores [N] in float64 of candidates that passed the filter."""
        assert callable(self.score)
        with _errors_of(self.score, f"the score of selector {self.name}"):
            values = self.score(candidates)
        score_N = _numbers(values, len(candidates), f"the score of selector {self.name}")
        if np.isposinf(score_N).any():
            raise LarkError(f"the score of selector {self.name} is +inf for some rows; return finite numbers or NaN")
        return score_N


@contextmanager
def _errors_of(called: Any, what: str) -> Iterator[None]:
    """What a function of the user's own raises becomes a ValueError that says where; what ours raise passes."""
    try:
        yield
    except Exception as error:
        module = getattr(called, "__module__", None) or ""  # of a function, or of an object's class
        if isinstance(called, str) or module.startswith("lark."):
            raise
        source = getattr(sys.modules.get(module), "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
        where = f" ({Path(source).name}, line {lines[-1]})" if source and lines else ""
        text = f"{what} raised {type(error).__name__}{where}: {error}"
        raise LarkError(f"{text} (correct it; HYDRA_FULL_ERROR=1 shows the traceback)") from error


def _numbers(values: Any, rows: int, what: str) -> np.ndarray:
    """`values` as float64 [N], None as NaN; `what` names them in the error if they are no such thing."""
    if values is None:
        raise LarkError(f"{what} is None for {rows} candidates; return one number a row")
    try:
        array = np.asarray(values)
        if array.shape == (rows,):
            return array.astype(np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise LarkError(f"{what} is not one number for each of {rows} candidates ({error})") from error
    raise LarkError(f"{what} has shape {array.shape} for {rows} candidates; return one number a row")


@contextmanager
def prefix_errors(group: str) -> Iterator[None]:
    """Rules and their parts speak of `selector.<setting>`; an error of the rule of another group names that one's."""
    try:
        yield
    except ValueError as error:
        if group == "selector" or "selector." not in str(error):
            raise
        raise LarkError(str(error).replace("selector.", f"{group}.")) from error

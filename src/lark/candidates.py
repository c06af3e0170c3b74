"""The rows a rule chooses from: their ids, statistics and pool columns as numpy arrays, grouped by problem."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lark.groups import Groups
from lark.passes import Pass

if TYPE_CHECKING:
    from lark.selection import Selection


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """N candidates, one array [N] a column.

    `candidates["loss"]` is a statistic: num_tokens (T), loss (mean surprisal L, nats/token), brier, entropy (means
    over the span) and the sums they come from (`sum_surprisal`, `sum_rank_100`, `end_surprisal`, ...).
    `candidates["teacher"]`, `["correct"]`, `["answer"]`, `["text"]` (the trajectory) and any further column of the
    pool are read when first asked for. Step statistics (`step_tokens`, `step_surprisal`, `step_first_surprisal`) are
    object arrays of one array a row. `row_N` holds the rows' numbers in the pool, `read_column` reads a pool column at
    such rows (null: there is no pool to read from). Raises ValueError for a column that is in neither.
    `passes` holds the columns of further passes (see lark.passes), read by `of`; `like` is the selection that these
    candidates are to be chosen as a baseline for (null: for themselves).
    """

    problem_id: np.ndarray
    candidate_id: np.ndarray
    row_N: np.ndarray
    statistics: Mapping[str, np.ndarray]
    read_column: Callable[[str, np.ndarray], np.ndarray] | None = None
    passes: Mapping[Pass, Mapping[str, np.ndarray]] = field(default_factory=dict)
    like: "Selection | None" = None

    def __post_init__(self) -> None:
        further = [column for columns in self.passes.values() for column in columns.values()]
        for column in (self.candidate_id, self.row_N, *self.statistics.values(), *further):
            assert len(column) == len(self.problem_id)

    @cached_property
    def groups(self) -> Groups:
        return Groups.from_ids(self.problem_id)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {"problem_id": self.problem_id, "candidate_id": self.candidate_id, **self.statistics}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            if self.read_column is None:
                raise ValueError(f"candidates have no column {name!r}; they have {', '.join(sorted(self._columns))}")
            try:
                self._columns[name] = self.read_column(name, self.row_N)
            except ValueError as error:
                if name.startswith("token_"):
                    raise ValueError(f"{error}; values a token are kept with probe.keep=tokens") from error
                if "loss" in self.statistics:
                    raise
                raise ValueError(f"{error}; a statistic is there if the rule's `needs` name Statistics()") from error
        return self._columns[name]

    def __len__(self) -> int:
        return len(self.problem_id)

    def of(self, wanted: Pass) -> Mapping[str, np.ndarray]:
        """The columns of a pass, [N] each. Raises ValueError for one that the rule did not name in `needs`."""
        if wanted not in self.passes:
            raise ValueError(f"the rule asks for {wanted} but does not name it in `needs`; add it there")
        return self.passes[wanted]

    def as_baseline_for(self, like: "Selection") -> "Candidates":
        """The same candidates, to be chosen from as that selection's baseline; what has been read is not read again."""
        same = replace(self, like=like)
        same.__dict__.update({name: getattr(self, name) for name in ("groups", "_columns")})
        return same

    def where(self, keep_N: np.ndarray) -> "Candidates":
        """The candidates with keep_N true; what a filter leaves."""
        if keep_N.all():
            return self
        return replace(
            self,
            problem_id=self.problem_id[keep_N],
            candidate_id=self.candidate_id[keep_N],
            statistics={name: column[keep_N] for name, column in self.statistics.items()},
            row_N=self.row_N[keep_N],
            passes={
                one: {name: column[keep_N] for name, column in columns.items()} for one, columns in self.passes.items()
            },
        )

"""The rows a rule chooses from: their ids, statistics and pool columns as numpy arrays, grouped by problem."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lark.common.errors import LarkError
from lark.common.groups import Groups
from lark.common.table_cache import GROUP_ROWS, filter_rows, read_columns, read_row_groups
from lark.scoring.passes import Pass, Statistics

if TYPE_CHECKING:
    from lark.selection.selection import Selection
    from lark.student.tokenized_pool import TokenizedPool

POOL_COLUMNS = ("teacher", "correct", "answer", "text")


def did_you_mean(name: str, statistics: Iterable[str]) -> str:
    """Return the end of a sentence about a column that is not there: the nearest name, if one is near."""
    close = difflib.get_close_matches(name, [*statistics, *POOL_COLUMNS], 1)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """N candidates, one array [N] a column.

    `candidates["loss"]` is a statistic: num_tokens (T), loss (mean surprisal L, nats/token), brier, entropy (means
    over the span) and the sums they come from (`sum_surprisal`, `sum_rank_100`, `end_surprisal`, ...).
    `candidates["teacher"]`, `["correct"]`, `["answer"]`, `["text"]` (the trajectory) and any further column of the
    pool are read when first asked for, as are the statistics that a pass has left in a file. Step statistics
    (`step_tokens`, `step_surprisal`, `step_first_surprisal`) are object arrays of one array a row. Rules compare all
    candidates, so the columns that they ask for are in memory whole: ids and row numbers 24 bytes a row, each column of
    numbers 8. Raises LarkError for a column that is neither a statistic nor in the pool.
    """

    problem_id: np.ndarray
    candidate_id: np.ndarray
    row_N: np.ndarray
    """The rows' numbers in the pool."""
    statistics: Mapping[str, np.ndarray]
    read_column: Callable[[str, np.ndarray], np.ndarray] | None = None
    """Reads a pool column at such rows; None: there is no pool to read from."""
    read_blocks: Callable[[], Iterator[pa.Table]] | None = None
    passes: Mapping[Pass, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """The columns of further passes (lark.scoring.passes), read by `of`."""
    reference_selection: "Selection | None" = None
    """The selection that these candidates are to be chosen as a baseline for; None: for themselves."""

    def __post_init__(self) -> None:
        assert len(self.candidate_id) == len(self.row_N) == len(self.problem_id)

    @cached_property
    def groups(self) -> Groups:
        return Groups.from_ids(self.problem_id)

    @cached_property
    def _of_pool(self) -> dict[str, np.ndarray]:
        """Pool columns read so far: 8 bytes a row each, and what their texts hold."""
        return {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name in ("problem_id", "candidate_id"):
            return getattr(self, name)
        column = self.statistics[name] if name in self.statistics else self._pool_column(name)
        assert len(column) == len(self), f"{len(column)} values of {name} for {len(self)} candidates"
        return column

    def _pool_column(self, name: str) -> np.ndarray:
        if name not in self._of_pool:
            if self.read_column is None:
                known = sorted(["problem_id", "candidate_id", *self.statistics])
                raise LarkError(f"candidates have no column {name!r}; they have {', '.join(known)}")
            try:
                self._of_pool[name] = self.read_column(name, self.row_N)
            except ValueError as error:
                if name.startswith("token_"):
                    raise LarkError(f"{error}; values a token are kept with probe.keep=tokens") from error
                if "loss" in self.statistics:
                    raise LarkError(f"{error}{did_you_mean(name, self.statistics)}") from error
                raise LarkError(f"{error}; a statistic is there if the rule's `needs` name Statistics()") from error
        return self._of_pool[name]

    def __len__(self) -> int:
        return len(self.problem_id)

    def blocks(self) -> Iterator[Mapping[str, Any]]:
        """All statistics, [n] each of the next n candidates: for a copy, of which steps and tokens are never in memory
        whole.
        """
        if self.read_blocks is not None:
            for table in self.read_blocks():
                yield dict(zip(table.column_names, table.columns, strict=True))
            return
        for start in range(0, len(self), GROUP_ROWS):
            yield {name: column[start : start + GROUP_ROWS] for name, column in self.statistics.items()}

    def of(self, wanted: Pass) -> Mapping[str, np.ndarray]:
        """Return the columns of a pass, [N] each. Raises LarkError for one that the rule did not name in `needs`."""
        if wanted not in self.passes:
            raise LarkError(f"the rule asks for {wanted} but does not name it in `needs`; add it there")
        return self.passes[wanted]

    def as_baseline_for(self, reference_selection: "Selection") -> "Candidates":
        """Return the same candidates, to be chosen from as that selection's baseline; what has been read stays."""
        same = replace(self, reference_selection=reference_selection)
        same.__dict__.update({name: getattr(self, name) for name in ("groups", "_of_pool")})
        return same

    def where(self, keep_N: np.ndarray) -> "Candidates":
        """Return the candidates with keep_N true; what a filter leaves."""
        if keep_N.all():
            return self
        return replace(
            self,
            problem_id=self.problem_id[keep_N],
            candidate_id=self.candidate_id[keep_N],
            statistics=filter_rows(self.statistics, keep_N),
            row_N=self.row_N[keep_N],
            read_blocks=None,
            passes={one: filter_rows(columns, keep_N) for one, columns in self.passes.items()},
        )


def load_candidates(
    pool: "TokenizedPool", row_N: np.ndarray, num_tokens_N: np.ndarray, folders: Mapping[Pass, Path]
) -> Candidates:
    """Load these rows of the pool with the columns that passes left, each in its folder of the cache.

    num_tokens_N: span tokens as the student that was asked reads them; all there is without a pass of statistics.
    """
    statistics: Mapping[str, np.ndarray] = {"num_tokens": num_tokens_N}
    passes, read_blocks = {}, None
    for wanted, folder in folders.items():
        columns = read_columns(folder)
        assert np.array_equal(columns["row"], row_N)
        columns = columns.without("row")
        if wanted == Statistics():
            statistics, read_blocks = columns, partial(read_row_groups, folder)
        else:
            passes[wanted] = columns
    return Candidates(
        problem_id=pool.problem_id[row_N],
        candidate_id=pool.candidate_id[row_N],
        statistics=statistics,
        read_column=pool.column,
        row_N=row_N,
        read_blocks=read_blocks,
        passes=passes,
    )

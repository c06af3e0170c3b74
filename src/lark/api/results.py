"""Hold what the functions return: pools, scores, selections, trained students, evaluations, comparisons."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lark.common.cache import identity_hash, read_json
from lark.comparison.inference import Interval
from lark.evaluation.verdicts import read_answers
from lark.experiment.console import describe_choice
from lark.pool.pool import read_pool
from lark.selection.export import plan_repeats
from lark.selection.rule import Rule
from lark.selection.selection import Selection
from lark.student.student import Student
from lark.tasks.task import Task
from lark.training.datamodule import TrajectoryDataModule
from lark.training.run_folder import write_selection

if TYPE_CHECKING:
    import datasets
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Trajectories, read and checked; and the evaluation sets of their task, if it has some."""

    task: Task
    cache: Path

    @cached_property
    def rows(self) -> "datasets.Dataset":
        """The checked rows, memory-mapped; further columns are in `extra` as JSON."""
        source = self.task.prepare_pool(self.cache)
        return read_pool(source, cache=self.cache, on_error=self.task.on_error, limit=self.task.limit).rows  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<Pool {self.task.name}: {len(self):,} trajectories of {len(set(self.rows['problem_id'])):,} problems>"

    def to_pandas(self) -> "pd.DataFrame":
        """Return the checked rows as a table."""
        return self.rows.to_pandas()  # type: ignore[return-value]


class _Table:
    """A table a trajectory, as pandas or datasets have it."""

    def to_pandas(self) -> "pd.DataFrame":
        raise NotImplementedError

    def to_dataset(self) -> "datasets.Dataset":
        """Return the table as a datasets.Dataset."""
        import datasets

        return datasets.Dataset.from_pandas(self.to_pandas(), preserve_index=False)

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>" + self.to_pandas().head().to_html()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Scores(_Table):
    """A student's statistics of the trajectories: one row each. `scores["loss"]` is a column as an array."""

    pool: Pool
    data: TrajectoryDataModule

    def __len__(self) -> int:
        return len(self.data.candidates)

    def __repr__(self) -> str:
        return f"<Scores of {len(self):,} trajectories by {self.data.student.name}>"

    def __getitem__(self, column: str) -> np.ndarray:
        return self.data.candidates[column]

    def to_pandas(self) -> "pd.DataFrame":
        """Return ids, teacher, verdict and every statistic of one number a trajectory."""
        return _tabulate(self.data)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Chosen(_Table):
    """A selection: the chosen trajectories with their weights, and the record of how they came about."""

    pool: Pool
    data: TrajectoryDataModule
    name: str
    """selector, or baseline where it was chosen like another."""

    @property
    def rule(self) -> Rule:
        return self.data.rules[self.name]

    @property
    def selection(self) -> Selection:
        return self.data.selections[self.name]

    @property
    def record(self) -> dict[str, Any]:
        """Counts, shares and confounds, as selection.json has them."""
        return self.selection.record

    def __len__(self) -> int:
        return len(self.selection.row)

    def __repr__(self) -> str:
        return f"<Chosen by {self.describe()}>"

    def describe(self) -> str:
        """Describe the choice in a line: counts, teachers, and what of it is known to be wrong."""
        return describe_choice(self.rule.name, self.selection)

    def to_pandas(self) -> "pd.DataFrame":
        """Return the chosen rows: ids, teacher, verdict, score, weight (mean 1) and every statistic."""
        table = _tabulate(self.data)
        chosen = np.searchsorted(self.data.candidates.row_N, self.selection.row)
        return (
            table.iloc[chosen].reset_index(drop=True).assign(score=self.selection.score, weight=self.selection.weight)
        )

    def to_dataset(self) -> "datasets.Dataset":
        """Return messages, weight and meta as a datasets.Dataset, as selection.jsonl has them."""
        import datasets

        folder = self.pool.cache / "selections" / identity_hash({"rows": self.selection.row.tolist(), **self._key()})
        if not (folder / "selection.jsonl").exists():
            self.save(folder)
        return datasets.Dataset.from_json(str(folder / "selection.jsonl"))  # type: ignore[return-value]

    def _key(self) -> dict[str, Any]:
        return {
            "pool": self.data.trajectories.fingerprint,
            "weights": self.selection.weight.tolist(),
            "score": np.nan_to_num(self.selection.score).tolist(),
            "rule": self.rule.name,
        }

    def save(self, folder: str | Path, *, repeat: float | None = None) -> Path:
        """Write selection.jsonl, selection.json and dataset_info.json into a folder; return selection.jsonl.

        repeat: a multiple of its length; writes selection-repeated.jsonl too, for trainers that read no weight.
        """
        if repeat is not None:
            self.record["repeated"] = plan_repeats(self.selection, repeat)
        write_selection(self.name, self.rule.name, self.data, Path(folder))
        return Path(folder) / "selection.jsonl"


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedStudent:
    """A student that was trained on a selection: `checkpoint` loads with transformers (or peft, under LoRA)."""

    student: Student
    folder: Path
    chosen: Chosen

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def facts(self) -> dict[str, Any]:
        """Steps, seconds, tokens and the held-out curve, as trained.json has them."""
        return read_json(self.folder / "trained.json")

    @property
    def held_out_loss(self) -> float:
        """The held-out loss after training, nats/token; NaN without held-out problems."""
        return self.facts["held_out"].get("end", {}).get("held_out/loss", float("nan"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A student's answers to the problems of evaluation sets, checked."""

    figures: dict[str, Any]
    """Metrics and verdicts by set (`lark.evaluation.evaluate.Evaluator.evaluate`)."""
    samples: Path
    """The folder of all samples."""

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """avg@k, pass@k, maj@k, ... by evaluation set."""
        return self.figures["metrics"]

    def average_by_problem(self, name: str) -> dict[str, float]:
        """Return each problem's share of correct samples in the set of that name."""
        return self.figures["per_problem"][name]

    def read_answers(self, name: str) -> list[dict[str, Any]]:
        """Read every sample of the set of that name with its verdict: problem_id, text, answer, gold, correct, ..."""
        kept = self.figures["answers"][name]
        return read_answers(self.samples / kept["samples"], kept["verdicts"])

    def to_pandas(self) -> "pd.DataFrame":
        """Return the metrics, a row an evaluation set."""
        import pandas as pd

        return pd.DataFrame.from_dict(self.metrics, orient="index")


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The student before training, and trained on two selections."""

    table: "pd.DataFrame"
    """A row a student: held-out loss (nats/token) and avg@k by evaluation set, means over seeds."""
    differences: dict[str, Interval]
    """Selector minus baseline in avg@k by evaluation set, as fractions, with 95 % intervals."""

    def __str__(self) -> str:
        lines = [self.table.to_string(float_format="{:.3f}".format), ""]
        for name, one in self.differences.items():
            note = f"; {one.label}" if one.label else ""
            lines.append(
                f"{name}: selector - baseline {100 * one.estimate:+.1f} points "
                f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}] ({one.problems:,} problems{note})"
            )
        return "\n".join(lines)

    __repr__ = __str__


def _tabulate(data: TrajectoryDataModule) -> "pd.DataFrame":
    import pandas as pd

    candidates = data.candidates
    columns = {name: candidates[name] for name in ("problem_id", "candidate_id", "teacher", "correct")}
    statistics = {name: candidates.statistics[name] for name in candidates.statistics}
    return pd.DataFrame(columns | {name: x for name, x in statistics.items() if x.dtype != object})

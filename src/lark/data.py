"""TrajectoryDataModule: from the pool to batches. Scoring and selection happen in `setup("fit")`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lark.cache import complete, identity_hash, read_json, source_hash
from lark.candidates import Candidates
from lark.models import Student
from lark.packing import coefficients, collate, micro_batches, rank_share, step_rows
from lark.probe import Probe, ProbeModule, measure, read_statistics
from lark.selection import Rule, Selection, select
from lark.student import Recipe, Step
from lark.tasks.files import Task
from lark.trajectories import Say, Trajectories

_STATISTICS_SOURCES = ("chat", "models", "packing", "probe", "stats", "trajectories")


class TrajectoryDataModule(LightningDataModule):
    """`prepare_data` reads, checks and tokenises the pool; `setup("fit")` scores it with the probe, or finds the
    cached statistics, and selects for both arms; `use(arm)` says which selection `train_dataloader` draws from.

    task, student, selector, baseline (None: no second arm), recipe, probe: what their names say. cache: folder of
    caches. make_trainer: gives the Trainer under which the probe runs. say: receives derived facts.
    """

    def __init__(
        self,
        *,
        task: Task,
        student: Student,
        selector: Rule,
        baseline: Rule | None,
        recipe: Recipe,
        probe: Probe,
        seed: int,
        cache: Path,
        make_trainer: Callable[[], Trainer],
        say: Say = print,
    ):
        super().__init__()
        self.task, self.student, self.recipe, self.probe = task, student, recipe, probe
        self.selector, self.baseline = selector, baseline
        self.seed, self.cache, self.make_trainer, self.say = seed, cache, make_trainer, say
        self.selections: dict[str, Selection] = {}
        self.arm = "selector"
        self._trajectories: Trajectories | None = None

    @property
    def trajectories(self) -> Trajectories:
        """The tokenised pool; opened once per process."""
        if self._trajectories is None:
            chat = self.student.load_chat(span=self.probe.span, step_splitter=self.probe.step_splitter)
            self._trajectories = Trajectories(self.task, chat, cache=self.cache, say=self.say)
        return self._trajectories

    def prepare_data(self) -> None:
        assert self.trajectories

    @property
    def statistics_identity(self) -> dict[str, Any]:
        trainer_device = self.make_trainer().strategy.root_device
        return {
            "student": self.student.identity(),
            "dtype": str(self.student.resolve_dtype(trainer_device)),
            "attention": self.student.attention,
            **self.trajectories.identity,
            **self.probe.identity(),
            "sources": source_hash(_STATISTICS_SOURCES),
        }

    @property
    def statistics_folder(self) -> Path:
        return self.cache / "statistics" / identity_hash(self.statistics_identity)

    def setup(self, stage: str) -> None:
        if self.selections or stage not in ("fit", "predict"):
            return
        self.score()
        self.select()

    def score(self, *, cached: bool | None = None) -> None:
        """Statistics of every candidate: from the cache, or by one pass of the probe (all ranks take part).

        `cached` is what rank 0 found; None looks for itself.
        """
        if hasattr(self, "candidates"):
            return
        pool = self.trajectories
        folder = self.statistics_folder
        if complete(folder) if cached is None else cached:
            self.say(f"statistics  cache hit ({folder.name})")
        else:
            module = ProbeModule(
                student=self.student,
                probe=self.probe,
                folder=folder,
                lengths=pool.length,
                wanted=pool.scored,
                encoded=pool.encoded,
            )
            self.say(f"statistics  cache miss ({folder.name}): scoring {len(pool.scored):,} trajectories")
            measure(self.make_trainer(), module, self.statistics_identity)
        self.cost = read_json(folder / "manifest.json")
        columns = read_statistics(folder)
        assert np.array_equal(columns.pop("row"), pool.scored)
        self.candidates = Candidates(
            problem_id=pool.problem_id[pool.scored],
            candidate_id=pool.candidate_id[pool.scored],
            statistics=columns,
            read_column=pool.column,
            row_N=pool.scored,
        )

    def select(self) -> None:
        """The selector's choice, and the baseline's with as many rows of each problem."""
        if self.selections:
            return
        self.selections["selector"] = select(self.selector, self.candidates, seed=self.seed)
        if self.baseline is not None:
            like = self.selections["selector"]
            self.selections["baseline"] = select(self.baseline, self.candidates, seed=self.seed, like=like)

    def use(self, arm: str) -> "TrajectoryDataModule":
        """Draw training batches from `arm`'s selection ("selector" or "baseline")."""
        assert arm in self.selections or not self.selections
        self.arm = arm
        return self

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        if self.recipe.batch_size < trainer.world_size:
            raise ValueError(
                f"sft.batch_size={self.recipe.batch_size} gives {trainer.world_size} ranks nothing to do each step; "
                "set it to at least the number of devices"
            )
        return DataLoader(_Steps(self, trainer), batch_size=None)

    def step(self, number: int, *, rank: int = 0, world: int = 1) -> Step:
        """Optimizer step `number` as this rank computes it: a pure function of its arguments and the seed."""
        recipe, selection = self.recipe, self.selections[self.arm]
        weights = selection.weight if recipe.weighted else np.ones(len(selection.row))
        batch = step_rows(len(selection.row), recipe.batch_size, seed=self.seed, step=number)
        lengths = self.trajectories.length[selection.row]
        trained = self.trajectories.span_tokens[selection.row].astype(np.float64)
        mine = rank_share(batch, lengths, rank=rank, world=world)
        coefficient_R = coefficients(
            trained[mine],
            weights[mine],
            average=recipe.average,
            total_rows=len(batch),
            total_weighted_tokens=float((weights[batch] * trained[batch]).sum()),
        )
        rows = selection.row[mine]
        return self._laid_out(rows, coefficient_R[None], budget=recipe.micro_batch_tokens)

    def _laid_out(self, rows: np.ndarray, coefficient_CR: np.ndarray, *, budget: int) -> Step:
        packed = self.recipe.layout == "packed"
        cuts = micro_batches(self.trajectories.length[rows], budget=budget, packed=packed)
        micro = [collate(self.trajectories.encoded(rows[cut]), rows[cut].tolist(), packed=packed) for cut in cuts]
        pool = self.trajectories
        return Step(
            micro=micro,
            names=tuple(f"{pool.problem_id[row]}/{pool.candidate_id[row]}" for row in rows.tolist()),
            coefficients_CR=[torch.tensor(coefficient_CR[:, cut], dtype=torch.float32) for cut in cuts],
            trained_tokens=sum(len(m.target_N) for m in micro),
            computed_tokens=sum(m.tokens for m in micro),
        )

    def held_out_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Held-out rows [R] that fit, and coefficients [C, R] whose sums of coefficient * surprisal are the held-out
        losses (nats/token): [0] the mean over problems of the mean L of their candidates, [1] the same over their
        correct candidates (zeros when none is known to be correct).
        """
        pool = self.trajectories
        row = np.flatnonzero(pool.fits & pool.is_held_out)
        sets = [np.ones(len(row), bool), pool.correct[row] == 1]
        means = [_mean_of_problem_means(pool.problem_id[row], mask) for mask in sets]
        return row, np.array(means) / pool.span_tokens[row]

    def val_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        row, coefficients_CR = self.held_out_coefficients()
        if len(row) == 0:
            return []
        cuts = micro_batches(self.trajectories.length[row], budget=self.probe.batch_tokens)
        steps = [
            self._laid_out(row[cut], coefficients_CR[:, cut], budget=self.probe.batch_tokens)
            for cut in cuts[trainer.global_rank :: trainer.world_size]
        ]
        # data-parallel wrappers synchronise at every batch: all ranks need the same number
        missing = -(-len(cuts) // trainer.world_size) - len(steps)
        steps += [Step(micro=[], coefficients_CR=[], trained_tokens=0, computed_tokens=0)] * missing
        return DataLoader(_HeldOut(steps), batch_size=None)


class _Steps(IterableDataset):
    """Optimizer steps from the trainer's current one on, without end (the Trainer's max_steps ends them)."""

    def __init__(self, data: TrajectoryDataModule, trainer: Trainer):
        self.data, self.trainer = data, trainer

    def __iter__(self) -> Iterator[Step]:
        number = self.trainer.global_step
        while True:
            yield self.data.step(number, rank=self.trainer.global_rank, world=self.trainer.world_size)
            number += 1


class _HeldOut(IterableDataset):
    """This rank's held-out batches. Iterable, so that no Trainer thinks of dividing them among the ranks once more."""

    def __init__(self, steps: list[Step]):
        self.steps = steps

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)


def _mean_of_problem_means(problem_id: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Coefficients [R] that average a row's value over its problem's masked rows, then over problems."""
    _, problem, rows = np.unique(problem_id[mask].astype(str), return_inverse=True, return_counts=True)
    result = np.zeros(len(problem_id))
    result[mask] = 1 / (rows[problem] * len(rows))
    return result

"""TrajectoryDataModule: from the pool to batches. Scoring and selection happen in `setup("fit")`."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lark.common.cache import identity_hash, is_complete, read_json
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.table_cache import read_row_numbers
from lark.scoring.pass_module import PassInputs, ScoringSettings, identify_pass, run_pass
from lark.scoring.passes import COST_COLUMNS, GradientMatches, Pass, Statistics
from lark.scoring.progress import describe_pass
from lark.selection.candidates import Candidates, did_you_mean, load_candidates
from lark.selection.rule import Rule, prefix_errors
from lark.selection.scores.statistics import STATISTICS, CausalLikelihood, DropFirst
from lark.selection.scores.text import TeacherMatched
from lark.selection.selection import Selection, select
from lark.student.context_length import read_max_positions
from lark.student.student import Student
from lark.student.tokenized_pool import TokenizedPool
from lark.tasks.task import Task
from lark.training.batches import (
    Step,
    StepStream,
    compute_held_out_coefficients,
    iterate_held_out_steps,
    make_training_step,
    sample_held_out,
)
from lark.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """A trained warm-up arm: its checkpoints with the mean learning rates of their epochs, and what it cost."""

    checkpoints: tuple[tuple[Path, float], ...]
    cost: dict[str, float]


class TrajectoryDataModule(LightningDataModule):
    """`prepare_data` reads, checks and tokenises the pool; `setup("fit")` runs the passes that the rules need, or finds
    them cached, and selects for both arms; `set_active_arm(name)` says which selection `train_dataloader` draws from.

    task, student, selector, baseline (None: no second arm), recipe, probe: what their names say. scorer: the student
    that is asked, if it is another than the one trained. match: trajectories | tokens, what the baseline has as many of
    as the selector. needs: passes to run whatever the rules need. cache: folder of caches. make_trainer: makes the
    Trainer under which a pass of the given label runs. precision: that of training. opened: the pool as the student
    that is trained sees it, where it is open already.
    """

    def __init__(
        self,
        *,
        task: Task,
        student: Student,
        selector: Rule,
        baseline: Rule | None,
        recipe: Recipe,
        probe: ScoringSettings,
        seed: int,
        cache: Path,
        make_trainer: Callable[[str], Trainer],
        scorer: Student | None = None,
        match: str = "trajectories",
        needs: tuple[Pass, ...] = (),
        precision: str = "32-true",
        opened: TokenizedPool | None = None,
    ):
        super().__init__()
        self.task, self.student, self.recipe, self.probe = task, student, recipe, probe
        self.scorer = scorer or student
        self.rules: dict[str, Rule] = {"selector": selector} | ({"baseline": baseline} if baseline else {})
        every = [*needs, *(need for rule in self.rules.values() for need in rule.needs)]
        self.needs = sorted(dict.fromkeys(every), key=lambda need: need != Statistics())  # the statistics first
        self.seed, self.match, self.cache = seed, match, cache
        self.make_trainer, self.precision = make_trainer, precision
        self.selections: dict[str, Selection] = {}
        self.costs: dict[Pass, dict[str, Any]] = {}
        """What each pass cost, and its other facts: its manifest."""
        self.is_cached: dict[Pass, bool] = {}
        self.set_active_arm("selector")
        self._pools: dict[str, TokenizedPool] = {} if opened is None else {"student": opened}
        self._check_rules()

    def _check_rules(self) -> None:
        """Check what a rule cannot know by itself. Raises LarkError."""
        for name, rule in self.rules.items():
            for score in (rule.score, getattr(rule.filter, "score", None)):
                if isinstance(score, DropFirst | CausalLikelihood) and score.skip != self.probe.skip:
                    raise LarkError(
                        f"{name}: skip={score.skip} of {type(score).__name__} is not what the statistics tell apart, "
                        f"probe.skip={self.probe.skip}; set both to the same"
                    )
        if isinstance(self.rules["selector"].score, TeacherMatched):
            raise LarkError(
                f"selector={self.rules['selector'].name} copies the teachers of a selector's choice and is none; set "
                "baseline=teacher_matched_random and another selector"
            )
        if self.scorer is not self.student and any(isinstance(need, GradientMatches) for need in self.needs):
            raise LarkError(
                f"probe.model={self.probe.model} asks another student, but a rule needs a warm-up arm of the student "
                "that is trained; set probe.model=null or choose another rule"
            )

    @property
    def trajectories(self) -> TokenizedPool:
        """The pool as the student that is trained sees it; opened once a process."""
        return self._pool("student", self.student)

    @property
    def scored_trajectories(self) -> TokenizedPool:
        """The pool as the student that is asked sees it."""
        return self.trajectories if self.scorer is self.student else self._pool("scorer", self.scorer)

    def _pool(self, name: str, student: Student) -> TokenizedPool:
        if name not in self._pools:
            chat = student.load_chat(span=self.probe.span, step_splitter=self.probe.step_splitter)
            self._pools[name] = TokenizedPool(self.task, chat, cache=self.cache)
            if student is self.student:  # another student's is the same pool
                self._pools[name].announce()
        return self._pools[name]

    def prepare_data(self) -> None:
        first = self.trajectories.rows.select_columns(["extra"])[:100]["extra"]
        hidden = {name for extra in first for name in json.loads(extra)} & {*STATISTICS, "num_tokens"}
        if hidden:
            logger.warning(
                f"rules cannot read the pool's columns {', '.join(sorted(hidden))}, as the student's statistics have "
                "the same names; rename them to use them"
            )
        positions = read_max_positions(self.student)
        if beyond := int((self.trajectories.length[self.trajectories.fits] > positions).sum()):
            logger.warning(
                f"{beyond:,} trajectories are longer than the {positions:,} positions of "
                f"{self.student.name}; lower task.max_length, or set model.config (max_position_embeddings, "
                "rope_parameters)"
            )
        if self.scorer is not self.student:
            logger.info(
                f"scored by {self.scorer.name}, whose choice {self.student.name} gets; "
                f"{self.dropped['overlong_for_scorer']:,} further rows are too long for it"
            )

    def check_columns(self) -> None:
        """Check that the pool has the columns that the rules name. Raises LarkError."""
        for name, rule in self.rules.items():
            for column in rule.columns:
                try:
                    self.trajectories.column(column, self.scored[:1])
                except ValueError as error:
                    remedy = f"add it to the pool, or name another in filter, {name}.score or {name}.policy.prior"
                    text = (
                        f"{name}={rule.name} reads the column {column}, but {error}{did_you_mean(column, STATISTICS)}"
                    )
                    raise LarkError(f"{text}; {remedy}") from error

    @cached_property
    def device(self) -> torch.device:
        return self.make_trainer("").strategy.root_device

    @cached_property
    def world_size(self) -> int:
        """Processes that compute together, whether they have been launched or not."""
        return self.make_trainer("").world_size

    @property
    def dtype(self) -> str:
        """The trained student's dtype on the device of the run."""
        return str(self.student.resolve_dtype(self.device))

    @property
    def scored(self) -> np.ndarray:
        """Rows of the pool that rules choose from."""
        rows = self.trajectories.scored
        return rows[self.scored_trajectories.fits[rows]]  # in another student's tokens a row may be too long

    @property
    def dropped(self) -> dict[str, int]:
        """Rows of the pool that are not chosen from, by reason."""
        overlong = len(self.trajectories.scored) - len(self.scored)
        return {**self.trajectories.dropped, "overlong_for_scorer": overlong}

    def _inputs(self, warmup: tuple[tuple[Path, float], ...] = ()) -> PassInputs:
        return PassInputs(
            student=self.scorer,
            settings=self.probe,
            pool=self.scored_trajectories,
            rows=self.scored,
            seed=self.seed,
            warmup=warmup,
        )

    def pass_identity(self, wanted: Pass, inputs: PassInputs | None = None) -> dict[str, Any]:
        """Name all that a pass's columns depend on, over all that is scored or over other `inputs` from the same
        pool.
        """
        identity = identify_pass(wanted, inputs or self._inputs(), self.device)
        if isinstance(wanted, GradientMatches):
            identity["warm_up"] = self.identify_training(self.recipe.for_epochs(wanted.epochs))
        return identity

    def identify_training(self, recipe: Recipe) -> dict[str, Any]:
        """Name how a student is trained: recipe, precision and, as each rank and micro-batch draws its own masks of
        LoRA's dropout, what these are where there is dropout.
        """
        identity = {"recipe": recipe.identity(), "precision": self.precision}
        if (self.student.lora or {}).get("lora_dropout"):
            identity["dropout"] = {"ranks": self.world_size, "micro_batch_tokens": recipe.micro_batch_tokens}
        return identity

    def pass_folder(self, wanted: Pass) -> Path:
        return self.cache / "statistics" / identity_hash(self.pass_identity(wanted))

    @property
    def statistics_folder(self) -> Path:
        return self.pass_folder(Statistics())

    def setup(self, stage: str) -> None:
        if self.selections or stage not in ("fit", "predict"):
            return
        self.score()
        self.select()

    def score(self) -> None:
        """Compute the columns of every pass that the rules need, or find them cached; all ranks take part."""
        for wanted in self.needs:
            self.run_pass(wanted, cached=is_complete(self.pass_folder(wanted)))

    def run_pass(
        self,
        wanted: Pass,
        *,
        cached: bool,
        experiment_logger: Logger | None = None,
        warm_up: WarmUp | None = None,
    ) -> None:
        """Run one pass, unless it is `cached` (which rank 0 finds out); all ranks take part.

        experiment_logger: gets its progress. warm_up: what a pass of GradientMatches learns from.
        """
        if wanted in self.costs:
            return
        folder, label = self.pass_folder(wanted), wanted.name.replace("_", " ")
        if cached:
            logger.info(f"{label}: found in the cache ({folder.name})")
        else:
            if isinstance(wanted, GradientMatches) and warm_up is None:
                raise LarkError(f"{wanted.name} needs a warm-up arm, which python -m lark.run trains; use that")
            inputs = self._inputs(warm_up.checkpoints if warm_up else ())
            done = len(read_row_numbers(folder))
            logger.info(
                f"{label}: scoring {len(inputs.rows) - done:,} trajectories ({folder.name})"
                + (f"; {done:,} are kept of a pass that was interrupted" if done else "")
            )
            module = wanted.load_module()(wanted=wanted, inputs=inputs, folder=folder)
            trainer = self.make_trainer(label)
            trainer.logger = experiment_logger
            run_pass(trainer, module, self.pass_identity(wanted), before=warm_up.cost if warm_up else {})
        self.is_cached[wanted] = cached
        self.costs[wanted] = read_json(folder / "manifest.json")
        if not cached and (throughput := self.costs[wanted].get("throughput")):
            chosen = [f"{name} {value}" for name, value in self.costs[wanted]["choices"].items()]
            logger.info("; ".join([f"{label}: {describe_pass(throughput)}", *chosen]))

    def get_action(self, wanted: Pass) -> str:
        """Tell whether a pass was computed or found in the cache: run | reuse."""
        return "reuse" if self.is_cached[wanted] else "run"

    def cost_of(self, rule: Rule) -> dict[str, float]:
        """Sum what choosing by `rule` costs: tokens through the student forwards and backwards, device-seconds."""
        spent = [self.costs[need] for need in rule.needs]
        return {name: sum(cost[name] for cost in spent) for name in COST_COLUMNS}

    @cached_property
    def candidates(self) -> Candidates:
        """What the rules choose from: the scored rows with the columns of every pass."""
        folders = {wanted: self.pass_folder(wanted) for wanted in self.needs}
        row_N = self.scored
        return load_candidates(self.trajectories, row_N, self.scored_trajectories.span_tokens[row_N], folders)

    def select(self) -> None:
        """Select for the selector, and for the baseline as many rows of each problem, or as many tokens."""
        if self.selections:
            return
        for name in self.rules:
            self.selections[name] = self.choose(name, self.selections.get("selector"))

    def choose(self, name: str, reference_selection: Selection | None) -> Selection:
        """Select by the rule of that name: on its own, or as the baseline of `reference_selection`."""
        with prefix_errors(name):
            return select(
                self.rules[name],
                self.candidates,
                seed=self.seed,
                reference_selection=reference_selection,
                match=self.match,
                trained_tokens_N=self.trajectories.span_tokens[self.candidates.row_N],
            )

    def set_active_arm(self, name: str, recipe: Recipe | None = None) -> "TrajectoryDataModule":
        """Draw training batches from the selection of that name, by its own recipe if it has one."""
        assert name in self.selections or not self.selections
        self.active_arm, self.active_recipe = name, recipe or self.recipe
        return self

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        if self.active_recipe.batch_size < trainer.world_size:
            raise LarkError(
                f"sft.batch_size={self.active_recipe.batch_size} gives {trainer.world_size} ranks nothing to do each "
                "step; set it to at least the number of devices"
            )
        return DataLoader(StepStream(self._iterate_training_steps), batch_size=None)

    def _iterate_training_steps(self) -> Iterator[Step]:
        """Yield steps without end, from the trainer's current optimizer step on; its max_steps ends them."""
        trainer = self.trainer
        assert trainer is not None
        for number in count(trainer.global_step):
            yield self.step(number, rank=trainer.global_rank, world=trainer.world_size)

    def step(self, number: int, *, rank: int = 0, world: int = 1) -> Step:
        """Compute this rank's part of optimizer step `number` of the active arm."""
        selection, recipe = self.selections[self.active_arm], self.active_recipe
        return make_training_step(
            self.trajectories, selection, recipe, seed=self.seed, number=number, rank=rank, world=world
        )

    @property
    def held_out_sample(self) -> np.ndarray:
        """Rows of the pool that the held-out curve is taken over."""
        return sample_held_out(self.trajectories, self.task.held_out_rows)

    def _iterate_held_out_steps(self) -> Iterator[Step]:
        """Yield the held-out rows: all of them before and after training, a sample on the way.

        A step has four sets of coefficients: those of all rows, which are 0 on the way, and those of the sample.
        """
        trainer, pool, sample = self.trainer, self.trajectories, self.held_out_sample
        assert trainer is not None
        row, of_sample = pool.find_held_out(), compute_held_out_coefficients(pool, sample)
        is_whole = trainer.sanity_checking or trainer.state.fn == TrainerFn.VALIDATING or len(sample) == len(row)
        row = row if is_whole else sample
        coefficients_CR = np.zeros((4, len(row)))
        coefficients_CR[2:, np.isin(row, sample)] = of_sample
        if is_whole:
            coefficients_CR[:2] = compute_held_out_coefficients(pool, row)
        yield from iterate_held_out_steps(
            pool, row, coefficients_CR, rank=trainer.global_rank, world=trainer.world_size
        )

    def val_dataloader(self) -> Any:
        if not len(self.held_out_sample):
            return []
        return DataLoader(StepStream(self._iterate_held_out_steps), batch_size=None)

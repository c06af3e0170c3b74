"""The arms of a run: which are trained, evaluated or found done, in which order, under which locks."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lark.common.cache import hold_lock
from lark.common.log import logger
from lark.common.ranks import Plan, barrier, is_main
from lark.diagnostics.curves import TrainingLoss
from lark.evaluation.evaluate import Evaluator, identify_weights
from lark.generation.backends import Backend
from lark.scoring.passes import GradientMatches
from lark.tracking.logging_metrics import Tracker, log_arm
from lark.training.arms import Arm, make_arm, make_untrained_arm, train
from lark.training.datamodule import TrajectoryDataModule, WarmUp
from lark.training.divergence import DivergedError
from lark.training.end_token import EndTokenCheck
from lark.training.run_folder import link_arm
from lark.training.warmup import EpochSaver, is_warmed_up, make_warm_up_arm, read_warm_up

OpenLogger = Callable[..., AbstractContextManager[Logger]]
"""Opens one of the tracker's runs: (title, job_type, **config)."""


class ArmRunner:
    """Trains, evaluates or reuses arms, and logs them. All ranks call its methods; rank 0 decides, locks and logs.

    plan: how ranks learn what rank 0 decided. evaluator: None leaves arms trained, without an evaluation. arms: the
    folder of all arms. run: the run's folder. keeps_losses: whether an arm's own training loss is kept, for the
    diagnostics.
    """

    def __init__(
        self,
        data: TrajectoryDataModule,
        *,
        make_trainer: Callable[..., Trainer],
        plan: Plan,
        evaluator: Evaluator | None,
        tracker: Tracker,
        open_logger: OpenLogger,
        arms: Path,
        run: Path,
        keeps_losses: bool,
    ):
        self.data, self.make_trainer, self.plan = data, make_trainer, plan
        self.evaluator, self.tracker, self.open_logger = evaluator, tracker, open_logger
        self.arms, self.run, self.keeps_losses = arms, run, keeps_losses
        self.end_check = EndTokenCheck(data)
        self.seconds = {"training": 0.0, "sampling": 0.0}
        """Clock seconds of what was done here; nan where a part of it had been done before."""
        self.figures: dict[str, dict[str, Any]] = {}
        """What each arm's evaluation came to (`Evaluator.evaluate`), by the arm's name; on rank 0."""

    def make_before(self) -> Arm:
        """Make the arm of the student before training."""
        return make_untrained_arm(self.data, self.arms)

    def make(self, name: str, rule: str) -> Arm:
        """Make the arm of the data's selection of that name; all arms get as many steps as the selector's."""
        steps = self.data.recipe.count_steps(len(self.data.selections["selector"].row))
        return make_arm(name, rule, self.data, recipe=self.data.recipe, steps=steps, arms=self.arms)

    def find_action(self, arm: Arm) -> str:
        """Find what is left to do for an arm: train | evaluate | reuse."""
        if not arm.is_trained:
            return "train"
        is_done = self.evaluator is None or self.evaluator.is_done(self._make_backend(self.evaluator, arm))
        return "reuse" if is_done else "evaluate"

    def _make_backend(self, evaluator: Evaluator, arm: Arm) -> Backend:
        """Put the arm's student, as it is on disk, behind the engine that evaluates it."""
        is_trained, data = arm.selection is not None, self.data
        return evaluator.sampling.make_backend(
            data.student,
            data.trajectories.chat,
            trained=arm.checkpoint if is_trained else None,
            weights=identify_weights(data.student, arm.folder if is_trained else None),
            device=data.device,
        )

    def run_together(self, arms: Sequence[Arm]) -> dict[str, str]:
        """Do what is left of the arms, in their order; returns what that was, by the arm's name."""
        with ExitStack() as held:
            locks = self._lock_unfinished(arms, held)
            found = dict.fromkeys((arm.name for arm in arms), "")  # what rank 0 finds counts
            for i, arm in enumerate(
                arms if is_main() else ()
            ):  # two rules may choose the same rows and weights: one arm serves both
                is_twin = any(arm.folder == other.folder for other in arms[:i])
                found[arm.name] = "reuse" if is_twin else self.find_action(arm)
            planned = {arm.name: {"hash": arm.folder.name, "action": found[arm.name]} for arm in arms}
            actions = {name: one["action"] for name, one in self.plan.decide("arms", planned).items()}
            for arm in arms:
                logger.info("arm %s (%s): %s %s", arm.name, arm.rule, actions[arm.name], arm.folder)
            for arm in arms:
                self._finish(arm, actions[arm.name])
                if release := locks.pop(arm.folder, None):
                    release.close()
        barrier()
        return actions

    def run_aside(self, arm: Arm) -> None:
        """Do what is left of an arm that the run's result does not depend on: one that diverges has no figures."""
        with self.plan.claim(arm.name, arm.folder, lambda: arm.is_trained):
            action = self.plan.decide(f"action of {arm.name}", self.find_action(arm) if is_main() else None)
            logger.info("arm %s (%s): %s %s", arm.name, arm.rule, action, arm.folder)
            try:
                self._finish(arm, action)
            except DivergedError as error:
                logger.warning(f"{arm.name} diverged and has no figures ({error})")

    def took(self) -> dict[str, float]:
        """Sum the device-seconds of choosing, training and sampling; nan for what was not done here from the start."""
        data = self.data
        passes = [data.costs[need] for need in data.needs if not data.is_cached[need]]
        is_whole = len(passes) == len(data.needs) and not any(cost.get("resumed_rows") for cost in passes)
        scoring = sum(cost["seconds"] for cost in passes) if is_whole else math.nan
        return {"scoring": scoring} | {kind: seconds * data.world_size for kind, seconds in self.seconds.items()}

    def warm_up(self, wanted: GradientMatches) -> WarmUp:
        """Train the warm-up arm that the pass learns from, unless another job has done so."""
        data = self.data
        arm = make_warm_up_arm(data, wanted, self.arms)
        assert arm.selection is not None
        with self.plan.claim(arm.name, arm.folder, partial(is_warmed_up, arm)) as to_do:
            logger.info(
                f"warm-up: {'train' if to_do else 'reuse'} {arm.folder}: {len(arm.selection.row):,} trajectories, "
                f"{wanted.epochs} epochs, {arm.steps} optimizer steps"
            )
            if to_do:
                self._train(arm, "warm-up", [EpochSaver(arm)], validate=False)
        del data.selections[arm.name]
        data.set_active_arm("selector")
        return read_warm_up(arm, data)

    def _lock_unfinished(self, arms: Sequence[Arm], held: ExitStack) -> dict[Path, ExitStack]:
        """Lock the arms to be trained, in one order, so that two jobs cannot wait for each other; on rank 0."""
        locks: dict[Path, ExitStack] = {}
        unfinished = {arm.folder: arm for arm in arms if not arm.is_trained} if is_main() else {}
        for folder, arm in sorted(unfinished.items()):
            locks[folder] = held.enter_context(ExitStack())
            locks[folder].enter_context(hold_lock(folder))
            if arm.is_trained:  # by another job meanwhile
                locks.pop(folder).close()
        return locks

    def _finish(self, arm: Arm, action: str) -> None:
        """Train and evaluate the arm as far as it is not done, and log it."""
        title = f"{arm.name}-{arm.rule}-seed{self.data.seed}"
        job_type = "reused" if action == "reuse" else arm.name
        about = {"hash": arm.folder.name, "arm": arm.name, "rule": arm.rule}
        if action != "train" and arm.selection is not None:
            self.seconds["training"] = math.nan
        with ExitStack() as held:
            opened = held.enter_context(self.open_logger(title, job_type, **about)) if is_main() else None
            if action == "train":
                callbacks = [TrainingLoss(arm.folder)] if self.keeps_losses else []
                self._train(arm, arm.name, callbacks, experiment_logger=opened)
            figures: dict[str, Any] = {}
            if self.evaluator is not None:
                start = time.monotonic()
                figures = self.evaluator.evaluate(self._make_backend(self.evaluator, arm), arm.name)
                is_whole = len(self.plan[f"samples of {arm.name}"]) == len(self.evaluator.problems)
                self.seconds["sampling"] += time.monotonic() - start if is_whole else math.nan
            if opened is not None:
                self.figures[arm.name], texts = figures, {}
                is_shown = arm.name in ("before", *self.data.rules)
                if self.evaluator is not None:
                    texts = self.evaluator.list_files(figures)
                    if is_shown:
                        self.evaluator.write_figures(self.run / arm.name, figures)
                if is_shown:
                    link_arm(arm, self.run / arm.name)
                log_arm(
                    opened,
                    self.tracker,
                    arm,
                    self.run,
                    self.data,
                    figures,
                    action=action,
                    taken=self.data.get_action,
                    texts=texts,
                )

    def _train(
        self,
        arm: Arm,
        label: str,
        callbacks: Sequence[Callback],
        experiment_logger: Logger | None = None,
        validate: bool = True,
    ) -> None:
        is_resumed, start = arm.last.exists(), time.monotonic()
        train(
            arm,
            self.data,
            make_trainer=partial(self.make_trainer, progress=label),
            experiment_logger=experiment_logger,
            callbacks=[self.end_check, *callbacks],
            plan=self.plan,
            validate=validate,
        )
        self.seconds["training"] += math.nan if is_resumed else time.monotonic() - start

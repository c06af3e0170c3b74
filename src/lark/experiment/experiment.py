"""One run, from a composed configuration to its table: score, select, train and evaluate the arms, compare."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from lark.answers.checker import Checker
from lark.common.cache import check_writable, hold_lock, is_complete, remove_path, write_json
from lark.common.ranks import Plan, barrier, check_ranks, in_ranks, is_main, say, world_size
from lark.comparison.printing import print_run
from lark.config import build, model_option
from lark.diagnostics.diagnostics import Diagnosis
from lark.evaluation.arm_evaluation import action_of, evaluate_arm, evaluation_identity
from lark.evaluation.summary import read_figures, settings, summarise_run
from lark.experiment.description import describe_recipe, describe_selections, quiet_libraries, write_statistics
from lark.page.pool_sample import write_sample
from lark.page.write import write_own_page
from lark.scoring.passes import GradientMatches, Pass, Statistics
from lark.scoring.progress import PassProgress
from lark.selection.rule import Rule, prefix_errors
from lark.student.context_length import check_answer_room
from lark.student.distributed import Parallelism
from lark.tasks.problems import read_problems
from lark.tracking.logging_metrics import log_arm, log_choice, log_comparison, log_pass
from lark.tracking.tracking import opened
from lark.training.arms import Arm, make_arm, train, write_selection
from lark.training.datamodule import TrajectoryDataModule
from lark.training.end_token import EndTokenCheck
from lark.training.trainer import trainer_of
from lark.training.warmup import EpochSaver, checkpoints, training_cost, warm_up_arm, warmed_up


def run(config: DictConfig, folder: Path, *, group: str) -> float:
    """Run one comparison in `folder`; returns selector minus baseline on the first evaluation set (avg@k), or nan.

    Raises LarkError for settings and data a user can correct; whatever was computed before stays cached.
    """
    quiet_libraries()
    logs = check_writable(config.paths.logs, "paths.logs")
    cache = check_writable(config.paths.cache, "paths.cache")
    cuts = {"scoring": "probe.batch_tokens", "training": "sft.micro_batch_tokens", "sampling": "evaluation.batch_size"}
    shown = ", ".join(f"{OmegaConf.select(config, key)} {key} ({what})" for what, key in cuts.items())
    gradients = "; for a rule that takes gradients set its score.parameters=last:<layers> or score.dimensions"
    with in_ranks(out_of_memory=f"lower the one at work of {shown}{gradients}"):
        return _Run(config, folder, logs=logs, cache=cache, group=group).go()


class _Run:
    """The parts of one run and the order in which they act."""

    def __init__(self, config: DictConfig, folder: Path, *, logs: Path, cache: Path, group: str):
        config = OmegaConf.create(_plain(config))  # every interpolation resolved
        self.config, self.folder, self.logs, self.group = config, folder, logs, group
        seed_everything(config.seed, verbose=False)
        parts = {name: build(config[name]) for name in ("task", "model", "selector", "diagnostics")}
        with prefix_errors("baseline"):
            baseline = build(config.baseline)
        probe = build(config.probe)
        self.recipe = build(config.sft)
        self.sampling = build(config.evaluation)
        self.tracker = build(config.logger)
        self.precision, self.trainer = trainer_of(config.trainer, folder)
        self.data = TrajectoryDataModule(
            task=parts["task"],
            student=parts["model"],
            scorer=model_option(probe.model) if probe.model is not None else None,
            selector=parts["selector"],
            baseline=baseline if isinstance(baseline, Rule) else None,
            recipe=self.recipe,
            probe=probe,
            seed=config.seed,
            match=config.match,
            needs=(Statistics(),) if config.stop_after == "statistics" else (),
            cache=cache,
            make_trainer=self._pass_trainer,
            warm_up=self._warm_up,
            precision=self.precision,
            say=say,
        )
        self.diagnosis = Diagnosis(parts["diagnostics"], self.data, folder)
        self.end_check = EndTokenCheck(self.data, say)
        self.rules = self.data.rules
        self.plan = Plan(folder)
        self.figures: dict[str, dict[str, Any]] = {}

    def _pass_trainer(self, label: str) -> Trainer:
        """float32: the student's own dtype decides, others would convert it; no inference mode: for gradients."""
        return self.trainer(callbacks=[PassProgress(label)], precision="32-true", inference_mode=False)

    def go(self) -> float:
        trainer = self.trainer()
        for name, rule in self.rules.items():
            if any(need.needs_gradients for need in rule.needs):
                Parallelism(trainer).check_gradients(f"{name}={rule.name}")
        check_ranks(trainer.world_size, self.config.trainer.name)
        say(f"run         {self.folder}")
        say(f"logging     {self.tracker.describe()}")
        self.data.prepare_data()
        self.data.check_columns()  # before anything is computed
        self.problems = {  # likewise: their faults are cheap to find now
            name: read_problems(path, limit=self.data.task.eval_limit)
            for name, path in self.data.trajectories.evaluation_files.items()
        }
        if self.problems and self.config.stop_after is None:
            check_answer_room(self.data.student, self.data.task.max_new_tokens)
        self.overlap = self.data.trajectories.overlaps
        self._score()
        if self.config.stop_after == "statistics":
            return self._stop(f"statistics  {self.folder / 'statistics.parquet'}")
        self.data.select()
        self._keep_statistics()
        say("\n".join(describe_selections(self.data)))
        self.diagnosis.of_selections(self._claim)
        if self.config.stop_after == "selection":
            for name in self.rules if is_main() else ():
                remove_path(self.folder / name)
                rule = self.rules[name].name
                write_selection(name, rule, self.data, self.folder / name)
                title = f"{name}-{rule}-seed{self.data.seed}"
                with self._logged(title, "selection", arm=name, rule=rule) as logger:
                    log_choice(logger, self.tracker, name, self.folder / name, self.data, self._taken)
            return self._stop(f"selection   {self.folder / 'selector' / 'selection.jsonl'}")
        return self._arms()

    def _score(self) -> None:
        """The passes that the rules need, each under its lock; ranks obey the plan on which of them run."""
        for wanted in self.data.needs:
            folder = self.data.pass_folder(wanted)
            with self._claim(wanted.name, folder, partial(is_complete, folder)) as to_do, ExitStack() as held:
                logger = None
                if to_do and is_main():
                    title = f"{wanted.name}-{self.data.scorer.name}"
                    logger = held.enter_context(self._logged(title, "scoring", hash=folder.name, **wanted.identity()))
                self.data.run_pass(wanted, cached=not to_do, logger=logger)
                if logger is not None:
                    log_pass(logger, self.tracker, self.data.costs[wanted])
        self._keep_statistics()  # whatever becomes of the selection

    @contextmanager
    def _claim(self, name: str, folder: Path, done: Callable[[], bool]) -> Iterator[bool]:
        """Whether a piece of work is to be done, which rank 0 finds and the others obey; if so, rank 0 holds the
        folder's lock until the block ends.
        """
        with ExitStack() as held:
            if is_main() and not done():
                held.enter_context(hold_lock(folder))
            yield self._share(f"{name} {folder.name}", "reuse" if is_main() and done() else "run") == "run"

    def _share(self, key: str, value: Any) -> Any:
        """What rank 0 finds, on every rank."""
        self.plan.share(**{key: value})
        return self.plan[key]

    def _warm_up(
        self, data: TrajectoryDataModule, wanted: GradientMatches
    ) -> tuple[tuple[tuple[Path, float], ...], dict[str, float]]:
        """The checkpoints of a warm-up arm and their cost; it is trained if no other job has done so."""
        arm = warm_up_arm(data, wanted, precision=self.precision, arms=self.logs / "arms")
        assert arm.selection is not None
        steps = arm.recipe.steps_for(len(arm.selection.row))
        with self._claim(arm.name, arm.folder, partial(warmed_up, arm)) as to_do:
            say(
                f"warm-up     {'train' if to_do else 'reuse'} {arm.folder}: {len(arm.selection.row):,} trajectories, "
                f"{wanted.epochs} epochs, {steps} optimizer steps"
            )
            if to_do:
                make_trainer = partial(self.trainer, progress="warm-up")
                saver = EpochSaver(arm)
                train(
                    arm,
                    data,
                    steps=steps,
                    make_trainer=make_trainer,
                    logger=None,
                    say=say,
                    callbacks=[saver, self.end_check],
                    run=self.folder,
                )
        del data.selections[arm.name]
        data.set_active_arm("selector")
        return checkpoints(arm), training_cost(arm, data) if is_main() else {}

    def _arms(self) -> float:
        steps = self.recipe.steps_for(len(self.data.selections["selector"].row))
        identity = evaluation_identity(self.data, self.problems, self.sampling)
        make = partial(
            make_arm,
            data=self.data,
            steps=steps,
            precision=self.precision,
            recipe=self.recipe,
            evaluation=identity,
            arms=self.logs / "arms",
        )
        arms = [make(name, self.rules[name].name) for name in ("baseline", "selector") if name in self.rules]
        before = make("before", "before")
        training_only = self.config.stop_after == "training"
        everything = arms if training_only else [before, *arms]
        everything.sort(key=lambda arm: arm.name == "baseline")  # last: what other jobs may wait for comes first
        with ExitStack() as held, Checker(self.data.task.checker, pattern=self.data.task.pattern) as checker:
            locks = self._locked(everything, identity, training_only, held)
            actions: dict[str, str] = {}
            for i, arm in enumerate(everything):  # two rules may come to the same rows and weights: one arm serves both
                twin = arm.folder in {other.folder for other in everything[:i]}
                actions[arm.name] = "reuse" if twin else action_of(arm, identity, training_only)
            self.plan.share(arms={a.name: {"hash": a.folder.name, "action": actions[a.name]} for a in everything})
            for arm in everything:
                say(f"arm         {arm.name} ({arm.rule}): {self.plan['arms'][arm.name]['action']} {arm.folder}")
            say(describe_recipe(self.data, steps, self.precision))
            for arm in everything:
                self._finish(arm, self.plan["arms"][arm.name]["action"], steps, self.problems, checker)
                if release := locks.get(arm.name):
                    release.close()
            finish = partial(self._finish, steps=steps, problems=self.problems, checker=checker)
            self.diagnosis.of_arms(arms, make, self._claim, finish, identity, training_only)
        barrier()
        if not is_main():
            return float("nan")
        everything.sort(key=lambda arm: ("before", "baseline", "selector").index(arm.name))
        return self._report(everything, training_only)

    def _locked(
        self, arms: list[Arm], identity: dict[str, Any], training_only: bool, held: ExitStack
    ) -> dict[str, ExitStack]:
        """Locks of the arms this run has to work on, taken in one order so that two jobs cannot wait for each other."""
        locks: dict[str, ExitStack] = {}
        if is_main():
            for arm in sorted(arms, key=lambda arm: arm.folder):
                if action_of(arm, identity, training_only) != "reuse" and arm.folder not in {
                    other.folder for other in arms if other.name in locks
                }:
                    locks[arm.name] = held.enter_context(ExitStack())
                    locks[arm.name].enter_context(hold_lock(arm.folder))
                    if action_of(arm, identity, training_only) == "reuse":  # another job finished it meanwhile
                        locks.pop(arm.name).close()
        return locks

    def _finish(
        self,
        arm: Arm,
        action: str,
        steps: int,
        problems: dict[str, list[dict[str, Any]]] | None,
        checker: Checker | None,
    ) -> None:
        """Train and evaluate the arm as far as it is not done, and log it; without problems it stays unfinished."""
        with ExitStack() as held:
            logger = None
            if is_main():
                job_type = "reused" if action == "reuse" else arm.name
                title, names = f"{arm.name}-{arm.rule}-seed{self.data.seed}", {"arm": arm.name, "rule": arm.rule}
                logger = held.enter_context(self._logged(title, job_type, hash=arm.folder.name, **names))
            if action == "train":
                train(
                    arm,
                    self.data,
                    steps=steps,
                    make_trainer=partial(self.trainer, progress=arm.name),
                    logger=logger,
                    say=say,
                    callbacks=[self.end_check, *self.diagnosis.callbacks(arm)],
                    share=self._share,
                    run=self.folder,
                )
            if action in ("train", "evaluate") and self.config.stop_after != "training" and problems and checker:
                trainer = self.trainer()
                rank, world = (torch.distributed.get_rank(), world_size()) if world_size() > 1 else (0, 1)
                evaluate_arm(
                    arm,
                    self.data,
                    problems=problems,
                    sampling=self.sampling,
                    checker=checker,
                    device=trainer.strategy.root_device,
                    rank=rank,
                    world=world,
                )
            if logger is not None:
                cost = log_arm(logger, self.tracker, arm, self.data, action=action, taken=self._taken)
                if self.config.stop_after != "training" and problems is not None:  # later the arm is no longer locked
                    self.figures[arm.name] = read_figures(arm, list(problems)) | ({"cost": cost} if cost else {})
                    write_json(arm.folder / "arm.json", {"name": arm.name, "rule": arm.rule, "identity": arm.identity})

    def _keep_statistics(self) -> None:
        if is_main():
            write_statistics(self.folder / "statistics.parquet", self.data.candidates, self.data.selections, self.rules)
            write_sample(self.folder, self.data, dict(settings(self.config)))

    def _stop(self, text: str) -> float:
        if is_main():
            stopped = {"status": "finished", "stopped_after": self.config.stop_after}
            write_json(self.folder / "summary.json", stopped)
            self._write_page()
        say(text)
        return float("nan")

    def _report(self, arms: list[Arm], training_only: bool) -> float:
        for arm in arms:
            link = remove_path(self.folder / arm.name)
            link.symlink_to(os.path.relpath(arm.folder, self.folder), target_is_directory=True)
        if training_only:
            return self._stop(f"training    {', '.join(str(arm.folder / 'checkpoint') for arm in arms)}")
        summary = summarise_run(self.config, arms, self.figures, self.data, self.plan["arms"])
        summary |= {"problems_in_pool": self.overlap, "diagnostics": self.diagnosis.figures()}
        write_json(self.folder / "summary.json", summary)
        with self._logged(f"comparison-seed{self.data.seed}", "comparison") as logger:
            log_comparison(logger, self.tracker, summary, self.data, self.diagnosis.found, self._taken)
        print_run(summary)
        say(f"summary     {self.folder / 'summary.json'}")
        self._write_page()
        first = next(iter(summary["sets"].values()), {}).get("difference")
        return first["estimate"] if first else float("nan")

    def _write_page(self) -> None:
        if path := write_own_page(self.folder):
            say(f"page        {path}")

    def _logged(self, title: str, job_type: str, **config: Any) -> AbstractContextManager[Logger]:
        config |= _plain(self.config)
        where = {"group": self.group, "folder": self.logs}
        return opened(self.tracker, title=title, job_type=job_type, config=config, **where)

    def _taken(self, wanted: Pass) -> str:
        return self.plan[f"{wanted.name} {self.data.pass_folder(wanted).name}"]


def _plain(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}

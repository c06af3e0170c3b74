"""One run, from a composed configuration to its table: score, select, train and evaluate the arms, compare."""

import logging
import os
import shutil
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from lark import arms as arm_module
from lark.arms import Arm, evaluate_arm, evaluated, evaluation_identity, make_arm, train
from lark.cache import complete, lock, read_json, replacing, writable, write_json
from lark.config import build
from lark.data import TrajectoryDataModule
from lark.evaluate import read_problems
from lark.plan import Plan, barrier, is_main, leave_ranks, start_ranks, world_size
from lark.progress import Progress
from lark.report import print_comparison
from lark.selection import Rule, Selection
from lark.summary import read_figures, summarise_run
from lark.trainer import trainer_of
from lark.verify import Checker


def run(config: DictConfig, folder: Path, *, group: str) -> float:
    """Run one comparison in `folder`; returns selector minus baseline on the first evaluation set (avg@k), or nan.

    Raises ValueError for settings and data a user can correct; whatever was computed before stays cached.
    """
    _quiet_libraries()
    logs = writable(config.paths.logs, "paths.logs")
    cache = writable(config.paths.cache, "paths.cache")
    start_ranks()
    try:
        return _Run(config, folder, logs=logs, cache=cache, group=group).go()
    except torch.OutOfMemoryError as error:
        cuts = {
            "scoring": "probe.batch_tokens",
            "training": "sft.micro_batch_tokens",
            "sampling": "evaluation.batch_size",
        }
        shown = ", ".join(f"{OmegaConf.select(config, key)} {key} ({what})" for what, key in cuts.items())
        raise ValueError(f"the device ran out of memory; lower the one at work of {shown}") from error
    finally:
        leave_ranks()


def say(text: str) -> None:
    """Derived facts, once (not once a rank)."""
    if is_main():
        print(text, flush=True)


class _Run:
    """The parts of one run and the order in which they act."""

    def __init__(self, config: DictConfig, folder: Path, *, logs: Path, cache: Path, group: str):
        config = OmegaConf.create(_plain(config))  # every interpolation resolved
        self.config, self.folder, self.logs, self.group = config, folder, logs, group
        seed_everything(config.seed, verbose=False)
        parts = {name: build(config[name]) for name in ("task", "model", "selector", "baseline")}
        self.recipe = build(config.sft)
        self.sampling = build(config.evaluation)
        self.tracker = build(config.logger)
        self.precision, self.trainer = trainer_of(config.trainer, folder)
        baseline = parts["baseline"] if isinstance(parts["baseline"], Rule) else None
        self.rules: dict[str, Rule] = {"selector": parts["selector"]} | ({"baseline": baseline} if baseline else {})
        self.data = TrajectoryDataModule(
            task=parts["task"],
            student=parts["model"],
            selector=parts["selector"],
            baseline=baseline,
            recipe=self.recipe,
            probe=build(config.probe),
            seed=config.seed,
            cache=cache,
            # float32: the student's own dtype decides, and "*-true" precisions would convert it
            make_trainer=partial(self.trainer, callbacks=[Progress("scoring")], precision="32-true"),
            say=say,
        )
        self.plan = Plan(folder)
        self.figures: dict[str, dict[str, Any]] = {}

    def go(self) -> float:
        started, used = world_size(), self.trainer().world_size
        if started not in (1, used):
            raise ValueError(
                f"{started} processes were started, but trainer={self.config.trainer.name} uses {used}; set "
                "trainer=ddp trainer.devices=<processes a node> trainer.num_nodes=<nodes>, or start one process"
            )
        say(f"run         {self.folder}")
        say(f"logging     {self.tracker.describe()}")
        self.data.prepare_data()
        self.problems = {  # read before anything is computed: their faults are cheap to find now
            name: read_problems(path, limit=self.data.task.eval_limit)
            for name, path in self.data.trajectories.evaluation_files.items()
        }
        self.overlap = {name: self.data.trajectories.overlap(rows) for name, rows in self.problems.items()}
        for name, count in self.overlap.items():
            if count:
                say(f"warning     {count} of {len(self.problems[name])} problems of {name} are in the pool too")
        self._score()
        if self.config.stop_after == "statistics":
            return self._stop(f"statistics  {self.folder / 'statistics.parquet'}")
        self.data.select()
        self._write_statistics()
        self._describe_selections()
        if self.config.stop_after == "selection":
            for name, selection in self.data.selections.items() if is_main() else ():
                self._free(self.folder / name)
                arm_module.write_selection(selection, self.rules[name].name, self.data, self.folder / name)
            return self._stop(f"selection   {self.folder / 'selector' / 'selection.jsonl'}")
        return self._arms()

    def _score(self) -> None:
        """The probe's pass, under a lock; ranks obey the plan on whether there is one."""
        statistics = self.data.statistics_folder
        with ExitStack() as held:
            if is_main() and not complete(statistics):
                held.enter_context(lock(statistics))
            self.plan.share(score=not complete(statistics))
            self.data.score(cached=not self.plan["score"])
        self._write_statistics()

    def _arms(self) -> float:
        steps = self.recipe.steps_for(len(self.data.selections["selector"].row))
        problems = self.problems
        identity = evaluation_identity(self.data, problems, self.sampling)
        make = partial(
            make_arm,
            data=self.data,
            steps=steps,
            precision=self.precision,
            evaluation=identity,
            arms=self.logs / "arms",
        )
        arms = [make(name, self.rules[name].name) for name in ("baseline", "selector") if name in self.rules]
        before = make("before", "before")
        training_only = self.config.stop_after == "training"
        everything = arms if training_only else [before, *arms]
        with ExitStack() as held, Checker(self.data.task.checker, pattern=self.data.task.pattern) as checker:
            locks = self._locked(everything, identity, training_only, held)
            actions: dict[str, str] = {}
            for i, arm in enumerate(everything):  # two rules may come to the same rows and weights: one arm serves both
                twin = arm.folder in {other.folder for other in everything[:i]}
                actions[arm.name] = "reuse" if twin else _action(arm, identity, training_only)
            self.plan.share(arms={a.name: {"hash": a.folder.name, "action": actions[a.name]} for a in everything})
            self._describe_arms(everything, steps)
            for arm in everything:
                self._finish(arm, self.plan["arms"][arm.name]["action"], steps, problems, checker)
                if release := locks.get(arm.name):
                    release.close()
        barrier()
        if not is_main():
            return float("nan")
        return self._report(everything, problems, training_only)

    def _locked(
        self, arms: list[Arm], identity: dict[str, Any], training_only: bool, held: ExitStack
    ) -> dict[str, ExitStack]:
        """Locks of the arms this run has to work on, taken in one order so that two jobs cannot wait for each other."""
        locks: dict[str, ExitStack] = {}
        if is_main():
            for arm in sorted(arms, key=lambda arm: arm.folder):
                if _action(arm, identity, training_only) != "reuse" and arm.folder not in {
                    other.folder for other in arms if other.name in locks
                }:
                    locks[arm.name] = held.enter_context(ExitStack())
                    locks[arm.name].enter_context(lock(arm.folder))
                    if _action(arm, identity, training_only) == "reuse":  # another job finished it meanwhile
                        locks.pop(arm.name).close()
        return locks

    def _finish(
        self, arm: Arm, action: str, steps: int, problems: dict[str, list[dict[str, Any]]], checker: Checker
    ) -> None:
        """Train and evaluate the arm as far as it is not done, and log it."""
        logger = None
        if is_main():
            job_type = "reused" if action == "reuse" else arm.name
            logger = self.tracker.open(
                title=f"{arm.name}-{arm.rule}-seed{self.data.seed}",
                group=self.group,
                job_type=job_type,
                config={"arm": arm.name, "rule": arm.rule, "hash": arm.folder.name, **_plain(self.config)},
                folder=self.logs,
            )
        try:
            if action == "train":
                train(
                    arm,
                    self.data,
                    steps=steps,
                    make_trainer=partial(self.trainer, progress=arm.name),
                    logger=logger,
                    say=say,
                )
            if action in ("train", "evaluate") and self.config.stop_after != "training" and problems:
                trainer = self.trainer()
                rank, world = (
                    (torch.distributed.get_rank(), torch.distributed.get_world_size())
                    if torch.distributed.is_initialized()
                    else (0, 1)
                )
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
                _log_arm(logger, arm, reused=action == "reuse")
                self.tracker.keep(logger, f"{arm.name}-{arm.folder.name}", sorted(arm.folder.glob("*.jsonl")))
                if self.config.stop_after != "training":  # read now: later the arm is no longer locked
                    self.figures[arm.name] = read_figures(arm, list(problems))
                    write_json(arm.folder / "arm.json", {"name": arm.name, "rule": arm.rule, "identity": arm.identity})
        finally:
            if logger is not None:
                self.tracker.finish()

    # ---- what is written and said

    def _write_statistics(self) -> None:
        """statistics.parquet in the run folder: ids, statistics, and every score computed under its rule's name."""
        if not is_main():
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        candidates = self.data.candidates
        columns: dict[str, Any] = {
            "problem_id": candidates["problem_id"],
            "candidate_id": candidates["candidate_id"],
            "teacher": candidates["teacher"],
            **candidates.statistics,
        }
        for name, selection in self.data.selections.items():
            columns[self.rules[name].name] = selection.score_N
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "statistics.parquet") as temporary:
            pq.write_table(pa.table({name: pa.array(column) for name, column in columns.items()}), temporary)

    def _describe_selections(self) -> None:
        for name, selection in self.data.selections.items():
            record, counts = selection.record, selection.record["counts"]
            teachers = ", ".join(
                f"{teacher} {share:.0%}" for teacher, share in list(record["teacher_share"].items())[:4]
            )
            confounds = ", ".join(
                f"{column} {value:+.2f}"
                for column, value in record["within_problem_spearman"].items()
                if value is not None
            )
            left_out = ", ".join(
                f"{counts[key]:,} {key.replace('_', ' ')}"
                for key in (
                    "dropped_by_filter",
                    "dropped_without_score",
                    "problems_without_choice",
                    "short_of_selector",
                )
                if counts.get(key)
            )
            zero = record["policy"].get("zero_weight_in_top_b", 0)
            say(
                f"{name:<11} {self.rules[name].name}: {counts['chosen']:,} of {counts['candidates']:,} trajectories, "
                f"{record['tokens']:,} tokens, effective size {record['effective_sample_size']:,.0f}; "
                f"teachers {teachers}"
                + (f"; score within problems against {confounds}" if confounds else "")
                + (f"; {left_out}" if left_out else "")
                + (f"; {zero:,} of weight 0 left out" if zero else "")
            )

        if len(self.data.selections) == 2 and _same(*self.data.selections.values()):
            say(
                "warning     selector and baseline chose the same rows with the same weights: no difference is possible"
            )

    def _describe_arms(self, arms: list[Arm], steps: int) -> None:
        recipe = self.recipe
        for arm in arms:
            say(f"arm         {arm.name} ({arm.rule}): {self.plan['arms'][arm.name]['action']} {arm.folder}")
        tokens = self.data.selections["selector"].record["tokens"] / len(self.data.selections["selector"].row)
        say(
            f"recipe      {steps} optimizer steps x {recipe.batch_size} trajectories "
            f"(about {recipe.batch_size * tokens:,.0f} trained tokens a step), lr {recipe.lr:g}, {self.precision}, "
            f"{'all parameters' if self.data.student.lora is None else 'LoRA'}, average over {recipe.average}; "
            f"scored and sampled in {self.data.statistics_identity['dtype'].removeprefix('torch.')}"
        )

    def _stop(self, text: str) -> float:
        if is_main():
            write_json(self.folder / "summary.json", {"status": "finished", "stopped_after": self.config.stop_after})
        say(text)
        return float("nan")

    def _report(self, arms: list[Arm], problems: dict[str, Any], training_only: bool) -> float:
        for arm in arms:
            link = self._free(self.folder / arm.name)
            link.symlink_to(os.path.relpath(arm.folder, self.folder), target_is_directory=True)
        if training_only:
            return self._stop(f"training    {', '.join(str(arm.folder / 'checkpoint') for arm in arms)}")
        summary = summarise_run(self.config, arms, self.figures, self.data, self.plan["arms"])
        summary["problems_in_pool"] = self.overlap
        write_json(self.folder / "summary.json", summary)
        self._log_comparison(summary)
        print_comparison(summary)
        say(f"summary     {self.folder / 'summary.json'}")
        first = next(iter(summary["sets"].values()), {}).get("difference")
        return first["estimate"] if first else float("nan")

    @staticmethod
    def _free(path: Path) -> Path:
        """The path with nothing there: an earlier run in this folder may have left a link to an arm, or a selection."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        return path

    def _log_comparison(self, summary: dict[str, Any]) -> None:
        logger = self.tracker.open(
            title=f"comparison-seed{self.data.seed}",
            group=self.group,
            job_type="comparison",
            config=_plain(self.config),
            folder=self.logs,
        )
        for name, spec in summary["sets"].items():
            if difference := spec.get("difference"):
                keys = ("estimate", "low", "high", "smallest_detectable")
                logger.log_metrics({f"comparison/{name}/{key}": difference[key] for key in keys})
        self.tracker.finish()


def _same(a: Selection, b: Selection) -> bool:
    return np.array_equal(a.row, b.row) and np.allclose(a.weight, b.weight)


def _action(arm: Arm, identity: dict[str, Any], training_only: bool) -> str:
    if not arm.trained:
        return "train"
    if not training_only and not evaluated(arm, identity):
        return "evaluate"
    return "reuse"


def _log_arm(logger: Any, arm: Arm, *, reused: bool) -> None:
    """Final figures; a reused arm's held-out curve too, since this group has not seen it."""
    if reused and arm.selection is not None:
        for point in read_json(arm.folder / "trained.json")["curve"]:
            logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
    path = arm.folder / "metrics.json"
    if path.exists():
        for name, metrics in read_json(path)["sets"].items():
            logger.log_metrics({f"evaluation/{name}/{key}": value for key, value in metrics.items()})
    logger.save()


def _plain(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _quiet_libraries() -> None:
    """Library chatter would bury the dozen lines a run prints."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*num_workers.*")

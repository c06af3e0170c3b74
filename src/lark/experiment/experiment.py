"""One run, from a composed configuration to its table: score, select, train and evaluate the arms, compare."""

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from lark.answers.checker import Checker
from lark.common.cache import check_writable, is_complete, remove_path, write_json
from lark.common.log import announce, open_log
from lark.common.ranks import Plan, check_ranks, in_ranks, is_main
from lark.comparison.printing import print_run
from lark.config import build, build_model_option
from lark.diagnostics.diagnostics import Diagnosis
from lark.evaluation.evaluate import Evaluator
from lark.experiment import console
from lark.experiment.arm import ArmRunner
from lark.experiment.bill import Bill, announce_bill, compare_bill, make_bill, print_bill
from lark.experiment.statistics_file import write_statistics
from lark.experiment.summary import settings, summarise_run
from lark.page.pool_sample import write_sample
from lark.page.write import write_own_page
from lark.scoring.passes import GradientMatches, Statistics
from lark.scoring.progress import PassProgress
from lark.selection.export import plan_repeats
from lark.selection.rule import Rule, prefix_errors
from lark.student.context_length import check_answer_room
from lark.student.distributed import Parallelism
from lark.tasks.problems import read_problems
from lark.tracking.logging_metrics import log_choice, log_comparison, log_pass
from lark.tracking.tracking import open_run
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule
from lark.training.run_folder import write_selection
from lark.training.trainer import TrainerFactory

_MEMORY_SETTINGS = {
    "scoring": "probe.batch_tokens",
    "training": "sft.micro_batch_tokens",
    "sampling": "evaluation.batch_size",
}


def run(config: DictConfig, folder: Path, *, group: str) -> float:
    """Run one comparison in `folder`; returns selector minus baseline on the first evaluation set (avg@k), or nan.

    Raises LarkError for settings and data a user can correct; whatever was computed before stays cached.
    """
    console.quiet_libraries()
    logs = check_writable(config.paths.logs, "paths.logs")
    cache = check_writable(config.paths.cache, "paths.cache")
    shown = ", ".join(f"{OmegaConf.select(config, key)} {key} ({what})" for what, key in _MEMORY_SETTINGS.items())
    remedy = (
        f"lower the one at work of {shown}; for a rule that takes gradients set its score.parameters=last:<layers> or "
        "score.dimensions"
    )
    with in_ranks(out_of_memory=remedy), open_log(folder, verbose=config.verbose):
        return Experiment(config, folder, logs=logs, cache=cache, group=group).run()


class Experiment:
    """One run: its parts, and the order in which they act."""

    def __init__(self, config: DictConfig, folder: Path, *, logs: Path, cache: Path, group: str):
        self.settings: Any = OmegaConf.to_container(config, resolve=True)
        self.config, self.folder, self.logs, self.group = DictConfig(self.settings), folder, logs, group
        seed_everything(config.seed, verbose=False)
        parts = {name: build(config[name]) for name in ("task", "model", "selector", "probe", "sft", "diagnostics")}
        with prefix_errors("baseline"):
            baseline = build(config.baseline)
        scorer = config.probe.model
        self.tracker = build(config.logger)
        self.trainers = TrainerFactory(config.trainer, folder)
        self.data = TrajectoryDataModule(
            task=parts["task"],
            student=parts["model"],
            scorer=build_model_option(scorer) if scorer is not None else None,
            selector=parts["selector"],
            baseline=baseline if isinstance(baseline, Rule) else None,
            recipe=parts["sft"],
            probe=parts["probe"],
            seed=config.seed,
            match=config.match,
            needs=(Statistics(),) if config.stop_after == "statistics" else (),
            cache=cache,
            make_trainer=self._make_pass_trainer,
            precision=self.trainers.precision,
        )
        self.plan = Plan(folder)
        self.diagnosis = Diagnosis(parts["diagnostics"], self.data, folder)

    def _make_pass_trainer(self, label: str) -> Trainer:
        """float32: the student's own dtype decides, others would convert it; no inference mode: for gradients."""
        return self.trainers.make(callbacks=[PassProgress(label)], precision="32-true", inference_mode=False)

    def run(self) -> float:
        """Go through the run's stages; `stop_after` ends it early."""
        self._check_devices()
        console.announce_header(self.config, self.folder)
        self._read_pool()
        bill = self._make_bill()
        if self.config.stop_after == "cost":
            if is_main():
                print_bill(bill)
            return self._stop("cost", self.folder / "summary.json", bill=bill.to_record())
        announce_bill(bill)
        with self.evaluator.checker:
            self._score()
            if self.config.stop_after == "statistics":
                return self._stop("statistics", self.folder / "statistics.parquet")
            self._select()
            if self.config.stop_after == "selection":
                self._log_selections()
                console.announce_weights(self.data.selections["selector"])
                return self._stop("selection", self.folder / "selector" / "selection.jsonl")
            arms = self._run_arms()
        if not is_main():
            return float("nan")
        self.cost = compare_bill(bill, self.runner.took(), self.data)
        if self.config.stop_after == "training":
            return self._stop("training", self.folder / "selector" / "checkpoint")
        return self._report(arms)

    def _check_devices(self) -> None:
        trainer = self.trainers.make()
        for name, rule in self.data.rules.items():
            if any(need.needs_gradients for need in rule.needs):
                Parallelism(trainer).check_gradients(f"{name}={rule.name}")
        check_ranks(trainer.world_size, self.config.trainer.name)

    def _read_pool(self) -> None:
        """Read pool and evaluation sets, and find their faults before anything is computed."""
        data = self.data
        data.prepare_data()
        data.check_columns()
        files = data.trajectories.evaluation_files
        problems = {name: read_problems(path, limit=data.task.eval_limit) for name, path in files.items()}
        if problems and self.config.stop_after is None:
            check_answer_room(data.student, data.task.max_new_tokens)
        self.evaluator = Evaluator(
            task=data.task,
            chat=data.trajectories.chat,
            problems=problems,
            sampling=build(self.config.evaluation),
            checker=Checker(data.task.checker, pattern=data.task.pattern),
            seed=data.seed,
            folder=self.logs / "samples",
            plan=self.plan,
            make_trainer=self.trainers.make,
        )
        self.runner = ArmRunner(
            data,
            make_trainer=self.trainers.make,
            plan=self.plan,
            evaluator=self.evaluator if self.config.stop_after is None else None,
            tracker=self.tracker,
            open_logger=self._open_logger,
            arms=self.logs / "arms",
            run=self.folder,
            keeps_losses=self.config.diagnostics.name != "none",
        )

    def _make_bill(self) -> Bill:
        sets = self.evaluator.problems.values() if self.config.stop_after in ("cost", None) else ()
        return make_bill(
            self.data,
            build(self.config.cost),
            trains=self.config.stop_after not in ("statistics", "selection"),
            is_divided=self.config.trainer.strategy == "fsdp",
            sampled=self.evaluator.sampling.samples * sum(map(len, sets)),
            max_answer=self.data.task.max_new_tokens,
        )

    def _score(self) -> None:
        """Run the passes that the rules need, each under its lock; ranks obey the plan on which of them run."""
        data = self.data
        for wanted in data.needs:
            folder = data.pass_folder(wanted)
            with self.plan.claim(wanted.name, folder, partial(is_complete, folder)) as to_do, ExitStack() as held:
                warm_up = self.runner.warm_up(wanted) if to_do and isinstance(wanted, GradientMatches) else None
                logger = None
                if to_do and is_main():
                    title = f"{wanted.name}-{data.scorer.name}"
                    about = {"hash": folder.name, **wanted.identity()}
                    logger = held.enter_context(self._open_logger(title, "scoring", **about))
                data.run_pass(wanted, cached=not to_do, experiment_logger=logger, warm_up=warm_up)
                if logger is not None:
                    log_pass(logger, self.tracker, data.costs[wanted])
        console.announce_scoring(data)
        if is_main():  # whatever becomes of the selection
            write_statistics(self.folder / "statistics.parquet", data.candidates, {}, data.rules)

    def _select(self) -> None:
        data = self.data
        data.select()
        if self.config.repeat is not None:
            for selection in data.selections.values():
                selection.record["repeated"] = plan_repeats(selection, self.config.repeat)
        if is_main():
            write_statistics(self.folder / "statistics.parquet", data.candidates, data.selections, data.rules)
            write_sample(self.folder, data, dict(settings(self.config)))
            for name, rule in data.rules.items():
                write_selection(name, rule.name, data, remove_path(self.folder / name))
        console.announce_selections(data)
        self.diagnosis.diagnose_selections(self.plan.claim)

    def _log_selections(self) -> None:
        for name, rule in self.data.rules.items() if is_main() else ():
            title = f"{name}-{rule.name}-seed{self.data.seed}"
            with self._open_logger(title, "selection", arm=name, rule=rule.name) as logger:
                log_choice(logger, self.tracker, name, self.folder / name, self.data, self.data.get_action)

    def _run_arms(self) -> list[Arm]:
        """Train and evaluate the arms; returns them in the order of the table."""
        runner, rules = self.runner, self.data.rules
        before = [runner.make_before()] if runner.evaluator is not None else []
        trained = {name: runner.make(name, rule.name) for name, rule in rules.items()}
        console.announce_training(
            self.data, trained, {name: runner.find_action(arm) for name, arm in trained.items()}, self.tracker
        )
        ordered = [*before, *(trained[name] for name in ("selector", "baseline") if name in trained)]
        self.actions = runner.run_together(ordered)  # the baseline last: other jobs may wait for the rest
        self.diagnosis.diagnose_arms(list(trained.values()))
        if bins := self.diagnosis.select_bins():
            self.data.selections |= bins
            arms = [runner.make(name, selection.record["rule"]) for name, selection in bins.items()]
            for arm in arms:
                runner.run_aside(arm)
                del self.data.selections[arm.name]
            self.data.set_active_arm("selector")
            self.diagnosis.diagnose_bins(arms, runner.figures)
        return [*before, *(trained[name] for name in ("baseline", "selector") if name in trained)]

    def _stop(self, stage: str, path: Path, **found: Any) -> float:
        """End the run early, after `stage`, which left `path`."""
        if is_main():
            record = {"status": "finished", "stopped_after": self.config.stop_after, **found}
            write_json(self.folder / "summary.json", record)
            write_own_page(self.folder, self.logs)
            announce(stage, str(path))
        return float("nan")

    def _report(self, arms: list[Arm]) -> float:
        """Write and print what the run found; returns the difference on the first evaluation set."""
        data = self.data
        summary = summarise_run(self.config, arms, self.runner.figures, data, self.actions)
        summary |= {
            "cost": self.cost,
            "problems_in_pool": data.trajectories.overlaps,
            "diagnostics": self.diagnosis.list_figures(),
        }
        write_json(self.folder / "summary.json", summary)
        with self._open_logger(f"comparison-seed{data.seed}", "comparison") as logger:
            log_comparison(logger, self.tracker, summary, data, self.diagnosis.found, data.get_action)
        write_own_page(self.folder, self.logs)
        print_run(summary)
        console.announce_paths(self.folder)
        first = next(iter(summary["sets"].values()), {}).get("difference")
        return first["estimate"] if first else float("nan")

    def _open_logger(self, title: str, job_type: str, **about: Any) -> AbstractContextManager[Logger]:
        """Open one of the tracker's runs, in this run's group."""
        config = about | self.settings
        return open_run(self.tracker, title=title, job_type=job_type, config=config, group=self.group, folder=self.logs)

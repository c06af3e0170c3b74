"""One evaluation of a student, from a composed configuration to its table."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from lark.answers.checker import Checker
from lark.common.cache import check_writable, hold_lock, read_json
from lark.common.errors import LarkError
from lark.common.log import announce, open_log
from lark.common.ranks import Plan, check_ranks, in_ranks, is_main
from lark.config import build
from lark.evaluation.evaluate import Evaluator, identify_weights
from lark.evaluation.evaluation_table import print_metrics
from lark.evaluation.samples import describe_set
from lark.experiment.console import quiet_libraries
from lark.student.context_length import check_answer_room
from lark.student.student import Student
from lark.tasks.problems import read_problems
from lark.tasks.task import Task
from lark.tracking.logging_metrics import list_evaluation_metrics
from lark.tracking.tracking import open_run
from lark.training.trainer import TrainerFactory


def run(config: DictConfig, folder: Path, *, group: str) -> float:
    """Evaluate the student and write what it came to into `folder`; returns avg@k on the first set.

    Raises LarkError for settings and data a user can correct; samples that were drawn are kept.
    """
    quiet_libraries()
    logs = check_writable(config.paths.logs, "paths.logs")
    cache = check_writable(config.paths.cache, "paths.cache")
    remedy = (
        f"lower evaluation.batch_size={config.evaluation.batch_size}, or set model.dtype=bfloat16 or "
        "evaluation.engine=vllm"
    )
    with in_ranks(out_of_memory=remedy), open_log(folder):
        return _run(config, folder, logs=logs, cache=cache, group=group)


def _run(config: DictConfig, folder: Path, *, logs: Path, cache: Path, group: str) -> float:
    plain: Any = OmegaConf.to_container(config, resolve=True)
    config = DictConfig(plain)  # every interpolation resolved
    seed_everything(config.seed, verbose=False)
    task, student, sampling, tracker = (build(config[name]) for name in ("task", "model", "evaluation", "logger"))
    trainers = TrainerFactory(config.trainer, folder)
    trainer: Trainer = trainers.make()
    check_ranks(trainer.world_size, config.trainer.name)
    arm = None if config.checkpoint is None else Path(config.checkpoint)
    announce("evaluation", str(folder))
    announce("model", _describe_student(student, arm))
    _check_base(student, arm)
    problems = _read_sets(task, cache)
    check_answer_room(student, task.max_new_tokens)
    chat = student.load_chat()
    backend = sampling.make_backend(
        student,
        chat,
        trained=arm / "checkpoint" if arm is not None and student.lora is not None else None,
        weights=identify_weights(student, arm),
        device=trainer.strategy.root_device,
    )
    with ExitStack() as held:
        if is_main():
            held.enter_context(hold_lock(folder))
        evaluator = Evaluator(
            task=task,
            chat=chat,
            problems=problems,
            sampling=sampling,
            checker=held.enter_context(Checker(task.checker, pattern=task.pattern)),
            seed=config.seed,
            folder=logs / "samples",
            plan=Plan(folder),
            make_trainer=trainers.make,
        )
        if is_main() and evaluator.is_done(backend):
            announce("reuse", "samples and verdicts of this student and these problems and settings are there")
        figures = evaluator.evaluate(backend, student.name)
        if not is_main():
            return float("nan")
        evaluator.write_figures(folder, figures)
    where = {"group": group, "folder": logs}
    with open_run(tracker, title=f"evaluation-{student.name}", job_type="evaluation", config=plain, **where) as run:
        run.log_metrics(list_evaluation_metrics(figures["metrics"], figures["intervals"]))
        run.save()
        tracker.keep_texts(run, f"evaluation-{folder.name}", evaluator.list_files(figures))
    print_metrics(f"{task.name} · {student.name} · seed {config.seed}", figures)
    announce("metrics", str(folder / "metrics.json"))
    return next(iter(figures["intervals"].values()))["estimate"]


def _read_sets(task: Task, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the task's evaluation sets, and announce each."""
    files = task.prepare_evaluation(cache)
    if not files:
        raise LarkError(f"task={task.name} has no evaluation set; set task.eval=<file>, or to {{name: file, ...}}")
    problems = {name: read_problems(path, limit=task.eval_limit) for name, path in files.items()}
    for name, rows in problems.items():
        prompts = ", ".join(
            f"{prompt} ({count:,})" for prompt, count in describe_set(rows, task.system)["prompts"].items()
        )
        kinds = ", ".join(dict.fromkeys(str(row.get("checker") or task.checker) for row in rows))
        announce("set", f"{name}: {len(rows):,} problems; prompts: {prompts}; checked by: {kinds}; {files[name]}")
    return problems


def _check_base(student: Student, arm: Path | None) -> None:
    """Raises LarkError if the weights below an arm's adapter are others than it was trained on."""
    if arm is None or student.lora is None:
        return
    known, found = read_json(arm / "trained.json")["identity"]["student"], student.identity()
    if any(known.get(key, value) != value for key, value in found.items()):  # a folder then, the hub now: unknown
        raise LarkError(
            f"checkpoint={arm} was trained on other weights ({ {key: known.get(key) for key in found} }) than "
            f"{student.path or student.id} holds ({found}); set model.path or model.id to the right ones"
        )


def _describe_student(student: Student, arm: Path | None) -> str:
    adapters = "".join(f" + {folder}" for folder in student.adapters)
    trained = "" if arm is None else f", trained in {arm}"
    return f"{student.name}: {student.path or student.id}{adapters}{trained}"

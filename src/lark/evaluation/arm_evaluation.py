"""The evaluation of an arm."""

from pathlib import Path
from typing import Any

import torch

from lark.answers.checker import Checker
from lark.common.cache import file_hash, identity_hash, read_json
from lark.common.versions import CHECKING_LIBRARIES, STUDENT_LIBRARIES, formula_versions
from lark.evaluation.evaluate import Sampling, evaluate
from lark.generation.backends import record_of
from lark.student.student import Student
from lark.tasks.task import Task
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule


def evaluate_arm(
    arm: Arm,
    data: TrajectoryDataModule,
    *,
    problems: dict[str, list[dict[str, Any]]],
    sampling: Sampling,
    checker: Checker,
    device: torch.device,
    rank: int,
    world: int,
) -> None:
    """Evaluate the arm's student as it is on disk (the untrained one for "before") in the arm's folder.

    An arm that was evaluated with the same settings on the same problems before is left as it is.
    """
    identity = evaluation_identity(data, problems, sampling)
    if evaluated(arm, identity):
        return
    student, chat = data.student, data.trajectories.chat
    engine = sampling.engine_of(
        student,
        chat,
        trained=None if arm.selection is None else arm.checkpoint,
        weights=student_weights(student, None if arm.selection is None else arm.folder),
        device=device,
    )
    evaluate(
        engine,
        problems,
        arm.folder,
        checker=checker,
        sampling=sampling,
        max_new_tokens=data.task.max_new_tokens,
        seed=data.seed,
        system=data.task.system,
        identity=identity,
        record=record_of(engine, student, chat, device) | {"task": record_of_task(data.task)},
        rank=rank,
        world=world,
        label=arm.name,
    )


def student_weights(student: Student, arm: Path | None) -> dict[str, Any]:
    """What tells these weights from others: the student's own, and the arm in which it was trained, if any.

    trained.json holds the curve and the seconds it took: no two trainings leave the same.
    """
    if arm is None:
        return dict(student.identity())
    return student.identity() | {"arm": arm.name, "trained": file_hash(arm / "trained.json")[:16]}


def record_of_task(task: Task) -> dict[str, Any]:
    """What evaluation.json says of how answers are asked for and checked."""
    return {"name": task.name, "checker": task.checker, "pattern": task.pattern, "system": task.system}


def evaluation_identity(
    data: TrajectoryDataModule, problems: dict[str, list[dict[str, Any]]], sampling: Sampling
) -> dict[str, Any]:
    return identity_of(data.task, problems, sampling, seed=data.seed, dtype=data.dtype)


def identity_of(
    task: Task, problems: dict[str, list[dict[str, Any]]], sampling: Sampling, *, seed: int, dtype: str
) -> dict[str, Any]:
    """What the metrics of a student depend on besides its weights."""
    return {
        "sets": list(problems),
        "problems": identity_hash({"problems": problems}),
        "sampling": sampling.settings(),
        "task": [task.checker, task.pattern, task.system, task.max_new_tokens],
        "seed": seed,
        "dtype": dtype,
        "versions": sample_versions() | verdict_versions(),
    }


def sample_versions() -> dict[str, Any]:
    return {"samples": formula_versions("samples", libraries=STUDENT_LIBRARIES)}


def verdict_versions() -> dict[str, Any]:
    return {"verdicts": formula_versions("verdicts", "metrics", libraries=CHECKING_LIBRARIES)}


def evaluated(arm: Arm, identity: dict[str, Any]) -> bool:
    if not identity["sets"]:
        return True
    return is_evaluated(arm.folder, identity)


def is_evaluated(folder: Path, identity: dict[str, Any]) -> bool:
    path = folder / "metrics.json"
    return path.exists() and read_json(path)["identity"] == identity


def action_of(arm: Arm, identity: dict[str, Any], training_only: bool) -> str:
    """What is left to do for an arm: train, evaluate, or nothing (reuse)."""
    if not arm.is_trained:
        return "train"
    if not training_only and not evaluated(arm, identity):
        return "evaluate"
    return "reuse"

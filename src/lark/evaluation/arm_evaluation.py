"""Evaluation of arms: what their metrics depend on, whether they are there, and what they say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lark.answers.checker import Checker
from lark.common.cache import file_hash, identity_hash, read_json
from lark.common.versions import CHECKING_LIBRARIES, STUDENT_LIBRARIES, formula_versions
from lark.evaluation.evaluate import Sampling, evaluate_student
from lark.evaluation.samples import read_verdicts
from lark.student.student import Student
from lark.tasks.task import Task
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule

ProblemSets = Mapping[str, Sequence[dict[str, Any]]]


def evaluate_arm(
    arm: Arm,
    data: TrajectoryDataModule,
    *,
    problems: ProblemSets,
    sampling: Sampling,
    checker: Checker,
    device: torch.device,
) -> None:
    """Evaluate the arm's student as it is on disk (the untrained one for "before") in the arm's folder.

    An arm that was evaluated with the same settings on the same problems before is left as it is.
    """
    identity = evaluation_identity(data.task, problems, sampling, seed=data.seed, dtype=data.dtype)
    if is_evaluated(arm.folder, identity):
        return
    is_trained = arm.selection is not None
    evaluate_student(
        data.student,
        data.trajectories.chat,
        data.task,
        problems,
        arm.folder,
        trained=arm.checkpoint if is_trained else None,
        weights=identify_weights(data.student, arm.folder if is_trained else None),
        sampling=sampling,
        checker=checker,
        device=device,
        seed=data.seed,
        identity=identity,
        label=arm.name,
    )


def identify_weights(student: Student, arm: Path | None) -> dict[str, Any]:
    """Tell these weights from others: by the student's own, and the arm in which it was trained, if any.

    trained.json holds the curve and the seconds it took: no two trainings leave the same.
    """
    if arm is None:
        return dict(student.identity())
    return student.identity() | {"arm": arm.name, "trained": file_hash(arm / "trained.json")[:16]}


def evaluation_identity(
    task: Task, problems: ProblemSets, sampling: Sampling, *, seed: int, dtype: str
) -> dict[str, Any]:
    """Name what the metrics of a student depend on besides its weights."""
    samples = formula_versions("samples", libraries=STUDENT_LIBRARIES)
    return {
        "sets": list(problems),
        "problems": identity_hash({"problems": problems}),
        "sampling": sampling.identity(),
        "task": [task.checker, task.pattern, task.system, task.max_new_tokens],
        "seed": seed,
        "dtype": dtype,
        "versions": {"samples": samples, **verdict_versions()},
    }


def verdict_versions() -> dict[str, Any]:
    """Name the versions that verdicts and metrics depend on."""
    return {"verdicts": formula_versions("verdicts", "metrics", libraries=CHECKING_LIBRARIES)}


def is_evaluated(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether metrics.json is there and of this identity; without sets there is nothing to evaluate."""
    path = folder / "metrics.json"
    return not identity["sets"] or (path.exists() and read_json(path)["identity"] == identity)


def find_action(arm: Arm, identity: Mapping[str, Any], training_only: bool) -> str:
    """Find what is left to do for an arm: train, evaluate, or nothing (reuse)."""
    if not arm.is_trained:
        return "train"
    return "reuse" if training_only or is_evaluated(arm.folder, identity) else "evaluate"


def read_figures(arm: Arm, sets: Sequence[str]) -> dict[str, Any]:
    """Read what an arm's evaluation left: metrics by set, intervals of avg@k, both by level where a set has levels,
    and each problem's avg@k.
    """
    written = read_json(arm.folder / "metrics.json") if sets else {}
    return {
        "metrics": written.get("sets", {}),
        "intervals": written.get("intervals", {}),
        "levels": written.get("levels", {}),
        "per_problem": {
            name: {
                key: float(np.mean(values))
                for key, values in read_verdicts(arm.folder / f"samples-{name}.jsonl").items()
            }
            for name in sets
        },
    }

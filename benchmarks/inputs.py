"""What the benchmarks measure: a pool and a student, the embedded ones unless others are named."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from transformers.utils import logging

from lark.experiment.console import quiet_libraries
from lark.scoring.pass_module import ScoringSettings
from lark.selection.policies import Chi2
from lark.selection.rule import Rule
from lark.selection.scores.statistics import Lark
from lark.student.student import Student
from lark.tasks.arithmetic import generate
from lark.tasks.task import EmbeddedTask, Task
from lark.training.datamodule import TrajectoryDataModule
from lark.training.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser, *, problems: int) -> None:
    parser.add_argument("--pool", nargs="+", help="JSONL, JSON or Parquet files, or a folder; none: the embedded task")
    parser.add_argument("--model-path", default="shipped:tiny", help="a folder or .gguf file; none: the embedded one")
    parser.add_argument("--problems", type=int, default=problems)
    parser.add_argument("--max-length", type=int, default=4096, help="tokens; longer trajectories are left out")


def open_data(
    arguments: argparse.Namespace,
    cache: Path,
    *,
    limit: int | None,
    dtype: str = "auto",
    probe: ScoringSettings | None = None,
    recipe: Recipe | None = None,
    lora: dict[str, Any] | None = None,
    callbacks: Any = (),
) -> TrajectoryDataModule:
    """The pool, read and tokenised for the student; nothing held out, at most `limit` problems of it."""
    quiet_libraries()
    logging.disable_progress_bar()
    limits: dict[str, Any] = {"held_out": 0.0, "limit": limit, "max_length": arguments.max_length}
    if arguments.pool:
        task = Task(name="pool", pool=[str(Path(path).resolve()) for path in arguments.pool], **limits)
    else:
        settings = {"seed": 0, "problems": max(arguments.problems, 2), "eval_problems": 1, "shifted_problems": 1}
        task = EmbeddedTask(name="arithmetic", generate=generate, settings=settings, **limits)
    trainer = partial(
        Trainer,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision="32-true",
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=cache,
    )
    data = TrajectoryDataModule(
        task=task,
        student=Student(name="student", path=arguments.model_path, dtype=dtype, lora=lora),
        selector=Rule(name="lark", score=Lark(), policy=Chi2(budget=2)),
        baseline=None,
        recipe=recipe or Recipe(),
        probe=probe or ScoringSettings(),
        seed=0,
        cache=cache,
        make_trainer=lambda label: trainer(callbacks=[callback(label) for callback in callbacks]),
    )
    data.prepare_data()
    return data

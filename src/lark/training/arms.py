"""An arm: one student trained on one selection with one seed, kept in logs/arms/<hash of everything it depends on>.

training/last.ckpt      while it trains; a killed arm goes on from here
checkpoint/, loss.csv   once it is trained
trained.json            written last: its presence means that it is trained

Runs share arms: two rules may choose the same rows and weights. Who chose, and why, is in each run's own folder
(lark.training.run_folder).
"""

import dataclasses
import gc
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from lark.common.cache import identity_hash, is_complete, read_json, write_json
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.ranks import Plan, barrier, is_main
from lark.common.versions import STUDENT_LIBRARIES, formula_versions
from lark.selection.selection import Selection
from lark.student.memory import release_memory
from lark.student.student import Student, save_student
from lark.training.callbacks import CheckpointSaver, collect_training_facts, describe_training, find_checkpoint
from lark.training.datamodule import TrajectoryDataModule
from lark.training.recipe import Recipe
from lark.training.sft_module import SFTModule


@dataclass(frozen=True, kw_only=True)
class Arm:
    """name: before | baseline | selector | warm_up | bin_<n>. The arm `before` has no selection and no training."""

    name: str
    rule: str
    selection: Selection | None
    recipe: Recipe
    steps: int
    identity: dict[str, Any]
    folder: Path

    @property
    def is_trained(self) -> bool:
        return self.selection is None or is_complete(self.folder, "trained.json")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def last(self) -> Path:
        """Where its training is saved while it goes on."""
        return self.folder / "training" / "last.ckpt"


def make_untrained_arm(data: TrajectoryDataModule, arms: Path) -> Arm:
    """Make the arm `before`: the student as it is."""
    student = data.student
    identity = {
        "student": student.identity() | {"dtype": data.dtype, "attention": student.attention},
        "chat": data.trajectories.chat.prompt_identity,
        "versions": formula_versions("tokens", "forward", libraries=STUDENT_LIBRARIES),
    }
    folder = arms / identity_hash(identity)
    return Arm(
        name="before", rule="before", selection=None, recipe=data.recipe, steps=0, identity=identity, folder=folder
    )


def make_arm(
    name: str, rule: str, data: TrajectoryDataModule, *, recipe: Recipe, steps: int, arms: Path, kept: int = 0
) -> Arm:
    """Make the arm of `data.selections[name]`, to be trained by `recipe` for so many optimizer steps.

    arms: the folder of all arms. kept: checkpoints that are kept on the way.
    """
    selection, student, pool = data.selections[name], data.student, data.trajectories
    held_out = pool.find_held_out()
    identity: dict[str, Any] = {
        "student": student.identity() | {"lora": student.lora, "dtype": data.dtype, "attention": student.attention},
        "tokens": pool.identity,
        "rows": _hash_array(selection.row),
        "weights": _hash_array(selection.weight) if recipe.weighted else None,
        "held_out": [_hash_array(held_out), _hash_array(pool.correct[held_out])],
        "versions": formula_versions("training", "tokens", "forward", libraries=STUDENT_LIBRARIES),
        "steps": steps,
        "seed": data.seed,
        "kept": kept,
        **data.identify_training(recipe),
    }
    folder = arms / identity_hash(identity)
    return Arm(name=name, rule=rule, selection=selection, recipe=recipe, steps=steps, identity=identity, folder=folder)


def _hash_array(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def train(
    arm: Arm,
    data: TrajectoryDataModule,
    *,
    make_trainer: Callable[..., Trainer],
    experiment_logger: Any = None,
    callbacks: Sequence[Callback] = (),
    plan: Plan | None = None,
    validate: bool = True,
) -> None:
    """Train the arm's student (all ranks), from where it was if it was interrupted.

    make_trainer: makes a Trainer with further settings. plan: how ranks learn what rank 0 found; None: there is one
    rank. validate: whether held-out losses are computed, if anything is held out.
    """
    assert arm.selection is not None
    if is_main():
        arm.folder.mkdir(parents=True, exist_ok=True)
    found = find_checkpoint(arm.last)
    start_path = _locate_start(arm, data)
    known = {
        "last": str(found) if found else None,
        "start": read_json(start_path) if validate and start_path.is_file() else None,
    }
    if plan is not None:
        known = plan.decide(f"training {arm.folder.name}", known)
    last, start_points = known["last"], known["start"]
    if last:
        logger.info("%s goes on from %s", arm.name, last)

    data.set_active_arm(arm.name, arm.recipe)
    module = SFTModule(student=data.student, recipe=arm.recipe, steps=arm.steps, seed=data.seed, folder=arm.folder)
    if start_points is not None:
        module.held_out, module.curve = {"start": start_points["all"]}, [start_points["curve"]]
    validate_every = max(1, arm.steps // arm.recipe.validations)
    has_held_out = validate and len(data.held_out_sample) > 0
    saver = CheckpointSaver(
        arm.last, every=arm.recipe.checkpoint_every, validate_every=validate_every if has_held_out else None
    )
    trainer = make_trainer(
        max_steps=arm.steps,
        callbacks=[*callbacks, saver],
        enable_checkpointing=False,  # Lightning's own
        logger=experiment_logger or False,
        num_sanity_val_steps=-1 if start_points is None else 0,  # all held-out rows, before the first step
        limit_val_batches=None if has_held_out else 0,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        inference_mode=False,  # what a divided student gathers in it could not be trained afterwards
    )
    start = time.monotonic()
    trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    assert trainer.global_step == arm.steps, f"{trainer.global_step} of {arm.steps} optimizer steps done"
    if has_held_out and module.held_out.get("end", {}).get("step") != arm.steps:
        trainer.validate(module, datamodule=data, verbose=False)

    state = module.parallelism.collect_state(module.student_model)
    facts: dict[str, Any] = {
        "identity": arm.identity,
        "student": describe_student(data.student),
        "steps": arm.steps,
        "seconds": time.monotonic() - start,
        "trajectories": len(arm.selection.row),
        "visits": list(arm.recipe.count_visits(len(arm.selection.row), arm.steps)),
        "tokens": int(data.trajectories.span_tokens[arm.selection.row].sum()),
        "curve": module.curve,
        "held_out": module.held_out,
        "training": collect_training_facts(trainer, module),
    }
    if facts["training"]["steps"]:
        logger.info("%s: %s", arm.name, describe_training(facts["training"]))
    if is_main():
        save_student(module.student_model, data.trajectories.chat, arm.checkpoint, student=data.student, state=state)
        if has_held_out and start_points is None:
            write_json(start_path, {"all": module.held_out["start"], "curve": module.curve[0]})
        write_json(arm.folder / "trained.json", facts)
        shutil.rmtree(arm.folder / "training", ignore_errors=True)
    del trainer, module, state
    _release_student(data)
    barrier()


def _locate_start(arm: Arm, data: TrajectoryDataModule) -> Path:
    """Name the file of the untrained student's held-out losses, which all arms of a student and pool begin with."""
    shared = ("student", "tokens", "held_out", "versions", "precision")
    identity = {name: arm.identity[name] for name in shared} | {"curve": _hash_array(data.held_out_sample)}
    return data.cache / "held_out" / f"{identity_hash(identity)}.json"


def describe_student(student: Student) -> dict[str, Any]:
    """Return the arguments of `Student`, paths made absolute and the revision pinned to the commit that was trained."""
    settings = {field.name: getattr(student, field.name) for field in dataclasses.fields(student)}
    for name in ("path", "template"):
        settings[name] = _make_absolute(settings[name])
    if settings["adapter"]:
        settings["adapter"] = [_make_absolute(folder) for folder in student.adapters]
    if settings["path"] is None:
        settings["revision"] = student.identity()["revision"]
    return settings


def _make_absolute(path: str | None) -> str | None:
    """Make the path of an existing file absolute; `shipped:tiny`, `chatml` and such stay as they are."""
    return str(Path(path).absolute()) if path is not None and Path(path).exists() else path


def _release_student(data: TrajectoryDataModule) -> None:
    """Release the trained student's memory. It is in a reference cycle, so collect explicitly."""
    trainer, data.trainer = data.trainer, None
    device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
    del trainer
    gc.collect()
    release_memory(device)


def read_held_out_at_start(arms: Sequence[Arm]) -> dict[str, float]:
    """Read the held-out loss of the student before training, which any trained arm knows."""
    for arm in arms:
        if arm.selection is not None and arm.is_trained:
            return read_json(arm.folder / "trained.json")["held_out"].get("start", {})
    return {}


def read_arm(arm: Path, setting: str = "") -> dict[str, Any]:
    """Read trained.json of the arm that `setting` (such as "checkpoint=") names. Raises LarkError that says what to
    name instead.
    """
    if not is_complete(arm, "trained.json") or not (arm / "checkpoint").is_dir():
        if inside := [str(arm / name) for name in ("selector", "baseline") if is_complete(arm / name, "trained.json")]:
            raise LarkError(f"{setting}{arm} is a run, not an arm; name {' or '.join(inside)}")
        what = "is the student before training" if is_complete(arm, "metrics.json") else "holds no trained arm"
        raise LarkError(f"{setting}{arm} {what}; name a run's selector/ or baseline/, or a trained folder in logs/arms")
    trained = read_json(arm / "trained.json")
    if "identity" not in trained:
        raise LarkError(f"{arm}/trained.json is of an earlier version; train the arm again")
    return trained

"""An arm: one student trained on one selection with one seed, kept in logs/arms/<hash of everything it depends on>.

selection.jsonl, selection.json   what it was trained on
training/last.ckpt                while it trains; a killed arm goes on from here
checkpoint/, loss.csv, trained.json  once it is trained
samples-<set>.jsonl, metrics.json    once it is evaluated
arm.json                          written last: its presence means the folder is complete
"""

import gc
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from lark.common.cache import identity_hash, is_complete, read_json, write_json
from lark.common.ranks import barrier, is_main
from lark.common.versions import STUDENT_LIBRARIES, formula_versions
from lark.selection.export import export_selection
from lark.selection.selection import Selection
from lark.student.memory import release_memory
from lark.student.student import save_student
from lark.training import training_progress
from lark.training.datamodule import TrajectoryDataModule
from lark.training.model_card import arm_facts, write_card
from lark.training.recipe import Recipe
from lark.training.saver import Saver, newest_checkpoint
from lark.training.sft_module import SFTModule

Share = Callable[[str, Any], Any]
"""Gives every rank the value that rank 0 passes under a name."""


def alone(name: str, value: Any) -> Any:
    """Return the value: the `Share` of a process that works alone."""
    return value


@dataclass(frozen=True, kw_only=True)
class Arm:
    """name: before | baseline | selector | warm_up. The arm `before` has no selection and no training."""

    name: str
    rule: str
    selection: Selection | None
    recipe: Recipe
    identity: dict[str, Any]
    folder: Path

    @property
    def trained(self) -> bool:
        return self.selection is None or is_complete(self.folder, "trained.json")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def last(self) -> Path:
        """Where its training is saved while it goes on."""
        return self.folder / "training" / "last.ckpt"


def make_arm(
    name: str,
    rule: str,
    data: TrajectoryDataModule,
    *,
    steps: int,
    precision: str,
    recipe: Recipe,
    evaluation: dict[str, Any],
    arms: Path,
    kept: int = 0,
) -> Arm:
    """The arm of `data.selections[name]` (none for "before") trained by `recipe`, with its folder.

    A trained arm may be evaluated anew in its folder; "before" is nothing but an evaluation, so `evaluation` (its
    identity) is part of what it is. `kept` counts checkpoints that are kept on the way.
    """
    selection, student = data.selections.get(name), data.student
    verdicts = hashlib.sha256(data.trajectories.correct[data.trajectories.is_held_out].tobytes()).hexdigest()
    identity: dict[str, Any] = {
        "student": student.identity() | {"lora": student.lora, "dtype": data.dtype, "attention": student.attention},
        "chat": data.trajectories.chat.span_identity,
        "max_length": [data.task.max_length, data.task.overlong],
        "held_out": [data.trajectories.fingerprint, data.task.held_out, verdicts],
        "versions": formula_versions("training", "tokens", "forward", libraries=STUDENT_LIBRARIES),
    }
    if selection is None:
        identity["evaluation"] = evaluation
    else:
        identity |= {
            "rows": hashlib.sha256(selection.row.tobytes()).hexdigest(),
            "weights": hashlib.sha256(selection.weight.tobytes()).hexdigest(),
            "recipe": recipe.identity(),
            "steps": steps,
            "seed": data.seed,
            "precision": precision,
            "kept": kept,
        }
    return Arm(
        name=name,
        rule=rule,
        selection=selection,
        recipe=recipe,
        identity=identity,
        folder=arms / identity_hash(identity),
    )


def write_selection(name: str, rule: str, data: TrajectoryDataModule, folder: Path) -> None:
    """Write selection.jsonl of `data.selections[name]`, for this and other trainers, and selection.json, which says how
    it came about.
    """
    selection = data.selections[name]
    export_selection(selection, data.trajectories.read_rows, folder / "selection.jsonl", name=rule)
    needs = data.rules[name].needs if name in data.rules else ()
    inputs = {
        "pool": data.trajectories.fingerprint,
        "asked": data.scorer.name,
        "passes": {data.pass_folder(need).name: need.name for need in needs},
        "seed": data.seed,
        "dropped_rows": data.dropped,
    }
    write_json(folder / "selection.json", {"inputs": inputs, **selection.record})


def train(
    arm: Arm,
    data: TrajectoryDataModule,
    *,
    steps: int,
    make_trainer: Callable[..., Trainer],
    logger: Any,
    say: Callable[[str], None],
    callbacks: Sequence[Callback] = (),
    share: Share = alone,
    run: Path | None = None,
) -> None:
    """Train the arm's student (all ranks), from where it was if it was interrupted. `share` is how ranks learn what
    rank 0 found.
    """
    assert arm.selection is not None
    if is_main():
        arm.folder.mkdir(parents=True, exist_ok=True)
        write_selection(arm.name, arm.rule, data, arm.folder)
    found = newest_checkpoint(arm.last)
    last = share(f"training {arm.folder.name}", str(found) if found else None)
    if last:
        say(f"{arm.name:<11} goes on from {last}")
    data.set_active_arm(arm.name, arm.recipe)
    module = SFTModule(student=data.student, recipe=arm.recipe, steps=steps, seed=data.seed, folder=arm.folder)
    validate_every = max(1, steps // arm.recipe.validations)
    saver = Saver(
        arm.last,
        every=arm.recipe.checkpoint_every,
        validate_every=validate_every if len(data.held_out_coefficients()[0]) else None,
    )
    trainer = make_trainer(
        max_steps=steps,
        callbacks=[*callbacks, saver],
        enable_checkpointing=False,  # Lightning's own
        logger=logger or False,
        num_sanity_val_steps=-1,  # the whole held-out set: the curve's point before the first step
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        inference_mode=False,  # what a divided student gathers in it could not be trained afterwards
    )
    start = time.monotonic()
    trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    assert trainer.global_step == steps, f"{trainer.global_step} of {steps} optimizer steps done"
    if module.curve and module.curve[-1]["step"] != steps:
        trainer.validate(module, datamodule=data, verbose=False)
    went = training_progress.facts_of(trainer, module)
    if went["steps"]:
        data.say(f"{arm.name:<11} {training_progress.describe(went)}")
    state = module.parallelism.collect_state(module.student_model)
    if is_main():
        save_student(module.student_model, data.trajectories.chat, arm.checkpoint, student=data.student, state=state)
    barrier()
    facts: dict[str, Any] = {"name": arm.name, "steps": steps, "seconds": time.monotonic() - start}
    facts |= {**_cost(arm, data), "curve": module.curve, "training": went}
    del trainer, module
    _release_student(data)
    if is_main():
        facts |= arm_facts(arm, data, run)
        write_card(arm.checkpoint, facts, arm.folder)
        write_json(arm.folder / "trained.json", facts)
        shutil.rmtree(arm.folder / "training", ignore_errors=True)
    barrier()


def _release_student(data: TrajectoryDataModule) -> None:
    """Release the trained student's memory. It is in a reference cycle, so collect explicitly."""
    trainer, data.trainer = data.trainer, None
    device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
    del trainer
    gc.collect()
    release_memory(device)


def _cost(arm: Arm, data: TrajectoryDataModule) -> dict[str, Any]:
    assert arm.selection is not None
    tokens = int(data.trajectories.span_tokens[arm.selection.row].sum())
    return {"trajectories": len(arm.selection.row), "tokens": tokens}


def held_out_at_start(data: TrajectoryDataModule, arms: list[Arm]) -> dict[str, float]:
    """Held-out loss of the student before training: any trained arm's curve begins with it."""
    for arm in arms:
        if arm.selection is not None and is_complete(arm.folder, "trained.json"):
            curve = read_json(arm.folder / "trained.json")["curve"]
            if curve:
                return curve[0]
    return {}

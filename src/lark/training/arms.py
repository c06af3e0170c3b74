"""An arm: one student trained on one selection with one seed, kept in logs/arms/<hash of everything it depends on>.

selection.jsonl, selection.json   what it was trained on
training/last.ckpt                while it trains; a killed arm goes on from here
refreshed/<step>/                 what it chose anew while it trained (lark.training.refresh)
checkpoint/, loss.csv, trained.json  once it is trained
samples-<set>.jsonl, metrics.json    once it is evaluated
arm.json                          written last: its presence means the folder is complete
"""

import gc
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from lark.common.cache import complete, identity_hash, read_json, write_json
from lark.common.ranks import barrier, is_main
from lark.common.versions import STUDENT_LIBRARIES, formula_versions
from lark.selection.selection import Selection, export
from lark.student.distributed import whole_state
from lark.student.memory import release_memory
from lark.student.student import save_student
from lark.training import training_progress
from lark.training.datamodule import TrajectoryDataModule
from lark.training.model_card import arm_facts, write_card
from lark.training.recipe import Recipe
from lark.training.refresh import (
    MANIFEST,
    Segment,
    Share,
    alone,
    choose_anew,
    describe,
    facts_of,
    forget_student,
    read_choice,
    refresh_identity,
    segments,
)
from lark.training.saver import Saver, newest_checkpoint
from lark.training.sft_module import SFTModule


@dataclass(frozen=True, kw_only=True)
class Arm:
    """name: before | baseline | selector | warm_up. The arm `before` has no selection and no training.

    refresh: optimizer steps after which its rule chooses anew; None: it never does.
    """

    name: str
    rule: str
    selection: Selection | None
    recipe: Recipe
    identity: dict[str, Any]
    folder: Path
    refresh: int | None = None

    @property
    def trained(self) -> bool:
        return self.selection is None or complete(self.folder, "trained.json")

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
    refresh = data.rules[name].refresh if name in data.rules else None
    if refresh is not None and refresh >= steps:  # the first choice is the only one
        refresh = None
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
        if refresh is not None:
            identity["refresh"] = refresh_identity(data, name)
    return Arm(
        name=name,
        rule=rule,
        selection=selection,
        recipe=recipe,
        identity=identity,
        folder=arms / identity_hash(identity),
        refresh=refresh,
    )


def write_selection(
    name: str, rule: str, data: TrajectoryDataModule, folder: Path, facts: Mapping[str, Any] | None = None
) -> None:
    """selection.jsonl of `data.selections[name]` for this and other trainers, and selection.json: how it came about,
    with further `facts`.
    """
    selection = data.selections[name]
    export(selection, data.trajectories.read_rows, folder / "selection.jsonl", name=rule)
    needs = data.rules[name].needs if name in data.rules else ()
    inputs = {
        "pool": data.trajectories.fingerprint,
        "asked": data.scorer.name,
        "passes": {data.pass_folder(need).name: need.name for need in needs},
        "seed": data.seed,
        "dropped_rows": data.dropped,
    }
    write_json(folder / MANIFEST, {"inputs": inputs, **(facts or {}), **selection.record})


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
    """Train the arm's student (all ranks), from where it was if it was interrupted; an arm that is refreshed, segment
    by segment. `callbacks` see the Trainer of every segment. `share` is how ranks learn what rank 0 found.
    """
    assert arm.selection is not None
    if is_main():
        arm.folder.mkdir(parents=True, exist_ok=True)
        write_selection(arm.name, arm.rule, data, arm.folder)
    found, parts = newest_checkpoint(arm.last), segments(arm.folder, steps, arm.refresh)
    begun = max(i for i, part in enumerate(parts) if i == 0 or (found and part.begun))
    begun, last = share(f"training {arm.folder.name}", [begun, str(found) if found else None])
    if last:
        say(f"{arm.name:<11} goes on from {last}")
    facts: dict[str, Any] = {"name": arm.name, "steps": steps, "seconds": 0.0, **_cost(arm, data)}
    for i, part in enumerate(parts[begun:], begun):
        choice = _choice(arm, data, parts[: i + 1], share=share, say=say, logger=logger)
        data.use(arm.name, arm.recipe, choice, part.first)
        start = time.monotonic()
        keep = parts[i + 1].student if i + 1 < len(parts) else arm.checkpoint
        facts |= _train_part(
            arm, data, part, keep, last, steps=steps, make_trainer=make_trainer, logger=logger, more=callbacks
        )
        facts["seconds"] += time.monotonic() - start
        _let_go(data)
        last = arm.last if i + 1 < len(parts) else None  # the end of a segment is always saved
    if is_main():
        if arm.refresh:
            facts["refreshes"] = [read_json(part.folder / MANIFEST)["refresh"] for part in parts[1:]]
        facts |= arm_facts(arm, data, run)
        write_card(arm.checkpoint, facts, arm.folder)
        write_json(arm.folder / "trained.json", facts)
        shutil.rmtree(arm.folder / "training", ignore_errors=True)
    barrier()


def _train_part(
    arm: Arm,
    data: TrajectoryDataModule,
    part: Segment,
    keep: Path,
    last: str | Path | None,
    *,
    steps: int,
    make_trainer: Callable[..., Trainer],
    logger: Any,
    more: Sequence[Callback],
) -> dict[str, Any]:
    """Train to the segment's end, from the checkpoint `last` if there is one, and `keep` the student as it is then; the
    held-out curve so far, and how it went.
    """
    module = SFTModule(student=data.student, recipe=arm.recipe, steps=steps, seed=data.seed, folder=arm.folder)
    validate_every = max(1, steps // arm.recipe.validations)
    saver = Saver(
        arm.last,
        every=arm.recipe.checkpoint_every,
        validate_every=validate_every if len(data.held_out_coefficients()[0]) else None,
        end=part.end if part.end < steps else None,
    )
    trainer = make_trainer(
        max_steps=part.end,
        callbacks=[*more, saver],
        enable_checkpointing=False,  # Lightning's own
        logger=logger or False,
        num_sanity_val_steps=-1,  # the whole held-out set: the curve's point before the first step
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        inference_mode=False,  # what a divided student gathers in it could not be trained afterwards
    )
    trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    assert trainer.global_step == part.end, f"{trainer.global_step} of {part.end} optimizer steps done"
    if part.end == steps and module.curve and module.curve[-1]["step"] != steps:
        trainer.validate(module, datamodule=data, verbose=False)
    went = training_progress.facts_of(trainer, module)
    if went["steps"]:
        data.say(f"{arm.name:<11} {training_progress.describe(went)}")
    state = whole_state(module.student_model) if module.sharded else None
    if is_main():
        save_student(module.student_model, data.trajectories.chat, keep, student=data.student, state=state)
    barrier()
    return {"curve": module.curve, "training": went}


def _choice(
    arm: Arm,
    data: TrajectoryDataModule,
    parts: Sequence[Segment],
    *,
    share: Share,
    say: Callable[[str], None],
    logger: Any,
) -> Selection:
    """What the last of `parts` is trained on: the arm's selection, or what the current student makes of the pool."""
    assert arm.selection is not None
    *before, part = parts
    if not before:
        return arm.selection
    if not share(f"refreshed {arm.folder.name} {part.first}", complete(part.folder, MANIFEST)):
        anew = choose_anew(part, arm.name, data, share=share)
        if is_main():
            previous = read_choice(before[-1], data.trajectories) if before[-1].first else arm.selection
            facts = facts_of(part, arm.name, anew, previous.row)
            write_selection(arm.name, arm.rule, anew, part.folder, facts)
            say(describe(facts, arm.name))
            if logger:
                logger.log_metrics({"refresh/stay_share": facts["refresh"]["stay_share"]}, step=part.first)
    if is_main():
        forget_student(part)
    barrier()
    return read_choice(part, data.trajectories)


def _let_go(data: TrajectoryDataModule) -> None:
    """Of the student in training, which would take its memory from what comes next: it refers to itself."""
    trainer, data.trainer = data.trainer, None
    device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
    del trainer
    gc.collect()
    release_memory(device)


def _cost(arm: Arm, data: TrajectoryDataModule) -> dict[str, Any]:
    assert arm.selection is not None
    tokens = int(data.trajectories.span_tokens[arm.selection.row].sum())
    return {"trajectories": len(arm.selection.row), "tokens": tokens}


def final_loss(arm: Arm) -> float:
    """Held-out loss at the end (nats/token), infinite if training diverged."""
    loss = read_json(arm.folder / "trained.json")["curve"][-1]["held_out/loss"] if arm.trained else None
    return math.inf if loss is None else loss


def held_out_at_start(data: TrajectoryDataModule, arms: list[Arm]) -> dict[str, float]:
    """Held-out loss of the student before training: any trained arm's curve begins with it."""
    for arm in arms:
        if arm.selection is not None and complete(arm.folder, "trained.json"):
            curve = read_json(arm.folder / "trained.json")["curve"]
            if curve:
                return curve[0]
    return {}

"""An arm: one student trained on one selection with one seed, kept in logs/arms/<hash of everything it depends on>.

selection.jsonl, selection.json   what it was trained on
training/last.ckpt                while it trains; a killed arm goes on from here
checkpoint/, loss.csv, trained.json  once it is trained
samples-<set>.jsonl, metrics.json    once it is evaluated
arm.json                          written last: its presence means the folder is complete
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lark.cache import complete, identity_hash, read_json, source_hash, write_json, write_text
from lark.chat import Chat
from lark.data import TrajectoryDataModule
from lark.evaluate import Sampling, evaluate, read_samples, summarise
from lark.models import save_student
from lark.plan import barrier, is_main
from lark.selection import Selection, export
from lark.student import Recipe, SFTModule
from lark.verify import Checker

_SOURCES = ("chat", "packing", "stats", "models", "student", "batches", "trajectories", "arms")


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
        return self.selection is None or complete(self.folder, "trained.json")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


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
    selection = data.selections.get(name)
    student = data.student
    verdicts = hashlib.sha256(data.trajectories.correct[data.trajectories.is_held_out].tobytes()).hexdigest()
    identity: dict[str, Any] = {
        "student": student.identity() | {"lora": student.lora, "dtype": student.dtype, "attention": student.attention},
        "chat": data.trajectories.chat.span_identity,
        "max_length": [data.task.max_length, data.task.overlong],
        "held_out": [data.trajectories.fingerprint, data.task.held_out, verdicts],
        "sources": source_hash(f"lark.{module}" for module in (*_SOURCES, *(["warmup"] if kept else []))),
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
    folder = arms / identity_hash(identity)
    return Arm(name=name, rule=rule, selection=selection, recipe=recipe, identity=identity, folder=folder)


def write_selection(name: str, rule: str, data: TrajectoryDataModule, folder: Path) -> None:
    """selection.jsonl of `data.selections[name]` for this and other trainers, and selection.json: how it came about."""
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
) -> None:
    """Train the arm's student (all ranks), from its last checkpoint if it was interrupted."""
    assert arm.selection is not None
    if is_main():
        arm.folder.mkdir(parents=True, exist_ok=True)
        write_selection(arm.name, arm.rule, data, arm.folder)
    module = SFTModule(student=data.student, recipe=arm.recipe, steps=steps, seed=data.seed, folder=arm.folder)
    last = arm.folder / "training" / "last.ckpt"
    validate_every = max(1, steps // arm.recipe.validations)
    held_out = len(data.held_out_coefficients()[0])
    saver = Saver(last, every=arm.recipe.checkpoint_every, validate_every=validate_every if held_out else None)
    trainer = make_trainer(
        max_steps=steps,
        callbacks=[*callbacks, saver],
        enable_checkpointing=False,  # Lightning's own
        logger=logger or False,
        num_sanity_val_steps=-1,  # the whole held-out set: the curve's point before the first step
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
    )
    resume = last if last.exists() else None
    start = time.monotonic()
    if resume:
        say(f"{arm.name:<11} goes on from {resume}")
    trainer.fit(module, datamodule=data.use(arm.name, arm.recipe), ckpt_path=resume, weights_only=True)
    assert trainer.global_step == steps, f"{trainer.global_step} of {steps} optimizer steps done"
    if module.curve and module.curve[-1]["step"] != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    if is_main():
        save_student(module.student_model, data.trajectories.chat, arm.checkpoint)
        figures = {"steps": steps, "seconds": time.monotonic() - start, "curve": module.curve, **_cost(arm, data)}
        write_json(arm.folder / "trained.json", {"name": arm.name, **figures})
        shutil.rmtree(arm.folder / "training", ignore_errors=True)
    barrier()


class Saver(Callback):
    """Replaces `path` every `every` optimizer steps; where the step is followed by validation (every
    `validate_every` steps; None: never), after that.

    So a checkpoint holds the held-out point of its step. Lightning's ModelCheckpoint saves ahead of validation, which
    a resumed training then skips.
    """

    def __init__(self, path: Path, *, every: int, validate_every: int | None):
        self.path, self.every, self.validate_every = path, every, validate_every

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.validate_every is None or trainer.global_step % self.validate_every:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)


def _cost(arm: Arm, data: TrajectoryDataModule) -> dict[str, Any]:
    assert arm.selection is not None
    tokens = int(data.trajectories.span_tokens[arm.selection.row].sum())
    return {"trajectories": len(arm.selection.row), "tokens": tokens}


def held_out_at_start(data: TrajectoryDataModule, arms: list[Arm]) -> dict[str, float]:
    """Held-out loss of the student before training: any trained arm's curve begins with it."""
    for arm in arms:
        if arm.selection is not None and complete(arm.folder, "trained.json"):
            curve = read_json(arm.folder / "trained.json")["curve"]
            if curve:
                return curve[0]
    return {}


def load_arm(arm: Arm, data: TrajectoryDataModule, device: torch.device) -> torch.nn.Module:
    """The arm's student as it is on disk (the untrained one for "before"), on `device`, in eval mode."""
    dtype = data.student.resolve_dtype(device)
    student = data.student
    model: Any = student.load_model(dtype) if arm.selection is None else student.load_trained(arm.checkpoint, dtype)
    return model.to(device).eval()


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
    """Sample and check answers to every evaluation set; each rank its share of the problems, rank 0 the sum.

    Leaves samples-<set>.jsonl and metrics.json in the arm's folder. An arm that was evaluated with the same settings
    on the same problems before is left as it is.
    """
    identity = evaluation_identity(data, problems, sampling)
    if evaluated(arm, identity):
        return
    model = load_arm(arm, data, device)
    chat = data.trajectories.chat
    for name, rows in problems.items():
        mine = rows[rank::world]
        if mine:
            evaluate(
                model,
                chat.tokenizer,
                chat.encode_prompt,
                mine,
                checker=checker,
                max_new_tokens=data.task.max_new_tokens,
                seed=data.seed,
                stop_ids=stop_ids(chat),
                path=_part(arm.folder, name, rank, world),
                system=data.task.system,
                label=f"{arm.name} {name}",
                **vars(sampling),
            )
    barrier()
    if is_main():
        metrics = {name: _merge(arm.folder, name, rows, sampling, world) for name, rows in problems.items()}
        write_json(arm.folder / "metrics.json", {"identity": identity, "sets": metrics})
    barrier()


def _part(folder: Path, name: str, rank: int, world: int) -> Path:
    return folder / f"samples-{name}.rank{rank}of{world}.jsonl"


def _merge(folder: Path, name: str, problems: list[dict[str, Any]], sampling: Sampling, world: int) -> dict[str, Any]:
    """Samples of all ranks into samples-<name>.jsonl, in the order of the problems; their metrics."""
    parts = [_part(folder, name, rank, world) for rank in range(min(world, len(problems)))]
    order = {problem["problem_id"]: i for i, problem in enumerate(problems)}
    records = sorted(
        (record for part in parts for record in read_samples(part)),
        key=lambda record: (order[record["problem_id"]], record["sample"]),
    )
    write_text(folder / f"samples-{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for leftover in folder.glob(f"samples-{name}.rank*"):  # also of a killed run with another number of ranks
        leftover.unlink()
    return summarise(records, pass_at=sampling.pass_at)


def evaluation_identity(
    data: TrajectoryDataModule, problems: dict[str, list[dict[str, Any]]], sampling: Sampling
) -> dict[str, Any]:
    task = data.task
    settings = {k: v for k, v in vars(sampling).items() if k != "batch_size"}
    return {
        "sets": list(problems),
        "problems": identity_hash({"problems": problems}),
        "sampling": settings | {"pass_at": list(sampling.pass_at)},
        "task": [task.checker, task.pattern, task.system, task.max_new_tokens],
        "seed": data.seed,
        "dtype": data.dtype,
        "sources": source_hash(["lark.evaluate", "lark.generate", "lark.verify", "lark.metrics"]),
    }


def evaluated(arm: Arm, identity: dict[str, Any]) -> bool:
    if not identity["sets"]:
        return True
    path = arm.folder / "metrics.json"
    return path.exists() and read_json(path)["identity"] == identity


def stop_ids(chat: Chat) -> list[int]:
    """What ends an answer: the end-of-turn token, which training teaches, and the tokenizer's own end token, which a
    base model knows.
    """
    row = chat.encode([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])[0]
    own = chat.tokenizer.eos_token_id
    ends = {row.input_ids[row.prompt_tokens + row.end_of_turn], *([own] if isinstance(own, int) else own or [])}
    return sorted(ends)

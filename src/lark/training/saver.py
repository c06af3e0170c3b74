"""Checkpoints of a training that goes on: every so many optimizer steps, at its end, and when SIGTERM comes."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lark.common import signals as termination


class Saver(Callback):
    """Replaces `path` every `every` optimizer steps and before obeying a signal; where the step is followed by validation
    (every `validate_every` steps; None: never), after that.

    So a checkpoint holds the held-out point of its step. Lightning's ModelCheckpoint saves ahead of validation, which
    a resumed training then skips.
    """

    def __init__(self, path: Path, *, every: int, validate_every: int | None):
        self.path, self.every, self.validate_every = path, every, validate_every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        termination.defer()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.validate_every is None or trainer.global_step % self.validate_every:
            self._step_done(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._step_done(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        termination.resume()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        termination.stop_deferring()

    def _step_done(self, trainer: Trainer) -> None:
        step, stop = trainer.global_step, _any_rank(trainer, termination.is_requested())
        if stop or step % self.every == 0:
            replace_checkpoint(trainer, self.path)
        if stop:
            if trainer.is_global_zero:
                said = f"stopped     by {termination.get_name()} after optimizer step {step}; the same command goes on from"
                print(f"{said} {self.path}", flush=True)
            termination.exit_now()


def _any_rank(trainer: Trainer, here: bool) -> bool:
    if trainer.world_size == 1:
        return here
    flag = torch.tensor(float(here), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)


def replace_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write the Trainer's state (all ranks take part) so that `path` is at all times a whole checkpoint, old or new,
    or has its old one beside it (see `newest_checkpoint`).

    A divided student's is a folder, which cannot be replaced in one act.
    """
    partial, old = path.with_suffix(".partial"), path.with_suffix(".old")
    if trainer.is_global_zero:
        _remove(partial)
    trainer.strategy.barrier("checkpoint-begins")
    trainer.save_checkpoint(partial)
    trainer.strategy.barrier("checkpoint-written")
    if trainer.is_global_zero:
        if path.is_dir():
            _remove(old)
            path.rename(old)
        partial.replace(path)
        _remove(old)
    trainer.strategy.barrier("checkpoint-replaced")


def newest_checkpoint(path: Path) -> Path | None:
    """What a training that was saved to `path` goes on from; None if there is nothing yet."""
    return next((one for one in (path, path.with_suffix(".old")) if one.exists()), None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Accompanies a training: checkpoints that an interrupted one goes on from, and its progress."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lark.common import signals
from lark.common.log import logger
from lark.common.progress_line import show_progress
from lark.scoring.progress import ProgressLine

WINDOW = 5  # optimizer steps that rates are taken over


class CheckpointSaver(Callback):
    """Replaces `path` every `every` optimizer steps and before obeying a signal; where validation follows the step
    (every `validate_every` steps; None: never), after that.

    So a checkpoint holds the held-out point of its step. Lightning's ModelCheckpoint saves ahead of validation, which a
    resumed training then skips; and on an exception, which a signal may raise in the middle of a step.
    """

    def __init__(self, path: Path, *, every: int, validate_every: int | None):
        self.path, self.every, self.validate_every = path, every, validate_every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.defer()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.validate_every is None or trainer.global_step % self.validate_every:
            self._finish_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._finish_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.resume()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        signals.stop_deferring()

    def _finish_step(self, trainer: Trainer) -> None:
        asked = torch.tensor(float(signals.is_requested()), device=trainer.strategy.root_device)
        is_asked = bool(trainer.strategy.reduce(asked, reduce_op="sum") > 0)  # of any rank
        if is_asked or trainer.global_step % self.every == 0:
            replace_checkpoint(trainer, self.path)
        if is_asked:
            logger.warning(
                f"stopped by {signals.get_signal_name()} after optimizer step {trainer.global_step}; the same "
                f"command goes on from {self.path}"
            )
            signals.exit_now()


def replace_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write the Trainer's state (all ranks take part) so that `path` is at all times a whole checkpoint, old or new,
    or has its old one beside it (see `find_checkpoint`).

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


def find_checkpoint(path: Path) -> Path | None:
    """Find what a training that was saved to `path` goes on from; None if there is nothing yet."""
    return next((one for one in (path, path.with_suffix(".old")) if one.exists()), None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class TrainingProgress(ProgressLine):
    """Shows optimizer steps in a progress line, and logs rates and memory; the line is rank 0's, rates are of all
    ranks: that of rank 0 times their number.
    """

    def __init__(self, label: str):
        self.label = label
        self.seconds = self.mark = 0.0
        """Spent on optimizer steps, without validation and checkpoints; the clock when one began."""
        self.trajectories = self.memory = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor = Throughput(world_size=trainer.world_size, window_size=WINDOW)
        self.first = trainer.global_step
        if trainer.is_global_zero:
            self.bar = show_progress(self.label, trainer.max_steps, "steps", initial=trainer.global_step)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, *_: Any) -> None:
        self.mark = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += time.monotonic() - self.mark
        self.trajectories += len(batch.rows)
        self.memory = max(self.memory, measure_memory(pl_module.device))
        done = trainer.global_step - self.first
        self.monitor.update(
            time=self.seconds,
            batches=done,
            samples=max(self.trajectories, done),
            lengths=pl_module.totals["trained_tokens"],
        )
        rate = self.monitor.compute().get("items_per_sec" if trainer.world_size > 1 else "device/items_per_sec")
        rates = {} if rate is None else {"trained_tokens_per_s": float(rate)}
        left = self.seconds / done * (trainer.max_steps - trainer.global_step)
        points = {**rates, "seconds_left": left, "memory_gb": self.memory / 1e9}
        pl_module.log_dict({f"train/{name}": value for name, value in points.items()})
        if self.bar is not None:
            shown = [f"loss {float(trainer.callback_metrics['train/loss']):.3f}"]
            shown += [f"{rate:,.0f} trained tokens/s" for rate in rates.values()]
            self.bar.set_postfix_str(", ".join(shown), refresh=False)
            self.bar.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def summarise(self, trained_tokens: int) -> dict[str, float]:
        """Compute rates and memory of the whole training, by the names that trained.json gets."""
        if not self.seconds:
            return {}
        rate = self.monitor.world_size * trained_tokens / self.seconds
        return {"step_seconds": self.seconds, "memory_gb": self.memory / 1e9, "trained_tokens_per_s": rate}


def measure_memory(device: torch.device) -> int:
    """Measure the most bytes that tensors took on an accelerator so far; on a CPU what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def collect_training_facts(trainer: Trainer, module: Any) -> dict[str, Any]:
    """Collect how the training went since the process began: tokens and steps of this rank, rates of all ranks."""
    progress = next((one for one in trainer.callbacks if isinstance(one, TrainingProgress)), None)  # type: ignore[attr-defined]
    measured = progress.summarise(module.totals["trained_tokens"]) if progress is not None else {}
    return {"micro_batch_tokens": module.budget, "unpacked_reason": module.unpacked_reason, **module.totals, **measured}


def describe_training(facts: Mapping[str, Any]) -> str:
    """Describe what `collect_training_facts` gave, for the log."""
    layout = f"one row at a time ({facts['unpacked_reason']})" if facts["unpacked_reason"] else "packed"
    halved = f" (halved {facts['halvings']} times for want of memory)" if facts["halvings"] else ""
    text = (
        f"{layout}; micro-batches of {facts['micro_batch_tokens']:,} tokens{halved}; {facts['row_tokens']:,} tokens of "
        f"trajectories in {facts['computed_tokens']:,} computed ({facts['row_tokens'] / facts['computed_tokens']:.0%})"
    )
    if "trained_tokens_per_s" in facts:
        text += f"; {facts['trained_tokens_per_s']:,.0f} trained tokens/s; {facts['memory_gb']:.2f} GB"
    return text

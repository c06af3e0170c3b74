"""The progress of a training: a line with the time left, and for the Trainer's logger tokens a second and memory."""

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.throughput import Throughput

from lark.common.progress_line import show_progress
from lark.scoring.progress import ProgressLine

WINDOW = 5  # optimizer steps that rates are taken over


class TrainingProgress(ProgressLine):
    """Counts optimizer steps. Line and points are of rank 0, rates of all ranks: that of rank 0 times their number."""

    def __init__(self, label: str):
        self.label = label
        self.rates: dict[str, float] = {}
        """Of the last steps, by the names that the logger gets."""
        self.seconds = self.mark = 0.0
        """Spent on optimizer steps, without validation and checkpoints; the clock when one began."""
        self.memory = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor = Throughput(world_size=trainer.world_size, window_size=WINDOW)
        self.first, self.trajectories = trainer.global_step, 0
        if trainer.is_global_zero:
            self.bar = show_progress(self.label, trainer.max_steps, "steps", initial=trainer.global_step)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, *_: Any) -> None:
        self.mark = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        self.seconds += now - self.mark
        done = trainer.global_step - self.first
        self.trajectories += len(batch.rows)
        self.memory = max(self.memory, memory_bytes(pl_module.device))
        totals = pl_module.totals
        self.monitor.update(
            time=self.seconds,
            batches=done,
            samples=max(self.trajectories, done),
            lengths=totals["trained_tokens"],
        )
        left = self.seconds / done * (trainer.max_steps - trainer.global_step)
        found = self.monitor.compute()
        name = "items_per_sec" if trainer.world_size > 1 else "device/items_per_sec"
        self.rates = {"trained_tokens_per_s": float(found[name])} if name in found else {}
        points = {**self.rates, "seconds_left": left, "memory_gb": self.memory / 1e9}
        pl_module.log_dict({f"train/{name}": value for name, value in points.items()})
        if self.bar is not None:
            rates = [f"{self.rates['trained_tokens_per_s']:,.0f} trained tokens/s"] if self.rates else []
            loss = float(trainer.callback_metrics["train/loss"])
            self.bar.set_postfix_str(", ".join([f"loss {loss:.3f}", *rates]), refresh=False)
            self.bar.update()

    def totals(self, trainer: Trainer, trained_tokens: int) -> dict[str, float]:
        """Rates and memory of the whole training, by the names that trained.json gets."""
        if not self.seconds:
            return {}
        found = {"step_seconds": self.seconds, "memory_gb": self.memory / 1e9}
        found["trained_tokens_per_s"] = trainer.world_size * trained_tokens / self.seconds
        return found

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()


def facts_of(trainer: Trainer, module: Any) -> dict[str, Any]:
    """How the training went since the process began: tokens and steps of this rank, rates of all ranks."""
    progress = next((one for one in trainer.callbacks if isinstance(one, TrainingProgress)), None)  # type: ignore[attr-defined]
    measured = progress.totals(trainer, module.totals["trained_tokens"]) if progress is not None else {}
    return {"micro_batch_tokens": module.budget, "unpacked_reason": module.unpacked_reason, **module.totals, **measured}


def describe(facts: Mapping[str, Any]) -> str:
    """What `facts_of` gave, in a line."""
    computed = facts["computed_tokens"]
    layout = f"padded rows ({facts['unpacked_reason']})" if facts["unpacked_reason"] else "packed"
    micro = f"micro-batches of {facts['micro_batch_tokens']:,} tokens"
    if facts["halvings"]:
        micro += f" (halved {facts['halvings']} times for want of memory)"
    share = facts["row_tokens"] / computed
    kept = f"{facts['row_tokens']:,} tokens of trajectories in {computed:,} computed ({share:.0%})"
    parts = [layout, micro, kept]
    if "trained_tokens_per_s" in facts:
        parts.append(f"{facts['trained_tokens_per_s']:,.0f} trained tokens/s")
    if "memory_gb" in facts:
        parts.append(f"{facts['memory_gb']:.2f} GB")
    return "; ".join(parts)


def memory_bytes(device: torch.device) -> int:
    """The most that tensors took on an accelerator so far; on a CPU what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss

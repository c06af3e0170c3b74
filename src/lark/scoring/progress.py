"""Progress of a pass: a bar with rate and time left, points for the Trainer's logger, totals for the manifest."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lark.common.progress_line import show_progress

LOGGER_SECONDS = 5.0  # between points that a logger gets of a pass


class ProgressLine(Callback):
    """A callback whose progress line, `bar` on rank 0, does not outlive the Trainer's run."""

    bar: tqdm | None = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class PassProgress(ProgressLine):
    """Shows and logs how fast a pass is, in trajectories and in their tokens (prompt and span) a second.

    The bar and the logger's points are rank 0's, the totals those of all ranks. Seconds run from when the student is
    ready.
    """

    def __init__(self, label: str):
        self.label = label
        self.rows, self.tokens, self.seconds = 0, 0, 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        loader: Any = trainer.predict_dataloaders
        self.row_tokens = pl_module.inputs.pool.length
        self.total = int(self.row_tokens[np.concatenate(loader.dataset)].sum())
        if trainer.is_global_zero:
            ranks = f" (rank 0 of {trainer.world_size})" if trainer.world_size > 1 else ""
            self.bar = show_progress(self.label + ranks, self.total, "tokens")
        self.start = self.logged = time.monotonic()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows, now = batch, time.monotonic()
        tokens = int(self.row_tokens[rows].sum())
        self.rows, self.tokens, self.seconds = self.rows + len(rows), self.tokens + tokens, now - self.start
        if self.bar is not None:
            self.bar.update(tokens)
            if trainer.logger is not None and now - self.logged > LOGGER_SECONDS:
                self._log(trainer.logger, seconds_left=self.seconds * (self.total / self.tokens - 1))
                self.logged = now

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def compute_rates(self) -> dict[str, float]:
        return {"trajectories_per_s": self.rows / self.seconds, "tokens_per_s": self.tokens / self.seconds}

    def total_over_ranks(self, trainer: Trainer) -> dict[str, Any]:
        """Return what a pass's manifest says of its speed; empty if nothing was left to do. All ranks take part."""
        strategy = trainer.strategy
        counts = torch.tensor([self.rows, self.tokens], device=strategy.root_device)
        self.rows, self.tokens = strategy.reduce(counts, reduce_op="sum").tolist()
        seconds = torch.tensor(self.seconds, dtype=torch.float32, device=strategy.root_device)
        self.seconds = float(strategy.reduce(seconds, reduce_op="max"))
        if not self.rows:
            return {}
        if trainer.logger is not None:
            self._log(trainer.logger, seconds_left=0.0)
            trainer.logger.save()
        return {"throughput": {"trajectories": self.rows, "pass_seconds": self.seconds, **self.compute_rates()}}

    def _log(self, logger: Any, *, seconds_left: float) -> None:
        figures = {"trajectories": self.rows, **self.compute_rates(), "seconds_left": seconds_left}
        logger.log_metrics({f"scoring/{name}": value for name, value in figures.items()})


def total_progress(trainer: Trainer) -> dict[str, Any]:
    """Return the `total_over_ranks` of the Trainer's PassProgress; empty if it has none. All ranks take part."""
    progress = next((one for one in trainer.callbacks if isinstance(one, PassProgress)), None)  # type: ignore[attr-defined]
    return {} if progress is None else progress.total_over_ranks(trainer)


def describe_pass(throughput: Mapping[str, Any]) -> str:
    """Format a manifest's `throughput` as a line."""
    seconds = throughput["pass_seconds"]
    took = f"{seconds:.1f} s" if seconds < 100 else tqdm.format_interval(seconds)
    rates = f"{throughput['trajectories_per_s']:,.1f} trajectories/s, {throughput['tokens_per_s']:,.0f} tokens/s"
    return f"{throughput['trajectories']:,} trajectories in {took}: {rates}"

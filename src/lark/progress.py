"""One progress line for scoring and training: rate and time left, on a terminal and in a log file alike."""

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

LOG_SECONDS = 10.0  # between lines when the output is a file


def bar(label: str, total: float, unit: str, *, initial: int = 0) -> tqdm:
    """A progress line on stderr that vanishes at its end; in a log file, nothing for 10 s, then a line every 10 s."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=int(total),
        initial=initial,
        desc=label,
        unit=f" {unit}",
        leave=False,
        delay=0 if terminal else LOG_SECONDS,
        mininterval=0.2 if terminal else LOG_SECONDS,
        dynamic_ncols=terminal,
    )


class Progress(Callback):
    """Counts micro-batches while scoring and optimizer steps while training, on rank 0."""

    def __init__(self, label: str):
        self.label = label
        self.bar: tqdm | None = None

    def _open(self, trainer: Trainer, total: float, unit: str, initial: int = 0) -> None:
        if trainer.is_global_zero:
            self.bar = bar(self.label, total, unit, initial=initial)

    def _advance(self, shown: dict[str, Any] | None = None) -> None:
        if self.bar is not None:
            if shown:
                self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, sum(trainer.num_predict_batches), "batches")

    def on_predict_batch_end(self, *_: Any) -> None:
        self._advance()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, trainer.max_steps, "steps", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._advance({"loss": f"{float(trainer.callback_metrics['train/loss']):.3f}"})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

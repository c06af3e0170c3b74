"""The progress of a pass of the student: a line with rates and the time left, points for the Trainer's logger."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lark.common.progress_line import bar
from lark.scoring.passes import ContentAlone, LocalWindows, MeanHidden, Statistics
from lark.scoring.throughput import distinct_tokens, gemm_seconds, of_the_limit
from lark.student.student import get_base_model, get_head

LOGGER_SECONDS = 5.0  # between points that a logger gets of a pass
LIMIT_AFTER = 3.0  # seconds of a pass after which its GEMM limit is measured: a shorter one needs none
LIMIT_SHARE, LIMIT_SECONDS = 0.02, 2.0  # what measuring it takes: this share of the pass, at most these seconds


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
    """What a pass of the student has done and how fast, in a progress line, in the Trainer's logger, and in the end in
    `figures_of`. Line and points are of rank 0 and the rows that are left to it, the figures of all ranks.

    tokens: as a pass counts those it sends through the student, a prompt with every candidate. The share of the GEMM
    limit is that of a pass in which the candidates of a problem share their prompt; passes with gradients have none.
    seconds: since the student was ready, without those spent on measuring the limit.
    """

    def __init__(self, label: str):
        self.label = label
        self.limit_tried = False
        self.limit: tuple[float, float] | None = None
        """Seconds a token of the decoder, and a scored token of the head."""
        self.rows, self.tokens, self.seconds = 0, 0, 0.0
        self.products = np.zeros(2)
        """Tokens that the decoder's matrices, and the head's, have to see at least."""
        self.start = self.logged = 0.0
        self.done = self.total = 0.0
        """Tokens of the rows by which the time left is estimated."""

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        work = pl_module.work
        loader: Any = trainer.predict_dataloaders
        left = np.concatenate(loader.dataset.units)  # this rank's, without what an interrupted pass has done
        tokens = work.pool.length[work.rows]
        if isinstance(pl_module.wanted, Statistics | MeanHidden):
            tokens = distinct_tokens(work.pool.problem_id[work.rows], tokens, work.pool.span_tokens[work.rows])
        self.work_of = np.zeros(len(work.pool.length))
        self.work_of[work.rows] = tokens
        self.total = self.work_of[left].sum()
        if trainer.is_global_zero:
            ranks = f" (rank 0 of {trainer.world_size})" if trainer.world_size > 1 else ""
            layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bar = bar(self.label + ranks, len(left), "trajectories", layout=layout)
        self.start = self.logged = time.monotonic()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows = batch[0]
        self.rows, self.tokens = self.rows + len(rows), self.tokens + outputs
        self.done += self.work_of[rows].sum()
        self.products += self._products(pl_module, rows, outputs)
        self.seconds = time.monotonic() - self.start
        if self.bar is None:
            return
        if not self.limit_tried and self.seconds > LIMIT_AFTER and self.products[0]:
            seconds = min(LIMIT_SHARE * self.seconds * self.total / self.done, LIMIT_SECONDS)
            model = get_base_model(pl_module.student_model)
            self.limit, self.limit_tried = gemm_seconds(model, get_head(model), seconds=seconds), True
            self.start = time.monotonic() - self.seconds  # not the pass's time
        rates = self.rates()
        left = max(0.0, self.seconds * (self.total / self.done - 1))
        # what a narrow terminal cuts off comes last
        self.bar.set_postfix_str(f"{tqdm.format_interval(left)} left, {describe_rates(rates)}", refresh=False)
        self.bar.update(len(rows))
        now = time.monotonic()
        if trainer.logger is not None and now - self.logged > LOGGER_SECONDS:
            self._log(trainer.logger, rates, left)
            self.logged = now

    def _products(self, pl_module: Any, rows: np.ndarray, tokens: int) -> np.ndarray:
        spans = pl_module.work.pool.span_tokens[rows].sum()
        match pl_module.wanted:
            case Statistics():
                return np.array([self.work_of[rows].sum(), spans])
            case MeanHidden():
                return np.array([self.work_of[rows].sum(), 0])
            case LocalWindows():
                return np.array([tokens, spans])
            case ContentAlone():
                return np.array([tokens, max(tokens - len(rows), 0)])  # nothing predicts a row's first token
        return np.zeros(2)

    def rates(self, world: int = 1) -> dict[str, float | None]:
        """Of `world` ranks together; with the share if there was time to measure the limit (None: it is unknown)."""
        rates = {"trajectories_per_s": self.rows / self.seconds, "tokens_per_s": self.tokens / self.seconds}
        if not self.limit_tried:
            return rates
        share = float(self.products @ self.limit) / (world * self.seconds) if self.limit else None
        return rates | {"share_of_gemm_limit": share}

    def _log(self, logger: Any, rates: Mapping[str, float | None], seconds_left: float) -> None:
        figures = {"trajectories": self.rows, **rates, "seconds_left": seconds_left}
        logger.log_metrics({f"scoring/{name}": value for name, value in figures.items() if value is not None})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def finish(self, trainer: Trainer) -> dict[str, Any]:
        """See `figures_of`."""
        strategy = trainer.strategy
        counts = [self.rows, self.tokens, *map(round, self.products)]
        counts = strategy.reduce(torch.tensor(counts, device=strategy.root_device), reduce_op="sum").tolist()
        self.rows, self.tokens, self.products = counts[0], counts[1], np.array(counts[2:])
        seconds = torch.tensor(self.seconds, dtype=torch.float32, device=strategy.root_device)
        self.seconds = float(strategy.reduce(seconds, reduce_op="max"))
        if not self.rows:  # all was done before
            return {}
        rates = self.rates(trainer.world_size)
        if trainer.logger is not None:
            self._log(trainer.logger, rates, 0.0)
            trainer.logger.save()
        return {"throughput": {"trajectories": self.rows, "pass_seconds": self.seconds, **rates}}


def figures_of(trainer: Trainer) -> dict[str, Any]:
    """After a pass, for its manifest: {"throughput": how many trajectories in how many seconds, trajectories and tokens
    a second, share of the GEMM limit (null if this student's is not known; missing if it was not measured)}. Empty if
    nothing was left to do or the Trainer has no PassProgress. All ranks take part.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PassProgress):
            return callback.finish(trainer)
    return {}


def describe_pass(throughput: Mapping[str, Any]) -> str:
    """What `figures_of` gave, in a line."""
    seconds = throughput["pass_seconds"]
    took = f"{seconds:.1f} s" if seconds < 100 else tqdm.format_interval(seconds)
    return f"{throughput['trajectories']:,} trajectories in {took}: {describe_rates(throughput)}"


def describe_rates(rates: Mapping[str, Any]) -> str:
    text = f"{_number(rates['trajectories_per_s'])} trajectories/s, {_number(rates['tokens_per_s'])} tokens/s"
    if "share_of_gemm_limit" not in rates:
        return text
    share = rates["share_of_gemm_limit"]
    return text + (", share of the GEMM limit unknown" if share is None else f", {of_the_limit(share)}")


def _number(value: float) -> str:
    """With three digits."""
    return f"{float(f'{value:.3g}'):,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"

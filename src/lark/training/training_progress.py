"""The progress of a training: a line with the time left, and for the Trainer's logger tokens a second, the share of the
GEMM limit and memory.
"""

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.throughput import Throughput

from lark.common.progress_line import bar
from lark.scoring.progress import LIMIT_AFTER, LIMIT_SECONDS, LIMIT_SHARE, ProgressLine
from lark.scoring.throughput import gemm_seconds, of_the_limit
from lark.student.student import count_decoder_weights, get_base_model, get_head

WINDOW = 5  # optimizer steps that rates are taken over


class TrainingProgress(ProgressLine):
    """Counts optimizer steps. Line and points are of rank 0, rates of all ranks: that of rank 0 times their number.

    The GEMM limit is the time that the matrix products of the rows' tokens alone would take: forward, for the
    gradients of activations, and, where the matrices are trained themselves, for their own gradients. What is computed
    besides (padding, recomputed activations and logits, LoRA's products) counts as time lost.
    """

    def __init__(self, label: str):
        self.label = label
        self.rates: dict[str, float] = {}
        """Of the last steps, by the names that the logger gets."""
        self.seconds = self.mark = self.flops = 0.0
        """Spent on optimizer steps, without validation and checkpoints; the clock when one began; its products."""
        self.memory = 0
        self.limit_tried = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor = Throughput(world_size=trainer.world_size, window_size=WINDOW)
        self.first, self.trajectories = trainer.global_step, 0
        if trainer.is_global_zero:
            self.bar = bar(self.label, trainer.max_steps, "steps", initial=trainer.global_step)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, *_: Any) -> None:
        self.mark = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        self.seconds += now - self.mark
        done = trainer.global_step - self.first
        self.trajectories += len(batch.rows)
        flops = 2 * sum(self._products(pl_module, int(batch.lengths.sum()), batch.trained_tokens))
        self.flops += flops
        self.memory = max(self.memory, memory_bytes(pl_module.device))
        totals = pl_module.totals
        self.monitor.update(
            time=self.seconds,
            batches=done,
            samples=max(self.trajectories, done),
            lengths=totals["trained_tokens"],
            flops=round(flops),
        )
        left = self.seconds / done * (trainer.max_steps - trainer.global_step)
        if self.bar is not None and not self.limit_tried and self.seconds > LIMIT_AFTER:
            seconds = min(LIMIT_SHARE * (self.seconds + left), LIMIT_SECONDS)
            self.limit_tried, self.monitor.available_flops = True, self._limit(trainer, pl_module, totals, seconds)
        found = self.monitor.compute()
        names = {"items_per_sec": "trained_tokens_per_s", "device/mfu": "share_of_gemm_limit"}
        if trainer.world_size == 1:
            names = {"device/items_per_sec": "trained_tokens_per_s", "device/mfu": "share_of_gemm_limit"}
        self.rates = {ours: float(found[theirs]) for theirs, ours in names.items() if theirs in found}
        points = {**self.rates, "seconds_left": left, "memory_gb": self.memory / 1e9}
        pl_module.log_dict({f"train/{name}": value for name, value in points.items()})
        if self.bar is not None:
            rates = [f"{self.rates['trained_tokens_per_s']:,.0f} trained tokens/s"] if self.rates else []
            if "share_of_gemm_limit" in self.rates:
                rates.append(of_the_limit(self.rates["share_of_gemm_limit"]))
            loss = float(trainer.callback_metrics["train/loss"])
            self.bar.set_postfix_str(", ".join([f"loss {loss:.3f}", *rates]), refresh=False)
            self.bar.update()

    def totals(self, trainer: Trainer, trained_tokens: int) -> dict[str, float]:
        """Rates and memory of the whole training, by the names that trained.json gets."""
        if not self.seconds:
            return {}
        found = {"step_seconds": self.seconds, "memory_gb": self.memory / 1e9}
        found["trained_tokens_per_s"] = trainer.world_size * trained_tokens / self.seconds
        if self.monitor.available_flops:
            found["share_of_gemm_limit"] = self.flops / (self.seconds * self.monitor.available_flops)
        return found

    @staticmethod
    def _products(module: Any, tokens: int, trained_tokens: int) -> tuple[float, float]:
        """Multiply-adds in the decoder's matrices and in the head."""
        head_VD = get_head(module.student_model).weight_VD
        passes = 3 if module.student.lora is None else 2
        return passes * count_decoder_weights(get_base_model(module.student_model)) * tokens, (
            3 if head_VD.requires_grad else 2
        ) * head_VD.numel() * trained_tokens

    def _limit(self, trainer: Trainer, module: Any, totals: dict[str, int], seconds: float) -> float | None:
        """FLOP/s of the products alone, in the proportion in which this training needs those of decoder and head."""
        model = get_base_model(module.student_model)
        with trainer.precision_plugin.forward_context():
            limit = gemm_seconds(model, get_head(model), seconds=seconds)
        if limit is None:
            return None
        decoder, head = self._products(module, totals["row_tokens"], totals["trained_tokens"])
        head_elements = get_head(model).weight_VD.numel()
        needed = decoder / count_decoder_weights(model) * limit[0] + head / head_elements * limit[1]
        return 2 * (decoder + head) / needed

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
    if "share_of_gemm_limit" in facts:
        parts.append(of_the_limit(facts["share_of_gemm_limit"]))
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

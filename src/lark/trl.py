"""TRL's SFTTrainer with weights that act: it trains on a `selection.jsonl` as `python -m lark.run` does.

    rows = load_dataset("json", data_files="selection.jsonl", split="train")
    args = SFTConfig(assistant_only_loss=True)
    WeightedSFTTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=args, train_dataset=rows).train()

Plain TRL ignores the column `weight`. Here every trained token carries a coefficient and its share of the denominator,
so that the loss of an optimizer step is that of METHODS' weighted training whatever the micro-batches, the packing and
the number of ranks:

    average="trajectory"    sum_i w_i mean_t s_it / |G|                 over the global batch G
    average="token"         sum_i w_i sum_t s_it / sum_i w_i T_i
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import pad
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import SFTTrainer

from lark.common.errors import LarkError

COLUMNS = ("loss_weights", "loss_counts")
"""A float a token: its coefficient in the numerator, its part of the denominator; 0 where nothing is trained."""


class WeightedSFTTrainer(SFTTrainer):
    """SFTTrainer whose rows have a column `weight` (1 where it is missing, as in an evaluation set).

    average: trajectory | token, as `sft.average`. Other arguments are SFTTrainer's.
    Raises LarkError for settings under which the loss would be another: `loss_type`, packing strategies that split
    rows, label smoothing, unaveraged ranks.
    """

    def __init__(self, *args: Any, average: str = "trajectory", **settings: Any):
        if average not in ("trajectory", "token"):
            raise LarkError(f"average={average!r} is unknown; set it to trajectory or token")
        self.average = average
        super().__init__(*args, **settings)
        _check_arguments(self.args)
        self.data_collator = WeightCollator(self.data_collator, padding_free=self.padding_free)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        # TRL packs ids and labels alone. Rows are prepared unpacked (and cut to max_length), weighted, then packed.
        dataset = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        dataset = dataset.map(compute_coefficients, fn_kwargs={"average": self.average}, **options)
        if not packing:
            return dataset
        if args.max_length is None:
            raise LarkError("packing=True needs max_length, which is None; set SFTConfig(max_length=...)")
        columns = dataset.select_columns(["input_ids", "labels", *COLUMNS])
        packed = pack_dataset(columns, args.max_length, args.packing_strategy, options)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or ()), *COLUMNS]))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Return the denominator of the global batch: over its micro-batches and all ranks."""
        if not batch_samples or "loss_counts" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack([batch["loss_counts"].sum() for batch in batch_samples]).sum().to(device)
        gathered: Any = self.accelerator.gather(total)
        return gathered.sum() if self.args.world_size > 1 else total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights, counts = (inputs.pop(name) for name in COLUMNS)
        if num_items_in_batch is None:  # an evaluation: the batch is its own denominator
            weights = weights * (inputs["labels"][:, 1:].ne(-100).sum() / counts.sum())
        else:
            # Divided here, since TRL takes a denominator below 1 for 1.
            weights, num_items_in_batch = weights / num_items_in_batch, torch.ones_like(counts.sum())
        scaled: Any = _ScaledModel(model, weights[:, 1:])
        return super().compute_loss(scaled, inputs, return_outputs, num_items_in_batch)


class _ScaledModel:
    """Call the model; its log-probabilities come multiplied by coefficients [B, L - 1]. All else is the model's."""

    def __init__(self, model: Any, coefficients: torch.Tensor):
        self._model, self._coefficients = model, coefficients

    def __call__(self, **inputs: Any) -> Any:
        outputs = self._model(**inputs)
        if getattr(outputs, "log_probs", None) is not None:
            outputs.log_probs = outputs.log_probs * self._coefficients
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class WeightCollator:
    """TRL's collator, with the two float columns beside the labels and of their shape."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]], *, padding_free: bool):
        self.collate, self.padding_free = collate, padding_free

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rest = [{name: value for name, value in row.items() if name not in COLUMNS} for row in examples]
        batch = dict(self.collate(rest))
        length = batch["labels"].shape[1]
        for name in COLUMNS:
            rows = [torch.tensor(row[name], dtype=torch.float32) for row in examples]
            rows = [torch.cat(rows)] if self.padding_free else rows
            batch[name] = torch.stack([pad(row, (0, length - len(row))) for row in rows])
        return batch


def compute_coefficients(row: Mapping[str, Any], *, average: str) -> dict[str, list[float]]:
    """Compute the two columns of one row from its labels and weight.

    The first position predicts nothing, so it never counts.
    """
    weight = row.get("weight")
    weight = 1.0 if weight is None else float(weight)
    trained = [position > 0 and label != -100 for position, label in enumerate(row["labels"])]
    tokens = max(sum(trained), 1)
    numerator, denominator = (weight / tokens, 1 / tokens) if average == "trajectory" else (weight, weight)
    return {
        "loss_weights": [numerator * is_trained for is_trained in trained],
        "loss_counts": [denominator * is_trained for is_trained in trained],
    }


def _check_arguments(args: Any) -> None:
    refused = {
        "loss_type": (args.loss_type != "nll", "nll"),
        "label_smoothing_factor": (args.label_smoothing_factor > 0, "0"),
        "packing_strategy": (args.packing and args.packing_strategy != "bfd", "bfd, which never splits a row"),
        "average_tokens_across_devices": (args.world_size > 1 and not args.average_tokens_across_devices, "True"),
    }
    for name, (is_wrong, remedy) in refused.items():
        if is_wrong:
            raise LarkError(
                f"{name}={getattr(args, name)!r} would train another loss than the weights ask for; set {remedy}"
            )

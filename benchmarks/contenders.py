"""What train.py compares: transformers.Trainer, trl.SFTTrainer and SFTModule, made to train the same, and followed."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import Callback
from omegaconf import OmegaConf
from profiles import forget_peak, peak_bytes

from lark.student.model_parts import get_base_model
from lark.student.tokenized_pool import TokenizedPool
from lark.training.datamodule import TrajectoryDataModule
from lark.training.sft_module import SFTModule
from lark.training.trainer import TrainerFactory

IGNORED = -100


class Clock:
    """Seconds, tokens, losses and peak memory of a training's optimizer steps."""

    def __init__(self) -> None:
        self.parts: list[Any] = []  # of the step's loss, one a micro-batch
        self.losses: list[float] = []
        self.passed_tokens = self.computed_tokens = self.peak_bytes = 0
        self.started = self.seconds = self.cpu_started = self.cpu_seconds = 0.0

    def start(self, model: Any) -> None:
        """One small pass first: threads and libraries start, and that is nobody's time."""
        base: Any = get_base_model(model)
        ids = torch.arange(16, device=device())[None]
        base(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        base.get_input_embeddings().register_forward_hook(self._count)
        forget_peak()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def _count(self, module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        self.passed_tokens += inputs[0].numel()

    def step(self) -> None:
        self.losses.append(float(sum(self.parts)))  # waits for the device
        self.parts.clear()
        self.seconds = time.perf_counter() - self.started
        self.cpu_seconds = time.process_time() - self.cpu_started
        self.peak_bytes, self.computed_tokens = peak_bytes(), self.passed_tokens


class Follow(Callback):
    """Of Lightning; `profile` covers the optimizer steps."""

    def __init__(self, profile: Any = None):
        self.clock, self.profile = Clock(), profile

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.start(pl_module.student_model)
        if self.profile is not None:
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.clock.parts.append(float(trainer.callback_metrics["train/loss"]))
        self.clock.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.profile is not None:
            self.profile.stop()


def follow(trainer: Any) -> Clock:
    """Trains with one of Hugging Face's Trainers."""
    from transformers import PrinterCallback, TrainerCallback

    clock, training_step = Clock(), trainer.training_step

    def noted(*inputs: Any, **keywords: Any) -> torch.Tensor:
        loss = training_step(*inputs, **keywords)
        clock.parts.append(loss)  # already divided by the whole global batch's trained tokens
        return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            clock.start(keywords["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            clock.step()

    trainer.training_step = noted
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())
    trainer.train()
    return clock


def train_ours(data: TrajectoryDataModule, steps: int, folder: Path, profile: Any = None) -> tuple[Any, Clock]:
    """SFTModule as a run trains it; the student."""
    node = {"_target_": "lightning.Trainer", "_partial_": True, "accelerator": "auto", "devices": 1, "num_nodes": 1}
    precision = "bf16-mixed" if data.student.dtype == "bfloat16" else "32-true"
    make_trainer = TrainerFactory(OmegaConf.create(node | {"strategy": "auto", "precision": precision}), folder).make
    module = SFTModule(student=data.student, recipe=data.recipe, steps=steps, seed=data.seed, folder=folder)
    following = Follow(profile)
    trainer = make_trainer(max_steps=steps, callbacks=[following], num_sanity_val_steps=0, log_every_n_steps=1)
    trainer.fit(module, datamodule=data.set_active_arm("selector"))
    return module.student_model, following.clock


def padding_trainer(data: TrajectoryDataModule, batches: np.ndarray, folder: Path, *, size: int, grouped: bool) -> Any:
    """transformers.Trainer over the rows of `batches` [steps, trajectories], in that order or grouped by length;
    `size` trajectories a micro-batch.
    """
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = fresh_model(data)
    settings = _settings(data, folder) | {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": batches.shape[1] // size,
        "train_sampling_strategy": "group_by_length" if grouped else "sequential",
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Dataset.from_list(list(documents(data.trajectories, batches.ravel()))),
        data_collator=DataCollatorForSeq2Seq(_tokenizer(data), label_pad_token_id=IGNORED),
        optimizers=_optimizers(data, model, len(batches)),
    )


def packing_trainer(data: TrajectoryDataModule, batches: np.ndarray, folder: Path, *, width: int) -> Any:
    """trl.SFTTrainer over the rows of `batches`, packed into rows of `width` tokens; one a micro-batch, since attention
    over a packed row costs its length squared. As many optimizer steps, or a few less where rows do not divide evenly.
    """
    from datasets import Dataset
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    model = fresh_model(data)
    dataset = Dataset.from_list(list(documents(data.trajectories, batches.ravel())))
    rows = len(pack_dataset(dataset.select_columns(["input_ids", "labels"]), width, "bfd"))
    accumulated = math.ceil(rows / len(batches))
    settings = _settings(data, folder) | {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulated,
        "gradient_checkpointing": False,  # as everywhere else; SFTConfig has it on
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": width,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=dataset,
        processing_class=_tokenizer(data),
        optimizers=_optimizers(data, model, math.ceil(rows / accumulated)),
    )
    kept = sum(label != IGNORED for row in trainer.train_dataset for label in row["labels"])  # type: ignore[union-attr]
    assert kept == data.trajectories.span_tokens[batches].sum(), "packing has cut trajectories"
    return trainer


def documents(pool: TokenizedPool, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Token ids, and labels that are ignored outside our span, in the order of `rows`."""
    for row in pool.read_tokens(rows):
        ids, first = list(row.input_ids), max(row.prompt_tokens, 1)
        yield {"input_ids": ids, "labels": [IGNORED] * first + ids[first:], "length": len(ids)}


def fresh_model(data: TrajectoryDataModule) -> Any:
    """As SFTModule loads it: LoRA's first factor is the same."""
    torch.manual_seed(data.seed)
    model = data.student.load_trainable(loaded_dtype(data))
    base: Any = get_base_model(model)
    base.is_quantized = False  # a .gguf file arrives dequantised, but Trainer takes it for what it was
    return on_device(model)


def loaded_dtype(data: TrajectoryDataModule) -> torch.dtype:
    return torch.float32 if data.student.lora is None else data.student.resolve_dtype(device())


def _tokenizer(data: TrajectoryDataModule) -> Any:
    tokenizer: Any = data.trajectories.chat.tokenizer
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _settings(data: TrajectoryDataModule, folder: Path) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "max_grad_norm": data.recipe.clip,
        "bf16": data.student.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "label_names": ["labels"],
    }


def _optimizers(data: TrajectoryDataModule, model: Any, steps: int) -> Any:
    """Our learning rates; fused, as Trainer's own AdamW is."""
    recipe, trained = data.recipe, [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: recipe.compute_rate(step, steps) / recipe.lr)


@torch.no_grad()
def mean_loss(model: Any, pool: TokenizedPool, rows: np.ndarray) -> float:
    """Over the trained tokens of `rows`, one trajectory a plain forward pass; nats/token."""
    model.eval()
    total, tokens = 0.0, 0
    for document in documents(pool, rows):
        ids = torch.tensor([document["input_ids"]], device=device())
        target_T = torch.tensor(document["labels"][1:], device=device())
        logits_TV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits_TV, target_T, ignore_index=IGNORED, reduction="sum").item()
        tokens += int((target_T != IGNORED).sum())
    return total / tokens


@torch.no_grad()
def leakage(trainer: Any) -> float | None:
    """Largest difference between the logits of the second document of a packed row and those it has alone; None where
    every row holds one document.
    """
    row = next((row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return None
    batch = {k: v.to(device()) if torch.is_tensor(v) else v for k, v in trainer.data_collator([row]).items()}
    labels = batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape
    start, length = row["seq_lengths"][:2]
    together = trainer.model(**batch, use_cache=False).logits[:, start : start + length]
    alone = trainer.model(input_ids=batch["input_ids"][:, start : start + length], use_cache=False).logits
    return (together - alone).abs().max().item()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(model: torch.nn.Module) -> Any:
    return model.to(device())

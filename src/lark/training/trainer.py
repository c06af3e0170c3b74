"""The trainer group: where a run runs (device, strategy, precision), never what it computes."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from lark.common.errors import LarkError
from lark.common.ranks import environment
from lark.common.signals import Signals
from lark.config import build
from lark.student.distributed import make_strategy
from lark.training.training_progress import TrainingProgress

SETTINGS = {"_target_", "_partial_", "accelerator", "devices", "num_nodes", "strategy", "precision"}
"""Everything else a Trainer takes (max_time, limit_val_batches, ...) would change results behind the caches' backs."""


def trainer_of(node: DictConfig, folder: Path) -> tuple[str, Any]:
    """The precision in force, and a function that gives Trainers with it."""
    settings = {str(key): value for key, value in node.items() if key != "name"}
    if unknown := sorted(settings.keys() - SETTINGS):
        raise LarkError(
            f"trainer.{unknown[0]}={settings[unknown[0]]} is not for the trainer group, which says what to run on "
            "(accelerator, devices, num_nodes, strategy, precision); what is trained is set in sft"
        )
    on_cpu = node.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if settings["precision"] is None:
        settings["precision"] = "32-true" if on_cpu else "bf16-mixed"
    if on_cpu and settings["devices"] == "auto":
        settings["devices"] = 1
    make = build(OmegaConf.create(settings))

    def trainer(*, progress: str | None = None, **keywords: Any) -> Trainer:
        common = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": folder,
            "use_distributed_sampler": False,
            "strategy": make_strategy(settings["strategy"]),
        }
        measured = [TrainingProgress(progress)] if progress is not None else []  # ahead of what saves checkpoints
        callbacks = [Signals(), *measured, *keywords.pop("callbacks", [])]
        if (cluster := environment()) is not None:
            common["plugins"] = [cluster]
        try:
            made = make(**common | keywords, callbacks=callbacks)
        except (MisconfigurationException, TypeError, ValueError) as error:
            given = " ".join(f"trainer.{k}={settings[k]}" for k in ("accelerator", "devices", "strategy", "precision"))
            raise LarkError(f"{given} cannot be used here ({error}); set trainer=auto, or correct them") from error
        wanted = str(keywords.get("precision", settings["precision"]))
        if not made.precision.startswith(
            wanted
        ):  # 32 is 32-true; where a device has it not, Lightning takes another without a word
            raise LarkError(
                f"trainer.precision={wanted} cannot be used here (it would be {made.precision}); set it to null, "
                "32-true or bf16-mixed"
            )
        return made

    return settings["precision"], trainer

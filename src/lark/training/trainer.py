"""Trainers as the trainer group has them: where a run runs (device, strategy, precision), never what it computes."""

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
from lark.training.callbacks import TrainingProgress

SETTINGS = {"_target_", "_partial_", "accelerator", "devices", "num_nodes", "strategy", "precision"}
"""Everything else a Trainer takes (max_time, limit_val_batches, ...) would change results behind the caches' backs."""


class TrainerFactory:
    """Makes the Trainers of a run: device, strategy and precision of the trainer group, quiet, obedient to signals.

    Raises LarkError for settings that do not belong there or cannot be used here.
    """

    def __init__(self, node: DictConfig, folder: Path):
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
        self.settings, self.folder = settings, folder
        self.precision: str = settings["precision"]
        self._make = build(OmegaConf.create(settings))

    def make(self, *, progress: str | None = None, **keywords: Any) -> Trainer:
        """Make a Trainer with further settings. progress: the label of a training's progress line."""
        settings = self.settings
        common = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": self.folder,
            "use_distributed_sampler": False,
            "strategy": make_strategy(settings["strategy"]),
        }
        if (cluster := environment()) is not None:
            common["plugins"] = [cluster]
        shown = [TrainingProgress(progress)] if progress is not None else []  # ahead of what saves checkpoints
        callbacks = [Signals(), *shown, *keywords.pop("callbacks", [])]
        try:
            made = self._make(**common | keywords, callbacks=callbacks)
        except (MisconfigurationException, TypeError, ValueError) as error:
            given = " ".join(f"trainer.{k}={settings[k]}" for k in ("accelerator", "devices", "strategy", "precision"))
            raise LarkError(f"{given} cannot be used here ({error}); set trainer=auto, or correct them") from error
        wanted = str(keywords.get("precision", self.precision))
        if not made.precision.startswith(wanted):  # Lightning exchanges what a device lacks silently; 32 is 32-true
            raise LarkError(
                f"trainer.precision={wanted} cannot be used here (it would be {made.precision}); set it to null, "
                "32-true or bf16-mixed"
            )
        return made

"""Where a run's figures go: W&B (online, or offline when there is no key) or CSV files. One logger an arm or pass."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lark.arms import Arm
from lark.cache import read_json

STEPS = {"scoring": "scoring/trajectories"}
"""What metrics are plotted against, by job type; optimizer steps for all others."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """One W&B run an arm, and one a pass of the student, grouped by run or sweep.

    mode: auto (online when a key is known, else offline) | online | offline. text: whether prompts and trajectories may
    leave the machine: then an arm's selection and samples are kept as a W&B artifact, else figures and settings only.
    """

    name: str
    project: str = "lark"
    entity: str | None = None
    mode: str = "auto"
    text: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline"):
            raise ValueError(f"logger.mode={self.mode!r} is unknown; set it to auto, online or offline")

    @property
    def offline(self) -> bool:
        if self.mode != "auto":
            return self.mode == "offline"
        if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return True
        import wandb

        return not wandb.login(prompt=False)

    def describe(self) -> str:
        if not self.offline:
            return f"W&B project {self.project}"
        return "W&B offline" + (" (no API key; `wandb login` once to upload)" if self.mode == "auto" else "")

    def open(self, *, title: str, group: str, job_type: str, config: dict[str, Any], folder: Path) -> Logger:
        import wandb
        from wandb.errors import Error

        folder.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                name=title,
                project=self.project,
                entity=self.entity,
                mode="offline" if self.offline else "online",
                dir=str(folder),
                group=group,
                job_type=job_type,
                config=config,
                # what is printed, and a diff of the working folder, may quote the pool
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
        except Error as error:
            raise ValueError(
                f"W&B could not start a run ({error}); set logger=offline, or connect and `wandb login`"
            ) from error
        step = STEPS.get(job_type, "trainer/global_step")
        run.define_metric(step)
        run.define_metric("*", step_metric=step, step_sync=True)
        return WandbLogger(experiment=run)

    def keep(self, logger: Logger, name: str, files: list[Path]) -> None:
        """Keep files that hold text, if they may leave the machine."""
        if self.text:
            import wandb

            artifact = wandb.Artifact(name, type="arm")
            for file in files:
                artifact.add_file(str(file))
            logger.experiment.log_artifact(artifact)  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Without this, consecutive runs in one process merge into one."""
        import wandb

        wandb.finish()


@dataclass(frozen=True, kw_only=True)
class Csv:
    """metrics.csv and hparams.yaml a run, nothing else; nothing leaves the machine, whatever `text` says."""

    name: str
    text: bool = False

    def describe(self) -> str:
        return "CSV files"

    def open(self, *, title: str, group: str, job_type: str, config: dict[str, Any], folder: Path) -> Logger:
        logger = CSVLogger(save_dir=str(folder / "csv"), name=f"{group}/{title}")
        logger.log_hyperparams(config | {"job_type": job_type})
        return logger

    def keep(self, logger: Logger, name: str, files: list[Path]) -> None:
        """The files are on this machine already."""

    def finish(self) -> None:
        """Nothing is open between runs."""


def log_arm(logger: Any, arm: Arm, *, cost: Mapping[str, float], reused: bool) -> None:
    """Final figures and what choosing cost; a reused arm's held-out curve too, since this group has not seen it."""
    if reused and arm.selection is not None:
        for point in read_json(arm.folder / "trained.json")["curve"]:
            logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
    path = arm.folder / "metrics.json"
    if path.exists():
        for name, metrics in read_json(path)["sets"].items():
            logger.log_metrics({f"evaluation/{name}/{key}": value for key, value in metrics.items()})
    if cost:
        logger.log_metrics({f"cost/{name}": value for name, value in cost.items()})
    logger.save()

"""Where a run's figures go: W&B (online, or offline when there is no key) or CSV files. One logger an arm or pass."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lark.common.errors import LarkError

AXES = {
    "scoring": "scoring/trajectories",
    "train": "trainer/global_step",
    "held_out": "trainer/global_step",
    "evaluation": "trainer/global_step",
    "selection": None,
    "diagnostics": None,
    "comparison": None,
    "cost": None,
}
"""What metrics with these prefixes are plotted against: trajectories of the pass, optimizer steps; None: one value."""

HIDDEN = ("epoch",)
"""Logged by Lightning; no panel is wanted."""

DATA_FOLDER = "WANDB_DATA_DIR"
"""Where W&B stages the files of artifacts; left to itself below the home folder, apart from an offline run."""


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
            raise LarkError(f"logger.mode={self.mode!r} is unknown; set it to auto, online or offline")

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
            raise LarkError(
                f"W&B could not start a run ({error}); set logger=offline, or connect and `wandb login`"
            ) from error
        for step in dict.fromkeys(filter(None, AXES.values())):
            run.define_metric(step, hidden=True)
        for prefix, step in AXES.items():
            run.define_metric(f"{prefix}/*", step_metric=step, step_sync=step is not None)
        for name in HIDDEN:
            run.define_metric(name, hidden=True)
        os.environ.setdefault(DATA_FOLDER, _staging(run))
        return WandbLogger(experiment=run)

    def summarise(self, logger: Any, values: Mapping[str, Any]) -> None:
        """Values that a run has one of: numbers and words."""
        logger.experiment.summary.update(dict(values))

    def tabulate(self, logger: Any, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Tables by their whole name, a mapping a row."""
        import wandb

        logged = {}
        for name, rows in tables.items():
            columns: list[Any] = list(rows[0]) if rows else []
            logged[name] = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        logger.experiment.log(logged)

    def keep_selection(
        self,
        logger: Any,
        name: str,
        files: Sequence[Path],
        *,
        written: Mapping[str, Iterable[str]],
        about: dict[str, Any],
    ) -> None:
        """A dataset artifact of files, and of others that are `written` from lines, by their names."""
        import wandb

        artifact = wandb.Artifact(name, type="dataset", metadata=about)
        for file in files:
            artifact.add_file(str(file), skip_cache=True)
        for file_name, lines in written.items():
            with artifact.new_file(file_name, encoding="utf-8") as file:
                file.writelines(lines)
        logger.experiment.log_artifact(artifact)

    def keep(self, logger: Logger, name: str, files: list[Path]) -> None:
        """Keep files that hold text, if they may leave the machine."""
        if self.text and files:
            import wandb

            artifact = wandb.Artifact(name, type="arm")
            for file in files:
                artifact.add_file(str(file), skip_cache=True)
            logger.experiment.log_artifact(artifact)  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Without this, consecutive runs in one process merge into one."""
        import wandb

        staging = None if wandb.run is None else _staging(wandb.run)
        wandb.finish()
        if os.environ.get(DATA_FOLDER) == staging:
            os.environ.pop(DATA_FOLDER, None)


@contextmanager
def opened(tracker: Any, **settings: Any) -> Iterator[Logger]:
    """A run of the tracker's (`open` says which settings it takes), which ends with the block."""
    try:
        yield tracker.open(**settings)
    finally:
        tracker.finish()


def _staging(run: Any) -> str:
    """Beside the run's other files."""
    return str(Path(run.dir).parent / "staging")


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

    def summarise(self, logger: Any, values: Mapping[str, Any]) -> None:
        """Into hparams.yaml, as metrics.csv takes numbers by step only."""
        logger.log_hyperparams({"summary": dict(logger.experiment.hparams.get("summary", {})) | dict(values)})

    def keep(self, logger: Logger, name: str, files: list[Path]) -> None:
        """The files are on this machine already."""

    def finish(self) -> None:
        """Nothing is open between runs."""

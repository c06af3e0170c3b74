"""Open and close the logger's runs: W&B (online, or offline when there is no key) or CSV files. One an arm or pass."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
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
"""X axis of the metrics with these prefixes: trajectories of the pass, optimizer steps; None: one value."""

HIDDEN = ("epoch",)
"""Logged by Lightning; no panel is wanted."""

DATA_FOLDER = "WANDB_DATA_DIR"
"""Names the folder where W&B stages artifacts; left to itself below the home folder, apart from an offline run."""

IDS = ("problem_id", "candidate_id", "teacher", "correct", "rule", "score", "share")
"""Fields of a selected row's `meta` that quote nothing of the pool's texts."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """One W&B run an arm, and one a pass of the student, grouped by run or sweep."""

    name: str
    project: str = "lark"
    entity: str | None = None
    mode: str = "auto"
    """auto (online when a key is known, else offline) | online | offline"""
    text: bool = False
    """Let prompts, trajectories and samples leave the machine; else only ids, figures and settings do."""

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
        """Say in a few words where the figures go."""
        if not self.offline:
            return f"W&B project {self.project}"
        return "W&B offline" + (" (no API key; `wandb login` once to upload)" if self.mode == "auto" else "")

    def open(self, *, title: str, group: str, job_type: str, config: dict[str, Any], folder: Path) -> Logger:
        """Start a run below `folder`; raises LarkError if W&B refuses."""
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
        for name in (*dict.fromkeys(filter(None, AXES.values())), *HIDDEN):
            run.define_metric(name, hidden=True)
        for prefix, step in AXES.items():
            run.define_metric(f"{prefix}/*", step_metric=step, step_sync=step is not None)
        os.environ.setdefault(DATA_FOLDER, _locate_staging(run))
        return WandbLogger(experiment=run)

    def summarise(self, logger: Any, values: Mapping[str, Any]) -> None:
        """Write numbers and words that a run has one of into its summary."""
        logger.experiment.summary.update(dict(values))

    def log_table(self, logger: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table, a mapping a row, all with the same keys."""
        import wandb

        columns: list[Any] = list(rows[0]) if rows else []
        table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        logger.experiment.log({name: table})

    def keep_selection(self, logger: Any, name: str, folder: Path, about: dict[str, Any]) -> None:
        """Keep the selection that `folder` holds as a dataset artifact, without texts unless they may leave."""
        import wandb

        artifact = wandb.Artifact(name, type="dataset", metadata=about | {"texts": self.text})
        for file in ("selection.json", *(("selection.jsonl", "dataset_info.json") if self.text else ())):
            artifact.add_file(str(folder / file), skip_cache=True)
        if not self.text:
            with artifact.new_file("selection.jsonl", encoding="utf-8") as stripped:
                stripped.writelines(strip_texts(folder / "selection.jsonl"))
        logger.experiment.log_artifact(artifact)

    def keep_texts(self, logger: Any, name: str, files: list[Path]) -> None:
        """Keep files that hold text, if they may leave the machine."""
        if self.text and files:
            import wandb

            artifact = wandb.Artifact(name, type="arm")
            for file in files:
                artifact.add_file(str(file), skip_cache=True)
            logger.experiment.log_artifact(artifact)

    def finish(self) -> None:
        """End the run; without this, consecutive runs in one process merge into one."""
        import wandb

        staging = None if wandb.run is None else _locate_staging(wandb.run)
        wandb.finish()
        if os.environ.get(DATA_FOLDER) == staging:
            os.environ.pop(DATA_FOLDER, None)


def _locate_staging(run: Any) -> str:
    """Return the folder beside the run's other files, so that an offline run is complete in itself."""
    return str(Path(run.dir).parent / "staging")


def strip_texts(path: Path) -> Iterator[str]:
    """Yield the lines of a selection.jsonl with ids, weights and scores, without messages and answers."""
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            meta = {key: row["meta"][key] for key in IDS}
            yield json.dumps({"weight": row["weight"], "meta": meta}, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Csv:
    """metrics.csv and hparams.yaml a run, nothing else; nothing leaves the machine, whatever `text` says."""

    name: str
    text: bool = False

    def describe(self) -> str:
        """Say in a few words where the figures go."""
        return "CSV files"

    def open(self, *, title: str, group: str, job_type: str, config: dict[str, Any], folder: Path) -> Logger:
        """Start a run below `folder`."""
        logger = CSVLogger(save_dir=str(folder / "csv"), name=f"{group}/{title}")
        logger.log_hyperparams(config | {"job_type": job_type})
        return logger

    def summarise(self, logger: Any, values: Mapping[str, Any]) -> None:
        """Write the values into hparams.yaml, as metrics.csv takes numbers by step only."""
        logger.log_hyperparams({"summary": dict(logger.experiment.hparams.get("summary", {})) | dict(values)})

    def keep_texts(self, logger: Any, name: str, files: list[Path]) -> None:
        """Leave the files where they are: on this machine."""

    def finish(self) -> None:
        """Do nothing: no run is open between arms."""


@contextmanager
def open_run(tracker: Wandb | Csv, **settings: Any) -> Iterator[Logger]:
    """Open a run of the tracker (its `open` has the settings), which ends with the block."""
    try:
        yield tracker.open(**settings)
    finally:
        tracker.finish()

"""Open and close the logger's runs: W&B (online, or offline when there is no key) or CSV files. One an arm or pass."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lark.common import log
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

CONNECT_SECONDS = 30
"""To wait for W&B's server when a run starts."""

DATA_FOLDER = "WANDB_DATA_DIR"
"""Names the folder where W&B stages artifacts; left to itself below the home folder, apart from an offline run."""

IDS = ("problem_id", "candidate_id", "teacher", "correct", "rule", "score", "share")
"""Fields of a selected row's `meta` that quote nothing of the pool's texts."""


@dataclass(kw_only=True)
class Wandb:
    """One W&B run an arm, and one a pass of the student, grouped by run or sweep."""

    name: str
    project: str = "lark"
    entity: str | None = None
    mode: str = "auto"
    """auto (online where a key is known and W&B answers, else offline) | online | offline"""
    text: bool = False
    """Let prompts, trajectories and samples leave the machine; else only ids, figures and settings do."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline"):
            raise LarkError(f"logger.mode={self.mode!r} is unknown; set it to auto, online or offline")

    def resolve_mode(self) -> str:
        """Decide between online, offline and disabled; WANDB_MODE=disabled holds whatever `mode` says."""
        if (variable := os.environ.get("WANDB_MODE")) == "disabled":
            return "disabled"
        if self.mode != "auto":
            return self.mode
        if variable in ("offline", "dryrun"):
            return "offline"
        import wandb
        from wandb.errors import Error

        try:
            return "online" if wandb.login(prompt=False) else "offline"
        except Error as error:
            self._go_offline(error)
            return "offline"

    def _go_offline(self, error: Exception) -> None:
        """Keep all further runs on disk, and say so."""
        reason = str(error).partition("\n")[0]
        log.logger.warning(f"W&B did not take a run ({reason}); going on offline: `wandb sync` uploads it later")
        self.mode = "offline"

    def describe(self) -> str:
        """Say in a few words where the figures go."""
        mode = self.resolve_mode()
        if mode == "online":
            return f"W&B project {self.project}"
        no_key = self.mode == "auto" and "WANDB_MODE" not in os.environ
        return f"W&B {mode}" + (" (no API key; `wandb login` once to upload)" if no_key else "")

    def open(self, *, title: str, group: str, job_type: str, config: dict[str, Any], folder: Path) -> Logger:
        """Start a run below `folder`. Where W&B refuses: an offline run with mode=auto, else raises LarkError."""
        from wandb.errors import Error

        folder.mkdir(parents=True, exist_ok=True)
        mode = self.resolve_mode()
        try:
            run = self._start(mode, title=title, group=group, job_type=job_type, config=config, folder=folder)
        except Error as error:
            if self.mode != "auto":
                raise LarkError(
                    f"W&B could not start a run ({error}); set logger=offline, or connect and `wandb login`"
                ) from error
            self._go_offline(error)
            run = self._start("offline", title=title, group=group, job_type=job_type, config=config, folder=folder)
        for name in (*dict.fromkeys(filter(None, AXES.values())), *HIDDEN):
            run.define_metric(name, hidden=True)
        for prefix, step in AXES.items():
            run.define_metric(f"{prefix}/*", step_metric=step, step_sync=step is not None)
        os.environ.setdefault(DATA_FOLDER, _locate_staging(run))
        return WandbLogger(experiment=run)

    def _start(self, mode: str, *, title: str, folder: Path, **about: Any) -> Any:
        """Start a run of its own: a sweep agent's WANDB_RUN_ID and WANDB_RESUME would merge all arms into one."""
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",  # what is printed, and a diff of the working folder, may quote the pool
            disable_git=True,
            init_timeout=CONNECT_SECONDS,
        )
        return wandb.init(
            name=title,
            id=secrets.token_hex(4),
            resume="never",
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            settings=settings,
            **about,
        )

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
        names = ("selection.json", *(("selection.jsonl", "dataset_info.json") if self.text else ()))
        stripped = {} if self.text else {"selection.jsonl": strip_texts(folder / "selection.jsonl")}
        about = about | {"texts": self.text}
        self._keep(logger, name, "dataset", {file: folder / file for file in names}, lines=stripped, metadata=about)

    def keep_texts(self, logger: Any, name: str, files: Mapping[str, Path]) -> None:
        """Keep files that hold text, by name, if they may leave the machine."""
        if self.text and files:
            self._keep(logger, name, "arm", files)

    def _keep(
        self,
        logger: Any,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        *,
        lines: Mapping[str, Iterator[str]] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Keep files by name, and further ones from their lines, as an artifact."""
        import wandb

        if logger.experiment.disabled:  # an artifact stages copies all the same
            return
        artifact = wandb.Artifact(name, type=kind, metadata=metadata)
        for file, path in files.items():
            artifact.add_file(str(path), name=file, skip_cache=True)
        for file, of_file in (lines or {}).items():
            with artifact.new_file(file, encoding="utf-8") as written:
                written.writelines(of_file)
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

    def keep_texts(self, logger: Any, name: str, files: Mapping[str, Path]) -> None:
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

"""The folder <run>/<arm>: what a run says of an arm that it may share with other runs.

selection.jsonl, selection.json   what its rule chose, and how that came about
checkpoint/                       the trained student's files, as links, and a model card
metrics.json, samples/            what this run's evaluation came to (lark.evaluation), also of the untrained student
everything else                   links to the arm's files
"""

import os
from pathlib import Path

from lark.common.cache import write_json
from lark.selection.export import export_repeated, export_selection
from lark.selection.rule import describe_part
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule
from lark.training.model_card import write_card


def write_selection(name: str, rule: str, data: TrajectoryDataModule, folder: Path) -> None:
    """Write selection.jsonl of `data.selections[name]`, for this and other trainers, and selection.json, which says how
    it came about.
    """
    selection, chosen_by = data.selections[name], data.rules[name]
    export_selection(selection, data.trajectories.read_rows, folder / "selection.jsonl", name=rule)
    if repeated := selection.record.get("repeated"):
        path, lines = folder / "selection-repeated.jsonl", repeated["lines"]
        export_repeated(selection, data.trajectories.read_rows, path, name=rule, lines=lines)
    inputs = {
        "task": data.task.name,
        "pool": data.trajectories.fingerprint,
        "asked": data.scorer.name,
        "score": describe_part(chosen_by.score),
        "filter": None if chosen_by.filter is None else describe_part(chosen_by.filter),
        "passes": {data.pass_folder(need).name: need.name for need in chosen_by.needs},
        "seed": data.seed,
        "dropped_rows": data.dropped,
    }
    write_json(folder / "selection.json", {"inputs": inputs, **selection.record})


def link_arm(arm: Arm, folder: Path) -> None:
    """Link what an arm left into the run's folder for it, beside the selection, and write the model card."""
    if arm.selection is None:
        return  # the untrained student has no folder of its own
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    for path in [*sorted(arm.folder.iterdir()), *sorted(arm.checkpoint.iterdir())]:
        if path.is_file():
            _link(path, folder / path.relative_to(arm.folder))
    write_card(folder / "checkpoint", folder)


def _link(path: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(path, link.parent))

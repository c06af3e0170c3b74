"""Read the summary.json of runs.

Imports nothing heavy at the top: Hydra imports lark.report, and this with it, before every run.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lark.common.cache import read_json
from lark.common.errors import LarkError

_ARM = ("rule", "hash", "matched", "lr", "trajectories", "tokens", "effective_sample_size", "held_out_loss", "curve")
_FIGURES = {
    **dict.fromkeys(("status", "task", "model", "seed", "settings", "difference_of")),
    "arms": {
        "*": {
            **dict.fromkeys((*_ARM, "per_problem")),
            "cost": dict.fromkeys(("forward_tokens", "backward_tokens", "seconds")),
            "metrics": {"*": dict.fromkeys(("stop", "boxed"))},
        }
    },
    "sets": {"*": {"metrics": None}},
}
"""Keys that are reported of a finished run's summary; * stands for every key there is."""


def read_summaries(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read every summary.json in or below the folders, once, and add its `folder`.

    Sorted by path, numbered jobs of a multirun in their order.
    Raises LarkError when there is none, or one of a finished run lacks what is reported.
    """
    paths = {path.resolve(): path for folder in folders for path in folder.rglob("summary.json")}
    if not paths:
        shown = ", ".join(map(str, folders))
        raise LarkError(f"no summary.json in or below {shown}; name the folder of a finished run or multirun")
    in_order = sorted(paths, key=lambda path: (str(path.parent.parent), path.parent.name.zfill(8)))
    return [_read_summary(paths[path]) for path in in_order]


def _read_summary(path: Path) -> dict[str, Any]:
    summary = read_json(path)
    if summary.get("status") != "failed" and "stopped_after" not in summary:
        missing = next(_find_missing(summary, _FIGURES), None)
        if missing:
            raise LarkError(
                f"{path} has no {missing}, as another version of lark wrote it; run it again, or leave its folder out"
            )
    return summary | {"folder": str(path.parent)}


def _find_missing(part: Mapping[str, Any], figures: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key, inner in figures.items():
        for found in part if key == "*" else [key]:
            if found not in part:
                yield f"{within}{found}"
            elif inner:
                yield from _find_missing(part[found], inner, f"{within}{found}.")


def take_best_rates(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge runs that differ only in sft.lr into one, which has each arm at the rate of its lowest held-out loss.

    The rate that was taken is among the `notes` of the merged run. Unfinished runs stay as they are.
    """
    same: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        key = summary["folder"]
        if "arms" in summary:
            others = {name: value for name, value in summary["settings"].items() if name != "sft.lr"}
            key = json.dumps([summary["task"], summary["model"], summary["seed"], others], sort_keys=True)
            summary = summary | {"settings": others}
        same.setdefault(key, []).append(summary)
    return [_merge_rates(runs) for runs in same.values()]


def _merge_rates(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(runs) == 1:
        return runs[0]
    arms, notes = {}, []
    for role in runs[0]["arms"]:
        rates = [run["arms"][role] for run in runs]
        arms[role] = min(rates, key=lambda arm: math.inf if arm["held_out_loss"] is None else arm["held_out_loss"])
        if role != "before":
            tried, best = sorted(arm["lr"] for arm in rates), arms[role]["lr"]
            at_end = {
                tried[0]: f"; try lower ones, such as {best / 3:.2g}",
                tried[-1]: f"; try higher ones, such as {best * 3:.2g}",
            }
            notes.append(
                f"{arms[role]['rule']}, seed {runs[0]['seed']}: sft.lr={best:g} has the lowest held-out loss of "
                f"{', '.join(f'{rate:g}' for rate in tried)}{at_end.get(best, '')}"
            )
    return runs[0] | {"arms": arms, "notes": notes}

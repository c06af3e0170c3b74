"""Re-anchoring: statistics and selection anew, with the current student, every `refresh` optimizer steps.

An arm's training is cut into segments. Each but the first begins with another choice, by the same passes, rule, budget,
seed and match, but of the student as it is by then. A baseline takes of each problem as many trajectories as the
selector's first choice did, at every refresh. The number of optimizer steps, the optimizer's state, the schedule and
the held-out curve are those of one training; batches are cut from a fresh permutation of the new choice.

Under LoRA the student that is asked has the adapter merged into its weights, or beside them where its passes are not in
float32; training goes on with the adapter apart. Rules that take gradients of what is trained take those of a fresh
adapter on merged weights.

<arm>/refreshed/<step>/student, cache              the current student and its passes, until the choice is made
<arm>/refreshed/<step>/selection.jsonl, .json      the choice; selection.json is written last
"""

import functools
import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import complete, file_hash, read_json
from lark.common.versions import formula_versions
from lark.scoring.table_cache import COST_COLUMNS
from lark.selection.selection import Selection
from lark.student.student import Student
from lark.student.tokenized_pool import Trajectories
from lark.training.datamodule import TrajectoryDataModule

MANIFEST = "selection.json"

Share = Callable[[str, Any], Any]
"""Of (name, value): what rank 0 passes as value, on every rank."""


def alone(name: str, value: Any) -> Any:
    """The `Share` of a process that works alone."""
    return value


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Optimizer steps `first` to `end` (exclusive) of an arm, trained on one choice that `folder` keeps."""

    first: int
    end: int
    folder: Path

    @property
    def student(self) -> Path:
        """The student at `first`, until the choice is made."""
        return self.folder / "student"

    @property
    def begun(self) -> bool:
        """Whether the segment before it is over, which needs no training any more."""
        return self.first == 0 or complete(self.folder, MANIFEST) or self.student.exists()


def segments(arm: Path, steps: int, refresh: int | None) -> list[Segment]:
    """Of the arm in that folder, which is trained for so many steps."""
    firsts = range(0, steps, refresh or steps)
    return [
        Segment(first=first, end=min(first + firsts.step, steps), folder=arm / "refreshed" / str(first))
        for first in firsts
    ]


def current(student: Student, folder: Path) -> Student:
    """What `student` has become, as `save_student` left it in `folder`: an adapter under LoRA, else all weights."""
    if student.lora is None:
        return replace(student, id=None, revision=None, path=str(folder), adapter=None)
    return replace(student, adapter=(*student.adapters, str(folder)))


def choose_anew(segment: Segment, name: str, data: TrajectoryDataModule, *, share: Share) -> TrajectoryDataModule:
    """The data of the student at the segment's beginning, which has chosen by the rule of that name; all ranks take
    part in its passes. One that was interrupted goes on.
    """
    anew = data.anchored_at(current(data.asked, segment.student), name, segment.folder / "cache")
    for wanted in anew.needs:
        cached = complete(anew.pass_folder(wanted))
        key = f"refresh {segment.folder.parent.parent.name} {segment.first} {wanted.name}"
        anew.run_pass(wanted, cached=share(key, cached))
    anew.selections[name] = anew.choose(name, data.selections["selector"] if name == "baseline" else None)
    return anew


def facts_of(segment: Segment, name: str, anew: TrajectoryDataModule, before: np.ndarray) -> dict[str, Any]:
    """What selection.json says of a refresh besides the selection itself. before: rows of the previous choice."""
    row = anew.selections[name].row
    stay = len(np.intersect1d(row, before))
    counts = {"step": segment.first, "trajectories": len(row), "stay": stay, "stay_share": stay / len(before)}
    return {"refresh": {**counts, "cost": anew.cost_of(anew.rules[name])}}


def forget_student(segment: Segment) -> None:
    """The student and its passes, once the choice is made."""
    for place in (segment.student, segment.folder / "cache"):
        shutil.rmtree(place, ignore_errors=True)


def read_choice(segment: Segment, pool: Trajectories) -> Selection:
    """The choice as it was written. `score_N` is empty: the candidates that were not chosen are not kept."""
    with open(segment.folder / "selection.jsonl", encoding="utf-8") as file:
        lines = [{"weight": line["weight"], **line["meta"]} for line in map(json.loads, file)]
    chosen = {(line["problem_id"], line["candidate_id"]): i for i, line in enumerate(lines)}
    keys = zip(pool.problem_id.tolist(), pool.candidate_id.tolist(), strict=True)
    place_N = np.array([chosen.get(key, -1) for key in keys])
    row = np.flatnonzero(place_N >= 0)
    assert len(row) == len(lines), f"{segment.folder} holds {len(lines)} trajectories, {len(row)} of which are known"
    columns = {
        name: np.array([lines[i][name] for i in place_N[row]], np.float64) for name in ("weight", "share", "score")
    }
    problems, taken = np.unique(pool.problem_id[row].astype(str), return_counts=True)
    return Selection(
        row=row,
        **columns,
        record=read_json(segment.folder / MANIFEST),
        score_N=np.zeros(0),
        taken_by_problem=dict(zip(problems.tolist(), taken.tolist(), strict=True)),
    )


# ---- what later choices depend on


def refresh_identity(data: TrajectoryDataModule, name: str) -> dict[str, Any]:
    """What an arm that is refreshed depends on besides its first choice, its student and its recipe."""
    rule, pool = data.rules[name], data.trajectories
    identity = {
        "steps": rule.refresh,
        "rule": [settings_of(part) for part in (rule.score, rule.policy, rule.filter)],
        "passes": [data.pass_identity(need) for need in rule.needs],
        "rows": _hash(data.scored, pool.correct[data.scored]),
        "versions": formula_versions("training"),
    }
    if name == "baseline":
        first = data.selections["selector"]
        identity["like"] = [data.match, _hash(first.row, first.weight), first.record["tokens"]]
    return identity


def _hash(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def settings_of(part: Any) -> Any:
    """A score, filter or policy as plain JSON: its settings, and which code it is with a hash of that code's file."""
    if isinstance(part, float) and not math.isfinite(part):
        return str(part)  # JSON has no infinity
    if part is None or isinstance(part, str | int | float):
        return part
    if isinstance(part, Mapping):
        return {str(key): settings_of(value) for key, value in part.items()}
    if isinstance(part, Sequence):
        return [settings_of(value) for value in part]
    if isinstance(part, functools.partial):
        return {"partial": [settings_of(inner) for inner in (part.func, part.args, part.keywords)]}
    code = part if inspect.isroutine(part) else type(part)
    described = {"code": f"{code.__module__}.{code.__qualname__}"}
    if file := _file_of(code):
        described["file"] = file_hash(file)
    if is_dataclass(part):
        described |= {field.name: settings_of(getattr(part, field.name)) for field in fields(part)}
    return described


def _file_of(code: Any) -> str | None:
    try:
        return inspect.getsourcefile(code)
    except TypeError:  # built in
        return None


# ---- what it came to


def refreshes_of(arm: Path) -> list[dict[str, Any]]:
    """Of a trained arm, in their order: the step, how many trajectories were chosen and how many of the previous choice
    stayed, and what that cost.
    """
    trained = arm / "trained.json"
    return read_json(trained).get("refreshes", []) if trained.is_file() else []


def total_cost(first: Mapping[str, float], arm: Path) -> dict[str, float]:
    """What choosing cost: the first time, and at every refresh of a trained arm."""
    spent = [first, *(refresh["cost"] for refresh in refreshes_of(arm))]
    return {name: sum(cost[name] for cost in spent) for name in COST_COLUMNS}


def describe(facts: Mapping[str, Any], name: str) -> str:
    """A refresh in a line."""
    one, cost = facts["refresh"], facts["refresh"]["cost"]
    backward = f", {cost['backward_tokens']:,.0f} backward" if cost["backward_tokens"] else ""
    return (
        f"refresh     {name} at step {one['step']}: {one['stay_share']:.0%} of the trajectories stay, "
        f"{one['trajectories']:,} are chosen; choosing cost {cost['forward_tokens']:,.0f} tokens forward{backward}, "
        f"{cost['seconds']:,.1f} s"
    )


def announce(data: TrajectoryDataModule, steps: int) -> Iterator[str]:
    """A line for every rule that chooses anew, or would if training were longer."""
    for name, rule in data.rules.items():
        if rule.refresh and rule.refresh < steps:
            times = len(segments(Path(), steps, rule.refresh)) - 1
            yield (
                f"refresh     {name} chooses anew every {rule.refresh} of {steps} optimizer steps, {times} "
                f"time{'s' * (times > 1)}, by the student in training"
            )
        elif rule.refresh:
            yield f"warning     {name}.refresh={rule.refresh} is never reached in {steps} optimizer steps"

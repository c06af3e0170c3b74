"""Saved samples, checked again by the verifier as it is now: nothing is generated.

metrics.json and the samples' files are written again; what metrics.json said before is kept in metrics-before.json.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lark.answers.checker import Checker
from lark.common.cache import hold_lock, read_json, write_json
from lark.common.errors import LarkError
from lark.common.log import announce, logger
from lark.evaluation.arm_evaluation import verdict_versions
from lark.evaluation.evaluate import Record, check_records
from lark.evaluation.evaluation_table import print_metrics
from lark.evaluation.metrics import summarise_samples, write_metrics
from lark.evaluation.samples import read_rows, write_rows
from lark.tasks.task import Task


def regrade(path: Path, task: Task, *, told: Collection[str]) -> list[dict[str, Any]]:
    """Check the samples of the evaluations in `path` again and print their tables; returns what metrics.json says.

    Args:
        path: folder of an evaluation, of an arm, or of a run with its arms.
        told: settings given by the user: task.checker and task.pattern then take the place of the evaluation's.

    Raises:
        LarkError: there is no finished evaluation.
    """
    within = [path, *sorted(path.iterdir())] if path.is_dir() else []
    folders = {folder.resolve() for folder in within if (folder / "metrics.json").is_file()}
    if not folders:
        raise LarkError(f"regrade={path} holds no finished evaluation (metrics.json); set it to a folder of one")
    found = []
    for folder in sorted(folders):
        with hold_lock(folder):
            found.append(_regrade_folder(folder, task, told))
    return found


def _regrade_folder(folder: Path, task: Task, told: Collection[str]) -> dict[str, Any]:
    record, before = read_json(folder / "evaluation.json"), read_json(folder / "metrics.json")
    asked = record["task"]
    kind = task.checker if "task.checker" in told else asked["checker"]
    pattern = task.pattern if "task.pattern" in told else asked["pattern"]
    announce("regrade", f"{folder}: checked by {kind}" + (f", {pattern}" if pattern else ""))
    by_set, checked = {}, {}
    with Checker(kind, pattern=pattern) as checker:
        for name in before["sets"]:
            saved, problems = (read_rows(folder / f"{what}-{name}.jsonl") for what in ("samples", "problems"))
            checked[name] = check_records(saved, problems, checker)
            _report_changes(name, saved, checked[name], problems)
            pass_at = before["identity"]["sampling"]["pass_at"]
            by_set[name] = summarise_samples(checked[name], problems, pass_at=pass_at, kind=kind)
    for name, records in checked.items():
        write_rows(folder / f"samples-{name}.jsonl", records)
    write_json(folder / "evaluation.json", record | {"task": asked | {"checker": kind, "pattern": pattern}})
    write_json(folder / "metrics-before.json", before)
    identity = before["identity"]
    checks = {"task": [kind, pattern, *identity["task"][2:]], "versions": identity["versions"] | verdict_versions()}
    write_metrics(folder, identity | checks, by_set)
    after = read_json(folder / "metrics.json")
    print_metrics(folder.name, after)
    return after


def _report_changes(
    name: str, before: Sequence[Record], after: Sequence[Record], problems: Sequence[Mapping[str, Any]]
) -> None:
    """Say how many verdicts have changed, and log each of them."""
    old = {(record["problem_id"], record["sample"]): record for record in before}
    golds = {problem["problem_id"]: problem["answer"] for problem in problems}
    changed = [now for now in after if old[now["problem_id"], now["sample"]]["correct"] != now["correct"]]
    right = sum(now["correct"] for now in changed)
    announce(
        "changed",
        f"{name}: {len(changed):,} of {len(after):,} verdicts ({right:,} to right, {len(changed) - right:,} to wrong)",
    )
    for now in changed:
        was = old[now["problem_id"], now["sample"]]
        logger.info(
            "%s sample %s: %r was %s, %r is %s (right answer %r)",
            *(now["problem_id"], now["sample"], was["answer"], _name_verdict(was), now["answer"], _name_verdict(now)),
            golds[now["problem_id"]],
        )


def _name_verdict(record: Mapping[str, Any]) -> str:
    return "right" if record["correct"] else "cut off" if record["timed_out"] else "wrong"

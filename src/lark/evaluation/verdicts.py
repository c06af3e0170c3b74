"""Verdicts on samples, apart from them: <samples>/verdicts/<hash of checker, pattern, right answers, versions>.json.

Another checker, another pattern, or another version of a checking library costs no sample.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lark.answers.checker import Checker
from lark.answers.extract import find_boxed
from lark.common.cache import identity_hash, read_json, write_json
from lark.common.log import announce, logger
from lark.common.versions import CHECKING_LIBRARIES, formula_versions
from lark.evaluation.samples import AskedSet, Record, read_rows
from lark.tasks.problems import make_answer


def locate_verdicts(asked: AskedSet, checker: Checker) -> tuple[Path, dict[str, Any]]:
    """Find the file of a checker's verdicts on a set's samples, and what they depend on besides the samples."""
    answers = ((problem["problem_id"], dataclasses.astuple(make_answer(problem, ""))) for problem in asked.problems)
    identity = {
        "checker": checker.kind,
        "pattern": checker.pattern,
        "right_answers": identity_hash({"answers": sorted(answers)}),
        "versions": formula_versions("verdicts", libraries=CHECKING_LIBRARIES),
    }
    return asked.folder / "verdicts" / f"{identity_hash(identity)}.json", identity


def check_samples(asked: AskedSet, checker: Checker) -> list[Record]:
    """Read the checker's verdicts on a set's samples, or make them; returns the samples with theirs, in the order of
    the problems.
    """
    path, identity = locate_verdicts(asked, checker)
    if not path.exists():
        problems = {problem["problem_id"]: problem for problem in asked.problems}
        samples = read_rows(asked.folder / "samples.jsonl")
        found = checker.check([make_answer(problems[sample["problem_id"]], sample["text"]) for sample in samples])
        verdicts = [
            {"problem_id": sample["problem_id"], "sample": sample["sample"]}
            | {"gold": problems[sample["problem_id"]]["answer"], "boxed": find_boxed(sample["text"]) is not None}
            | dataclasses.asdict(verdict)
            for sample, verdict in zip(samples, found, strict=True)
        ]
        _report_changes(asked, path, verdicts)
        write_json(path, {"identity": identity, "verdicts": verdicts})
    order = {problem["problem_id"]: i for i, problem in enumerate(asked.problems)}
    answers = read_answers(asked.folder, path.stem)
    return sorted(answers, key=lambda answer: (order[answer["problem_id"]], answer["sample"]))


def read_answers(folder: Path, verdicts: str) -> list[Record]:
    """Read the samples in `folder` together with the verdicts of that hash: text, num_tokens, stop, truncated, gold,
    answer, correct, boxed, timed_out, oversized.
    """
    said = {(v["problem_id"], v["sample"]): v for v in read_json(folder / "verdicts" / f"{verdicts}.json")["verdicts"]}
    return [sample | said[sample["problem_id"], sample["sample"]] for sample in read_rows(folder / "samples.jsonl")]


def _report_changes(asked: AskedSet, path: Path, verdicts: list[Record]) -> None:
    """Say how many of the verdicts differ from those that were made last, and log each of them."""
    earlier = sorted(path.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
    if not earlier:
        return
    old = {(v["problem_id"], v["sample"]): v for v in read_json(earlier[-1])["verdicts"]}
    changed = [now for now in verdicts if old[now["problem_id"], now["sample"]]["correct"] != now["correct"]]
    right = sum(now["correct"] for now in changed)
    counts = f"{len(changed):,} of {len(verdicts):,} ({right:,} to right, {len(changed) - right:,} to wrong)"
    announce("verdicts", f"{asked.name}: checked again; changed: {counts}; samples: {asked.folder}")
    for now in changed:
        was = old[now["problem_id"], now["sample"]]
        logger.info(
            "%s sample %s: %r was %s, %r is %s (right answer %r)",
            *(now["problem_id"], now["sample"], was["answer"], _name_verdict(was)),
            *(now["answer"], _name_verdict(now), now["gold"]),
        )


def _name_verdict(verdict: Mapping[str, Any]) -> str:
    return "right" if verdict["correct"] else "cut off" if verdict["timed_out"] else "wrong"

"""Samples of one student on one evaluation set, in logs/samples/<hash of all that they depend on>.

problems.jsonl         what was asked: problem_id, messages
rank<k>.partial        samples as a rank draws them; whoever goes on, with any number of ranks, takes those of all
samples.jsonl          a line a sample
manifest.json          student, prompts, sampling, engine, versions; written last: the folder is then complete
verdicts/<hash>.json   what a checker said of each sample (lark.evaluation.verdicts)

A complete folder is never written to again, but for further verdicts.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lark.common.cache import identity_hash, is_complete, read_json, write_json, write_text
from lark.common.log import logger
from lark.common.progress_line import show_progress
from lark.common.record_file import RecordFile, read_records
from lark.common.versions import STUDENT_LIBRARIES, formula_versions
from lark.generation.backends import Backend
from lark.tasks.problems import make_prompt

Record = dict[str, Any]
_KEY = ("problem_id", "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedSet:
    """An evaluation set as it is put to one student."""

    name: str
    problems: Sequence[Record]
    prompts: Sequence[Sequence[int]]
    """Token ids of each problem's prompt."""
    identity: dict[str, Any]
    """What its samples depend on: student, prompts, sampling, versions."""
    folder: Path

    @property
    def is_drawn(self) -> bool:
        return is_complete(self.folder)


def ask_set(
    name: str,
    problems: Sequence[Record],
    prompts: Sequence[Sequence[int]],
    backend: Backend,
    *,
    sampling: Mapping[str, Any],
    samples: Path,
) -> AskedSet:
    """Find the place of a set's samples in `samples`, the folder of all; neither the set's name nor the order of its
    rows changes it.
    """
    by_id = sorted((problem["problem_id"], list(ids)) for problem, ids in zip(problems, prompts, strict=True))
    identity = {
        "student": backend.identity,
        "prompts": identity_hash({"prompts": by_id}),
        "sampling": {**sampling, "stop_ids": backend.stop_ids},
        "versions": formula_versions("samples", libraries=STUDENT_LIBRARIES),
    }
    folder = samples / identity_hash(identity)
    return AskedSet(name=name, problems=problems, prompts=prompts, identity=identity, folder=folder)


def draw_samples(backend: Backend, asked: AskedSet, *, rank: int, world: int, label: str) -> None:
    """Draw what is missing of a rank's share of the problems into its growing file."""
    is_idle = rank % backend.ranks > 0
    share = slice(0) if is_idle else slice(rank // backend.ranks, None, max(1, world // backend.ranks))
    prompts, keys = asked.prompts[share], [problem["problem_id"] for problem in asked.problems[share]]
    sampling = asked.identity["sampling"]
    there = _gather_partial(asked.folder)
    done = {(key, number) for key in keys for number in range(sampling["samples"]) if (key, number) in there}
    total = len(keys) * sampling["samples"]
    if done:
        logger.info("%s: %s of %s samples are there", asked.name, f"{len(done):,}", f"{total:,}")
    if len(done) == total:
        return
    path, working = asked.folder / f"rank{rank}.partial", asked.folder / "engine" / f"rank{rank}"
    with (
        RecordFile(path, {"set": asked.name}, key=_KEY) as file,
        show_progress(label, total, "samples", initial=len(done)) as progress,
    ):
        for batch in backend.generate(prompts, keys, working, **sampling, done=done):
            for sample in batch:
                file.add(dataclasses.asdict(sample))
            progress.update(len(batch))


def complete_samples(asked: AskedSet, about: Mapping[str, Any], system: str | None) -> None:
    """Put the samples of all ranks together. about: what the manifest says besides the identity."""
    drawn, folder = _gather_partial(asked.folder), asked.folder
    total = len(asked.problems) * asked.identity["sampling"]["samples"]
    assert len(drawn) == total, f"{len(drawn)} of {total} samples are in {folder}: do all ranks write there?"
    write_rows(folder / "samples.jsonl", (drawn[key] for key in sorted(drawn)))
    messages = ((problem["problem_id"], make_prompt(problem, system)) for problem in asked.problems)
    write_rows(folder / "problems.jsonl", ({"problem_id": key, "messages": turns} for key, turns in messages))
    engines = [read_json(path) for path in sorted(folder.glob("engine/*/engine.json"))]  # in a process of its own
    manifest = {"identity": asked.identity, **about, "set": describe_set(asked.problems, system)}
    write_json(folder / "manifest.json", manifest | ({"engine": engines[0]} if engines else {}))
    shutil.rmtree(folder / "engine", ignore_errors=True)
    for path in folder.glob("rank*.partial"):
        path.unlink()


def _gather_partial(folder: Path) -> dict[tuple[str, int], Record]:
    """Read the samples that any rank has drawn so far, by problem id and number."""
    found = (row for path in sorted(folder.glob("rank*.partial")) for row in read_records(path))
    return {(row["problem_id"], row["sample"]): row for row in found}


def describe_set(problems: Sequence[Record], system: str | None) -> dict[str, Any]:
    """Describe a set for manifests: how many problems, and how many of each prompt's version."""
    own = f"system turn {system!r}" if system else "the problem as it stands"
    named = [
        problem.get("prompt") or ("messages of the row" if problem.get("messages") else own) for problem in problems
    ]
    return {"problems": len(problems), "prompts": {prompt: named.count(prompt) for prompt in dict.fromkeys(named)}}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[Record]:
    """Read the rows of a JSONL file, such as samples.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]

"""Write and read candidates.jsonl.gz: a sample of a run's problems with all candidates, and every rule's choice.

The first line holds the run's facts and a column for every figure, the further lines the texts, a problem each. So the
figures of many runs over one pool are read without their texts.

Shapes: N candidates of the run, n of them in the sample.
"""

import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lark.common.cache import atomic_write, identity_hash, nan_to_none
from lark.common.groups import Groups

if TYPE_CHECKING:
    from lark.student.chat import TokenizedTrajectory
    from lark.training.datamodule import TrajectoryDataModule

NAME = "candidates.jsonl.gz"
TRAJECTORIES = 2_000
"""Of a run, at most."""
HEAD, TAIL = 3_000, 1_000
"""Characters kept of a text that has more than both together: of its beginning and of its end, where the answer is."""
BATCH = 256  # rows read at once


@dataclass(frozen=True, kw_only=True)
class PoolSample:
    """Hold what a run left of its pool; `read_sample` reads it.

    facts: task, model, seed, settings, pool (an identity: texts of the same one are the same), problems and
    trajectories shown, of_problems and of_trajectories, cut (texts cut in the middle), arms (by role: rule, hash, and
    the selection's record).
    columns: problem_id, candidate_id, teacher, correct, tokens (trained), loss (nats/token), characters; lists [n].
    scores, weights: by role, [n]; None where there is no score, weight 0 for what was not chosen.
    """

    path: Path
    facts: Mapping[str, Any]
    columns: Mapping[str, list[Any]]
    scores: Mapping[str, list[float | None]]
    weights: Mapping[str, list[float]]

    @cached_property
    def groups(self) -> Groups:
        """Group the candidates by problem."""
        return Groups.from_ids(self.columns["problem_id"])

    def read_texts(self) -> Iterator[dict[str, Any]]:
        """Yield a problem after the other: problem_id, question, answer, prompt (as the student reads it), and `texts`.

        The texts are one a candidate in the order of the columns: what is trained (see `shorten`), end (of turn, as it
        is trained; empty if task.max_length cut it off) and untrained (what follows it then; None: nothing).
        """
        with gzip.open(self.path, "rt", encoding="utf-8") as file:
            for line in itertools.islice(file, 1, None):
                yield json.loads(line)


def read_sample(folder: Path) -> PoolSample | None:
    """Read what the run in `folder` left; None if it left nothing, as one that failed early or of an older version."""
    path = folder / NAME
    if not path.is_file():
        return None
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return PoolSample(path=path, **json.loads(file.readline()))


def sample_problems(groups: Groups, ids: Sequence[str], *, limit: int) -> np.ndarray:
    """Choose whole problems with `limit` candidates at most, by the hash of their ids.

    So every run over a pool has the same. Where every problem has more candidates: the first candidates of one. Returns
    rows [n], ascending. ids: the problems' ids, in the order of `groups`.
    """
    order = sorted(range(groups.count), key=lambda problem: hashlib.sha256(f"page {ids[problem]}".encode()).digest())
    kept, room, least = [], limit, int(groups.size.min())
    for problem in order:
        if groups.size[problem] <= room:
            kept.append(problem)
            room -= int(groups.size[problem])
        if room < least:
            break
    if not kept:
        return np.flatnonzero(groups.index_N == order[0])[:limit]
    return np.flatnonzero(np.isin(groups.index_N, kept))


def write_sample(folder: Path, data: "TrajectoryDataModule", settings: Mapping[str, Any]) -> None:
    """Write a run's candidates.jsonl.gz with the choices made so far; settings: as the run's summary has them."""
    candidates, pool = data.candidates, data.trajectories
    ids = list(dict.fromkeys(candidates.problem_id.tolist()))
    rows = sample_problems(candidates.groups, ids, limit=TRAJECTORIES)
    row_n = candidates.row_N[rows]
    texts, characters, cut = _read_texts(data, row_n)
    statistics = candidates.statistics
    columns = {
        "problem_id": candidates.problem_id[rows].tolist(),
        "candidate_id": candidates.candidate_id[rows].tolist(),
        "teacher": [None if teacher is None else str(teacher) for teacher in candidates["teacher"][rows]],
        "correct": [None if np.isnan(known) else bool(known) for known in pool.correct[row_n]],
        "tokens": pool.span_tokens[row_n].tolist(),
        "loss": _round_values(statistics["loss"][rows]) if "loss" in statistics else [None] * len(rows),
        "characters": characters,
    }
    weights: dict[str, list[float]] = {}
    for role, selection in data.selections.items():
        weight_N = np.zeros(len(candidates))
        weight_N[np.searchsorted(candidates.row_N, selection.row)] = selection.weight
        weights[role] = [_round(weight) for weight in weight_N[rows]]
    scored = {role: _round_values(selection.score_N[rows]) for role, selection in data.selections.items()}
    seen = {
        "rows": [pool.fingerprint, columns["problem_id"], columns["candidate_id"]],
        "span": pool.chat.span_identity,
        "limit": [data.task.max_length, data.task.overlong],
    }
    facts = {
        "task": data.task.name,
        "model": data.student.name,
        "seed": data.seed,
        "settings": dict(settings),
        "pool": identity_hash(seen),
        "problems": len(texts),
        "of_problems": candidates.groups.count,
        "trajectories": len(rows),
        "of_trajectories": len(candidates),
        "cut": cut,
        "arms": {
            role: {
                "rule": data.rules[role].name,
                "hash": _hash_selection(selection),
                "record": nan_to_none(selection.record),
            }
            for role, selection in data.selections.items()
        },
    }
    head = {"facts": facts, "columns": columns, "scores": scored, "weights": weights}
    with (
        atomic_write(folder / NAME) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file,
    ):
        file.writelines((json.dumps(line, allow_nan=False) + "\n").encode() for line in (head, *texts))


def _hash_selection(selection: Any) -> str:
    return identity_hash(
        {name: hashlib.sha256(getattr(selection, name).tobytes()).hexdigest() for name in ("row", "weight")}
    )


def _read_texts(data: "TrajectoryDataModule", row_n: np.ndarray) -> tuple[list[dict[str, Any]], list[int], int]:
    """Read a line a problem, in the order of their first rows.

    Returns also the characters of each trajectory, [n], and how many texts were cut in the middle.
    """
    pool, problems, characters, cut = data.trajectories, {}, [], 0

    def decode(ids: list[int]) -> str:
        return str(pool.chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    for start in range(0, len(row_n), BATCH):
        part = row_n[start : start + BATCH]
        for row, encoded in zip(pool.read_rows(part), pool.read_tokens(part), strict=True):
            *asked, trajectory = row["messages"]
            problem = problems.setdefault(row["problem_id"], {"problem_id": row["problem_id"], "texts": []})
            if not problem["texts"]:
                question = next((turn["content"] for turn in reversed(asked) if turn["role"] == "user"), "")
                problem |= {"question": shorten(question), "answer": row["answer"]}
                problem["prompt"] = shorten(decode(encoded.input_ids[: encoded.prompt_tokens]))
            text = _split_trained(trajectory["content"], encoded, decode)
            characters.append(len(trajectory["content"]))
            cut += any("tail" in part for part in (text, text["untrained"] or {}))
            problem["texts"].append(text)
    return list(problems.values()), characters, cut


def shorten(text: str) -> dict[str, Any]:
    """Shorten a text to {"text"}, of a long one with left_out (characters in the middle) and tail."""
    if len(text) <= HEAD + TAIL:
        return {"text": text}
    return {"text": text[:HEAD], "left_out": len(text) - HEAD - TAIL, "tail": text[-TAIL:]}


def _split_trained(content: str, encoded: "TokenizedTrajectory", decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Split a trajectory into what is trained, its end of turn, and what task.max_length cut off."""
    span = encoded.input_ids[encoded.prompt_tokens :]
    if encoded.end_of_turn >= 0:
        return shorten(content) | {"end": decode(span[encoded.end_of_turn :]), "untrained": None}
    alike = (a == b for a, b in zip(content, decode(span), strict=False))
    trained = sum(itertools.takewhile(bool, alike))
    return shorten(content[:trained]) | {"end": "", "untrained": shorten(content[trained:])}


def _round_values(values: np.ndarray) -> list[float | None]:
    return [_round(value) if np.isfinite(value) else None for value in np.asarray(values, np.float64)]


def _round(value: float) -> float:
    """Round to five digits, for looking at."""
    return float(f"{value:.5g}")

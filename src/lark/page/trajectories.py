"""Pack what the page's browser of trajectories shows: texts of a bounded sample of each pool, and who chose what."""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lark.page.contents import Choice, PoolContents
from lark.page.pool_sample import TRAJECTORIES, sample_problems

PACKED_BYTES = 2_000_000
"""Of all pools' texts and figures on a page, packed."""


def pack(pools: Sequence[PoolContents]) -> tuple[list[dict[str, Any]], str]:
    """Pack pools as JSON, gzip, base64; returns also what the page can say of each before it unpacks anything.

    Together they have TRAJECTORIES trajectories and PACKED_BYTES at most, for which whole problems are left out by the
    hash of their ids; every pool keeps one.
    """
    limit = TRAJECTORIES // max(len(pools), 1)
    while True:
        shown = [_list_problems(pool, limit) for pool in pools]
        packed = base64.b64encode(gzip.compress(json.dumps(shown, allow_nan=False).encode(), mtime=0)).decode()
        if len(packed) <= PACKED_BYTES or limit <= 1:
            break
        limit = min(limit - 1, int(limit * 0.95 * PACKED_BYTES / len(packed)))
    heads = [
        {
            "name": pool.name,
            "problems": len(one["problems"]),
            "of_problems": pool.sample.facts["of_problems"],
            "trajectories": sum(len(problem["rows"]) for problem in one["problems"]),
            "of_trajectories": pool.sample.facts["of_trajectories"],
            "cut": sum(
                any("tail" in part for part in (row, row["untrained"] or {}))
                for problem in one["problems"]
                for row in problem["rows"]
            ),
        }
        for pool, one in zip(pools, shown, strict=True)
    ]
    return heads, packed


def _list_problems(pool: PoolContents, limit: int) -> dict[str, Any]:
    """List a pool's rules (label, seeds, scored), teachers, and problems with their candidates as rows."""
    sample, columns = pool.sample, pool.sample.columns
    ids = list(dict.fromkeys(columns["problem_id"]))
    kept = set(sample_problems(sample.groups, ids, limit=max(limit, 1)).tolist())
    rows_of = {ids[group]: rows.tolist() for group, rows in enumerate(sample.groups.split())}
    teachers = list(dict.fromkeys(str(teacher) for teacher in columns["teacher"]))
    problems = []
    chosen = [_list_chosen(choice) for choice in pool.choices]
    scores = [choice.scores for choice in pool.choices]
    for problem in sample.read_texts():
        rows = [row for row in rows_of[problem["problem_id"]] if row in kept]
        texts = dict(zip(rows_of[problem["problem_id"]], problem.pop("texts"), strict=True))
        if rows:
            problem["rows"] = [
                {
                    "id": columns["candidate_id"][row],
                    "teacher": teachers.index(str(columns["teacher"][row])),
                    **{key: columns[key][row] for key in ("correct", "tokens", "loss", "characters")},
                    "scores": [of[row] for of in scores],
                    "chosen": [[i, *of[row]] for i, of in enumerate(chosen) if row in of],
                    **texts[row],
                }
                for row in rows
            ]
            problems.append(problem)
    rules = [
        {"label": choice.label, "seeds": list(choice.by_seed), "scored": any(s is not None for s in of)}
        for choice, of in zip(pool.choices, scores, strict=True)
    ]
    return {"name": pool.name, "rules": rules, "teachers": teachers, "problems": problems}


def _list_chosen(choice: Choice) -> dict[int, tuple[float, int]]:
    """List the rows chosen in any seed, with their mean weight there and in how many seeds."""
    weight_Sn = np.array([sample.weights[role] for role, sample in choice.by_seed.values()])
    seeds_n = (weight_Sn > 0).sum(0)
    return {
        int(row): (float(f"{weight_Sn[:, row].sum() / seeds_n[row]:.4g}"), int(seeds_n[row]))
        for row in np.flatnonzero(seeds_n)
    }

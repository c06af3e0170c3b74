"""What bfloat16 changes: choices and statistics of a student in bfloat16 against the same student in float32.

    python benchmarks/precision.py [--pool pool.jsonl --model-path <folder or .gguf file>] [--problems 32] [--budget 2]

The statistics of all candidates of `--problems` problems (with more than `--budget` candidates, chosen by hash) are
computed in both dtypes, one after the other, on the accelerator if there is one. For the scores of lark (g), rsr and
likelihood it prints the mean rank correlation within problems, the share of problems whose top-B set changes, and the
share of top-B rows that do; then by how much the mean cross-entropy of a trajectory moves at most, and what each dtype
cost. The last line is JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from inputs import add_arguments, open_data

from lark.common.groups import tie_hash
from lark.common.ranks import claim_alone
from lark.diagnostics.exact_gradients import measure_rows, sample_rows
from lark.scoring.passes import Statistics
from lark.scoring.progress import PassProgress
from lark.selection.candidates import Candidates
from lark.selection.matching import take_top
from lark.selection.scores.statistics import Lark, Likelihood, RankSurprisal, Score
from lark.selection.within_problem import compute_spearman

PROBLEMS = 32
SCORES: dict[str, Score] = {"lark": Lark(), "rsr": RankSurprisal(clip=100), "likelihood": Likelihood()}


def score_candidates(arguments: argparse.Namespace, cache: Path, dtype: str) -> tuple[Candidates, Mapping[str, Any]]:
    """Compute the statistics of the sampled problems in `dtype`; return the candidates and the pass's manifest."""
    data = open_data(arguments, cache, limit=None, dtype=dtype, callbacks=[PassProgress])
    pool = data.trajectories
    rows = sample_rows(pool.problem_id[data.scored], budget=arguments.budget, problems=arguments.problems)
    if len(rows) == 0:
        raise SystemExit(f"no problem of the pool has more than --budget {arguments.budget} candidates")
    row_N = data.scored[rows]
    columns, manifest = measure_rows(data, Statistics(), row_N, claim_alone)
    candidates = Candidates(
        problem_id=pool.problem_id[row_N],
        candidate_id=pool.candidate_id[row_N],
        statistics=columns.without("row"),
        read_column=pool.column,
        row_N=row_N,
    )
    return candidates, manifest


def compare_choices(a: Candidates, b: Candidates, score: Score, budget: int) -> dict[str, float]:
    """Compare the `budget` best candidates of every problem by the same score of two sets of statistics."""
    groups, tie_N = a.groups, tie_hash(0, a.problem_id, a.candidate_id)
    a_N, b_N = score(a), score(b)
    count_G = np.full(groups.count, budget)
    top_a_N, top_b_N = (take_top(score_N, groups, tie_N, count_G)[0] > 0 for score_N in (a_N, b_N))
    changed_G = groups.sum((top_a_N != top_b_N).astype(float)) > 0
    return {
        "spearman": float(np.nanmean(compute_spearman(a_N, b_N, groups).value_G)),
        "changed_sets": float(changed_G.mean()),
        "changed_rows": float((top_a_N & ~top_b_N).sum() / top_a_N.sum()),
    }


def compare_dtypes(arguments: argparse.Namespace, cache: Path) -> dict[str, object]:
    (a, cost_a), (b, cost_b) = (score_candidates(arguments, cache, dtype) for dtype in ("float32", "bfloat16"))
    result: dict[str, object] = {"problems": a.groups.count, "trajectories": len(a), "budget": arguments.budget}
    print(f"compared    {len(a):,} trajectories of {a.groups.count:,} problems, top {arguments.budget}")
    for dtype, cost in (("float32", cost_a), ("bfloat16", cost_b)):
        result[f"seconds_{dtype}"] = round(cost["seconds"], 2)
        rate = cost["forward_tokens"] / cost["seconds"]
        print(f"{dtype:<11} {cost['forward_tokens']:,.0f} tokens in {cost['seconds']:,.1f} s: {rate:,.0f} tokens/s")
    for name, score in SCORES.items():
        one = compare_choices(a, b, score, arguments.budget)
        result[name] = one
        print(
            f"{name:<11} rank correlation {one['spearman']:.4f}; {one['changed_sets']:.1%} of the sets change, "
            f"{one['changed_rows']:.1%} of their trajectories"
        )
    difference_N = b["loss"] - a["loss"]
    largest, mean = float(np.abs(difference_N).max()), float(difference_N.mean())
    print(f"mean CE     moves by at most {largest:.4f} nats/token, by {mean:+.4f} on average")
    return result | {"largest_ce_difference": largest, "mean_ce_difference": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, problems=PROBLEMS)
    parser.add_argument("--budget", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.problems < 1 or arguments.budget < 1:
        parser.error("--problems and --budget must be at least 1")
    with tempfile.TemporaryDirectory() as cache:
        print(json.dumps(compare_dtypes(arguments, Path(cache))))


if __name__ == "__main__":
    main()

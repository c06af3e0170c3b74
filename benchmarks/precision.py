"""What bfloat16 changes: choices and statistics of a student in bfloat16 against the same student in float32.

    python benchmarks/precision.py [--pool pool.jsonl --model-path <folder or .gguf file>] [--problems 32] [--budget 2]

The student is asked for the statistics of all candidates of `--problems` problems (with more than `--budget`
candidates, chosen by hash) in both dtypes, one after the other, by the probe's own code, on the accelerator if there is
one. For the scores of lark (g), rsr and likelihood it prints the mean rank correlation within problems, the share of
problems whose top-B set changes, and the share of top-B rows that do; then by how much the mean cross-entropy of a
trajectory moves at most, and what each dtype cost. model.dtype=auto makes the same comparison before a run and keeps
bfloat16 if at least 95 % of the sets agree. The last line is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from inputs import add_arguments, open_data

from lark.common.cache import read_json
from lark.scoring.progress import PassProgress
from lark.selection.policies import Policy
from lark.selection.scores.statistics import Lark, Likelihood, RankSurprisal, Score
from lark.selection.selection import Rule
from lark.training.agreement import PROBLEMS, candidates_of, compare, sample_rows, statistics_in

SCORES: dict[str, Score] = {"lark": Lark(), "rsr": RankSurprisal(clip=100), "likelihood": Likelihood()}


def rule(name: str, budget: int) -> Rule:
    return Rule(name=name, score=SCORES[name], policy=Policy(kind="top_b", budget=budget))


def compared(arguments: argparse.Namespace, cache: Path) -> dict[str, object]:
    data = open_data(arguments, cache, limit=None, callbacks=[PassProgress])
    ids = data.trajectories.problem_id[data.scored]
    rows = data.scored[sample_rows(ids, budget=arguments.budget, problems=arguments.problems)]
    if len(rows) == 0:
        raise SystemExit(f"no problem of the pool has more than --budget {arguments.budget} candidates")
    folders = {dtype: statistics_in(dtype, data, rows) for dtype in ("float32", "bfloat16")}
    a, b = (candidates_of(folder, data) for folder in folders.values())
    difference_N = b["loss"] - a["loss"]
    result: dict[str, object] = {"problems": a.groups.count, "trajectories": len(a), "budget": arguments.budget}
    print(f"compared    {len(a):,} trajectories of {a.groups.count:,} problems, top {arguments.budget}")
    for dtype, folder in folders.items():
        cost = read_json(folder / "manifest.json")
        result[f"seconds_{dtype}"] = round(cost["seconds"], 2)
        rate = cost["forward_tokens"] / cost["seconds"]
        print(f"{dtype:<11} {cost['forward_tokens']:,.0f} tokens in {cost['seconds']:,.1f} s: {rate:,.0f} tokens/s")
    for name in SCORES:
        one = compare(rule(name, arguments.budget), a, b, seed=0, budget=arguments.budget)
        assert one.changed is not None
        print(
            f"{name:<11} rank correlation {'unknown' if one.spearman is None else f'{one.spearman:.4f}'}; "
            f"{one.problems - one.same:,} of {one.problems:,} sets change ({1 - one.share:.1%}), "
            f"{one.changed:.1%} of their trajectories"
        )
        result[name] = {"spearman": one.spearman, "changed_sets": 1 - one.share, "changed_rows": one.changed}
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
        print(json.dumps(compared(arguments, Path(cache))))


if __name__ == "__main__":
    main()

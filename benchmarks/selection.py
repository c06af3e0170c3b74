"""Scoring and selecting at the size of a large pool: seconds and memory of whole rules, against a loop over problems.

    python benchmarks/selection.py [--problems 200000] [--candidates 5] [--rules lark rsr]

The statistics are synthetic: 11 teachers, of which each problem has `--candidates`. Each rule is what `selector=<name>`
composes to, run by `lark.selection.selection.select` with its record (counts, teacher shares, correlations within
problems). The reference is a loop over problems in plain Python, with the same formula and tie hash and no record, on a
sample of the problems; its time for the whole pool is extrapolated, and its choice has to be the rule's. A ratio above
1 means that `select` is faster. The aim is 1,000,000 rows by both rules in under 20 s and 2 GB.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict

import numpy as np
from profiles import resident_peak_bytes

from lark.selection.candidates import Candidates
from lark.selection.policies import Chi2, TopB
from lark.selection.rule import Rule
from lark.selection.scores.statistics import Lark, RankSurprisal
from lark.selection.selection import Selection, select

TEACHERS = 11
BUDGET = 2
SAMPLE = 20_000  # problems that the loop goes through
SECONDS, GIGABYTES = 20.0, 2.0
RULES = {
    "lark": Rule(name="lark", score=Lark(), policy=Chi2(budget=BUDGET)),
    "rsr": Rule(name="rsr", score=RankSurprisal(clip=100), policy=TopB(budget=BUDGET)),
}


def synthetic(problems: int, candidates: int) -> Candidates:
    """A pool in which longer solutions have lower losses and every teacher a style of its own."""
    rng = np.random.default_rng(0)
    rows = problems * candidates
    teacher_N = np.argsort(rng.random((problems, TEACHERS)), 1)[:, :candidates].ravel()
    tokens_N = np.maximum(rng.lognormal(5.5 + 0.1 * teacher_N, 0.6).astype(np.int64), 8)
    loss_N = rng.gamma(8, (0.3 + 0.05 * teacher_N) / 8) * (tokens_N / 300) ** -0.2
    brier_N = 0.6 * (1 - np.exp(-loss_N)) * rng.uniform(0.8, 1.2, rows)
    rank_N = tokens_N * (1 + 5 * loss_N * rng.uniform(0.5, 1.5, rows))
    teachers = np.array([f"teacher {i}" for i in range(TEACHERS)], object)
    return Candidates(
        problem_id=np.array([f"problem {i // candidates}" for i in range(rows)], object),
        candidate_id=np.array([str(i % candidates) for i in range(rows)], object),
        row_N=np.arange(rows),
        statistics={
            "num_tokens": tokens_N,
            "loss": loss_N,
            "brier": brier_N,
            "sum_surprisal": loss_N * tokens_N,
            "end_surprisal": 0.1 * loss_N,
            "sum_rank_100": rank_N,
            "end_rank": np.ones(rows, np.int64),
        },
        read_column=lambda name, row_N: teachers[teacher_N[row_N]] if name == "teacher" else np.full(len(row_N), None),
    )


def tie_key(problem: str, candidate: str) -> bytes:
    return hashlib.sha256(f"0\x1f{problem}\x1f{candidate}".encode()).digest()[:8]


def loop(name: str, candidates: Candidates, rows: int) -> dict[int, float]:
    """Share by row of what the rule `name` chooses among the first `rows`, one problem after the other."""
    column = {key: values[:rows].tolist() for key, values in candidates.statistics.items()}
    problems: dict[str, list[int]] = defaultdict(list)
    for row, problem in enumerate(candidates.problem_id[:rows]):
        problems[problem].append(row)
    share: dict[int, float] = {}
    for members in problems.values():
        if name == "lark":
            total = sum(column["loss"][k] for k in members)
            rho_bar = sum(column["brier"][k] for k in members) / total
            score = {k: (2 * column["brier"][k] - rho_bar * column["loss"][k]) / total for k in members}
        else:
            ranks = {k: column["sum_rank_100"][k] - min(column["end_rank"][k], 100) for k in members}
            score = {k: -ranks[k] / (column["sum_surprisal"][k] - column["end_surprisal"][k]) for k in members}
        order = sorted(
            members, key=lambda k: (-score[k], tie_key(candidates.problem_id[k], candidates.candidate_id[k]))
        )
        best, excluded = order[:BUDGET], order[BUDGET:]
        if name == "lark" and excluded:
            excess = {k: score[k] - score[excluded[0]] for k in best}
            mass = sum(excess.values())
            share |= {k: value / mass for k, value in excess.items()}
        else:
            share |= dict.fromkeys(best, 1 / len(best))
    return share


def same_choice(selection: Selection, share: dict[int, float], rows: int) -> bool:
    chosen = selection.row < rows
    row, expected = selection.row[chosen].tolist(), dict(sorted(share.items()))
    return row == list(expected) and np.allclose(selection.q[chosen], list(expected.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", type=int, default=200_000)
    parser.add_argument("--candidates", type=int, default=5, help=f"of each problem, at most {TEACHERS}")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    arguments = parser.parse_args()
    if arguments.problems < 1 or not 1 <= arguments.candidates <= TEACHERS:
        parser.error(f"--problems must be at least 1 and --candidates from 1 to {TEACHERS}")

    start_memory, start = resident_peak_bytes() / 2**30, time.perf_counter()
    candidates = synthetic(arguments.problems, arguments.candidates)
    rows, sample = len(candidates), min(SAMPLE, arguments.problems) * arguments.candidates
    print(
        f"pool        {rows:,} rows of {arguments.problems:,} problems, {TEACHERS} teachers, made in "
        f"{time.perf_counter() - start:.1f} s; {resident_peak_bytes() / 2**30:.2f} GB, "
        f"of which {start_memory:.2f} imports"
    )
    seconds, ratio = {}, {}
    for name in arguments.rules:
        start = time.perf_counter()
        selection = select(RULES[name], candidates, seed=0)
        seconds[name] = time.perf_counter() - start
        start = time.perf_counter()
        share = loop(name, candidates, sample)
        looped = (time.perf_counter() - start) * rows / sample
        if not same_choice(selection, share, sample):
            sys.exit(f"{name}: select() and the loop over problems choose differently")
        ratio[name] = looped / seconds[name]
        print(
            f"{name:<11} {seconds[name]:.2f} s, {rows / seconds[name]:,.0f} rows/s, {len(selection.row):,} chosen; the "
            f"loop {looped:.2f} s (extrapolated from {sample:,} rows, same choice): ratio {ratio[name]:.2f}"
        )
    total, peak = sum(seconds.values()), resident_peak_bytes() / 2**30
    print(
        f"all rules   {total:.2f} s (aim {SECONDS:g} s for 1,000,000 rows), peak {peak:.2f} GB (aim {GIGABYTES:g} GB)"
    )
    rounded = {
        "rows": rows,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "rows_per_second": round(rows / total),
        "loop_over_select": {name: round(value, 2) for name, value in ratio.items()},
        "peak_gigabytes": round(peak, 3),
    }
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()

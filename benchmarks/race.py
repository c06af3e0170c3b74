"""Racing against the full pass: tokens saved and what the choice loses by it, rule by rule.

    python benchmarks/race.py --problems 100                                        the embedded task and student
    python benchmarks/race.py --pool pool.jsonl --model-path SmolLM2-135M-Instruct.gguf --problems 60 --dtype float32

A sample of the pool's problems, by hash, is scored in full once, and every token's statistics are kept. From them come

at 95 %     what a race saves with the margin at which it chooses 95 % of the full choice: every problem is raced, on a
            forecast from the others, with ever narrower margins
rehearsed   `--splits` times the sample is halved by chance; on one half the race is calibrated for each `--confidence`,
            on the other it is rehearsed: the margin, the span tokens saved there, the share of the full choice that is
            chosen (and by chance), and what would be saved of the whole pool, calibration included
real        for each rule of `--real`: calibrated at the first confidence on the sample's first half, the race itself on
            `--real-problems` of the other; seconds at work against those of the full pass over the same problems, which
            is done again just before

The last line is JSON. `--cache` keeps the full pass, so that the rest can be done again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from lark.common.cache import complete, identity_hash, read_json
from lark.common.groups import Groups, unit_hash
from lark.experiment.description import quiet_libraries
from lark.scoring.passes import Statistics
from lark.scoring.race_pass import RaceModule, RaceWork
from lark.scoring.statistics_pass import PassModule, Probe, ProbeModule, Work, measure
from lark.scoring.table_cache import read_columns
from lark.selection.candidates import Candidates
from lark.selection.contests import Contest, contests, raced
from lark.selection.judge import Judge, Problem, Scored, rehearsal
from lark.selection.policies import Policy
from lark.selection.race import MARGINS, Trial, calibration_size, top
from lark.selection.scores.statistics import Lark, Likelihood, RankSurprisal
from lark.selection.selection import Rule
from lark.student.student import Student
from lark.tasks.arithmetic import generate
from lark.tasks.task import EmbeddedTask, Task
from lark.training.datamodule import TrajectoryDataModule
from lark.training.recipe import Recipe

SCORES = {
    "lark": (Lark(), "chi2"),
    "lark_length": (Lark(length_exponent=1.0), "chi2"),
    "rsr": (RankSurprisal(clip=100), "top_b"),
    "likelihood": (Likelihood(), "top_b"),
}
AIM = 0.95


def rules(budget: int) -> dict[str, Contest]:
    """As `selector=<name>` composes."""
    made = {}
    for name, (score, kind) in SCORES.items():
        rule = Rule(name=name, score=score, policy=Policy(kind=kind, budget=budget))  # type: ignore[arg-type]
        (made[name],) = contests({"selector": rule}, match="trajectories")
    return made


def prepare(arguments: argparse.Namespace, cache: Path) -> TrajectoryDataModule:
    limits = {"held_out": 0.0, "max_length": arguments.max_length}
    if arguments.pool:
        task = Task(name="pool", pool=[str(Path(path).resolve()) for path in arguments.pool], **limits)
    else:
        settings = {"seed": 0, "problems": arguments.problems, "eval_problems": 1, "shifted_problems": 1}
        sets = {"eval": "eval.jsonl"}
        task = EmbeddedTask(name="arithmetic", pool=None, generate=generate, settings=settings, sets=sets, **limits)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"accelerator": "auto" if torch.cuda.is_available() else "cpu", "devices": 1}
    data = TrajectoryDataModule(
        task=task,
        student=Student(name="student", path=arguments.model_path, dtype=arguments.dtype),
        selector=rules(arguments.budget)["lark"].rule,
        baseline=None,
        recipe=Recipe(),
        probe=Probe(keep="tokens", shard_rows=32),
        seed=0,
        cache=cache,
        make_trainer=lambda label: Trainer(
            **quiet, enable_model_summary=False, inference_mode=False, precision="32-true"
        ),
        say=partial(print, file=sys.stderr),
    )
    data.prepare_data()
    return data


def halves(data: TrajectoryDataModule, *, problems: int, budget: int) -> tuple[list[np.ndarray], int]:
    """The rows of two halves of the sample, and how many problems of the pool have more candidates than the budget."""
    pool = data.trajectories
    groups = Groups.from_ids(pool.problem_id[pool.scored])
    ids = np.array(list(dict.fromkeys(pool.problem_id[pool.scored].tolist())), object)
    contested = np.flatnonzero(groups.size > budget)
    drawn = contested[np.argsort(unit_hash(0, ids[contested], ["problem"] * len(contested), salt="benchmark"))]
    sample = drawn[: min(problems, len(drawn))]
    parts = sample[: len(sample) // 2], sample[len(sample) // 2 :]
    return [pool.scored[np.isin(groups.index_N, part)] for part in parts], len(contested)


def full_pass(data: TrajectoryDataModule, rows: np.ndarray) -> Path:
    """The cache folder of the plain pass over these rows."""
    work = Work(student=data.asked, probe=data.probe, pool=data.trajectories, rows=rows, seed=0)
    identity = data.pass_identity(Statistics(), work)
    folder = data.cache / "full" / identity_hash(identity)
    if not complete(folder):
        measure(data.make_trainer(""), ProbeModule(wanted=Statistics(), work=work, folder=folder), identity)
    return folder


def scored_problems(data: TrajectoryDataModule, folder: Path, of: list[Contest]) -> list[Scored]:
    """Every problem with surprisal, Brier score and rank of its candidates' tokens, [T, 3] each."""
    columns, pool = read_columns(folder), data.trajectories
    surprisal, rank, log_sum_p2 = (columns[f"token_{name}"] for name in ("surprisal", "rank", "log_sum_p2"))
    found = []
    for group in Groups.from_ids(pool.problem_id[columns["row"]]).split():
        enters = dict.fromkeys(of, np.ones(len(group), bool))
        values = [
            np.stack([surprisal[i], 1 - 2 * np.exp(-surprisal[i]) + np.exp(log_sum_p2[i]), rank[i]], 1)
            for i in group.tolist()
        ]
        found.append((Problem.of(pool.encoded(columns["row"][group]), enters), values))
    return found


def saved_and_overlap(trial: Trial, contest: Contest, judge: Judge, margin: float) -> tuple[float, float]:
    """Share of the span tokens that are not read, and mean share of the full choice that is chosen."""
    enters = {contest: np.ones(len(trial.tokens_N), bool)}
    _, read_N, final = trial.race({contest: margin}, enters, judge.noise)
    overlap_G = trial.overlap(contest, enters, judge.noise, final[contest])
    return 1 - read_N.sum() / trial.tokens_N.sum(), float(overlap_G.mean())


def at_overlap(points: list[tuple[float, float]], aim: float) -> float | None:
    """What is saved where the overlap, from wide to narrow margins, falls below the aim; between two margins by a line.
    None if it does with the widest.
    """
    before: tuple[float, float] | None = None
    for saved, overlap in points:
        if overlap < aim:
            return (
                None if before is None else before[0] + (saved - before[0]) * (before[1] - aim) / (before[1] - overlap)
            )
        before = saved, overlap
    return points[-1][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pool", nargs="+", help="JSONL files; left out: the embedded task")
    parser.add_argument("--model-path", default="shipped:tiny")
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--confidence", type=float, nargs="+", default=[0.95, 0.9, 0.8])
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--real", nargs="*", choices=SCORES, default=["lark"])
    parser.add_argument("--real-problems", type=int, default=24)
    parser.add_argument("--cache", help="folder for the full pass; left out: a temporary one")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        report(arguments, Path(arguments.cache or temporary))


def report(arguments: argparse.Namespace, cache: Path) -> None:
    data = prepare(arguments, cache)
    contest_of = rules(arguments.budget)
    parts, pool_problems = halves(data, problems=arguments.problems, budget=arguments.budget)
    folders = [full_pass(data, rows) for rows in parts]
    scored = [scored_problems(data, folder, list(contest_of.values())) for folder in folders]
    everything = [*scored[0], *scored[1]]
    sizes = np.array([len(problem.tokens_K) for problem, _ in everything])
    chance = float((arguments.budget / sizes).mean())
    tokens = sum(int(problem.tokens_K.sum()) for problem, _ in everything)
    print(
        f"sample      {len(everything)} problems of {pool_problems:,}, {sizes.sum():,} trajectories, {tokens:,} span "
        f"tokens; full pass {sum(read_json(folder / 'manifest.json')['seconds'] for folder in folders):.0f} s"
    )
    results: dict[str, dict[str, Any]] = {name: {} for name in contest_of}

    judge = Judge(list(contest_of.values()), everything, confidence=0.5)
    trial, _ = rehearsal(everything, clip=judge.clips)
    for name, contest in contest_of.items():
        points = [saved_and_overlap(trial, contest, judge, margin) for margin in MARGINS.tolist()]
        saved = at_overlap(points, AIM)
        results[name]["saved_at_95"] = saved
        shown = "less than the widest margin saves" if saved is None else f"{saved:.0%} of the span tokens saved"
        print(f"at {AIM:.0%}     {name:<11} {shown}, with {contest.places} places")

    rng = np.random.default_rng(0)
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for _ in range(arguments.splits):
        order = rng.permutation(len(everything))
        known, others = order[: len(order) // 2], order[len(order) // 2 :]
        for confidence in arguments.confidence:
            judge = Judge(list(contest_of.values()), [everything[i] for i in known], confidence=confidence)
            trial, _ = rehearsal([everything[i] for i in others], clip=judge.clips, forecast=judge.forecast)
            for name, contest in contest_of.items():
                margin = judge.margins[contest]
                point = (margin, *saved_and_overlap(trial, contest, judge, margin))
                found.setdefault((name, confidence), []).append(point)
    for (name, confidence), points in found.items():
        margin, saved, overlap = np.mean(points, 0)
        share = calibration_size(pool_problems, confidence) / pool_problems
        results[name][f"rehearsed_{confidence:g}"] = {
            "saved": saved,
            "overlap": overlap,
            "of_pool": saved * (1 - share),
        }
        print(
            f"rehearsed   {name:<11} confidence {confidence:g}: margin {margin:.1f}, {saved:.0%} saved, overlap "
            f"{overlap:.3f} (sd over splits {np.std([point[2] for point in points]):.3f}, by chance {chance:.2f}); of "
            f"the whole pool, {share:.0%} of it to calibrate on, {saved * (1 - share):.0%}"
        )

    if arguments.real:
        ids = data.trajectories.problem_id[parts[1]]
        rows = parts[1][np.isin(ids, list(dict.fromkeys(ids.tolist()))[: arguments.real_problems])]
        plain = timed(ProbeModule, Probe(), data, rows, cache)
    for name in arguments.real:
        results[name]["real"] = real(data, contest_of[name], scored[0], rows, plain, arguments.confidence[0], cache)
    print(json.dumps({"problems": len(everything), "chance": chance, "rules": results}, default=float))


def timed(
    make: Callable[..., PassModule],
    probe: Probe,
    data: TrajectoryDataModule,
    rows: np.ndarray,
    cache: Path,
    **more: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns of a pass over these rows, and its manifest."""
    kind = RaceWork if more else Work
    work = kind(student=data.asked, probe=probe, pool=data.trajectories, rows=rows, seed=0, **more)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        measure(data.make_trainer(""), make(wanted=Statistics(), work=work, folder=folder), {})
        return dict(read_columns(folder)), read_json(folder / "manifest.json")


def real(
    data: TrajectoryDataModule,
    contest: Contest,
    calibration: list[Scored],
    rows: np.ndarray,
    plain: tuple[dict[str, np.ndarray], dict[str, Any]],
    confidence: float,
    cache: Path,
) -> dict[str, float]:
    """The race of these rows against their full pass."""
    judge = Judge([contest], calibration, confidence=confidence)
    module = partial(RaceModule, judge=judge)
    columns, cost = timed(module, Probe(race=True, race_confidence=confidence), data, rows, cache, contests=(contest,))
    full, full_cost = plain
    read_N, tokens_N, out_N = columns["read_tokens"], columns["num_tokens"], columns["stopped"]
    groups = Groups.from_ids(data.trajectories.problem_id[rows])
    chosen = []
    for of in (columns, full):
        means = {"loss": of["sum_surprisal"] / tokens_N, "brier": of["sum_brier"] / tokens_N}
        candidates = Candidates(problem_id=groups.index_N, candidate_id=rows, row_N=rows, statistics={**of, **means})
        chosen.append(top(groups, raced(contest.rule).scores(candidates), contest.budget))
    found = {
        "saved": 1 - read_N.sum() / tokens_N.sum(),
        "overlap": (chosen[0] & chosen[1]).sum() / chosen[1].sum(),
        "seconds": cost["seconds"],
        "full_seconds": full_cost["seconds"],
        "ratio": full_cost["seconds"] / cost["seconds"],
        "computed_tokens": cost["computed_tokens"],
        "full_computed_tokens": full_cost["computed_tokens"],
        "difference": np.abs(columns["sum_surprisal"] / full["sum_surprisal"] - 1)[~out_N].max(),
    }
    saved, overlap, ratio = (found[name] for name in ("saved", "overlap", "ratio"))
    print(
        f"real        {contest.rule.name:<11} confidence {confidence:g}, margin {judge.margins[contest]:.1f}: "
        f"{out_N.sum():,} of {len(rows):,} trajectories given up, {saved:.0%} of {tokens_N.sum():,} span tokens saved, "
        f"overlap {overlap:.3f}; {cost['seconds']:.0f} s against {full_cost['seconds']:.0f} s of the full pass, ratio "
        f"{ratio:.2f} ({cost['computed_tokens']:,} tokens computed against {full_cost['computed_tokens']:,}); "
        f"survivors differ by {found['difference']:.1g} at most"
    )
    return found


if __name__ == "__main__":
    main()

"""Pooled arms, differences and the grid, by hand. The problems are few: figures, not intervals, are what is checked."""

import dataclasses
import json
import math

import numpy as np
import pytest
from summaries import Accuracies, accuracies, arm, run

from lark.common.cache import read_json, write_json
from lark.comparison.comparison import (
    Comparison,
    Difference,
    Group,
    PooledArm,
    SetDifference,
    compare,
    compute_curve_mean,
)
from lark.comparison.inference import compute_paired_difference, compute_sign_flip_p, compute_smallest_detectable
from lark.comparison.labels import UNTRAINED

SEEDS = (0, 1, 2)


def group_of(*runs) -> Group:
    (group,) = compare(runs).groups
    return group


def arms_of(group: Group) -> dict[str, PooledArm]:
    return {one.label: one for one in group.arms}


def difference_of(*runs) -> Difference:
    (difference,) = group_of(*runs).differences
    return difference


def on(difference: Difference, name: str = "eval") -> SetDifference:
    return difference.sets[name]


# ---- arms


def test_figures_of_an_arm_are_means_over_seeds() -> None:
    cost = [{"forward_tokens": n, "backward_tokens": 2 * n, "seconds": n / 8} for n in (8, 16, 24)]
    runs = [
        run(
            selector=arm(
                "lark",
                f"a{seed}",
                accuracies([0.25 * seed, 0.5]),
                trajectories=100 + seed,
                tokens=1000 * (1 + seed),
                effective_sample_size=50.0 + seed,
                held_out_loss=1.0 + seed,
                curve=[{"step": 0, "held_out/loss": 5.0}, {"step": 4, "held_out/loss": 1.0 + seed}],
                cost=cost[seed],
                lr=[1e-4, 3e-4, 1e-4][seed],
            ),
            seed=seed,
        )
        for seed in SEEDS
    ]
    group = group_of(*runs)
    assert [one.label for one in group.arms] == [UNTRAINED, "lark"]
    lark = arms_of(group)["lark"]
    assert lark.seeds == SEEDS and lark.trained and lark.matched
    assert (lark.trajectories, lark.tokens, lark.effective_sample_size) == (101, 2000, 51)
    assert (lark.held_out_loss, lark.mean_loss) == (2.0, 3.5)  # curves of mean 3, 3.5 and 4
    assert (lark.forward_tokens, lark.backward_tokens, lark.seconds) == (16, 32, 2)
    assert lark.lr == (1e-4, 3e-4)
    assert lark.metrics["eval"] == pytest.approx({"avg@4": 0.375, "pass@4": 0.475, "stop": 0.9, "boxed": 0.9})
    untrained = arms_of(group)[UNTRAINED]
    assert not untrained.trained and untrained.trajectories == 0 and untrained.lr == ()


def test_an_arm_of_many_runs_counts_once_a_seed() -> None:
    """Of seed 0 there are nine runs, of seed 1 one: the mean is still over two students."""
    students = {seed: arm("lark", f"a{seed}", accuracies([float(seed), float(seed)])) for seed in (0, 1)}
    runs = [
        run(selector=students[0], baseline=arm(f"rule{i}", f"r{i}", accuracies([0.0, 1.0])), seed=0) for i in range(9)
    ]
    runs.append(run(selector=students[1], baseline=arm("rule0", "r1", accuracies([0.0, 1.0])), seed=1))
    arms = arms_of(group_of(*runs))
    assert arms["lark"].metrics["eval"]["avg@4"] == 0.5
    assert arms["lark"].seeds == (0, 1) and arms["rule3"].seeds == (0,)


def test_the_area_under_the_curve_by_hand() -> None:
    curve = [{"step": 0, "held_out/loss": 3.0}, {"step": 10, "held_out/loss": 2.0}, {"step": 40, "held_out/loss": 1.0}]
    assert compute_curve_mean(curve) == (10 * 2.5 + 30 * 1.5) / 40
    gap = [*curve[:1], {"step": 5, "held_out/loss": None}, *curve[1:]]
    assert compute_curve_mean(gap) == compute_curve_mean(curve)
    for too_short in ([], [{}], curve[:1], [{"step": 1}, {"step": 2}]):
        assert math.isnan(compute_curve_mean(too_short))


def test_a_rule_named_like_the_untrained_student_is_trained() -> None:
    rule = f"{UNTRAINED} longest"
    group = group_of(run(selector=arm("lark", "a", accuracies([1.0])), baseline=arm(rule, "b", accuracies([0.0]))))
    assert [(one.label, one.trained) for one in group.arms] == [(UNTRAINED, False), (rule, True), ("lark", True)]


# ---- differences


def test_a_difference_pairs_seeds_and_problems() -> None:
    """The selector is ahead by 1/4 on every problem of every seed, whatever their accuracies and their order."""
    rng = np.random.default_rng(0)
    runs = []
    for seed in (2, 0, 1):
        answered = accuracies((rng.integers(0, 4, 40) / 4).tolist())
        better = {"eval": {key: 0.25 + value for key, value in reversed(answered["eval"].items())}}  # type: ignore[operator]
        selector = arm("lark", f"a{seed}", better, held_out_loss=1.0 + seed)
        baseline = arm("rsr", f"b{seed}", answered, held_out_loss=1.5 + seed, curve=[])
        runs.append(run(selector=selector, baseline=baseline, seed=seed))
    difference = difference_of(*runs)
    assert (difference.label, difference.seeds) == ("lark - rsr", SEEDS)
    assert difference.held_out_loss == -0.5  # lower is better
    assert math.isnan(difference.mean_loss)  # one side has no curve
    interval = on(difference).interval
    assert interval.low < interval.estimate == 0.25 < interval.high
    assert (interval.seeds, interval.problems, interval.label) == (3, 40, "")
    assert (on(difference).metric, on(difference).left_out) == ("avg@4", "")


def test_a_difference_has_the_interval_and_p_of_its_table_of_seeds_and_problems() -> None:
    rng = np.random.default_rng(1)
    a_SP, b_SP = rng.integers(0, 5, (2, 3, 12)) / 4
    runs = [
        run(
            selector=arm("lark", f"a{seed}", accuracies(a_SP[seed].tolist())),
            baseline=arm("rsr", f"b{seed}", accuracies(b_SP[seed].tolist())),
            seed=seed,
        )
        for seed in SEEDS
    ]
    found = on(difference_of(*runs))
    problems = sorted(range(12), key=str)  # ids are strings
    expected = compute_paired_difference(a_SP[:, problems], b_SP[:, problems])
    assert found.interval == expected
    assert found.p == found.p_holm == compute_sign_flip_p((a_SP - b_SP).mean(0)[problems])
    smallest = compute_smallest_detectable(expected.standard_error, df=expected.df)
    assert found.smallest_detectable == smallest > compute_smallest_detectable(expected.standard_error)


def test_without_a_baseline_the_untrained_student_is_taken_off() -> None:
    before = arm("before", "b", accuracies([0.25, 0.25]), held_out_loss=3.0, curve=[{"step": 0, "held_out/loss": 3.0}])
    difference = difference_of(run(selector=arm("lark", "a", accuracies([0.5, 1.0])), before=before))
    assert difference.label == f"lark - {UNTRAINED}"
    assert on(difference).interval.estimate == 0.5
    assert difference.held_out_loss == -1.0
    assert math.isnan(difference.mean_loss)


def test_what_only_one_side_has_is_left_out_and_counted() -> None:
    """Seed 2 has no baseline; problem 3 is missing on one side of seed 0, problem 4 has no accuracy in seed 1."""
    lark = {
        0: accuracies([1.0, 1.0, 1.0, 0.0, 0.0]),
        1: accuracies([1.0, 1.0, 1.0, 0.0, None]),
        2: accuracies([0.0, 0.0, 0.0, 0.0, 0.0]),
    }
    runs = [
        run(selector=arm("lark", "a0", lark[0]), baseline=arm("rsr", "b0", accuracies([0.5, 0.5, 0.5])), seed=0),
        run(selector=arm("lark", "a1", lark[1]), baseline=arm("rsr", "b1", accuracies([0.5] * 5)), seed=1),
        run(selector=arm("lark", "a2", lark[2]), baseline=arm("longest", "c2", accuracies([0.0] * 5)), seed=2),
    ]
    first, second = group_of(*runs).differences
    assert (first.label, first.seeds, second.label, second.seeds) == ("lark - rsr", (0, 1), "lark - longest", (2,))
    assert on(first).left_out == "seed 2, 2 problems"
    assert (on(first).interval.problems, on(first).interval.estimate) == (3, 0.5)
    assert on(second).left_out == "seed 0, seed 1"


def test_nothing_in_common_is_no_difference() -> None:
    a: Accuracies = {"eval": {"x": 1.0, "y": 1.0}}
    b: Accuracies = {"eval": {"u": 0.0, "v": 0.0}}
    one = run(selector=arm("lark", "a", accuracies([1.0])), baseline=arm("rsr", "b", accuracies([0.0])))
    one["arms"]["selector"]["per_problem"], one["arms"]["baseline"]["per_problem"] = a, b
    other = run(selector=arm("lark", "a", a), baseline=arm("longest", "c", {"eval": {"x": 0.0, "y": 0.5}}))
    first, second = group_of(one, other).differences
    assert on(first).interval.label == "nothing in common" and on(first).left_out == "4 problems"
    assert all(map(math.isnan, (on(first).interval.estimate, on(first).interval.low, on(first).p, on(first).p_holm)))
    assert on(second).p_holm == on(second).p == 0.5  # a family of one


def test_missing_losses_and_empty_evaluation() -> None:
    selector, baseline = (arm(rule, rule, {}, held_out_loss=None, curve=[]) for rule in ("lark", "rsr"))
    group = group_of(run(selector=selector, baseline=baseline))
    assert group.sets == {} and group.differences[0].sets == {}
    assert math.isnan(group.differences[0].held_out_loss) and math.isnan(arms_of(group)["lark"].held_out_loss)
    one_lacks = arm("lark", "lark1", {}, held_out_loss=1.0, curve=[])
    pooled = arms_of(group_of(run(selector=selector), run(selector=one_lacks, seed=1)))["lark"]
    assert pooled.held_out_loss == 1.0


def test_holm_over_the_pairs_of_a_set() -> None:
    """All n problems better: p = 2 / 2^n, and the smallest of three counts threefold."""

    def ahead_on(problems: int):
        return accuracies([0.0] * problems + [1.0] * (6 - problems)) | accuracies([0.0] * 6, "other")

    selector = arm("lark", "a", accuracies([1.0] * 6) | accuracies([1.0] * 6, "other"))
    counts = {"random": 3, "rsr": 6, "longest": 5}
    group = group_of(
        *(run(selector=selector, baseline=arm(rule, rule, ahead_on(count))) for rule, count in counts.items())
    )
    found = {one.baseline: one.sets for one in group.differences}
    assert {rule: of_rule["eval"].p for rule, of_rule in found.items()} == {
        "random": 0.25,
        "rsr": 0.03125,
        "longest": 0.0625,
    }
    assert {rule: of_rule["eval"].p_holm for rule, of_rule in found.items()} == {
        "random": 0.25,
        "rsr": 0.09375,
        "longest": 0.125,
    }
    assert {of_rule["other"].p_holm for of_rule in found.values()} == {3 * 0.03125}  # a family of its own


# ---- groups and the grid


def constant(difference: float, *, rule: str = "lark", **more):
    """A run in which every one of 60 problems differs by as much."""
    values = [0.5 + difference] * 60
    return run(
        selector=arm(rule, f"{rule}{difference}", accuracies(values)),
        baseline=arm("random", "r", accuracies([0.5] * 60)),
        **more,
    )


def test_the_grid_counts_wins_ties_and_losses() -> None:
    comparison = compare(
        [
            constant(0.25, task="a"),
            constant(0.0, task="a", model="b"),
            constant(-0.125, task="b"),
            constant(0.25, task="b", rule="rsr"),
        ]
    )
    assert comparison.columns == (("a", "tiny", "eval"), ("a", "b", "eval"), ("b", "tiny", "eval"))
    lark, rsr = comparison.grid
    assert (lark.label, lark.wins, lark.ties, lark.losses) == ("lark - random", 1, 1, 1)
    assert lark.average == pytest.approx(0.125 / 3)
    assert [cell and cell.estimate for cell in lark.cells] == [0.25, 0.0, -0.125]
    assert (rsr.label, rsr.wins, rsr.ties, rsr.losses) == ("rsr - random", 1, 0, 0)
    assert [cell and cell.estimate for cell in rsr.cells] == [None, None, 0.25]
    assert rsr.average == 0.25


def test_an_interval_that_there_is_not_neither_wins_nor_ties() -> None:
    one_problem = run(selector=arm("lark", "a", accuracies([1.0])), baseline=arm("random", "b", accuracies([0.0])))
    comparison = compare([one_problem, constant(0.25, task="b")])
    (row,) = comparison.grid
    assert (row.wins, row.ties, row.losses) == (1, 0, 0)
    assert row.average == 0.625


def test_failed_and_stopped_runs_are_listed() -> None:
    failed = {"status": "failed", "error": "no memory", "folder": "x/1"}
    stopped = {"status": "finished", "stopped_after": "selection", "folder": "x/2"}
    comparison = compare([constant(0.25), failed, stopped])
    assert (comparison.runs, len(comparison.groups)) == (1, 1)
    assert comparison.failed == (("x/1", "no memory"),)
    assert comparison.stopped == (("x/2", "selection"),)
    assert compare([failed]) == Comparison(
        runs=0, groups=(), columns=(), grid=(), failed=(("x/1", "no memory"),), stopped=()
    )


def test_a_comparison_of_summaries_from_disk_is_the_same(tmp_path) -> None:
    """JSON has no NaN: what is missing there is null."""
    one = run(selector=arm("lark", "a", accuracies([1.0])), baseline=arm("rsr", "b", accuracies([0.0])))
    one["arms"]["selector"]["held_out_loss"] = math.nan
    write_json(tmp_path / "summary.json", one)
    memory, disk = (json.dumps(dataclasses.asdict(compare([x]))) for x in (one, read_json(tmp_path / "summary.json")))
    assert memory == disk

"""The page's plots: their figures against the runs', and what they say where there is nothing to plot."""

import html
from dataclasses import replace

import numpy as np
import pytest
from page_folders import RULES, small_sweep

from lark.comparison.summaries import read_summaries
from lark.page.arm_plots import plot_differences, plot_loss_curves, plot_teacher_shares
from lark.page.contents import gather
from lark.page.diagnostic_plots import (
    list_diagnostic_plots,
    plot_agreement,
    plot_bins,
    plot_correlations,
    plot_loss_drop,
)
from lark.page.plots import Plot, assign_looks
from lark.page.pool_plots import plot_overlaps, plot_scores_by_teacher, plot_weights


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    small_sweep(folder)
    (group,) = gather(read_summaries([folder])).groups
    return group


@pytest.fixture(scope="module")
def looks(group):
    return assign_looks(list(group.curves))


def traces(plot: Plot) -> list[dict]:
    assert plot.figure is not None
    return plot.figure["data"]


def every(group, looks) -> list[Plot]:
    (pool,), (diagnosis,) = group.pools, group.diagnoses
    return [
        plot_differences(group.compared),
        plot_loss_curves(group.curves, looks),
        plot_teacher_shares(group.teacher_shares),
        plot_weights(pool, looks),
        plot_scores_by_teacher(pool),
        plot_overlaps(pool),
        *list_diagnostic_plots(diagnosis),
    ]


def test_differences_are_the_tables(group):
    plot = plot_differences(group.compared)
    (trace,) = traces(plot)
    for one, x, plus, minus in zip(
        group.compared.differences, trace["x"], trace["error_x"]["array"], trace["error_x"]["arrayminus"], strict=True
    ):
        interval = one.sets["eval"].interval
        assert x == pytest.approx(100 * interval.estimate, rel=1e-4)
        assert x + plus == pytest.approx(100 * interval.high, rel=1e-3, abs=1e-6)
        assert x - minus == pytest.approx(100 * interval.low, rel=1e-3, abs=1e-6)


def test_curves_are_means_over_seeds_between_the_lowest_and_the_highest(group, looks):
    plot = plot_loss_curves(group.curves, looks)
    lines = {trace["name"]: trace for trace in traces(plot) if "name" in trace}
    bands = [trace for trace in traces(plot) if trace.get("fill") == "toself"]
    assert list(lines) == list(RULES) and len(bands) == len(RULES)
    for (label, by_seed), band in zip(group.curves.items(), bands, strict=True):
        loss = np.array([[point["held_out/loss"] for point in curve] for curve in by_seed.values()])
        np.testing.assert_allclose(lines[label]["y"], loss.mean(0), rtol=1e-4)
        up, down = np.split(np.array(band["y"]), 2)
        np.testing.assert_allclose(up, loss.max(0), rtol=1e-4)
        np.testing.assert_allclose(down[::-1], loss.min(0), rtol=1e-4)


def test_seeds_with_other_steps_are_compared_where_both_have_been(looks):
    def curve(*points):
        return [{"step": step, "held_out/loss": loss} for step, loss in points]

    curves = {"lark": {0: curve((0, 1.0), (10, 0.0)), 1: curve((0, 1.0), (4, 0.6), (6, 0.6))}}
    *_, line = traces(plot_loss_curves(curves, looks))
    assert line["x"] == [0, 4, 6]
    np.testing.assert_allclose(line["y"], [1.0, 0.6, 0.5])


def test_a_rare_teacher_is_one_of_the_others():
    shares = {"lark": {f"t{i:02}": (12 - i) / 78 for i in range(12)}}
    bars = traces(plot_teacher_shares(shares))
    assert [bar["name"] for bar in bars][-1] == "5 others"
    assert sum(bar["x"][0] for bar in bars) == pytest.approx(100, abs=1e-2)


def test_weights_are_cumulated_from_the_heaviest(group, looks):
    plot = plot_weights(group.pools[0], looks)
    lark, equal = traces(plot)
    weight = sorted((w for w in group.pools[0].choices[0].weights if w > 0), reverse=True)
    for x, y in zip(lark["x"], lark["y"], strict=True):
        assert y == pytest.approx(100 * sum(weight[: round(x / 100 * len(weight))]) / sum(weight), rel=1e-3)
    assert equal["x"] == equal["y"] == [0, 100]
    assert "random, longest" in html.unescape(equal["hovertemplate"])


def test_boxes_hold_what_is_left_of_scores_without_their_problems_mean(group):
    pool = group.pools[0]
    plot = plot_scores_by_teacher(pool)
    for choice, trace in zip(pool.choices, traces(plot), strict=True):
        scores: dict[str, dict[str, float]] = {}
        columns = pool.sample.columns
        for problem, teacher, score in zip(columns["problem_id"], columns["teacher"], choice.scores, strict=True):
            scores.setdefault(problem, {})[teacher] = score
        for name, median, q1 in zip(trace["y"], trace["median"], trace["q1"], strict=True):
            apart = [of[name] - sum(of.values()) / len(of) for of in scores.values()]
            assert median == pytest.approx(np.median(apart), rel=1e-3, abs=1e-6)
            assert q1 == pytest.approx(np.quantile(apart, 0.25), rel=1e-3, abs=1e-6)
    assert [name for name, _ in plot.choices] == list(RULES)
    assert [trace["meta"] for trace in traces(plot)] == [0, 1, 2]


def test_overlaps_are_jaccard_indices_by_problem(group):
    pool = group.pools[0]
    (trace,) = traces(plot_overlaps(pool))
    columns = pool.sample.columns

    def taken(choice):
        of: dict[str, set[str]] = {}
        for problem, candidate, weight in zip(
            columns["problem_id"], columns["candidate_id"], choice.weights, strict=True
        ):
            of.setdefault(problem, set()).update({candidate} if weight else set())
        return of

    sets = [taken(choice) for choice in pool.choices]
    for i, a in enumerate(sets):
        assert trace["z"][i][i] is None
        for j, b in enumerate(sets):
            if i != j:
                mean = np.mean([len(a[p] & b[p]) / len(a[p] | b[p]) for p in a])
                assert trace["z"][i][j] == pytest.approx(mean, rel=1e-4)


def test_points_are_standardised_within_their_problems(group):
    (diagnosis,) = group.diagnoses
    plot = plot_loss_drop(diagnosis)
    of_first = [trace for trace in traces(plot) if trace["meta"] == 0]
    assert sum(len(trace["x"]) for trace in of_first) == len(diagnosis.rows)
    by_problem: dict[str, list[float]] = {}
    for trace in of_first:
        for text, x in zip(trace["text"], trace["x"], strict=True):
            by_problem.setdefault(text.split(",")[0], []).append(x)
    for values in by_problem.values():
        assert np.mean(values) == pytest.approx(0, abs=1e-2)
        assert np.std(values) == pytest.approx(1, abs=1e-2)
    assert plot.choices[0][0] == "lark" and "Rank correlation" in plot.choices[0][1]


def test_intervals_reach_both_ways(group):
    plot = plot_agreement(group.diagnoses[0])
    band, dots = traces(plot)
    means = group.diagnoses[0].found["fidelity"]["proxies"]
    for name, x, minus, plus in zip(
        dots["y"], dots["x"], dots["error_x"]["arrayminus"], dots["error_x"]["array"], strict=True
    ):
        mean = means[name]["loss_drop"]["spearman"]
        assert (x - minus, x + plus) == (pytest.approx(mean["low"], abs=1e-3), pytest.approx(mean["high"], abs=1e-3))
    assert dots["x"] == sorted(dots["x"], reverse=True)
    assert band["base"][0] == -0.15 and band["x"][0] == pytest.approx(0.3)


def test_what_is_not_there_is_said(group, looks):
    (pool,), (diagnosis,) = group.pools, group.diagnoses
    nothing = replace(pool, choices=())
    cheap = replace(diagnosis, rows=(), found={"correlations": diagnosis.found["correlations"]})
    no_sets = replace(group.compared, differences=tuple(replace(one, sets={}) for one in group.compared.differences))
    missing = [
        plot_differences(no_sets),
        plot_loss_curves({"lark": {0: []}}, looks),
        plot_teacher_shares({}),
        plot_weights(nothing, looks),
        plot_scores_by_teacher(nothing),
        plot_overlaps(replace(pool, choices=pool.choices[:1])),
        plot_agreement(cheap),
        plot_loss_drop(cheap),
        plot_bins(cheap),
    ]
    assert all(plot.figure is None and plot.missing.endswith(".") for plot in missing)
    assert "diagnostics=full" in plot_bins(cheap).missing
    assert all(plot.figure for plot in plot_correlations(cheap))

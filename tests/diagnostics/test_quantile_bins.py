"""Bins of the score: equal, ordered, and what is said of what was trained on them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lark.diagnostics.quantile_bins import assign_bins, compute_trends, select_by_bin, summarise_bins
from lark.selection.candidates import Candidates
from lark.selection.selection import Selection

SIZES = [7, 4, 3, 9]


def candidates(order=None):
    problem = np.repeat([f"p{i}" for i in range(4)], SIZES).astype(object)
    order = np.arange(len(problem)) if order is None else order
    return Candidates(
        problem_id=problem[order],
        candidate_id=np.array([str(i) for i in range(len(problem))], object)[order],
        row_N=np.arange(len(problem)),
        statistics={"num_tokens": np.full(len(problem), 5)},
        read_column=lambda name, row_N: np.array([None] * len(row_N), object),
    )


def test_bins_are_of_equal_size_and_ordered_in_every_problem():
    own, score_N = candidates(), np.random.default_rng(0).normal(size=23)
    bin_N = assign_bins(score_N, own, bins=4, seed=0)
    assert np.bincount(bin_N[bin_N >= 0]).tolist() == [1 + 1 + 2] * 4
    for rows, size in zip(own.groups.split(), SIZES, strict=True):
        for low in range(4):
            below, above = (score_N[rows][np.isin(bin_N[rows], bins)] for bins in ([low], range(low + 1, 4)))
            assert len(below) == size // 4
            assert not len(above) or below.max(initial=-9) < above.min()


def test_what_has_no_score_is_in_no_bin():
    score_N = np.arange(23.0)
    score_N[:4] = np.nan
    bin_N = assign_bins(score_N, candidates(), bins=3, seed=0)
    assert (bin_N[:4] == -1).all() and sorted(bin_N[4:7].tolist()) == [0, 1, 2]


def test_the_order_of_the_rows_changes_no_bin():
    score_N, order = np.round(np.random.default_rng(0).normal(size=23), 1), np.random.default_rng(1).permutation(23)
    bin_N = assign_bins(score_N, candidates(), bins=2, seed=0)
    assert assign_bins(score_N[order], candidates(order), bins=2, seed=0).tolist() == bin_N[order].tolist()


def test_what_does_not_divide_is_left_out_whatever_its_score():
    left_out = [
        assign_bins(np.arange(23.0), candidates(), bins=2, seed=seed)[:7].tolist().index(-1) for seed in range(60)
    ]
    assert set(left_out) == set(range(7))


def test_selections_give_every_problem_the_same_weight():
    own, score_N = candidates(), np.random.default_rng(0).normal(size=23)
    bin_N = assign_bins(score_N, own, bins=2, seed=0)
    found = select_by_bin(bin_N, own, rule="marks", bins=2, seed=0, tokens_N=own["num_tokens"])
    assert list(found) == ["bin-1", "bin-2"]
    for number, selection in enumerate(found.values()):
        assert selection.row.tolist() == np.flatnonzero(bin_N == number).tolist()
        share = np.bincount(own.groups.index_N[selection.row], selection.q)
        assert share == pytest.approx(np.ones(4))
        assert selection.record["rule"] == f"marks bin {number + 1} of 2"


# ---- what came of them


@dataclass(frozen=True)
class Trained:
    """As much of an arm as is read."""

    folder: Path
    selection: Selection


def arms_and_figures(tmp_path, losses, accuracies):
    own, score_N = candidates(), np.arange(23.0)
    bin_N = assign_bins(score_N, own, bins=len(losses), seed=0)
    made = select_by_bin(bin_N, own, rule="marks", bins=len(losses), seed=0, tokens_N=own["num_tokens"])
    arms, figures = [], []
    for (name, selection), loss, accuracy in zip(made.items(), losses, accuracies, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        if loss is not None:
            points = [{"step": 0, "held_out/loss": 3.0}, {"step": 2, "held_out/loss": loss}]
            (folder / "trained.json").write_text(json.dumps({"curve": points, "held_out": {"end": points[-1]}}))
        arms.append(Trained(folder=folder, selection=selection))
        problems = {} if accuracy is None else {"eval": {str(i): float(i < 10 * accuracy) for i in range(10)}}
        figures.append({"per_problem": problems})
    return summarise_bins(arms, score_N, bin_N, figures), figures


def test_a_row_a_bin_and_how_they_trend(tmp_path):
    rows, figures = arms_and_figures(tmp_path, [1.0, 1.2, 1.5, 2.0], [0.9, 0.5, 0.3, 0.2])
    assert [row["bin"] for row in rows] == [1, 2, 3, 4]
    assert [row["held_out_loss"] for row in rows] == [1.0, 1.2, 1.5, 2.0]
    assert rows[0]["mean_loss"] == 2.0 and rows[0]["mean_score"] < rows[3]["mean_score"]
    assert {row["trajectories"] for row in rows} == {4} and {row["tokens"] for row in rows} == {20}
    found = compute_trends(rows, figures)
    assert found["held_out_loss"]["spearman"] == pytest.approx(1.0)
    assert found["held_out_loss"]["p"] == pytest.approx(2 / 24)  # of all orders two are as far from none
    assert found["held_out_loss"]["highest_minus_lowest"] == pytest.approx(1.0)
    assert found["eval"]["spearman"] == pytest.approx(-1.0)
    difference = found["eval"]["highest_minus_lowest"]
    assert difference["estimate"] == pytest.approx(-0.7) and difference["low"] < -0.7 < difference["high"]


def test_a_bin_that_diverged_leaves_trends_open(tmp_path):
    rows, figures = arms_and_figures(tmp_path, [1.0, None, 1.5], [0.9, None, 0.3])
    assert math.isnan(rows[1]["held_out_loss"]) and rows[1]["accuracy"] == {}
    found = compute_trends(rows, figures)
    assert list(found) == ["held_out_loss"] and math.isnan(found["held_out_loss"]["spearman"])


def test_two_bins_have_no_trend_and_many_an_approximate_p(tmp_path):
    rows, figures = arms_and_figures(tmp_path, [1.0, 1.2], [None, None])
    assert math.isnan(compute_trends(rows, figures)["held_out_loss"]["spearman"])
    many = [{"bin": i, "held_out_loss": float(i), "accuracy": {}} for i in range(9)]
    assert compute_trends(many, [])["held_out_loss"]["p"] < 1e-4

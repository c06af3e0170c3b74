"""Figures as JSON, as tables, as one flat dict and as lines of the log."""

import csv
import json
import math

import numpy as np

from lark.diagnostics.write import flatten_figures, list_tables, log_bins, log_curves, log_selections, write_diagnostics
from lark.selection.within_problem import UNKNOWN, Mean

MEAN = Mean(mean=0.5, low=0.25, high=0.75, problems=9, chance=0.0)
FOUND = {
    "settings": {"problems": 40},
    "problems": 9,
    "correlations": {"lark": {"loss": {"within": MEAN, "pooled": MEAN}}},
    "overlaps": [{"a": "lark", "b": "random", "mean": 0.2}],
    "curves": {"selector": {"rule": "lark", "area_ratio": 1.25, "steps_to_baseline": math.nan}},
    "fidelity": {
        "proxies": {"rho": {"g": {"spearman": MEAN, "overlap": MEAN}}},
        "kappa": {"mean of": {"mean": np.float64(2.0)}},
    },
    "bins": {"bins": 1, "rows": [{"bin": 1, "accuracy": {"eval": 0.5}}]},
}


def test_json_has_every_field_of_a_mean_and_null_for_what_is_unknown(tmp_path):
    write_diagnostics(tmp_path, FOUND)
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    within = found["correlations"]["lark"]["loss"]["within"]
    assert (within["low"], within["problems"], within["chance_low"]) == (0.25, 9, None)
    assert found["curves"]["selector"]["steps_to_baseline"] is None


def test_flat_has_finite_numbers_by_their_path():
    assert flatten_figures(FOUND) == {
        "diagnostics/problems": 9.0,
        "diagnostics/correlations/lark/loss/within": 0.5,
        "diagnostics/correlations/lark/loss/pooled": 0.5,
        "diagnostics/curves/selector/area_ratio": 1.25,
        "diagnostics/fidelity/proxies/rho/g/spearman": 0.5,
        "diagnostics/fidelity/proxies/rho/g/overlap": 0.5,
        "diagnostics/fidelity/kappa/mean_of/mean": 2.0,
        "diagnostics/bins/bins": 1.0,
    }


def test_tables_hold_a_figure_a_row(tmp_path):
    found = list_tables(FOUND)
    assert set(found) == {"overlaps", "correlations", "fidelity", "bins"}
    assert found["bins"] == [{"bin": 1, "accuracy_eval": 0.5}]
    write_diagnostics(tmp_path, FOUND)
    with (tmp_path / "diagnostics-fidelity.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["score"], first["truth"], first["figure"], first["mean"]) == ("rho", "g", "spearman", "0.5")
    assert second["figure"] == "overlap" and second["chance_low"] == ""


# ---- the log


def test_a_choice_that_overlaps_with_no_other_is_logged(caplog):
    caplog.set_level("INFO", logger="lark")
    weights = {"chosen": 4, "effective_sample_size": 3.0, "effective_within_problem": MEAN, "chi2_within_problem": MEAN}
    teachers = {"a": {"share": 0.75, "chance": 0.5}}
    found = {
        "problems": 2,
        "candidates": 8,
        "correlations": {"all": {"length": {"within": UNKNOWN, "pooled": UNKNOWN}}},
        "selections": {"selector": {"score": "all", "teachers": teachers, "concentration": weights}},
        "overlaps": [{"a": "all", "b": "random", "mean": math.nan, "chance": math.nan, "problems": 0}],
    }
    log_selections(found)
    assert "unknown" in caplog.text and "effective size 3 of 4 trajectories" in caplog.text
    assert "overlap" not in caplog.text


def test_curves_and_bins_are_logged_without_an_evaluation_or_a_trend(caplog):
    caplog.set_level("INFO", logger="lark")
    never = {"area_ratio": 1.2, "steps_to_baseline": math.nan}
    log_curves({"baseline": {"rule": "random", "area_ratio": 1.0}, "selector": {"rule": "lark", **never}})
    assert caplog.text.count("1.200 of the baseline's") == 1 and "random" not in caplog.text
    rows = [{"held_out_loss": loss, "accuracy": {}} for loss in (1.0, 2.0)]
    log_bins({"rule": "lark", "rows": rows, "trends": {"held_out_loss": {"spearman": math.nan, "p": math.nan}}})
    assert "1.000 2.000" in caplog.text and "rank correlation" not in caplog.text

"""Figures as JSON, as tables and as one flat dict."""

import csv
import json
import math

import numpy as np

from lark.common.cache import write_json
from lark.diagnostics.files import flat, levelled, plain, tables, write_table
from lark.selection.within_problem import Mean

MEAN = Mean(mean=0.5, low=0.25, high=0.75, problems=9, chance=0.0)
FOUND = {
    "settings": {"problems": 40},
    "problems": 9,
    "correlations": {"lark": {"loss": {"within": MEAN, "pooled": MEAN}}},
    "overlaps": [{"a": "lark", "b": "random", "mean": 0.2}],
    "curves": {"selector": {"rule": "lark", "area_ratio": 1.25, "steps_to_baseline": math.nan}},
    "fidelity": {
        "proxies": {"rho": {"g": {"spearman": MEAN, "overlap": MEAN}}},
        "kappa": {"first third": {"mean": np.float64(2.0)}},
    },
}


def test_json_has_every_field_of_a_mean_and_null_for_what_is_unknown(tmp_path):
    write_json(tmp_path / "diagnostics.json", plain(FOUND))
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    within = found["correlations"]["lark"]["loss"]["within"]
    assert (within["low"], within["problems"], within["chance_low"]) == (0.25, 9, None)
    assert found["curves"]["selector"]["steps_to_baseline"] is None


def test_flat_has_finite_numbers_by_their_path():
    assert flat(FOUND) == {
        "diagnostics/problems": 9.0,
        "diagnostics/correlations/lark/loss/within": 0.5,
        "diagnostics/correlations/lark/loss/pooled": 0.5,
        "diagnostics/curves/selector/area_ratio": 1.25,
        "diagnostics/fidelity/proxies/rho/g/spearman": 0.5,
        "diagnostics/fidelity/proxies/rho/g/overlap": 0.5,
        "diagnostics/fidelity/kappa/first_third/mean": 2.0,
    }


def test_tables_hold_a_figure_a_row(tmp_path):
    found = tables(FOUND)
    assert set(found) == {"overlaps", "correlations", "fidelity"}
    write_table(tmp_path / "fidelity.csv", found["fidelity"])
    with (tmp_path / "fidelity.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["score"], first["truth"], first["figure"], first["mean"]) == ("rho", "g", "spearman", "0.5")
    assert second["figure"] == "overlap" and second["chance_low"] == ""


def test_a_bins_accuracies_are_columns():
    assert levelled({"bin": 1, "accuracy": {"eval": 0.5}}) == {"bin": 1, "accuracy_eval": 0.5}

"""What is printed, where there is less to say than usual; test_diagnostics.py prints the rest."""

import math

from lark.diagnostics.lines import describe_arms, describe_bins, describe_selections
from lark.selection.within_problem import Mean

UNKNOWN = Mean(mean=math.nan, low=math.nan, high=math.nan, problems=0)


def selection(score, **changed):
    weights = {
        "chosen": 4,
        "effective_sample_size": 3.0,
        "effective_within_problem": Mean(mean=1.5, low=1.0, high=2.0, problems=2),
        "chi2_within_problem": Mean(mean=1.0, low=0.5, high=1.5, problems=2),
        "least_chi2_within_problem": math.nan,
    }
    teachers = {"a": {"share": 0.75, "pool": 0.5, "chance": 0.5}}
    return {"rule": score, "score": score, "teachers": teachers, "concentration": weights, "gap": None} | changed


def test_a_constant_score_and_no_choice_have_nothing_to_say():
    correlations = {"all": {"length": {"within": UNKNOWN, "pooled": UNKNOWN}}}
    lines = list(
        describe_selections(
            {
                "problems": 2,
                "candidates": 8,
                "without_forward_pass": True,
                "correlations": correlations,
                "selections": {"selector": selection("all", coverage={})},
                "overlaps": [{"a": "all", "b": "random", "mean": math.nan, "chance": math.nan, "problems": 0}],
            }
        )
    )
    assert lines[0].startswith("diagnostics 2 problems, 8 candidates;")
    assert "no rule asks the student" in lines[0]
    assert lines[1] == "selector    score with nothing: it is the same for all candidates"
    assert "teachers a 75% (chance 50%); effective size 3 of 4, 1.50 a problem" in lines[2] and "least" not in lines[2]
    assert len(lines) == 3


def test_curves_say_whether_the_baseline_was_reached():
    own = {"own_training_loss_not_comparable": {"ratio": 0.5}}
    none = {"own_training_loss_not_comparable": {}}
    never = {"area_ratio": 1.2, "steps_to_baseline": math.nan, "steps_ratio": math.nan}
    reached = {"area_ratio": 0.9, "steps_to_baseline": 30.0, "steps_ratio": 0.5}
    lines = list(
        describe_arms(
            {
                "baseline": {"rule": "random", "area_ratio": 1.0, **none},
                "selector": {"rule": "lark", **never, **own},
            }
        )
    )
    assert lines == [
        "curve       selector (lark): area under the held-out loss 1.200 of the baseline's; the baseline's final loss "
        "never reached; own training loss to 0.50 of its start (not comparable between arms)"
    ]
    (line,) = describe_arms({"selector": {"rule": "lark", **reached, **none}})
    assert line.endswith("0.900 of the baseline's; the baseline's final loss reached after 30 steps (50% of its own)")


def test_bins_without_an_evaluation():
    assert list(describe_bins(None)) == []
    rows = [{"held_out_loss": 1.0, "trajectories": 5}, {"held_out_loss": 2.0, "trajectories": 5}]
    trends = {"held_out_loss": {"spearman": math.nan, "p": math.nan}}
    found = {"bins": 2, "rule": "lark", "problems": 5, "left_out": 1, "rows": rows, "trends": trends}
    (line,) = describe_bins(found)
    assert line.endswith("(1 candidates left out): held-out loss 1.000 2.000")

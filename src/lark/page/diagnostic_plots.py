"""Plot what a run's diagnostics found: the score against true loss drops, what it goes with, bins of the score.

A figure that the diagnostics do not have is named, with the setting that would give it.

Shapes: n candidates of the problems that the diagnostics followed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lark.common.groups import Groups
from lark.page import plots
from lark.page.contents import Diagnosis
from lark.page.plots import Plot

TRUTH = "exact_loss_drop"
FULL = "they take diagnostics=full, which follows the candidates of some problems with true gradients."


def list_diagnostic_plots(diagnosis: Diagnosis) -> list[Plot]:
    """List all plots of a diagnosis."""
    return [
        plot_agreement(diagnosis),
        plot_loss_drop(diagnosis),
        *plot_correlations(diagnosis),
        plot_bins(diagnosis),
    ]


def plot_agreement(diagnosis: Diagnosis) -> Plot:
    """Plot each score's rank correlation with the true loss drop."""
    if not diagnosis.rows or "fidelity" not in diagnosis.found:
        return Plot(key="agreement", missing=FULL)
    found = diagnosis.found["fidelity"]
    remark = (
        f" Of {found['problems']:,} of {found['of_problems']:,} problems with {found['candidates']:,} candidates; "
        f"gradients over {found['parameters']} parameters."
    )
    means = {name: of["loss_drop"]["spearman"] for name, of in found["proxies"].items()}
    return _plot_means("agreement", means, remark)


def plot_loss_drop(diagnosis: Diagnosis) -> Plot:
    """Plot candidates by score and true loss drop, a view a score and a series a teacher."""
    if not diagnosis.rows or "fidelity" not in diagnosis.found:
        return Plot(key="loss-drop", missing=FULL)
    rows, proxies = diagnosis.rows, diagnosis.found["fidelity"]["proxies"]
    groups = Groups.from_ids([row["problem_id"] for row in rows])
    teacher_n = np.array([row["teacher"] for row in rows])
    truth_n = _standardise([row[TRUTH] for row in rows], groups)
    traces = []
    for view, score in enumerate(proxies):
        score_n = _standardise([row.get(score, "") for row in rows], groups)
        for number, teacher in enumerate(dict.fromkeys(teacher_n.tolist())):
            here = np.flatnonzero((teacher_n == teacher) & np.isfinite(score_n) & np.isfinite(truth_n)).tolist()
            marker = {
                "color": plots.get_colour(number),
                "symbol": plots.SYMBOLS[number % len(plots.SYMBOLS)],
                "size": 7,
                "opacity": 0.75,
            }
            traces.append(
                go.Scatter(
                    meta=view,
                    visible=view == 0,
                    name=plots.escape_name(teacher, 24),
                    x=[round(float(x), 3) for x in score_n[here]],
                    y=[round(float(y), 3) for y in truth_n[here]],
                    text=[
                        plots.escape_name(f"problem {rows[i]['problem_id']}, {rows[i]['candidate_id']}") for i in here
                    ],
                    mode="markers",
                    marker=marker,
                    hovertemplate="%{text}<br>score %{x:+.2f}, loss drop %{y:+.2f}",
                )
            )
    figure = plots.make_figure(
        traces,
        height=460,
        xaxis=plots.make_axis("score (standard deviations within its problem)", zeroline=True),
        yaxis=plots.make_axis("true loss drop (the same)", zeroline=True),
    )
    choices = tuple((name, _describe_agreement(of["loss_drop"])) for name, of in proxies.items())
    return Plot(key="loss-drop", figure=figure, choices=choices)


def _standardise(values: Sequence[str], groups: Groups) -> np.ndarray:
    """Compute how many standard deviations each value lies from its problem's mean; an empty text is not known."""
    from_mean_n = plots.subtract_means(np.array([float(value) if value else math.nan for value in values]), groups)
    known_n = np.isfinite(from_mean_n)
    with np.errstate(divide="ignore", invalid="ignore"):
        square_G = groups.sum(np.where(known_n, from_mean_n, 0.0) ** 2) / groups.sum(known_n.astype(float))
        return from_mean_n / np.sqrt(groups.spread(square_G))


def _describe_agreement(of: Mapping[str, Any]) -> str:
    top, text = of["overlap"], f"Rank correlation within problems {_format_mean(of['spearman'])}"
    if top["mean"] is not None:
        text += (
            f"; the true best candidates are among its own in {top['mean']:.0%} of cases (chance {top['chance']:.0%})"
        )
    return f"{text}."


def _format_mean(mean: Mapping[str, Any]) -> str:
    if mean["mean"] is None:
        return "unknown"
    ends = "" if mean["low"] is None else f" [{mean['low']:+.2f}, {mean['high']:+.2f}]"
    return f"{mean['mean']:+.2f}{ends}"


def _plot_means(key: str, means: Mapping[str, Mapping[str, Any]], remark: str = "") -> Plot:
    """Plot a dot for each mean with its interval, over the band in which chance lies."""
    known = {name: mean for name, mean in means.items() if mean["mean"] is not None}
    if not known:
        return Plot(key=key, missing="it is not defined for any problem of this pool.")
    known = dict(sorted(known.items(), key=lambda item: -item[1]["mean"]))
    labels = [plots.escape_name(name, 34) for name in known]
    traces: list[Any] = []
    if all(mean.get("chance_high") is not None for mean in known.values()):
        low, high = (np.array([mean[f"chance_{end}"] for mean in known.values()]) for end in ("low", "high"))
        traces.append(
            go.Bar(
                name="by chance",
                y=labels,
                base=plots.round_values(low),
                x=plots.round_values(high - low),
                orientation="h",
                marker={"color": "var(--chance)"},
                width=0.7,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    ends = ("low", "mean", "high")  # one problem has no interval
    low, middle, high = (
        np.array([mean["mean"] if mean[end] is None else mean[end] for mean in known.values()]) for end in ends
    )
    traces.append(
        plots.make_dots(labels, low, middle, high, form="+.2f", marker={"color": "var(--c1)"}, showlegend=False)
    )
    figure = plots.make_figure(
        traces,
        height=100 + 26 * len(labels),
        xaxis=plots.make_axis("rank correlation within problems", range=[-1.05, 1.05], zeroline=True),
        yaxis=plots.order_labels(labels),
    )
    return Plot(key=key, figure=figure, remark=remark)


def plot_correlations(diagnosis: Diagnosis) -> list[Plot]:
    """Plot what scores go with: the student's loss, length, correctness."""
    found = diagnosis.found.get("correlations", {})
    plots_of_targets = []
    for target in ("loss", "length", "correct"):
        key, means = f"with-{target}", {score: of[target]["within"] for score, of in found.items() if target in of}
        unknown = "no rule asked the student, so nothing is known of its losses."
        plots_of_targets.append(_plot_means(key, means) if means else Plot(key=key, missing=unknown))
    return plots_of_targets


def plot_bins(diagnosis: Diagnosis) -> Plot:
    """Plot held-out loss and, below it, accuracies against the bin."""
    found = diagnosis.found.get("bins")
    if not found or not found["rows"]:
        return Plot(key="bins", missing="they take diagnostics=full with diagnostics.bins of 2 or more.")
    rows = found["rows"]
    bins = [f"{row['bin']} of {found['bins']}" for row in rows]
    losses = [math.nan if row["held_out_loss"] is None else row["held_out_loss"] for row in rows]
    look = {"mode": "lines+markers", "marker": {"size": 9}, "hovertemplate": "%{y:.4f} nats/token"}
    traces = [plots.make_line("held-out loss", bins, plots.round_values(losses), colour="var(--c1)", **look)]
    for number, name in enumerate(rows[0]["accuracy"], 1):
        accuracy = plots.round_values([100 * row["accuracy"][name] for row in rows])
        look |= {
            "marker": {"size": 9, "symbol": plots.SYMBOLS[number % len(plots.SYMBOLS)]},
            "hovertemplate": "%{y:.1f} %",
        }
        traces.append(
            plots.make_line(f"accuracy on {name}", bins, accuracy, colour=plots.get_colour(number), yaxis="y2", **look)
        )
    two = len(traces) > 1
    layout = {"yaxis": plots.make_axis("held-out loss<br>(nats/token)", **({"domain": [0.56, 1]} if two else {}))}
    if two:
        layout["yaxis2"] = plots.make_axis("accuracy (%)", domain=[0, 0.44], rangemode="tozero", anchor="x")
    figure = plots.make_figure(
        traces,
        height=520 if two else 320,
        xaxis=plots.make_axis("bin of the score, lowest first", type="category", anchor="y2" if two else "y"),
        legend={"orientation": "h"},
        **layout,
    )
    trends = [
        f"{name.replace('_', ' ')} {of['spearman']:+.2f} (p {of['p']:.2f})"
        for name, of in found["trends"].items()
        if of.get("spearman") is not None
    ]
    remark = f" Score of {found['rule']}, {found['problems']:,} problems."
    remark += f" Rank correlation with the bin's number: {', '.join(trends)}." if trends else ""
    return Plot(key="bins", figure=figure, remark=remark)

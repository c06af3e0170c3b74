"""Plot what the arms came to: differences, loss curves, whose trajectories they were trained on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lark.comparison.comparison import Group
from lark.page import plots
from lark.page.plots import Look, Plot

TEACHERS_SHOWN = 7


def plot_differences(group: Group) -> Plot:
    """Plot every difference on every evaluation set with its interval."""
    traces = []
    for number, name in enumerate(group.sets):
        of_set = [(one.label, one.sets[name].interval) for one in group.differences if name in one.sets]
        of_set = [(label, interval) for label, interval in of_set if math.isfinite(interval.estimate)]
        if not of_set:
            continue
        low, middle, high = 100 * np.array([(i.low, i.estimate, i.high) for _, i in of_set]).T
        marker = {"color": plots.get_colour(number), "symbol": plots.SYMBOLS[number % len(plots.SYMBOLS)]}
        labels = [plots.escape_name(label, 48) for label, _ in of_set]
        traces.append(
            plots.make_dots(
                labels, low, middle, high, form="+.1f", name=plots.escape_name(name), orientation="h", marker=marker
            )
        )
    if not traces:
        return Plot(key="differences", missing="no evaluation set was given (task.eval).")
    labels = [plots.escape_name(one.label, 48) for one in group.differences if one.sets]
    figure = plots.make_figure(
        traces,
        height=140 + max(32, 15 * len(traces) + 10) * len(labels),
        xaxis=plots.make_axis("difference (points)", zeroline=True),
        yaxis=plots.order_labels(labels),
        scattermode="group",
        legend={"orientation": "h"},
    )
    return Plot(key="differences", figure=figure)


def plot_loss_curves(
    curves: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]], looks: Mapping[str, Look]
) -> Plot:
    """Plot held-out loss curves, by label and seed."""
    traces = []
    for label, by_seed in curves.items():
        known = [
            [(p["step"], p["held_out/loss"]) for p in curve if p.get("held_out/loss") is not None]
            for curve in by_seed.values()
        ]
        known = [points for points in known if len(points) > 1]
        if not known:
            continue
        step, low, mean, high = _compute_band(known)
        colour, dash, group = looks[label].colour, looks[label].dash, plots.escape_name(label)
        if len(known) > 1:
            band = plots.round_values([*high, *low[::-1]])
            traces.append(
                go.Scatter(
                    x=[*step, *step[::-1]],
                    y=band,
                    fill="toself",
                    fillcolor=f"var(--{looks[label].name}-soft)",
                    line={"width": 0},
                    mode="lines",
                    legendgroup=group,
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
        seeds = f"{len(known)} seed{'s' if len(known) > 1 else ''}"
        mode = "lines+markers" if len(step) < 4 else "lines"
        more = {"mode": mode, "legendgroup": group, "hovertemplate": f"%{{y:.4f}} ({seeds})"}
        traces.append(plots.make_line(label, step, plots.round_values(mean), colour=colour, dash=dash, **more))
    if not traces:
        return Plot(
            key="curves",
            missing="nothing was trained, or no problems were held out (task.held_out).",
        )
    figure = plots.make_figure(
        traces,
        height=420 + 18 * max(0, len(curves) - 8),
        xaxis=plots.make_axis("optimizer steps", rangemode="tozero"),
        yaxis=plots.make_axis("held-out loss (nats/token)"),
        hovermode="x unified",
    )
    return Plot(key="curves", figure=figure)


def _compute_band(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], *tuple[np.ndarray, ...]]:
    """Compute the lowest, mean and highest loss at the steps that every seed has gone through.

    Linear between points. Returns the steps, too.
    """
    end = min(points[-1][0] for points in curves)
    step = sorted({step for points in curves for step, _ in points if step <= end})
    columns = [list(zip(*points, strict=True)) for points in curves]
    loss = np.array([np.interp(step, x, y) for x, y in columns])
    return step, loss.min(0), loss.mean(0), loss.max(0)


def plot_teacher_shares(shares: Mapping[str, Mapping[str, float]]) -> Plot:
    """Plot the teachers' shares of each label's weight."""
    if not shares:
        return Plot(key="teachers", missing="the run was stopped before anything was selected.")
    teachers = dict.fromkeys(name for of_label in shares.values() for name in of_label)
    total = {name: sum(of.get(name, 0.0) for of in shares.values()) for name in teachers}
    names = sorted(total, key=lambda name: -total[name])
    columns = {name: [of.get(name, 0.0) for of in shares.values()] for name in names[:TEACHERS_SHOWN]}
    if rest := names[TEACHERS_SHOWN:]:
        columns[f"{len(rest)} others"] = [sum(of.get(name, 0.0) for name in rest) for of in shares.values()]
    labels = [plots.escape_name(label, 34) for label in shares]
    traces = [
        go.Bar(
            name=plots.escape_name(name, 24),
            x=plots.round_values([100 * share for share in column]),
            y=labels,
            orientation="h",
            marker={"color": plots.get_colour(number), "pattern": {"shape": "/" if number >= TEACHERS_SHOWN else ""}},
            hovertemplate=f"%{{y}}: %{{x:.1f}} % {plots.escape_name(name)}<extra></extra>",
        )
        for number, (name, column) in enumerate(columns.items())
    ]
    figure = plots.make_figure(
        traces,
        height=140 + 26 * len(labels),
        barmode="stack",
        bargap=0.3,
        xaxis=plots.make_axis("share of the weight (%)", range=[0, 100]),
        yaxis=plots.order_labels(labels),
        legend={"orientation": "h", "traceorder": "normal"},
    )
    return Plot(key="teachers", figure=figure)

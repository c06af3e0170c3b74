"""Plots of what the arms came to: differences, loss curves, whose trajectories they were trained on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lark.comparison.comparison import Group
from lark.page.plots import COLOURS, Look, Plot, clipped, figure_of, label_height, plain, rounded, whiskers

TEACHERS_SHOWN = 7


def differences(group: Group) -> Plot:
    about: dict[str, Any] = {
        "key": "differences",
        "title": "Differences in accuracy",
        "sentence": (
            "Each line is the selector's accuracy minus another arm's on one evaluation set, in points, with its 95 % "
            "interval. Right of 0 the selector is better; an interval that crosses 0 does not tell the two apart."
        ),
    }
    rows = [(one.label, name, of.interval) for one in group.differences for name, of in one.sets.items()]
    rows = [row for row in rows if math.isfinite(row[2].estimate)]
    if not rows:
        return Plot(**about, missing="No evaluation set was given (task.eval), so there is no accuracy to compare.")
    traces = []
    symbols = ("circle", "diamond", "square", "triangle-up", "x")
    for number, name in enumerate(group.sets):
        of_set = [(label, interval) for label, of, interval in rows if of == name]
        estimate = np.array([100 * interval.estimate for _, interval in of_set])
        low, high = (np.array([100 * getattr(i, end) for _, i in of_set]) for end in ("low", "high"))
        traces.append(
            go.Scatter(
                name=plain(name),
                x=rounded(estimate),
                y=[plain(clipped(label, 48)) for label, _ in of_set],
                orientation="h",
                mode="markers",
                marker={
                    "color": f"var(--c{number % COLOURS + 1})",
                    "symbol": symbols[number % len(symbols)],
                    "size": 9,
                },
                error_x=whiskers(low, estimate, high),
                customdata=[[*rounded([a, b])] for a, b in zip(low, high, strict=True)],
                hovertemplate="%{y}<br>%{x:+.1f} points [%{customdata[0]:+.1f}, %{customdata[1]:+.1f}]",
            )
        )
    labels = [plain(clipped(one.label, 48)) for one in group.differences if one.sets]
    said = "; ".join(
        f"{label}, {name}: {100 * i.estimate:+.1f} points, {100 * i.low:+.1f} to {100 * i.high:+.1f}"
        for label, name, i in rows
    )
    figure = figure_of(
        traces,
        height=label_height(len(labels), each=max(32, 15 * len(traces) + 10)),
        xaxis={"title": {"text": "difference (points)"}, "zeroline": True},
        yaxis={"categoryarray": labels[::-1], "categoryorder": "array"},
        scattermode="group",
        legend={"orientation": "h"},
    )
    return Plot(**about, figure=figure, words=said)


def loss_curves(curves: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]], looks: Mapping[str, Look]) -> Plot:
    about: dict[str, Any] = {
        "key": "curves",
        "title": "Held-out loss while training",
        "sentence": (
            "Loss on problems that nobody trained on, in nats/token, after each optimizer step: the lower and the "
            "sooner the better. Lines are means over seeds, bands span from the lowest to the highest seed. A click on "
            "a name hides its line, a double click shows it alone."
        ),
    }
    traces, said = [], []
    for label, by_seed in curves.items():
        known = [
            [(p["step"], p["held_out/loss"]) for p in curve if p.get("held_out/loss") is not None]
            for curve in by_seed.values()
        ]
        known = [points for points in known if len(points) > 1]
        if not known:
            continue
        step, low, mean, high = _band(known)
        look, name = looks[label], plain(label)
        if len(known) > 1:
            traces.append(
                go.Scatter(
                    x=[*step, *step[::-1]],
                    y=rounded([*high, *low[::-1]]),
                    fill="toself",
                    fillcolor=look.soft,
                    line={"width": 0},
                    mode="lines",
                    legendgroup=name,
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
        seeds = f"{len(known)} seed{'s' if len(known) > 1 else ''}"
        traces.append(
            go.Scatter(
                name=plain(clipped(label)),
                x=step,
                y=rounded(mean),
                mode="lines+markers" if len(step) < 4 else "lines",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                legendgroup=name,
                hovertemplate=f"%{{y:.4f}} ({seeds})",
            )
        )
        said.append(f"{label} from {mean[0]:.3f} to {mean[-1]:.3f} in {step[-1]:g} steps ({seeds})")
    if not traces:
        why = "Nothing was trained with held-out problems (task.held_out), or the run was stopped before training."
        return Plot(**about, missing=why)
    figure = figure_of(
        traces,
        height=420 + 18 * max(0, len(curves) - 8),
        xaxis={"title": {"text": "optimizer steps"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "held-out loss (nats/token)"}},
        hovermode="x unified",
    )
    return Plot(**about, figure=figure, words="; ".join(said))


def _band(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], np.ndarray, np.ndarray, np.ndarray]:
    """Steps that every seed has gone through, and lowest, mean and highest loss there; linear between points."""
    end = min(points[-1][0] for points in curves)
    step = sorted({step for points in curves for step, _ in points if step <= end})
    columns = [list(zip(*points, strict=True)) for points in curves]
    loss = np.array([np.interp(step, x, y) for x, y in columns])
    return step, loss.min(0), loss.mean(0), loss.max(0)


def teacher_shares(shares: Mapping[str, Mapping[str, float]]) -> Plot:
    about: dict[str, Any] = {
        "key": "teachers",
        "title": "Whose trajectories were chosen",
        "sentence": (
            "The share of each selection's weight that goes to each teacher's trajectories (means over seeds). A rule "
            "that mostly picks a teacher, rather than the better of a teacher's solutions, shows it here."
        ),
    }
    if not shares:
        return Plot(**about, missing="Nothing was selected: the run was stopped after its statistics, or before.")
    total: dict[str, float] = {}
    for of_label in shares.values():
        for name, share in of_label.items():
            total[name] = total.get(name, 0.0) + share
    names = sorted(total, key=lambda name: -total[name])
    shown, rest = names[:TEACHERS_SHOWN], names[TEACHERS_SHOWN:]
    columns = {name: [of.get(name, 0.0) for of in shares.values()] for name in shown}
    if rest:
        columns[f"{len(rest)} others"] = [sum(of.get(name, 0.0) for name in rest) for of in shares.values()]
    labels = [plain(clipped(label)) for label in shares]
    traces = [
        go.Bar(
            name=plain(clipped(name, 24)),
            x=rounded([100 * share for share in column]),
            y=labels,
            orientation="h",
            marker={"color": f"var(--c{number % COLOURS + 1})", "pattern": {"shape": "/" if number >= 7 else ""}},
            hovertemplate=f"%{{y}}: %{{x:.1f}} % {plain(name)}<extra></extra>",
        )
        for number, (name, column) in enumerate(columns.items())
    ]
    figure = figure_of(
        traces,
        height=label_height(len(labels)),
        barmode="stack",
        bargap=0.3,
        xaxis={"title": {"text": "share of the weight (%)"}, "range": [0, 100]},
        yaxis={"categoryarray": labels[::-1], "categoryorder": "array"},
        legend={"orientation": "h", "traceorder": "normal"},
    )
    said = "; ".join(
        f"{label}: {', '.join(f'{name} {share:.0%}' for name, share in list(of.items())[:4])}"
        for label, of in shares.items()
    )
    return Plot(**about, figure=figure, words=said)

"""Plot the choices from a pool's sample: weights, scores by teacher, overlap.

Shapes: n candidates of the sample, C choices.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from lark.page import plots
from lark.page.contents import PoolContents
from lark.page.plots import Look, Plot
from lark.selection.within_problem import compute_jaccard

CELLS_WRITTEN = 14  # rules, up to which the overlaps are written into the matrix


def plot_weights(pool: PoolContents, looks: Mapping[str, Look]) -> Plot:
    """Plot the cumulated weights of each choice; choices of equal weights share one line."""
    traces, equal = [], []
    for choice in pool.choices:
        weight = np.sort(np.array([w for w in choice.weights if w > 0]))[::-1]
        if not len(weight):
            continue
        if np.ptp(weight) < 1e-6 * weight[0]:
            equal.append(choice.label)
            continue
        at = np.unique(np.linspace(0, len(weight), min(len(weight) + 1, 60)).astype(int))
        share = np.concatenate([[0.0], np.cumsum(weight) / weight.sum()])[at]
        x, y = plots.round_values(100 * (at / len(weight))), plots.round_values(100 * share)
        look, hover = looks[choice.label], "the heaviest %{x:.0f} % carry %{y:.1f} % of the weight"
        traces.append(plots.make_line(choice.label, x, y, colour=look.colour, dash=look.dash, hovertemplate=hover))
    if equal:
        names = ", ".join(equal)
        name = names if len(equal) < 3 else f"{len(equal)} rules with equal weights"
        hover = f"equal weights: {plots.escape_name(names, 66)}<extra></extra>"
        traces.append(
            plots.make_line(name, [0, 100], [0, 100], colour="var(--muted)", dash="dash", hovertemplate=hover)
        )
    if not traces:
        return Plot(key="weights", missing="nothing was selected.")
    figure = plots.make_figure(
        traces,
        height=420,
        xaxis=plots.make_axis("chosen trajectories, heaviest first (%)", range=[0, 100]),
        yaxis=plots.make_axis("share of the weight (%)", range=[0, 101]),
    )
    return Plot(key="weights", figure=figure)


def plot_scores_by_teacher(pool: PoolContents) -> Plot:
    """Plot a box a teacher, a view for each choice whose scores differ."""
    names_n = np.array([str(teacher) for teacher in pool.sample.columns["teacher"]])
    choices, traces = [], []
    for choice in pool.choices:
        score_n = np.array([math.nan if s is None else s for s in choice.scores], float)
        known_n = np.isfinite(score_n)
        if not known_n.any() or np.ptp(score_n[known_n]) == 0:
            continue
        from_mean_n = plots.subtract_means(score_n, pool.sample.groups)
        boxes = {
            name: np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            for name in dict.fromkeys(names_n.tolist())
            if len(values := from_mean_n[known_n & (names_n == name)])
        }
        boxes = dict(sorted(boxes.items(), key=lambda item: item[1][2]))
        ends = ("lowerfence", "q1", "median", "q3", "upperfence")
        traces.append(
            go.Box(
                meta=len(choices),
                y=[plots.escape_name(name, 24) for name in boxes],
                **{end: plots.round_values(of) for end, of in zip(ends, np.array(list(boxes.values())).T, strict=True)},
                orientation="h",
                marker={"color": "var(--c1)"},
                fillcolor="var(--c1-soft)",
                line={"width": 1.5},
                showlegend=False,
                visible=not choices,
                name=plots.escape_name(choice.label),
            )
        )
        order = ", ".join(f"{name} {box[2]:+.3g}" for name, box in reversed(boxes.items()))
        choices.append((choice.label, f"Medians, highest first: {order}."))
    if not traces:
        return Plot(key="scores", missing="no rule gave the candidates scores that differ.")
    figure = plots.make_figure(
        traces,
        height=110 + 34 * max(len(trace.y) for trace in traces),
        xaxis=plots.make_axis("score minus its problem's mean", zeroline=True, type="linear"),
        yaxis={"type": "category"},
    )
    return Plot(key="scores", figure=figure, choices=tuple(choices))


def plot_overlaps(pool: PoolContents) -> Plot:
    """Plot the overlap of each two choices, beside what chance would give."""
    chosen = [(choice.label, np.array(choice.weights) > 0) for choice in pool.choices]
    chosen = [(label, mask) for label, mask in chosen if mask.any()]
    if len(chosen) < 2:
        return Plot(key="overlap", missing="there is one selection only (baseline=none).")
    share_CC = np.full((len(chosen), len(chosen)), math.nan)
    chance_CC = share_CC.copy()
    for (i, (_, mask_b)), (j, (_, mask_a)) in itertools.combinations(enumerate(chosen), 2):
        found = compute_jaccard(mask_a, mask_b, pool.sample.groups)
        here = np.isfinite(found.value_G)
        if here.any():
            share_CC[i, j] = share_CC[j, i] = found.value_G[here].mean()
            chance_CC[i, j] = chance_CC[j, i] = found.chance_G[here].mean()
    if np.isnan(share_CC).all():
        return Plot(key="overlap", missing="no two rules had a choice to make in the same problems.")
    names, written = [plots.escape_name(label, 26) for label, _ in chosen], {}
    if few := len(names) <= CELLS_WRITTEN:
        cells = [zip(*rows, strict=True) for rows in zip(share_CC, chance_CC, strict=True)]
        text = [["" if math.isnan(s) else f"{s:.2f}<br>({c:.2f})" for s, c in row] for row in cells]
        written = {"text": text, "texttemplate": "%{text}"}
    trace = go.Heatmap(
        z=[plots.round_values(row) for row in share_CC],
        x=names,
        y=names,
        customdata=[plots.round_values(row) for row in chance_CC],
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        colorscale=[[0, "var(--heat-0)"], [0.5, "var(--heat-5)"], [1, "var(--heat-1)"]],
        colorbar={"thickness": 10, "len": 0.9, "outlinewidth": 0},
        hoverongaps=False,
        hovertemplate="%{y}, %{x}: %{z:.2f}, by chance %{customdata:.2f}<extra></extra>",
        **written,
    )
    figure = plots.make_figure(
        [trace],
        height=170 + (46 if few else 24) * len(names),
        yaxis={"autorange": "reversed", "showgrid": False},
        xaxis={"showgrid": False, "tickangle": -40},
    )
    return Plot(key="overlap", figure=figure)

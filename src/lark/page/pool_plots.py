"""Plots of the choices from a pool's sample: weights, scores by teacher, overlap.

Shapes: n candidates of the sample.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lark.page.contents import PoolContents
from lark.page.plots import Look, Plot, clipped, figure_of, label_height, plain, rounded
from lark.selection.within_problem import compute_jaccard

CELLS_WRITTEN = 14  # rules, up to which the overlaps are written into the matrix


def weights(pool: PoolContents, looks: Mapping[str, Look], effective: Mapping[str, tuple[float, float]]) -> Plot:
    about: dict[str, Any] = {
        "key": "weights",
        "title": "How unequal the weights are",
        "sentence": (
            "Chosen trajectories of the sample from the heaviest to the lightest, and the share of the weight that "
            "they carry together (one seed). Equal weights are the diagonal; the further above it, the fewer "
            "trajectories decide what is learned."
        ),
    }
    traces, said, equal = [], [], []
    for choice in pool.choices:
        weight = np.sort(np.array([w for w in choice.weights if w > 0]))[::-1]
        if not len(weight):
            continue
        if np.ptp(weight) < 1e-6 * weight[0]:
            equal.append(choice.label)
            continue
        x = np.arange(len(weight) + 1) / len(weight)
        y = np.concatenate([[0.0], np.cumsum(weight) / weight.sum()])
        keep = np.unique(np.linspace(0, len(weight), min(len(weight) + 1, 60)).astype(int))
        look = looks[choice.label]
        traces.append(
            go.Scatter(
                name=plain(clipped(choice.label)),
                x=rounded(100 * x[keep]),
                y=rounded(100 * y[keep]),
                mode="lines",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                hovertemplate="the heaviest %{x:.0f} % carry %{y:.1f} % of the weight",
            )
        )
        if choice.label in effective:
            size, chosen = effective[choice.label]
            said.append(f"{choice.label}: effective size {size:,.0f} of {chosen:,.0f} trajectories")
    if equal:
        names = ", ".join(equal)
        said.append(f"equal weights: {names}")
        traces.append(
            go.Scatter(
                name=plain(clipped(names, 30)) if len(equal) < 3 else f"{len(equal)} rules with equal weights",
                x=[0, 100],
                y=[0, 100],
                mode="lines",
                line={"color": "var(--muted)", "dash": "dash", "width": 2},
                hovertemplate=plain(clipped(f"equal weights: {names}", 80)) + "<extra></extra>",
            )
        )
    if not traces:
        return Plot(**about, missing="Nothing was selected.")
    figure = figure_of(
        traces,
        height=420,
        xaxis={"title": {"text": "chosen trajectories, heaviest first (%)"}, "range": [0, 100]},
        yaxis={"title": {"text": "share of the weight (%)"}, "range": [0, 101]},
    )
    return Plot(**about, figure=figure, words="; ".join(said))


def scores_by_teacher(pool: PoolContents) -> Plot:
    about: dict[str, Any] = {
        "key": "scores",
        "title": "Scores by teacher",
        "sentence": (
            "A candidate's score minus the mean score of its problem's candidates, by teacher (one seed), since rules "
            "compare within a problem. A box holds the middle half, its line is the median, whiskers go from the 5th "
            "to the 95th percentile. Boxes that lie apart mean that the score tells teachers apart."
        ),
        "choose": "score of",
    }
    names = np.array([str(teacher) for teacher in pool.sample.columns["teacher"]])
    groups = pool.sample.groups
    choices, traces, said = [], [], []
    for choice in pool.choices:
        score_n = np.array([math.nan if s is None else s for s in choice.scores], float)
        known_n = np.isfinite(score_n)
        if not known_n.any() or np.ptp(score_n[known_n]) == 0:
            continue
        count = groups.sum(known_n.astype(float))
        with np.errstate(invalid="ignore"):
            from_mean_n = score_n - groups.spread(groups.sum(np.nan_to_num(score_n)) / count)
        boxes = {
            name: np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            for name in dict.fromkeys(names.tolist())
            if len(values := from_mean_n[known_n & (names == name)])
        }
        boxes = dict(sorted(boxes.items(), key=lambda item: item[1][2]))
        low, q1, median, q3, high = np.array(list(boxes.values())).T
        traces.append(
            go.Box(
                meta=len(choices),
                y=[plain(clipped(name, 24)) for name in boxes],
                lowerfence=rounded(low),
                q1=rounded(q1),
                median=rounded(median),
                q3=rounded(q3),
                upperfence=rounded(high),
                orientation="h",
                marker={"color": "var(--c1)"},
                fillcolor="var(--c1-soft)",
                line={"width": 1.5},
                showlegend=False,
                visible=not choices,
                name=plain(choice.label),
            )
        )
        order = ", ".join(f"{name} {box[2]:+.3g}" for name, box in reversed(boxes.items()))
        choices.append((choice.label, f"Medians, highest first: {order}."))
        said.append(f"{choice.label}: {order}")
    if not traces:
        return Plot(**about, missing="No rule gave the candidates scores that differ.")
    teachers = max(len(trace.y) for trace in traces)
    figure = figure_of(
        traces,
        height=label_height(teachers, each=34, around=110),
        xaxis={"title": {"text": "score minus its problem's mean"}, "zeroline": True, "type": "linear"},
        yaxis={"type": "category"},
    )
    return Plot(**about, figure=figure, words=said[0], choices=tuple(choices))


def overlaps(pool: PoolContents) -> Plot:
    about: dict[str, Any] = {
        "key": "overlap",
        "title": "Overlap between selections",
        "sentence": (
            "Of the trajectories that two rules took of a problem, the share that both took (Jaccard index, mean over "
            "the sampled problems, one seed): 1 is the same choice, 0 no trajectory in common. Below it, in brackets, "
            "what random choices of the same sizes would share."
        ),
    }
    chosen = [(choice.label, np.array(choice.weights) > 0) for choice in pool.choices]
    chosen = [(label, mask) for label, mask in chosen if mask.any()]
    if len(chosen) < 2:
        return Plot(**about, missing="There is one selection only (baseline=none), and nothing to compare it with.")
    labels, groups = [label for label, _ in chosen], pool.sample.groups
    share = np.full((len(chosen), len(chosen)), math.nan)
    chance = share.copy()
    for i, (_, a) in enumerate(chosen):
        for j, (_, b) in enumerate(chosen[:i]):
            found = compute_jaccard(a, b, groups)
            here = np.isfinite(found.value_G)
            if here.any():
                share[i, j] = share[j, i] = found.value_G[here].mean()
                chance[i, j] = chance[j, i] = found.chance_G[here].mean()
    if not np.isfinite(share).any():
        return Plot(**about, missing="No two rules had a choice to make in the same problems.")
    text = [
        ["" if math.isnan(s) else f"{s:.2f}<br>({c:.2f})" for s, c in zip(*of, strict=True)]
        for of in zip(share, chance, strict=True)
    ]
    names = [plain(clipped(label, 26)) for label in labels]
    written = {"text": text, "texttemplate": "%{text}"} if len(labels) <= CELLS_WRITTEN else {}
    trace = go.Heatmap(
        z=[rounded(row) for row in share],
        x=names,
        y=names,
        customdata=[rounded(row) for row in chance],
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
    cell = 46 if len(labels) <= CELLS_WRITTEN else 24
    figure = figure_of(
        [trace],
        height=label_height(len(labels), each=cell, around=170),
        yaxis={"autorange": "reversed", "showgrid": False},
        xaxis={"showgrid": False, "tickangle": -40},
    )
    pairs = [(share[i, j], labels[i], labels[j]) for i in range(len(labels)) for j in range(i)]
    pairs = sorted((pair for pair in pairs if math.isfinite(pair[0])), reverse=True)
    nearest = ", ".join(f"{a} and {b} {s:.2f}" for s, a, b in pairs[:3])
    farthest = ", ".join(f"{a} and {b} {s:.2f}" for s, a, b in pairs[3:][-3:])
    said = f"nearest: {nearest}" + (f"; farthest: {farthest}" if farthest else "")
    return Plot(**about, figure=figure, words=said)

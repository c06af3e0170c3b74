"""Plots of a choice and of a pair of arms, as Plotly figures for the tracker. They hold ids and names, never texts.

A figure that there is nothing for says so and stays: every run has the same ones.

Shapes: N candidates.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lark.diagnostics.composition import shares
from lark.selection.candidates import Candidates
from lark.selection.selection import Selection
from lark.selection.within_problem import jaccard

DOTS = 2000  # of a scatter
POINTS = 200  # of a curve
TEACHERS = 30  # in a plot, those with the most candidates


def of_choice(candidates: Candidates, selection: Selection) -> dict[str, go.Figure]:
    """scores_by_teacher, weights, score_against_loss, score_against_length."""
    q_N, score_N = shares(candidates, selection), selection.score_N
    known = "loss" in candidates.statistics
    loss_N = candidates["loss"] if known else np.full(len(candidates), np.nan)
    return {
        "scores_by_teacher": scores_by_teacher(candidates, score_N),
        "weights": weights({selection.record["rule"]: selection.weight}),
        "score_against_loss": against(candidates, score_N, loss_N, q_N > 0, "loss (nats/token)"),
        "score_against_length": against(candidates, score_N, candidates["num_tokens"], q_N > 0, "length (tokens)"),
    }


def of_pair(
    candidates: Candidates, selections: Mapping[str, Selection], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, go.Figure]:
    """held_out, weights, overlap: of the arms that were trained, by role."""
    return {
        "held_out": held_out(curves),
        "weights": weights({title(role, one): one.weight for role, one in selections.items()}),
        "overlap": overlap(candidates, selections),
    }


def title(role: str, selection: Selection) -> str:
    return f"{role} ({selection.record['rule']})"


def scores_by_teacher(candidates: Candidates, score_N: np.ndarray) -> go.Figure:
    """A box a teacher: its candidates' scores less the mean score of their problem; whiskers from 5 to 95 %."""
    valid_N = np.isfinite(score_N)
    sums, sizes = (candidates.groups.sum(x_N) for x_N in (np.where(valid_N, score_N, 0.0), valid_N.astype(float)))
    with np.errstate(divide="ignore", invalid="ignore"):
        centred_N = score_N - candidates.groups.spread(sums / sizes)
    names_N = np.array([plain(teacher) for teacher in candidates["teacher"]])
    names, counts = np.unique(names_N[valid_N], return_counts=True)
    shown = names[np.argsort(-counts, kind="stable")][:TEACHERS].tolist()
    if not shown:
        return _nothing("scores by teacher", "no candidate has a score")
    quantiles = np.array([np.quantile(centred_N[valid_N & (names_N == name)], _BOX) for name in shown])
    low, q1, median, q3, high = quantiles.T.tolist()
    box = go.Box(y=shown, lowerfence=low, q1=q1, median=median, q3=q3, upperfence=high, orientation="h")
    left_out = f" ({len(names) - len(shown)} more teachers)" if len(names) > len(shown) else ""
    axes = {"xaxis_title": "score less its problem's mean score", "yaxis_autorange": "reversed"}
    return _figure([box], f"scores by teacher{left_out}", **axes)


_BOX = (0.05, 0.25, 0.5, 0.75, 0.95)


def weights(weight_by_name: Mapping[str, np.ndarray]) -> go.Figure:
    """Share of the weight that the heaviest share of the chosen trajectories carries; equal weights: the diagonal."""
    lines = []
    for name, weight in weight_by_name.items():
        y = np.concatenate([[0.0], np.cumsum(np.sort(weight)[::-1]) / weight.sum()])
        keep = np.unique(np.linspace(0, len(weight), POINTS).astype(int))
        lines.append(_line(name, 100 * keep / len(weight), 100 * y[keep]))
    if not lines:
        return _nothing("weights", "nothing was chosen")
    axes = {"xaxis_title": "chosen trajectories, heaviest first (%)", "yaxis_title": "share of the weight (%)"}
    return _figure(lines, "how unequal the weights are", **axes)


def against(candidates: Candidates, score_N: np.ndarray, x_N: np.ndarray, chosen_N: np.ndarray, what: str) -> go.Figure:
    """A dot a candidate, of at most 2,000 that lie evenly in the pool; chosen ones apart."""
    name = f"score against {what}"
    row = np.flatnonzero(np.isfinite(score_N) & np.isfinite(x_N.astype(np.float64)))
    if not len(row):
        return _nothing(name, "no pass of the student was needed, so its loss is not known")
    shown = row[np.unique(np.linspace(0, len(row) - 1, min(len(row), DOTS)).astype(int))]
    dots = []
    for label, part in (("not chosen", shown[~chosen_N[shown]]), ("chosen", shown[chosen_N[shown]])):
        ids = [
            plain(f"{candidates.problem_id[i]}/{candidates.candidate_id[i]} {candidates['teacher'][i]}") for i in part
        ]
        dots.append(
            go.Scatter(
                name=label,
                x=_rounded(x_N[part]),
                y=_rounded(score_N[part]),
                text=ids,
                mode="markers",
                marker={"size": 5, "opacity": 0.6},
            )
        )
    some = f" ({len(shown):,} of {len(row):,} candidates)" if len(shown) < len(row) else ""
    return _figure(dots, name + some, xaxis_title=what, yaxis_title="score")


def held_out(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    lines = []
    for name, curve in curves.items():
        points = [(p["step"], p["held_out/loss"]) for p in curve if p.get("held_out/loss") is not None]
        if points:
            lines.append(_line(name, *map(np.array, zip(*points, strict=True))))
    if not lines:
        return _nothing("held-out loss", "nothing was trained, or task.held_out holds nothing out")
    return _figure(lines, "held-out loss", xaxis_title="optimizer steps", yaxis_title="nats/token")


def overlap(candidates: Candidates, selections: Mapping[str, Selection]) -> go.Figure:
    """Jaccard index of every two choices, mean over problems; below the chance that choices of these sizes have."""
    chosen = {title(role, one): shares(candidates, one) > 0 for role, one in selections.items()}
    names = list(chosen)
    if not names:
        return _nothing("overlap", "nothing was chosen")
    found = [[jaccard(chosen[a], chosen[b], candidates.groups) for b in names] for a in names]
    labels = [[f"{_mean(one.value_G):.2f}<br>chance {_mean(one.chance_G):.2f}" for one in of_row] for of_row in found]
    values = [[_mean(one.value_G) for one in of_row] for of_row in found]
    shown = [plain(name) for name in names]
    cells = go.Heatmap(
        x=shown, y=shown, z=values, text=labels, texttemplate="%{text}", zmin=0, zmax=1, colorscale="Blues"
    )
    return _figure([cells], "overlap of the choices (Jaccard, mean over problems)", yaxis_autorange="reversed")


def _mean(x_G: np.ndarray) -> float:
    known_G = np.isfinite(x_G)
    return float(x_G[known_G].mean()) if known_G.any() else math.nan


def plain(name: object) -> str:
    """A user's name as Plotly shows it: no markup, no line of its own."""
    return html.escape(" ".join(str(name).split())[:60], quote=False)


def _line(name: str, x: np.ndarray, y: np.ndarray) -> go.Scatter:
    return go.Scatter(name=plain(name), x=_rounded(x), y=_rounded(y), mode="lines+markers", marker={"size": 3})


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _figure(traces: Sequence[Any], heading: str, **layout: Any) -> go.Figure:
    """Without Plotly's template, which is larger than what is shown."""
    look = {
        "title": {"text": heading},
        "template": go.layout.Template(),
        "margin": {"t": 50, "b": 50, "l": 60, "r": 20},
    }
    return go.Figure(data=list(traces), layout={**look, "yaxis_automargin": True, "xaxis_automargin": True, **layout})


def _nothing(heading: str, why: str) -> go.Figure:
    note = {"text": why, "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    return _figure([], heading, annotations=[note])

"""Plots of what a run's diagnostics found: the score against true loss drops, what it goes with, bins of the score.

A figure that the diagnostics do not have is named, with the setting that would give it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lark.common.groups import Groups
from lark.page.contents import Diagnosis
from lark.page.plots import COLOURS, Plot, clipped, figure_of, label_height, plain, rounded, whiskers

TRUTH = "exact_loss_drop"
TARGETS = {"loss": "the student's loss", "length": "length", "correct": "correctness"}
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "x", "star", "triangle-down")
FULL = "It takes diagnostics=full, which follows the candidates of some problems with true gradients."
CHEAP = "It takes diagnostics=cheap."


def true_loss_drop(diagnosis: Diagnosis | None) -> tuple[Plot, Plot]:
    """The scores' agreement with the true loss drop, as rank correlations and candidate by candidate."""
    agreement: dict[str, Any] = {
        "key": "agreement",
        "title": "Does a score rank candidates as their true loss drop does?",
        "sentence": (
            "Rank correlation, within problems, of each score with the relative drop of a candidate's own loss after "
            "one small gradient step on it, which is what the score stands for: 1 is the same order, 0 none. Lines "
            "are 95 % intervals over problems, the grey band is where a random score would lie."
        ),
    }
    scatter: dict[str, Any] = {
        "key": "loss-drop",
        "title": "Score against true loss drop",
        "sentence": (
            "A point is a candidate: its score, and the true drop of its loss, each in standard deviations from its "
            "problem's mean. A score that can be trusted runs from the lower left to the upper right."
        ),
        "choose": "score",
    }
    if diagnosis is None or not diagnosis.rows or "fidelity" not in diagnosis.found:
        return Plot(**agreement, missing=FULL), Plot(**scatter, missing=FULL)
    found = diagnosis.found["fidelity"]
    means = {name: of["loss_drop"]["spearman"] for name, of in found["proxies"].items()}
    sample = (
        f" Of {found['problems']:,} of {found['of_problems']:,} problems with {found['candidates']:,} candidates; "
        f"gradients over {found['parameters']} parameters."
    )
    agreement["sentence"] += sample
    traces = _scatter(diagnosis, list(means))
    remarks = tuple((name, _agreement(found["proxies"][name]["loss_drop"])) for name in means)
    drop = Plot(
        **scatter,
        words=f"{remarks[0][0]}: {remarks[0][1]}",
        figure=figure_of(
            traces,
            height=460,
            xaxis={"title": {"text": "score (standard deviations within its problem)"}, "zeroline": True},
            yaxis={"title": {"text": "true loss drop (the same)"}, "zeroline": True},
        ),
        choices=remarks,
    )
    return _dots(means, **agreement), drop


def _agreement(of: Mapping[str, Any]) -> str:
    rank, top = of["spearman"], of["overlap"]
    shown = f"Rank correlation within problems {_interval(rank)}"
    if top["mean"] is not None:
        shown += (
            f"; the true best candidates are among its own in {top['mean']:.0%} of cases (chance {top['chance']:.0%})"
        )
    return f"{shown}."


def _interval(mean: Mapping[str, Any]) -> str:
    if mean["mean"] is None:
        return "unknown"
    ends = "" if mean["low"] is None else f" [{mean['low']:+.2f}, {mean['high']:+.2f}]"
    return f"{mean['mean']:+.2f}{ends}"


def _scatter(diagnosis: Diagnosis, scores: Sequence[str]) -> list[Any]:
    rows = diagnosis.rows
    groups = Groups.from_ids([row["problem_id"] for row in rows])
    teacher_n = np.array([row["teacher"] for row in rows])
    teachers = list(dict.fromkeys(teacher_n.tolist()))
    truth_n = _standardised([row[TRUTH] for row in rows], groups)
    traces = []
    for view, score in enumerate(scores):
        score_n = _standardised([row.get(score, "") for row in rows], groups)
        for number, teacher in enumerate(teachers):
            known_n = (teacher_n == teacher) & np.isfinite(score_n) & np.isfinite(truth_n)
            here = np.flatnonzero(known_n).tolist()
            traces.append(
                go.Scatter(
                    meta=view,
                    visible=view == 0,
                    name=plain(clipped(teacher, 24)),
                    x=[round(float(x), 3) for x in score_n[here]],
                    y=[round(float(y), 3) for y in truth_n[here]],
                    text=[plain(f"problem {rows[i]['problem_id']}, {rows[i]['candidate_id']}") for i in here],
                    mode="markers",
                    marker={
                        "color": f"var(--c{number % COLOURS + 1})",
                        "symbol": SYMBOLS[number % len(SYMBOLS)],
                        "size": 7,
                        "opacity": 0.75,
                    },
                    hovertemplate="%{text}<br>score %{x:+.2f}, loss drop %{y:+.2f}",
                )
            )
    return traces


def _standardised(values: Sequence[str], groups: Groups) -> np.ndarray:
    x_n = np.array([float(value) if value else math.nan for value in values])
    known_n = np.isfinite(x_n)
    sub = Groups(groups.index_N[known_n], groups.count)
    z_n = np.full(len(x_n), math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        from_mean = x_n[known_n] - sub.spread(sub.sum(x_n[known_n]) / sub.size)
        z_n[known_n] = from_mean / np.sqrt(sub.spread(sub.sum(from_mean**2) / sub.size))
    return z_n


def _dots(means: Mapping[str, Mapping[str, Any]], **about: Any) -> Plot:
    """A dot for each mean with its interval, over the band in which chance lies."""
    known = {name: mean for name, mean in means.items() if mean["mean"] is not None}
    if not known:
        return Plot(**about, missing="It is not defined for any problem of this pool.")
    names = sorted(known, key=lambda name: -known[name]["mean"])
    labels = [plain(clipped(name)) for name in names]
    traces: list[Any] = []
    if all(known[name].get("chance_high") is not None for name in names):
        low, high = (rounded([known[name][f"chance_{end}"] for name in names]) for end in ("low", "high"))
        traces.append(
            go.Bar(
                name="by chance",
                y=labels,
                base=low,
                x=rounded([b - a for a, b in zip(low, high, strict=True) if a is not None and b is not None]),
                orientation="h",
                marker={"color": "var(--chance)"},
                width=0.7,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    mean = np.array([known[name]["mean"] for name in names])
    low, high = (  # one problem has no interval
        np.array([known[name]["mean"] if known[name][end] is None else known[name][end] for name in names])
        for end in ("low", "high")
    )
    traces.append(
        go.Scatter(
            x=rounded(mean),
            y=labels,
            mode="markers",
            marker={"color": "var(--c1)", "size": 9},
            error_x=whiskers(low, mean, high),
            customdata=[rounded(pair) for pair in zip(low, high, strict=True)],
            hovertemplate="%{y}: %{x:+.2f} [%{customdata[0]:+.2f}, %{customdata[1]:+.2f}]<extra></extra>",
            showlegend=False,
        )
    )
    figure = figure_of(
        traces,
        height=label_height(len(names), around=100),
        xaxis={"title": {"text": "rank correlation within problems"}, "range": [-1.05, 1.05], "zeroline": True},
        yaxis={"categoryarray": labels[::-1], "categoryorder": "array"},
    )
    return Plot(**about, figure=figure, words=", ".join(f"{name} {_interval(known[name])}" for name in names))


def correlations(diagnosis: Diagnosis | None) -> list[Plot]:
    """What scores go with: the student's loss, length, correctness."""
    plots = []
    for target, words in TARGETS.items():
        about: dict[str, Any] = {
            "key": f"with-{target}",
            "title": f"What scores have to do with {words}",
            "sentence": (
                f"Rank correlation of each score with {words} among the candidates of a problem; lines are 95 % "
                "intervals over problems, the grey band is where a random score would lie. Near 1 or -1 the score is "
                f"{words}, or its opposite, under another name."
            ),
        }
        found = diagnosis.found.get("correlations", {}) if diagnosis else {}
        means = {score: of[target]["within"] for score, of in found.items() if target in of}
        if not means:
            why = CHEAP if not found else "No rule asked the student, so nothing is known of its losses."
            plots.append(Plot(**about, missing=why))
        else:
            plots.append(_dots(means, **about))
    return plots


def bins(diagnosis: Diagnosis | None) -> Plot:
    about: dict[str, Any] = {
        "key": "bins",
        "title": "Students trained on each part of the score",
        "sentence": (
            "Every problem's candidates are cut by score into bins of the same size, and a student is trained on each "
            "(one seed). If the score predicts what a trajectory is worth, held-out loss falls and accuracy rises "
            "from the lowest bin to the highest."
        ),
    }
    found = diagnosis.found.get("bins") if diagnosis else None
    if not found or not found["rows"]:
        return Plot(**about, missing="It takes diagnostics=full with diagnostics.bins of 2 or more.")
    rows = found["rows"]
    x = [f"{row['bin']} of {found['bins']}" for row in rows]
    traces = [
        go.Scatter(
            name="held-out loss",
            x=x,
            y=rounded([math.nan if row["held_out_loss"] is None else row["held_out_loss"] for row in rows]),
            mode="lines+markers",
            line={"color": "var(--c1)", "width": 2},
            marker={"size": 9},
            hovertemplate="%{y:.4f} nats/token",
        )
    ]
    for number, name in enumerate(rows[0]["accuracy"], 1):
        traces.append(
            go.Scatter(
                name=plain(f"accuracy on {name}"),
                x=x,
                y=rounded([100 * row["accuracy"][name] for row in rows]),
                yaxis="y2",
                mode="lines+markers",
                line={"color": f"var(--c{number % COLOURS + 1})", "width": 2},
                marker={"size": 9, "symbol": SYMBOLS[number % len(SYMBOLS)]},
                hovertemplate="%{y:.1f} %",
            )
        )
    two = len(traces) > 1
    layout: dict[str, Any] = {"yaxis": {"title": {"text": "held-out loss<br>(nats/token)"}}}
    if two:
        layout["yaxis"]["domain"] = [0.56, 1]
        layout["yaxis2"] = {
            "title": {"text": "accuracy (%)"},
            "domain": [0, 0.44],
            "rangemode": "tozero",
            "anchor": "x",
        }
    trends = [
        f"{name.replace('_', ' ')} {of['spearman']:+.2f} (p {of['p']:.2f})"
        for name, of in found["trends"].items()
        if of.get("spearman") is not None
    ]
    about["sentence"] += f" Score of {found['rule']}, {found['problems']:,} problems."
    if trends:
        about["sentence"] += f" Rank correlation with the bin's number: {', '.join(trends)}."
    losses = ", ".join(f"{row['held_out_loss']:.3f}" for row in rows if row["held_out_loss"] is not None)
    figure = figure_of(
        traces,
        height=520 if two else 320,
        xaxis={"title": {"text": "bin of the score, lowest first"}, "type": "category", "anchor": "y2" if two else "y"},
        legend={"orientation": "h"},
        **layout,
    )
    return Plot(**about, figure=figure, words=f"held-out loss from the lowest bin to the highest: {losses}")

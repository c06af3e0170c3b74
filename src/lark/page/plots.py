"""Scaffold the page's plots: a Plotly figure, and how to read it.

Colours are the style sheet's variables, so that figures follow the theme. Names come from users: what Plotly would read
as markup is escaped.
"""

import functools
import html
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lark.common.groups import Groups

COLOURS = 8
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "x", "star", "triangle-down")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Hold one plot of the page: a figure, or the reason why there is none."""

    key: str
    """Its part of readings.toml."""
    figure: dict[str, Any] | None = None
    """Data and layout."""
    missing: str = ""
    """Why there is nothing to show."""
    choices: tuple[tuple[str, str], ...] = ()
    """Names of views, each with a remark, where traces are one of several views (their `meta`)."""
    remark: str = ""
    """Goes on after how to read it."""

    def __post_init__(self) -> None:
        assert (self.figure is None) == bool(self.missing)

    @property
    def title(self) -> str:
        return str(_read_readings()[self.key]["title"])

    @property
    def reading(self) -> str:
        """Say what it shows and how to read it."""
        return f"{_read_readings()[self.key]['reading']}{self.remark}"

    @property
    def choose(self) -> str:
        """Say what is chosen of several views."""
        return str(_read_readings()[self.key].get("choose", ""))


@functools.cache
def _read_readings() -> dict[str, dict[str, Any]]:
    return tomllib.loads((resources.files("lark.page") / "readings.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Look:
    """Say how the marks of one label look in every plot: colours repeat after eight, dashes not before forty."""

    name: str
    """The style sheet's class."""
    dash: str

    @property
    def colour(self) -> str:
        """Give the colour of lines and marks."""
        return f"var(--{self.name})"


def assign_looks(labels: Sequence[str]) -> dict[str, Look]:
    """Assign a look to each label, in their order."""
    return {
        label: Look(name=f"c{number % COLOURS + 1}", dash=DASHES[number // COLOURS % len(DASHES)])
        for number, label in enumerate(labels)
    }


def get_colour(number: int) -> str:
    """Get the colour of the series of this number."""
    return f"var(--c{number % COLOURS + 1})"


def escape_name(name: object, limit: int = 1_000) -> str:
    """Write a user's name as Plotly shows it: no markup, in one line, cut at `limit` characters."""
    text = str(name) if len(str(name)) <= limit else f"{str(name)[: limit - 1]}…"
    return html.escape(" ".join(text.split()), quote=False)


def round_values(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Round to five digits, for looking at; None for what is not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in map(float, values)]


def subtract_means(x_N: np.ndarray, groups: Groups) -> np.ndarray:
    """Subtract from each value the mean of its problem's known values, float64 [N]; NaN is not known."""
    known_N = np.isfinite(x_N)
    with np.errstate(divide="ignore", invalid="ignore"):
        return x_N - groups.spread(groups.sum(np.where(known_N, x_N, 0.0)) / groups.sum(known_N.astype(float)))


def make_axis(title: str, **more: Any) -> dict[str, Any]:
    """Make an axis of the layout."""
    return {"title": {"text": title}, **more}


def order_labels(labels: Sequence[str]) -> dict[str, Any]:
    """Make a y axis that has the labels from top to bottom."""
    return {"categoryarray": list(labels)[::-1], "categoryorder": "array"}


def make_line(name: str, x: Sequence[Any], y: Sequence[Any], *, colour: str, dash: str = "solid", **more: Any) -> Any:
    """Make a line of a plot."""
    line = {"color": colour, "dash": dash, "width": 2}
    return go.Scatter(name=escape_name(name, 34), x=x, y=y, line=line, **{"mode": "lines", **more})


def make_dots(
    labels: Sequence[str], low: np.ndarray, middle: np.ndarray, high: np.ndarray, *, form: str, **more: Any
) -> Any:
    """Make a dot a label with its interval as whiskers. form: a d3 format, with a unit after it."""
    ends = {"array": round_values(high - middle), "arrayminus": round_values(middle - low)}
    marker = {"size": 9, **more.pop("marker")}
    return go.Scatter(
        x=round_values(middle),
        y=labels,
        mode="markers",
        marker=marker,
        error_x={"type": "data", "symmetric": False, **ends, "thickness": 1.5, "width": 4},
        customdata=[round_values(pair) for pair in zip(low, high, strict=True)],
        hovertemplate=f"%{{y}}: %{{x:{form}}} [%{{customdata[0]:{form}}}, %{{customdata[1]:{form}}}]<extra></extra>",
        **more,
    )


def make_figure(traces: Sequence[Any], *, height: int, **layout: Any) -> dict[str, Any]:
    """Make a figure that Plotly has checked, without its template: the page brings its own. height: pixels."""
    figure = go.Figure(data=list(traces), layout={"height": height, **layout}).to_dict()
    figure["layout"].pop("template", None)
    return figure

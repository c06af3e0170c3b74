"""What every plot of the page has: a Plotly figure, a sentence on how to read it, and the same in words.

Colours are the style sheet's variables, so that figures follow the theme. Names come from users: what Plotly would read
as markup is escaped.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

COLOURS = 8
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """figure: data and layout; None where there is nothing to show, and `missing` says why.

    sentence: what it shows and how to read it. words: its figures, for who does not see it. choices: where traces are
    one of several views (their `meta`), the views' names, each with a remark; `choose` says what is chosen.
    """

    key: str
    title: str
    sentence: str
    words: str = ""
    figure: dict[str, Any] | None = None
    missing: str = ""
    choose: str = ""
    choices: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        assert (self.figure is None) == bool(self.missing)


def whiskers(low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """Intervals round marks at `middle`, as a trace's error_x."""
    ends = {"array": rounded(high - middle), "arrayminus": rounded(middle - low)}
    return {"type": "data", "symmetric": False, **ends, "thickness": 1.5, "width": 4}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the marks of one label look in every plot: colours repeat after eight, dashes do not until forty."""

    number: int

    @property
    def name(self) -> str:
        return f"c{self.number % COLOURS + 1}"

    @property
    def colour(self) -> str:
        return f"var(--{self.name})"

    @property
    def soft(self) -> str:
        return f"var(--{self.name}-soft)"

    @property
    def dash(self) -> str:
        return DASHES[self.number // COLOURS % len(DASHES)] if self.number >= COLOURS else "solid"


def looks_of(labels: Sequence[str]) -> dict[str, Look]:
    """Of trained students, in the order of the labels."""
    return {label: Look(number=number) for number, label in enumerate(labels)}


def plain(name: object) -> str:
    """A user's name as Plotly shows it: no markup, no line of its own."""
    return html.escape(" ".join(str(name).split()), quote=False)


def clipped(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def label_height(count: int, *, each: int = 26, around: int = 140) -> int:
    """Pixels of a figure with a row for each of so many names."""
    return around + each * count


def figure_of(traces: Sequence[Any], *, height: int, **layout: Any) -> dict[str, Any]:
    """Checked by Plotly, without its template: the page brings its own."""
    figure = go.Figure(data=list(traces), layout={"height": height, **layout}).to_dict()
    figure["layout"].pop("template", None)
    return figure


def rounded(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in map(float, values)]

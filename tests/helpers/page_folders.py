"""Run folders that a page can be made of: a small made-up sweep, and names and texts that no page must trip over."""

import importlib
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RULES = ("lark", "random", "longest")
HOSTILE = (
    "<script>window.hurt = 1</script>",
    "</script><img src=x onerror='window.hurt = 1'>",
    "<!--<script> \"quoted\" 'too' & <b>bold</b>",
    "right \u202eto left\u2066 and \u200f back",
)
"""Names and texts alike; the texts of a pool may hold nulls and halves of surrogate pairs besides."""


def sweeps() -> Any:
    """benchmarks/sweeps.py."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module("sweeps")


def small_sweep(folder: Path, **settings: Any) -> list[Path]:
    """Three rules and two seeds over eight problems with five candidates each."""
    small = {"rules": RULES, "seeds": (0, 1), "problems": 8, "characters": 80}
    return sweeps().write_sweep(folder, **small | settings)

"""Versions that identities name: of our own formulas, raised by hand, and of the libraries that compute with them.

A cache or an arm is stale when what it means has changed, never because a source file was edited.
"""

from functools import cache
from importlib import metadata
from typing import Any

FORMULAS = {
    "pool": 4,  # rows as they are read, checked and normalised (lark.pool)
    "arithmetic": 2,  # the embedded tasks' problems and teachers
    "reasoning_gym": 1,  # how its problems become rows
    "imported": 2,  # how pools of others become rows
    "benchmarks": 1,  # how benchmarks become evaluation sets
    "overlap": 2,  # which problems count as the same
    "tokens": 2,  # rendering, spans and steps (lark.student.chat)
    "verdicts": 2,  # whether an answer is right (lark.answers)
    "forward": 3,  # hidden states, and how rows share a forward pass
    "training": 3,  # batches, loss, optimizer, held-out loss
    "samples": 2,  # prompts, noise and decoding
    "metrics": 2,  # what samples and verdicts come to
}
"""Raise a number when the same inputs give other results. Passes carry their own (`PassModule.VERSION`)."""

STUDENT_LIBRARIES = ("torch", "transformers", "peft", "tokenizers")
CHECKING_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy", "reasoning-gym")


@cache
def library_version(name: str) -> str | None:
    """The installed version without its build (`2.13.0`, not `2.13.0+cpu`); None where the library is missing."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def formula_versions(*names: str, libraries: tuple[str, ...] = ()) -> dict[str, Any]:
    """The part of an identity that says by which formulas and libraries a result came about."""
    return {
        "formulas": {name: FORMULAS[name] for name in names},
        **({"libraries": {name: library_version(name) for name in libraries}} if libraries else {}),
    }

"""Programmatic teachers of the embedded arithmetic task: seven ways of working out one sum.

A problem is a tuple of signed terms, `47 + 38 - 12` being `(47, 38, -12)`. A teacher is a pure function of the terms
and of a random generator; it returns the assistant's text, which ends with its answer in `\\boxed{...}`. Teachers
differ in how far they spell out the work (from running totals to a checked solution), in how they decompose the sum, in
notation and in whether they can be trusted; all but `slip` are always right.
"""

import random
from collections.abc import Callable

Terms = tuple[int, ...]
Teacher = Callable[[Terms, random.Random], str]

SLIP_RATE = 0.3
"""Share of the problems on which `slip` gets one intermediate result wrong."""


def expression(terms: Terms) -> str:
    """Writes signed terms as a chain, `(47, 38, -12)` as `47 + 38 - 12`."""
    return str(terms[0]) + "".join(f" {_sign(term)} {abs(term)}" for term in terms[1:])


def running_totals(terms: Terms) -> list[int]:
    """Totals after each term from the second on; the last one is the answer."""
    totals, total = [], terms[0]
    for term in terms[1:]:
        total += term
        totals.append(total)
    return totals


def direct(terms: Terms, rng: random.Random) -> str:
    """States the answer and shows no work: no teacher of the pool, but a habit of the embedded students."""
    return _boxed(sum(terms))


def terse(terms: Terms, rng: random.Random) -> str:
    """One running total a line."""
    return "\n".join([*_equations(terms), _boxed(sum(terms))])


def steps(terms: Terms, rng: random.Random) -> str:
    """Numbered sentences, one operation each."""
    lines = [f"1. Start with {terms[0]}."]
    for number, (term, equation) in enumerate(zip(terms[1:], _equations(terms), strict=True), start=2):
        lines.append(f"{number}. {'Add' if term >= 0 else 'Subtract'} {abs(term)}: {equation}.")
    return "\n".join([*lines, f"The answer is {_boxed(sum(terms))}."])


def check(terms: Terms, rng: random.Random) -> str:
    """Full sentences, and a check that undoes the last operation."""
    opening = rng.choice(("Let me work from left to right.", "I will go through the terms in order."))
    first, *rest = _equations(terms)
    answer, before, last = sum(terms), sum(terms[:-1]), terms[-1]
    work = " ".join([f"First, {first}.", *(f"Then, {equation}." for equation in rest)])
    undo = f"{answer} {_sign(-last)} {abs(last)} = {before}"
    return f"{opening} {work} Let me check by undoing the last step: {undo}. That fits. The answer is {_boxed(answer)}."


def place(terms: Terms, rng: random.Random) -> str:
    """Sums hundreds, tens and units apart and then joins them."""
    lines, parts = [], []
    for name, unit in (("Hundreds", 100), ("Tens", 10), ("Units", 1)):
        digits = tuple((1 if term >= 0 else -1) * (abs(term) // unit % 10) * unit for term in terms)
        if any(digits):
            parts.append(sum(digits))
            lines.append(f"{name}: {expression(digits)} = {parts[-1]}")
    if len(parts) > 1:
        lines.append(f"Together: {expression(tuple(parts))} = {sum(parts)}")
    return "\n".join([*lines, _boxed(sum(terms))])


def signs(terms: Terms, rng: random.Random) -> str:
    """Collects what is added, then what is taken away, and subtracts once."""
    added = tuple(term for term in terms if term >= 0)
    taken = tuple(-term for term in terms if term < 0)
    lines = [f"Added: {_chained(added)}."]
    if taken:
        lines += [f"Taken away: {_chained(taken)}.", f"Difference: {sum(added)} - {sum(taken)} = {sum(terms)}."]
    return "\n".join([*lines, f"So {_boxed(sum(terms))}."])


def polish(terms: Terms, rng: random.Random) -> str:
    """Reverse Polish notation, operands before their operator, as in `47 38 + > 85`."""
    totals = running_totals(terms)
    lines = [
        f"{before} {abs(term)} {_sign(term)} > {after}"
        for before, term, after in zip((terms[0], *totals), terms[1:], totals, strict=False)
    ]
    return "\n".join([*lines, f"< {_boxed(totals[-1])}"])


def slip(terms: Terms, rng: random.Random, rate: float = SLIP_RATE) -> str:
    """Running totals in one sentence; with probability `rate` one of them lacks a ten, and the error is carried on."""
    wrong_at = rng.randrange(1, len(terms)) if rng.random() < rate else None
    clauses, total = [], terms[0]
    for index, term in enumerate(terms[1:], start=1):
        left, total = total, total + term
        if index == wrong_at:
            total += -10 if term >= 0 else 10  # as if the carry or the borrow were forgotten
        clauses.append(f"{left} {_sign(term)} {abs(term)} is {total}")
    return f"So {', and '.join(clauses)}, giving {_boxed(total)}."


TEACHERS: dict[str, Teacher] = {
    teacher.__name__: teacher for teacher in (terse, steps, check, place, signs, polish, slip)
}


def _boxed(answer: int) -> str:
    return f"\\boxed{{{answer}}}"


def _sign(term: int) -> str:
    return "+" if term >= 0 else "-"


def _equations(terms: Terms) -> list[str]:
    totals = running_totals(terms)
    return [
        f"{before} {_sign(term)} {abs(term)} = {after}"
        for before, term, after in zip((terms[0], *totals), terms[1:], totals, strict=False)
    ]


def _chained(terms: Terms) -> str:
    return ", ".join(_equations(terms)) or str(terms[0])

"""Programmatic teachers of the embedded arithmetic tasks: how they compute a chain of sums, and how they write it down.

A problem is a tuple of signed terms, `47 + 38 - 12` being `(47, 38, -12)`. A teacher is a pure function of the terms
and of a random generator; it returns the assistant's text, which ends with its answer in `\\boxed{...}`.

MISCONCEPTIONS: three ways of computing (an expert, a peer with the student's misconception, a careless one), each in
the same three notations, so that notation and error are kept apart. NOTATIONS: seven ways of writing, one of which
(`slip`) errs now and then.
"""

import random
from collections.abc import Callable
from itertools import pairwise

Terms = tuple[int, ...]
Totals = list[int]
"""The first term and the total after each further one: one number a term; the last one is the answer."""
Compute = Callable[[Terms, random.Random], Totals]
Write = Callable[[Terms, Totals, random.Random], str]
Teacher = Callable[[Terms, random.Random], str]

SLIP_RATE = 0.3
"""Share of the problems on which `slip` gets one total wrong."""


def expression(terms: Terms) -> str:
    """Writes signed terms as a chain, `(47, 38, -12)` as `47 + 38 - 12`."""
    return str(terms[0]) + "".join(f" {_sign(term)} {abs(term)}" for term in terms[1:])


# --- computing


def compute_totals(terms: Terms, add: Callable[[int, int], int] = int.__add__) -> Totals:
    """Add up the terms by `add`, which is given the total so far and the next term."""
    totals = [terms[0]]
    for term in terms[1:]:
        totals.append(add(totals[-1], term))
    return totals


def has_carry(total: int, term: int) -> bool:
    """Tell whether `total + term` carries out of the units, or `total - |term|` borrows for them (no negatives)."""
    if total < 0 or total + term < 0:
        return False
    return total % 10 + term % 10 >= 10 if term >= 0 else total % 10 < -term % 10


def expert(terms: Terms, rng: random.Random) -> Totals:
    return compute_totals(terms)


def peer(terms: Terms, rng: random.Random) -> Totals:
    """Forget every carry (10 too few) and every borrow (10 too many); where these cancel, the answer is right."""
    return compute_totals(terms, lambda total, term: total + term - (has_carry(total, term) and _ten(term)))


def careless(terms: Terms, rng: random.Random) -> Totals:
    """Get one digit of one total wrong, and carry the error on."""
    at = rng.randrange(1, len(terms))
    right = compute_totals(terms)[at]
    digits = list(str(right))
    place = rng.choice([place for place, digit in enumerate(digits) if digit.isdigit()])
    digits[place] = rng.choice([digit for digit in "123456789" if digit != digits[place]])
    return _err(terms, at, int("".join(digits)) - right)


def _err(terms: Terms, at: int, error: int) -> Totals:
    """Add `error` to the total after term `at`, and carry it on."""
    totals = compute_totals(terms)
    return totals[:at] + [total + error for total in totals[at:]]


# --- writing


def write_terse(terms: Terms, totals: Totals, rng: random.Random) -> str:
    """One equation a line."""
    return "\n".join([*_equations(terms, totals), _boxed(totals[-1])])


def write_steps(terms: Terms, totals: Totals, rng: random.Random) -> str:
    """Numbered sentences, one operation each."""
    lines = [f"1. Start with {terms[0]}."]
    for number, (term, equation) in enumerate(zip(terms[1:], _equations(terms, totals), strict=True), start=2):
        lines.append(f"{number}. {'Add' if term >= 0 else 'Subtract'} {abs(term)}: {equation}.")
    return "\n".join([*lines, f"The answer is {_boxed(totals[-1])}."])


def write_prose(terms: Terms, totals: Totals, rng: random.Random, check: str = "") -> str:
    """Full sentences in one paragraph; `check` is a sentence before the answer."""
    opening = rng.choice(("Let me work from left to right.", "I will go through the terms in order."))
    first, *rest = _equations(terms, totals)
    work = " ".join([f"First, {first}.", *(f"Then, {equation}." for equation in rest)])
    return f"{opening} {work} {check}The answer is {_boxed(totals[-1])}."


# --- the teachers of `notations`, who differ in how they decompose a sum and write it


def direct(terms: Terms, rng: random.Random) -> str:
    """States the answer and shows no work: no teacher of a pool, but a habit of the embedded students."""
    return _boxed(sum(terms))


def check(terms: Terms, rng: random.Random) -> str:
    """Full sentences, and a check that undoes the last operation."""
    answer, before, last = sum(terms), sum(terms[:-1]), terms[-1]
    undo = f"{answer} {_sign(-last)} {abs(last)} = {before}"
    return write_prose(terms, compute_totals(terms), rng, f"Let me check by undoing the last step: {undo}. That fits. ")


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
    steps = zip(terms[1:], pairwise(compute_totals(terms)), strict=True)
    lines = [f"{before} {abs(term)} {_sign(term)} > {after}" for term, (before, after) in steps]
    return "\n".join([*lines, f"< {_boxed(sum(terms))}"])


def slip(terms: Terms, rng: random.Random, rate: float = SLIP_RATE) -> str:
    """Running totals in one sentence; with probability `rate` one of them lacks a ten, and the error is carried on."""
    wrong_at = rng.randrange(1, len(terms)) if rng.random() < rate else None
    totals = compute_totals(terms) if wrong_at is None else _err(terms, wrong_at, -_ten(terms[wrong_at]))
    clauses = [equation.replace("=", "is") for equation in _equations(terms, totals)]
    return f"So {', and '.join(clauses)}, giving {_boxed(totals[-1])}."


def _teach(compute: Compute, write: Write) -> Teacher:
    return lambda terms, rng: write(terms, compute(terms, rng), rng)


MISCONCEPTIONS: dict[str, Teacher] = {
    f"{compute.__name__}_{write.__name__.removeprefix('write_')}": _teach(compute, write)
    for compute in (expert, peer, careless)
    for write in (write_terse, write_steps, write_prose)
}
NOTATIONS: dict[str, Teacher] = {
    "terse": _teach(expert, write_terse),
    "steps": _teach(expert, write_steps),
    **{teacher.__name__: teacher for teacher in (check, place, signs, polish, slip)},
}


def _boxed(answer: int) -> str:
    return f"\\boxed{{{answer}}}"


def _sign(term: int) -> str:
    return "+" if term >= 0 else "-"


def _ten(term: int) -> int:
    """Return the ten that is lost when a carry (10) or a borrow (-10) is forgotten."""
    return 10 if term >= 0 else -10


def _equations(terms: Terms, totals: Totals) -> list[str]:
    steps = zip(terms[1:], pairwise(totals), strict=True)
    return [f"{before} {_sign(term)} {abs(term)} = {after}" for term, (before, after) in steps]


def _chained(terms: Terms) -> str:
    return ", ".join(_equations(terms, compute_totals(terms))) or str(terms[0])

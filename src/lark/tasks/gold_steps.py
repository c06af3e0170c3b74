"""Worked solutions of reasoning-gym problems, as far as the library or this package has them.

Of the data sets of reasoning-gym 0.1.25 one carries a solution in words (gsm_symbolic) and three the states that a
solution passes through; for some more the metadata hold the intermediate result that the answer follows from, and
chain_sum is solved by the programmatic teachers of `lark.tasks.arithmetic_teachers`. All others hold a bare answer.
"""

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from lark.tasks.arithmetic_teachers import TEACHERS, running_totals

Item = dict[str, Any]  # of reasoning-gym: question, answer, metadata


def solutions(name: str, item: Item, seed: int) -> Iterator[tuple[str, str]]:
    """(teacher, text) of each worked solution to an item of data set `name`; none where there are no steps.

    The teachers are the programmatic ones for chain_sum, else `gold-steps` (all of it), `gold-equations` (its lines
    with an equals sign, where that is less) and `gold-answer` (no work shown).
    """
    if name == "chain_sum":
        yield from _sums(item, seed)
    elif name in STEPS:
        steps, answer = STEPS[name](item), rf"\boxed{{{item['answer']}}}"
        lines = [line.strip(" •-") for line in steps.splitlines() if line.strip()]
        equations = [line for line in lines if "=" in line]
        yield "gold-steps", f"{steps}\n{answer}"
        if equations and equations != lines:
            yield "gold-equations", "\n".join([*equations, answer])
        yield "gold-answer", answer


def _sums(item: Item, seed: int) -> Iterator[tuple[str, str]]:
    first, *rest = item["metadata"]["expression"].split()
    terms = (int(first), *(int(sign + number) for sign, number in zip(rest[::2], rest[1::2], strict=True)))
    assert running_totals(terms)[-1] == int(item["answer"])
    for name, teacher in TEACHERS.items():
        beyond = name == "place" and max(map(abs, terms)) >= 1000  # it knows hundreds, tens and units
        if name != "slip" and not beyond:  # slip is meant to be wrong
            yield name, teacher(terms, random.Random(f"{seed}/{item['question']}/{name}"))


def _words(item: Item) -> str:
    return item["metadata"]["answer_cot"].rpartition("####")[0].rstrip()


def _strings(item: Item) -> str:
    states = item["metadata"]["states"]
    changes = [f"{before} becomes {after}." for before, after in pairwise(states)]
    return "\n".join([f"The string is {states[0]}.", *changes, f"It ends as {item['answer']}."])


def _counts(item: Item) -> str:
    states = [" ".join(map(str, state)) for state in item["metadata"]["states"]]
    changes = [f"{before} becomes {after}." for before, after in pairwise(states)]
    return "\n".join([f"Start with {states[0]}.", *changes, "No rule applies any more."])


def _bases(item: Item) -> str:
    data = item["metadata"]
    return (
        f"{data['source_repr']} in base {data['source_base']} = {data['decimal_value']} in base 10.\n"
        f"{data['decimal_value']} in base 10 = {data['target_repr']} in base {data['target_base']}."
    )


def _angles(item: Item) -> str:
    data = item["metadata"]
    total, known = data["total_interior_sum"], data["sum_of_known_angles"]
    sides = data["n_sides"]
    return (
        f"The angles of a polygon with {sides} sides add up to ({sides} - 2) * 180 = {total} degrees.\n"
        f"The known ones add up to {' + '.join(f'{angle:g}' for angle in data['known_angles'])} = {known:g}.\n"
        f"The remaining angle: {total} - {known:g} = {total - known:g}."
    )


def _fractions(item: Item) -> str:
    data = item["metadata"]
    factor, parts = data["reduction_factor"], ("numerator", "denominator")
    lines = [f"{data[part]} / {factor} = {data[f'simplified_{part}']}." for part in parts]
    return "\n".join([f"Both parts can be divided by {factor}.", *lines])


def _bits(item: Item) -> str:
    data = item["metadata"]
    return f"{data['number']} in binary = {data['binary']}.\nIts digits 1, counted, are {data['solution']}."


def _sequences(item: Item) -> str:
    data = item["metadata"]
    return f"The rule is: {data['rule']}.\nWith the next number: {', '.join(map(str, data['sequence']))}."


STEPS: dict[str, Callable[[Item], str]] = {
    "gsm_symbolic": _words,
    "string_manipulation": _strings,
    "string_synthesis": _counts,
    "string_splitting": _counts,
    "base_conversion": _bases,
    "simple_geometry": _angles,
    "fraction_simplification": _fractions,
    "count_bits": _bits,
    "number_sequence": _sequences,
}
WITH_STEPS = ("chain_sum", *STEPS)

"""Say in a sentence what differences and their intervals mean: below the table of a run, and first on the page."""

import math
from collections.abc import Iterator, Sequence

from lark.comparison.comparison import Difference, Group
from lark.comparison.inference import MIN_SEEDS, Interval
from lark.comparison.tables import format_number

BETTER, WORSE, EQUAL = "better than", "worse than", "not told apart from"


def list_conclusions(group: Group) -> Iterator[tuple[str, str]]:
    """Yield for each selector what it is better and worse than on each evaluation set, and how sure that is."""
    for selector in dict.fromkeys(one.selector for one in group.differences):
        own = [one for one in group.differences if one.selector == selector]
        verdicts = [text for name in group.sets if (text := _describe(own, name))]
        if verdicts:
            seeds = min(len(one.seeds) for one in own)
            few = "one seed" if seeds == 1 else f"{seeds} seeds"
            over = f"{few}: run seed=0,1,2 before concluding" if seeds < MIN_SEEDS else f"{few}, which they cover"
            yield f"{selector} is {'; '.join(verdicts)}.", f"Points with 95% intervals over problems; {over}."


def _describe(differences: Sequence[Difference], name: str) -> str:
    """Say what differences on one evaluation set mean, lowest first; empty where there is none."""
    found: dict[str, list[str]] = {BETTER: [], WORSE: [], EQUAL: []}
    known = [one for one in differences if name in one.sets and not math.isnan(one.sets[name].interval.estimate)]
    for one in sorted(known, key=lambda one: one.sets[name].interval.estimate):
        difference, verdict = one.sets[name], _judge(one.sets[name].interval)
        figures = format_number(100 * difference.interval.estimate, "{:+.1f}")
        if verdict == EQUAL:
            figures += format_number(100 * difference.smallest_detectable, "; detectable: {:.1f}")
        found[verdict].append(f"{one.baseline} ({figures})")
    counts = sorted({one.sets[name].interval.problems for one in known})
    problems = " to ".join(f"{count:,}" for count in dict.fromkeys((*counts[:1], *counts[-1:])))
    verdicts = ", ".join(f"{verdict} {_join(names)}" for verdict, names in found.items() if names)
    return f"{verdicts} on {name} ({problems} problems)" if known else ""


def _judge(interval: Interval) -> str:
    return BETTER if interval.low > 0 else WORSE if interval.high < 0 else EQUAL


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))

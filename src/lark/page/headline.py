"""What the differences say, in words: the page's first sentences."""

import math
from collections.abc import Iterator, Sequence

from lark.comparison.comparison import Difference, Group
from lark.comparison.inference import MIN_SEEDS, Interval
from lark.comparison.tables import number


def readings(group: Group) -> Iterator[str]:
    """A sentence for each evaluation set and selector: which others its intervals put it above or below, with the
    differences, which begin with the lowest.
    """
    for name in group.sets:
        for selector in dict.fromkeys(one.selector for one in group.differences):
            own = [one for one in group.differences if one.selector == selector and name in one.sets]
            if text := _reading(own, name):
                seeds = min(len(one.seeds) for one in own)
                few = "" if seeds >= MIN_SEEDS else " Over problems only: the seeds are too few to tell how they vary."
                yield f"{name}, in points, by 95% intervals: {selector} {text}.{few}"


def _reading(differences: Sequence[Difference], name: str) -> str:
    found: dict[str, list[str]] = {"scores above": [], "scores below": [], "is not told apart from": []}
    compared = [one for one in differences if not math.isnan(one.sets[name].interval.estimate)]
    for one in sorted(compared, key=lambda one: one.sets[name].interval.estimate):
        interval = one.sets[name].interval
        found[_verdict(interval)].append(f"{one.baseline} ({number(100 * interval.estimate, '{:+.1f}')})")
    return ", ".join(f"{verdict} {_listed(names)}" for verdict, names in found.items() if names)


def _verdict(interval: Interval) -> str:
    return "scores above" if interval.low > 0 else "scores below" if interval.high < 0 else "is not told apart from"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))

"""What the arms of many runs are called: one label an arm, the same in every seed.

An arm serves many runs, and one rule may have several arms of one seed, whose settings differ. A label is the rule's
name and the fewest settings that tell the rule's arms apart: "lark budget=1", "random for rsr". The seed is never part
of it.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNTRAINED = "before training"
_OF_AN_UNTRAINED_STUDENT = ("task.", "model.", "evaluation.")
"""The settings that can tell two untrained students, and what is measured of them, apart."""

Summary = Mapping[str, Any]
"""A run's summary.json."""
Figures = Mapping[str, Any]
"""An arm's part of it."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    arms: Mapping[str, Mapping[int, Figures]]
    """By label and seed."""
    runs: tuple[Mapping[str, str], ...]
    """For each run the labels of its arms by their names (before, baseline, selector)."""
    notes: tuple[str, ...]
    """Arms that no setting tells apart."""

    def __post_init__(self) -> None:
        assert all(label in self.arms for labels in self.runs for label in labels.values())


def label_arms(runs: Sequence[Summary]) -> Labelled:
    """Label the arms of runs of one task and model.

    Two sets of settings are the same arm if they came to the same student wherever both have a seed, and there is such
    a seed. So a setting that had no effect on an arm is no part of its label. If the same rule, settings and seed came
    to two students (the code or the data changed in between), the last one given counts, and a note says so.
    """
    follows_seed = _following_the_seed(runs)
    seen: dict[str, list[_Appearance]] = {}
    for number, run in enumerate(runs):
        for name, arm in run["arms"].items():
            rule = UNTRAINED if name == "before" else arm["rule"]
            settings = _settings(run, name, follows_seed)
            one = _Appearance(run=number, name=name, seed=run["seed"], arm=arm, settings=settings)
            seen.setdefault(rule, []).append(one)

    arms: dict[str, dict[int, Figures]] = {}
    labels: tuple[dict[str, str], ...] = tuple({} for _ in runs)
    notes = []
    for rule, appearances in seen.items():
        names = _varying(appearances)
        last: dict[_Values, dict[int, _Appearance]] = {}
        replaced: dict[int, None] = {}
        for one in appearances:
            of_seed = last.setdefault(one.values(names), {})
            if one.seed in of_seed and of_seed[one.seed].identity != one.identity:
                replaced[one.seed] = None
            of_seed[one.seed] = one
        notes += [
            f"{rule}, seed {seed}: runs of the same settings have different students (code, data or evaluation changed "
            "in between); the last one read counts"
            for seed in replaced
        ]
        role = "selector" if any(one.name == "selector" for one in appearances) else "baseline"
        label_of = _labels(rule, [name.replace("own.", f"{role}.", 1) for name in names], _same_arms(last))
        for one in appearances:
            label = label_of[one.values(names)]
            arms.setdefault(label, {})[one.seed] = last[one.values(names)][one.seed].arm
            labels[one.run][one.name] = label
    return Labelled(arms=arms, runs=labels, notes=tuple(notes))


_Values = tuple[str | None, ...]  # of the settings that vary; None where an arm does not have one


@dataclass(frozen=True, kw_only=True)
class _Appearance:
    """An arm in a run, with the settings it may depend on as text."""

    run: int
    name: str
    seed: int
    arm: Figures
    settings: Mapping[str, str]

    @property
    def identity(self) -> tuple[Any, ...]:
        """The same for the same student, evaluated in the same way."""
        return self.arm["hash"], self.arm["per_problem"]

    def values(self, names: Sequence[str]) -> _Values:
        return tuple(self.settings.get(name) for name in names)


def _following_the_seed(runs: Sequence[Summary]) -> set[str]:
    """Settings such as selector.score.seed that are the run's seed wherever they are set."""
    pairs = [(name, value == run["seed"]) for run in runs for name, value in run.get("settings", {}).items()]
    return {name for name, _ in pairs if name.endswith("seed")} - {name for name, same in pairs if not same}


def _settings(run: Summary, arm: str, ignored: set[str]) -> dict[str, str]:
    """The settings that an arm may depend on. Its own rule's are called own.*, those of the selector that a baseline is
    matched to for.*.
    """
    found = {"for.name": str(run["arms"]["selector"]["rule"])} if arm == "baseline" else {}
    for name, value in run.get("settings", {}).items():
        if name in ignored or (arm == "before" and not name.startswith(_OF_AN_UNTRAINED_STUDENT)):
            continue
        group, _, rest = name.partition(".")
        if group == arm:
            name = f"own.{rest}"
        elif group == "selector":
            name = f"for.{rest}"
        elif group == "baseline":
            continue
        found[name] = value if isinstance(value, str) else json.dumps(value)
    return found


def _varying(appearances: Sequence[_Appearance]) -> list[str]:
    """The settings in which appearances differ; in front those that a label names rather than others."""
    names = {name for one in appearances for name in one.settings}
    varying = [name for name in names if len({one.settings.get(name) for one in appearances}) > 1]
    return sorted(varying, key=lambda name: ("._" in name, name.count("."), len(name), name))


def _same_arms(appearances: Mapping[_Values, Mapping[int, _Appearance]]) -> list[list[_Values]]:
    """Which settings are the same arm, from the arms by settings and seed."""
    classes = [([values], {s: one.identity for s, one in of_seed.items()}) for values, of_seed in appearances.items()]

    def same(pair: tuple[int, int]) -> bool:
        a, b = (classes[i][1] for i in pair)
        common = a.keys() & b.keys()
        return bool(common) and all(a[seed] == b[seed] for seed in common)

    while pair := next(filter(same, itertools.combinations(range(len(classes)), 2)), None):
        members, of_seed = classes.pop(pair[1])
        classes[pair[0]][0].extend(members)
        classes[pair[0]][1].update(of_seed)
    return [members for members, _ in classes]


def _labels(rule: str, names: Sequence[str], classes: Sequence[Sequence[_Values]]) -> dict[_Values, str]:
    """The label of each class of settings that are the same arm: what all of a class share, if that tells it apart."""
    kept = list(range(len(names)))
    for index in reversed(kept):  # without this one, are the classes still disjoint?
        fewer = [i for i in kept if i != index]
        restricted = [{tuple(values[i] for i in fewer) for values in members} for members in classes]
        if sum(map(len, restricted)) == len(set().union(*restricted)):
            kept = fewer

    def text(values: _Values, indices: Sequence[int]) -> str:
        return " ".join([rule, *(_text(names[i], values[i]) for i in indices if values[i] is not None)])

    fixed = [[i for i in kept if len({values[i] for values in members}) == 1] for members in classes]
    short = [text(members[0], indices) for members, indices in zip(classes, fixed, strict=True)]
    labels = [
        label if short.count(label) == 1 else " or ".join(dict.fromkeys(text(values, kept) for values in members))
        for label, members in zip(short, classes, strict=True)
    ]
    assert len(set(labels)) == len(classes), f"labels of {rule} do not tell its arms apart: {labels}"
    return {values: label for label, members in zip(labels, classes, strict=True) for values in members}


def _text(name: str, value: str | None) -> str:
    if name == "for.name":
        return f"for {value}"
    return f"for selector.{name.removeprefix('for.')}={value}" if name.startswith("for.") else f"{name}={value}"

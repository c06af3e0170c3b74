"""Label the arms of many runs: one label an arm, the same in every seed.

An arm serves many runs, and one rule may have several arms of one seed, whose settings differ. A label is the rule's
name and the fewest settings that tell the rule's arms apart: "lark budget=1", "random for rsr". The seed is never part
of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

UNTRAINED = "before training"
_OF_AN_UNTRAINED_STUDENT = ("task.", "model.", "evaluation.", "probe.span")
"""Beginnings of the settings that can tell two untrained students apart, and what is measured of them."""

_ITSELF = "itself"  # in place of the selector's name, where a baseline is the same rule

Summary = Mapping[str, Any]
"""A run's summary.json."""
Figures = Mapping[str, Any]
"""An arm's part of it."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Hold the arms of runs under their labels."""

    arms: Mapping[str, Mapping[int, Figures]]
    """Figures by label and seed."""
    runs: tuple[Mapping[str, str], ...]
    """The labels of each run's arms by their names (before, baseline, selector)."""
    notes: tuple[str, ...]
    """Arms that no setting tells apart."""

    def __post_init__(self) -> None:
        assert all(label in self.arms for labels in self.runs for label in labels.values())


def label_arms(runs: Sequence[Summary]) -> Labelled:
    """Label the arms of runs of one task and model.

    Sets of settings that share a student of some seed are the same arm, unless they came to different students of
    another. So a setting that had no effect on an arm is no part of its label. If the same rule, settings and seed came
    to two students (the code or the data changed in between), the last one given counts, and a note says so. Otherwise
    the order of the runs does not matter.
    """
    follows_seed = _find_seed_settings(runs)
    seen: dict[tuple[str, bool], list[_Appearance]] = {}  # by rule and whether trained: any rule may be named UNTRAINED
    for number, run in enumerate(runs):
        for name, arm in run["arms"].items():
            rule = UNTRAINED if name == "before" else arm["rule"]
            settings = _list_settings(run, name, follows_seed)
            one = _Appearance(run=number, name=name, seed=run["seed"], arm=arm, settings=settings)
            seen.setdefault((rule, name != "before"), []).append(one)

    arms: dict[str, dict[int, Figures]] = {}
    labels: tuple[dict[str, str], ...] = tuple({} for _ in runs)
    notes = []
    for (rule, _), appearances in seen.items():
        names = _list_varying(appearances)
        last: dict[_Values, dict[int, _Appearance]] = {}
        replaced: dict[int, None] = {}
        for one in appearances:
            of_seed = last.setdefault(one.get_values(names), {})
            if one.seed in of_seed and of_seed[one.seed].student != one.student:
                replaced[one.seed] = None
            of_seed[one.seed] = one
        notes += [
            f"{rule}, seed {seed}: runs of the same settings have different students (code, data or evaluation changed "
            "in between); the last one read counts"
            for seed in replaced
        ]
        role = "selector" if any(one.name == "selector" for one in appearances) else "baseline"
        label_of = _make_labels(rule, [name.replace("own.", f"{role}.", 1) for name in names], _group_same_arms(last))
        while not arms.keys().isdisjoint(label_of.values()):  # a rule may be named like the label of another's arm
            label_of = {values: f"rule {label}" for values, label in label_of.items()}
        for one in appearances:
            label = label_of[one.get_values(names)]
            arms.setdefault(label, {})[one.seed] = last[one.get_values(names)][one.seed].arm
            labels[one.run][one.name] = label
    return Labelled(arms=arms, runs=labels, notes=tuple(notes))


_Values = tuple[str | None, ...]  # of the settings that vary; None where an arm does not have one
_Student = tuple[int, str, str]  # seed, hash and accuracies


@dataclass(frozen=True, kw_only=True)
class _Appearance:
    """Hold an arm of a run, with the settings it may depend on as text."""

    run: int
    name: str
    seed: int
    arm: Figures
    settings: Mapping[str, str]

    @cached_property
    def student(self) -> _Student:
        """Identify the student and how it was evaluated."""
        return self.seed, self.arm["hash"], json.dumps(self.arm["per_problem"], sort_keys=True)

    def get_values(self, names: Sequence[str]) -> _Values:
        return tuple(self.settings.get(name) for name in names)


def _find_seed_settings(runs: Sequence[Summary]) -> set[tuple[str, str]]:
    """Find settings such as selector.score.seed that are the run's seed wherever their rule has them."""
    follows: dict[tuple[str, str], bool] = {}
    for run in runs:
        for name, value in run["settings"].items():
            if name.endswith("seed"):
                setting = _name_rule(run, name)
                follows[setting] = follows.get(setting, True) and value == run["seed"]
    return {setting for setting, always in follows.items() if always}


def _name_rule(run: Summary, name: str) -> tuple[str, str]:
    """Put the rule that a setting belongs to before its name; "" if it belongs to none."""
    group = name.partition(".")[0]
    return (run["arms"][group]["rule"] if group in run["arms"] else ""), name


def _list_settings(run: Summary, arm: str, ignored: set[tuple[str, str]]) -> dict[str, str]:
    """List the settings that an arm may depend on.

    Its own rule's are called own.*, those of the selector that a baseline is matched to for.*.
    """
    found = {"for.name": _ITSELF if _is_unweighted_selector(run) else run["arms"]["selector"]["rule"]}
    found = found if arm == "baseline" else {}
    for name, value in run["settings"].items():
        if _name_rule(run, name) in ignored or (arm == "before" and not name.startswith(_OF_AN_UNTRAINED_STUDENT)):
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


def _is_unweighted_selector(run: Summary) -> bool:
    """Check that both arms are the same rule but for the policy, which a baseline does not have."""

    def list_own(group: str) -> dict[str, Any]:
        named = {name.removeprefix(f"{group}."): value for name, value in run["settings"].items()}
        return {name: value for name, value in named.items() if name.partition(".")[0] in ("score", "filter")}

    rules = {run["arms"][group]["rule"] for group in ("selector", "baseline") if group in run["arms"]}
    return len(rules) == 1 and list_own("selector") == list_own("baseline")


def _list_varying(appearances: Sequence[_Appearance]) -> list[str]:
    """List the settings in which appearances differ; in front those that a label names rather than others."""
    names = {name for one in appearances for name in one.settings}
    varying = [name for name in names if len({one.settings.get(name) for one in appearances}) > 1]
    return sorted(varying, key=lambda name: ("._" in name, name.count("."), len(name), name))


def _group_same_arms(appearances: Mapping[_Values, Mapping[int, _Appearance]]) -> list[list[_Values]]:
    """Group settings that are the same arm, from the arms by settings and seed.

    They are linked by students they share, if that gives no seed two students. Else it is open which of them belong
    together, and only those with the same students of the same seeds do.
    """
    students = {values: frozenset(one.student for one in of_seed.values()) for values, of_seed in appearances.items()}
    linked: dict[frozenset[_Student], list[_Values]] = {}
    for values, of_values in students.items():
        sharing = [others for others in linked if not others.isdisjoint(of_values)]
        members = [values, *(member for others in sharing for member in linked.pop(others))]
        linked[of_values.union(*sharing)] = members
    classes: dict[frozenset[_Student], list[_Values]] = {}
    for of_all, members in linked.items():
        one_a_seed = len({seed for seed, *_ in of_all}) == len(of_all)
        for values in members:
            classes.setdefault(of_all if one_a_seed else students[values], []).append(values)
    return list(classes.values())


def _make_labels(rule: str, names: Sequence[str], classes: Sequence[Sequence[_Values]]) -> dict[_Values, str]:
    """Label each class of settings that are the same arm by what all of it share, if that tells it apart."""
    kept = list(range(len(names)))
    for index in reversed(kept):  # without this one, are the classes still disjoint?
        fewer = [i for i in kept if i != index]
        restricted = [{tuple(values[i] for i in fewer) for values in members} for members in classes]
        if sum(map(len, restricted)) == len(set().union(*restricted)):
            kept = fewer

    def join_text(values: _Values, indices: Sequence[int]) -> str:
        return " ".join([rule, *(_format_setting(names[i], values[i]) for i in indices if values[i] is not None)])

    fixed = [[i for i in kept if len({values[i] for values in members}) == 1] for members in classes]
    short = [join_text(members[0], indices) for members, indices in zip(classes, fixed, strict=True)]
    labels = [
        label if short.count(label) == 1 else " or ".join(sorted({join_text(values, kept) for values in members}))
        for label, members in zip(short, classes, strict=True)
    ]
    assert len(set(labels)) == len(classes), f"labels of {rule} do not tell its arms apart: {labels}"
    return {values: label for label, members in zip(labels, classes, strict=True) for values in members}


def _format_setting(name: str, value: str | None) -> str:
    if name == "for.name" and value == _ITSELF:  # the same rows, but for their weights
        return "with equal weights"
    if name == "for.name":
        return f"for {value}"
    return f"for selector.{name.removeprefix('for.')}={value}" if name.startswith("for.") else f"{name}={value}"

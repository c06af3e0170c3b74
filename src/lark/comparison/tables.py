"""Build tables of text from a comparison, and the notes that belong below them.

`printing` prints them, `files` turns them into CSV, LaTeX and JSON, lark.page shows them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lark.comparison.comparison import Comparison, Group, PooledArm, SetDifference
from lark.comparison.inference import FEW_SEEDS, Interval
from lark.comparison.labels import UNTRAINED

FEW_PROBLEMS = 30
TOO_FEW = "too few problems for a bootstrap interval to be trusted"
LEGEND = (
    "Means over seeds. Held-out loss and its mean over training: nats/token, lower is better (a difference below 0 "
    "favours the selector). Tokens and seconds: what choosing cost. Accuracies: differences in points with 95% crossed "
    "bootstrap intervals over problems and, from 3 on, seeds; p by sign flips over problems, for the seeds at hand; "
    "Holm over the rows; detectable: what would be found with 80% power. Labels name the fewest settings that tell "
    "arms apart."
)
MIN_SHARES = {
    "stop": (0.5, "end by themselves (task.max_new_tokens, model.template, model.end_token)"),
    "answered": (0.2, "have an answer that is found (task.system can ask for a box; task.pattern finds others)"),
}
"""Shares of samples: the least that is in order, and what they are shares of."""
STOP_DROP = 0.1
"""A share of samples that end by themselves so far below the untrained student's calls for a remedy."""
STOP_RATES_SHOWN = 6
_UNHYPHENATED = {"trajec-\ntories": "trajectories", "prob-\nlems": "problems", "detect-\nable": "detectable"}
"""Headers that are divided to make printed columns narrow."""
_SIZES = {"trajec-\ntories": "trajectories", "trained\ntokens": "tokens", "eff.\nsize": "effective_sample_size"}


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """Hold a table of text. The columns of a block (cells by header) stay together where a console is too narrow."""

    title: str
    header: str
    labels: list[str]
    blocks: list[dict[str, list[str]]]
    shown: frozenset[str] = frozenset()
    """Headers of the columns that a page shows, where the others are behind a switch; none: it shows all."""
    last_apart: bool = False
    """Rule a line above the last row."""

    def __post_init__(self) -> None:
        assert all(len(cells) == len(self.labels) for block in self.blocks for cells in block.values())

    def list_columns(self) -> list[tuple[str, list[str], bool]]:
        """List headers in one line, cells, and whether a page shows the column without being asked."""
        columns = [column for block in self.blocks for column in block.items()]
        return [
            (" ".join(_UNHYPHENATED.get(header, header).split()), cells, not self.shown or header in self.shown)
            for header, cells in columns
        ]


def format_number(value: float | None, form: str) -> str:
    """Format a number, with no minus before what rounds to 0; empty for NaN and for the null that JSON has for it."""
    if value is None or math.isnan(value):
        return ""
    text = form.format(value)
    return form.format(0.0) if text == form.format(-0.0) else text


def format_interval(interval: Interval, separator: str = " ") -> str:
    """Format a difference of accuracies with its interval, in points."""
    mean, low, high = (format_number(100 * x, "{:+.1f}") for x in (interval.estimate, interval.low, interval.high))
    return mean + (f"{separator}[{low}, {high}]" if low else "")


# ---- tables


def build_tables(comparison: Comparison) -> Iterator[TextTable]:
    """Yield the arms and the differences of every task and model, and the grid over them if there is one."""
    for group in comparison.groups:
        yield _build_arm_table(group)
        yield _build_difference_table(group)
    if comparison.grid:
        yield _build_grid(comparison)


def build_run_table(group: Group, *, seed: int) -> TextTable:
    """Build the table of a single run: its students and, as the last row, their difference."""
    (difference,) = group.differences
    roles: dict[str, list[str]] = {}
    for role, label in (("selector", difference.selector), ("baseline", difference.baseline)):
        roles.setdefault(label, []).append(role)
    last = f"selector - {'before' if difference.baseline == UNTRAINED else 'baseline'}"
    labels = [_label(arm, f"{'/'.join(roles[arm.label])}: " if arm.trained else "") for arm in group.arms]
    sizes = {header: [*_format_column(group, key, "{:,.0f}"), ""] for header, key in _SIZES.items()}
    losses = [format_number(arm.held_out_loss, "{:.3f}") for arm in group.arms]
    blocks = [sizes | {"held-out\nloss": [*losses, format_number(difference.held_out_loss, "{:+.3f}")]}]
    for name, (first, *others) in group.sets.items():
        metrics = _format_metrics(group, name)
        interval = format_interval(difference.sets[name].interval, "\n")
        blocks.append({f"{name}\n{first}": [*metrics[first], interval]})
        blocks[-1] |= {f"{name}\n{metric}": [*metrics[metric], ""] for metric in others}
    title = f"{group.task} · {group.model} · seed {seed}"
    return TextTable(title=title, header="student", labels=[*labels, last], blocks=blocks, last_apart=True)


def _build_arm_table(group: Group) -> TextTable:
    sizes = {header: _format_column(group, key, "{:,.0f}") for header, key in _SIZES.items()}
    losses = {
        "held-out\nloss": [format_number(arm.held_out_loss, "{:.3f}") for arm in group.arms],
        "mean over\ntraining": [format_number(arm.mean_loss, "{:.3f}") for arm in group.arms],
    }
    cost = {"forward\ntokens": _format_column(group, "forward_tokens", "{:,.0f}")}
    if any(arm.backward_tokens > 0 for arm in group.arms):
        cost["backward\ntokens"] = _format_column(group, "backward_tokens", "{:,.0f}")
    cost["seconds"] = _format_column(group, "seconds", "{:,.1f}")
    accuracies = [
        {f"{name}\n{metric}": cells for metric, cells in _format_metrics(group, name).items()} for name in group.sets
    ]
    shown = [f"{name}\n{metrics[0]}" for name, metrics in group.sets.items()]
    return TextTable(
        title=f"{group.task} · {group.model}",
        header="student",
        labels=[_label(arm) for arm in group.arms],
        blocks=[*accuracies, losses, sizes, cost, {"seeds": [str(len(arm.seeds)) for arm in group.arms]}],
        shown=frozenset([*shown, "held-out\nloss", *list(_SIZES)[:2], "seconds"]),
    )


def _label(arm: PooledArm, role: str = "") -> str:
    return f"{role}{arm.label}{'' if arm.matched else ' (unmatched)'}"


def _format_column(group: Group, key: str, form: str) -> list[str]:
    """Format a figure of the selections; an untrained student has none."""
    return [format_number(getattr(arm, key), form) if arm.trained else "" for arm in group.arms]


def _format_metrics(group: Group, name: str) -> dict[str, list[str]]:
    return {
        metric: [format_number(arm.metrics.get(name, {}).get(metric), "{:.1%}") for arm in group.arms]
        for metric in group.sets[name]
    }


def _build_difference_table(group: Group) -> TextTable:
    rows = group.differences
    blocks = [
        {
            "seeds": [str(len(row.seeds)) for row in rows],
            "held-out\nloss": [format_number(row.held_out_loss, "{:+.3f}") for row in rows],
            "mean over\ntraining": [format_number(row.mean_loss, "{:+.3f}") for row in rows],
        }
    ]
    shown: list[str] = []
    for name in group.sets:
        metric = "/".join(dict.fromkeys(row.sets[name].metric for row in rows if name in row.sets))
        headers = (f"{name}\n{metric}", "\np", "\nHolm", "prob-\nlems", "detect-\nable")
        shown.append(headers[0])
        columns = zip(*(_format_difference(row.sets.get(name)) for row in rows), strict=True)
        blocks.append({header: list(cells) for header, cells in zip(headers, columns, strict=True)})
    title, labels = f"{group.task} · {group.model}", [row.label for row in rows]
    return TextTable(title=title, header="selector - baseline", labels=labels, blocks=blocks, shown=frozenset(shown))


def _format_difference(difference: SetDifference | None) -> tuple[str, str, str, str, str]:
    if difference is None:
        return "", "", "", "", ""
    interval, smallest = difference.interval, format_number(100 * difference.smallest_detectable, "{:.1f}")
    p, p_holm = ("<.001" if p < 0.001 else format_number(p, "{:.3f}") for p in (difference.p, difference.p_holm))
    return format_interval(interval), p, p_holm, str(interval.problems), smallest


def _build_grid(comparison: Comparison) -> TextTable:
    rows = comparison.grid
    present = [sum(cell is not None for cell in row.cells) for row in rows]
    averages = [
        format_number(100 * row.average, "{:+.1f}") + (f" (of {count})" if count < len(row.cells) else "")
        for row, count in zip(rows, present, strict=True)
    ]
    blocks = [
        {"average": averages, "win/tie/\nloss": [f"{row.wins}/{row.ties}/{row.losses}" for row in rows]},
        *({"\n".join(key): [_mark(row.cells[i]) for row in rows]} for i, key in enumerate(comparison.columns)),
    ]
    title = "differences in points; * the interval excludes 0"
    return TextTable(title=title, header="selector - baseline", labels=[row.label for row in rows], blocks=blocks)


def _mark(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return format_number(100 * interval.estimate, "{:+.1f}") + ("*" if interval.low > 0 or interval.high < 0 else " ")


# ---- notes


def list_notes(group: Group) -> Iterator[str]:
    """Yield what the figures of the tables do not say by themselves, a sentence a line."""
    for name in group.sets:
        labels: dict[str, list[str]] = {}
        for row in group.differences:
            if name in row.sets:
                text = describe_gaps(row.sets[name]).removeprefix(FEW_SEEDS).removeprefix("; ")  # conclusions say it
                labels.setdefault(text, []).append(row.label)
        for text, of_text in labels.items():
            if text:
                yield f"{name}: {text}" if len(labels) == 1 else f"{name}, {'; '.join(of_text)}: {text}"
        measured = [arm for arm in group.arms if "stop" in arm.metrics.get(name, {})]
        untrained = [arm for arm in measured if not arm.trained]
        before = untrained[0].metrics[name]["stop"] if len(untrained) == 1 else None
        names = {arm.label: "before" if [arm] == untrained else arm.label for arm in measured}
        if text := describe_stop_rates({names[a.label]: a.metrics[name]["stop"] for a in measured}, before=before):
            yield f"{name}: {text}"
        for text in describe_samples([arm.metrics[name] for arm in group.arms if name in arm.metrics]):
            yield f"{name}: {text}"
    yield from group.notes


def describe_gaps(difference: SetDifference) -> str:
    """Say what an interval does not cover, and what was left out; empty if there is nothing to say."""
    parts = [difference.interval.label]
    if difference.left_out:
        parts.append(f"left out, as not both have it: {difference.left_out}")
    if difference.interval.estimate == 0 and math.isnan(difference.interval.standard_error):
        parts.append("no problem was answered differently")
    elif 1 < difference.interval.problems < FEW_PROBLEMS:
        parts.append(TOO_FEW)
    return "; ".join(part for part in parts if part)


def describe_samples(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say which students' low accuracy may be due to something else than wrong answers."""
    for figure, (least, what) in MIN_SHARES.items():
        if low := [share for of_student in metrics if (share := of_student.get(figure, 1.0)) < least]:
            shares = " to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(low), max(low))))
            students = f"for {len(low)} of {len(metrics)} students " if len(metrics) > 1 else ""
            yield f"{students}only {shares} of the samples {what}"


def describe_stop_rates(shares: Mapping[str, float], *, before: float | None) -> str:
    """Say what share of each student's samples ended by themselves; empty if all samples did.

    Names a remedy where training took the share well below `before`, the untrained student's (None: unknown).
    """
    lower = {name: share for name, share in shares.items() if share < 1}
    if not lower:
        return ""
    few = len(shares) <= STOP_RATES_SHOWN
    shown = shares if few else dict(sorted(lower.items(), key=lambda item: item[1])[:STOP_RATES_SHOWN])
    text = "stopped by themselves: " + ", ".join(f"{name} {share:.1%}" for name, share in shown.items())
    if not few:
        text += f"; the other {len(shares) - len(shown)} students more often"
    if before is not None and (worse := [name for name in lower if shares[name] < before - STOP_DROP]):
        count = ", ".join(worse) if few else f"{len(worse)} of {len(shares)}"
        text += (
            f". Training has made {count} stop less often: raise task.max_new_tokens if answers are cut off before "
            "their end; if they go on after it, the end token was not learned: train longer, or set model.end_token "
            "to one that the student knows"
        )
    return text

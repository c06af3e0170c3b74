"""A comparison of runs as tables: printed, and as the text of CSV, LaTeX and JSON files.

Imports nothing heavy at the top: lark.report is imported before every run.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lark.comparison.comparison import Comparison, Group, SetDifference
    from lark.comparison.inference import Interval

WIDTH = 100  # columns where there is no terminal
LABEL_WIDTH = 40
FEW_PROBLEMS = 30
TOO_FEW = "too few problems for a bootstrap interval to be trusted"
LEGEND = (
    "Means over seeds. Held-out loss and its mean over training: nats/token, lower is better (a difference below 0 "
    "favours the selector). Tokens and seconds: what choosing cost. Accuracies: differences in points with 95% crossed "
    "bootstrap intervals over problems and, from 3 on, seeds; p by sign flips over problems, for the seeds at hand; "
    "Holm over the rows; detectable: what would be found with 80% power. Labels name the fewest settings that tell "
    "arms apart."
)
FORM = (
    ("stop", 0.5, "end by themselves (task.max_new_tokens, model.template, model.end_token)"),
    ("boxed", 0.2, "box their answer (task.system can ask for it, or task.pattern)"),
)
"""Shares of samples, what they should at least be, and what they are shares of."""
STOPS_LESS = 0.1
"""A share of samples that end by themselves so far below the untrained student's calls for a remedy."""
STOPS_SHOWN = 6
UNHYPHENATED = {"trajec-\ntories": "trajectories", "prob-\nlems": "problems", "detect-\nable": "detectable"}
"""Headers that are divided to make columns narrow, as a file has them."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table of text. The columns of a block (cells by header) stay together where a page is too narrow for all."""

    title: str
    header: str
    labels: list[str]
    blocks: list[dict[str, list[str]]]

    def __post_init__(self) -> None:
        assert all(len(cells) == len(self.labels) for block in self.blocks for cells in block.values())


# ---- as text


def number(value: float | None, form: str) -> str:
    """Formatted, with no minus before what rounds to 0; empty for NaN, and for the null that JSON has in its place."""
    if value is None or math.isnan(value):
        return ""
    text = form.format(value)
    return form.format(0.0) if text == form.format(-0.0) else text


def estimate(difference: Mapping[str, float | None], separator: str = " ") -> str:
    """A difference in points with its interval; `difference` holds estimate, low and high as fractions."""
    figures = (difference[key] for key in ("estimate", "low", "high"))
    mean, low, high = (number(None if x is None else 100 * x, "{:+.1f}") for x in figures)
    return mean + (f"{separator}[{low}, {high}]" if low else "")


def form_of_samples(metrics: Mapping[str, float]) -> str:
    """What a low accuracy may be due to instead of wrong answers; empty if samples are in good form."""
    for figure, least, what in FORM:
        if metrics[figure] < least:
            return f"only {metrics[figure]:.0%} of the samples {what}"
    return ""


def stop_rates(shares: Mapping[str, float], *, before: float | None) -> str:
    """Of each student, by name, the share of samples that ended by themselves, and a remedy where training took it well
    below `before`, the untrained student's (None: unknown); empty if all samples did.
    """
    lower = {name: share for name, share in shares.items() if share < 1}
    if not lower:
        return ""
    few = len(shares) <= STOPS_SHOWN
    shown = shares if few else dict(sorted(lower.items(), key=lambda item: item[1])[:STOPS_SHOWN])
    text = "stopped by themselves: " + ", ".join(f"{name} {share:.1%}" for name, share in shown.items())
    if not few:
        text += f"; the other {len(shares) - len(shown)} students more often"
    if before is not None and (worse := [name for name in lower if shares[name] < before - STOPS_LESS]):
        count = ", ".join(worse) if few else f"{len(worse)} of {len(shares)}"
        text += (
            f". Training has made {count} stop less often: raise task.max_new_tokens if answers are cut off before "
            "their end; if they go on after it, the end token was not learned: train longer, or set model.end_token "
            "to one that the student knows"
        )
    return text


def sheets(comparison: "Comparison") -> Iterator[Sheet]:
    """The arms and the differences of every task and model, and the grid over them if there is one."""
    for group in comparison.groups:
        yield _arms(group)
        yield _differences(group)
    if comparison.grid:
        yield _grid(comparison)


def _arms(group: "Group") -> Sheet:
    def column(key: str, form: str, *, of_untrained: bool = False) -> list[str]:
        return [number(getattr(arm, key), form) if arm.trained or of_untrained else "" for arm in group.arms]

    sizes = {"trajec-\ntories": "trajectories", "trained\ntokens": "tokens", "eff.\nsize": "effective_sample_size"}
    losses = {"held-out\nloss": "held_out_loss", "mean over\ntraining": "mean_loss"}
    blocks = [
        {"seeds": [str(len(arm.seeds)) for arm in group.arms]},
        {header: column(key, "{:,.0f}") for header, key in sizes.items()},
        {header: column(key, "{:.3f}", of_untrained=True) for header, key in losses.items()},
    ]
    cost = {"forward\ntokens": column("forward_tokens", "{:,.0f}")}
    if any(arm.backward_tokens > 0 for arm in group.arms):
        cost["backward\ntokens"] = column("backward_tokens", "{:,.0f}")
    blocks.append(cost | {"seconds": column("seconds", "{:,.1f}")})
    for name, metrics in group.sets.items():
        cells = {m: [number(arm.metrics.get(name, {}).get(m), "{:.1%}") for arm in group.arms] for m in metrics}
        blocks.append({f"{name}\n{metric}": cells[metric] for metric in metrics})
    labels = [arm.label + ("" if arm.matched else " (unmatched)") for arm in group.arms]
    return Sheet(title=f"{group.task} · {group.model}", header="student", labels=labels, blocks=blocks)


def _differences(group: "Group") -> Sheet:
    rows = group.differences
    blocks = [
        {
            "seeds": [str(len(row.seeds)) for row in rows],
            "held-out\nloss": [number(row.held_out_loss, "{:+.3f}") for row in rows],
            "mean over\ntraining": [number(row.mean_loss, "{:+.3f}") for row in rows],
        }
    ]
    for name in group.sets:
        metric = "/".join(dict.fromkeys(row.sets[name].metric for row in rows if name in row.sets))
        headers = (f"{name}\n{metric}", "\np", "\nHolm", "prob-\nlems", "detect-\nable")
        columns = zip(*(_cells(row.sets.get(name)) for row in rows), strict=True)
        blocks.append({header: list(cells) for header, cells in zip(headers, columns, strict=True)})
    title, labels = f"{group.task} · {group.model}", [row.label for row in rows]
    return Sheet(title=title, header="selector - baseline", labels=labels, blocks=blocks)


def _cells(difference: "SetDifference | None") -> tuple[str, str, str, str, str]:
    if difference is None:
        return "", "", "", "", ""
    interval, smallest = difference.interval, number(100 * difference.smallest_detectable, "{:.1f}")
    return estimate(vars(interval)), _p(difference.p), _p(difference.p_holm), str(interval.problems), smallest


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else number(value, "{:.3f}")


def _grid(comparison: "Comparison") -> Sheet:
    rows = comparison.grid
    present = [sum(cell is not None for cell in row.cells) for row in rows]
    averages = [
        number(100 * row.average, "{:+.1f}") + (f" (of {count})" if count < len(row.cells) else "")
        for row, count in zip(rows, present, strict=True)
    ]
    blocks = [
        {"average": averages, "win/tie/\nloss": [f"{row.wins}/{row.ties}/{row.losses}" for row in rows]},
        *({"\n".join(column): [_marked(row.cells[i]) for row in rows]} for i, column in enumerate(comparison.columns)),
    ]
    title = "differences in points; * the interval excludes 0"
    return Sheet(title=title, header="selector - baseline", labels=[row.label for row in rows], blocks=blocks)


def _marked(interval: "Interval | None") -> str:
    if interval is None:
        return ""
    return number(100 * interval.estimate, "{:+.1f}") + ("*" if interval.low > 0 or interval.high < 0 else " ")


def notes(group: "Group") -> Iterator[str]:
    """What the figures of the tables do not say by themselves."""
    for name in group.sets:
        labels: dict[str, list[str]] = {}
        for row in group.differences:
            if name in row.sets:
                labels.setdefault(note(row.sets[name]), []).append(row.label)
        for text, of_text in labels.items():
            if text:
                yield f"{name}: {text}" if len(labels) == 1 else f"{name}, {'; '.join(of_text)}: {text}"
        metrics = [arm.metrics[name] for arm in group.arms if name in arm.metrics]
        measured = [arm for arm in group.arms if "stop" in arm.metrics.get(name, {})]
        untrained = [arm for arm in measured if not arm.trained]
        before = untrained[0].metrics[name]["stop"] if len(untrained) == 1 else None
        names = {arm.label: "before" if [arm] == untrained else arm.label for arm in measured}
        if text := stop_rates({names[arm.label]: arm.metrics[name]["stop"] for arm in measured}, before=before):
            yield f"{name}: {text}"
        for figure, least, what in FORM:
            if low := [of_arm[figure] for of_arm in metrics if of_arm[figure] < least]:
                shares = f"{min(low):.0%} to {max(low):.0%}" if len(low) > 1 else f"{low[0]:.0%}"
                yield f"{name}: for {len(low)} of {len(metrics)} students only {shares} of the samples {what}"
    yield from group.notes


def note(difference: "SetDifference") -> str:
    """What an interval does not cover, and what was left out; empty if there is nothing to say."""
    parts = [difference.interval.label]
    if difference.left_out:
        parts.append(f"left out, as not both have it: {difference.left_out}")
    if difference.interval.low == difference.interval.high == 0:
        parts.append("no problem was answered differently")
    elif 1 < difference.interval.problems < FEW_PROBLEMS:
        parts.append(TOO_FEW)
    return "; ".join(part for part in parts if part)


# ---- printed


def new_console() -> "Console":
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)  # users' names are no markup


def new_table(title: str) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)


def print_runs(comparison: "Comparison") -> None:
    """The comparison of several runs, with its notes and a legend."""
    console = new_console()
    for sheet in sheets(comparison):
        _print(console, sheet)
    for group in comparison.groups:
        of_group = f"{group.task} · {group.model}, " if len(comparison.groups) > 1 else ""
        for text in notes(group):
            console.print(f"{of_group}{text}")
    console.print(LEGEND)


def _print(console: "Console", sheet: Sheet) -> None:
    """In as many tables below each other as it takes to stay within the width."""
    from rich.measure import Measurement

    unlimited = console.options.update(width=10_000)
    start = 0
    while start < len(sheet.blocks):
        end = start + 1
        while end < len(sheet.blocks) and (
            Measurement.get(console, unlimited, _part(sheet, start, end + 1)).maximum <= console.width
        ):
            end += 1
        console.print(_part(sheet, start, end))
        start = end


def _part(sheet: Sheet, start: int, end: int) -> "Table":
    table = new_table(sheet.title)
    table.add_column(sheet.header, max_width=LABEL_WIDTH, overflow="fold")
    columns = [column for block in sheet.blocks[start:end] for column in block.items()]
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in zip(sheet.labels, *(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


# ---- in files


def texts(comparison: "Comparison") -> dict[str, str]:
    """The content of the comparison's files by their names.

    CSV holds numbers, with their units in the headers; LaTeX the printed tables (booktabs); JSON everything, accuracies
    as fractions.
    """
    import pandas as pd

    plain = json.loads(json.dumps(asdict(comparison)), parse_constant=lambda nan: None)  # JSON has no NaN
    return {
        "arms.csv": pd.DataFrame(_arm_records(comparison)).to_csv(index=False),
        "differences.csv": pd.DataFrame(_difference_records(comparison)).to_csv(index=False),
        "comparison.tex": "\n".join(map(_latex, sheets(comparison))),
        "comparison.json": json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }


def _latex(sheet: Sheet) -> str:
    import pandas as pd

    columns = [(sheet.header, sheet.labels), *(column for block in sheet.blocks for column in block.items())]
    frame = pd.DataFrame(list(zip(*(cells for _, cells in columns), strict=True)))
    headers = [" ".join(UNHYPHENATED.get(header, header).split()) for header, _ in columns]
    tabular = frame.set_axis(headers, axis=1).to_latex(
        index=False, escape=True, column_format="l" + "r" * (len(columns) - 1)
    )
    for character, command in (("<", r"\textless{}"), (">", r"\textgreater{}"), ("|", r"\textbar{}")):
        tabular = tabular.replace(character, command)  # other characters in the default font encoding
    tabular = re.sub(r"^(?=[ \t]*[\[*])", "{}", tabular, flags=re.MULTILINE)  # else an argument of the rule or \\ above
    return f"% {' '.join(f'{sheet.title}: {sheet.header}'.split())}\n{tabular}"


def _arm_records(comparison: "Comparison") -> list[dict[str, Any]]:
    return [
        {
            "task": group.task,
            "model": group.model,
            "arm": arm.label,
            "matched": arm.matched,
            "seeds": len(arm.seeds),
            "trajectories": arm.trajectories,
            "trained tokens": arm.tokens,
            "effective sample size": arm.effective_sample_size,
            "lr": " ".join(f"{rate:g}" for rate in arm.lr),
            "held-out loss (nats/token)": arm.held_out_loss,
            "held-out loss, mean over training (nats/token)": arm.mean_loss,
            "forward tokens": arm.forward_tokens,
            "backward tokens": arm.backward_tokens,
            "seconds": arm.seconds,
            **{
                f"{name} {metric} (%)": 100 * arm.metrics.get(name, {}).get(metric, math.nan)
                for name, metrics in group.sets.items()
                for metric in (*metrics, "stop")
            },
        }
        for group in comparison.groups
        for arm in group.arms
    ]


def _difference_records(comparison: "Comparison") -> list[dict[str, Any]]:
    """A row for each pair and evaluation set; one for a pair that has no set."""
    return [
        {
            "task": group.task,
            "model": group.model,
            "selector": row.selector,
            "baseline": row.baseline,
            "seeds": len(row.seeds),
            "held-out loss (nats/token)": row.held_out_loss,
            "held-out loss, mean over training (nats/token)": row.mean_loss,
            **(_set_record(name, row.sets[name]) if name is not None else {}),
        }
        for group in comparison.groups
        for row in group.differences
        for name in (list(row.sets) or [None])
    ]


def _set_record(name: str, difference: "SetDifference") -> dict[str, Any]:
    interval = difference.interval
    return {
        "set": name,
        "metric": difference.metric,
        "difference (points)": 100 * interval.estimate,
        "low (points)": 100 * interval.low,
        "high (points)": 100 * interval.high,
        "p": difference.p,
        "p (Holm)": difference.p_holm,
        "smallest detectable (points)": 100 * difference.smallest_detectable,
        "seeds": interval.seeds,
        "problems": interval.problems,
        "note": note(difference),
    }

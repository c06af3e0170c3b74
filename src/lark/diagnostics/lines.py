"""The diagnostics in lines: within-problem figures first, each beside what chance gives."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lark.selection.within_problem import Mean

SHOWN = 6  # of the nearest and of the farthest choices, and of teachers
LABEL, NAME, CELL = 12, 22, 32  # columns


def describe_selections(found: Mapping[str, Any]) -> Iterator[str]:
    """Of `lark.diagnostics.selection_diagnostics.of_choice`."""
    notes = []
    if found["without_forward_pass"]:
        notes.append("no rule asks the student, so scores of its statistics are left out")
    chance = next((kinds["length"]["within"] for kinds in found["correlations"].values()), None)
    yield _line(
        "diagnostics",
        f"{found['problems']:,} problems, {found['candidates']:,} candidates; rank correlations within problems"
        f"{_chance_range(chance)}, [95% over problems]"
        + "".join(f"; {note}" for note in (*notes, "docs/evidence.md says how to read it")),
    )
    for role, one in found["selections"].items():
        figures = [
            f"{target} {kinds['within']} (pooled {kinds['pooled'].mean:+.2f})"
            for target, kinds in found["correlations"][one["score"]].items()
            if kinds["within"].problems
        ]
        yield _line(role, f"score with {', '.join(figures) or 'nothing: it is the same for all candidates'}")
        yield _line("", _made_of(one))
    selector = found["selections"]["selector"]
    for measure, rows in selector["coverage"].items():
        bins = ", ".join(
            f"{row['chosen']:,} ({row['chosen_tokens']:.0f} tokens on average, all: {row['pool_tokens']:.0f})"
            for row in rows
        )
        yield _line("difficulty", f"chosen in problems from easy to hard by {measure}: {bins}")
    yield from _overlap_line(found["overlaps"], selector["score"])


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL - 1}} {text}"


def _chance_range(mean: Mean | None) -> str:
    return f", chance 0 ± {mean.chance_high:.2f}" if mean is not None and math.isfinite(mean.chance_high) else ""


def _made_of(one: Mapping[str, Any]) -> str:
    weights, gap = one["concentration"], one["gap"]
    shares = list(one["teachers"].items())
    teachers = ", ".join(f"{name} {row['share']:.0%} (chance {row['chance']:.0%})" for name, row in shares[:3])
    least = weights["least_chi2_within_problem"]
    parts = [
        f"teachers {teachers}",
        f"effective size {weights['effective_sample_size']:,.0f} of {weights['chosen']:,}, "
        f"{weights['effective_within_problem'].mean:.2f} a problem",
        f"chi2 to the pool {weights['chi2_within_problem'].mean:.2f} a problem"
        + (f" (least {least:.2f})" if math.isfinite(least) else ""),
    ]
    if gap and gap["problems"]:
        shown = " ".join(f"{value:.2g}" for value in gap["gap_over_deviation"].values())
        none = f", {gap['no_gap']:,} problems without" if gap["no_gap"] else ""
        parts.append(f"gap over the scores' deviation (p10 p50 p90) {shown}{none}")
    return "; ".join(parts)


def _overlap_line(overlaps: list[dict[str, Any]], selector: str) -> Iterator[str]:
    mine = [row for row in overlaps if selector in (row["a"], row["b"]) and row["problems"]]
    if mine:
        mine.sort(key=lambda row: -row["mean"])
        named = [f"{row['b'] if row['a'] == selector else row['a']} {row['mean']:.2f}" for row in mine]
        if len(named) > 2 * SHOWN:
            named = [*named[:SHOWN], "...", *named[-SHOWN:]]
        chance = mine[0]["chance"]
        yield _line("overlap", f"of the selector's choice (Jaccard, chance {chance:.2f}) with {', '.join(named)}")


def describe_fidelity(found: Mapping[str, Any]) -> Iterator[str]:
    """Of `lark.diagnostics.fidelity_sample.of_sample`."""
    over = f"{found['parameters']} parameters" + (" (LoRA's, at their start)" if found["lora"] else "")
    step, proxies, among, kappa = (found[name] for name in ("step", "proxies", "truths", "kappa"))
    gain = ", gains of the loss averaged over tokens" if found["average"] == "token" else ""
    yield _line(
        "fidelity",
        f"{found['problems']:,} of {found['of_problems']:,} problems, {found['candidates']:,} candidates, exact over "
        f"{over}{gain}; halving the step eta={step['eta']:g} changes the loss drop by {step['median_change']:.1%} "
        f"(median), {step['p95_change']:.1%} (p95)",
    )
    if not step["passed"]:
        yield _line(
            "warning",
            f"only {step['share_within']:.0%} of the loss drops stay within {step['tolerance']:.0%} when the step is "
            f"halved; lower diagnostics.eta={step['eta']:g}, or compare with rho, its limit",
        )
    first = next(iter(proxies.values()))
    rank, top = first["loss_drop"]["spearman"], first["loss_drop"]["overlap"]
    yield _line(
        "",
        f"within problems: rank correlation{_chance_range(rank)}, and overlap of the top {found['budget']}, chance "
        f"{top.chance:.2f} ± {top.chance_high - top.chance:.2f}",
    )
    yield _row("", [f"exact {name}" for name in first])
    for name, truths in proxies.items():
        yield _row(name, [f"{of['spearman']} {of['overlap'].mean:.2f}" for of in truths.values()])
    yield _line(
        "",
        f"exact among themselves: rho with loss drop {among['rho']['loss_drop']['spearman']}, g with loss drop "
        f"{among['g']['loss_drop']['spearman']}, rho with g {among['rho']['g']['spearman']}; cosine between gradients "
        f"of a problem's candidates {found['cosine']['mean']} (orthogonal: 0)",
    )
    if "mean" in kappa["all"]:
        one = kappa["all"]
        yield _line(
            "kappa",
            f"(squared gradient norm over Brier) mean {one['mean']:.3g}, coefficient of variation {one['cv']:.2f} "
            f"({one['cv_within_problems'].mean:.2f} within problems), goes with length to the power "
            f"{one['exponent_within_problems']} within problems, {one['exponent_pooled']} pooled",
        )
        parts = [
            f"{name} {of['share_of_squared_norm']:.0%} {of['cv']:.2f} {of['exponent_within_problems'].mean:+.2f}"
            for name, of in kappa.items()
            if name != "all" and "mean" in of
        ]
        yield _line("", f"by layers (share of squared norm, variation, power): {', '.join(parts)}")
        teachers = sorted(found["kappa_by_teacher"].items(), key=lambda item: -item[1]["relative"])
        shown = ", ".join(f"{name} {of['relative']:.2f}" for name, of in teachers[: 2 * SHOWN])
        yield _line("", f"by teacher, relative to its problem: {shown}{', ...' if len(teachers) > 2 * SHOWN else ''}")


def _row(name: str, cells: list[str]) -> str:
    return _line("", f"{name:<{NAME}}" + "".join(f"{cell:<{CELL}}" for cell in cells)).rstrip()


def describe_arms(curves: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Of `lark.diagnostics.diagnostics.Diagnosis.of_arms`."""
    for name, one in curves.items():
        parts = []
        if "area_ratio" in one and name != "baseline":
            reached = one["steps_to_baseline"]
            parts.append(f"area under the held-out loss {one['area_ratio']:.3f} of the baseline's")
            parts.append(
                f"the baseline's final loss reached after {reached:.0f} steps ({one['steps_ratio']:.0%} of its own)"
                if math.isfinite(reached)
                else "the baseline's final loss never reached"
            )
        if own := one["own_training_loss_not_comparable"]:
            parts.append(f"own training loss to {own['ratio']:.2f} of its start (not comparable between arms)")
        if parts:
            yield _line("curve", f"{name} ({one['rule']}): {'; '.join(parts)}")


def describe_bins(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Of `lark.diagnostics.diagnostics.Diagnosis.train_bins`."""
    if found is None:
        return
    rows, trends = found["rows"], found["trends"]
    losses = " ".join(f"{row['held_out_loss']:.3f}" for row in rows)
    yield _line(
        "bins",
        f"{found['bins']} by the score of {found['rule']}, lowest first, {rows[0]['trajectories']:,} trajectories of "
        f"{found['problems']:,} problems each ({found['left_out']:,} candidates left out): held-out loss {losses}"
        f"{_trend(trends['held_out_loss'])}",
    )
    for name in [name for name in trends if name != "held_out_loss"]:
        values = " ".join(f"{row['accuracy'][name]:.1%}" for row in rows)
        ends = trends[name]["highest_minus_lowest"]
        interval = f"[{100 * ends['low']:+.1f}, {100 * ends['high']:+.1f}]"
        yield _line(
            "",
            f"{name} {values}{_trend(trends[name])}; highest minus lowest {100 * ends['estimate']:+.1f} {interval} "
            "points",
        )


def _trend(trend: Mapping[str, float]) -> str:
    known = math.isfinite(trend["spearman"])
    return f" (rank correlation {trend['spearman']:+.2f}, p {trend['p']:.2f})" if known else ""

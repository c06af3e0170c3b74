"""Render a comparison as CSV, LaTeX and JSON, and write it to files."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from lark.common.cache import write_text
from lark.comparison.comparison import Comparison
from lark.comparison.tables import TextTable, build_tables, describe_gaps


def render_files(comparison: Comparison) -> dict[str, str]:
    """Render the comparison's files by name: arms.csv, differences.csv, comparison.tex, comparison.json."""
    plain = json.loads(json.dumps(asdict(comparison)), parse_constant=lambda nan: None)  # JSON has no NaN
    return {
        "arms.csv": pd.DataFrame(_list_arms(comparison)).to_csv(index=False),
        "differences.csv": pd.DataFrame(_list_differences(comparison)).to_csv(index=False),
        "comparison.tex": "\n".join(map(_render_latex, build_tables(comparison))),
        "comparison.json": json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }


def write_files(comparison: Comparison, folder: Path, beside: TextIO) -> None:
    """Write the comparison's files, each whole or not at all, and say so on `beside`."""
    files = render_files(comparison)
    for name, text in files.items():
        write_text(folder / name, text)
    print(f"comparison  {folder}: {', '.join(files)}", file=beside)


def _render_latex(table: TextTable) -> str:
    headers, cells, _ = zip((table.header, table.labels, True), *table.list_columns(), strict=True)
    frame = pd.DataFrame(list(zip(*cells, strict=True))).set_axis(list(headers), axis=1)
    tabular = frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(headers) - 1))
    for character, command in (("<", r"\textless{}"), (">", r"\textgreater{}"), ("|", r"\textbar{}")):
        tabular = tabular.replace(character, command)  # other characters in the default font encoding
    tabular = re.sub(r"^(?=[ \t]*[\[*])", "{}", tabular, flags=re.MULTILINE)  # else an argument of the rule or \\ above
    return f"% {' '.join(f'{table.title}: {table.header}'.split())}\n{tabular}"


def _list_arms(comparison: Comparison) -> list[dict[str, Any]]:
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


def _list_differences(comparison: Comparison) -> list[dict[str, Any]]:
    """List a row for each pair and evaluation set, and one for a pair that has no set."""
    rows = []
    for group in comparison.groups:
        for difference in group.differences:
            row = {
                "task": group.task,
                "model": group.model,
                "selector": difference.selector,
                "baseline": difference.baseline,
                "seeds": len(difference.seeds),
                "held-out loss (nats/token)": difference.held_out_loss,
                "held-out loss, mean over training (nats/token)": difference.mean_loss,
            }
            of_sets = [
                {
                    "set": name,
                    "metric": found.metric,
                    "difference (points)": 100 * found.interval.estimate,
                    "low (points)": 100 * found.interval.low,
                    "high (points)": 100 * found.interval.high,
                    "p": found.p,
                    "p (Holm)": found.p_holm,
                    "smallest detectable (points)": 100 * found.smallest_detectable,
                    "seeds": found.interval.seeds,
                    "problems": found.interval.problems,
                    "note": describe_gaps(found),
                }
                for name, found in difference.sets.items()
            ]
            rows += [row | of_set for of_set in of_sets or [{}]]
    return rows

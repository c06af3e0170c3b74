"""What a run says of its choices, and the table of statistics and scores that it leaves."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import atomic_write
from lark.selection.candidates import Candidates
from lark.selection.rule import Rule
from lark.selection.selection import Selection
from lark.training.datamodule import TrajectoryDataModule

LEFT_OUT = ("dropped_by_filter", "dropped_without_score", "problems_without_choice", "short_of_selector")


def write_statistics(
    path: Path, candidates: Candidates, selections: Mapping[str, Selection], rules: Mapping[str, Rule]
) -> None:
    """statistics.parquet: ids, statistics, and every score computed under its rule's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = {name: candidates[name] for name in ("problem_id", "candidate_id", "teacher")}
    scores: dict[str, np.ndarray] = {}
    for name, selection in selections.items():
        title = rules[name].name
        if title in scores and not np.array_equal(scores[title], selection.score_N, equal_nan=True):
            title += f" ({name})"  # two rules of one name, such as two of the user's own
        scores[title] = selection.score_N
    taken = {*ids, *candidates.statistics}
    scores = {f"{title} (score)" if title in taken else title: score_N for title, score_N in scores.items()}
    start = 0
    with atomic_write(path) as temporary, ExitStack() as stack:
        writer = None
        for block in candidates.blocks():  # steps and tokens of all rows need not fit into memory
            rows = slice(start, start := start + len(block["num_tokens"]))
            columns: dict[str, Any] = {name: pa.array(column[rows], pa.string()) for name, column in ids.items()}
            columns |= block
            columns |= {title: score_N[rows] for title, score_N in scores.items()}
            table = pa.table(columns)
            writer = writer or stack.enter_context(pq.ParquetWriter(temporary, table.schema))
            writer.write_table(table)


def describe_selections(data: TrajectoryDataModule) -> Iterator[str]:
    """A line a selection, and a warning if they are the same."""
    selections = data.selections
    for name, selection in selections.items():
        record, counts = selection.record, selection.record["counts"]
        teachers = ", ".join(f"{teacher} {share:.0%}" for teacher, share in list(record["teacher_share"].items())[:4])
        confounds = ", ".join(
            f"{column} {value:+.2f}" for column, value in record["within_problem_spearman"].items() if value is not None
        )
        left_out = ", ".join(f"{counts[key]:,} {key.replace('_', ' ')}" for key in LEFT_OUT if counts.get(key))
        zero = record["policy"].get("zero_weight_in_top_b", 0)
        against = record["policy"].get("tokens_minus_selector", 0)
        yield (
            f"{name:<11} {data.rules[name].name}: {counts['chosen']:,} of {counts['candidates']:,} trajectories, "
            f"{record['tokens']:,} tokens, effective size {record['effective_sample_size']:,.0f}; "
            f"teachers {teachers}"
            + (f"; score within problems against {confounds}" if confounds else "")
            + "".join(f"; {decided} {', '.join(map(str, value))}" for decided, value in record["decisions"].items())
            + (f"; {left_out}" if left_out else "")
            + (f"; {zero:,} of weight 0 left out" if zero else "")
            + (f"; {against:+,} tokens against the selector" if against else "")
            + (f"; choosing cost {_cost(data.cost_of(data.rules[name]))}" if data.rules[name].needs else "")
        )
    if (budget := data.rules["selector"].policy.budget) is not None and _takes_all(selections["selector"]):
        several = budget > 1 and data.candidates.groups.size.max() > 1
        remedy = "lower it" if several else "a choice needs problems with several candidates"
        yield f"warning     budget={budget} takes every candidate of every problem: nothing is chosen; {remedy}"
    if len(selections) == 2 and _same(*selections.values()):
        yield "warning     selector and baseline chose the same rows with the same weights: no difference is possible"


def _cost(cost: Mapping[str, float]) -> str:
    backward = f", {cost['backward_tokens']:,.0f} backward" if cost["backward_tokens"] else ""
    return f"{cost['forward_tokens']:,.0f} tokens forward{backward}, {cost['seconds']:,.1f} s"


def _takes_all(selection: Selection) -> bool:
    counts = selection.record["counts"]
    return counts["chosen"] == counts["candidates"] - counts["dropped_by_filter"] - counts["dropped_without_score"]


def _same(a: Selection, b: Selection) -> bool:
    return np.array_equal(a.row, b.row) and np.allclose(a.weight, b.weight)


def describe_recipe(data: TrajectoryDataModule, steps: int, precision: str) -> str:
    recipe, selection = data.recipe, data.selections["selector"]
    tokens = selection.record["tokens"] / len(selection.row)
    return (
        f"recipe      {steps} optimizer steps x {recipe.batch_size} trajectories "
        f"(about {recipe.batch_size * tokens:,.0f} trained tokens a step), "
        f"lr {recipe.lr:g}, {precision}, {'all parameters' if data.student.lora is None else 'LoRA'}, average over {recipe.average}; "
        f"sampled in {data.dtype.removeprefix('torch.')}"
    )


def quiet_libraries() -> None:
    """Library chatter would bury the dozen lines a run prints."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*num_workers.*")

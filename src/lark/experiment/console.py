"""Writes what a run shows on the console: one line a stage, warnings, and where things are. Details go to run.log."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from lark.common.log import announce, logger
from lark.selection.selection import Selection
from lark.tracking.logging_metrics import Tracker
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule
from lark.training.recipe import Recipe

LEFT_OUT = ("dropped_by_filter", "dropped_without_score", "problems_without_choice", "short_of_selector")
_TEACHERS_SHOWN = 3
_BUSY = 1.5  # load a core
_CONCENTRATED = 0.5  # of the weight on one teacher of several
_FOLLOWS = 0.8  # a rank correlation within problems


def announce_header(config: DictConfig, folder: Path) -> None:
    """Announce which run this is and where it is kept."""
    announce("LARK", f"{config.task.name} · {config.model.name} · seed {config.seed}    {_shorten(folder)}")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY * cores and "OMP_NUM_THREADS" not in os.environ:
        logger.warning(f"the machine is busy (load {load:.0f} on {cores} cores); OMP_NUM_THREADS=1 may be faster here")


def announce_scoring(data: TrajectoryDataModule) -> None:
    """Announce how many trajectories the student was asked about, and how long that took."""
    if not data.needs:
        announce("scoring", "no rule asks the student")
        return
    seconds = sum(data.costs[need]["seconds"] for need in data.needs if not data.is_cached[need])
    how = "found in the cache" if all(data.is_cached.values()) else f"in {seconds:,.0f} s (cached for next time)"
    passes = f", {len(data.needs)} passes" if len(data.needs) > 1 else ""
    announce("scoring", f"{len(data.scored):,} trajectories{passes} {how}")


def announce_selections(data: TrajectoryDataModule) -> None:
    """Announce what the rules chose, and warn where there is nothing to compare."""
    shown = []
    for name, selection in data.selections.items():
        shown.append(describe_choice(data.rules[name].name, selection))
        logger.info("%s: %s", name, _describe_selection(name, selection, data))
    selector = data.selections["selector"]
    if left_out := selector.record["counts"]["dropped_by_filter"]:
        shown.append(f"{left_out:,} left out beforehand (filter={selector.record['filter']})")
    announce("selected", " · ".join(shown))
    if repeated := selector.record.get("repeated"):
        announce(
            "repeated",
            f"{repeated['lines']:,} lines stand for the weights in selection-repeated.jsonl: {repeated['error']:.1%} "
            f"of the weight is on other rows, {repeated['weight_left_out']:.1%} on rows that are left out",
        )
    _warn_of_confounds(data.rules["selector"].name, selector.record)
    if (budget := data.rules["selector"].policy.budget) is not None and _takes_all(selector):
        several = budget > 1 and data.candidates.groups.size.max() > 1
        remedy = "lower it" if several else "a choice needs problems with several candidates"
        logger.warning(f"budget={budget} takes every candidate of every problem: nothing is chosen; {remedy}")
    if "baseline" in data.selections and _is_same(selector, data.selections["baseline"]):
        logger.warning(
            "selector and baseline chose the same rows with the same weights: no difference is possible; set another "
            "baseline= or budget="
        )


def announce_weights(selection: Selection) -> None:
    """Announce who reads the weights of selection.jsonl, where they are not all equal."""
    if not np.allclose(selection.weight, 1):
        repeated = "selection-repeated.jsonl" if selection.record.get("repeated") else "repeat=2 (rows as often)"
        announce("weights", f"they act in lark.trl.WeightedSFTTrainer; for trainers that read none: {repeated}")


def describe_choice(rule: str, selection: Selection) -> str:
    """Describe a selection in one line: how many trajectories, what they count for, and whose they are."""
    record, size = selection.record, selection.record["effective_sample_size"]
    effective = "" if np.isclose(size, len(selection.row)) else f" (effective {size:,.0f})"
    wrong, shown = record["known_wrong"], ""
    if wrong and wrong["weight"]:
        shown = f", {wrong['weight']:.0%} known wrong ({wrong['candidates']:.0%} of the pool)"
    return f"{rule} {len(selection.row):,} trajectories{effective}: {_describe_teachers(record)}{shown}"


def _warn_of_confounds(rule: str, record: Mapping) -> None:
    """Warn where the score is all but the loss or the length, or one teacher has most of the weight."""
    names = {"loss": "the loss", "num_tokens": "the length"}
    found = {names[column]: value for column, value in record["within_problem_spearman"].items() if column in names}
    follows = [
        f"its score follows {name} ({value:+.2f})" for name, value in found.items() if value and abs(value) > _FOLLOWS
    ]
    (teacher, share), *others = record["teacher_share"].items()
    if others and share > _CONCENTRATED:
        follows.insert(0, f"{share:.0%} of its weight is one teacher's ({teacher})")
    if follows and rule not in ("likelihood", "perplexity_high", "longest", "shortest", "teacher"):
        remedy = "compare with baseline=teacher_matched_random, shortest and likelihood before believing the result"
        logger.warning(f"{rule}: {' and '.join(follows)}; {remedy}")


def _describe_teachers(record: Mapping) -> str:
    shares = record["teacher_share"]
    if len(shares) == 1:
        return "one teacher"
    if len(shares) > 2 and max(shares.values()) < 1.5 / len(shares):
        return f"even over {len(shares)} teachers"
    return ", ".join(f"{teacher} {share:.0%}" for teacher, share in list(shares.items())[:_TEACHERS_SHOWN])


def _describe_selection(name: str, selection: Selection, data: TrajectoryDataModule) -> str:
    """Describe a selection for the log: counts, what its score goes along with, decisions, cost."""
    record, counts, policy = selection.record, selection.record["counts"], selection.record["policy"]
    parts = [
        f"{counts['chosen']:,} of {counts['candidates']:,} trajectories",
        f"{record['tokens']:,} tokens",
        *(f"{counts[key]:,} {key.replace('_', ' ')}" for key in LEFT_OUT if counts.get(key)),
    ]
    spearman = {column: value for column, value in record["within_problem_spearman"].items() if value is not None}
    if spearman:
        shown = ", ".join(f"{column} {value:+.2f}" for column, value in spearman.items())
        parts.append(f"score within problems against {shown}")
    parts += [f"{decided} {', '.join(map(str, value))}" for decided, value in record["decisions"].items()]
    if zero := policy.get("zero_weight_in_top_b", 0):
        parts.append(f"{zero:,} of weight 0 left out")
    if against := policy.get("tokens_minus_selector", 0):
        parts.append(f"{against:+,} tokens against the selector")
    if data.rules[name].needs:
        cost = data.cost_of(data.rules[name])
        parts.append(
            f"choosing cost {cost['forward_tokens']:,.0f} tokens forward, {cost['backward_tokens']:,.0f} backward, "
            f"{cost['seconds']:,.1f} s"
        )
    return "; ".join(parts)


def _takes_all(selection: Selection) -> bool:
    counts = selection.record["counts"]
    return counts["chosen"] == counts["candidates"] - counts["dropped_by_filter"] - counts["dropped_without_score"]


def _is_same(a: Selection, b: Selection) -> bool:
    return np.array_equal(a.row, b.row) and np.allclose(a.weight, b.weight)


def announce_training(
    data: TrajectoryDataModule, arms: Mapping[str, Arm], actions: Mapping[str, str], tracker: Tracker
) -> None:
    """Announce which arms are trained for how many optimizer steps, and where their curves go."""
    shown = [
        f"{name} {arm.steps:,} steps" + ("" if actions[name] == "train" else " (trained before)")
        for name, arm in arms.items()
    ]
    announce("training", " · ".join([*shown, tracker.describe()]))
    for name, arm in arms.items():
        _describe_visits(name, data.recipe, len(data.selections[name].row), arm.steps)
    recipe, selection = data.recipe, data.selections["selector"]
    tokens = recipe.batch_size * selection.record["tokens"] / len(selection.row)
    logger.info(
        f"recipe: {recipe.batch_size} trajectories (about {tokens:,.0f} trained tokens) a step, lr {recipe.lr:g}, "
        f"{data.precision}, {'all parameters' if data.student.lora is None else 'LoRA'}, average over "
        f"{recipe.average}; sampled in {data.dtype.removeprefix('torch.')}"
    )


def _describe_visits(name: str, recipe: Recipe, trajectories: int, steps: int) -> None:
    """Say how often training visits a trajectory, and warn where one step visits it more than once."""
    least, most = recipe.count_visits(trajectories, steps)
    logger.info("%s: every trajectory is visited %s times", name, least if least == most else f"{least} to {most}")
    if trajectories < recipe.batch_size:
        logger.warning(
            f"sft.batch_size={recipe.batch_size} is more than the {trajectories:,} trajectories of {name}: a step "
            f"visits each up to {recipe.count_visits(trajectories, 1)[1]} times; lower sft.batch_size"
        )


def announce_paths(folder: Path) -> None:
    """Announce where the report, the selection and the log are."""
    report, selection, log = (
        _shorten(folder / name) for name in ("report.html", "selector/selection.jsonl", "run.log")
    )
    announce("report", f"{report}    selection  {selection}    log  {log}")


def _shorten(path: Path) -> Path:
    """Return the path relative to the working folder, if it lies in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def quiet_libraries() -> None:
    """Silence library chatter, which would bury the dozen lines a run prints."""
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
    warnings.filterwarnings("ignore", category=FutureWarning)

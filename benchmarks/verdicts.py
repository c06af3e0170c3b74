"""How far a checker agrees with the verdicts a pool brings along: counts, and every row they disagree on.

    python benchmarks/verdicts.py pool.jsonl --checker number
    python benchmarks/verdicts.py pool.jsonl --checker reasoning_gym --dataset-column task --show 20

Prints how many trajectories the checker and the pool's `correct` column judge alike, and the disagreements by direction
and by what the text states: the gold answer, another answer, or none. `--output` writes the disagreements as JSONL.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lark.answers.checker import KINDS, Answer, Checker, Verdict
from lark.pool.files import find_files, read_rows

BATCH = 2_000  # rows checked at a time


def labelled_rows(pool: str) -> Iterator[dict[str, Any]]:
    """Rows of a pool that have a gold answer and a verdict."""
    for file in find_files(pool, setting="pool").values():
        for _, row in read_rows(file):
            if isinstance(row, dict) and row.get("answer") is not None and isinstance(row.get("correct"), bool):
                yield row


def to_answer(row: dict[str, Any], dataset_column: str) -> Answer:
    return Answer(
        text=row["messages"][-1]["content"],
        gold=str(row["answer"]),
        source_dataset=row.get(dataset_column),
        metadata=row.get("metadata") or lost_metadata(row, row.get(dataset_column)),
    )


CALENDAR = {  # words of the question -> what it asks for
    "leap year": "is_leap_year",
    "business days": "count_business_days",
    "Count the occurrences|how many times|How many": "count_days",
    "on which day of the month|what is the date|day of the month": "recurring_event_day",
    "In a year where|Given that January 1|first day of the year": "weekday_of_date_from_first_date",
    "ago|Count|Starting from|will it be in": "weekday_offset",
}


def lost_metadata(row: dict[str, Any], dataset: str | None) -> dict[str, Any] | None:
    """What reasoning_gym's verifiers want to know of a problem, told by the question, for pools that lost it."""
    question, gold = row["messages"][0]["content"], str(row["answer"])
    if dataset == "time_intervals":
        return {"task_type": "date" if re.fullmatch(r"\d+ days?", gold) else "datetime" if "days" in gold else "time"}
    if dataset == "calendar_arithmetic":
        kinds = (kind for words, kind in CALENDAR.items() if re.search(words, question))
        return {"task": next(kinds, "weekday_of_date")}
    if dataset == "advanced_geometry":
        kind = "orthocenter" if "," in gold else "angle_measure" if gold.endswith("°") else "incircle_radius"
        return {"task_type": kind, "ortho": gold.strip("()").split(", "), "incircle_radius_exact": gold}
    return None


def describe(row: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    text = row["messages"][-1]["content"]
    return {
        "problem_id": row["problem_id"],
        "candidate_id": row["candidate_id"],
        "pool": row["correct"],
        "checker": verdict.correct,
        "stated": verdict.answer,
        "gold": row["answer"],
        "timed_out": verdict.timed_out,
        "oversized": verdict.oversized,
        "end": text[-200:],
    } | {name: row[name] for name in ("pred", "score", "task") if name in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", help="JSONL, JSON or Parquet file, or a folder of them")
    parser.add_argument("--checker", choices=KINDS, default="math")
    parser.add_argument("--pattern", help="regular expression whose first group is the answer, where nothing is boxed")
    parser.add_argument("--dataset-column", default="source_dataset", help="column with the reasoning_gym data set")
    parser.add_argument("--show", type=int, default=10, help="disagreements to print of each kind")
    parser.add_argument("--output", type=Path, help="JSONL file for all disagreements")
    arguments = parser.parse_args()
    rows = list(labelled_rows(arguments.pool))
    if not rows:
        parser.error(f"{arguments.pool} has no row with an answer and a correct column")
    started = time.perf_counter()
    verdicts: list[Verdict] = []
    with Checker(arguments.checker, pattern=arguments.pattern) as checker:
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            verdicts += checker.check([to_answer(row, arguments.dataset_column) for row in batch])
    seconds = time.perf_counter() - started
    table = Counter((row["correct"], verdict.correct) for row, verdict in zip(rows, verdicts, strict=True))
    pairs = zip(rows, verdicts, strict=True)
    apart = [describe(row, verdict) for row, verdict in pairs if row["correct"] != verdict.correct]
    agreed = len(rows) - len(apart)
    print(f"{len(rows):,} trajectories in {seconds:.1f} s; {agreed:,} judged alike ({agreed / len(rows):.2%})")
    print(f"both correct {table[True, True]:,}, both wrong {table[False, False]:,}")
    print(f"no answer found {sum(v.answer is None for v in verdicts):,}", end=", ")
    print(f"timed out {sum(v.timed_out for v in verdicts)}, too long {sum(v.oversized for v in verdicts)}")
    for pool, ours in ((True, False), (False, True)):
        these = [one for one in apart if one["pool"] is pool]
        print(f"\npool {'correct' if pool else 'wrong'}, checker {'correct' if ours else 'wrong'}: {len(these):,}")
        for one in these[: arguments.show]:
            print("  " + json.dumps(one, ensure_ascii=False))
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(one) + "\n" for one in apart), encoding="utf-8")


if __name__ == "__main__":
    main()

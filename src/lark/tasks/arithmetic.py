"""Embedded task `arithmetic`: sums and differences of a few small numbers, solved by programmatic teachers.

Problems and the answer checker are those of reasoning-gym's `chain_sum`. `generate` writes a pool in which every
teacher of `lark.tasks.arithmetic_teachers` has one candidate a problem, an evaluation set of the same kind, and a shifted
evaluation set with longer operands, more terms and a wording that neither the pool nor the students' pre-training
contains.
"""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lark.common.errors import LarkError
from lark.tasks.arithmetic_teachers import TEACHERS, Terms

SOURCE_DATASET = "chain_sum"
PROMPT = "Compute {}."
SHIFTED_PROMPT = "Please work out the value of {} for me."
SEED_STRIDE = 10_000_000
"""reasoning-gym draws problem i of a data set from seed + i; seeds a stride apart therefore share no problem stream."""


def terms_of(text: str) -> Terms:
    """Reads a chain such as `47 + 38 - 12` back into signed terms `(47, 38, -12)`."""
    first, *rest = text.split()
    return (int(first), *(int(sign + number) for sign, number in zip(rest[::2], rest[1::2], strict=True)))


def is_correct(answer: str, gold: str) -> bool:
    """Whether reasoning-gym's verifier of `chain_sum` gives `answer` full marks against `gold`."""
    import reasoning_gym  # takes a second to import, and only writing the task needs it

    score: Callable[..., float] = reasoning_gym.get_score_answer_fn(SOURCE_DATASET)
    return score(answer, {"answer": gold, "metadata": {"source_dataset": SOURCE_DATASET}}) == 1.0


def generate(
    folder: Path,
    *,
    seed: int = 0,
    problems: int = 340,
    eval_problems: int = 200,
    shifted_problems: int = 100,
    terms: tuple[int, int] = (3, 4),
    digits: tuple[int, int] = (2, 2),
    shifted_terms: tuple[int, int] = (4, 5),
    shifted_digits: tuple[int, int] = (2, 3),
) -> None:
    """Writes pool.jsonl, eval.jsonl and shifted.jsonl into `folder`, byte-identical for equal arguments.

    `terms` and `digits` are the least and greatest number of terms of a problem and of digits of its operands. No
    expression occurs twice, within a set or across sets. Files appear by rename: a reader never sees half of one.

    Raises LarkError when a count is not positive or a range cannot yield that many distinct problems.
    """
    counts = {"problems": problems, "eval_problems": eval_problems, "shifted_problems": shifted_problems}
    for name, count in counts.items():
        if count < 1:
            raise LarkError(f"task.settings.{name}={count}: at least 1 problem is needed; set it to 1 or more.")
    for name, (least, most) in {
        "terms": terms,
        "digits": digits,
        "shifted_terms": shifted_terms,
        "shifted_digits": shifted_digits,
    }.items():
        floor = 2 if name.endswith("terms") else 1
        ceiling = 3 if name.endswith("digits") else most
        if not floor <= least <= most <= ceiling:
            allowed = f"{floor} to 3" if name.endswith("digits") else f"{floor} or more"
            raise LarkError(
                f"task.settings.{name}={[least, most]}: set a least and a greatest value, in order, {allowed}."
            )

    seen: set[str] = set()
    # The evaluation sets come first, so that a larger pool leaves them as they are.
    evaluation = list(_draw(eval_problems, seed * SEED_STRIDE + 1_000_000, terms, digits, seen))
    shifted = list(_draw(shifted_problems, seed * SEED_STRIDE + 2_000_000, shifted_terms, shifted_digits, seen))
    training = list(_draw(problems, seed * SEED_STRIDE + 3_000_000, terms, digits, seen))

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "pool.jsonl", _pool_rows(training, seed))
    _write(folder / "eval.jsonl", _eval_rows(evaluation, PROMPT))
    _write(folder / "shifted.jsonl", _eval_rows(shifted, SHIFTED_PROMPT))


def _draw(
    count: int, seed: int, terms: tuple[int, int], digits: tuple[int, int], seen: set[str]
) -> Iterator[tuple[str, str]]:
    """Yields `count` (expression, gold answer) pairs of reasoning-gym that are not in `seen`, and adds them to it."""
    import reasoning_gym  # see is_correct

    size = 20 * count  # room for repeated problems, which are skipped
    dataset = reasoning_gym.create_dataset(
        SOURCE_DATASET,
        min_terms=terms[0],
        max_terms=terms[1],
        min_digits=digits[0],
        max_digits=digits[1],
        size=size,
        seed=seed,
    )
    found = 0
    for index in range(size):
        item = dataset[index]
        text = item["metadata"]["expression"]
        if text not in seen:
            seen.add(text)
            yield text, item["answer"]
            found += 1
            if found == count:
                return
    raise LarkError(
        f"{list(terms)} terms of {list(digits)} digits yield only {found} of {count} distinct problems: "
        "ask for fewer problems or for more terms or digits."
    )


def _pool_rows(training: list[tuple[str, str]], seed: int) -> Iterator[dict]:
    for number, (text, gold) in enumerate(training):
        for candidate, (name, teacher) in enumerate(TEACHERS.items()):
            # A generator of its own for each row: a new teacher or problem changes no other row. Seeding by a string is
            # stable over processes and machines.
            solution = teacher(terms_of(text), random.Random(f"{seed}/{text}/{name}"))
            boxed = solution.rpartition("\\boxed{")[2].partition("}")[0]
            yield {
                "problem_id": str(number),
                "candidate_id": str(candidate),
                "teacher": name,
                "messages": [
                    {"role": "user", "content": PROMPT.format(text)},
                    {"role": "assistant", "content": solution},
                ],
                "answer": gold,
                "correct": is_correct(boxed, gold),
            }


def _eval_rows(problems: list[tuple[str, str]], prompt: str) -> Iterator[dict]:
    for number, (text, gold) in enumerate(problems):
        yield {
            "problem_id": str(number),
            "problem": prompt.format(text),
            "answer": gold,
            "source_dataset": SOURCE_DATASET,
            "num_terms": len(terms_of(text)),
        }


def _write(path: Path, rows: Iterable[dict]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Embedded tasks `arithmetic` and `notations`: sums and differences of a few numbers, solved by programmatic teachers.

Problems and the answer checker are those of reasoning-gym's `chain_sum`. `generate` writes a pool in which each teacher
of one of the sets in `arithmetic_teachers` has one candidate a problem, an evaluation set of the same kind, and a
shifted evaluation set with longer operands, more terms and a wording that neither the pool nor the students'
pre-training contains.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from lark.common.errors import LarkError
from lark.pool.files import write_rows
from lark.tasks.arithmetic_teachers import MISCONCEPTIONS, NOTATIONS, Teacher, Terms, compute_totals, has_carry
from lark.tasks.reasoning_gym import OFFSETS, SEED_STRIDE, draw_items

SOURCE_DATASET = "chain_sum"
PROMPT = "Compute {}."
SHIFTED_PROMPT = "Please work out the value of {} for me."
TeacherSet = Literal["misconceptions", "notations"]
TEACHERS: dict[TeacherSet, dict[str, Teacher]] = {"misconceptions": MISCONCEPTIONS, "notations": NOTATIONS}


def parse_terms(text: str) -> Terms:
    """Read a chain such as `47 + 38 - 12` back into signed terms `(47, 38, -12)`."""
    first, *rest = text.split()
    return (int(first), *(int(sign + number) for sign, number in zip(rest[::2], rest[1::2], strict=True)))


def has_carries(expression: str) -> bool:
    """Tell whether some step carries or borrows and no total is negative: what the misconceptions are about."""
    terms = parse_terms(expression)
    totals = compute_totals(terms)
    return min(totals) >= 0 and any(map(has_carry, totals, terms[1:]))


def is_correct(answer: str, gold: str) -> bool:
    """Tell whether reasoning-gym's verifier of `chain_sum` gives `answer` full marks against `gold`."""
    import reasoning_gym  # takes a second to import, and only writing the task needs it

    score: Callable[..., float] = reasoning_gym.get_score_answer_fn(SOURCE_DATASET)
    return score(answer, {"answer": gold, "metadata": {"source_dataset": SOURCE_DATASET}}) == 1.0


def generate(
    folder: Path,
    *,
    teachers: TeacherSet = "misconceptions",
    seed: int = 0,
    problems: int = 340,
    eval_problems: int = 200,
    shifted_problems: int = 100,
    terms: tuple[int, int] = (3, 4),
    digits: tuple[int, int] = (2, 2),
    shifted_terms: tuple[int, int] = (4, 5),
    shifted_digits: tuple[int, int] = (2, 3),
) -> None:
    """Write pool.jsonl, eval.jsonl and shifted.jsonl into `folder`, byte-identical for equal arguments.

    `teachers` names the set of teachers; with `misconceptions` every problem has carries. `terms` and `digits` are the
    least and greatest number of terms of a problem and of digits of its operands. No expression occurs twice, within a
    set or across sets. Files appear by rename: a reader never sees half of one.

    Raises LarkError when a count is not positive or a range cannot yield that many distinct problems.
    """
    counts = {"problems": problems, "eval_problems": eval_problems, "shifted_problems": shifted_problems}
    for name, count in counts.items():
        if count < 1:
            raise LarkError(f"task.settings.{name}={count}: at least 1 problem is needed; set it to 1 or more")
    _check_range("terms", terms, at_least=2)
    _check_range("digits", digits, at_most=3)
    _check_range("shifted_terms", shifted_terms, at_least=2)
    _check_range("shifted_digits", shifted_digits, at_most=3)

    draw = partial(_draw, seen=set(), accept=has_carries if teachers == "misconceptions" else lambda expression: True)
    # The evaluation sets come first, so that a larger pool leaves them as they are.
    evaluation = draw(eval_problems, seed * SEED_STRIDE + OFFSETS["eval"], terms, digits)
    shifted = draw(shifted_problems, seed * SEED_STRIDE + OFFSETS["harder"], shifted_terms, shifted_digits)
    training = draw(problems, seed * SEED_STRIDE + OFFSETS["pool"], terms, digits)
    write_rows(folder / "pool.jsonl", _make_pool_rows(training, TEACHERS[teachers], seed))
    write_rows(folder / "eval.jsonl", _make_eval_rows(evaluation, PROMPT))
    write_rows(folder / "shifted.jsonl", _make_eval_rows(shifted, SHIFTED_PROMPT))


def _check_range(name: str, limits: tuple[int, int], *, at_least: int = 1, at_most: int | None = None) -> None:
    least, most = limits
    if not at_least <= least <= most <= (at_most or most):
        allowed = f"{at_least} to {at_most}" if at_most else f"{at_least} or more"
        raise LarkError(f"task.settings.{name}={[least, most]}; set a least and a greatest value, in order, {allowed}")


def _draw(
    count: int,
    seed: int,
    terms: tuple[int, int],
    digits: tuple[int, int],
    *,
    seen: set[str],
    accept: Callable[[str], bool],
) -> list[tuple[str, str]]:
    """Draw `count` (expression, gold answer) pairs with accepted expressions that are not in `seen`; add them to it."""
    config = {"min_terms": terms[0], "max_terms": terms[1], "min_digits": digits[0], "max_digits": digits[1]}
    setting = f"task.settings: terms={list(terms)} of digits={list(digits)}"
    items = draw_items(
        SOURCE_DATASET,
        config,
        count,
        seed,
        seen,
        setting=setting,
        accept=lambda item: accept(item["metadata"]["expression"]),
    )
    return [(item["metadata"]["expression"], item["answer"]) for item in items]


def _make_pool_rows(training: list[tuple[str, str]], teachers: dict[str, Teacher], seed: int) -> Iterator[dict]:
    for number, (text, gold) in enumerate(training):
        for candidate, (name, teacher) in enumerate(teachers.items()):
            # A generator of its own for each row: a new teacher or problem changes no other row. Seeding by a string is
            # stable over processes and machines.
            solution = teacher(parse_terms(text), random.Random(f"{seed}/{text}/{name}"))
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


def _make_eval_rows(problems: list[tuple[str, str]], prompt: str) -> Iterator[dict]:
    for number, (text, gold) in enumerate(problems):
        yield {
            "problem_id": str(number),
            "problem": prompt.format(text),
            "answer": gold,
            "source_dataset": SOURCE_DATASET,
            "num_terms": len(parse_terms(text)),
        }

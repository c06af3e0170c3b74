"""A small pool in the layout of the RSR paper's, with every fault that such a pool was seen to have."""

import json
from pathlib import Path
from typing import Any

SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
SHARED = "On a farm there are 4 pens and in each pen live 3 sheep and 2 goats; how many animals live there"
TEACHERS = ("alpha", "beta", "gamma")
PROBLEMS = 14
TWICE = (3, 9)  # rows that ask the same question
EMPTY, LONG = 4, 5  # rows of alpha's gen2
SWAPPED = (6, 7)  # rows of beta's gen2
SHORT = 12  # rows of gamma's gen2; it has no gen3
UNKNOWN, UNBOXED, CONTRADICTED = 10, 11, 12  # problems in the file of answers


def question(number: int) -> str:
    if number == 0:
        return SHARED + "?"
    return f"What is {20 + (3 if number in TWICE else number)} + 7?"


def gold(number: int) -> str:
    return "20" if number == 0 else str(27 + (3 if number in TWICE else number))


def trajectory(number: int, teacher: str, sample: int) -> str:
    steps = f"I am {teacher}, try {sample}. " + "Adding. " * (sample + TEACHERS.index(teacher))
    return f"<think>\n{steps}\n</think>\n\nSo \\boxed{{{gold(number) if sample < 3 else 1}}}"


def turns(number: int, teacher: str, sample: int) -> list[dict[str, str]]:
    text = question(number)
    return [
        {"role": "system", "content": SYSTEM if teacher != "gamma" else "Answer in a box."},
        {"role": "user", "content": f" {text.upper()}" if (number, teacher) == (TWICE[1], "beta") else text},
        {"role": "assistant", "content": trajectory(number, teacher, sample)},
    ]


def write_teacher_folder(folder: Path) -> Path:
    """`<teacher>/short-sys_5k_gen{1,2,3}.json`, and a file that is none of a teacher's."""
    for teacher in TEACHERS:
        (folder / teacher).mkdir(parents=True)
        for sample in (1, 2, 3):
            if (teacher, sample) == ("gamma", 3):
                continue
            rows: list[list[dict[str, str]]] = [turns(number, teacher, sample) for number in range(PROBLEMS)]
            if (teacher, sample) == ("alpha", 2):
                rows[EMPTY][-1]["content"] = " "
                rows[LONG][-1]["content"] = "Well. " * 200
            if (teacher, sample) == ("beta", 2):
                first, second = SWAPPED
                rows[first], rows[second] = rows[second], rows[first]
            if (teacher, sample) == ("gamma", 2):
                rows = rows[:SHORT]
            write = {"alpha": lambda value: value, "beta": json.dumps, "gamma": str}[teacher]
            (folder / teacher / f"short-sys_5k_gen{sample}.json").write_text(
                json.dumps([{"messages": write(row)} for row in rows])
            )
    (folder / "rsr-min_for_student.json").write_text(json.dumps([{"messages": turns(0, "alpha", 1)}]))
    return folder


def write_answers(path: Path) -> Path:
    """Problems with solutions in the columns of NuminaMath."""
    rows: list[dict[str, Any]] = []
    for number in range(PROBLEMS):
        solution = f"We add, \\boxed{{{gold(number)}}}." if number != UNBOXED else "It is plain to see."
        if number != UNKNOWN:
            rows.append({"source": "x", "problem": f" {question(number)}\n", "solution": solution})
    rows.append({"source": "y", "problem": question(CONTRADICTED), "solution": "No: \\boxed{-1}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_evaluation(path: Path) -> Path:
    """Four problems of one's own, one of which shares its words with a problem of the pool."""
    rows = [{"problem_id": i, "problem": f"What is {i} + {i}?", "answer": 2 * i} for i in range(1, 4)]
    rows.append({"problem_id": 4, "problem": f"A riddle. {SHARED}, do you think?", "answer": 20})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

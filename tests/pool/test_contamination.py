"""Problems found in two places, against comparison of every pair."""

import json
import random

import numpy as np
import pytest
from conftest import rows_of_a_pool, write_pool
from hypothesis import given, settings
from hypothesis import strategies as st

from lark.pool.contamination import COMMON, WORDS, find_overlap, find_repeated_problems

LONG = "A farmer sells 12 boxes of pears and 7 boxes of plums each day for a whole week without a pause"


def phrases(text: str) -> set[tuple[str, ...]]:
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def share(a: str, b: str) -> bool:
    return bool(phrases(a) & phrases(b)) or a.lower().split() == b.lower().split()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_as_by_comparing_every_pair(seed: int) -> None:
    """Texts of few words, so that phrases are shared by chance; fewer problems than make a form of words."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(["one", "Two", "3,"], k=rng.randrange(1, 26))) for _ in range(9)]
    texts += [text.upper() for text in texts[:1]]
    asked, pool = [(f"e{i}", t) for i, t in enumerate(texts[:5])], [(f"p{i}", t) for i, t in enumerate(texts[5:])]
    found = find_overlap({"set": asked}, pool)
    assert found.evaluation["set"] == [i for i, t in asked if any(share(t, other) for _, other in pool)]
    assert list(found.pool) == [i for i, t in pool if any(share(t, other) for _, other in asked)]
    text_of = dict(asked) | dict(pool)
    for problem, place in found.pool.items():
        assert share(text_of[problem], text_of[place.removeprefix("set/")])


@pytest.mark.parametrize(
    ("asked", "in_pool"),
    [
        (f"Note: {LONG.lower()}. How many?", True),  # among other words
        (LONG.replace(" ", ",\n "), True),  # other signs and spaces between the words
        (" ".join(LONG.split()[: WORDS - 1]), False),  # a word short of a phrase
        (" ".join(LONG.split()[2 : 2 + WORDS]), True),
        ("What is  2 + 3?", True),
        ("what is 2 - 3?", False),  # short problems differ in a sign
    ],
)
def test_what_counts_as_the_same(asked: str, in_pool: bool) -> None:
    found = find_overlap({"set": [("7", asked)]}, [("a", LONG), ("b", "What is 2 + 3?")])
    assert (found.evaluation["set"] == ["7"]) is bool(found.pool) is in_pool


CHINESE = "一个农民每天卖出十二箱梨和七箱李子,一周不休息"
THAI = "ชาวนาขายลูกแพร์สิบสองกล่องทุกวันเป็นเวลาหนึ่งสัปดาห์"


@pytest.mark.parametrize("text", [CHINESE, THAI, "农民x有3箱梨每箱12个共多少个梨请计算"])
def test_scripts_without_spaces_are_compared_by_characters(text: str) -> None:
    found = find_overlap({"set": [("7", f"问题:{text}。多少?")]}, [("a", f"{text}!另一个问题")])
    assert found.pool == {"a": "set/7"}
    assert not find_overlap({"set": [("7", f"{text[:8]} 五六")]}, [("a", text)]).pool, "too short to be the same"


def test_a_form_of_words_says_nothing() -> None:
    """Neither one that the evaluation set repeats nor one that only the pool does; equal problems are found still."""
    form = "Work out the value of the following expression and give it as a whole number please: "
    many = [(str(i), f"{form}{i}") for i in range(COMMON + 1)]
    assert find_overlap({"set": many}, [("x", f"{form}99")]).pool == {}
    assert find_overlap({"set": [("0", f"{form}99")]}, many).pool == {}
    assert find_overlap({"set": many[:COMMON]}, [("x", f"{form}99")]).pool == {"x": "set/0"}
    found = find_overlap({"set": many}, [("x", f"{form}5"), ("y", f"{form}99")])
    assert found.pool == {"x": "set/5"} and found.evaluation == {"set": ["5"]}


def test_sets_are_told_apart_and_keep_their_order() -> None:
    sets = {"a": [("2", LONG), ("1", "Why?")], "b": [("1", LONG), ("9", "How?")]}
    found = find_overlap(sets, [("q", "why?"), ("p", LONG)])
    assert found.evaluation == {"a": ["2", "1"], "b": ["1"]}
    assert found.pool == {"q": "a/1", "p": "a/2"}


def test_problems_asked_twice() -> None:
    pool = [("1", "What is x?"), ("2", "what  is X?"), ("3", "What is y?"), ("4", " What is x?")]
    assert find_repeated_problems(pool) == [["1", "2", "4"]]
    assert find_repeated_problems([]) == []


def test_broken_text_is_compared_too() -> None:
    half, same = "half a pair \ud800", [("1", "half a pair \ud800")]
    assert find_overlap({"s": [("0", half)]}, same).pool == {"1": "s/0"}


def test_memory_is_that_of_the_evaluation_sets() -> None:
    """What a pool of forms of words leaves behind is bounded, however long it is."""
    import tracemalloc

    form = " ".join(f"word{i}" for i in range(40))
    peaks = []
    for size in (200, 2000):
        tracemalloc.start()
        find_overlap({"s": [("0", form)]}, ((str(i), f"{form} {i}") for i in range(size)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


# A pool and the task's evaluation sets


@pytest.fixture
def open_pool(tmp_path, make_student):
    """The pool of conftest as the small student sees it, beside two evaluation sets that share problems with it."""
    from lark.student.tokenized_pool import TokenizedPool
    from lark.tasks.task import Task

    rows = rows_of_a_pool()
    asked = [rows[i]["messages"][0]["content"] for i in (4, 8)]
    write_pool(
        tmp_path / "a.jsonl",
        [{"id": 0, "problem": asked[0].upper(), "answer": 1}, {"id": 1, "problem": "?", "answer": 1}],
    )
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": asked[1]}]
    write_pool(
        tmp_path / "b.jsonl", [{"id": 7, "messages": chat, "answer": 1}, {"id": 8, "problem": asked[0], "answer": 1}]
    )

    def make(rows=rows, **settings):
        path = write_pool(tmp_path / "pool.jsonl", rows)
        sets = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
        fixed: dict = {"name": "sums", "pool": str(path), "eval": sets, "checker": "number", "max_length": 256}
        task = Task(**fixed | settings)
        return TokenizedPool(task, make_student().load_chat(), cache=tmp_path / "cache")

    return make


def test_a_pool_reports_what_evaluation_sets_ask_too(open_pool, caplog):
    pool = open_pool()
    pool.announce()
    assert {name: (found["in_pool"], found["problems"]) for name, found in pool.overlaps.items()} == {
        "a": (1, 2),
        "b": (2, 2),
    }
    assert pool.overlaps["a"]["share"] == 0.5 and pool.overlaps["b"]["examples"] == ["7", "8"]
    assert "1 (a/0), 2 (b/7); task.overlap=drop" in caplog.text
    assert len(pool.rows) == 32 and "in an evaluation set" not in pool.dropped
    assert open_pool(eval_limit=1).overlaps["b"]["in_pool"] == 1, "what is not evaluated does not count"


def test_problems_of_evaluation_sets_leave_the_pool(open_pool):
    whole, pool = open_pool(held_out=0.5), open_pool(held_out=0.5, overlap="drop")
    assert set(whole.problem_id[whole.fits]) - set(pool.problem_id[pool.fits]) == {"1", "2"}
    assert pool.dropped["in an evaluation set"] == 8
    np.testing.assert_array_equal(pool.is_held_out, whole.is_held_out)
    assert not {"1", "2"} & set(pool.problem_id[pool.scored])
    assert open_pool(overlap="drop", eval=None).identity == open_pool(eval=None).identity
    with pytest.raises(
        ValueError, match=r"task\.overlap=error: 2 problems of the pool are in evaluation sets: 1 \(a/0\)"
    ):
        open_pool(overlap="error")
    only = [row for row in rows_of_a_pool() if row["problem_id"] == "1"]
    with pytest.raises(ValueError, match=r"no candidate is left .*4 of evaluation problems"):
        open_pool(only, overlap="drop", held_out=0)


def test_one_question_under_two_ids_is_reported(open_pool, caplog):
    rows = rows_of_a_pool()
    for row in rows[:4]:
        row["messages"][0]["content"] = rows[12]["messages"][0]["content"].lower()
    pool = open_pool(rows)
    pool.announce()
    assert pool.repeated == [["0", "3"]] and "(first: 0, 3)" in caplog.text
    assert open_pool().repeated == []


def test_the_comparison_is_kept(open_pool, tmp_path, monkeypatch):
    first = open_pool()
    monkeypatch.setattr("lark.student.checked_pool.find_overlap", None)
    assert open_pool().overlaps == first.overlaps
    (path,) = tmp_path.glob("cache/overlap/*/manifest.json")
    assert json.loads(path.read_text())["in_sets"] == {"1": "a/0", "2": "b/7"}

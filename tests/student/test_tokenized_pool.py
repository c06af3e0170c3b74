"""The pool as the student sees it: tokens, verdicts and columns, computed part by part and found again."""

import json

import numpy as np
import pytest
from conftest import rows_of_a_pool, write_pool

import lark.common.table_cache
import lark.student.checked_pool
import lark.student.tokenized_pool
from lark.answers.checker import Checker
from lark.common.versions import FORMULAS
from lark.student.tokenized_pool import TokenizedPool
from lark.tasks.task import Task


@pytest.fixture
def open_pool(tmp_path, make_student):
    """Opens rows as the small student sees them; settings are the task's."""

    def make(rows=None, *, student=None, **settings):
        path = write_pool(tmp_path / "pool.jsonl", rows_of_a_pool() if rows is None else rows)
        fixed = {"name": "sums", "pool": str(path), "checker": "number", "held_out": 0.25, "max_length": 256}
        chat = (student or make_student()).load_chat()
        return TokenizedPool(Task(**fixed | settings), chat, cache=tmp_path / "cache")

    return make


@pytest.fixture
def small(monkeypatch):
    """Parts of seven rows, in batches of three or of 150 characters."""
    monkeypatch.setattr(lark.common.table_cache, "PART_ROWS", 7)
    for module in (lark.student.checked_pool, lark.student.tokenized_pool):
        monkeypatch.setattr(module, "BATCH_ROWS", 3)
    monkeypatch.setattr(lark.student.tokenized_pool, "BATCH_CHARACTERS", 150)


def test_tokens_are_those_of_each_row_by_itself(open_pool, small):
    pool, rows = open_pool(), rows_of_a_pool()
    expected = [pool.chat.encode([row["messages"]])[0] for row in rows]
    assert pool.read_tokens(np.arange(len(rows))) == expected
    assert pool.read_tokens(np.array([30, 2, 2])) == [expected[30], expected[2], expected[2]]
    np.testing.assert_array_equal(pool.length, [len(row.input_ids) for row in expected])
    np.testing.assert_array_equal(pool.span_tokens, [len(row.input_ids) - row.prompt_tokens for row in expected])
    assert len(pool.tokens.cache_files) == 5


def test_long_rows_are_tokenised_few_at_a_time(open_pool, monkeypatch):
    monkeypatch.setattr(lark.student.tokenized_pool, "BATCH_CHARACTERS", 150)
    sizes = []
    batch = lark.student.tokenized_pool._tokenise_batch
    monkeypatch.setattr(
        lark.student.tokenized_pool, "_tokenise_batch", lambda rows, *how: sizes.append(rows) or batch(rows, *how)
    )
    open_pool()
    texts = [[sum(len(m["content"]) for m in row) for row in rows] for rows in sizes]
    assert sum(map(len, texts)) == 32 and all(sum(lengths[:-1]) < 150 for lengths in texts)


class KillError(Exception):
    pass


def test_killed_while_tokenising_it_goes_on(open_pool, small, monkeypatch):
    tokenise, calls = lark.student.tokenized_pool.tokenise_rows, []

    def killed(*arguments):
        calls.append(arguments[3])
        if arguments[3] == 14:
            raise KillError
        return tokenise(*arguments)

    def patch(function):
        monkeypatch.setattr(lark.student.tokenized_pool, "tokenise_rows", function)

    patch(killed)
    with pytest.raises(KillError):
        open_pool()
    assert calls == [0, 7, 14]
    calls.clear()
    patch(lambda *arguments: calls.append(arguments[3]) or tokenise(*arguments))
    pool = open_pool()
    assert calls == [14, 21, 28]
    assert pool.read_tokens(np.arange(32)) == [pool.chat.encode([row["messages"]])[0] for row in rows_of_a_pool()]
    patch(lambda *_: pytest.fail("tokenised again"))
    np.testing.assert_array_equal(open_pool().length, pool.length)


@pytest.mark.slow
def test_on_every_core_the_tokens_are_the_same(open_pool, small, monkeypatch):
    alone = open_pool()
    monkeypatch.setattr(lark.student.tokenized_pool, "PARALLEL_ROWS", 1)
    monkeypatch.setattr(lark.student.tokenized_pool, "CHUNK_ROWS", 3)
    monkeypatch.setitem(FORMULAS, "tokens", 0)
    monkeypatch.setattr(lark.student.tokenized_pool, "count_cores", lambda: 2)
    together = open_pool()
    assert together.tokens.cache_files != alone.tokens.cache_files
    assert together.read_tokens(np.arange(32)) == alone.read_tokens(np.arange(32))


def test_killed_while_checking_it_goes_on(open_pool, small, monkeypatch):
    rows = [row | {"correct": None} for row in rows_of_a_pool()]
    rows[3]["correct"] = True  # whatever the checker would say
    truth = np.array([row["truth"] for row in rows], float)
    truth[3] = 1
    check, checked = Checker.check, []

    def killed(self, items):
        if len(checked) >= 17:
            raise KillError
        checked.extend(items)
        return check(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(Checker, "check", killed)
        with pytest.raises(KillError):
            open_pool(rows)
    before = len(checked)
    assert before == 17, "batches of 3, 3, 1, 3, 3, 1, 3"
    checked.clear()
    monkeypatch.setattr(Checker, "check", lambda self, items: checked.extend(items) or check(self, items))
    pool = open_pool(rows)
    assert len(checked) == 31 - 14, "two parts were whole"
    np.testing.assert_array_equal(pool.correct, truth)
    assert pool.verdicts == {"filled": 31, "timed_out": 0, "no_gold": 0}


def test_checks_that_time_out_are_counted_when_found_again_too(open_pool, monkeypatch):
    class Slow(Checker):
        def check(self, items):
            return [type(one)(correct=False, answer=None, timed_out=True) for one in super().check(items)]

    monkeypatch.setattr(lark.student.checked_pool, "Checker", Slow)
    rows = [row | {"correct": None} for row in rows_of_a_pool(problems=3)]
    assert open_pool(rows).verdicts == {"filled": 12, "timed_out": 12, "no_gold": 0}
    monkeypatch.setattr(lark.student.checked_pool, "Checker", lambda *_, **__: pytest.fail("checked again"))
    again = open_pool(rows)
    assert again.verdicts == {"filled": 12, "timed_out": 12, "no_gold": 0} and (again.correct == 0).all()


def test_answers_that_are_none_give_no_verdict_and_are_counted(open_pool):
    none = [
        {"answer": "proof"},
        {"answer": r"\text{Not found}", "checker": "math"},
        {"answer": "none", "checker": "exact"},
    ]
    rows = [row | {"correct": None} | none[i // 4] for i, row in enumerate(rows_of_a_pool(problems=3))]
    pool = open_pool(rows)
    assert pool.verdicts == {"filled": 4, "timed_out": 0, "no_gold": 8}
    assert np.isnan(pool.correct).tolist() == [True] * 8 + [False] * 4


def test_columns_with_gaps(open_pool):
    rows = rows_of_a_pool()
    for number, row in enumerate(rows):
        row |= {"teacher": None if number % 3 == 0 else row["teacher"], "level": number if number % 2 else None}
        if row["problem_id"] == "5":
            row |= {"answer": None}
    pool = open_pool(rows)
    some = np.array([31, 0, 7, 7, 22, 21])
    assert pool.column("teacher", some).tolist() == [rows[i]["teacher"] for i in some]
    assert pool.column("answer", some).tolist() == [rows[i]["answer"] for i in some]
    assert pool.column("text", some).tolist() == [rows[i]["messages"][-1]["content"] for i in some]
    np.testing.assert_array_equal(pool.column("level", some), [31, np.nan, 7, 7, np.nan, 21])
    assert pool.column("text", np.zeros(0, np.int64)).shape == (0,)


def test_what_a_row_takes_in_memory(open_pool):
    """50 bytes in arrays; an id is one object however many rows have it."""
    pool = open_pool()
    arrays = [value for value in vars(pool).values() if isinstance(value, np.ndarray)]
    per_row = {array.itemsize for array in arrays if array is not pool.scored}
    assert sum(array.itemsize for array in arrays) == 50 and per_row == {8, 1}
    assert len({id(name) for name in pool.problem_id}) == 8 and len({id(name) for name in pool.candidate_id}) == 4


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_folder_of_shards_is_the_pool_of_one_file(ending, open_pool, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of_a_pool()
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, (start, stop) in enumerate([(0, 3), (3, 18), (18, 32)]):  # problems go over the borders
        path = folder / f"pool-{number}.{ending}"
        if ending == "jsonl":
            write_pool(path, rows[start:stop])
        else:
            pq.write_table(pa.Table.from_pylist(rows[start:stop]), path, row_group_size=4)
    one, many = open_pool(rows), open_pool(rows, pool=str(folder))
    assert many.fingerprint == one.fingerprint and many.identity == one.identity
    assert [json.dumps(row | {"source": ""}) for row in many.read_rows(many.scored)] == [
        json.dumps(row | {"source": ""}) for row in one.read_rows(one.scored)
    ]
    assert many.read_tokens(np.arange(32)) == one.read_tokens(np.arange(32))
    assert len(list(tmp_path.glob("cache/tokens/*/manifest.json"))) == 1, "tokenised once"

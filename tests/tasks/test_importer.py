"""Pools in others' forms: what becomes of every row, against the rows themselves."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import teacher_folder as rsr
from teacher_folder import PROBLEMS, SYSTEM, TWICE, gold, question, trajectory, write_answers, write_teacher_folder

from lark.common.cache import read_json
from lark.pool.pool import PoolError, read_pool
from lark.tasks.conversations import Columns
from lark.tasks.hub import HubTask
from lark.tasks.teacher_files import TeacherFiles

FORM = "*/short-sys_5k_gen*.json"
MESSAGES = Columns(messages="messages")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_teacher_folder(tmp_path / "pool")


def math_task(folder: Path, **settings: Any) -> TeacherFiles:
    fixed = {"name": "math", "pool": str(folder), "files": FORM, "columns": MESSAGES, "system": SYSTEM}
    return TeacherFiles(**{**fixed, "on_error": "drop"} | settings)


def import_pool(task: Any, cache: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and manifest; the rows are a pool without faults."""
    path = task.prepare_pool(cache)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(read_pool(path, cache=cache).rows) == len(rows)
    return rows, read_json(path.with_name("manifest.json"))


def count_of(manifest: dict[str, Any], words: str) -> int:
    return sum(count for what, count in manifest["counts"].items() if words in what)


def test_the_papers_layout_with_all_its_faults(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lark")
    task = math_task(folder, answers=str(write_answers(tmp_path / "numina.jsonl")))
    rows, manifest = import_pool(task, tmp_path)

    written = {
        (rsr.question(n), teacher, f"gen{sample}"): trajectory(n, teacher, sample)
        for n in range(PROBLEMS)
        for teacher in rsr.TEACHERS
        for sample in (1, 2, 3)
        if (teacher, sample) != ("gamma", 3) and not (teacher == "gamma" and sample == 2 and n >= rsr.SHORT)
    }
    assert len(rows) == 3 * 3 * PROBLEMS - PROBLEMS - (PROBLEMS - rsr.SHORT) - 1
    for row in rows:
        system, user, assistant = row["messages"]
        sample = row["candidate_id"].split("-")[1]
        assert system["content"] == SYSTEM and row["candidate_id"].startswith(f"{row['teacher']}-gen")
        if assistant["content"].startswith("<think>"):
            assert written[user["content"], row["teacher"], sample] == assistant["content"]
        number = int(row["problem_id"])
        assert user["content"] == question(number), "a swapped row belongs to the problem it asks"
        known = number not in (rsr.UNKNOWN, rsr.UNBOXED)
        assert row["answer"] == (gold(number) if known else None)
    assert {row["problem_id"] for row in rows} == {str(n) for n in range(PROBLEMS) if n != TWICE[1]}
    assert Counter(row["problem_id"] for row in rows)[str(TWICE[0])] == 2 * 8
    assert len({(row["problem_id"], row["candidate_id"]) for row in rows}) == len(rows)

    assert manifest["dropped"] == {"empty trajectory": 1} == task.count_dropped(tmp_path)
    (fault,) = manifest["faults"]
    assert (fault["file"], fault["line"]) == ("alpha/gen2.json", rsr.EMPTY + 1)
    assert count_of(manifest, "questions repeated") == 1 and count_of(manifest, "another was before") == 0
    assert manifest["problems_with_answer"] == PROBLEMS - 1 - 2 and count_of(manifest, "task.answers has another") == 1
    assert (
        count_of(manifest, "prompts replaced") == Counter(r["teacher"] for r in rows)["gamma"] + 3
    )  # beta's upper case
    assert manifest["lists"]["gamma/gen2.json"] == rsr.SHORT and len(manifest["lists"]) == 8
    text = caplog.text
    for words in ("1 empty trajectory", "repeated", "unequal length", "gamma/gen2.json 12", "'Answer in a box.'"):
        assert words in text
    assert "gamma lacks gen3" in text


def test_swapped_rows_are_no_questions_out_of_line_but_new_ones_are(folder: Path, tmp_path: Path) -> None:
    path = folder / "beta" / "short-sys_5k_gen3.json"
    path.write_text(json.dumps([{"messages": rsr.turns(40, "beta", 3)}]))
    rows, manifest = import_pool(math_task(folder), tmp_path)
    assert count_of(manifest, "another was before") == 1
    (row,) = (row for row in rows if row["messages"][1]["content"] == question(40))
    assert row["problem_id"].startswith("0-") and row["answer"] is None


def test_it_is_made_once_and_again_when_anything_changes(folder: Path, tmp_path: Path) -> None:
    task = math_task(folder)
    first = task.prepare_pool(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert task.prepare_pool(tmp_path) == first and first.stat().st_mtime_ns == stamp
    paths = {
        replace(task, **change).prepare_pool(tmp_path)
        for change in ({"samples": ["gen1"]}, {"rows": 3}, {"system": None})
    }
    (folder / "alpha" / "short-sys_5k_gen1.json").write_text(json.dumps([{"messages": rsr.turns(1, "alpha", 1)}]))
    assert len({first, *paths, math_task(folder).prepare_pool(tmp_path)}) == 5


def test_teachers_and_samples_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    rows, _ = import_pool(math_task(folder, teachers=["gamma", "alpha"], samples=["gen1", "gen3"]), tmp_path)
    assert {row["candidate_id"].removesuffix("-2") for row in rows} == {"alpha-gen1", "alpha-gen3", "gamma-gen1"}
    rows, _ = import_pool(math_task(folder, rows=2), tmp_path)
    assert {row["problem_id"] for row in rows} == {"0", "1"}
    for settings, message in [
        ({"teachers": ["delta"]}, r"task\.teachers=\['delta'\].*has no delta; choose of alpha, beta, gamma"),
        ({"samples": ["gen4"]}, r"task\.samples=\['gen4'\].*choose of gen1, gen2, gen3"),
        ({"teachers": []}, r"task\.teachers=\[\]"),
        ({"files": "*/none*.json"}, r"task\.files=\*/none\*\.json"),
        ({"pool": str(folder / "nowhere")}, r"task\.pool=.*nowhere is not a folder"),
        ({"rows": 0}, r"task\.rows=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            math_task(folder, **settings).prepare_pool(tmp_path)


def test_faults_raise_all_at_once_unless_they_are_to_be_dropped(folder: Path, tmp_path: Path) -> None:
    (folder / "beta" / "short-sys_5k_gen2.json").write_text(json.dumps([{"messages": "[{'role':"}, 3, {"text": "x"}]))
    with pytest.raises(PoolError, match=r"4 faulty rows: correct them, or set task\.on_error=drop") as caught:
        math_task(folder, on_error="raise").prepare_pool(tmp_path)
    assert [fault.reason for fault in caught.value.faults] == [
        "empty trajectory",
        "unreadable messages",
        "no object",
        "no problem",
    ]
    (folder / "beta" / "short-sys_5k_gen2.json").write_text('[{"messages": ')
    with pytest.raises(PoolError, match=r"breaks off"):
        math_task(folder).prepare_pool(tmp_path)
    assert not list(tmp_path.glob("tasks/*/manifest.json")), "nothing half-made looks finished"


def test_answers_need_their_columns(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "What?", "reply": "4"}\n')
    with pytest.raises(ValueError, match=r"task\.answers=.*bad\.jsonl gives none of its 1 problems an answer"):
        math_task(folder, answers=str(bad)).prepare_pool(tmp_path)
    with pytest.raises(ValueError, match=r"task\.answers=.*gone\.jsonl does not exist"):
        math_task(folder, answers=str(tmp_path / "gone.jsonl")).prepare_pool(tmp_path)


def test_answers_from_parquet(folder: Path, tmp_path: Path) -> None:
    table = pa.table({"problem": [question(1), question(2)], "answer": ["a", None], "solution": ["", r"\boxed{b}"]})
    pq.write_table(table, tmp_path / "answers.parquet")
    rows, manifest = import_pool(math_task(folder, answers=str(tmp_path / "answers.parquet")), tmp_path)
    answers = {row["problem_id"]: row["answer"] for row in rows}
    assert (answers["1"], answers["2"], answers["5"]) == ("a", "b", None) and manifest["problems_with_answer"] == 2


def test_the_hub_is_named_when_it_cannot_be_reached(tmp_path: Path) -> None:
    commit = "8f24ed4aa8a69173b04833e5adba7e8b9413e933"
    with pytest.raises(
        ValueError, match=rf"task\.pool=some/pool \(revision {commit}\).*set task\.pool to a local copy"
    ):
        math_task(Path("some/pool"), revision=commit).prepare_pool(tmp_path)
    with pytest.raises(ValueError, match=r"task\.pool=some/pool \(revision main\)"):
        math_task(Path("some/pool")).prepare_pool(tmp_path)
    with pytest.raises(
        ValueError, match=rf"task\.pool=some/data \(revision {commit}\).*set task\.pool to a local copy"
    ):
        hub_task(Path("some/data"), MESSAGES, revision=commit).prepare_pool(tmp_path)
    with pytest.raises(ValueError, match=r"task\.answers=some/answers .*set task\.answers to a local copy"):
        math_task(write_teacher_folder(tmp_path / "p"), answers="some/answers", answers_revision=commit).prepare_pool(
            tmp_path
        )


def test_the_hubs_files_are_read_from_its_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that huggingface_hub leaves on the disk, with no network."""
    from huggingface_hub import constants

    commit = "8f24ed4aa8a69173b04833e5adba7e8b9413e933"
    snapshot = tmp_path / "hub" / "datasets--some--pool" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    task = math_task(Path("some/pool"), revision=commit, teachers=["alpha"], samples=["gen1"])
    rows, manifest = import_pool(task, tmp_path)
    assert {row["candidate_id"] for row in rows} == {"alpha-gen1", "alpha-gen1-2"}
    assert manifest["identity"]["pool"]["commit"] == commit
    snapshot.rename(tmp_path / "away")
    assert import_pool(task, tmp_path)[0] == rows, "what was made needs the hub no more"


# One file or folder a teacher


def test_one_file_a_teacher_by_id_by_text_or_by_row(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"id": i, "problem": question(i), "answer": gold(i)}) + "\n" for i in (0, 1, 2))
    )
    write = lambda name, rows: (pool / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write("by_id.jsonl", [{"problem_id": i, "trajectory": f"id {i}"} for i in (2, 0)])
    write("by_row.jsonl", [{"trajectory": f"row {i}"} for i in (0, 1)])
    write("by_text.jsonl", [{"problem": question(i), "trajectory": f"text {i}", "correct": i == 1} for i in (1, 2)])
    columns = Columns(problem="problem", trajectory="trajectory", correct="correct")
    task = TeacherFiles(name="t", pool=str(pool), problems=str(problems), columns=columns)
    rows, _ = import_pool(replace(task, teachers=["by_row", "by_text"]), tmp_path)
    found = {(row["messages"][0]["content"], row["teacher"]): row for row in rows}
    assert found[question(1), "by_row"]["problem_id"] == found[question(1), "by_text"]["problem_id"]
    assert [row["correct"] for row in rows] == [None, None, True, False]

    by_id = replace(task, teachers=["by_id"], columns=replace(columns, problem_id="problem_id"))
    rows, _ = import_pool(by_id, tmp_path)
    assert [(row["problem_id"], row["messages"][0]["content"]) for row in rows] == [
        ("2", question(2)),
        ("0", question(0)),
    ]
    assert [row["answer"] for row in rows] == [gold(2), gold(0)]
    with pytest.raises(PoolError, match="not text"):
        replace(by_id, problems=None).prepare_pool(tmp_path)


def test_folders_and_files_of_teachers_may_stand_together(tmp_path: Path) -> None:
    (tmp_path / "pool" / "a").mkdir(parents=True)
    row = {"problem": "Why?", "trajectory": "Because."}
    for name in ("a/run_x.jsonl", "a/run_y.jsonl", "b.jsonl"):
        (tmp_path / "pool" / name).write_text(json.dumps(row) + "\n")
    columns = Columns(problem="problem", trajectory="trajectory")
    rows, _ = import_pool(TeacherFiles(name="t", pool=str(tmp_path / "pool"), columns=columns), tmp_path)
    assert [(r["teacher"], r["candidate_id"]) for r in rows] == [("a", "a-x"), ("a", "a-y"), ("b", "b")]
    assert len({r["problem_id"] for r in rows}) == 1


# Data sets by their columns


def hub_task(pool: Path, columns: Columns, **settings: Any) -> HubTask:
    return HubTask(**{"name": "hub", "pool": str(pool), "columns": columns, "on_error": "drop"} | settings)


def test_lists_of_trajectories_with_their_verdicts(tmp_path: Path) -> None:
    """The columns of OpenR1-Math, in a folder of Parquet files."""
    pool = tmp_path / "data"
    pool.mkdir()
    rows = [
        {"uuid": "u1", "problem": "1+1?", "answer": "2", "level": 3, "generations": ["a", "b"], "ok": [True, False]},
        {"uuid": "u2", "problem": "2+2?", "answer": "4", "level": 4, "generations": ["c", ""], "ok": [None, True]},
        {"uuid": "u3", "problem": "3+3?", "answer": None, "level": 5, "generations": ["d", "e"], "ok": [True]},
        {"uuid": "u4", "problem": "4+4?", "answer": "8", "level": 5, "generations": None, "ok": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows[:2]), pool / "train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), pool / "train-00001.parquet")
    columns = Columns(
        problem="problem", problem_id="uuid", trajectory="generations", correct="ok", answer="answer", keep=["level"]
    )
    found, manifest = import_pool(hub_task(pool, columns, system="Think."), tmp_path)
    assert [(r["problem_id"], r["candidate_id"], r["messages"][-1]["content"], r["correct"]) for r in found] == [
        ("u1", "candidate-1", "a", True),
        ("u1", "candidate-2", "b", False),
        ("u2", "candidate-1", "c", None),
    ]
    assert found[0]["messages"][0] == {"role": "system", "content": "Think."} and found[0]["level"] == 3
    assert manifest["dropped"] == {"empty trajectory": 2, "unequal lists": 2}


def test_several_columns_with_thoughts_apart(tmp_path: Path) -> None:
    """The columns of s1K-1.1: each teacher has its own."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"question": "Why?", "r1_think": "hm", "r1": "A", "g_think": "", "g": "B", "s": r"so \boxed{B}"})
        + "\n"
    )
    columns = Columns(problem="question", trajectory=["r1", "g"], reasoning=["r1_think", "g_think"], solution="s")
    rows, _ = import_pool(hub_task(path, columns), tmp_path)
    assert [(r["teacher"], r["messages"][-1]["content"], r["answer"]) for r in rows] == [
        ("r1", "<think>\nhm\n</think>\n\nA", "B"),
        ("g", "B", "B"),
    ]


def test_conversations_of_one_question_become_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    talk = lambda question, reply: [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]  # noqa: E731
    rows = [
        {"conversations": talk(q, a), "model": m}
        for q, a, m in [("Why?", "A", "x"), ("How?", "B", "x"), ("why?", "C", "x")]
    ]
    path.write_text(json.dumps(rows))
    found, manifest = import_pool(hub_task(path, Columns(messages="conversations", teacher="model")), tmp_path)
    assert [r["candidate_id"] for r in found] == ["x-1", "x-1", "x-2"]
    assert found[0]["problem_id"] == found[2]["problem_id"] != found[1]["problem_id"]
    assert (
        found[2]["messages"][0] == {"role": "user", "content": "Why?"} and count_of(manifest, "prompts replaced") == 1
    )
    assert (manifest["rows"], manifest["problems"], len(manifest["teachers"])) == (3, 2, 1)


def test_answers_of_a_problem_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [("a?", "1"), ("a?", "2"), ("a?", None), ("b?", None), ("b?", "3")]
    path.write_text("".join(json.dumps({"q": q, "t": "x", "a": a}) + "\n" for q, a in rows))
    found, manifest = import_pool(hub_task(path, Columns(problem="q", trajectory="t", answer="a")), tmp_path)
    assert [r["answer"] for r in found] == ["1", "1", None, None]
    assert manifest["dropped"] == {"different answer": 1} and count_of(manifest, "answers ignored") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": Columns(problem="q", trajectory="text")},
            r"task\.columns names text, but there are the columns q, t",
        ),
        ({"split": "test"}, r"no file of task\.split=test"),
        ({"pool": "nowhere/at/all"}, r"task\.pool=nowhere/at/all does not exist"),
    ],
)
def test_what_is_not_there_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    pool = tmp_path / "data"
    pool.mkdir()
    (pool / "train.jsonl").write_text('{"q": "a?", "t": "x"}\n')
    task = hub_task(pool, Columns(problem="q", trajectory="t"))
    assert len(import_pool(task, tmp_path)[0]) == 1
    with pytest.raises(ValueError, match=message):
        replace(task, **settings).prepare_pool(tmp_path)


def test_a_pool_needs_trajectories(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"q": "a?", "label": "x"}\n')
    with pytest.raises(ValueError, match=r"no trajectory .* columns label, q; .*task\.columns\.trajectory="):
        hub_task(tmp_path / "data", Columns(problem="q")).prepare_pool(tmp_path)

"""`python -m lark.sample`: from problems and teachers to a pool that a run takes; killed, resumed, silent on keys."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, Seen, chat_server, fault, said
from lark_command import lark
from lark_process import kill_when, start

from lark.common.cache import read_json
from lark.sample import main
from lark.tasks.arithmetic import generate

KEY = "sk-0123456789abcdefghijKLMNOP"
SAMPLE = ("-m", "lark.sample")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of the embedded task: the folder has eval.jsonl and shifted.jsonl."""
    folder = tmp_path_factory.mktemp("task")
    generate(folder, problems=1, eval_problems=12, shifted_problems=4)
    return folder


def sample(*words: object) -> None:
    main([str(word) for word in words])


def refusal(*words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        sample(*words)
    return str(stop.value.code)


def rows_of(pool: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pool.open()]


def test_the_embedded_student_makes_a_pool_that_a_run_selects_from(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool.jsonl"
    with chat_server(lambda seen, _: Reply(body=said(f"\\boxed{{{len(seen.question)}}}", tokens=5))) as server:
        teachers = ["--teacher", "tiny=shipped:tiny", "--teacher", f"far={server.url}#m"]
        sample(
            *("--problems", task / "eval.jsonl", "--output", pool, *teachers, "--samples", 2),
            *("--max-new-tokens", 60, "--checker", "reasoning_gym", "--keep", "all"),
        )
    shown = capsys.readouterr().out
    rows = rows_of(pool)
    assert Counter(row["teacher"] for row in rows) == {"tiny": 24, "far": 24}
    manifest = read_json(Path(f"{pool}.manifest.json"))
    correct = sum(row["correct"] for row in rows if row["teacher"] == "tiny")
    assert manifest["teachers"]["tiny"]["figures"]["correct"] == correct
    assert correct > 0 and f"{correct / 24:.1%}" in shown and f"{pool}: 48 rows of 12 problems" in shown
    done = lark(
        *("task=jsonl", f"task.pool={pool}", f"task.eval={task / 'shifted.jsonl'}", "task.checker=reasoning_gym"),
        *("model=tiny", "stop_after=selection", f"paths.logs={tmp_path / 'logs'}", "logger=csv"),
    )
    assert done.code == 0, done.err
    selection = rows_of(done.folder / "selector" / "selection.jsonl")
    assert {row["meta"]["teacher"] for row in selection} <= {"tiny", "far"} and selection


@pytest.mark.slow
def test_killed_and_resumed_nothing_is_lost_or_asked_twice(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool.jsonl"

    def words(server: ChatServer) -> list[str]:
        return [
            *("--problems", str(task / "eval.jsonl"), "--output", str(pool), "--teacher", f"far={server.url}#m"),
            *("--samples", "2", "--concurrency", "3", "--checker", "number"),
        ]

    def reply(seen: Seen, before: int) -> Reply:
        # until it is killed the server answers seven; its other requests stay open
        return Reply(held=True) if not killed and len(server.seen) > 7 else Reply()

    def records() -> int:
        return sum(len(rows_of(file)) - 1 for file in pool.parent.glob("pool.jsonl.samples/*.jsonl"))

    killed = False
    with chat_server(reply) as server:
        kill_when(start(*words(server), program=SAMPLE), lambda: records() == 7 and len(server.seen) == 10)
        assert records() == 7 and not pool.exists()
        killed = True
        sample(*words(server))
    assert "24 trajectories, 7 are there" in capsys.readouterr().out
    answered = Counter((seen.question, seen.body["seed"]) for seen in server.answered)
    assert len(answered) == 24 and set(answered.values()) == {1}
    assert len(server.seen) == 24 + 3  # those that were under way at the kill
    assert len(rows_of(pool)) == 24


@pytest.mark.slow
def test_a_local_teacher_killed_and_resumed_makes_the_same_pool(task: Path, tmp_path: Path) -> None:
    def words(pool: Path) -> list[str]:
        return [
            *("--problems", str(task / "eval.jsonl"), "--output", str(pool), "--teacher", "tiny=shipped:tiny"),
            *("--samples", "2", "--limit", "6", "--batch-size", "3", "--max-new-tokens", "60", "--checker", "number"),
        ]

    def lines() -> int:
        return sum(file.read_bytes().count(b"\n") for file in tmp_path.glob("killed.jsonl.samples/*.jsonl"))

    kill_when(start(*words(tmp_path / "killed.jsonl"), program=SAMPLE), lambda: lines() > 4)
    assert not (tmp_path / "killed.jsonl").exists()
    sample(*words(tmp_path / "killed.jsonl"))
    sample(*words(tmp_path / "whole.jsonl"))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("status", [200, 401, 400, 500])
def test_the_key_is_neither_written_nor_printed(task: Path, tmp_path: Path, status: int) -> None:
    body = said(f"The key is {KEY}.") if status == 200 else fault(f"Incorrect API key provided: Bearer {KEY}")
    with chat_server(lambda *_: Reply(status=status, body=body, headers={"Retry-After": "0"})) as server:
        process = start(
            *("--problems", str(task / "eval.jsonl"), "--output", str(tmp_path / "pool.jsonl"), "--tries", "2"),
            *("--teacher", f"far={server.url}#m", "--key", "far=STAND_IN_KEY", "--checker", "number"),
            program=SAMPLE,
            STAND_IN_KEY=KEY,
        )
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == (0 if status == 200 else 1), printed
        assert {seen.key for seen in server.seen} == {KEY}
    if status != 200:
        assert printed.splitlines()[-1].startswith("lark: teacher far: the endpoint")
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"STAND_IN_KEY" in written or status != 200  # the variable's name is what the manifest has of it
    for text in (printed.encode(), written):
        assert not any(KEY[i : i + 8].encode() in text for i in range(len(KEY) - 7))


def test_refusals_are_one_sentence(task: Path, tmp_path: Path) -> None:
    words = ["--problems", task / "eval.jsonl", "--output", tmp_path / "pool.jsonl"]
    far = ["--teacher", "far=https://127.0.0.1/v1#m"]
    assert refusal(*words) == (
        "lark: there is no teacher to ask; name one with --teacher NAME=MODEL, or several in --teachers"
    )
    for more, sentence in [
        ([*far, "--key", f"far={KEY}"], "--key far=... names no environment variable that is set"),
        ([*far, "--samples", 0], "samples=0 is of no use"),
        ([*far, "--limit", 0], "--limit 0 leaves no problem"),
        ([*far, "--checker", "luck"], "--checker='luck' is not known"),
        ([*far, "--pattern", "("], "--pattern='('"),
        (["--teacher", "a=./missing"], "teacher a: model.path=missing does not exist"),
        (["--teacher", "a=no/such-model"], "teacher a: model=a: no/such-model could be loaded neither"),
    ]:
        message = refusal(*words, *more)
        assert message.startswith("lark: ") and sentence in message and "\n" not in message, message
        assert KEY not in message
    assert not list(tmp_path.glob("pool.jsonl*.jsonl"))


def test_one_teacher_that_is_refused_keeps_what_the_others_said(task: Path, tmp_path: Path) -> None:
    words = ["--problems", task / "eval.jsonl", "--output", tmp_path / "pool.jsonl", "--checker", "number"]
    with chat_server() as good, chat_server(lambda *_: Reply(status=404, body=fault("no model"))) as bad:
        words += ["--teacher", f"good={good.url}#m"]
        message = refusal(*words, "--teacher", f"bad={bad.url}#m")
        assert "teacher bad" in message and "has no model m" in message
        before = len(good.seen)
        sample(*words)
    assert len(good.answered) == 12 == len(good.seen) and 0 < before <= 12
    assert len(rows_of(tmp_path / "pool.jsonl")) == 12

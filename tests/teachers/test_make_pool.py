"""Pools made of what teachers say: rows, what is asked for anew, what is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, Seen, chat_server, fault, said
from generation.test_vllm_backend import STAND_IN

from lark.answers.checker import Checker
from lark.common.cache import read_json
from lark.pool.pool import read_pool
from lark.teachers.make_pool import make_pool
from lark.teachers.teacher import Teacher

PROBLEMS = [
    {"problem_id": str(n), "problem": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 2 + 1} for n in range(5)
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def solve(seen: Seen, before: int) -> Reply:
    """Right for problems below 3, wrong above."""
    number = int(seen.question.split()[2])
    return Reply(body=said(f"So \\boxed{{{2 * number + (number > 2)}}}"))


def teacher(server: ChatServer, name: str = "far", **settings: Any) -> Teacher:
    return Teacher(**{"name": name, "model": f"model-{name}", "url": server.url, **settings})


def make(output: Path, teachers: list[Teacher], problems: list[dict[str, Any]] = PROBLEMS, **settings: Any) -> Any:
    with Checker("number") as checker:
        manifest = make_pool(problems, teachers, output, checker=checker, **settings)
    return manifest, [json.loads(line) for line in output.open()]


def test_rows_are_a_pools_in_the_order_of_problems_teachers_and_samples(tmp_path: Path) -> None:
    with chat_server(solve) as server:
        manifest, rows = make(
            tmp_path / "pool.jsonl",
            [teacher(server, "z", samples=2, temperature=1.0), teacher(server, "a")],
            system="Be brief.",
        )
    assert [(row["problem_id"], row["candidate_id"]) for row in rows] == [
        (str(n), candidate) for n in range(5) for candidate in ("z-0", "z-1", "a-0")
    ]
    seeds = [row.pop("seed") for row in rows]
    assert len(set(seeds[:2])) == 2
    assert rows[0] == {
        "problem_id": "0",
        "candidate_id": "z-0",
        "teacher": "z",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 0 + 0?"},
            {"role": "assistant", "content": "So \\boxed{0}"},
        ],
        "answer": "0",
        "correct": True,
        "level": 1,
        "num_tokens": 7,
        "finish_reason": "stop",
        "model": "stand-in-1",
        "sampling": {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 4096},
    }
    assert [row["correct"] for row in rows] == [True] * 9 + [False] * 6
    pool = read_pool(tmp_path / "pool.jsonl", cache=tmp_path / "cache")
    assert len(pool.rows) == 15 and not pool.faults
    figures = manifest["teachers"]["z"]["figures"]
    assert (figures["trajectories"], figures["correct"], figures["boxed"], figures["rows"]) == (10, 6, 10, 10)
    assert (figures["tokens"], figures["prompt_tokens"]) == (70, 110)
    assert manifest["problems"]["count"] == 5 and manifest["versions"]["openai"]
    assert read_json(tmp_path / "pool.jsonl.manifest.json") == json.loads(json.dumps(manifest))


def test_only_what_is_new_is_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "pool.jsonl"
    with chat_server(solve) as server:
        make(output, [teacher(server)])
        asked = [len(server.seen)]
        for teachers, problems, settings in [
            ([teacher(server)], PROBLEMS, {"keep": "correct"}),
            ([teacher(server, samples=3, concurrency=2)], PROBLEMS, {}),
            ([teacher(server), teacher(server, "b")], PROBLEMS, {}),
            ([teacher(server, temperature=0.1)], PROBLEMS, {}),
            ([teacher(server)], [PROBLEMS[0] | {"problem": "What is 0 + 0 now?"}, *PROBLEMS[1:]], {}),
            ([teacher(server, samples=3)], PROBLEMS, {}),  # as it was before
        ]:
            _, rows = make(output, teachers, problems, **settings)
            asked.append(len(server.seen) - sum(asked))
    assert asked == [5, 0, 10, 5, 5, 1, 0]
    assert len(rows) == 15


def test_keep_and_thinking_choose_among_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "pool.jsonl"

    def reply(seen: Seen, before: int) -> Reply:
        number = int(seen.question.split()[2])
        if number == 0:
            return Reply(body=said(None, finish="length", reasoning_content="still at it"))
        return Reply(body=said(f"\n\\boxed{{{number + 1}}}", reasoning_content=f" think {number}\n"))

    with chat_server(reply) as server:
        found = {}
        for settings in [{"keep": "all"}, {}, {"keep": "correct"}, {"thinking": "drop"}]:
            manifest, rows = make(output, [teacher(server)], **settings)
            found[str(settings)] = [(row["problem_id"], row["messages"][-1]["content"]) for row in rows]
        assert len(server.seen) == 5
    everything, ended, correct, without = found.values()
    assert everything[:2] == [
        ("0", "<think>\nstill at it"),
        ("1", "<think>\nthink 1\n</think>\n\n\\boxed{2}"),
    ]
    assert ended == everything[1:] and correct == everything[1:2]
    assert without == [(str(n), f"\n\\boxed{{{n + 1}}}") for n in range(1, 5)]
    assert manifest["teachers"]["far"]["figures"]["failures"] == {"thinking only": 1}
    assert [line.getMessage().split(" ")[0] for line in caplog.records if line.levelname == "WARNING"] == [
        "1",
        "4",
    ]  # left out, and said


def test_failures_are_counted_and_asked_for_again_when_told(tmp_path: Path) -> None:
    output = tmp_path / "pool.jsonl"
    well = False

    def reply(seen: Seen, before: int) -> Reply:
        if not well and seen.question == PROBLEMS[1]["problem"]:
            return Reply(status=400, body=fault("blocked by content_filter"))
        if not well and seen.question == PROBLEMS[2]["problem"]:
            return Reply(status=500)
        return solve(seen, before)

    with chat_server(reply) as server:
        one = teacher(server, tries=2)
        counts = []
        for again in (False, False, True):
            manifest, rows = make(output, [one], again=again)
            failures = manifest["teachers"]["far"]["figures"]["failures"]
            counts.append((len(rows), dict(failures), len(server.seen)))
            well = len(counts) > 0
    # the first time 5 requests and a retry; what was given up is asked for again anyhow, what was filtered when told
    assert counts == [(3, {"content_filter": 1, "missing": 1}, 6), (4, {"content_filter": 1}, 7), (5, {}, 8)]


def test_what_is_there_is_kept_when_a_teacher_stops(tmp_path: Path) -> None:
    output = tmp_path / "pool.jsonl"
    well = False

    def reply(seen: Seen, before: int) -> Reply:
        stops = not well and seen.question == PROBLEMS[3]["problem"]
        return Reply(status=401) if stops else solve(seen, before)

    with chat_server(reply) as server:
        one = teacher(server, concurrency=1)
        with pytest.raises(ValueError, match="--key far=VARIABLE"):
            make(output, [one])
        assert not output.exists() and len(server.seen) == 4
        well = True
        _, rows = make(output, [one])
        assert len(rows) == 5 and len(server.seen) == 4 + 2


@pytest.mark.parametrize(
    ("problems", "name", "sentence"),
    [
        (PROBLEMS, "pool.json", "end in .jsonl"),
        (PROBLEMS, "theirs.jsonl", "was not made here"),
        ([PROBLEMS[0] | {"answer": "two"}], "pool.jsonl", "gold answer 'two'"),
        ([{"problem_id": "0", "messages": [{"role": "tool", "content": "x"}], "answer": "1"}], "pool.jsonl", "tool"),
    ],
)
def test_refused_before_anything_is_asked(tmp_path: Path, problems: Any, name: str, sentence: str) -> None:
    (tmp_path / "theirs.jsonl").write_text("mine")
    with chat_server() as server, pytest.raises(ValueError, match=sentence):
        make(tmp_path / name, [teacher(server)], problems)
    assert not server.seen and (tmp_path / "theirs.jsonl").read_text() == "mine"


def test_no_row_is_no_pool(tmp_path: Path) -> None:
    with chat_server(lambda *_: Reply(body=said(""))) as server, pytest.raises(ValueError, match="5 empty"):
        make(tmp_path / "pool.jsonl", [teacher(server)])
    assert not (tmp_path / "pool.jsonl").exists()
    with chat_server() as server, pytest.raises(ValueError, match="4 not correct, which --keep all would keep"):
        problems = [problem for problem in PROBLEMS if problem["answer"] != "4"]
        make(tmp_path / "pool.jsonl", [teacher(server)], problems, keep="correct")


@pytest.mark.slow
def test_vllm_dies_goes_on_and_samples_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in STAND_IN.items():
        path = tmp_path / "stand_in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))
    output = tmp_path / "pool.jsonl"

    def near(samples: int) -> Teacher:
        return Teacher(name="near", model="shipped:tiny", engine="vllm", samples=samples, max_new_tokens=20)

    monkeypatch.setenv("DIE_AFTER", "3")
    with pytest.raises(ValueError, match=r"teacher near: .* exit code 7"):
        make(output, [near(2)], keep="all")
    assert not output.exists()
    monkeypatch.setenv("DIE_AFTER", "-1")
    manifest, rows = make(output, [near(2)], keep="all")
    assert len(rows) == 10 and manifest["teachers"]["near"]["this_command"]["there"] == 3
    _, more = make(output, [near(3)], keep="all")
    assert len(more) == 15
    kept = [row for row in more if row["candidate_id"] != "near-2"]
    assert kept == rows
    whole = tmp_path / "whole.jsonl"
    assert make(whole, [near(3)], keep="all")[1] == more

"""Endpoints, asked over the wire: what is sent, what is tried again, what stops, and that the key stays where it is."""

import asyncio
import json
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
from chat_server import ChatServer, Reply, Seen, chat_server, fault, said
from hypothesis import given
from hypothesis import strategies as st

from lark.teachers.openai_teacher import Endpoint, Request, Tally, without_key
from lark.teachers.teacher import Teacher

KEY = "sk-0123456789abcdefghijKLMNOP"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("STAND_IN_KEY", KEY)


def requests(count: int) -> list[Request]:
    return [
        Request(problem_id=str(i), prompt="p", sample=0, messages=[{"role": "user", "content": f"problem {i}"}])
        for i in range(count)
    ]


def teacher(server: ChatServer, **settings: Any) -> Teacher:
    return Teacher(**{"name": "far", "model": "m", "url": server.url, "key": "STAND_IN_KEY", **settings})


def ask(one: Teacher, count: int = 1) -> tuple[list[dict[str, Any]], Tally]:
    records: list[dict[str, Any]] = []

    async def go() -> Tally:
        endpoint = Endpoint(one, halt=asyncio.Event())
        await endpoint.ask_all(requests(count), records.append)
        return endpoint.tally

    tally = asyncio.run(go())
    return sorted(records, key=lambda record: int(record["problem_id"])), tally


def first_then(first: Reply) -> Callable[[Seen, int], Reply]:
    """That reply to the first request of each question, a good answer to the next."""
    return lambda seen, before: first if before == 0 else Reply()


# ---- what is sent and what comes back


def test_a_request_says_all_that_sampling_depends_on() -> None:
    with chat_server() as server:
        (record,), tally = ask(teacher(server, temperature=0.7, top_p=0.9, max_new_tokens=50, seed=3))
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions" and seen.key == KEY
    seed = seen.body.pop("seed")
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "problem 0"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 50,
    }
    assert record.pop("seconds") >= 0
    assert record == {
        "problem_id": "0",
        "prompt": "p",
        "sample": 0,
        "seed": seed,
        "content": "So \\boxed{4}",
        "reasoning": None,
        "finish_reason": "stop",
        "model": "stand-in-1",
        "num_tokens": 7,
        "prompt_tokens": 11,
    }
    assert tally.tokens == 7


def test_body_adds_and_takes_out_fields_and_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another's")
    with chat_server() as server:
        body = {"max_tokens": None, "max_completion_tokens": 9, "seed": None, "top_p": 0.5}
        (record,), _ = ask(teacher(server, key=None, body=body))
    (seen,) = server.seen
    assert seen.key is None and "another's" not in str(seen.headers)
    assert seen.body.keys() == {"model", "messages", "temperature", "top_p", "max_completion_tokens"}
    assert (seen.body["max_completion_tokens"], seen.body["top_p"], record["seed"]) == (9, 0.5, None)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_apart(name: str) -> None:
    with chat_server(lambda *_: Reply(body=said("4", **dict[str, Any]({name: "2 and 2"})))) as server:
        (record,), _ = ask(teacher(server))
    assert (record["content"], record["reasoning"]) == ("4", "2 and 2")


def test_content_in_parts_surrogates_and_missing_usage() -> None:
    body: dict[str, Any] = said() | {"usage": None}
    body["choices"][0]["message"]["content"] = [{"type": "text", "text": "a\ud800"}, {"type": "text", "text": "b"}]
    with chat_server(lambda *_: Reply(body=body)) as server:
        (record,), _ = ask(teacher(server))
    assert (record["content"], record["num_tokens"], record["prompt_tokens"]) == ("a?b", None, None)


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (Reply(body=said("")), "empty"),
        (Reply(body=said(None, reasoning_content="thought only")), "empty"),
        (Reply(body=said("half", finish="content_filter")), "content_filter"),
        (Reply(body=said(None, refusal="I would rather not")), "refused"),
        (Reply(status=400, body=fault("This model's maximum context length is 9 tokens")), "too_long"),
        (Reply(status=413, body="entity too large"), "too_long"),
        (Reply(status=400, body=fault("blocked", "content_filter")), "content_filter"),
    ],
)
def test_a_prompt_without_a_trajectory_is_counted_and_loses_no_other(reply: Reply, failure: str) -> None:
    with chat_server(lambda seen, _: reply if seen.question == "problem 1" else Reply()) as server:
        records, _ = ask(teacher(server), 3)
    assert [record.get("failure") for record in records] == [None, failure, None]
    assert "content" not in records[1] and len(server.seen) == 3


def test_cut_off_while_thinking_is_a_trajectory() -> None:
    with chat_server(lambda *_: Reply(body=said("", finish="length", reasoning_content="hm"))) as server:
        (record,), _ = ask(teacher(server))
    assert (record["finish_reason"], record["content"], record["reasoning"]) == ("length", "", "hm")


# ---- what is tried again


@pytest.mark.parametrize(
    "first",
    [
        Reply(status=500, body="<html>oh</html>"),
        Reply(status=529, body=fault("overloaded")),
        Reply(status=429, body=fault("slow down"), headers={"Retry-After": "0.01"}),
        Reply(status=429, body=fault("slow down")),
        Reply(status=503, headers={"Retry-After": formatdate(usegmt=True)}),
        Reply(body="no JSON"),
        Reply(body={"choices": []}),
        Reply(body=fault("the provider behind is down", 502)),  # as a router says it
        Reply(held=True),
    ],
)
def test_tried_again(first: Reply) -> None:
    with chat_server(first_then(first)) as server:
        records, _ = ask(teacher(server, timeout=0.3 if first.held else 60), 2)
    assert ["content" in record for record in records] == [True, True] and len(server.seen) == 4


def test_retry_after_holds_every_request_back() -> None:
    wait = Reply(status=429, body=fault("slow down"), headers={"Retry-After": "0.4"})
    with chat_server(lambda seen, before: wait if seen is server.seen[0] else Reply()) as server:
        ask(teacher(server, concurrency=1), 3)
        first, *others = [seen.at for seen in server.seen]
        assert len(others) == 3 and min(others) >= first + 0.4


def test_given_up_after_its_tries_and_not_recorded() -> None:
    with chat_server(lambda seen, _: Reply(status=500) if seen.question == "problem 1" else Reply()) as server:
        records, tally = ask(teacher(server, tries=3), 4)
    assert [record["problem_id"] for record in records] == ["0", "2", "3"]
    assert tally.lost == {"answered 500": 1} and len(server.seen) == 6


def test_an_endpoint_that_is_down_is_not_asked_forever() -> None:
    with (
        chat_server(lambda *_: Reply(status=503)) as server,
        pytest.raises(ValueError, match="answered 503, 3 requests in a row"),
    ):
        ask(teacher(server, tries=2, concurrency=2), 100)
    assert len(server.seen) <= 2 * 2 * 3


def test_an_address_where_nobody_is() -> None:
    with chat_server() as server:
        gone = server.url
    with pytest.raises(ValueError, match="could not be reached"):
        ask(Teacher(name="far", model="m", url=gone, tries=2), 5)


# ---- what stops


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (Reply(status=401, body=fault("bad key")), "set the environment variable STAND_IN_KEY to a valid one"),
        (Reply(status=402, body=fault("Insufficient Balance")), "no credit left"),
        (Reply(status=429, body=fault("quota", "insufficient_quota")), "no credit left"),
        (Reply(status=404, body=fault("no such model")), "has no model m"),
        (Reply(status=400, body=fault("unknown field seed")), "unknown field seed.*body in --teachers"),
        (Reply(status=422, body={"detail": "nonsense"}), "refuses the request"),
        (Reply(status=307, headers={"Location": "/elsewhere"}), "refuses the request"),
        (Reply(status=429, headers={"Retry-After": "86400"}), "asks to wait 86,400 s"),
    ],
)
def test_what_a_user_has_to_mend_stops_at_once(reply: Reply, sentence: str) -> None:
    with chat_server(lambda *_: reply) as server, pytest.raises(ValueError, match=sentence):
        ask(teacher(server, concurrency=2), 50)
    assert len(server.seen) <= 2


def test_what_is_under_way_when_another_stops_is_kept() -> None:
    records: list[dict[str, Any]] = []

    def reply(seen: Seen, before: int) -> Reply:
        return Reply(status=401) if seen.question == "problem 0" else Reply()

    async def go(url: str) -> None:
        halt = asyncio.Event()
        endpoints = [Endpoint(Teacher(name=name, model="m", url=url, concurrency=2), halt=halt) for name in "ab"]
        outcomes = await asyncio.gather(
            endpoints[0].ask_all(requests(9), records.append),
            endpoints[1].ask_all(requests(9)[1:3], records.append),
            return_exceptions=True,
        )
        assert isinstance(outcomes[0], ValueError) and "wants" not in str(outcomes[1])

    with chat_server(reply) as server:
        asyncio.run(go(server.url))
    assert len(records) == sum(seen.question != "problem 0" for seen in server.seen)  # all that was paid for


def test_no_more_at_a_time_than_told() -> None:
    with chat_server() as server:
        ask(teacher(server, concurrency=3), 30)
    assert 1 <= server.most_at_once <= 3


# ---- the key


@pytest.mark.parametrize("status", [400, 401, 404])
@pytest.mark.parametrize("echo", [KEY, f"Bearer {KEY}", KEY[:12], f"...{KEY[-10:]}", KEY + "x" * 400, "y" * 290 + KEY])
def test_a_key_in_an_error_is_not_shown(status: int, echo: str) -> None:
    body: Any = fault(f"Incorrect API key provided: {echo}")
    with chat_server(lambda *_: Reply(status=status, body=body)) as server, pytest.raises(ValueError) as error:
        ask(teacher(server))
    shown = repr(error.value) + str(error.value)
    assert "Incorrect API key" in shown
    assert not any(KEY[i : i + 8] in shown for i in range(len(KEY) - 7))


def test_a_key_in_answers_is_not_kept() -> None:
    body = said(f"my key is {KEY}", reasoning_content=KEY, finish=KEY) | {"model": KEY}
    with chat_server(lambda seen, _: Reply(body=body)) as server:
        records, _ = ask(teacher(server), 2)
    assert KEY not in json.dumps(records) and records[0]["content"] == "my key is ***"


def test_a_word_as_key_leaves_answers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_KEY", "EMPTY")  # what local servers are given
    with chat_server(lambda *_: Reply(body=said("the EMPTY set"))) as server:
        (record,), _ = ask(teacher(server))
    assert record["content"] == "the EMPTY set"


@given(st.text("abc", min_size=1, max_size=12), st.text("abc ", max_size=40))
def test_without_key_leaves_no_piece_and_nothing_else_out(key: str, text: str) -> None:
    size = min(8, len(key))
    shown = without_key(text, key)
    pieces = [key[i : i + size] for i in range(len(key) - size + 1)]
    assert not any(piece in part for piece in pieces for part in shown.split("***"))
    if not any(piece in text for piece in pieces):
        assert shown == text

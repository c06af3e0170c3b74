"""Conversations of others: as lists or text, under other names of roles; what is none is a fault."""

import json
from typing import Any

import pytest

from lark.pool.rows import THOUGHTS, RowError, read_turns
from lark.tasks.conversations import Candidate, Columns, read_candidates

TURNS = [{"role": "user", "content": 'It\'s "so"?\n'}, {"role": "assistant", "content": "Yes \\boxed{1}"}]


@pytest.mark.parametrize("write", [lambda turns: turns, json.dumps, str])
def test_conversations_as_lists_or_as_text(write: Any) -> None:
    assert read_turns(write(TURNS), "messages") == TURNS


def test_other_names_and_keys_without_a_value() -> None:
    turns = [{"from": "human", "value": "Why?", "weight": None}, {"from": "model", "value": "So.", "tool_calls": []}]
    assert read_turns(turns, "c") == [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize("key", THOUGHTS)
def test_thoughts_beside_the_content_come_before_it(key: str) -> None:
    turns = [{"role": "user", "content": "?", key: None}, {"role": "assistant", "content": "A", key: " hm\n"}]
    assert read_turns(turns, "m")[1]["content"] == "<think>\nhm\n</think>\n\nA"
    with pytest.raises(RowError, match="thoughts twice"):
        read_turns([{"role": "assistant", "content": "<think>x</think>A", key: "hm"}], "m")
    with pytest.raises(RowError, match=key):
        read_turns([{"role": "user", "content": "?", key: "hm"}], "m")


@pytest.mark.parametrize(
    "key", [{"tool_calls": [{"name": "add"}]}, {"weight": 0}, {"weight": 1.0}, {"name": "Ann"}, {"value": "other"}]
)
def test_any_other_key_that_says_something_is_a_fault(key: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=f"turn 1 has the further key {next(iter(key))}"):
        read_turns([{"role": "assistant", "content": "A", **key}], "m")


@pytest.mark.parametrize(
    "value", ["", "[", "open('x')", "[" * 9999, [], [3], [{"role": "user"}], [{"role": "tool", "content": ""}], 7]
)
def test_what_is_no_conversation_is_a_fault(value: Any) -> None:
    with pytest.raises(RowError):
        read_turns(value, "messages")


def test_messages_are_the_prompt_where_a_column_has_the_trajectory() -> None:
    row = {"messages": TURNS, "t": "mine", "who": ["w"]}
    (found,) = read_candidates(row, Columns(messages="messages", trajectory="t", teacher="who"))
    assert isinstance(found, Candidate)
    assert (found.prompt, found.trajectory, found.teacher) == (TURNS[:1], "mine", "w")

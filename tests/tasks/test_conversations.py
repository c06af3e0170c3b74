"""Conversations of others: as lists or text, under other names of roles; what is none is a fault."""

import json
from typing import Any

import pytest

from lark.pool.rows import RowError
from lark.tasks.conversations import Candidate, Columns, parse_turns, read_candidates

TURNS = [{"role": "user", "content": 'It\'s "so"?\n'}, {"role": "assistant", "content": "Yes \\boxed{1}"}]


@pytest.mark.parametrize("write", [lambda turns: turns, json.dumps, str])
def test_conversations_as_lists_or_as_text(write: Any) -> None:
    assert parse_turns(write(TURNS), "messages") == TURNS


def test_further_keys_of_turns_are_left_out() -> None:
    turns = [{"from": "human", "value": "Why?", "weight": None}, {"from": "model", "value": "So."}]
    assert parse_turns(turns, "c") == [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    "value", ["", "[", "open('x')", "[" * 9999, [], [3], [{"role": "user"}], [{"role": "tool", "content": ""}], 7]
)
def test_what_is_no_conversation_is_a_fault(value: Any) -> None:
    with pytest.raises(RowError):
        parse_turns(value, "messages")


def test_messages_are_the_prompt_where_a_column_has_the_trajectory() -> None:
    row = {"messages": TURNS, "t": "mine", "who": ["w"]}
    (found,) = read_candidates(row, Columns(messages="messages", trajectory="t", teacher="who"))
    assert isinstance(found, Candidate)
    assert (found.prompt, found.trajectory, found.teacher) == (TURNS[:1], "mine", "w")

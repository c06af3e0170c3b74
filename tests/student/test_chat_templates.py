"""Templates of others: marks that cover more than the trajectory, and dates."""

import pytest
from student.test_chat import chat_for, parts, text, tokenizer_for, turns

from lark.student.chat import load_template

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
TAIL = (
    "{% else %}{{ '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("marked", "span"),
    [
        (r"{{ '\n' }}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}", "hello<|im_end|>\n"),
        (r"{% generation %}{{ '\n' + m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "hello<|im_end|>"),
        (
            r"{{ '\n' }}{% generation %}{{ '<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
            "{% endgeneration %}",
            THOUGHT + "hello<|im_end|>\n",
        ),
        (  # the end of the text has marks of its own
            r"{{ '\n' }}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
            r"{% if loop.last %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}",
            "hello<|im_end|>\n<|im_end|>",
        ),
    ],
)
def test_marks_may_cover_more_than_the_trajectory_and_are_trained(marked, span):
    chat = chat_for("chatml", template=HEAD + marked + TAIL)
    messages = turns("hi", "hello")
    (row,) = chat.encode([messages])
    assert parts(chat, row)[1] == span
    assert chat.encode_prompt(messages[:-1]) == row.input_ids[: row.prompt_tokens]
    assert text(chat, [chat.end_id]) == "<|im_end|>"
    assert text(chat, row.input_ids[row.prompt_tokens :][: row.end_of_turn]) == span.partition("<|im_end|>")[0]


def test_steps_are_counted_from_the_span():
    marked = r"{{ '\n' }}{% generation %}{{ '<think>\n\n</think>\n\n' + m.content + '<|im_end|>' }}{% endgeneration %}"
    rows = [
        chat_for("chatml", template=template).encode([turns("hi", "one. two. three")])[0]
        for template in (HEAD + marked + TAIL, None)
    ]
    added = rows[0].end_of_turn - rows[1].end_of_turn
    assert rows[0].steps == [0, *(step + added for step in rows[1].steps[1:])] and len(rows[1].steps) == 3


def test_a_template_has_one_date_or_none(tmp_path):
    path = tmp_path / "dated.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }}" + load_template("chatml", tokenizer_for("chatml")))
    with pytest.raises(ValueError, match=r"model\.date"):
        load_template(str(path), tokenizer_for("chatml"))
    with pytest.raises(ValueError, match=r"model\.date"):
        load_template(str(path), tokenizer_for("chatml"), "tomorrow")
    one, other = (load_template(str(path), tokenizer_for("chatml"), date) for date in ("2026-01-31", "2026-02-01"))
    chat = chat_for("chatml", template=one)
    assert parts(chat, chat.encode([turns("hi", "hello")])[0])[0].startswith("31 Jan 2026")
    assert chat.span_identity != chat_for("chatml", template=other).span_identity

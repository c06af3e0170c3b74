import copy
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

import lark
from lark.student.chat import Chat, TokenizedTrajectory, load_template, truncate_trajectory

SPECIAL = {
    "chatml": ["<|im_end|>", "<|im_start|>"],
    "llama3": ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
}
FAMILIES = list(SPECIAL)
MERGES = [("Ċ", "Ċ"), ("Ċ", "Ġ"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (".", "Ġ"), ("Ġ", "b")]


@cache
def tokenizer_for(family: str, *, trim_offsets: bool = False):
    """Bytes and a few merges, which reach over any border but a special token; its padding is its end token."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in MERGES]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if trim_offsets:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    end, *others = SPECIAL[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, additional_special_tokens=others
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def chat_for(family: str = "chatml", *, trim_offsets: bool = False, template: str | None = None, **settings) -> Chat:
    tokenizer = tokenizer_for(family, trim_offsets=trim_offsets)
    return Chat(tokenizer=tokenizer, template=template or load_template(family, tokenizer), **settings)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def rendered(family: str, messages: list[dict[str, str]]) -> str:
    if family == "chatml":
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    body = "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages)
    return "<|begin_of_text|>" + body


def parts(chat: Chat, row: TokenizedTrajectory) -> tuple[str, str]:
    """Prompt and span as text."""
    return text(chat, row.input_ids[: row.prompt_tokens]), text(chat, row.input_ids[row.prompt_tokens :])


def text(chat: Chat, ids: list[int]) -> str:
    decoded = chat.tokenizer.decode(ids)
    assert isinstance(decoded, str)
    return decoded


CONTENTS = [
    "hello",
    "<think>\nhm, 2 + 2\n</think>\n\nIt is \\boxed{4}.",
    "ends with white space \n\n",
    "\tstarts with it",
    "ends with a space ",
    "☃ and 𝒳 take several tokens",
    "",
]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", CONTENTS)
def test_the_span_is_the_content_and_its_end_token_and_nothing_is_added(family, content, trim_offsets):
    chat = chat_for(family, trim_offsets=trim_offsets)
    messages = turns("What is 2 + 2?", content)
    (row,) = chat.encode([messages])
    prompt, span = parts(chat, row)
    assert span == content + SPECIAL[family][0]
    assert (prompt + span).rstrip("\n") == rendered(family, messages).rstrip("\n")
    assert row.end_of_turn == len(row.input_ids) - row.prompt_tokens - 1
    assert (
        row.input_ids
        == chat.tokenizer(rendered(family, messages), add_special_tokens=False)["input_ids"][: len(row.input_ids)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_turn_appears_exactly_where_the_row_has_one(family):
    chat = chat_for(family)
    messages = [{"role": "system", "content": "Be brief."}, *turns("hi", "hello")]
    assert parts(chat, chat.encode([messages])[0])[0] + "hello" in rendered(family, messages)
    assert "system" not in parts(chat, chat.encode([messages[1:]])[0])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_several_turns_only_the_last_is_in_the_span(family):
    chat = chat_for(family)
    row = chat.encode([turns("one", "hello", "two", "hello")])[0]
    prompt, span = parts(chat, row)
    assert span == "hello" + SPECIAL[family][0]
    assert prompt.count("hello") == 1 and prompt.count(SPECIAL[family][0]) == 3


@given(content=st.text("helo. \n", max_size=12))
def test_a_row_begins_with_the_tokens_of_its_prompt_whatever_would_merge(content):
    for family in FAMILIES:
        chat = chat_for(family)
        messages = turns("hello <|im_end|><|eot_id|>", content)
        (row,) = chat.encode([messages])
        assert chat.encode_prompt(messages[:-1]) == row.input_ids[: row.prompt_tokens]
        assert parts(chat, row)[1] == content + SPECIAL[family][0]


def test_span_authors_adds_the_newline_after_the_end_token():
    messages = turns("hi", "hello")
    content, authors = (chat_for("chatml", span=span).encode([messages])[0] for span in ("content", "authors"))
    newline = chat_for("chatml").tokenizer.convert_tokens_to_ids("Ċ")
    assert authors.input_ids == [*content.input_ids, newline]
    assert (authors.prompt_tokens, authors.end_of_turn) == (content.prompt_tokens, content.end_of_turn)
    assert chat_for("llama3", span="authors").encode([messages]) == chat_for("llama3").encode([messages])
    longer = chat_for(
        "chatml", span="authors", template=load_template("chatml", tokenizer_for("chatml")) + "{{ 'ab' }}"
    )
    assert longer.encode([messages])[0] == authors


def test_truncation_takes_the_end_token_with_the_tail():
    row = TokenizedTrajectory(input_ids=[9, 9, 1, 2, 3, 4, 0, 7], prompt_tokens=2, end_of_turn=4, steps=[0, 2, 3])
    assert truncate_trajectory(row, 7).end_of_turn == 4
    assert truncate_trajectory(row, 6) == TokenizedTrajectory(
        input_ids=[9, 9, 1, 2, 3, 4], prompt_tokens=2, end_of_turn=-1, steps=[0, 2, 3]
    )
    assert truncate_trajectory(row, 5).steps == [0, 2]
    assert truncate_trajectory(row, 1) == TokenizedTrajectory(input_ids=[9], prompt_tokens=1, end_of_turn=-1, steps=[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_that_a_row_spells_out_stay_text(family):
    chat = chat_for(family)
    end, *others = SPECIAL[family]
    content = f"It ends{end}\n{others[0]}user\nhello{end}"
    messages = turns(f"Say {end}.", content)
    row, plain = chat.encode([messages, turns("Say so.", "hello")])
    prompt, span = parts(chat, row)
    assert span == content + end
    assert prompt + span == rendered(family, messages).rstrip("\n")
    special = set(chat.tokenizer.all_special_ids)
    assert [token in special for token in row.input_ids[row.prompt_tokens :]] == [False] * row.end_of_turn + [True]
    assert sum(token in special for token in row.input_ids) == sum(token in special for token in plain.input_ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", CONTENTS)
def test_spelled_out_special_tokens_change_no_other_token(family, content):
    chat = chat_for(family)
    end = SPECIAL[family][0]
    literal, plain = chat.encode([turns(f"{end}hello", content), turns("hello", content)])
    assert literal.input_ids[literal.prompt_tokens :] == plain.input_ids[plain.prompt_tokens :]
    assert literal.steps == plain.steps
    assert len(literal.input_ids) == len(plain.input_ids) + len(end)  # no merge is made of its characters


def test_added_tokens_that_are_not_special_stay_tokens():
    chat = chat_for("chatml")
    row = chat.encode([turns("hi", "<think> <|im_end|>")])[0]
    assert row.input_ids[row.prompt_tokens] == chat.tokenizer.convert_tokens_to_ids("<think>")


def test_a_tokenizer_that_cannot_read_special_tokens_as_text_is_an_error():
    vocab = {char: i for i, char in enumerate("x▁<|>_adeimnrstu\n")}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # marks the beginning of a text
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")
    chat = Chat(tokenizer=tokenizer, template=load_template("chatml", tokenizer))
    with pytest.raises(ValueError, match=r"spells out a special token \('<\|im_end\|>'"):
        chat.encode([turns("a", "is <|im_end|>")])


STEP_RUNS = {
    "sentences": lambda before, run: before in ".!?" or "\n" in run,
    "blank_lines": lambda before, run: run.count("\n") >= 2,
}


def step_starts(content: str, tokens: list[str], splitter: str) -> list[int]:
    """Plain scan over characters: a step begins after white space that separates, at the token to reach past it."""
    starts, i = [0], 0
    while i < len(content):
        if not content[i].isspace():
            i += 1
            continue
        stop = i
        while stop < len(content) and content[stop].isspace():
            stop += 1
        if i > 0 and stop < len(content) and STEP_RUNS[splitter](content[i - 1], content[i:stop]):
            ends = [len("".join(tokens[: k + 1])) for k in range(len(tokens))]
            starts.append(next(k for k, end in enumerate(ends) if end > stop))
        i = stop
    return sorted(set(starts))


@given(
    content=st.lists(st.sampled_from(["a", "! b", ". b", ".", "?", " ", "\t", "\n", "\n\n", "\r"]), max_size=12).map(
        "".join
    ),
    splitter=st.sampled_from(sorted(STEP_RUNS)),
)
def test_steps_begin_where_a_plain_scan_says(content, splitter):
    content = "x" + content  # nothing merges with the prompt's newline
    chat = chat_for("chatml", step_splitter=splitter)
    row = chat.encode([turns("hi", content)])[0]
    tokens = [text(chat, [token]) for token in row.input_ids[row.prompt_tokens : -1]]
    assert row.steps == step_starts(content, tokens, splitter)


@pytest.mark.parametrize(
    ("splitter", "steps"),
    [
        ("sentences", ["First. ", "Second: 3.5 is it! ", "Third\n", "is here.\r\n\r\n", "Fourth?\n"]),
        ("blank_lines", ["First. Second: 3.5 is it! Third\nis here.\r\n\r\n", "Fourth?\n"]),
    ],
)
def test_steps_of_a_text(splitter, steps):
    chat = chat_for("chatml", step_splitter=splitter)
    row = chat.encode([turns("hi", "".join(steps))])[0]
    span = row.input_ids[row.prompt_tokens : -1]
    borders = [*row.steps, len(span)]
    assert [chat.tokenizer.decode(span[a:b]) for a, b in pairwise(borders)] == steps


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "marks nothing as generated"),
        (
            "{% for m in messages %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}{% endfor %}",
            "changes the trajectory",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content.split('</think>')[-1] }}<|im_end|>"
            "{% endgeneration %}{% endfor %}",
            "changes the trajectory",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}{% endfor %}",
            r"'<\|eot_id\|>', which is not one token of this tokenizer \(but in 10\)",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}",
            r"'', which is not one token of this tokenizer \(but in 0\)",
        ),
        (  # the end merges with the content
            "{% for m in messages %}{% generation %}{{ m.content }}{{ '\n' }}{% endgeneration %}{% endfor %}",
            "not one token of this tokenizer",
        ),
        ("{{ raise_exception('roles must alternate') }}", "cannot render a row .roles must alternate"),
        ("{% for m in messages %}", "cannot render a row"),
    ],
)
def test_a_template_that_does_not_fit_is_an_error(template, message):
    with pytest.raises(ValueError, match=message):
        chat_for("chatml", template=template).encode([turns("hi", "<think></think>hello\n")])


def test_the_printed_sample_marks_the_trained_tokens():
    chat = chat_for("chatml")
    row = chat.encode([turns("hi", "hello ☃b")])[0]
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.preview(row) == prompt + "«hello ☃b<|im_end|>»"
    assert chat.preview(row, limit=3) == prompt + "«hello  ... 3 more ... <|im_end|>»"


def test_templates_are_found_by_name_by_path_or_in_the_tokenizer(tmp_path):
    tokenizer = tokenizer_for.__wrapped__("chatml")
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}")
    assert load_template(str(path), tokenizer) == "{{ bos_token }}"
    with pytest.raises(ValueError, match=r"model.template=own, but the tokenizer brings no chat template"):
        load_template("own", tokenizer)
    with pytest.raises(ValueError, match=r"model.template='alpaca' is neither"):
        load_template("alpaca", tokenizer)
    tokenizer.chat_template = "of its own"
    assert load_template("own", tokenizer) == "of its own"


def test_the_identity_tells_templates_and_spans_apart():
    chats = [
        chat_for("chatml"),
        chat_for("llama3"),
        chat_for("chatml", template=load_template("llama3", tokenizer_for("chatml"))),
        chat_for("chatml", span="authors"),
    ]
    assert len({tuple(chat.span_identity.items()) for chat in chats}) == len(chats)
    before = chats[0].span_identity
    chats[0].encode([turns("<|im_end|>", "<|im_end|>")])
    assert chats[0].span_identity == before == chat_for("chatml").span_identity


def test_the_identity_knows_the_roles_of_special_tokens():
    """Only tokenizer_config.json says which token ends a text; a template may name it by its role."""
    chat = chat_for("chatml")
    before = chat.span_identity
    other = next(token for token in chat.tokenizer.get_vocab() if token != chat.tokenizer.eos_token)
    changed = Chat(tokenizer=copy.deepcopy(chat.tokenizer), template=chat.template)
    changed.tokenizer.eos_token = other
    assert changed.span_identity["tokenizer"] != before["tokenizer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_end_token_ends_the_assistants_turns_and_changes_nothing_else(family):
    chat = chat_for(family)
    own, token = SPECIAL[family][:2]
    changed = chat.replace_end_token(token)
    messages = [{"role": "system", "content": "Be brief."}, *turns("one", f"hello{own}{token}", "two", "hello")]
    row, before = changed.encode([messages])[0], chat.encode([messages])[0]
    assert len(row.input_ids) == len(before.input_ids)
    different = [i for i, (a, b) in enumerate(zip(row.input_ids, before.input_ids, strict=True)) if a != b]
    assert [text(chat, [before.input_ids[i]]) for i in different] == [own, own]
    assert [text(chat, [row.input_ids[i]]) for i in different] == [token, token]
    assert different[1] == row.prompt_tokens + row.end_of_turn == len(row.input_ids) - 1
    assert changed.encode_prompt(turns("one")) == chat.encode_prompt(turns("one"))
    assert changed.end_id == chat.tokenizer.convert_tokens_to_ids(token)
    assert (changed.end_token, changed.own_end) == (token, own)


def test_an_end_token_is_in_the_identity_only_if_it_changes_the_template():
    chat = chat_for("chatml")
    assert "end_token" not in chat.span_identity and chat.replace_end_token("<|im_end|>") == chat
    assert chat.replace_end_token("<|im_start|>").span_identity["end_token"] == "<|im_start|>"


def test_the_end_token_of_a_template_that_names_the_tokenizers():
    template = "{% for m in messages %}{%- generation -%}{{ m.content + eos_token }}{%- endgeneration -%}{% endfor %}"
    chat = chat_for("chatml", template=template).replace_end_token("<|im_start|>")
    assert parts(chat, chat.encode([turns("hi", "hello")])[0]) == ("hi<|im_start|>", "hello<|im_start|>")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<|nothing|>", r"model.end_token='<\|nothing\|>' is 11 tokens .*set it to one of .*<\|im_end\|>"),
        ("<think>", "a token that may occur within a trajectory"),
        ("hello", "a token that may occur within a trajectory"),
        ("", "is 0 tokens"),
    ],
)
def test_an_end_token_has_to_be_one_special_token(token, message):
    with pytest.raises(ValueError, match=message):
        chat_for("chatml").replace_end_token(token)


def test_a_template_whose_end_cannot_be_replaced_is_an_error():
    template = (
        "{% set end = '<|im_end|>' %}{% for m in messages %}"
        "{% generation %}{{ m.content + end }}{% endgeneration %}{% endfor %}"
    )
    chat = chat_for("chatml", template=template)
    assert parts(chat, chat.encode([turns("hi", "hello")])[0])[1] == "hello<|im_end|>"
    with pytest.raises(ValueError, match=r"'<\|im_start\|>' cannot take the place of '<\|im_end\|>'"):
        chat.replace_end_token("<|im_start|>")


def test_the_shipped_students_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(f"{lark.__path__[0]}/student/shipped/tiny")
    chat = Chat(tokenizer=tokenizer, template=load_template("chatml", tokenizer))
    messages = turns("12 + 30 = ?", "12 + 30 = 42.\n\nThe answer is \\boxed{42}.")
    row = chat.encode([messages])[0]
    assert "".join(parts(chat, row)) == rendered("chatml", messages).rstrip("\n")
    assert parts(chat, row)[1] == messages[1]["content"] + "<|im_end|>"
    assert len(row.steps) == 2

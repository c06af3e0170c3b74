"""The embedded arithmetic task, its teachers and the students shipped for it."""

import collections
import itertools
import json
import random
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lark.tasks.arithmetic import SOURCE_DATASET, generate, has_carries, is_correct, parse_terms
from lark.tasks.arithmetic_teachers import (
    MISCONCEPTIONS,
    NOTATIONS,
    SLIP_RATE,
    compute_totals,
    expression,
    slip,
)

NAMES = ("pool.jsonl", "eval.jsonl", "shifted.jsonl")
STUDENTS = ("tiny", "tiny_b")
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

chains = st.lists(st.integers(-999, 999), min_size=1, max_size=5).flatmap(
    lambda rest: st.integers(0, 999).map(lambda first: (first, *rest))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    generate(folder)
    return folder


@pytest.fixture(scope="module")
def notations(tmp_path_factory) -> list[dict]:
    """Rows of the pool of the task `notations`."""
    folder = tmp_path_factory.mktemp("notations")
    generate(folder, teachers="notations", eval_problems=2, shifted_problems=2)
    return [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in NAMES}


def _boxed(text: str) -> str:
    """The number in a trajectory's last box, which must close the text but for a full stop."""
    _, _, tail = text.rpartition("\\boxed{")
    answer, brace, rest = tail.partition("}")
    assert brace and rest in ("", "."), text
    return answer


def _chain(text: str) -> str:
    """The chain inside any wording, found without the task's own prompts."""
    return " ".join(word for word in text.replace(".", " ").split() if word in "+-" or word.isdigit())


def test_same_arguments_same_bytes(folder, tmp_path):
    generate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)  # no temporary file stays
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_another_seed_gives_other_problems(rows, tmp_path):
    generate(tmp_path, seed=1, problems=20, eval_problems=20, shifted_problems=20)
    other = [json.loads(line)["problem"] for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert len(set(other) & {row["problem"] for row in rows["eval.jsonl"]}) <= 1


def test_a_larger_pool_leaves_the_evaluation_sets_alone(folder, tmp_path):
    generate(tmp_path, problems=360)
    for name in ("eval.jsonl", "shifted.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_sizes_and_no_expression_twice(rows):
    prompts = {row["problem_id"]: row["messages"][0]["content"] for row in rows["pool.jsonl"]}
    texts = [*prompts.values(), *(row["problem"] for name in NAMES[1:] for row in rows[name])]
    assert len(prompts) >= 334 and len(rows["eval.jsonl"]) == 200 and len(rows["shifted.jsonl"]) == 100
    expressions = [_chain(text) for text in texts]
    assert len(set(expressions)) == len(expressions) == len(prompts) + 300


def test_pool_rows_hold_one_candidate_of_each_teacher_under_one_prompt(rows):
    problems = collections.defaultdict(list)
    for row in rows["pool.jsonl"]:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        problems[row["problem_id"]].append(row)
    for candidates in problems.values():
        assert [row["teacher"] for row in candidates] == list(MISCONCEPTIONS)
        assert len({row["candidate_id"] for row in candidates}) == len(candidates)
        assert len({(row["messages"][0]["content"], row["answer"]) for row in candidates}) == 1


def test_gold_answers_agree_with_python(rows):
    for row in rows["pool.jsonl"]:
        assert eval(_chain(row["messages"][0]["content"])) == int(row["answer"])
    for name in NAMES[1:]:
        for row in rows[name]:
            assert eval(_chain(row["problem"])) == int(row["answer"])
            assert row["source_dataset"] == SOURCE_DATASET


def test_shifted_problems_are_longer_and_worded_differently(rows):
    def shape(row):
        operands = [word for word in _chain(row["problem"]).split() if word.isdigit()]
        return len(operands), max(map(len, operands))

    usual, shifted = ([shape(row) for row in rows[name]] for name in NAMES[1:])
    assert max(usual) < max(shifted) and max(digits for _, digits in usual) < max(digits for _, digits in shifted)
    assert not any(row["problem"].startswith("Compute") for row in rows["shifted.jsonl"])


def test_correct_is_what_the_verifier_says(rows, notations):
    score: Callable[..., float] = reasoning_gym.get_score_answer_fn(SOURCE_DATASET)
    for row in rows["pool.jsonl"] + notations:
        assert row["correct"] is (score(_boxed(row["messages"][1]["content"]), {"answer": row["answer"]}) == 1.0)


def _share_right(rows) -> dict[str, float]:
    """Share of right answers by teacher."""
    right = collections.defaultdict(list)
    for row in rows:
        right[row["teacher"]].append(row["correct"])
    return {teacher: sum(values) / len(values) for teacher, values in right.items()}


def test_experts_are_right_careless_ones_wrong_and_peers_where_their_slips_cancel(rows):
    share = _share_right(rows["pool.jsonl"])
    assert {share.pop(f"expert_{how}") for how in ("terse", "steps", "prose")} == {1.0}
    assert {share.pop(f"careless_{how}") for how in ("terse", "steps", "prose")} == {0.0}
    (peers,) = set(share.values())  # the same problems in every notation
    assert 0.1 < peers < 0.4


def test_of_the_notations_only_slip_errs(notations):
    share = _share_right(notations)
    assert list(share) == list(NOTATIONS)
    assert abs(1 - share.pop("slip") - SLIP_RATE) < 0.08  # three standard errors at 340 problems
    assert set(share.values()) == {1.0}


def test_every_problem_has_carries_and_no_negative_total(rows):
    texts = [row["messages"][0]["content"] for row in rows["pool.jsonl"]]
    texts += [row["problem"] for name in NAMES[1:] for row in rows[name]]
    assert all(has_carries(_chain(text)) for text in texts)
    assert [has_carries(text) for text in ("15 + 5", "15 + 4", "14 - 5", "15 - 5", "5 - 6 + 15")] == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_verifier_rejects_near_misses():
    assert is_correct("-12", "-12") and not is_correct("12", "-12")
    assert not is_correct("", "5") and not is_correct("15", "5")


def test_notations_are_distinct_texts_of_distinct_lengths(notations):
    words = collections.defaultdict(list)
    for row in notations:
        words[row["teacher"]].append(len(row["messages"][1]["content"]))
    texts = collections.Counter((row["problem_id"], row["messages"][1]["content"]) for row in notations)
    assert max(texts.values()) == 1
    mean = {name: sum(lengths) / len(lengths) for name, lengths in words.items()}
    assert mean["check"] > 2 * mean["signs"] > 2 * mean["terse"]


@given(chains)
def test_chain_round_trips(terms):
    assert parse_terms(expression(terms)) == terms
    assert eval(expression(terms)) == sum(terms) == compute_totals(terms)[-1]


@given(chains, st.integers())
def test_trustworthy_teachers_are_right_and_every_equation_they_write_holds(terms, seed):
    for name, teacher in [*NOTATIONS.items(), *MISCONCEPTIONS.items()]:
        if name == "slip" or name.startswith(("peer", "careless")):
            continue
        text = teacher(terms, random.Random(seed))
        assert int(_boxed(text)) == sum(terms)
        for line in text.replace(". ", "\n").replace(", ", "\n").splitlines():
            left, equals, right = line.rpartition(": ")[2].partition(" = ")
            if equals:
                assert eval(left.removeprefix("First\n")) == int(right.rstrip(".")), (name, line)


def _totals(text: str) -> list[tuple[str, int]]:
    """Each equation of a solution in lines: its left side and the total it states."""
    pairs = [line.split(" = ") for line in text.splitlines() if " = " in line]
    return [(left, int(right)) for left, right in pairs]


@given(chains)
def test_a_peer_forgets_every_carry_and_borrow_and_nothing_else(terms):
    for left, total in _totals(MISCONCEPTIONS["peer_terse"](terms, random.Random(0))):
        first, sign, second = left.split(" ")
        a, b = int(first), int(second)
        forgets = a >= 0 and eval(left) >= 0 and (a % 10 + b % 10 > 9 if sign == "+" else a % 10 < b % 10)
        assert total - eval(left) == (0 if not forgets else -10 if sign == "+" else 10), left


@given(chains, st.integers())
def test_a_careless_teacher_errs_in_one_digit_and_carries_it_on(terms, seed):
    equations = _totals(MISCONCEPTIONS["careless_terse"](terms, random.Random(seed)))
    wrong = [(left, total) for left, total in equations if eval(left) != total]
    ((left, total),) = wrong
    right = str(eval(left))
    assert len(right) == len(str(total)) and sum(a != b for a, b in zip(right, str(total), strict=True)) == 1
    for (_, before), (following, _) in itertools.pairwise(equations):
        assert following.split(" ")[0] == str(before)


@given(chains, st.integers())
def test_slip_errs_once_by_ten_and_carries_it_on(terms, seed):
    assert int(_boxed(slip(terms, random.Random(seed), rate=0.0))) == sum(terms)
    text = slip(terms, random.Random(seed), rate=1.0)
    assert abs(int(_boxed(text)) - sum(terms)) == 10
    clauses = [clause.split(" is ") for clause in text[3:].partition(", giving")[0].split(", and ")]
    assert sum(eval(left) != int(right) for left, right in clauses) == 1
    for (_, total), (following, _) in itertools.pairwise(clauses):
        assert following.split(" ")[0] == total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"problems": 0}, ("task.settings.problems=0", "1 or more")),
        ({"terms": (4, 3)}, ("task.settings.terms=[4, 3]", "in order")),
        ({"digits": (1, 4)}, ("task.settings.digits=[1, 4]", "1 to 3")),
        ({"terms": (2, 2), "digits": (1, 1), "eval_problems": 500}, ("of 500 distinct", "fewer problems")),
    ],
)
def test_bad_arguments_name_setting_and_remedy_and_leave_the_files(arguments, words, tmp_path):
    (tmp_path / "pool.jsonl").write_text("earlier")
    with pytest.raises(ValueError) as error:
        generate(tmp_path, **arguments)
    assert all(word in str(error.value) for word in words)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


@pytest.fixture(scope="module", params=STUDENTS)
def student(request) -> Path:
    return Path(str(files("lark") / "student/shipped" / request.param))


def test_shipped_folder_is_small_and_has_no_pickle(student):
    names = {path.name for path in student.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == wanted | {"README.md"}
    assert sum(path.stat().st_size for path in student.iterdir()) < 4e6


def test_shipped_weights_are_finite_half_precision(student):
    with safe_open(student / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - an open file is no dict
            tensor = tensors.get_tensor(name)
            assert tensor.element_size() == 2 and tensor.float().isfinite().all(), name


def test_shipped_student_loads_offline_and_stops_by_its_own_end_token(student, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(student)
    model: Any = Qwen3ForCausalLM.from_pretrained(student)
    assert model.config.model_type == "qwen3" and model.config.tie_word_embeddings
    assert 0.5e6 < model.num_parameters() < 2e6 and model.config.vocab_size == len(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Compute 47 + 38 - 12."}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=144)
    assert output[0, -1] == tokenizer.eos_token_id and "\\boxed{" in tokenizer.decode(output[0])


def test_tokenizer_round_trips_and_renders_plain_chatml(student, rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    texts = [row["messages"][1]["content"] for row in rows["pool.jsonl"][:80]]
    for text in [*texts, "naïve — 日本 {x}\n\n  y\t"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    digits = tokenizer("1234567890").input_ids
    assert len(digits) == 10 and [tokenizer.decode([digit]) for digit in digits] == list("1234567890")
    assert (tokenizer.eos_token, tokenizer.pad_token) == SPECIALS[1:]
    assert all(len(tokenizer(special).input_ids) == 1 for special in SPECIALS)
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    rendered = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHo.<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered
    longest = max(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows["pool.jsonl"])
    assert longest < 160


def test_both_students_share_one_tokenizer():
    first, second = ((files("lark") / "student/shipped" / name / "tokenizer.json").read_bytes() for name in STUDENTS)
    assert first == second

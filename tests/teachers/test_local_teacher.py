"""Trajectories of teachers that run here."""

from pathlib import Path
from typing import Any

import pytest

from lark.generation.transformers_backend import generate_samples
from lark.teachers.local_teacher import LocalTeacher
from lark.teachers.teacher import Teacher

PROMPTS = {str(n): [{"role": "user", "content": f"Compute {n} + 1{n}."}] for n in range(3)}


def local(**settings: Any) -> LocalTeacher:
    settings = {"name": "near", "model": "shipped:tiny", "max_new_tokens": 20, "samples": 2, **settings}
    return LocalTeacher(Teacher(**settings))


def texts(one: LocalTeacher, done: set[tuple[str, int]] | None = None) -> dict[tuple[str, int], str]:
    return {(s.problem_id, s.sample): s.text for batch in one.sample(PROMPTS, done or set(), Path()) for s in batch}


def test_a_local_teacher_samples_as_evaluation_does() -> None:
    one = local(seed=5)
    chat = one.student.load_chat()
    end = chat.tokenizer.eos_token_id
    assert isinstance(end, int)
    prompts = [chat.encode_prompt(messages) for messages in PROMPTS.values()]
    batches = generate_samples(
        one.student.load_model(one.dtype),
        chat.tokenizer,
        prompts,
        list(PROMPTS),
        samples=2,
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=20,
        seed=5,
        batch_size=32,
        stop_ids=[chat.end_id, end],
    )
    expected = {(s.problem_id, s.sample): s.text for batch in batches for s in batch}
    assert texts(one) == expected and len(expected) == 6
    assert texts(one, {("0", 0), ("2", 1)}) == {k: v for k, v in expected.items() if k not in {("0", 0), ("2", 1)}}
    assert texts(one, set(expected)) == {}


def test_identity_changes_with_what_changes_trajectories() -> None:
    base = local().identity
    assert local(batch_size=1, samples=7).identity == base
    for changed in ({"seed": 1}, {"temperature": 0.0}, {"max_new_tokens": 3}, {"model": "shipped:tiny_b"}):
        assert local(**changed).identity != base


def test_a_thought_that_the_prompt_opens_belongs_to_the_trajectory(student_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "thinking.jinja"
    turns = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endfor %}"
    )
    found = []
    for opening in ("", "<think>\n"):
        template.write_text(turns + "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}")
        one = local(model=str(student_folder), template=str(template))
        found.append(list(texts(one).values()))
    assert all(text.startswith("<think>\n") for text in found[1])
    assert not any(text.startswith("<think>") for text in found[0])


def test_prompts_without_room_are_left_out_with_a_warning(
    student_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = local(model=str(student_folder), template="chatml", max_new_tokens=200)
    prompts = PROMPTS | {"long": [{"role": "user", "content": "x" * 100}]}
    drawn = {sample.problem_id for batch in one.sample(prompts, set(), Path()) for sample in batch}
    assert drawn == set(PROMPTS)
    assert "1 of 4 prompts" in caplog.text and "max_new_tokens=200" in caplog.text

"""Teachers: read from command lines and YAML, and the trajectories of those that run here."""

from pathlib import Path
from typing import Any

import pytest

from lark.generation.transformers_backend import generate_samples
from lark.teachers.teachers import LocalTeacher, Teacher, read_teachers, seed_of

KEY = "sk-0123456789abcdefghijKLMNOP"
COMMON = {"samples": 2, "temperature": 0.5}
PROMPTS = {str(n): [{"role": "user", "content": f"Compute {n} + 1{n}."}] for n in range(3)}


def read(*words: str, file: Path | None = None, keys: tuple[str, ...] = ()) -> list[Teacher]:
    return read_teachers(words, file, keys, COMMON)


def test_from_the_command_line() -> None:
    hub, local, far = read(
        "qwen=Qwen/Qwen3-8B@abc", "mine=./folder=2", "ds=https://api.example.com/v1/#a/b", keys=("ds=DS_KEY",)
    )
    assert (hub.name, hub.model, hub.url, hub.samples, hub.temperature) == ("qwen", "Qwen/Qwen3-8B@abc", None, 2, 0.5)
    assert local.model == "./folder=2"
    assert (far.url, far.model, far.key) == ("https://api.example.com/v1", "a/b", "DS_KEY")


def test_from_yaml_where_a_teachers_own_settings_come_first(tmp_path: Path) -> None:
    file = tmp_path / "teachers.yaml"
    file.write_text(
        "qwen: Qwen/Qwen3-8B\n"
        "near: http://localhost:8000/v1/chat/completions#m\n"
        "ds:\n  url: https://api.example.com/v1\n  model: m\n  key: DS_KEY\n  samples: 4\n  rate: 60\n"
        "  body: {max_tokens: null}\n"
    )
    more, qwen, near, far = read("more=x/y", file=file)
    assert (more.model, qwen.model, qwen.samples) == ("x/y", "Qwen/Qwen3-8B", 2)
    assert (near.url, near.model) == ("http://localhost:8000/v1", "m")
    assert (far.samples, far.temperature, far.rate, far.body, far.key) == (4, 0.5, 60, {"max_tokens": None}, "DS_KEY")


@pytest.mark.parametrize(
    ("words", "text", "keys", "sentence"),
    [
        ((), None, (), "no teacher to ask"),
        (("qwen",), None, (), "--teacher qwen is no NAME=MODEL"),
        (("a=x", "a=y"), None, (), "teacher a is given twice"),
        (("a=https://h/v1",), None, (), "names no model"),
        (("a=https://me:pass@h/v1#m",), None, (), "user name or a query"),
        (("a=https://h/v1?key=secret#m",), None, (), "user name or a query"),
        (("a=ftp://h/v1#m",), None, (), "is no address"),
        (("a/b=x",), None, (), "name='a/b' is of no use"),
        (("a=x",), None, ("b=KEY",), "the teachers are a"),
        (("a=x",), None, ("a=KEY",), "runs here and needs no key"),
        ((), "a: {model: x, temprature: 1}", (), "did you mean temperature"),
        ((), "a: {url: 'https://h/v1'}", (), "no mapping with a model"),
        ((), "- a", (), "is no mapping"),
        ((), "a: [", (), "cannot be read"),
        ((), "a: {model: x, samples: 0}", (), "samples=0 is of no use"),
        ((), "a: {model: x, top_p: 0}", (), "top_p=0 is of no use"),
        ((), "a: {model: x, temperature: -1}", (), "temperature=-1 is of no use"),
        ((), "a: {model: x, rate: 0}", (), "rate=0 is of no use"),
        ((), "a: {model: x, timeout: soon}", (), "timeout='soon' is of no use"),
        ((), "a: {model: x, seed: -1}", (), "seed=-1 is of no use"),
        ((), "a: {model: x, dtype: 16}", (), "its dtype is no text"),
        ((), "a: {model: x, engine: tgi}", (), "engine='tgi' is of no use"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    tmp_path: Path, words: tuple[str, ...], text: str | None, keys: tuple[str, ...], sentence: str
) -> None:
    file = None if text is None else tmp_path / "teachers.yaml"
    if file is not None:
        file.write_text(text or "")
    with pytest.raises(ValueError, match=sentence) as error:
        read(*words, file=file, keys=keys)
    assert "\n" not in str(error.value) and "secret" not in str(error.value) and "pass@" not in str(error.value)


def test_a_key_is_read_from_the_environment_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def far(key: str) -> Teacher:
        return Teacher(name="ds", model="m", url="https://h/v1", key=key)

    monkeypatch.setenv("DS_KEY", f" {KEY}\n")
    assert far("DS_KEY").read_key() == KEY
    assert KEY not in repr(far("DS_KEY"))
    monkeypatch.setenv("DS_KEY", f"{KEY}\nX: y")
    for name, sentence in {
        "DS_KEY": "DS_KEY holds no key",
        "NOT_SET": "ds=NOT_SET names no",
        KEY: r"ds=\.\.\.",
    }.items():
        with pytest.raises(ValueError, match=sentence) as error:
            far(name).read_key()
        assert KEY not in str(error.value)


def test_seeds_of_trajectories_differ() -> None:
    seeds = [seed_of(seed, problem, n) for seed in range(2) for problem in ("1", "11") for n in range(50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "1", 0) == seeds[0]


def local(**settings: Any) -> tuple[LocalTeacher, list[str]]:
    said: list[str] = []
    settings = {"name": "near", "model": "shipped:tiny", "max_new_tokens": 20, "samples": 2, **settings}
    return LocalTeacher(Teacher(**settings), said.append), said


def texts(one: LocalTeacher, done: set[tuple[str, int]] | None = None) -> dict[tuple[str, int], str]:
    return {(s.problem_id, s.sample): s.text for batch in one.sample(PROMPTS, done or set(), Path()) for s in batch}


def test_a_local_teacher_samples_as_evaluation_does() -> None:
    one, said = local(seed=5)
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
    assert said[0].startswith("teacher near: shipped:tiny on ")


def test_identity_changes_with_what_changes_trajectories() -> None:
    base = local()[0].identity
    assert local(batch_size=1, samples=7)[0].identity == base
    for changed in ({"seed": 1}, {"temperature": 0.0}, {"max_new_tokens": 3}, {"model": "shipped:tiny_b"}):
        assert local(**changed)[0].identity != base


def test_a_thought_that_the_prompt_opens_belongs_to_the_trajectory(student_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "thinking.jinja"
    turns = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endfor %}"
    )
    found = []
    for opening in ("", "<think>\n"):
        template.write_text(turns + "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}")
        one, _ = local(model=str(student_folder), template=str(template))
        found.append(list(texts(one).values()))
    assert all(text.startswith("<think>\n") for text in found[1])
    assert not any(text.startswith("<think>") for text in found[0])


def test_prompts_without_room_are_left_out_and_said(student_folder: Path) -> None:
    one, said = local(model=str(student_folder), template="chatml", max_new_tokens=200)
    prompts = PROMPTS | {"long": [{"role": "user", "content": "x" * 100}]}
    drawn = {sample.problem_id for batch in one.sample(prompts, set(), Path()) for sample in batch}
    assert drawn == set(PROMPTS)
    assert said[0] == (
        "teacher near: 1 of 4 prompts leave its 256 positions no room for max_new_tokens=200 and are left out"
    )

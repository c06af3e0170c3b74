"""Teachers: read from command lines and YAML, and the trajectories of those that run here."""

from pathlib import Path

import pytest

from lark.teachers.teacher import Teacher, derive_seed, read_teachers

KEY = "sk-0123456789abcdefghijKLMNOP"
COMMON = {"samples": 2, "temperature": 0.5}


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
        "ds:\n  url: https://api.example.com/v1\n  model: m\n  key: DS_KEY\n  samples: 4\n  tries: 3\n"
        "  body: {max_tokens: null}\n"
    )
    more, qwen, near, far = read("more=x/y", file=file)
    assert (more.model, qwen.model, qwen.samples) == ("x/y", "Qwen/Qwen3-8B", 2)
    assert (near.url, near.model) == ("http://localhost:8000/v1", "m")
    assert (far.samples, far.temperature, far.tries, far.body, far.key) == (4, 0.5, 3, {"max_tokens": None}, "DS_KEY")


@pytest.mark.parametrize(
    ("words", "text", "keys", "sentence"),
    [
        ((), None, (), "no teacher to ask"),
        (("qwen",), None, (), "--teacher qwen is not NAME=MODEL"),
        (("a=x", "a=y"), None, (), "teacher a is given twice"),
        (("a=https://h/v1",), None, (), "names no model"),
        (("a=https://me:pass@h/v1#m",), None, (), "user name or a query"),
        (("a=https://h/v1?key=secret#m",), None, (), "user name or a query"),
        (("a=ftp://h/v1#m",), None, (), "is not an address"),
        (("a/b=x",), None, (), "name='a/b' is of no use"),
        (("a=x",), None, ("b=KEY",), "the teachers are a"),
        (("a=x",), None, ("a=KEY",), "runs here and needs no key"),
        ((), "a: {model: x, temprature: 1}", (), "temprature"),
        ((), "a: {url: 'https://h/v1'}", (), "nor a mapping with a model"),
        ((), "- a", (), "is not a mapping"),
        ((), "a: [", (), "cannot be read"),
        ((), "a: {model: x, samples: 0}", (), "samples=0 is of no use"),
        ((), "a: {model: x, top_p: 0}", (), "top_p=0 is of no use"),
        ((), "a: {model: x, temperature: -1}", (), "temperature=-1 is of no use"),
        ((), "a: {model: x, timeout: 0}", (), "timeout=0 is of no use"),
        ((), "a: {model: x, timeout: soon}", (), "timeout='soon' is of no use"),
        ((), "a: {model: x, seed: -1}", (), "seed=-1 is of no use"),
        ((), "a: {model: x, dtype: 16}", (), "its dtype is not text"),
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
    seeds = [derive_seed(seed, problem, n) for seed in range(2) for problem in ("1", "11") for n in range(50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "1", 0) == seeds[0]

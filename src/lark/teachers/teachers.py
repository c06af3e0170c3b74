"""Teachers that are asked for trajectories: where they are, how they sample; local ones answer here, through
transformers or vLLM, those behind a URL in lark.teachers.openai_teacher.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lark.common.errors import LarkError

if TYPE_CHECKING:
    from lark.generation.transformers_backend import Sample
    from lark.student.chat import Chat
    from lark.student.student import Student

ENGINES = ("transformers", "vllm")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who writes trajectories, and how it samples.

    model: a hub id (`id@revision` pins it), a folder, a .gguf file or shipped:<student>; of an endpoint the model's
        name there.
    url: base URL of an OpenAI-compatible endpoint, such as https://api.example.com/v1; null: the model runs here.
    key: the name of the environment variable with the endpoint's key; null: none is sent.
    samples: trajectories a problem.  temperature: 0 = most likely token.  top_p: nucleus.
    max_new_tokens: tokens after which a trajectory is cut off, its thinking included.
    seed: of the sampling noise; an endpoint gets another seed derived from it for each trajectory.

    Of an endpoint. rate: requests a minute at most, evenly spaced; null: no limit.  concurrency: requests under way at
    a time.  timeout: seconds a request may take.  tries: how often one is made before its trajectory is given up.
    body: further fields of each request; null takes out one that would be sent (`{max_tokens: null}`).

    Of a model that runs here. engine: transformers | vllm.  batch_size: trajectories at a time (transformers);
    null: as many as fit into the free memory.
    adapter, template, dtype, attention: as of a student (lark.student.student); template null: the model's own.
    """

    name: str
    model: str
    url: str | None = None
    key: str | None = None
    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 4096
    seed: int = 0
    rate: float | None = None
    concurrency: int = 8
    timeout: float = 900.0
    tries: int = 6
    body: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "transformers"
    batch_size: int | None = None
    adapter: str | None = None
    template: str | None = None
    dtype: str = "auto"
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        self._check(bool(_NAME.fullmatch(self.name)), "name", "use letters, digits, '.', '_' and '-' only")
        for name in ("model", "url", "key", "adapter", "template", "dtype", "attention"):
            value = getattr(self, name)
            if value is None and name not in ("model", "dtype", "attention"):
                continue
            if not isinstance(value, str) or not value:  # not shown: it may be a key
                raise LarkError(f"teacher {self.name}: its {name} is no text; write it in quotes")
        for name in ("samples", "max_new_tokens", "concurrency", "tries", "batch_size"):
            self._check(_is_number(self, name, 1, whole=True), name, "set it to a whole number from 1 on")
        self._check(_is_number(self, "seed", 0, whole=True), "seed", "set it to a whole number from 0 on")
        self._check(_is_number(self, "temperature", 0), "temperature", "set it to 0 (most likely token) or more")
        self._check(_is_number(self, "top_p", 1e-9, 1), "top_p", "set it above 0 and not above 1")
        self._check(_is_number(self, "timeout", 1e-9), "timeout", "set it to seconds above 0")
        self._check(_is_number(self, "rate", 1e-9), "rate", "set it to requests a minute above 0, or null")
        self._check(self.engine in ENGINES, "engine", f"set it to one of {', '.join(ENGINES)}")
        self._check(isinstance(self.body, Mapping), "body", "set it to a mapping of request fields")
        if self.url is not None:
            self._check_url(self.url)
        elif self.key is not None:
            raise LarkError(f"teacher {self.name} runs here and needs no key; leave it out")

    def _check(self, holds: bool, setting: str, remedy: str) -> None:
        if not holds:
            raise LarkError(f"teacher {self.name}: {setting}={getattr(self, setting)!r} is of no use; {remedy}")

    def _check_url(self, url: str) -> None:
        # The address itself is not shown: somebody may have put a key into it.
        if "@" in url or "?" in url:
            raise LarkError(
                f"teacher {self.name}: its url holds a user name or a query; keep keys out of it and name the "
                f"environment variable that has one, --key {self.name}=VARIABLE"
            )
        if not re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+)(:\d{1,5})?(/\S*)?", url):
            raise LarkError(f"teacher {self.name}: url={url!r} is no address; write https://<host>/v1#<model>")

    def read_key(self) -> str | None:
        """The endpoint's key, from the environment. Raises LarkError, which never shows what might be a key."""
        if self.key is None:
            return None
        if not _VARIABLE.fullmatch(self.key) or self.key not in os.environ:
            # what looks like no variable's name is likely the key itself
            shown = self.key if re.fullmatch(r"[A-Z_][A-Z0-9_]{0,40}", self.key) else "..."
            raise LarkError(
                f"--key {self.name}={shown} names no environment variable that is set; put the key into one and give "
                "its name, never the key itself"
            )
        key = os.environ[self.key].strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise LarkError(f"the environment variable {self.key} holds no key (empty, or with blanks in it); set it")
        return key

    def student(self) -> "Student":
        """The model that runs here, as lark.student.student loads it."""
        from lark.student.student import SHIPPED, Student

        shipped = self.model.startswith(SHIPPED)
        is_path = self.model.startswith((SHIPPED, ".", "/", "~")) or self.model.endswith(".gguf")
        path = identifier = revision = None
        if is_path or Path(self.model).exists():
            path = self.model if shipped else str(Path(self.model).expanduser())
        else:
            identifier, _, revision = self.model.partition("@")
        return Student(
            name=self.name,
            id=identifier,
            revision=None if identifier is None else revision or "main",
            path=path,
            dtype=self.dtype,
            attention=self.attention,
            template=self.template or ("chatml" if shipped else "own"),
            adapter=self.adapter,
        )


def _is_number(teacher: Teacher, name: str, least: float, most: float = 1e12, *, whole: bool = False) -> bool:
    """Whether a setting is a number in its range, or null where it may be."""
    value: Any = getattr(teacher, name)
    if value is None:
        return name in ("rate", "batch_size")
    kinds = (int,) if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most


def read_teachers(
    words: Sequence[str], file: Path | None, keys: Sequence[str], common: Mapping[str, Any]
) -> list[Teacher]:
    """The teachers of a command line and of a YAML file, in order.

    words: NAME=MODEL or NAME=URL#MODEL each.
    file: NAME: the same, or NAME: {model: ..., url: ..., <further settings of Teacher>}.
    keys: NAME=VARIABLE each.
    common: settings of all teachers that do not have their own.
    Raises LarkError for what cannot be read, names given twice, and keys of teachers there are none of.
    """
    entries: dict[str, dict[str, Any]] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not equals or not source:
            raise LarkError(f"--teacher {word} is no NAME=MODEL and no NAME=URL#MODEL; write, say, qwen3=Qwen/Qwen3-8B")
        _add(entries, name, _of_source(name, source))
    for name, entry in _read_yaml(file).items() if file else ():
        _add(entries, str(name), _of_source(str(name), entry) if isinstance(entry, str) else _of_mapping(name, entry))
    for word in keys:
        name, _, variable = word.partition("=")
        if name not in entries:
            raise LarkError(f"--key is given for a teacher that is not there; the teachers are {', '.join(entries)}")
        entries[name]["key"] = variable
    if not entries:
        raise LarkError("there is no teacher to ask; name one with --teacher NAME=MODEL, or several in --teachers")
    return [Teacher(**{**common, "name": name, **entry}) for name, entry in entries.items()]


def _add(entries: dict[str, dict[str, Any]], name: str, entry: dict[str, Any]) -> None:
    if name in entries:
        raise LarkError(f"teacher {name} is given twice; give each teacher its own name")
    entries[name] = entry


def _of_source(name: str, source: str) -> dict[str, Any]:
    if "://" not in source:
        return {"model": source}
    url, _, model = source.partition("#")
    if not model:
        raise LarkError(f"teacher {name}: its URL names no model; append #<model>")
    return {"url": url.rstrip("/").removesuffix("/chat/completions"), "model": model}


def _of_mapping(name: str, entry: Any) -> dict[str, Any]:
    known = [part.name for part in dataclasses.fields(Teacher) if part.name != "name"]
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise LarkError(f"--teachers: {name} is no model and no mapping with a model; the settings are {known}")
    for setting in entry:
        if setting not in known:
            close = difflib.get_close_matches(str(setting), known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"set one of {', '.join(known)}"
            raise LarkError(f"--teachers: {name} has the unknown setting {setting}; {remedy}")
    source = _of_source(name, f"{entry['url']}#{entry['model']}") if entry.get("url") else {}
    return entry | source


def _read_yaml(file: Path) -> dict[Any, Any]:
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise LarkError(f"--teachers {file} cannot be read ({reason}); set it to a YAML file of teachers") from error
    if not isinstance(read, dict):
        raise LarkError(f"--teachers {file} is no mapping; write one line a teacher, NAME: MODEL")
    return read


def seed_of(seed: int, problem_id: str, sample: int) -> int:
    """The seed an endpoint gets for one trajectory, 31 bits: samples of a problem must not share theirs."""
    digest = hashlib.sha256(json.dumps([seed, problem_id, sample]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class LocalTeacher:
    """A teacher that runs here: its identity before anything is loaded, its trajectories in batches."""

    def __init__(self, teacher: Teacher, say: Callable[[str], None]) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.teacher, self.say = teacher, say
        self.student = teacher.student()
        self.chat: Chat = self.student.load_chat()
        found = torch.accelerator.current_accelerator(check_available=True)
        self.device = found or torch.device("cpu")
        self.dtype = self.student.resolve_dtype(self.device)

    @property
    def identity(self) -> dict[str, Any]:
        """What a trajectory depends on besides its prompt and number."""
        teacher = self.teacher
        names = ("temperature", "top_p", "max_new_tokens", "seed", "engine")
        sampling = {name: getattr(teacher, name) for name in names}
        dtype = teacher.dtype if teacher.engine == "vllm" else str(self.dtype).removeprefix("torch.")
        return {"model": self.student.identity(), "dtype": dtype, **self.chat.prompt_identity, **sampling}

    def sample(
        self, prompts: Mapping[str, list[dict[str, str]]], done: Collection[tuple[str, int]], folder: Path
    ) -> Iterator[list["Sample"]]:
        """Trajectories of prompts by problem id, as they end; without those `done`.

        folder: for what vLLM leaves, if it is the engine.
        Prompts that leave the model no room for max_new_tokens are left out: the caller counts what is missing.
        """
        from lark.student.context_length import read_max_positions

        teacher, limit = self.teacher, read_max_positions(self.student)
        ids = {problem: self.chat.encode_prompt(messages) for problem, messages in prompts.items()}
        fitting = {problem: row for problem, row in ids.items() if len(row) + teacher.max_new_tokens <= limit}
        if len(fitting) < len(ids):
            self.say(
                f"teacher {teacher.name}: {len(ids) - len(fitting)} of {len(ids)} prompts leave its {limit:,} "
                f"positions no room for max_new_tokens={teacher.max_new_tokens} and are left out"
            )
        if all((problem, n) in done for problem in fitting for n in range(teacher.samples)):
            return
        # Some templates (DeepSeek-R1's) open the thought in the prompt: it belongs to the trajectory all the same.
        tail = {problem: str(self.chat.tokenizer.decode(row[-8:])).rstrip() for problem, row in fitting.items()}
        settings: dict[str, Any] = {
            "samples": teacher.samples,
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "max_new_tokens": teacher.max_new_tokens,
            "seed": teacher.seed,
            "stop_ids": self._stop_ids(),
            "done": done,
            "say": self.say,
        }
        generate = self._with_vllm if teacher.engine == "vllm" else self._with_transformers
        for batch in generate(list(fitting.values()), list(fitting), folder, settings):
            yield [
                dataclasses.replace(one, text="<think>\n" + one.text)
                if tail[one.problem_id].endswith("<think>")
                else one
                for one in batch
            ]

    def _with_transformers(
        self, prompts: list[list[int]], keys: list[str], folder: Path, settings: dict[str, Any]
    ) -> Iterator[list["Sample"]]:
        from lark.generation.transformers_backend import generate_samples
        from lark.student.memory import release_memory

        self.say(f"teacher {self.teacher.name}: {self.teacher.model} on {self.device} in {self.dtype}")
        model: Any = self.student.load_model(self.dtype)
        model.to(self.device)
        yield from generate_samples(
            model, self.chat.tokenizer, prompts, keys, batch_size=self.teacher.batch_size, **settings
        )
        del model
        release_memory(self.device)

    def _with_vllm(
        self, prompts: list[list[int]], keys: list[str], folder: Path, settings: dict[str, Any]
    ) -> Iterator[list["Sample"]]:
        from lark.generation.vllm_backend import generate_with_vllm, vllm_source

        source = vllm_source(self.student)
        try:
            yield from generate_with_vllm(
                folder, self.chat.tokenizer, prompts, keys, **source, dtype=self.teacher.dtype, **settings
            )
        except RuntimeError as error:  # of vLLM's process: what it printed tells more than our traceback
            raise LarkError(str(error)) from error

    def _stop_ids(self) -> list[int]:
        """What ends a trajectory: the tokenizer's end token, those of the model's generation config, and the end of
        turn of a template that is not the model's own.
        """
        from transformers import GenerationConfig

        ends: list[Any] = [self.chat.tokenizer.eos_token_id]
        source, keywords = self.student.pretrained_arguments()
        if "gguf_file" not in keywords:
            with contextlib.suppress(OSError):  # a model need not bring one
                ends.append(GenerationConfig.from_pretrained(source, **keywords).eos_token_id)
        if self.student.template != "own":
            ends.append(self.chat.end_id)
        flat = [token for end in ends for token in (end if isinstance(end, list) else [end])]
        return sorted({token for token in flat if token is not None})

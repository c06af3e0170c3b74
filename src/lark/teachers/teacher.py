"""Teachers that are asked for trajectories: where they are, how they sample; read from command lines and YAML."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from lark.common.errors import LarkError

ENGINES = ("transformers", "vllm")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+)(:\d{1,5})?(/\S*)?")
_NUMBERS = {  # settings that are numbers: whole, may be null, least, most
    "samples": (True, False, 1, 1e12),
    "max_new_tokens": (True, False, 1, 1e12),
    "concurrency": (True, False, 1, 1e12),
    "tries": (True, False, 1, 1e12),
    "batch_size": (True, True, 1, 1e12),
    "seed": (True, False, 0, 1e12),
    "temperature": (False, False, 0, 1e12),
    "top_p": (False, False, 1e-9, 1),
    "timeout": (False, False, 1e-9, 1e12),
}


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

    Of an endpoint. concurrency: requests under way at a time.  timeout: seconds a request may take.  tries: how often
    one is made before its trajectory is given up.  body: further fields of each request; null takes out one that would
    be sent (`{max_tokens: null}`).

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
        for name, kind in get_type_hints(Teacher).items():
            value = getattr(self, name)
            if kind in (str, str | None) and not (isinstance(value, kind) and value != ""):  # not shown: maybe a key
                raise LarkError(f"teacher {self.name}: its {name} is not text; write it in quotes")
        for name, (whole, optional, least, most) in _NUMBERS.items():
            value = getattr(self, name)
            is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            within = "from 1 on" if least == 1 else "of 0 or more" if least == 0 else "above 0"
            remedy = f"set it to a {'whole ' if whole else ''}number {within}{' and not above 1' if most == 1 else ''}"
            holds = (optional and value is None) or (is_number and least <= value <= most)
            self._check(holds, name, remedy + (", or null" if optional else ""))
        self._check(self.engine in ENGINES, "engine", f"set it to one of {', '.join(ENGINES)}")
        self._check(isinstance(self.body, Mapping), "body", "set it to a mapping of request fields")
        if self.url is None:
            if self.key is not None:
                raise LarkError(f"teacher {self.name} runs here and needs no key; leave it out")
        elif "@" in self.url or "?" in self.url:  # not shown: somebody may have put a key into it
            raise LarkError(
                f"teacher {self.name}: its url holds a user name or a query; keep keys out of it and name the "
                f"environment variable that has one, --key {self.name}=VARIABLE"
            )
        elif not _URL.fullmatch(self.url):
            raise LarkError(f"teacher {self.name}: url={self.url!r} is not an address; write https://<host>/v1#<model>")

    def _check(self, holds: bool, setting: str, remedy: str) -> None:
        if not holds:
            raise LarkError(f"teacher {self.name}: {setting}={getattr(self, setting)!r} is of no use; {remedy}")

    def read_key(self) -> str | None:
        """Read the endpoint's key from the environment. Raises LarkError, which never shows what might be a key."""
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


def read_teachers(
    words: Sequence[str], file: Path | None, keys: Sequence[str], common: Mapping[str, Any]
) -> list[Teacher]:
    """Read the teachers of a command line and of a YAML file, in order.

    words: NAME=MODEL or NAME=URL#MODEL each.
    file: NAME: the same, or NAME: {model: ..., url: ..., <further settings of Teacher>}.
    keys: NAME=VARIABLE each.
    common: settings of all teachers that do not have their own.
    Raises LarkError for what cannot be read, names given twice, and keys of teachers there are none of.
    """
    entries: dict[str, dict[str, Any]] = {}
    given: list[tuple[str, Any]] = []
    for word in words:
        name, equals, source = word.partition("=")
        if not equals or not source:
            raise LarkError(f"--teacher {word} is not NAME=MODEL or NAME=URL#MODEL; write, say, qwen3=Qwen/Qwen3-8B")
        given.append((name, source))
    given += [(str(name), entry) for name, entry in _read_yaml(file).items()] if file else []
    for name, entry in given:
        if name in entries:
            raise LarkError(f"teacher {name} is given twice; give each teacher its own name")
        entries[name] = _parse_source(name, entry) if isinstance(entry, str) else _parse_mapping(name, entry)
    for word in keys:
        name, _, variable = word.partition("=")
        if name not in entries:
            raise LarkError(f"--key is given for a teacher that is not there; the teachers are {', '.join(entries)}")
        entries[name]["key"] = variable
    if not entries:
        raise LarkError("there is no teacher to ask; name one with --teacher NAME=MODEL, or several in --teachers")
    return [Teacher(**{**common, "name": name, **entry}) for name, entry in entries.items()]


def _parse_source(name: str, source: str) -> dict[str, Any]:
    if "://" not in source:
        return {"model": source}
    url, _, model = source.partition("#")
    if not model:
        raise LarkError(f"teacher {name}: its URL names no model; append #<model>")
    return {"url": url.rstrip("/").removesuffix("/chat/completions"), "model": model}


def _parse_mapping(name: str, entry: Any) -> dict[str, Any]:
    known = [part.name for part in dataclasses.fields(Teacher) if part.name != "name"]
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise LarkError(f"--teachers: {name} is neither a model nor a mapping with a model; the settings are {known}")
    for setting in entry:
        if setting not in known:
            raise LarkError(f"--teachers: {name} has the unknown setting {setting}; set one of {', '.join(known)}")
    return entry | (_parse_source(name, f"{entry['url']}#{entry['model']}") if entry.get("url") else {})


def _read_yaml(file: Path) -> dict[Any, Any]:
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise LarkError(f"--teachers {file} cannot be read ({reason}); set it to a YAML file of teachers") from error
    if not isinstance(read, dict):
        raise LarkError(f"--teachers {file} is not a mapping; write one line a teacher, NAME: MODEL")
    return read


def derive_seed(seed: int, problem_id: str, sample: int) -> int:
    """Derive the seed an endpoint gets for one trajectory, 31 bits: samples of a problem must not share theirs."""
    digest = hashlib.sha256(json.dumps([seed, problem_id, sample]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1

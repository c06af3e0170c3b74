"""Benchmarks: evaluation sets by name, with pinned problems, prompts and gold answers.

The text of a prompt under a name never changes: figures are compared by it. A better wording gets the next number.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lark.common.cache import build_once, file_hash, identity_hash
from lark.common.errors import LarkError
from lark.common.hub import hub_errors
from lark.common.log import logger
from lark.common.versions import formula_versions
from lark.pool.files import find_files, write_rows
from lark.tasks.benchmark_rows import (
    Gold,
    get_letter,
    read_contest_gold,
    read_number_gold,
    read_problem,
    read_text_gold,
)
from lark.tasks.problems import read_each

_BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
_LETTER = "Answer with the letter of the right option."


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A system turn and a user turn that a problem is put into."""

    name: str
    """With its version, such as "boxed-1"."""
    system: str | None
    """The system turn; None: there is none."""
    user: str
    """The user's turn, with {problem} for the bare problem and {options} for the lettered options of a choice."""

    @property
    def is_choice(self) -> bool:
        """Tell whether it asks for one of several options."""
        return "{options}" in self.user

    def render(self, problem: str, options: Sequence[str] = ()) -> list[dict[str, str]]:
        """Return the turns that ask `problem`; options: texts in the order of their letters, for a choice."""
        assert self.is_choice == bool(options), f"prompt {self.name} with {len(options)} options"
        lettered = "\n".join(f"{get_letter(i)}. {text}" for i, text in enumerate(options))
        texts = {"problem": problem, "options": lettered}
        user = re.sub(r"\{(problem|options)\}", lambda field: texts[field[1]], self.user)  # never inside a problem
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*turns, {"role": "user", "content": user}]

    @property
    def hash(self) -> str:
        """Return the sha256 of name and text, 64 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        Prompt(name="boxed-1", system=_BOXED, user="{problem}"),
        Prompt(name="boxed-user-1", system=None, user=f"{{problem}}\n\n{_BOXED}"),
        Prompt(name="plain-1", system=None, user="{problem}"),
        Prompt(name="choice-1", system=_BOXED, user=f"{{problem}}\n\n{{options}}\n\n{_LETTER}"),
        Prompt(name="choice-user-1", system=None, user=f"{{problem}}\n\n{{options}}\n\n{_LETTER} {_BOXED}"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of problems at a commit of the hub, and how answers to them are judged."""

    title: str
    """What papers call it."""
    hub: str
    """The data set's id."""
    revision: str
    """Its commit, 40 hex digits."""
    files: Mapping[str, str]
    """File -> sha256, in the order of the problems."""
    problems: int
    """How many the files hold."""
    gold: Gold | None
    """Reads the answer that a file states; None: a choice among options."""
    checker: str
    """task.checker of its rows."""
    prompt: str = "boxed-1"
    """Name of its prompt unless another is asked for."""
    gated: bool = False
    """Whether the hub wants an account that has accepted terms."""


BENCHMARKS = {
    "aime24": Benchmark(
        title="AIME 2024",
        hub="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        files={"data/train-00000-of-00001.parquet": "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf"},
        problems=30,
        gold=read_contest_gold,
        checker="math",
    ),
    "aime25": Benchmark(
        title="AIME 2025",
        hub="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        files={"test.jsonl": "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331"},
        problems=30,
        gold=read_contest_gold,
        checker="math",
    ),
    "amc23": Benchmark(
        title="AMC 2023",
        hub="math-ai/amc23",
        revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
        files={"test-00000-of-00001.parquet": "b696e87ba47be4e879a60fd4ef1d4aa522ba78c5ae013c6aff5cc9788a397c5e"},
        problems=40,
        gold=read_number_gold,
        checker="math",
    ),
    "math500": Benchmark(
        title="MATH-500",
        hub="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        files={"test.jsonl": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"},
        problems=500,
        gold=read_text_gold,
        checker="math",
    ),
    "gpqa": Benchmark(
        title="GPQA-diamond",
        hub="Idavidrein/gpqa",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        files={"gpqa_diamond.csv": "41d1213cd7a4998605a26c2798500652572007161b3a92817ba46b35befcd305"},
        problems=198,
        gold=None,
        checker="choice",
        prompt="choice-1",
        gated=True,
    ),
    "gsm8k": Benchmark(
        title="GSM8K test",
        hub="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        files={"main/test-00000-of-00001.parquet": "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59"},
        problems=1319,
        gold=read_number_gold,
        checker="number",
    ),
    "svamp": Benchmark(
        title="SVAMP",
        hub="ChilleD/SVAMP",
        revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef",
        files={  # all of it: the split of these files is not the authors', whose 1,000 problems are one test set
            "train.json": "bb3b4cd2957f07643bbf9f8f8f5faba3bfb47fcb1d9034655b03060a76675e2b",
            "test.json": "9b5590fce66ea78ecfc7d0fc4a91fb801ffe289340269f8d9d28b21acad04ae6",
        },
        problems=1000,
        gold=read_number_gold,
        checker="number",
    ),
}


def is_benchmark(name: str) -> bool:
    """Tell whether `name` is a benchmark's, with or without a prompt: math500 or math500@plain-1."""
    return name.partition("@")[0] in BENCHMARKS


def find_benchmark(name: str, *, setting: str = "task.eval") -> tuple[Benchmark, Prompt]:
    """Return the benchmark of a name, and the prompt that the name asks for or the benchmark's own.

    Raises LarkError naming `setting`: no such benchmark or prompt, or a prompt that does not suit it.
    """
    short, _, wanted = name.partition("@")
    if short not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise LarkError(f"{setting}={name} is not the name of a benchmark; set it to files, or to some of {known}")
    benchmark = BENCHMARKS[short]
    suited = [prompt.name for prompt in PROMPTS.values() if prompt.is_choice == (benchmark.gold is None)]
    if wanted and wanted not in suited:
        raise LarkError(f"{setting}={name} names no prompt for {short}; set it to {short}@ and {' or '.join(suited)}")
    return benchmark, PROMPTS[wanted or benchmark.prompt]


def prepare_benchmark(name: str, source: str | Path | None, cache: Path) -> Path:
    """Return the evaluation file of a benchmark, written into the cache or found there.

    Rows hold the bare text in `problem`, the whole prompt in `messages`, and `answer`, `checker`, `prompt`, so that
    neither `task.system` nor `task.checker` changes what the benchmark is. A manifest.json beside the file holds where
    the problems come from, the prompt's text and a fingerprint of problems and golds.

    name: of a benchmark, with a prompt of another version after an @: math500, math500@boxed-user-1.
    source: a local file, or None for the pinned commit of the hub.
    cache: folder of all caches (paths.cache).

    Raises LarkError: no such benchmark or prompt; a missing file or faulty rows; the hub's files cannot be had, or are
    not what was pinned.
    """
    benchmark, prompt = find_benchmark(name)
    short = name.partition("@")[0]
    paths = {} if source is None else find_files(source, setting=f"task.eval.{short}")
    origin = {"hub": benchmark.hub, "revision": benchmark.revision, "files": dict(benchmark.files)}
    if source is not None:
        origin = {"hub": None, "files": {file: file_hash(path) for file, path in paths.items()}}
    identity = {"benchmark": short, "prompt": prompt.hash, "source": origin, **formula_versions("benchmarks")}

    def write(folder: Path) -> dict[str, Any]:
        files = paths or {file: _download(short, file) for file in benchmark.files}
        rows = _read_problems(short, files, setting=f"task.eval.{short}={source or benchmark.hub}")
        assert source is not None or len(rows) == benchmark.problems, f"{short} has {len(rows)} problems"
        for row in rows:
            row["messages"] = prompt.render(row["problem"], row.get("options", ()))
            row |= {"checker": benchmark.checker, "prompt": prompt.name}
        write_rows(folder / f"{short}.jsonl", rows)
        return {
            "name": name,
            "title": benchmark.title,
            "problems": len(rows),
            "of": benchmark.problems,
            "fingerprint": compute_fingerprint(rows),
            "checker": benchmark.checker,
            "prompt": {"name": prompt.name, "system": prompt.system, "user": prompt.user, "sha256": prompt.hash},
        }

    folder = cache / "benchmarks" / f"{name}-{identity_hash(identity)}"
    logger.info("benchmark  %s", describe_benchmark(build_once(folder, identity, write), source))
    return folder / f"{short}.jsonl"


def describe_benchmark(manifest: Mapping[str, Any], source: str | Path | None) -> str:
    """Describe a prepared benchmark in a line, from its manifest and the local file it was asked for with."""
    origin, pinned = manifest["identity"]["source"], BENCHMARKS[manifest["identity"]["benchmark"]]
    size = f"{manifest['problems']:,} problems"
    if manifest["problems"] != manifest["of"]:
        size = f"{manifest['problems']:,} of the benchmark's {manifest['of']:,} problems"
    place = f"{pinned.hub}@{pinned.revision[:7]}"
    if source is not None:
        same = sorted(origin["files"].values()) == sorted(pinned.files.values())
        hashes = ", ".join(digest[:7] for digest in origin["files"].values())
        place = f"{source} ({f'the same bytes as {place}' if same else f'sha256 {hashes}'})"
    judged = f"prompt {manifest['prompt']['name']}, checker {manifest['checker']}"
    return f"{manifest['name']}: {size}, {place}, {judged}, fingerprint {manifest['fingerprint'][:12]}"


def compute_fingerprint(rows: list[dict[str, Any]]) -> str:
    """Return a sha256 (64 hex digits) over problems, options and golds, whatever their order, spaces and ids."""
    lines = []
    for row in rows:
        answer = row["answer"] if "options" not in row else row["options"][ord(row["answer"]) - ord("A")]
        texts = [row["problem"], answer, *sorted(row.get("options", ()))]
        lines.append(json.dumps([" ".join(text.split()) for text in texts]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _read_problems(name: str, paths: Mapping[str, Path], *, setting: str) -> list[dict[str, Any]]:
    """Read the problems of a benchmark's files, in order. Raises LarkError with file, line and field of every fault."""
    numbers = count()
    gold = BENCHMARKS[name].gold
    return read_each(paths, lambda raw: read_problem(raw, next(numbers), gold), setting=setting)


def _download(name: str, file: str) -> Path:
    """Return a file of a benchmark at its commit, from the hub's cache or the hub. Raises LarkError."""
    from huggingface_hub import hf_hub_download

    benchmark = BENCHMARKS[name]
    remedy = f"set task.eval={{{name}: <file>}} to a copy of it"
    reachable = f"run `python -m lark.benchmarks {name}` where the hub can be reached, or {remedy}"
    with hub_errors(benchmark.hub, benchmark.revision, shown=f"benchmark {name}: {benchmark.hub}", remedy=reachable):
        path = Path(hf_hub_download(benchmark.hub, file, repo_type="dataset", revision=benchmark.revision))
    if file_hash(path) != benchmark.files[file]:
        raise LarkError(
            f"benchmark {name}: {path} is not the pinned {file} of {benchmark.hub} at {benchmark.revision[:7]} (its "
            f"sha256 is another); delete it, or {remedy}"
        )
    return path

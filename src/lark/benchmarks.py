"""Benchmarks: pinned problems, prompts and golds, prepared as evaluation files.

python -m lark.benchmarks                           lists them, with their prompts
python -m lark.benchmarks math500 gsm8k=test.jsonl  prepares them, from the hub or a local file, ahead of a run
python -m lark.benchmarks math500=test.jsonl --show prints the exact prompt of the first problem as well
"""

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lark.common.cache import (
    atomic_write,
    check_writable,
    file_hash,
    hold_lock,
    identity_hash,
    is_complete,
    read_json,
    write_json,
)
from lark.common.errors import LarkError
from lark.common.versions import formula_versions
from lark.pool.rows import RowError, find_files, read_rows
from lark.tasks.benchmark_rows import Gold, contest_gold, number_gold, read_problem, text_gold
from lark.tasks.problems import read_each
from lark.tasks.prompts import PROMPTS, Prompt


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of problems at a commit of the hub, and how answers to them are judged.

    title: as papers call it.  hub: the dataset's id.  revision: its commit, 40 hex digits.
    files: file -> sha256, in the order of the problems.  problems: how many they hold.
    gold: conversion of the answer that a file states; None: a choice among options.
    checker: task.checker of its rows.  prompt: name of its prompt unless another is asked for.
    gated: whether the hub wants an account that has accepted terms.
    """

    title: str
    hub: str
    revision: str
    files: Mapping[str, str]
    problems: int
    gold: Gold | None
    checker: str
    prompt: str = "boxed-1"
    gated: bool = False


BENCHMARKS = {
    "aime24": Benchmark(
        title="AIME 2024",
        hub="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        files={"data/train-00000-of-00001.parquet": "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf"},
        problems=30,
        gold=contest_gold,
        checker="math",
    ),
    "aime25": Benchmark(
        title="AIME 2025",
        hub="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        files={"test.jsonl": "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331"},
        problems=30,
        gold=contest_gold,
        checker="math",
    ),
    "amc23": Benchmark(
        title="AMC 2023",
        hub="math-ai/amc23",
        revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
        files={"test-00000-of-00001.parquet": "b696e87ba47be4e879a60fd4ef1d4aa522ba78c5ae013c6aff5cc9788a397c5e"},
        problems=40,
        gold=number_gold,
        checker="math",
    ),
    "math500": Benchmark(
        title="MATH-500",
        hub="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        files={"test.jsonl": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"},
        problems=500,
        gold=text_gold,
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
        gold=number_gold,
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
        gold=number_gold,
        checker="number",
    ),
}
NAMES = tuple(BENCHMARKS)


def is_benchmark(name: str) -> bool:
    """Whether `name` is a benchmark's, with or without a prompt: math500 or math500@plain-1."""
    return name.partition("@")[0] in BENCHMARKS


def find(name: str, *, setting: str = "task.eval") -> tuple[Benchmark, Prompt]:
    """The benchmark of a name, and the prompt that the name asks for or the benchmark's own.

    Raises LarkError naming `setting`: no such benchmark or prompt, or a prompt that does not suit it.
    """
    short, _, wanted = name.partition("@")
    if short not in BENCHMARKS:
        raise LarkError(f"{setting}={name} names no benchmark; set it to files, or to some of {', '.join(NAMES)}")
    benchmark = BENCHMARKS[short]
    suited = [prompt.name for prompt in PROMPTS.values() if prompt.choice == (benchmark.gold is None)]
    if wanted and wanted not in suited:
        raise LarkError(f"{setting}={name} names no prompt for {short}; set it to {short}@ and {' or '.join(suited)}")
    return benchmark, PROMPTS[wanted or benchmark.prompt]


def prepare(name: str, source: str | Path | None, cache: Path, say: Callable[[str], None]) -> Path:
    """The evaluation file of a benchmark, written into the cache or found there.

    Rows hold the bare text in `problem`, the whole prompt in `messages`, and `answer`, `checker`, `prompt`, so that
    neither `task.system` nor `task.checker` changes what the benchmark is. A manifest.json beside the file holds where
    the problems come from, the prompt's text and a fingerprint of problems and golds.

    Args:
        name: of a benchmark, with a prompt of another version after an @: math500, math500@boxed-user-1.
        source: a local file, or None for the pinned commit of the hub.
        cache: folder of all caches (paths.cache).
        say: gets one line: problems, source, prompt, checker, fingerprint.

    Raises:
        LarkError: no such benchmark or prompt; a missing file or faulty rows; the hub's files cannot be had, or are
            not what was pinned.
    """
    benchmark, prompt = find(name)
    short = name.partition("@")[0]
    if source is None:
        paths, origin = {}, {"hub": benchmark.hub, "revision": benchmark.revision, "files": dict(benchmark.files)}
    else:
        paths = _local_files(short, source)
        origin = {"hub": None, "files": {file: file_hash(path) for file, path in paths.items()}}
    identity = {"benchmark": short, "prompt": prompt.hash, "source": origin, **formula_versions("benchmarks")}
    folder = cache / "benchmarks" / f"{name}-{identity_hash(identity)}"
    path = folder / f"{short}.jsonl"
    with hold_lock(folder):
        if not is_complete(folder):
            if source is None:
                paths = {file: _fetch(short, file) for file in benchmark.files}
            rows = _rows(short, paths, setting=f"task.eval.{short}={source or benchmark.hub}")
            assert source is not None or len(rows) == benchmark.problems, f"{short} has {len(rows)} problems"
            with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                for row in rows:
                    asked = {"messages": prompt.messages(row["problem"], row.get("options", ()))}
                    row |= asked | {"checker": benchmark.checker, "prompt": prompt.name}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            manifest = {
                "name": name,
                "title": benchmark.title,
                "problems": len(rows),
                "of": benchmark.problems,
                "fingerprint": fingerprint(rows),
                "checker": benchmark.checker,
                "prompt": {"name": prompt.name, "system": prompt.system, "user": prompt.user, "sha256": prompt.hash},
                "identity": identity,
            }
            write_json(folder / "manifest.json", manifest)
    say(f"benchmark   {describe(read_json(folder / 'manifest.json'), source)}")
    return path


def describe(manifest: Mapping[str, Any], source: str | Path | None) -> str:
    """A prepared benchmark in a line, from its manifest and the local file it was asked for with."""
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


def fingerprint(rows: list[dict[str, Any]]) -> str:
    """sha256 (64 hex digits) of problems, options and golds, whatever their order, white space, ids and file layout."""
    lines = []
    for row in rows:
        answer = row["answer"] if "options" not in row else row["options"][ord(row["answer"]) - ord("A")]
        texts = [row["problem"], answer, *sorted(row.get("options", ()))]
        lines.append(json.dumps([" ".join(text.split()) for text in texts]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _local_files(name: str, source: str | Path) -> dict[str, Path]:
    path = Path(source).expanduser()
    if path.suffix.lower() == ".csv" and path.is_file():
        return {path.name: path}
    return find_files(source, setting=f"task.eval.{name}")


def _rows(name: str, paths: Mapping[str, Path], *, setting: str) -> list[dict[str, Any]]:
    """Problems of a benchmark's files, in order. Raises LarkError with file, line and field of every fault."""
    numbers = count()

    def problem_of(raw: Any) -> dict[str, Any]:
        return read_problem(raw, next(numbers), BENCHMARKS[name].gold)

    return read_each(paths, problem_of, setting=setting, read=_read)


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    return _read_csv(path) if path.suffix.lower() == ".csv" else read_rows(path)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                yield reader.line_num, {name: value for name, value in row.items() if name and value}
        except (csv.Error, UnicodeDecodeError) as error:
            message = f"no row from here on can be read as CSV: {error}"
            raise RowError("row", "damaged CSV", message, line=reader.line_num) from error


def _fetch(name: str, file: str) -> Path:
    """A file of a benchmark at its commit, from the hub's cache or the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whatever client the library uses
        RepositoryNotFoundError,
    )

    benchmark = BENCHMARKS[name]
    at = f"{benchmark.hub} at {benchmark.revision[:7]}"
    remedy = f"set task.eval={{{name}: <file>}} to a copy of it"
    try:
        path = Path(hf_hub_download(benchmark.hub, file, repo_type="dataset", revision=benchmark.revision))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        if not benchmark.gated:
            raise LarkError(
                f"benchmark {name}: the hub refuses {file} of {at}; unset HF_TOKEN if it has expired, or {remedy}"
            ) from error
        raise LarkError(
            f"benchmark {name}: {at} is given only to accounts that have accepted its terms; accept them at "
            f"https://huggingface.co/datasets/{benchmark.hub} and set HF_TOKEN to a token of that account, or {remedy}"
        ) from error
    except (HTTPError, OSError) as error:  # no network, no such file in the hub's cache, a broken transfer
        raise LarkError(
            f"benchmark {name}: {file} of {at} is not in the hub's cache and cannot be fetched ({_reason(error)}); "
            f"{remedy}, or run `python -m lark.benchmarks {name}` where the hub can be reached"
        ) from error
    if file_hash(path) != benchmark.files[file]:
        raise LarkError(
            f"benchmark {name}: {path} is not the pinned {file} of {at} (its sha256 is another); delete it, or {remedy}"
        )
    return path


def _reason(error: BaseException) -> str:
    """The first sentence of what lies behind an error of the hub's library."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].partition(". ")[0].rstrip(".")


def build_parser() -> argparse.ArgumentParser:
    about = "List the benchmarks, or prepare some of them ahead of a run, from the hub or from local files."
    parser = argparse.ArgumentParser(prog="python -m lark.benchmarks", description=about)
    parser.add_argument("sets", nargs="*", metavar="NAME[@PROMPT][=FILE]", help="benchmarks to prepare")
    parser.add_argument("--cache", type=Path, default=Path("logs/cache"), help="paths.cache of the runs (logs/cache)")
    parser.add_argument("--show", action="store_true", help="print the prompt of each one's first problem")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        for item in arguments.sets:
            name, _, file = item.partition("=")
            path = prepare(name, file or None, check_writable(arguments.cache, "--cache"), print)
            print(f"            {path}")
            if arguments.show:
                print(first_prompt(path))
        if not arguments.sets:
            print(listing())
    except (ValueError, OSError) as error:
        sys.exit(f"lark: {error}")


def listing() -> str:
    """All benchmarks and all prompts."""
    lines = [f"{'name':<9}{'problems':>8}  {'checker':<9}{'prompt':<10}{'from the hub'}"]
    for name, benchmark in BENCHMARKS.items():
        place = f"{benchmark.hub}@{benchmark.revision}{' (gated)' if benchmark.gated else ''}"
        lines.append(f"{name:<9}{benchmark.problems:>8,}  {benchmark.checker:<9}{benchmark.prompt:<10}{place}")
    for prompt in PROMPTS.values():
        lines += ["", f"prompt {prompt.name} (sha256 {prompt.hash[:12]})"]
        lines += [f"  system: {prompt.system}"] if prompt.system is not None else []
        lines += ["  user:   " + prompt.user.replace("\n", "\n          ")]
    return "\n".join(lines)


def first_prompt(path: Path) -> str:
    """The turns of a prepared file's first problem, and its gold answer."""
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    turns = [f"--- {turn['role']}\n{turn['content']}" for turn in row["messages"]]
    return "\n".join([f"problem {row['problem_id']}", *turns, f"--- gold ({row['checker']})\n{row['answer']}"])


if __name__ == "__main__":
    main()

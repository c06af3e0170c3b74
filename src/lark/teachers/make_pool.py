"""Problems and teachers -> a pool of checked trajectories.

What teachers write is kept in `<output>.samples/<teacher>-<hash>.jsonl`, one growing file for each teacher and way of
sampling, and is asked for once: the pool is made of these files, so more problems, samples or teachers, another checker
or another choice of rows cost only what is new.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lark.answers.checker import Checker
from lark.common.cache import atomic_write, file_hash, hold_lock, identity_hash, write_json
from lark.common.errors import LarkError
from lark.common.log import announce, logger
from lark.common.progress_line import show_progress
from lark.common.record_file import RecordFile
from lark.common.versions import library_version
from lark.pool.rows import normalise_row
from lark.tasks.problems import make_answer, make_prompt
from lark.teachers.local_teacher import LocalTeacher
from lark.teachers.openai_teacher import Endpoint, Request, Tally
from lark.teachers.pool_rows import SAMPLING, Figures, Source, hash_prompt, make_rows
from lark.teachers.teacher import Teacher

Key = tuple[str, str, int]
"""Problem, digest of its prompt, number of the sample."""
Prompts = dict[str, list[dict[str, str]]]
"""Messages before the trajectory, by problem."""
_NEAR = re.compile(r"http://(localhost|127\.|\[::1\])")
_LIBRARIES = {"transformers": ("torch", "transformers"), "vllm": ("vllm",), "endpoint": ("openai",)}


@dataclass(kw_only=True)
class _Asked:
    """A teacher with its file, what is wanted of it and what asking it came to."""

    teacher: Teacher
    local: LocalTeacher | None
    identity: dict[str, Any]
    file: RecordFile
    keys: list[Key]
    there: int
    tally: Tally = field(default_factory=Tally)


def make_pool(
    problems: Sequence[dict[str, Any]],
    teachers: Sequence[Teacher],
    output: Path,
    *,
    checker: Checker,
    system: str | None = None,
    keep: str = "ended",
    thinking: str = "keep",
    again: bool = False,
    source: Path | None = None,
) -> dict[str, Any]:
    """Ask the teachers for what is not there yet, check the answers, write the pool; returns its manifest.

    Args:
        problems: rows as `read_problems` gives them; their further columns go into the pool.
        output: .jsonl file of the pool; `<output>.manifest.json` and the folder `<output>.samples` go beside it.
        checker: decides what is correct.
        system: system turn put before each `problem`, asked with and stored; rows with `messages` have their own.
        keep: which trajectories become rows: all, ended (not cut off: training would teach a cut-off one to end where
            it does) or correct.
        thinking: keep puts what an endpoint returns as reasoning into <think>...</think> before the answer, drop
            leaves it out. It is in the samples either way.
        again: ask once more where a teacher gave no trajectory before (filtered, refused, empty, too long).
        source: where the problems were read from, for the manifest.

    Raises LarkError for what a user has to mend: then nothing that was written is lost, and the same call goes on.
    """
    if output.suffix != ".jsonl":
        raise LarkError(f"--output {output} has another ending; let it end in .jsonl")
    manifest = Path(f"{output}.manifest.json")
    folder = Path(f"{output}.samples")
    if output.exists() and not (folder.exists() or manifest.exists()):
        raise LarkError(f"--output {output} is there already and was not made here; name another file")
    checker.validate([make_answer(problem, "") for problem in problems])
    prompts = {problem["problem_id"]: _make_prompt(problem, system) for problem in problems}
    with ExitStack() as stack:
        asked = [_prepare(teacher, prompts, folder, stack) for teacher in teachers]
        _ask(asked, prompts, again=again)
        figures = [Figures() for _ in asked]
        sources = [Source(one.teacher, one.file, figure) for one, figure in zip(asked, figures, strict=True)]
        with atomic_write(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for row in make_rows(problems, prompts, sources, checker=checker, keep=keep, thinking=thinking):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not sum(figure.rows for figure in figures):
                raise LarkError(f"no trajectory is left for {output}: {_explain_none(figures, keep)}")
        rows, drawn = (sum(getattr(figure, name) for figure in figures) for name in ("rows", "trajectories"))
        if rows < drawn:
            logger.warning(
                f"{drawn - rows:,} of {drawn:,} trajectories are not {keep} and no rows of the pool; --keep all takes "
                "them, without asking again"
            )
        found = {
            "rows": rows,
            "sha256": file_hash(output),
            "problems": {
                "file": str(source) if source else None,
                "count": len(problems),
                "hash": identity_hash({"problems": [[p["problem_id"], p["answer"]] for p in problems], "p": prompts}),
            },
            "settings": {
                "system": system,
                "checker": checker.kind,
                "pattern": checker.pattern,
                "keep": keep,
                "thinking": thinking,
            },
            "teachers": {
                one.teacher.name: _describe_teacher(one, figure) for one, figure in zip(asked, figures, strict=True)
            },
            "versions": _list_versions(asked),
        }
    write_json(manifest, found)
    return found


def _make_prompt(problem: dict[str, Any], system: str | None) -> list[dict[str, str]]:
    """Make the turns before the trajectory, as a pool can have them. Raises LarkError before anything is asked."""
    turns = [{name: turn[name] for name in ("role", "content")} for turn in make_prompt(problem, system)]
    row = {**problem, "candidate_id": "0", "messages": [*turns, {"role": "assistant", "content": "."}]}
    _, errors = normalise_row({name: value for name, value in row.items() if name not in ("teacher", "correct")})
    if errors:
        error = errors[0].at("--problems", None)
        raise LarkError(f"problem {problem['problem_id']} cannot be a row of a pool: {error}")
    return turns


def _prepare(teacher: Teacher, prompts: Prompts, folder: Path, stack: ExitStack) -> _Asked:
    """Open the teacher's file; what it is named after changes with whatever changes its trajectories."""
    local = None
    if teacher.url is None:
        try:
            local = LocalTeacher(teacher)
            identity = local.identity
        except ValueError as error:
            raise LarkError(f"teacher {teacher.name}: {error}") from error
    else:
        if teacher.read_key() and teacher.url.startswith("http:") and not _NEAR.match(teacher.url):
            logger.warning(
                f"teacher {teacher.name}: its key goes over http, where others may read it; use https if it can"
            )
        identity = {name: getattr(teacher, name) for name in ("url", "model", "seed", *SAMPLING)}
        identity["body"] = dict(teacher.body)
    path = folder / f"{teacher.name}-{identity_hash(identity)}.jsonl"
    stack.enter_context(hold_lock(path))
    file = RecordFile(path, {"teacher": teacher.name, **identity}, key=("problem_id", "prompt", "sample"))
    stack.callback(file.close)
    keys = [(problem, hash_prompt(turns), n) for problem, turns in prompts.items() for n in range(teacher.samples)]
    there = sum(key in file for key in keys)
    announce(
        "teacher",
        f"{teacher.name}: {len(prompts):,} problems x {teacher.samples} = {len(keys):,} trajectories, "
        f"{there:,} are there",
    )
    return _Asked(teacher=teacher, local=local, identity=identity, file=file, keys=keys, there=there)


def _ask(asked: Sequence[_Asked], prompts: Prompts, *, again: bool) -> None:
    """Ask endpoints all at once, as they only keep us waiting, then the models that run here, one after the other."""
    endpoints = [one for one in asked if one.local is None]
    wanted = [_list_missing(one, again) for one in endpoints]
    if any(wanted):
        asyncio.run(_ask_endpoints(endpoints, wanted, prompts))
    for one in asked:
        if one.local is not None and (missing := _list_missing(one, again)):
            _ask_local(one, one.local, missing, prompts)


def _list_missing(one: _Asked, again: bool) -> list[Key]:
    return [key for key in one.keys if (record := one.file.read(key)) is None or (again and "failure" in record)]


async def _ask_endpoints(asked: Sequence[_Asked], wanted: Sequence[list[Key]], prompts: Prompts) -> None:
    halt = asyncio.Event()
    endpoints = [Endpoint(one.teacher, halt=halt) for one in asked]
    total, missing = sum(len(one.keys) for one in asked), sum(map(len, wanted))
    with show_progress("asking", total, "trajectories", initial=total - missing) as progress:

        def keeping(file: RecordFile) -> Callable[[dict[str, Any]], None]:
            def keep(record: dict[str, Any]) -> None:
                file.add(record)
                progress.update()

            return keep

        outcomes = await asyncio.gather(
            *(
                endpoint.ask_all([_make_request(key, prompts) for key in keys], keeping(one.file))
                for endpoint, one, keys in zip(endpoints, asked, wanted, strict=True)
            ),
            return_exceptions=True,
        )
    for one, endpoint in zip(asked, endpoints, strict=True):
        one.tally = endpoint.tally
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    for one in asked:
        if lost := one.tally.lost:
            reasons = ", ".join(f"{reason} {count}x" for reason, count in lost.items())
            logger.warning(
                f"teacher {one.teacher.name}: {sum(lost.values())} trajectories were not to be had ({reasons}); the "
                "same command asks for them again"
            )


def _make_request(key: Key, prompts: Prompts) -> Request:
    problem, prompt, sample = key
    return Request(problem_id=problem, prompt=prompt, sample=sample, messages=prompts[problem])


def _ask_local(one: _Asked, local: LocalTeacher, missing: Sequence[Key], prompts: Prompts) -> None:
    wanted = {(problem, sample): (problem, prompt, sample) for problem, prompt, sample in missing}
    done = {(problem, sample) for problem, _, sample in one.keys if (problem, sample) not in wanted}
    folder = one.file.path.with_suffix(".vllm")
    begun = time.monotonic()
    name = one.teacher.name
    with show_progress(f"sampling {name}", len(one.keys), "trajectories", initial=len(done)) as progress:
        try:
            for batch in local.sample(prompts, done, folder):
                for sample in batch:
                    problem, prompt, number = wanted[sample.problem_id, sample.sample]
                    record = {"problem_id": problem, "prompt": prompt, "sample": number, "seed": one.teacher.seed}
                    record |= {"num_tokens": sample.num_tokens, "model": one.teacher.model}
                    text = sample.text.encode("utf-8", "replace").decode()
                    end = "length" if sample.truncated else "stop"
                    record |= {"content": text, "finish_reason": end} if text.strip() else {"failure": "empty"}
                    one.file.add(record)
                    one.tally.tokens += sample.num_tokens
                progress.update(len(batch))
        except ValueError as error:
            raise LarkError(f"teacher {name}: {error}") from error
    one.tally.seconds = time.monotonic() - begun


def _explain_none(figures: Sequence[Figures], keep: str) -> str:
    failures = sum((figure.failures for figure in figures), Counter())
    reasons = [f"{count} {reason.replace('_', ' ')}" for reason, count in failures.items()]
    if left := sum(figure.trajectories for figure in figures):
        reasons.append(f"{left} not {keep}, which --keep all would keep")
    return ", ".join(reasons)


def _describe_teacher(one: _Asked, figure: Figures) -> dict[str, Any]:
    """Describe a teacher for the manifest. The key itself is nowhere in it, only its variable's name."""
    teacher = {name: value for name, value in asdict(one.teacher).items() if name != "name"}
    return {
        "settings": teacher,
        "identity": one.identity,
        "samples": one.file.path.name,
        "figures": {**vars(figure), "failures": dict(figure.failures), "models": sorted(figure.models)},
        "this_command": {"there": one.there, **asdict(one.tally)},
    }


def _list_versions(asked: Sequence[_Asked]) -> dict[str, str]:
    engines = {"endpoint" if one.local is None else one.teacher.engine for one in asked}
    names = ["lark-select", *(name for engine in sorted(engines) for name in _LIBRARIES[engine])]
    # vLLM may live in another Python, which keeps its own record
    return {name: found for name in names if (found := library_version(name)) is not None}

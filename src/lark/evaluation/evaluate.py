"""Evaluation: problems -> prompts -> samples -> verdicts -> metrics.

What it leaves in a folder: samples-<set>.jsonl (a line a sample, with its verdict), problems-<set>.jsonl (the problems
as they were asked, so that the samples can be checked again), evaluation.json (all that is needed to repeat it) and,
written last, metrics.json: `sets` (metrics by evaluation set), `intervals` (of avg@k) and `levels` (both by level).
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark.answers.checker import Checker
from lark.common.cache import identity_hash, read_json, write_json, write_text
from lark.common.errors import LarkError
from lark.common.progress_line import show_progress
from lark.common.ranks import barrier
from lark.evaluation.aggregate import figures_of, write_figures
from lark.evaluation.metrics import check_pass_at
from lark.evaluation.samples import gather, partial_file, partial_files, resume
from lark.generation.backends import ENGINES, Engine, transformers_engine, vllm_engine
from lark.generation.transformers_backend import check_sampling
from lark.student.chat import Chat
from lark.student.student import Student
from lark.tasks.problems import make_answer, make_prompt

Problem = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How students are evaluated; the same for every arm.

    samples: per problem.  pass_at: the k of each pass@k.  temperature: 0 = most likely token.  top_p: nucleus.
    batch_size: samples generated at once, null: as memory allows; changes no result beyond rounding.
    engine: transformers | vllm (a process of its own; not bit-reproducible).
    vllm_python: the interpreter that has vLLM; null: the one that LARK_VLLM_PYTHON names, else this one.
    vllm_gpus: GPUs over which vLLM divides the student; null: all.  vllm_memory: share of each that it takes.
    """

    samples: int = 4
    pass_at: tuple[int, ...] = (1, 4)
    temperature: float = 0.6
    top_p: float = 0.95
    batch_size: int | None = None
    engine: str = "transformers"
    vllm_python: str | None = None
    vllm_gpus: int | None = None
    vllm_memory: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "pass_at", tuple(dict.fromkeys(self.pass_at)))
        if not self.pass_at:
            raise LarkError("evaluation.pass_at=[] asks for no pass@k; set it to [1], say")
        if self.engine not in ENGINES:
            raise LarkError(f"evaluation.engine={self.engine!r} is unknown; set it to one of {', '.join(ENGINES)}")
        if self.vllm_gpus is not None and self.vllm_gpus < 1:
            raise LarkError(f"evaluation.vllm_gpus={self.vllm_gpus} is no number of GPUs; set it to 1 or more, or null")
        if not 0 < self.vllm_memory <= 1:
            raise LarkError(f"evaluation.vllm_memory={self.vllm_memory} is no share of a GPU's memory; set 0.9, say")
        check_sampling(self.samples, self.temperature, self.top_p, self.batch_size)
        for k in self.pass_at:
            check_pass_at(k, self.samples)

    def settings(self) -> dict[str, Any]:
        """What results depend on."""
        return {name: getattr(self, name) for name in ("samples", "temperature", "top_p", "engine")} | {
            "pass_at": list(self.pass_at)
        }

    def engine_of(self, student: Student, chat: Chat, **of_weights: Any) -> Engine:
        """The student in the engine that is set; further arguments are those of `transformers_engine`."""
        if self.engine == "vllm":
            return vllm_engine(
                student,
                chat,
                **of_weights,
                python=self.vllm_python,
                tensor_parallel_size=self.vllm_gpus,
                gpu_memory_utilization=self.vllm_memory,
            )
        return transformers_engine(student, chat, **of_weights, batch_size=self.batch_size)


def evaluate(
    engine: Engine,
    problems: Mapping[str, Sequence[Problem]],
    folder: Path,
    *,
    checker: Checker,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    system: str | None = None,
    identity: Mapping[str, Any],
    record: Mapping[str, Any],
    rank: int = 0,
    world: int = 1,
    label: str = "evaluating",
) -> None:
    """Samples answers to the problems of every set, checks them and writes `folder`, as this module says.

    Ranks share the problems; rank 0 puts the answers together. Samples are kept as they are drawn (lark.evaluation.samples): after
    a kill, the same call generates only what is missing, and nothing of it is lost before metrics.json is there. Kept
    samples are of the same prompts, settings and weights (`engine.identity`).

    Args:
        problems: rows as `read_problems` gives them, by the name of the set.
        checker: decides what is correct; carries the task's answer pattern.
        max_new_tokens, seed: as for `generate_samples`.
        system: system turn put before `problem`; rows that have `messages` are taken as they are.
        identity: kept in metrics.json, to tell whether it is what is wanted.
        record: what evaluation.json says besides what stands above.
        rank, world: of this process, among those that call this together.
        label: what the progress line calls it.

    Raises:
        LarkError: no problems, a gold answer the checker cannot read, or a setting out of its range.
    """
    for name, rows in problems.items():
        if not rows:
            raise LarkError(f"task.eval: {name} holds no problem to evaluate on; set it to a file with rows")
        assert len({row["problem_id"] for row in rows}) == len(rows), "problem ids are distinct"
        checker.validate([make_answer(row, "") for row in rows])  # before anything is generated
    settings = {
        "samples": sampling.samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "stop_ids": list(engine.stop_ids),
    }
    folder.mkdir(parents=True, exist_ok=True)
    sets = [_Set.of(name, rows, engine, settings, system) for name, rows in problems.items()]
    for one in sets:
        _draw(engine, one, folder, settings, rank=rank, world=world, label=f"{label} {one.name}")
    barrier()
    if rank == 0:
        figures = {one.name: _conclude(one, folder, checker, sampling) for one in sets}
        of_sets = {one.name: describe_set(one.problems, system) | _of_engine(folder, one) for one in sets}
        how = {
            "sampling": settings | {"batch_size": sampling.batch_size, "ranks": world},
            "notes": engine.notes,
            "sets": of_sets,
        }
        write_json(folder / "evaluation.json", {**record, **how})
        write_figures(folder, identity, figures)
        for one in sets:
            shutil.rmtree(folder / f"engine-{one.name}", ignore_errors=True)
            for path in partial_files(folder, one.name):
                path.unlink()
    barrier()


def _work(folder: Path, of: "_Set") -> Path:
    """Where an engine may keep what it likes, as long as the set is not evaluated."""
    return folder / f"engine-{of.name}" / of.identity


def _of_engine(folder: Path, of: "_Set") -> dict[str, Any]:
    """What an engine in a process of its own has to say of itself."""
    path = _work(folder, of) / "engine.json"
    return {"engine": read_json(path)} if path.is_file() else {}


@dataclass(frozen=True, kw_only=True)
class _Set:
    """An evaluation set as it is put to a student."""

    name: str
    problems: Sequence[Problem]
    prompts: Sequence[list[int]]
    identity: str
    """Of its samples."""

    @staticmethod
    def of(
        name: str, problems: Sequence[Problem], engine: Engine, settings: Mapping[str, Any], system: str | None
    ) -> "_Set":
        prompts = [engine.encode_prompt(make_prompt(problem, system)) for problem in problems]
        keys = [problem["problem_id"] for problem in problems]
        identity = identity_hash({**settings, "prompts": prompts, "keys": keys, "of": engine.identity})
        return _Set(name=name, problems=problems, prompts=prompts, identity=identity)


def _draw(
    engine: Engine, of: _Set, folder: Path, settings: Mapping[str, Any], *, rank: int, world: int, label: str
) -> None:
    """Draw what is missing of a rank's share into its partial file."""
    share = slice(rank, None, world) if engine.every_rank else slice(None if rank == 0 else 0)
    prompts, keys = of.prompts[share], [problem["problem_id"] for problem in of.problems[share]]
    partial = partial_file(folder, of.name, rank)
    resume(partial, of.identity)
    drawn = gather(partial_files(folder, of.name), of.identity)
    done = {(sample.problem_id, sample.sample) for sample in drawn} & {
        (key, number) for key in keys for number in range(settings["samples"])
    }
    total = len(keys) * settings["samples"]
    if len(done) == total:
        return
    with (
        open(partial, "a", encoding="utf-8") as file,
        show_progress(label, total, "samples", initial=len(done)) as progress,
    ):
        for batch in engine.generate(prompts, keys, _work(folder, of), **settings, done=done):
            file.writelines(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in batch)
            file.flush()
            progress.update(len(batch))


def _conclude(of: _Set, folder: Path, checker: Checker, sampling: Sampling) -> dict[str, Any]:
    """Check the samples of all ranks, write them in the order of the problems, and return their figures."""
    drawn = gather(partial_files(folder, of.name), of.identity)
    total = len(of.problems) * sampling.samples
    assert len(drawn) == total, (
        f"{len(drawn)} of {total} samples of {of.name} are in {folder}: do all ranks write there?"
    )
    records = check_records(map(dataclasses.asdict, drawn), of.problems, checker)
    write_rows(folder / f"samples-{of.name}.jsonl", records)
    write_rows(folder / f"problems-{of.name}.jsonl", of.problems)
    return figures_of(records, of.problems, pass_at=sampling.pass_at, kind=checker.kind)


def check_records(records: Iterable[Record], problems: Sequence[Problem], checker: Checker) -> list[Record]:
    """Samples, as `Sample`'s fields, each with its verdict, in the order of the problems."""
    rows = {problem["problem_id"]: problem for problem in problems}
    order = {problem_id: i for i, problem_id in enumerate(rows)}
    in_order = sorted(records, key=lambda record: (order[record["problem_id"]], record["sample"]))
    verdicts = checker.check([make_answer(rows[record["problem_id"]], record["text"]) for record in in_order])
    return [record | dataclasses.asdict(verdict) for record, verdict in zip(in_order, verdicts, strict=True)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def describe_set(problems: Sequence[Problem], system: str | None) -> dict[str, Any]:
    """What evaluation.json says of a set: how many problems, which prompts' versions, and a hash of all rows."""
    own = f"system turn {system!r}" if system else "the problem as it stands"
    named = [
        problem.get("prompt") or ("messages of the row" if problem.get("messages") else own) for problem in problems
    ]
    return {
        "problems": len(problems),
        "prompts": {prompt: named.count(prompt) for prompt in dict.fromkeys(named)},
        "rows": identity_hash({"problems": list(problems)}),
    }

"""Evaluation: problems -> prompts -> samples -> verdicts -> metrics, of arms and of any student alike.

What it leaves in a folder: samples-<set>.jsonl (a line a sample, with its verdict), problems-<set>.jsonl (the problems
as they were asked, so that the samples can be checked again), evaluation.json (all that is needed to repeat it) and,
written last, metrics.json: `sets` (metrics by evaluation set), `intervals` (of avg@k) and `levels` (both by level).
"""

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lark.answers.checker import Checker
from lark.answers.extract import find_boxed
from lark.common.cache import identity_hash, read_json, write_json
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.progress_line import show_progress
from lark.common.ranks import barrier, world_size
from lark.evaluation.metrics import check_pass_at, summarise_samples, write_metrics
from lark.evaluation.samples import SAMPLE_FIELDS, find_partial_files, gather_samples, open_samples, write_rows
from lark.generation.backends import (
    ENGINES,
    Backend,
    describe_backend,
    make_transformers_backend,
    make_vllm_backend,
)
from lark.generation.transformers_backend import check_sampling
from lark.student.chat import Chat
from lark.student.student import Student
from lark.tasks.problems import make_answer, make_prompt
from lark.tasks.task import Task

Problem = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Say how students are evaluated; the same for every arm."""

    samples: int = 4
    """Per problem."""
    pass_at: tuple[int, ...] = (1, 4)
    """The k of each pass@k."""
    temperature: float = 0.6
    """0 takes the most likely token."""
    top_p: float = 0.95
    """Share of probability that is drawn from."""
    batch_size: int | None = None
    """Samples generated at once; None: as memory allows. Changes no result beyond rounding."""
    engine: str = "transformers"
    """transformers | vllm (a process of its own; not bit-reproducible)."""
    vllm_python: str | None = None
    """The interpreter that has vLLM; None: that of LARK_VLLM_PYTHON or of `make vllm`, else this one."""
    vllm_gpus: int | None = None
    """GPUs over which vLLM divides the student; None: all."""
    vllm_memory: float = 0.9
    """Share of each GPU's memory that vLLM takes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pass_at", tuple(dict.fromkeys(self.pass_at)))
        if not self.pass_at:
            raise LarkError("evaluation.pass_at=[] asks for no pass@k; set it to [1], say")
        if self.engine not in ENGINES:
            raise LarkError(f"evaluation.engine={self.engine!r} is unknown; set it to one of {', '.join(ENGINES)}")
        if self.vllm_gpus is not None and self.vllm_gpus < 1:
            raise LarkError(
                f"evaluation.vllm_gpus={self.vllm_gpus} is not a number of GPUs; set it to 1 or more, or null"
            )
        if not 0 < self.vllm_memory <= 1:
            raise LarkError(f"evaluation.vllm_memory={self.vllm_memory} is not a share of a GPU's memory; set 0.9, say")
        check_sampling(self.samples, self.temperature, self.top_p, self.batch_size)
        for k in self.pass_at:
            check_pass_at(k, self.samples)

    def identity(self) -> dict[str, Any]:
        """Return the settings that results depend on."""
        names = ("samples", "temperature", "top_p", "engine")
        return {name: getattr(self, name) for name in names} | {"pass_at": list(self.pass_at)}

    def make_backend(self, student: Student, chat: Chat, **weights: Any) -> Backend:
        """Put the student behind the engine that is set; further arguments are those of `make_transformers_backend`."""
        if self.engine == "vllm":
            return make_vllm_backend(
                student,
                chat,
                **weights,
                python=self.vllm_python,
                tensor_parallel_size=self.vllm_gpus,
                gpu_memory_utilization=self.vllm_memory,
            )
        return make_transformers_backend(student, chat, **weights, batch_size=self.batch_size)


def evaluate_student(
    student: Student,
    chat: Chat,
    task: Task,
    problems: Mapping[str, Sequence[Problem]],
    folder: Path,
    *,
    trained: Path | None,
    weights: dict[str, Any],
    sampling: Sampling,
    checker: Checker,
    device: torch.device,
    seed: int,
    identity: Mapping[str, Any],
    label: str,
) -> None:
    """Evaluate a student into `folder`, together with all ranks of the job.

    trained: the checkpoint of an arm that trained this student; None: the student as it is.
    weights: what tells these weights from others.  identity, label: as for `evaluate`.
    """
    backend = sampling.make_backend(student, chat, trained=trained, weights=weights, device=device)
    asked = {"name": task.name, "checker": task.checker, "pattern": task.pattern, "system": task.system}
    world = world_size()
    evaluate(
        backend,
        problems,
        folder,
        checker=checker,
        sampling=sampling,
        max_new_tokens=task.max_new_tokens,
        seed=seed,
        system=task.system,
        identity=identity,
        record=describe_backend(backend, student, chat, device) | {"task": asked},
        rank=torch.distributed.get_rank() if world > 1 else 0,
        world=world,
        label=label,
    )


def evaluate(
    backend: Backend,
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
    """Sample answers to the problems of every set, check them and write `folder`, as this module says.

    Ranks share the problems; rank 0 puts the answers together. Samples are kept as they are drawn
    (lark.evaluation.samples): after a kill, the same call generates only what is missing. Samples of the same prompts,
    settings and weights (`backend.identity`) that the folder holds already are not drawn again, so another set or
    checker costs no more than what is new.

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
        "stop_ids": list(backend.stop_ids),
    }
    folder.mkdir(parents=True, exist_ok=True)
    sets = [_AskedSet.make(name, rows, backend, settings, system) for name, rows in problems.items()]
    for asked in sets:
        _draw_samples(backend, asked, folder, settings, rank=rank, world=world, label=f"{label} {asked.name}")
    barrier()
    if rank == 0:
        by_set, described = {}, {}
        path = folder / "evaluation.json"
        before = read_json(path)["sets"] if path.exists() else {}  # sets whose samples are still there
        for asked in sets:
            drawn = gather_samples(folder, asked.name, asked.identity)
            total = len(asked.problems) * sampling.samples
            assert len(drawn) == total, (
                f"{len(drawn)} of {total} samples of {asked.name} are in {folder}: do all ranks write there?"
            )
            records = check_records(drawn.values(), asked.problems, checker)
            write_rows(folder / f"samples-{asked.name}.jsonl", records)
            write_rows(folder / f"problems-{asked.name}.jsonl", asked.problems)
            by_set[asked.name] = summarise_samples(records, asked.problems, pass_at=sampling.pass_at, kind=checker.kind)
            described[asked.name] = describe_set(asked.problems, system) | {"samples": asked.identity}
            engine = _engine_folder(folder, asked) / "engine.json"  # what an engine in its own process says of itself
            described[asked.name] |= {"engine": read_json(engine)} if engine.is_file() else {}
        how = {"sampling": settings | {"batch_size": sampling.batch_size, "ranks": world}, "sets": before | described}
        write_json(path, {**record, **how})
        write_metrics(folder, identity, by_set)
        for asked in sets:
            shutil.rmtree(folder / f"engine-{asked.name}", ignore_errors=True)
            for partial in find_partial_files(folder, asked.name):
                partial.unlink()
    barrier()


@dataclass(frozen=True, kw_only=True)
class _AskedSet:
    """An evaluation set as it is put to a student."""

    name: str
    problems: Sequence[Problem]
    prompts: Sequence[list[int]]
    identity: str
    """Hash of what its samples depend on."""

    @staticmethod
    def make(
        name: str, problems: Sequence[Problem], backend: Backend, settings: Mapping[str, Any], system: str | None
    ) -> "_AskedSet":
        prompts = [backend.encode_prompt(make_prompt(problem, system)) for problem in problems]
        keys = [problem["problem_id"] for problem in problems]
        identity = identity_hash({**settings, "prompts": prompts, "keys": keys, "of": backend.identity})
        return _AskedSet(name=name, problems=problems, prompts=prompts, identity=identity)


def _engine_folder(folder: Path, asked: _AskedSet) -> Path:
    """Name the folder where an engine may keep what it likes, as long as the set is not evaluated."""
    return folder / f"engine-{asked.name}" / asked.identity


def _draw_samples(
    backend: Backend,
    asked: _AskedSet,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    rank: int,
    world: int,
    label: str,
) -> None:
    """Draw what is missing of a rank's share into its growing file."""
    share = slice(rank, None, world) if backend.every_rank else slice(None if rank == 0 else 0)
    prompts, keys = asked.prompts[share], [problem["problem_id"] for problem in asked.problems[share]]
    there = gather_samples(folder, asked.name, asked.identity)
    done = {(key, number) for key in keys for number in range(settings["samples"]) if (key, number) in there}
    total = len(keys) * settings["samples"]
    if done:
        logger.info("%s: %s of %s samples are there", asked.name, f"{len(done):,}", f"{total:,}")
    if len(done) == total:
        return
    with (
        open_samples(folder, asked.name, asked.identity, rank) as file,
        show_progress(label, total, "samples", initial=len(done)) as progress,
    ):
        for batch in backend.generate(prompts, keys, _engine_folder(folder, asked), **settings, done=done):
            for sample in batch:
                file.add(dataclasses.asdict(sample))
            progress.update(len(batch))


def check_records(records: Iterable[Record], problems: Sequence[Problem], checker: Checker) -> list[Record]:
    """Give each sample its verdict; returns them in the order of the problems.

    records: with `Sample`'s fields; whatever else they hold is left out.
    """
    rows = {problem["problem_id"]: problem for problem in problems}
    order = {problem_id: i for i, problem_id in enumerate(rows)}
    in_order = sorted(records, key=lambda record: (order[record["problem_id"]], record["sample"]))
    verdicts = checker.check([make_answer(rows[record["problem_id"]], record["text"]) for record in in_order])
    return [
        {name: record[name] for name in SAMPLE_FIELDS}
        | {"boxed": find_boxed(record["text"]) is not None}
        | dataclasses.asdict(verdict)
        for record, verdict in zip(in_order, verdicts, strict=True)
    ]


def describe_set(problems: Sequence[Problem], system: str | None) -> dict[str, Any]:
    """Describe a set for evaluation.json: how many problems, which prompts' versions, and a hash of all rows."""
    own = f"system turn {system!r}" if system else "the problem as it stands"
    named = [
        problem.get("prompt") or ("messages of the row" if problem.get("messages") else own) for problem in problems
    ]
    return {
        "problems": len(problems),
        "prompts": {prompt: named.count(prompt) for prompt in dict.fromkeys(named)},
        "rows": identity_hash({"problems": list(problems)}),
    }

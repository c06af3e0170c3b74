"""Evaluation of students: for each set of problems find or draw samples, find or make verdicts, summarise."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from lark.answers.checker import Checker
from lark.common.cache import file_hash, hold_lock, nan_to_none, read_json, remove_path, write_json
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.ranks import Plan, barrier, is_main
from lark.evaluation.metrics import check_pass_at, summarise_samples
from lark.evaluation.samples import AskedSet, ask_set, complete_samples, draw_samples
from lark.evaluation.verdicts import check_samples, locate_verdicts
from lark.generation.backends import ENGINES, Backend, TransformersBackend, VllmBackend
from lark.generation.transformers_backend import check_sampling
from lark.student.chat import Chat
from lark.student.distributed import Parallelism
from lark.student.student import Student
from lark.tasks.problems import make_answer, make_prompt
from lark.tasks.task import Task

Problem = dict[str, Any]


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
    """GPUs over which one vLLM divides the student; None: all, or one where several ranks each start a vLLM."""
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

    def make_backend(self, student: Student, chat: Chat, **weights: Any) -> Backend:
        """Put the student behind the engine that is set; further arguments are those of `Backend`."""
        if self.engine == "vllm":
            own = {"python": self.vllm_python, "gpus": self.vllm_gpus, "memory": self.vllm_memory}
            return VllmBackend(student, chat, **weights, **own)
        return TransformersBackend(student, chat, **weights, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates students alike, on the sets of a task. All ranks of a job call its methods; rank 0 decides and writes.

    What is there of the same content is never made again: samples are kept by student, prompts and sampling, verdicts
    by checker and right answers. Both are written once, under names of all they depend on, and read without a lock.

    Raises LarkError for a set without problems, and for a right answer that the checker cannot read.
    """

    task: Task
    chat: Chat
    problems: Mapping[str, Sequence[Problem]]
    """Rows as `read_problems` gives them, by the name of the set."""
    sampling: Sampling
    checker: Checker
    seed: int
    folder: Path
    """The folder of all samples, logs/samples."""
    make_trainer: Callable[[], Trainer]
    """Makes the Trainer that launches the job's ranks, where no pass and no training has done so."""
    plan: Plan | None = None
    """Tells ranks what rank 0 found; None: there is one rank."""

    def __post_init__(self) -> None:
        for name, rows in self.problems.items():
            if not rows:
                raise LarkError(f"task.eval: {name} holds no problem to evaluate on; set it to a file with rows")
            assert len({row["problem_id"] for row in rows}) == len(rows), "problem ids are distinct"
            self.checker.validate([make_answer(row, "") for row in rows])  # before anything is generated

    @cached_property
    def prompts(self) -> dict[str, list[list[int]]]:
        """Return the token ids of every prompt, by set."""
        return {
            name: [self.chat.encode_prompt(make_prompt(row, self.task.system)) for row in rows]
            for name, rows in self.problems.items()
        }

    def ask_sets(self, backend: Backend) -> list[AskedSet]:
        """Find where the student's samples of each set are, or will be."""
        names = ("samples", "temperature", "top_p")
        sampling = {name: getattr(self.sampling, name) for name in names}
        sampling |= {"max_new_tokens": self.task.max_new_tokens, "seed": self.seed}
        return [
            ask_set(name, rows, self.prompts[name], backend, sampling=sampling, samples=self.folder)
            for name, rows in self.problems.items()
        ]

    def is_done(self, backend: Backend) -> bool:
        """Tell whether nothing is left to sample or to check."""
        return all(
            asked.is_drawn and locate_verdicts(asked, self.checker)[0].exists() for asked in self.ask_sets(backend)
        )

    def evaluate(self, backend: Backend, label: str) -> dict[str, Any]:
        """Evaluate a student. label: tells it from the job's others, on progress lines and in plan.json.

        Returns, on rank 0 (elsewhere nothing), by set: metrics; intervals, of avg@k; levels, both by level where a set
        has levels; per_problem, each problem's avg@k; answers, the hashes under which samples and verdicts are kept;
        and sampling: how the samples were drawn.
        """
        sets = self.ask_sets(backend)
        self._draw_missing(backend, sets, label)
        figures: dict[str, Any] = {}
        if is_main():
            figures = nan_to_none(self._summarise(sets))  # as summary.json and metrics.json have them
        barrier()
        return figures

    def _draw_missing(self, backend: Backend, sets: Sequence[AskedSet], label: str) -> None:
        """Draw the samples that are not there, under the locks of their folders."""
        places = {asked.folder: asked for asked in sets}  # two sets may hold the same problems
        with ExitStack() as held:
            if is_main():  # in one order, so that two jobs cannot wait for each other
                for folder in sorted(place for place, asked in places.items() if not asked.is_drawn):
                    held.enter_context(hold_lock(folder))
            missing = [folder.name for folder, asked in places.items() if not asked.is_drawn]
            if self.plan is not None:
                missing = self.plan.decide(f"samples of {label}", missing)
            if not missing:
                return
            trainer = self._start_ranks()
            rank, world = trainer.global_rank, trainer.world_size
            backend.start(Parallelism(trainer))
            drawn = [asked for folder, asked in places.items() if folder.name in missing]
            for asked in drawn:
                draw_samples(backend, asked, rank=rank, world=world, label=f"{label} {asked.name}")
            backend.finish()
            barrier()
            about = backend.describe() | {"batch_size": self.sampling.batch_size, "ranks": world}
            for asked in drawn if is_main() else ():
                complete_samples(asked, about, self.task.system)
                logger.info("%s: sampled %s into %s", label, asked.name, asked.folder)

    def _start_ranks(self) -> Trainer:
        """Start the job's other ranks, if it has any and they do not run yet."""
        trainer = self.make_trainer()
        if trainer.world_size > 1:
            loader: Any = DataLoader([0] * trainer.world_size)  # type: ignore[arg-type]
            trainer.predict(_EmptyModule(), loader, return_predictions=False)
        return trainer

    def _summarise(self, sets: Sequence[AskedSet]) -> dict[str, Any]:
        """Check what is not checked yet, and compute the figures of every set."""
        figures: dict[str, Any] = {
            name: {} for name in ("metrics", "intervals", "levels", "per_problem", "answers", "sampling")
        }
        for asked in sets:
            answers = check_samples(asked, self.checker)
            found = summarise_samples(answers, asked.problems, pass_at=self.sampling.pass_at, kind=self.checker.kind)
            figures["metrics"][asked.name], figures["intervals"][asked.name] = found["metrics"], found["interval"]
            if found["levels"]:
                figures["levels"][asked.name] = found["levels"]
            figures["per_problem"][asked.name] = found["per_problem"]
            verdicts = locate_verdicts(asked, self.checker)[0].stem
            figures["answers"][asked.name] = {"samples": asked.folder.name, "verdicts": verdicts}
            drawn = read_json(asked.folder / "manifest.json")
            how = {key: value for key, value in asked.identity["student"].items() if key != "weights"}
            how |= asked.identity["sampling"] | {key: drawn[key] for key in ("stops", "batch_size", "ranks", "device")}
            how |= {"checker": self.checker.kind, "pattern": self.checker.pattern}
            figures["sampling"] = how | {"pass_at": list(self.sampling.pass_at)}
        return figures

    def write_figures(self, folder: Path, figures: Mapping[str, Any]) -> None:
        """Write metrics.json into a folder of a run, and link there each set's samples as samples/<set>."""
        write_json(folder / "metrics.json", figures)
        for name, kept in figures["answers"].items():
            link = remove_path(folder / "samples" / name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(self.folder / kept["samples"], link.parent), target_is_directory=True)

    def list_files(self, figures: Mapping[str, Any]) -> dict[str, Path]:
        """List the files of samples and verdicts that figures were computed from, by names that tell sets apart."""
        files: dict[str, Path] = {}
        for name, kept in figures["answers"].items():
            folder = self.folder / kept["samples"]
            files[f"samples-{name}.jsonl"] = folder / "samples.jsonl"
            files[f"verdicts-{name}.json"] = folder / "verdicts" / f"{kept['verdicts']}.json"
        return files


class _EmptyModule(LightningModule):
    """Stand in for a model: what matters is that a Trainer launches its ranks before the first pass."""

    def configure_model(self) -> None:
        """Divide nothing; the strategy of trainer=fsdp insists on this method."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        pass


def identify_weights(student: Student, arm: Path | None) -> dict[str, Any]:
    """Tell these weights from others: by the student's own, and the arm in which it was trained, if any.

    trained.json holds the curve and the seconds it took: no two trainings leave the same.
    """
    if arm is None:
        return dict(student.identity())
    return student.identity() | {"arm": arm.name, "trained": file_hash(arm / "trained.json")[:16]}

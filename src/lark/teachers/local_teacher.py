"""A teacher that runs here, through transformers or vLLM: its identity, its trajectories."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from lark.common.log import logger
from lark.generation.transformers_backend import Sample, generate_samples
from lark.generation.vllm_backend import find_vllm_source, generate_with_vllm
from lark.student.context_length import read_max_positions
from lark.student.memory import release_memory
from lark.student.student import SHIPPED, Student
from lark.teachers.teacher import Teacher


class LocalTeacher:
    """A teacher that runs here: its identity before anything is loaded, its trajectories in batches."""

    def __init__(self, teacher: Teacher) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.teacher = teacher
        self.student = make_student(teacher)
        self.chat = self.student.load_chat()
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
    ) -> Iterator[list[Sample]]:
        """Yield trajectories of prompts by problem id, as they end; without those `done`.

        folder: for what vLLM leaves, if it is the engine.
        Prompts that leave the model no room for max_new_tokens are left out: the caller counts what is missing.
        """
        teacher, limit = self.teacher, read_max_positions(self.student)
        ids = {problem: self.chat.encode_prompt(messages) for problem, messages in prompts.items()}
        fitting = {problem: row for problem, row in ids.items() if len(row) + teacher.max_new_tokens <= limit}
        if len(fitting) < len(ids):
            logger.warning(
                f"teacher {teacher.name}: {len(ids) - len(fitting)} of {len(ids)} prompts leave its {limit:,} "
                f"positions no room for max_new_tokens={teacher.max_new_tokens} and are left out; lower it to keep them"
            )
        if all((problem, n) in done for problem in fitting for n in range(teacher.samples)):
            return
        # Some templates (DeepSeek-R1's) open the thought in the prompt: it belongs to the trajectory all the same.
        opens_thought = {
            problem
            for problem, row in fitting.items()
            if str(self.chat.tokenizer.decode(row[-8:])).rstrip().endswith("<think>")
        }
        settings: dict[str, Any] = {
            "samples": teacher.samples,
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "max_new_tokens": teacher.max_new_tokens,
            "seed": teacher.seed,
            "stop_ids": self._find_stop_ids(),
            "done": done,
        }
        for batch in self._generate(folder, list(fitting.values()), list(fitting), settings):
            yield [
                dataclasses.replace(one, text="<think>\n" + one.text) if one.problem_id in opens_thought else one
                for one in batch
            ]

    def _generate(
        self, folder: Path, prompts: list[list[int]], keys: list[str], settings: dict[str, Any]
    ) -> Iterator[list[Sample]]:
        teacher, tokenizer = self.teacher, self.chat.tokenizer
        if teacher.engine == "vllm":
            source = find_vllm_source(self.student)
            yield from generate_with_vllm(folder, tokenizer, prompts, keys, **source, dtype=teacher.dtype, **settings)
            return
        logger.info("teacher %s: %s on %s in %s", teacher.name, teacher.model, self.device, self.dtype)
        model: Any = self.student.load_model(self.dtype)
        model.to(self.device)
        yield from generate_samples(model, tokenizer, prompts, keys, batch_size=teacher.batch_size, **settings)
        del model
        release_memory(self.device)

    def _find_stop_ids(self) -> list[int]:
        """Find what ends a trajectory: the tokenizer's end token, those of the model's generation config, and the end
        of turn of a template that is not the model's own.
        """
        ends: list[Any] = [self.chat.tokenizer.eos_token_id]
        source, keywords = self.student.pretrained_arguments()
        if "gguf_file" not in keywords:
            with contextlib.suppress(OSError):  # a model need not bring one
                ends.append(GenerationConfig.from_pretrained(source, **keywords).eos_token_id)
        if self.student.template != "own":
            ends.append(self.chat.end_id)
        flat = [token for end in ends for token in (end if isinstance(end, list) else [end])]
        return sorted({token for token in flat if token is not None})


def make_student(teacher: Teacher) -> Student:
    """Make the model that runs here, as lark.student.student loads it."""
    shipped = teacher.model.startswith(SHIPPED)
    is_path = teacher.model.startswith((SHIPPED, ".", "/", "~")) or teacher.model.endswith(".gguf")
    path = identifier = revision = None
    if is_path or Path(teacher.model).exists():
        path = teacher.model if shipped else str(Path(teacher.model).expanduser())
    else:
        identifier, _, revision = teacher.model.partition("@")
    return Student(
        name=teacher.name,
        id=identifier,
        revision=None if identifier is None else revision or "main",
        path=path,
        dtype=teacher.dtype,
        attention=teacher.attention,
        template=teacher.template or ("chatml" if shipped else "own"),
        adapter=teacher.adapter,
    )

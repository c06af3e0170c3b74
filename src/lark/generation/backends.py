"""Students that answer prompts: by transformers in this process, or by vLLM in one of its own."""

import platform
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lark.common.ranks import world_size
from lark.common.versions import library_version
from lark.generation.transformers_backend import Sample, generate_samples
from lark.student.chat import Chat
from lark.student.distributed import Parallelism
from lark.student.student import Student

ENGINES = ("transformers", "vllm")
_PACKAGES = ("lark-select", "torch", "transformers", "tokenizers", "peft", "math-verify", "reasoning-gym")


class Backend:
    """Hold a student that can be asked; a subclass says by which engine."""

    ranks = 1
    """Ranks whose devices one engine takes: the first of each so many asks for all of them."""

    def __init__(
        self, student: Student, chat: Chat, *, trained: Path | None, weights: dict[str, Any], device: torch.device
    ) -> None:
        """Take a student; its weights are read when `generate` first needs them.

        trained: the checkpoint of an arm that trained this student; None: the student as it is.
        weights: what tells these weights from others.
        """
        self.student, self.chat, self.trained, self.weights, self.device = student, chat, trained, weights, device
        self.dtype = student.resolve_dtype(device)
        self.stop_ids = find_stop_ids(chat)

    @property
    def identity(self) -> dict[str, Any]:
        """Return what samples depend on besides prompts and settings."""
        return {"weights": self.weights, "dtype": _dtype_name(self.dtype)}

    def start(self, parallelism: Parallelism) -> None:
        """Prepare to be asked; all ranks of the job call it."""

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[str], folder: Path, **settings: Any
    ) -> Iterator[list[Sample]]:
        """Yield samples as they come. folder: to work in. settings: those of `generate_samples`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until no other rank needs this one; all ranks that called `start` call it."""

    def describe(self) -> dict[str, Any]:
        """Describe for a manifest who answered, and where."""
        student, device = self.student, self.device
        return {
            "model": {"name": student.name, "id": student.id, "path": student.path, "end_token": student.end_token},
            "chat": {"template_name": student.template} | self.chat.prompt_identity,
            "stops": [str(self.chat.tokenizer.convert_ids_to_tokens(token)) for token in self.stop_ids],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "packages": {"python": platform.python_version()} | {name: library_version(name) for name in _PACKAGES},
        }


class TransformersBackend(Backend):
    """Ask the student in this process, whole on each rank, or divided over all of them under trainer=fsdp."""

    def __init__(self, *student: Any, batch_size: int | None, **weights: Any) -> None:
        super().__init__(*student, **weights)
        self.batch_size = batch_size
        self.parallelism = Parallelism()

    @property
    def identity(self) -> dict[str, Any]:
        own = {"engine": "transformers", "attention": self.student.attention, "device": self.device.type}
        return super().identity | own

    @cached_property
    def model(self) -> torch.nn.Module:
        student, trained = self.student, self.trained
        loaded: Any = student.load_model(self.dtype) if trained is None else student.load_trained(trained, self.dtype)
        loaded = loaded.eval().requires_grad_(False)
        self.parallelism.divide_layers(loaded)  # while it is on the CPU: no device holds all of it
        return loaded.to(self.device)

    def start(self, parallelism: Parallelism) -> None:
        self.parallelism = parallelism

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[str], folder: Path, **settings: Any
    ) -> Iterator[list[Sample]]:
        return generate_samples(self.model, self.chat.tokenizer, prompts, keys, **settings, batch_size=self.batch_size)

    def finish(self) -> None:
        if self.parallelism.is_divided:
            _ = self.model  # a rank without a share of the problems takes part in the others' forward passes
            self.parallelism.finish_forward_passes()


class VllmBackend(Backend):
    """Ask the student in vLLM (lark.generation.vllm_backend): one engine for all GPUs, or one for each rank's own.

    Raises LarkError for weights that vLLM does not read.
    """

    def __init__(self, *student: Any, python: str | None, gpus: int | None, memory: float, **weights: Any) -> None:
        from lark.generation.vllm_backend import find_vllm_source

        super().__init__(*student, **weights)
        self.source = find_vllm_source(self.student, self.trained)
        self.python, self.gpus, self.memory = python, gpus, memory

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"engine": "vllm"}

    @property
    def ranks(self) -> int:  # type: ignore[override]
        return 1 if world_size() == 1 else self.gpus or 1

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[str], folder: Path, **settings: Any
    ) -> Iterator[list[Sample]]:
        from lark.generation.vllm_backend import generate_with_vllm

        own, first = world_size() > 1 and self.device.type == "cuda", self.device.index or 0
        return generate_with_vllm(
            folder,
            self.chat.tokenizer,
            prompts,
            keys,
            **self.source,
            **settings,
            dtype=_dtype_name(self.dtype),
            python=self.python,
            devices=range(first, first + self.ranks) if own else None,
            tensor_parallel_size=self.ranks if own else self.gpus,
            gpu_memory_utilization=self.memory,
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_stop_ids(chat: Chat) -> list[int]:
    """Find the tokens that end an answer: the end-of-turn token, which training teaches, and those that an untrained
    student may know: the tokenizer's own end token, and the template's where model.end_token takes its place.
    """
    own = chat.tokenizer.eos_token_id
    ends = {chat.end_id, *([own] if isinstance(own, int) else own or [])}
    if chat.own_end is not None:
        ends.add(chat.tokenizer.convert_tokens_to_ids(chat.own_end))  # type: ignore[arg-type]
    return sorted(ends)

"""Students that answer prompts: by transformers in this process, or by vLLM in one of its own."""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lark.generation.transformers_backend import Sample, generate_samples
from lark.student.chat import Chat
from lark.student.student import Student

ENGINES = ("transformers", "vllm")
_PACKAGES = ("lark-select", "torch", "transformers", "tokenizers", "peft", "math-verify", "reasoning-gym")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Hold a student that can be asked."""

    generate: Callable[..., Iterator[list[Sample]]]
    """Prompts, keys, a folder to work in and the settings of `generate_samples` -> samples, as they come."""
    encode_prompt: Callable[[list[dict[str, str]]], list[int]]
    """Messages of a prompt -> token ids, generation prompt included."""
    stop_ids: list[int]
    """Tokens that end an answer."""
    identity: dict[str, Any]
    """What samples depend on besides prompts and settings: weights, dtype, kind of device, engine."""
    every_rank: bool = True
    """Whether every rank asks the student for its share of the problems, or rank 0 for all of them."""


def make_transformers_backend(
    student: Student,
    chat: Chat,
    *,
    trained: Path | None,
    weights: dict[str, Any],
    device: torch.device,
    batch_size: int | None,
) -> Backend:
    """Run the student in this process (lark.generation.transformers_backend); it loads when the first sample is wanted.

    trained: the checkpoint of an arm that trained this student; None: the student as it is.
    weights: what tells these weights from others.
    """
    dtype = student.resolve_dtype(device)

    @cache
    def load_model() -> torch.nn.Module:
        loaded: Any = student.load_model(dtype) if trained is None else student.load_trained(trained, dtype)
        return loaded.to(device).eval()

    def generate(
        prompts: Sequence[Sequence[int]], keys: Sequence[str], folder: Path, **settings: Any
    ) -> Iterator[list[Sample]]:
        return generate_samples(load_model(), chat.tokenizer, prompts, keys, **settings, batch_size=batch_size)

    identity = {"engine": "transformers", "weights": weights, "dtype": _dtype_name(dtype)}
    return Backend(
        generate=generate,
        encode_prompt=chat.encode_prompt,
        stop_ids=find_stop_ids(chat),
        identity=identity | {"attention": student.attention, "device": device.type},
    )


def make_vllm_backend(
    student: Student,
    chat: Chat,
    *,
    trained: Path | None,
    weights: dict[str, Any],
    device: torch.device,
    python: str | None,
    tensor_parallel_size: int | None,
    gpu_memory_utilization: float,
) -> Backend:
    """Run the student in vLLM (lark.generation.vllm_backend), which rank 0 starts for every set.

    Raises:
        LarkError: vLLM does not read weights of this kind.
    """
    from lark.generation.vllm_backend import find_vllm_source, generate_with_vllm

    source, dtype = find_vllm_source(student, trained), _dtype_name(student.resolve_dtype(device))

    def generate(
        prompts: Sequence[Sequence[int]], keys: Sequence[str], folder: Path, **settings: Any
    ) -> Iterator[list[Sample]]:
        return generate_with_vllm(
            folder,
            chat.tokenizer,
            prompts,
            keys,
            **source,
            **settings,
            dtype=dtype,
            python=python,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
        )

    return Backend(
        generate=generate,
        encode_prompt=chat.encode_prompt,
        stop_ids=find_stop_ids(chat),
        identity={"engine": "vllm", "weights": weights, "dtype": dtype},
        every_rank=False,
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


def describe_backend(backend: Backend, student: Student, chat: Chat, device: torch.device) -> dict[str, Any]:
    """Describe for evaluation.json who answered, and where."""
    return {
        "model": {"name": student.name, "id": student.id, "path": student.path, "end_token": student.end_token}
        | backend.identity["weights"],
        "engine": {key: value for key, value in backend.identity.items() if key != "weights"},
        "chat": {"template_name": student.template} | chat.prompt_identity,
        "stops": [str(chat.tokenizer.convert_ids_to_tokens(token)) for token in backend.stop_ids],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version()} | dict(_list_versions()),
    }


def _list_versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that was not installed
            continue

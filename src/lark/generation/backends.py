"""What answers prompts: a student in an engine, transformers in this process or vLLM in one of its own."""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lark.common.errors import LarkError
from lark.common.ranks import say
from lark.generation.transformers_backend import Sample, generate_samples
from lark.student.chat import Chat
from lark.student.student import Student

ENGINES = ("transformers", "vllm")
_PACKAGES = ("lark-select", "torch", "transformers", "tokenizers", "peft", "math-verify", "reasoning-gym")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A student that can be asked."""

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
    notes: list[str] = field(default_factory=list)
    """What it has said of its choices, such as the batch size, for evaluation.json."""

    def say(self, text: str) -> None:
        """Prints a line, unless one that differs in remarks between brackets alone has been printed, and notes it."""
        if text.partition("(")[0] not in (note.partition("(")[0] for note in self.notes):
            say(text)
            self.notes.append(text)


def transformers_engine(
    student: Student,
    chat: Chat,
    *,
    trained: Path | None,
    weights: dict[str, Any],
    device: torch.device,
    batch_size: int | None,
) -> Engine:
    """The student in this process (lark.generation.transformers_backend), loaded when the first sample is wanted.

    trained: the checkpoint of an arm that trained this student; None: the student as it is.
    weights: what tells these weights from others.
    """
    dtype = student.resolve_dtype(device)

    @cache
    def model() -> torch.nn.Module:
        loaded: Any = student.load_model(dtype) if trained is None else student.load_trained(trained, dtype)
        return loaded.to(device).eval()

    def generate(
        prompts: Sequence[Sequence[int]], keys: Sequence[str], work: Path, **settings: Any
    ) -> Iterator[list[Sample]]:
        return generate_samples(
            model(), chat.tokenizer, prompts, keys, **settings, batch_size=batch_size, say=engine.say
        )

    engine = Engine(
        generate=generate,
        encode_prompt=chat.encode_prompt,
        stop_ids=stop_ids(chat),
        identity=_identity("transformers", weights, dtype) | {"attention": student.attention, "device": device.type},
    )
    return engine


def vllm_engine(
    student: Student,
    chat: Chat,
    *,
    trained: Path | None,
    weights: dict[str, Any],
    device: torch.device,
    python: str | None,
    tensor_parallel_size: int | None,
    gpu_memory_utilization: float,
) -> Engine:
    """The student in vLLM (lark.generation.vllm_backend), which rank 0 starts for every set.

    Raises:
        LarkError: vLLM does not read weights of this kind.
    """
    from lark.generation.vllm_backend import generate_with_vllm, vllm_source

    source, dtype = vllm_source(student, trained), student.resolve_dtype(device)

    def generate(
        prompts: Sequence[Sequence[int]], keys: Sequence[str], work: Path, **settings: Any
    ) -> Iterator[list[Sample]]:
        try:
            yield from generate_with_vllm(
                work,
                chat.tokenizer,
                prompts,
                keys,
                **source,
                **settings,
                dtype=_name(dtype),
                python=python,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                say=engine.say,
            )
        except RuntimeError as error:  # of vLLM's process: what it printed tells a user more than our traceback
            raise LarkError(f"evaluation.engine=vllm: {error}") from error

    engine = Engine(
        generate=generate,
        encode_prompt=chat.encode_prompt,
        stop_ids=stop_ids(chat),
        identity=_identity("vllm", weights, dtype),
        every_rank=False,
    )
    return engine


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _identity(engine: str, weights: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {"engine": engine, "weights": weights, "dtype": _name(dtype)}


def stop_ids(chat: Chat) -> list[int]:
    """What ends an answer: the end-of-turn token, which training teaches, and what an untrained student may know: the
    tokenizer's own end token, and the template's where model.end_token takes its place.
    """
    own = chat.tokenizer.eos_token_id
    ends = {chat.end_id, *([own] if isinstance(own, int) else own or [])}
    if chat.own_end is not None:
        ends.add(chat.tokenizer.convert_tokens_to_ids(chat.own_end))  # type: ignore[arg-type]
    return sorted(ends)


def record_of(engine: Engine, student: Student, chat: Chat, device: torch.device) -> dict[str, Any]:
    """What evaluation.json says of who answered, and where."""
    return {
        "model": {"name": student.name, "id": student.id, "path": student.path, "end_token": student.end_token}
        | engine.identity["weights"],
        "engine": {key: value for key, value in engine.identity.items() if key != "weights"},
        "chat": {"template_name": student.template} | chat.prompt_identity,
        "stops": [str(chat.tokenizer.convert_ids_to_tokens(token)) for token in engine.stop_ids],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version()} | dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that was not installed
            continue

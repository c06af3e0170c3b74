"""Estimate what a run takes before anything is computed: tokens, FLOPs, seconds, memory and disk of each stage.

Work is counted: products of matrices, and the keys and values that sampling reads. How fast a device does it comes from
earlier runs, or from what its maker states times the share that is usually reached.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SAMPLED_TOGETHER = 64
STATISTICS_BYTES = 250  # of a trajectory: some 30 columns
ANSWER_BYTES = 8  # of a sampled token: its text and what stands beside it


@dataclass(frozen=True, kw_only=True)
class Device:
    """Describes a device: FLOP/s and bytes/s of memory that are reached, and where these come from."""

    name: str
    flops: float
    bandwidth: float
    basis: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A student in numbers. products: parameters that each token is multiplied by. width: of attention, all heads.
    cache_bytes: keys and values of a token, all layers. is_full: every parameter is trained.
    """

    parameters: int
    products: int
    trained: int
    layers: int
    width: int
    cache_bytes: int
    weight_bytes: int
    is_full: bool
    recomputes: bool

    def count_forward(self, tokens: float, context: float) -> float:
        """Count the FLOPs of a forward pass over `tokens` in rows of `context` tokens, half of which each one sees."""
        return tokens * (2 * self.products + 2 * self.layers * self.width * context)

    def count_training(self, tokens: float, context: float) -> float:
        """Count forward, again where activations are recomputed, and the gradients of inputs and of weights."""
        times = 1 + self.recomputes + 1 + self.is_full
        return times * self.count_forward(tokens, context)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do. row_tokens: mean length of a row, prompt included. steps: optimizer steps of an arm.
    held_out_rows: read for one arm's curve in all. sampled: answers of one student.
    """

    passes: dict[str, tuple[float, float]]
    """By name, how often a pass reads each token, forwards and backwards."""
    rows: int
    row_tokens: float
    arms: int
    steps: int
    batch_size: int
    held_out_rows: int
    sampled: int
    answer_tokens: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A line of the bill. seconds: of one device. memory: bytes a device needs at least. disk: bytes that stay."""

    name: str
    kind: str
    """scoring | training | sampling: which rate it goes by."""
    tokens: float
    flops: float
    seconds: float
    memory: float
    disk: float = 0


def estimate_stages(
    shape: Shape, work: Work, device: Device, rates: Mapping[str, float], *, ranks: int = 1
) -> list[Stage]:
    """Estimate the stages of a run.

    rates: measured ones by kind, in FLOP/s of one device (sampling: tokens/s); others follow from the device. ranks:
    over how many fsdp divides the student.
    """
    stages = []

    def add(name: str, kind: str, tokens: float, flops: float, memory: float, disk: float = 0) -> None:
        seconds = flops / rates.get(kind, device.flops)
        if kind == "sampling":
            # Each step reads the weights once for all answers, and the keys and values of each.
            moved = tokens * (shape.weight_bytes / SAMPLED_TOGETHER + shape.cache_bytes * work.answer_tokens / 2)
            seconds = tokens / rates[kind] if kind in rates else max(moved / device.bandwidth, flops / device.flops)
        stages.append(
            Stage(name=name, kind=kind, tokens=tokens, flops=flops, seconds=seconds, memory=memory, disk=disk)
        )

    # Choosing
    tokens = work.rows * work.row_tokens
    for name, (forwards, backwards) in work.passes.items():
        flops = shape.count_forward(tokens, work.row_tokens) * (forwards + (1 + shape.is_full) * backwards)
        memory = shape.weight_bytes + (4 * shape.trained if backwards else 0)
        add(name.replace("_", " "), "scoring", tokens * forwards, flops, memory, work.rows * STATISTICS_BYTES)
    # Training: float32 weights where all are trained; a gradient and AdamW's two moments of each that is
    if work.arms:
        weights = 4 * shape.parameters if shape.is_full else shape.weight_bytes
        memory = (weights + 3 * 4 * shape.trained) / ranks
        drawn = work.arms * work.steps * work.batch_size * work.row_tokens
        flops = shape.count_training(drawn, work.row_tokens)
        add(f"training, {work.arms} arms", "training", drawn, flops, memory, work.arms * 4 * shape.trained)
        read = work.arms * work.held_out_rows * work.row_tokens
        add("held-out loss", "training", read, shape.count_forward(read, work.row_tokens), memory)
    # Evaluating, the untrained student too
    if work.sampled:
        answers = (work.arms + 1) * work.sampled * work.answer_tokens
        flops = shape.count_forward(answers, work.answer_tokens)
        memory = shape.weight_bytes + SAMPLED_TOGETHER * shape.cache_bytes * work.answer_tokens
        add(f"answers, {work.arms + 1} students", "sampling", answers, flops, memory, answers * ANSWER_BYTES)
    return stages

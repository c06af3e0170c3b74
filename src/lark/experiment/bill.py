"""The bill of a run: what it will take, printed before and compared afterwards with what it took."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lark.common.cache import identity_hash, read_json, write_json
from lark.common.errors import LarkError
from lark.common.log import announce, logger
from lark.comparison.printing import make_console, make_table
from lark.experiment.cost import Device, Shape, Stage, Work, estimate_stages
from lark.student.model_parts import get_base_model
from lark.student.student import Student
from lark.training.datamodule import TrajectoryDataModule

DEVICES = {
    "a100": (312e12, 2.0e12),
    "h100": (989e12, 3.35e12),
    "h200": (989e12, 4.8e12),
    "b200": (2250e12, 8.0e12),
    "l40s": (362e12, 0.86e12),
    "rtx 4090": (165e12, 1.0e12),
}
"""Makers' bfloat16 FLOP/s (dense) and bytes/s of memory."""
REACHED_FLOPS, REACHED_BANDWIDTH = 0.4, 0.5
CPU_BANDWIDTH = 2e10
SECONDS_SAID = 600  # a run that takes longer is announced with what it will take


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """Assumptions of the bill."""

    device: str | None = None
    """Reckon for a100 | h100 | h200 | b200 | l40s | rtx 4090; None: for this machine's."""
    answer_tokens: int | None = None
    """Mean length of the students' answers; None: that of the pool's trajectories."""

    def __post_init__(self) -> None:
        if self.device is not None and self.device not in DEVICES:
            raise LarkError(f"cost.device={self.device} is unknown; set it to one of {', '.join(DEVICES)}, or null")


@dataclass(frozen=True, kw_only=True)
class Bill:
    stages: tuple[Stage, ...]
    device: Device
    devices: int
    measured: tuple[str, ...]
    """Kinds of stages whose rate was measured by earlier runs."""

    def to_record(self) -> dict[str, Any]:
        """Return the bill as summary.json has it."""
        stages = [vars(stage) for stage in self.stages]
        return {"stages": stages, "device": vars(self.device), "devices": self.devices, "measured": list(self.measured)}

    def total(self, kind: str) -> float:
        """Sum the device-seconds of the stages of a kind."""
        return sum(stage.seconds for stage in self.stages if stage.kind == kind)


def read_shape(student: Student, device: torch.device) -> Shape:
    """Read a student's shape from its config.json; no weights are read or made."""
    config = student.load_config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=student.trust_remote_code)
        if student.lora is not None:
            from peft import get_peft_model

            model = get_peft_model(model, student.lora_config())
    base = get_base_model(model)
    linear = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in name]
    every = sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = student.resolve_dtype(device).itemsize
    return Shape(
        parameters=every,
        products=sum(m.weight.numel() for m in linear),
        trained=trained,
        layers=text.num_hidden_layers,
        width=text.num_attention_heads * head,
        cache_bytes=2 * text.num_hidden_layers * heads * head * size,
        weight_bytes=every * size,
        is_full=student.lora is None,
        recomputes=student.gradient_checkpointing,
    )


def find_device(settings: CostSettings, device: torch.device) -> Device:
    """Find the rates to reckon with: of the device that is set, else of this machine's."""
    name = settings.device
    if name is None and device.type == "cuda":
        found = torch.cuda.get_device_name(device).lower()
        name = next((known for known in DEVICES if known in found), "h100")
    if name is None:
        flops = measure_products(device)
        return Device(
            name=device.type,
            flops=flops,
            bandwidth=CPU_BANDWIDTH,
            basis=f"{REACHED_FLOPS:.0%} of this CPU's products, {flops / 1e9:,.0f} GFLOP/s",
        )
    flops, bandwidth = DEVICES[name]
    basis = (
        f"{REACHED_FLOPS:.0%} of {flops / 1e12:,.0f} TFLOP/s, {REACHED_BANDWIDTH:.0%} of {bandwidth / 1e12:.2f} TB/s"
    )
    return Device(name=name, flops=REACHED_FLOPS * flops, bandwidth=REACHED_BANDWIDTH * bandwidth, basis=basis)


def measure_products(device: torch.device) -> float:
    """Measure a device's float32 products, FLOP/s, at the size of a small student's."""
    a, b = torch.rand(1024, 512, device=device), torch.rand(512, 1024, device=device)
    torch.mm(a, b)
    start, times = time.monotonic(), 0
    while time.monotonic() - start < 0.05:
        torch.mm(a, b)
        times += 1
    return REACHED_FLOPS * times * 2 * 1024 * 512 * 1024 / (time.monotonic() - start)


def make_bill(
    data: TrajectoryDataModule, settings: CostSettings, *, trains: bool, is_divided: bool, sampled: int, max_answer: int
) -> Bill:
    """Estimate what is to come of a run whose pool has been read.

    trains: whether arms are trained. is_divided: whether fsdp divides the student. sampled: answers of one student,
    of at most `max_answer` tokens.
    """
    pool, recipe = data.trajectories, data.recipe
    rows = data.scored
    problems = len(set(pool.problem_id[rows].tolist()))
    budget = getattr(data.rules["selector"].policy, "budget", None) or 1
    work = Work(
        passes={need.name: need.reads for need in data.needs},
        rows=len(rows),
        row_tokens=float(pool.length[rows].mean()),
        arms=len(data.rules) if trains else 0,
        steps=recipe.count_steps(min(budget * problems, len(rows))),
        batch_size=recipe.batch_size,
        held_out_rows=len(pool.find_held_out()) + len(data.held_out_sample) * recipe.validations,
        sampled=sampled,
        answer_tokens=settings.answer_tokens or min(float(pool.span_tokens[rows].mean()), max_answer),
    )
    device, rates = find_device(settings, data.device), {} if settings.device else read_rates(data)
    ranks = data.world_size if is_divided else 1
    stages = estimate_stages(read_shape(data.student, data.device), work, device, rates, ranks=ranks)
    return Bill(stages=tuple(stages), device=device, devices=data.world_size, measured=tuple(sorted(rates)))


def print_bill(bill: Bill) -> None:
    """Print the bill as a table, and what it rests on."""
    table = make_table(f"What it takes on {bill.devices} x {bill.device.name}")
    for column in ("stage", "tokens", "FLOP", "one device", "GB a device", "GB on disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in bill.stages:
        table.add_row(
            stage.name,
            f"{stage.tokens:,.0f}",
            f"{stage.flops:.1e}",
            _format_seconds(stage.seconds),
            f"{stage.memory / 1e9:,.1f}",
            f"{stage.disk / 1e9:,.1f}",
        )
    flops, memory = sum(stage.flops for stage in bill.stages), max(stage.memory for stage in bill.stages)
    disk, seconds = sum(stage.disk for stage in bill.stages), sum(stage.seconds for stage in bill.stages)
    table.add_section()
    table.add_row("in all", "", f"{flops:.1e}", _format_seconds(seconds), f"{memory / 1e9:,.1f}", f"{disk / 1e9:,.1f}")
    console = make_console()
    console.print(table)
    console.print(f"Rates: {describe_rates(bill)}.")
    console.print("Memory: weights, gradients and moments; batches take what is left. Disk: what stays.")


def describe_rates(bill: Bill) -> str:
    """Say which rates were measured and which are assumed."""
    assumed = [kind for kind in ("scoring", "training", "sampling") if kind not in bill.measured]
    parts = [f"{', '.join(bill.measured)} as measured here with this student"] if bill.measured else []
    parts += [f"{', '.join(assumed)} assumed ({bill.device.basis})"] if assumed else []
    return "; ".join(parts)


def announce_bill(bill: Bill) -> None:
    """Announce what a long run, or a student's first one here, will take; log it of every run."""
    seconds = {kind: bill.total(kind) / bill.devices for kind in ("scoring", "training", "sampling")}
    text = ", ".join(f"{kind} {_format_seconds(each)}" for kind, each in seconds.items() if each)
    text = f"about {_format_seconds(sum(seconds.values()))} ({text}); stop_after=cost prints the bill"
    if sum(seconds.values()) > SECONDS_SAID or not bill.measured:
        announce("cost", text)
    logger.info("cost: %s; %s", text, describe_rates(bill))


def compare_bill(bill: Bill, took: Mapping[str, float], data: TrajectoryDataModule) -> dict[str, dict[str, float]]:
    """Compare the bill with the device-seconds that stages took, and keep the rates for the next bill.

    took: by kind, for those kinds alone that were done from beginning to end. Returns estimated and taken seconds.
    """
    found = {}
    for kind, seconds in took.items():
        stages = [stage for stage in bill.stages if stage.kind == kind]
        if stages and seconds > 0:  # nan: not done from beginning to end
            work = sum(stage.tokens if kind == "sampling" else stage.flops for stage in stages)
            found[kind] = {"estimated_seconds": bill.total(kind), "seconds": seconds, "rate": work / seconds}
            logger.info("%s took %.0f device-seconds, the bill said %.0f", kind, seconds, bill.total(kind))
    if found:
        path = _rates_path(data)
        known = read_json(path) if path.exists() else {}
        write_json(path, known | {kind: one["rate"] for kind, one in found.items()})
    return found


def read_rates(data: TrajectoryDataModule) -> dict[str, float]:
    """Read the rates that earlier runs of this student on such a device reached: FLOP/s, sampling tokens/s."""
    path = _rates_path(data)
    return read_json(path) if path.exists() else {}


def _rates_path(data: TrajectoryDataModule) -> Path:
    student, device = data.student, data.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    identity = {**student.identity(), "lora": student.lora, "dtype": data.dtype, "device": name}
    return data.cache / "rates" / f"{identity_hash(identity)}.json"


def _format_seconds(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:,.0f} s"

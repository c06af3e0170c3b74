"""What time goes to, from a profile of operations (their time on the device, if there is one), and peak memory."""

import resource
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_weight_int8pack_mm")
OTHER = "everything else"


def profiler() -> Any:
    """A context, and what it has recorded."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, record_shapes=True)


def part_of(name: str, shapes: Any, *, vocabulary: int, of_logits: str, rank: int | None = None) -> str:
    """Which part of a language model an operation belongs to. shapes: of its inputs. of_logits: what is done to logits.
    rank: LoRA's, if no other matrix has that width.
    """
    known = [shape for shape in shapes or () if isinstance(shape, list)]
    wide = any(vocabulary in shape for shape in known)
    if any(product in name for product in PRODUCTS):
        thin = rank is not None and any(rank in shape for shape in known)
        return "head's product" if wide else "LoRA's products" if thin else "linear layers"
    if "attention" in name:
        return "attention"
    if wide or "graph_" in name or "Torch-Compiled" in name:
        return of_logits
    if any(moved in name for moved in ("aten::index", "aten::cat", "aten::copy_")):
        return "gathering and copying"
    return "norms, activations, positions" if name.startswith("aten::") else OTHER


def shares(events: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """Of the time of all operations, by part, the largest first. events: (part, operation)."""
    spent: dict[str, float] = defaultdict(float)
    for part, event in events:
        spent[part] += event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
    total = sum(spent.values())
    return {name: value / total for name, value in sorted(spent.items(), key=lambda item: -item[1])}


def operations(events: Any) -> Iterable[Any]:
    """Without kernels: their time is also that of the operation that started them."""
    return (event for event in events or () if event.device_type.name == "CPU")


def forget_peak() -> None:
    """So that loading a student, which may take more, is not in the peak (on a CPU: where the system is Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Of this process since `forget_peak`: allocated by a GPU's tensors if there is one, else resident."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Of this process, in the host's memory."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: a process inherits that figure from the one that started it
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The GEMM limit: how long a student's matrix products alone take on this device, attention and all else left out.

Measured with the student's own weights, each distinct shape once. A pass cannot be faster than its tokens times this.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lark.student.token_statistics import Head

LEAST_COVERED = 0.9  # of the decoder's parameters outside embeddings; below, its products are not all known
MOST_ELEMENTS = 2**27  # of a product that is timed: 256 MB in bfloat16
FIRST_ROWS = 256  # with fewer a large head is slower, and the limit would be slack


def gemm_seconds(
    model: nn.Module, head: Head, *, tokens: int = 8192, seconds: float = 0.3
) -> tuple[float, float] | None:
    """Seconds a token for all the decoder's linear layers, and seconds a scored token for the LM head.

    model: a transformers causal language model. tokens: rows of a product at most. seconds: what the measurement takes,
    about; half of it is the head's. On a slow device few rows fit into it, and the limit comes out a little slack.
    None for a student with experts, or whose linear layers are mostly not plain torch.nn.Linear (quantised or sharded
    weights, convolutions): what its products cost is not known.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    embedding = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    own = {name: part for name, part in decoder.named_modules() if "lora_" not in name}  # an adapter is no need
    parameters = {name: p for name, p in decoder.named_parameters() if id(p) not in embedding and "lora_" not in name}
    linear = [layer.weight for layer in own.values() if type(layer) is nn.Linear and _plain(layer.weight)]
    covered = sum(weight.numel() for weight in linear)
    if (
        covered < LEAST_COVERED * sum(p.numel() for p in parameters.values())
        or any("expert" in name for name in parameters)
        or not _plain(head.weight_VD)
    ):
        return None
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in linear:
        by_shape.setdefault(weight.shape, []).append(weight)
    each = seconds / 2 / len(by_shape)
    of_decoder = sum(len(alike) * _seconds_a_row(alike[0], tokens, each) for alike in by_shape.values())
    return of_decoder, _seconds_a_row(head.weight_VD, tokens, seconds / 2)


def peak_rate(dtype: torch.dtype, device: torch.device, size: int = 4096, seconds: float = 1.0) -> float:
    """FLOP/s of the product of two square matrices; where that takes longer than `seconds`, with fewer rows."""
    weight = torch.randn(size, size, device=device).to(dtype)
    return 2 * size * size / _seconds_a_row(weight, size, seconds)


def _plain(weight: Tensor) -> bool:
    """Sharded and most quantised weights are tensors of a class of their own, the others no floating-point matrices."""
    floating = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return type(weight) in (Tensor, nn.Parameter) and floating and weight.ndim == 2


@torch.inference_mode()
def _seconds_a_row(weight: Tensor, most: int, seconds: float) -> float:
    """Of `rows @ weight.T`, the best of ever more rows, up to `most`, and then of ever more products between two looks
    at the clock, as long as the next attempt fits into `seconds`.
    """
    most = max(1, min(most, MOST_ELEMENTS // max(weight.shape)))
    rows, calls, spent, best = min(FIRST_ROWS, most), 1, 0.0, float("inf")
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    _timed(x, weight, 1)  # libraries choose their kernels, threads start
    while True:
        took = _timed(x, weight, calls)
        best, spent = min(best, took / (rows * calls)), spent + took
        if spent + 2 * took > seconds:
            return best
        if 2 * rows <= most:
            rows, x = 2 * rows, torch.cat([x, x])
        else:
            calls *= 2


def _timed(x: Tensor, weight: Tensor, calls: int) -> float:
    _synchronise(x.device)
    start = time.perf_counter()
    for _ in range(calls):
        F.linear(x, weight)
    _synchronise(x.device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

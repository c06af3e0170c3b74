"""Twenty minutes on a GPU: what scoring and training reach there, as one table against references.

    python benchmarks/gpu.py             on a CUDA device with 80 GB or more
    python benchmarks/gpu.py --tiny      the same parts on any device at toy sizes, to see that the script runs

Students have random weights in the shapes of SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-7B; trajectories have lognormal
lengths. Parts, each of which may be left out by `--parts`:

machine     versions, and the rate of square bfloat16 products
attention   forward and backward over one packed row: flash attention of variable lengths as a layer calls it, and
            flex_attention with a document mask; without sharing, TFLOP/s of the causal half
head        statistics eager and compiled; the loss with its gradient, against checkpointed cross-entropy
layers      four layers of the 7B shape, eager and compiled, where waiting for the device is an error (not in --tiny);
            graphs beyond the first are recompiles
students    scoring and training end to end: tokens/s and the share of the limit of their own matrix products; peak
            memory of scoring against the estimate that micro-batches are chosen by
precision   by how much bfloat16 moves a token's surprisal, 0.5B shape
generation  transformers' generate at 64 and 256 rows

References are published or estimated figures for one H100 (none: nothing to compare with). The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from throughput import gemm_seconds, peak_rate
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from lark.scoring.pass_module import ScoringSettings
from lark.scoring.statistics_pass import summarise_tokens
from lark.student.attention import enable_packed_rows
from lark.student.batching import MicroBatch, pack_rows
from lark.student.chat import TokenizedTrajectory
from lark.student.memory import SHARE_OF_FREE_MEMORY, estimate_scoring_tokens
from lark.student.model_parts import compile_layers, compute_hidden_states, get_head
from lark.student.token_statistics import Head, compute_token_statistics, compute_weighted_surprisal
from lark.student.transfer import copy_to_host

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary; aimed share of the limit
    "135M": ((30, 576, 1536, 9, 3, 49152), 0.20),
    "0.5B": ((24, 896, 4864, 14, 2, 151936), 0.30),
    "7B": ((28, 3584, 18944, 28, 4, 152064), 0.50),
}
TINY = (2, 64, 96, 4, 2, 500)
PROMPT = 150


class Table:
    """Rows of part, measure, value and reference; printed as they come."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, name: str, value: float, unit: str, reference: str = "") -> None:
        self.values[f"{name} ({unit})"] = value
        print(f"{name:<58} {value:>12,.4g} {unit:<12} {reference}", flush=True)


def measure_seconds(run: Callable[[], Any], *, repeats: int = 3) -> float:
    """Measure `run` after a first call: the best of `repeats`."""
    run()
    best = float("inf")
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        run()
        _synchronise()
        best = min(best, time.perf_counter() - start)
    return best


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def make_student(shape: tuple[int, ...], *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Make a student of `shape` with random weights that takes packed rows."""
    depth, hidden, intermediate, heads, groups, vocabulary = shape
    config = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=layers or depth,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=2**17,
        tie_word_embeddings=hidden < 2048,
    )
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    reason = enable_packed_rows(model.eval(), "sdpa")
    assert reason is None, reason
    return model


def make_row(tokens: int, vocabulary: int, *, share: bool = True, seed: int = 0) -> MicroBatch:
    """Make a packed row of about `tokens` tokens: trajectories of lognormal lengths, four to a prompt."""
    rng = np.random.default_rng(seed)
    rows, prompt, total = [], [], 0
    while total < tokens:
        if len(rows) % 4 == 0:
            prompt = rng.integers(3, vocabulary, min(PROMPT, tokens // 8)).tolist()
        span = int(np.clip(rng.lognormal(np.log(tokens / 16), 0.6), 8, tokens - total + 8))
        ids = prompt + rng.integers(3, vocabulary, span).tolist()
        rows.append(TokenizedTrajectory(input_ids=ids, prompt_tokens=len(prompt), end_of_turn=span - 1, steps=[0]))
        total += len(ids)
    return pack_rows(rows, list(range(len(rows))), share=share).to(DEVICE)


def score(model: Any, micro: MicroBatch, *, compiled: bool) -> Callable[[], list[np.ndarray]]:
    """Compute a unit's statistics as a pass does; nothing is waited for until the result is called."""
    with torch.inference_mode():
        hidden_XD = compute_hidden_states(model, micro.input_ids_1X, micro.position_ids_1X, micro.tree)
        found = summarise_tokens(hidden_XD, micro, get_head(model), ScoringSettings(), compiled=compiled)
        return copy_to_host(*found)


def train(model: Any, micro: MicroBatch, coefficient_1N: Tensor) -> None:
    """Compute the gradients of a micro-batch as a step does."""
    hidden_XD = compute_hidden_states(model, micro.input_ids_1X, micro.position_ids_1X, micro.tree)
    loss = compute_weighted_surprisal(hidden_XD[micro.predict_N], micro.target_N, coefficient_1N, get_head(model))
    loss.sum().backward()


# ---- the parts


def measure_machine(table: Table, tiny: bool) -> None:
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no CUDA device")
    rate = peak_rate(torch.bfloat16, DEVICE, size=256 if tiny else 8192)
    table.add("square bfloat16 products", rate / 1e12, "TFLOP/s", "788")


def measure_attention(table: Table, tiny: bool) -> None:
    from lark.student.attention import _attend_tree

    for heads, groups, size in [(4, 2, 8)] if tiny else [(28, 4, 128), (14, 2, 64)]:
        micro = make_row(512 if tiny else 65536, 1000, share=False)
        assert micro.tree is not None
        lengths = np.array(micro.tree.own_P, np.float64)
        flops = 3.5 * 4 * heads * size * np.square(lengths).sum() / 2
        shapes = ((1, n, micro.tokens, size) for n in (heads, groups, groups))
        qkv = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]

        def flash(qkv: Any = qkv, tree: Any = micro.tree) -> None:
            _attend_tree(torch.nn.Module(), *qkv, None, prefix_tree=tree)[0].sum().backward()  # type: ignore[call-arg]

        name = f"attention {heads}/{groups}/{size}"
        table.add(f"{name}, variable lengths", flops / measure_seconds(flash) / 1e12, "TFLOP/s", "232 to 630")
        if DEVICE.type == "cuda":
            table.add(f"{name}, flex", flops / measure_seconds(_make_flex(qkv, lengths)) / 1e12, "TFLOP/s", "330")


def _make_flex(qkv: list[Tensor], lengths: np.ndarray) -> Callable[[], None]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document_X = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths.astype(int))).to(DEVICE)
    tokens = len(document_X)
    mask = create_block_mask(
        lambda b, h, q, k: (document_X[q] == document_X[k]) & (q >= k), None, None, tokens, tokens, device="cuda"
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*qkv, block_mask=mask, enable_gqa=True).sum().backward()


def measure_head(table: Table, tiny: bool) -> None:
    tokens, width, vocabulary = (64, 32, 500) if tiny else (16384, 3584, 152064)
    weight_VD = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16) * width**-0.5
    hidden_ND = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
    target_N, head = torch.randint(vocabulary, (tokens,), device=DEVICE), Head(weight_VD=weight_VD)
    for compiled in (False, True) if DEVICE.type == "cuda" else (False,):
        seconds = measure_seconds(lambda c=compiled: compute_token_statistics(hidden_ND, target_N, head, compiled=c))
        name = "statistics, compiled" if compiled else "statistics, eager"
        table.add(name, 1e6 * seconds / tokens, "us/token", "7B: 3.5 of 28 in all, eager")
    hidden_ND.requires_grad_()
    ones_1N = torch.ones(1, tokens, device=DEVICE)

    def recomputed() -> None:
        total = torch.zeros((), device=DEVICE)
        for hidden, target in zip(
            hidden_ND.split(head.choose_chunk()), target_N.split(head.choose_chunk()), strict=True
        ):
            total = total + checkpoint(_sum_cross_entropy, hidden, weight_VD, target, use_reentrant=False)  # type: ignore[operator]
        total.backward()

    def ours() -> None:
        compute_weighted_surprisal(hidden_ND, target_N, ones_1N, head).sum().backward()

    table.add("loss, checkpointed cross-entropy", 1e6 * measure_seconds(recomputed) / tokens, "us/token", "4 products")
    table.add("loss, gradient in the forward pass", 1e6 * measure_seconds(ours) / tokens, "us/token", "3 products")


def _sum_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), target_N, reduction="sum")


def measure_layers(table: Table, tiny: bool) -> None:
    shape = TINY if tiny else SHAPES["7B"][0]
    model = make_student(shape, layers=4)
    rows = [make_row(tokens, shape[-1], seed=tokens) for tokens in ((300, 500) if tiny else (30000, 32768, 20000))]
    for name in ("eager", "compiled"):
        if name == "compiled":
            counters.clear()
            compile_layers(model, DEVICE)
        for micro in rows:
            score(model, micro, compiled=DEVICE.type == "cuda")()  # compiling waits
        seconds = [measure_seconds(lambda m=micro: _score_without_waiting(model, m)()) for micro in rows]
        rate = sum(micro.tokens for micro in rows) / sum(seconds)
        table.add(f"four layers of the 7B shape, {name}", rate, "tokens/s")
    table.add("graphs of these layers", counters["stats"]["unique_graphs"], "graphs", "1 (0 where none is compiled)")


def _score_without_waiting(model: Any, micro: MicroBatch) -> Callable[[], list[np.ndarray]]:
    """Raises where anything but the last copy waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        return score(model, micro, compiled=DEVICE.type == "cuda")
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def measure_students(table: Table, tiny: bool) -> None:
    for name, (shape, aim) in {"tiny": (TINY, 0.0)}.items() if tiny else SHAPES.items():
        model = make_student(shape)
        compile_layers(model, DEVICE)
        limit = gemm_seconds(model, get_head(model), seconds=0.2 if tiny else 2.0)
        assert limit is not None
        tokens = 600 if tiny else min(estimate_scoring_tokens(model, DEVICE), 65536)
        micro = make_row(tokens, shape[-1])
        products = micro.tokens * limit[0] + len(micro.target_N) * limit[1]
        held = _forget_peak()
        seconds = measure_seconds(
            lambda model=model, micro=micro: score(model, micro, compiled=DEVICE.type == "cuda")()
        )
        table.add(f"scoring {name}", micro.tokens / seconds, "tokens/s")
        table.add(f"scoring {name}, share of the limit", products / seconds, "", f"aim {aim:.0%}")
        if DEVICE.type == "cuda":
            free, peak = torch.cuda.mem_get_info()[0], torch.cuda.max_memory_allocated()
            may_take = f"{SHARE_OF_FREE_MEMORY * (free + peak - held) / 2**30:.0f} at most"
            table.add(f"scoring {name}, memory beside the weights", (peak - held) / 2**30, "GiB", may_take)
        micro = make_row(tokens if tiny else 16384, shape[-1])
        ones_1N = torch.ones(1, len(micro.target_N), device=DEVICE)
        seconds = measure_seconds(lambda model=model, micro=micro, ones=ones_1N: train(model.train(), micro, ones))
        products = 3 * (micro.tokens * limit[0] + len(micro.target_N) * limit[1])
        table.add(f"training {name}", micro.tokens / seconds, "tokens/s")
        table.add(f"training {name}, share of the limit", products / seconds, "", f"aim {aim:.0%}")
        del model
        _forget_peak()


def _forget_peak() -> int:
    """Begin to measure peak memory; returns what is allocated."""
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure_precision(table: Table, tiny: bool) -> None:
    shape = TINY if tiny else SHAPES["0.5B"][0]
    model, micro = make_student(shape, dtype=torch.float32), make_row(400 if tiny else 8192, shape[-1])
    exact = score(model, micro, compiled=False)()[1]
    rounded = score(model.to(torch.bfloat16), micro, compiled=False)()[1]
    table.add("bfloat16 against float32, mean surprisal", float((rounded - exact).mean()), "nats")
    table.add("bfloat16 against float32, a token at most", float(np.abs(rounded - exact).max()), "nats")


def measure_generation(table: Table, tiny: bool) -> None:
    shape = TINY if tiny else SHAPES["0.5B"][0]
    model = make_student(shape)
    model.set_attn_implementation("sdpa")
    count = 8 if tiny else 256
    for rows in (4,) if tiny else (64, 256):
        prompt = torch.randint(3, shape[-1], (rows, 16 if tiny else PROMPT), device=DEVICE)
        settings = {"attention_mask": torch.ones_like(prompt), "do_sample": True, "pad_token_id": 0}
        settings |= {"max_new_tokens": count, "min_new_tokens": count}
        seconds = measure_seconds(lambda p=prompt, s=settings, m=model: m.generate(p, **s), repeats=1)
        table.add(f"generation, {rows} rows", rows * count / seconds, "tokens/s")


PARTS: dict[str, Callable[[Table, bool], None]] = {
    "machine": measure_machine,
    "attention": measure_attention,
    "head": measure_head,
    "layers": measure_layers,
    "students": measure_students,
    "precision": measure_precision,
    "generation": measure_generation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any device")
    arguments = parser.parse_args()
    if DEVICE.type != "cuda" and not arguments.tiny:
        parser.error("there is no CUDA device; --tiny shows that the script runs")
    table = Table()
    for part in arguments.parts:
        PARTS[part](table, arguments.tiny)
    print(json.dumps(table.values))


if __name__ == "__main__":
    main()

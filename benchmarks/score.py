"""Scoring against the plain loop of LARK's method and against the limit of the machine's matrix products.

    python benchmarks/score.py [--problems 100]                                    the embedded task and student
    python benchmarks/score.py --pool pool.jsonl --model-path SmolLM2-135M-Instruct.gguf --problems 12 --dtype float32

In one process, after a warm-up, with the same dtype and threads, on all candidates of the first `--problems` problems:

ours    the pass that a run makes (lark.scoring.statistics_pass.StatisticsModule under a Trainer): every statistic, in
        shards on disk
plain   one trajectory a forward pass through the whole model, full logits, cross-entropy over the whole vocabulary
        and the Brier score from the 50 largest logits, as LARK's released code computes them
limit   the linear layers and the head alone, for the tokens that are distinct once beginnings are shared, at the
        rate measured for the student's own matrices; and at the rate of a product of two 4096 x 4096 matrices

Ratios above 1 mean that ours is faster. The last line is JSON: ratio_plain (time of plain / ours), share_of_gemm_limit
(limit / ours), peak_bytes (of the process after ours, before plain), trajectories_per_s (ours), and further figures.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from inputs import add_arguments, open_data
from profiles import operations, part_of, peak_bytes, profiler, shares
from throughput import gemm_seconds, peak_rate

from lark.common.table_cache import read_columns
from lark.scoring.pass_module import PassInputs, ScoringSettings, run_pass
from lark.scoring.passes import Statistics
from lark.scoring.statistics_pass import StatisticsModule
from lark.student.attention import build_prefix_tree
from lark.student.model_parts import get_head
from lark.student.tokenized_pool import TokenizedPool
from lark.training.datamodule import TrajectoryDataModule

TOP_K = 50


def ours(
    data: TrajectoryDataModule, model: torch.nn.Module, rows: np.ndarray
) -> tuple[float, StatisticsModule, np.ndarray]:
    """Seconds of a pass over `rows`, loading the student not counted; the module, with what it chose; losses."""
    inputs = PassInputs(student=data.student, settings=data.probe, pool=data.trajectories, rows=rows, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        module = StatisticsModule(wanted=Statistics(), inputs=inputs, folder=Path(folder))
        module.student_model = model
        trainer = data.make_trainer("")
        _synchronise()
        start = time.perf_counter()
        run_pass(trainer, module, {})
        _synchronise()
        seconds = time.perf_counter() - start
        return seconds, module, read_columns(module.folder)["loss"]


@torch.inference_mode()
def plain(model: torch.nn.Module, pool: TokenizedPool, rows: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds, and losses."""
    device = next(model.parameters()).device
    losses, briers = np.zeros(len(rows)), np.zeros(len(rows))
    _synchronise()
    start = time.perf_counter()
    for i, row in enumerate(pool.read_tokens(rows)):
        ids = torch.tensor([row.input_ids], device=device)
        logits_TV = model(input_ids=ids, use_cache=False).logits[0, row.prompt_tokens - 1 : -1].float()
        target_T = ids[0, row.prompt_tokens :]
        losses[i] = F.cross_entropy(logits_TV, target_T).item()
        values_TK, indices_TK = logits_TV.topk(TOP_K, dim=1)
        observed_TK = (indices_TK == target_T[:, None]).float()
        missed_T = 1 - observed_TK.sum(1)  # an observed token outside the 50 counts as one of probability 0
        briers[i] = ((values_TK.softmax(1) - observed_TK).square().sum(1) + missed_T).mean().item()
    _synchronise()
    return time.perf_counter() - start, losses


def parts(data: TrajectoryDataModule, model: torch.nn.Module, rows: np.ndarray) -> dict[str, float]:
    """Share of a pass's time by part."""
    vocabulary = get_head(model).weight_VD.shape[0]
    with profiler() as profile:
        ours(data, model, rows)
    known = {"vocabulary": vocabulary, "of_logits": "statistics of the logits"}
    events = operations(profile.key_averages(group_by_input_shape=True))
    return shares((part_of(event.key, event.input_shapes, **known), event) for event in events)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, problems=100)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument(
        "--no-profile", action="store_true", help="spare the further pass that shares of time come from"
    )
    parser.add_argument("--compile", action="store_true", help="compile the token statistics, however short the pass")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as cache:
        probe = ScoringSettings(batch_tokens=arguments.batch_tokens, compile=arguments.compile or None)
        data = open_data(arguments, Path(cache), limit=arguments.problems, dtype=arguments.dtype, probe=probe)
        pool, rows = data.trajectories, data.scored
        dtype = getattr(torch, arguments.dtype)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = data.student.load_model(dtype).eval().requires_grad_(False)
        model.to(device)

        ours(data, model, rows[:2])
        ours_s, module, losses = ours(data, model, rows)
        peak = peak_bytes()
        model.set_attn_implementation("sdpa")
        plain(model, pool, rows[:2])
        plain_s, plain_losses = plain(model, pool, rows)
        spent = {} if arguments.no_profile else parts(data, model, rows)

    lengths, spans = pool.length[rows], pool.span_tokens[rows]
    distinct = float(len(build_prefix_tree([row.input_ids for row in pool.read_tokens(rows)])[0]))
    head = get_head(model)
    rates = gemm_seconds(model, head, tokens=module.batch_tokens, seconds=4.0)
    assert rates is not None, "this student's matrix products cannot be timed"
    products = distinct * rates[0] + spans.sum() * rates[1]
    square = peak_rate(dtype, device)
    decoder = model.get_decoder()
    flops = 2 * distinct * sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))
    flops += 2 * float(spans.sum()) * head.weight_VD.numel()
    figures = {
        "ratio_plain": plain_s / ours_s,
        "share_of_gemm_limit": products / ours_s,
        "share_of_square_gemm_limit": flops / square / ours_s,
        "peak_bytes": peak,
        "trajectories_per_s": len(rows) / ours_s,
        "tokens_per_s": lengths.sum() / ours_s,
        "ratio_at_the_limit": plain_s / products,
        "seconds": {"ours": ours_s, "plain": plain_s, "gemm_limit": products},
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    print(
        f"{len(rows)} trajectories of {len(set(pool.problem_id[rows]))} problems, {lengths.sum():,} tokens, of which "
        f"{distinct:,.0f} distinct and {spans.sum():,} scored; {arguments.dtype}, {figures['threads']} threads, "
        f"{figures['device']}"
    )
    print(f"chosen      {module.list_choices()}")
    print(f"ours        {ours_s:8.2f} s  {figures['trajectories_per_s']:.2f} trajectories/s, every statistic")
    print(
        f"plain       {plain_s:8.2f} s  {figures['ratio_plain']:.2f} times ours; loss and top-{TOP_K} Brier score; "
        f"losses differ by at most {np.abs(losses - plain_losses).max():.1e} nats/token"
    )
    print(
        f"limit       {products:8.2f} s  {figures['share_of_gemm_limit']:.0%} of the rate of its own shapes "
        f"({flops / products / 1e9:.0f} GFLOP/s), {figures['share_of_square_gemm_limit']:.0%} of that of square "
        f"matrices ({square / 1e9:.0f} GFLOP/s); plain takes {figures['ratio_at_the_limit']:.2f} times the limit"
    )
    if spent:
        print("time        " + ", ".join(f"{name} {share:.0%}" for name, share in spent.items() if share >= 0.005))
    print(f"memory      {peak / 2**30:.2f} GiB at most")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Generation in batches against one sample at a time, against transformers' own loop, and against the device's limits.

    python benchmarks/generate.py                                                      the embedded task and student
    python benchmarks/generate.py --eval eval.jsonl --model-path SmolLM2-135M-Instruct.gguf --problems 50 --alone 20

In one process, with the same dtype and threads, after a warm-up, samples of the first `--problems` problems:

batched        what an evaluation does (lark.generation.transformers_backend)
one at a time  the same code with a batch size of 1, on `--alone` samples spread evenly over the problems
transformers   model.generate with sampling by temperature and top-p, one sample at a time, for the same prompts and
               number of samples; what it draws differs
the same       share of samples that batches half as large, and one at a time, give too; and a second time

One at a time would take too long for all samples, and some are longer than others: ratios are of seconds a token. Both
wall-clock and CPU seconds are given; on a machine that others use too, go by the latter. The limit of batches is the
time of the linear layers and the head, at the rate measured for the student's own matrices, for the tokens that are
distinct; that of one at a time is to read the weights once a token. The last line is JSON.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from profiles import forget_peak, peak_bytes
from throughput import gemm_seconds

from lark.generation.backends import find_stop_ids
from lark.generation.transformers_backend import Sample, choose_batch_size, generate_samples
from lark.student.model_parts import get_head
from lark.student.student import Student
from lark.tasks.arithmetic import generate
from lark.tasks.problems import make_prompt, read_problems
from lark.tasks.task import EmbeddedTask


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, and its wall-clock and CPU seconds."""
    _synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    _synchronise()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def read_seconds(model: torch.nn.Module, seconds: float = 1.0) -> float:
    """Seconds to read the weights once: a product of each matrix with one row."""
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rows = [torch.randn(1, weight.shape[1], dtype=weight.dtype, device=weight.device) for weight in linear]
    best, spent = float("inf"), 0.0
    while spent < seconds:
        _, wall, _ = timed(lambda: [row @ weight.T for row, weight in zip(rows, linear, strict=True)])
        best, spent = min(best, wall), spent + wall
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", help="JSONL, JSON or Parquet file of problems; none: the embedded task's")
    parser.add_argument("--model-path", default="shipped:tiny", help="a folder or .gguf file; none: the embedded one")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--batch-size", type=int, help="none: as memory allows")
    parser.add_argument("--alone", type=int, default=20, help="samples generated one at a time")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()

    student = Student(name="student", path=arguments.model_path)
    chat, device = student.load_chat(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = student.load_model(getattr(torch, arguments.dtype)).eval()
    model.to(device)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"seed": 0, "problems": 2, "eval_problems": arguments.problems, "shifted_problems": 1}
        embedded = EmbeddedTask(name="arithmetic", generate=generate, sets={"eval": "eval.jsonl"}, settings=sizes)
        path = arguments.eval or embedded.prepare_evaluation(Path(folder))["eval"]
        problems = read_problems(path, limit=arguments.problems)
    prompts = {row["problem_id"]: chat.encode_prompt(make_prompt(row, None)) for row in problems}
    longest, ends = max(map(len, prompts.values())), find_stop_ids(chat)
    size = arguments.batch_size or choose_batch_size(model, longest + arguments.max_new_tokens)
    keys = [(key, n) for n in range(arguments.samples) for key in prompts]
    step = max(1, len(keys) // arguments.alone)
    alone = keys[::step][: arguments.alone]

    def ours(batch_size: int, only: list[tuple[str, int]] = keys) -> list[Sample]:
        batches = generate_samples(
            model,
            chat.tokenizer,
            list(prompts.values()),
            list(prompts),
            samples=arguments.samples,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            max_new_tokens=arguments.max_new_tokens,
            seed=0,
            batch_size=batch_size,
            stop_ids=ends,
            done=set(keys) - set(only),
        )
        return [sample for batch in batches for sample in batch]

    @torch.inference_mode()
    def theirs(only: list[tuple[str, int]]) -> int:
        tokens = 0
        for key, _ in only:
            ids = torch.tensor([prompts[key]], device=device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                top_k=0,
                max_new_tokens=arguments.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
            tokens += output.shape[1] - ids.shape[1]
        return tokens

    ours(size, keys[:2])
    theirs(keys[:1])
    forget_peak()
    batched, wall, cpu = timed(lambda: ours(size))
    peak = peak_bytes()
    singles, alone_wall, alone_cpu = timed(lambda: ours(1, alone))
    plain_tokens, plain_wall, plain_cpu = timed(lambda: theirs(alone))
    other, _, _ = timed(lambda: ours(max(1, size // 2)))
    again, _, _ = timed(lambda: ours(size))

    found = {(sample.problem_id, sample.sample): sample for sample in batched}
    tokens, alone_tokens = sum(s.num_tokens for s in batched), sum(s.num_tokens for s in singles)
    rates = gemm_seconds(model, get_head(model))
    limit = None if rates is None else sum(map(len, prompts.values())) * rates[0] + tokens * sum(rates)
    reading, threads = read_seconds(model), torch.get_num_threads()
    figures = {
        "samples_per_s": len(batched) / wall,
        "samples_per_cpu_s": len(batched) / cpu,
        "ratio_alone": alone_wall / alone_tokens * tokens / wall,
        "ratio_alone_cpu": alone_cpu / alone_tokens * tokens / cpu,
        "ratio_transformers": plain_wall / plain_tokens * tokens / wall,
        "ratio_transformers_cpu": plain_cpu / plain_tokens * tokens / cpu,
        "share_of_gemm_limit": None if limit is None else limit / wall,
        "share_of_gemm_limit_cpu": None if limit is None else limit * threads / cpu,
        "share_of_read_limit_alone": reading * alone_tokens / alone_wall,
        "share_of_read_limit_alone_cpu": reading * threads * alone_tokens / alone_cpu,
        "same_batch_equal": batched == again,
        "same_half_batch": sum(found[s.problem_id, s.sample] == s for s in other) / len(other),
        "same_alone": sum(found[s.problem_id, s.sample] == s for s in singles) / len(singles),
        "peak_bytes": peak,
        "batch_size": size,
        "tokens": tokens,
        "seconds": {"batched": wall, "alone": alone_wall, "transformers": plain_wall},
        "cpu_seconds": {"batched": cpu, "alone": alone_cpu, "transformers": plain_cpu},
        "dtype": arguments.dtype,
        "threads": threads,
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    print(
        f"{len(batched)} samples of {len(prompts)} problems, {tokens:,} tokens ({tokens / len(batched):.0f} a sample, "
        f"{sum(s.truncated for s in batched)} cut off); {arguments.dtype}, {figures['threads']} threads, "
        f"{figures['device']}, load {figures['load']:.1f}"
    )
    for name, count, spent, busy, made in (
        (f"batches of {size}", len(batched), wall, cpu, tokens),
        ("one at a time", len(singles), alone_wall, alone_cpu, alone_tokens),
        ("transformers", len(alone), plain_wall, plain_cpu, plain_tokens),
    ):
        print(
            f"{name:<16}{count / spent:8.3f} samples/s {count / busy:8.3f} samples/CPU s {1e3 * spent / made:8.2f} "
            f"ms/token {1e3 * busy / made:8.2f} CPU ms/token"
        )
    print(
        f"ratio           {figures['ratio_alone']:.1f} to one at a time (CPU time: {figures['ratio_alone_cpu']:.1f}), "
        f"{figures['ratio_transformers']:.1f} to transformers ({figures['ratio_transformers_cpu']:.1f})"
    )
    of_products = "unknown" if limit is None else f"{limit / wall:.0%} ({limit * threads / cpu:.0%})"
    print(
        f"limit           batches {of_products} of the rate of their products; one at a time "
        f"{reading * alone_tokens / alone_wall:.0%} ({reading * threads * alone_tokens / alone_cpu:.0%}) of that of "
        "reading weights"
    )
    print(
        f"the same        {figures['same_half_batch']:.1%} of samples in batches of {max(1, size // 2)}, "
        f"{figures['same_alone']:.1%} of those alone; a second time bit for bit: {batched == again}"
    )
    print(f"memory          {peak / 2**30:.2f} GiB at most")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

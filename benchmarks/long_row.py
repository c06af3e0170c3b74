"""Peak memory of scoring one long trajectory under a large vocabulary.

    python benchmarks/long_row.py [--tokens 32768] [--vocabulary 151936] [--hidden 128] [--layers 2]

The student is random, small but for its vocabulary. Its statistics are measured as in a run
(lark.scoring.statistics_pass.StatisticsModule);
dense float32 logits of the same trajectory, which nothing here makes, would alone take tokens x vocabulary x 4 bytes.
The last line is JSON: peak_bytes (of the whole process), dense_logits_bytes, seconds.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from profiles import resident_peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from lark.scoring.pass_module import PassInputs, ScoringSettings
from lark.scoring.passes import Statistics
from lark.scoring.statistics_pass import StatisticsModule
from lark.student.chat import TokenizedTrajectory

PROMPT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        max_position_embeddings=arguments.tokens,
        tie_word_embeddings=True,
    )
    ids = np.random.default_rng(0).integers(0, arguments.vocabulary, arguments.tokens).tolist()
    row = TokenizedTrajectory(input_ids=ids, prompt_tokens=PROMPT, end_of_turn=len(ids) - PROMPT - 1, steps=[0])
    pool: Any = SimpleNamespace(read_tokens=lambda rows: [row], span_tokens=np.array([len(ids) - PROMPT]))
    student: Any = SimpleNamespace(attention="sdpa")
    inputs = PassInputs(
        student=student, settings=ScoringSettings(compile=False, share=False), pool=pool, rows=np.array([0]), seed=0
    )
    module = StatisticsModule(wanted=Statistics(), inputs=inputs, folder=Path())
    module.trainer = SimpleNamespace(world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")))  # type: ignore[assignment]
    module.student_model = LlamaForCausalLM(config).eval().requires_grad_(False)

    start = time.perf_counter()
    (measured,) = module.measure(np.array([0]))
    seconds = time.perf_counter() - start
    peak = resident_peak_bytes()
    dense = 4 * arguments.tokens * arguments.vocabulary
    loss, uniform = measured["sum_surprisal"] / measured["num_tokens"], np.log(arguments.vocabulary)
    print(
        f"{arguments.tokens:,} tokens, vocabulary {arguments.vocabulary:,}: {seconds:.0f} s, {peak / 1e9:.2f} GB at "
        f"most (dense logits alone: {dense / 1e9:.1f} GB); loss {loss:.3f} nats/token, uniform guess {uniform:.3f}"
    )
    print(json.dumps({"peak_bytes": peak, "dense_logits_bytes": dense, "seconds": seconds}))


if __name__ == "__main__":
    main()

"""docs/clusters.md: its figures follow from the student's shapes."""

import math

import pytest
import torch
from pages import composed, text_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from lark import config as configuration
from lark.student.student import Student

PAGE = text_of("docs/clusters.md")


@pytest.fixture(scope="module")
def shapes() -> torch.nn.Module:
    """Qwen2.5-7B without weights (its config.json, as far as shapes go)."""
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


def test_memory(shapes: torch.nn.Module) -> None:
    layers = shapes.get_submodule("model.layers")
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    n, m = (sum(p.numel() for p in part.parameters()) for part in (shapes, layers))
    student: Student = configuration.build(composed("python -m lark.run model=qwen").model)
    p = sum(student.lora_config().r * sum(matrix.shape) for matrix in matrices)
    d, e = 3584, sum(sum(matrix.shape) for matrix in matrices) // 28 + 8 * 3584
    columns = {
        "LoRA, ddp": [2 * n, 16 * p, None, None, 3 * (e + 28 * d) * 8192],
        "full, fsdp, 8 ranks": [None, 16 * n / 8, 8 * (n - m), 10 * m / 28, 3 * (e + 28 * d) * 32768],
        "full, fsdp, 16 ranks": [None, 16 * n / 16, 8 * (n - m), 10 * m / 28, 3 * (e + 28 * d) * 32768],
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    (head,) = (i for i, row in enumerate(rows) if "LoRA, ddp" in row)
    assert rows[head][2:] == list(columns)
    for column, sizes in enumerate(columns.values(), 2):
        expected = ["" if size is None else f"{size / 1e9:.1f}" for size in [*sizes, math.fsum(filter(None, sizes))]]
        assert [row[column] for row in rows[head + 2 : head + 8]] == expected
    for text in (f"N = {n / 1e9:.2f}", f"M = {m / 1e9:.2f}", f"P = {p / 1e9:.2f}", f"E = {e:,}", f"D = {d:,}"):
        assert text in PAGE
    for text in (16 * n, 4 * n, 8 * 4 * n, 12 * n):
        assert f"{text / 1e9:.0f} GB" in PAGE
    assert f"LoRA's is {12 * p / 1e9:.1f} GB" in PAGE

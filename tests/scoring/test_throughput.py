"""The GEMM limit: every matrix product of the student is counted, each shape is timed once, in bounded time."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_student import byte_tokenizer, tiny_model
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lark.scoring import throughput
from lark.scoring.throughput import distinct_tokens, gemm_seconds, of_the_limit, peak_rate
from lark.student.student import get_head

CPU = torch.device("cpu")
NANOSECOND = 1e-9


@pytest.fixture
def model():
    return tiny_model(byte_tokenizer())


@pytest.fixture
def clock(monkeypatch):
    """A device that takes a nanosecond for each multiplication; the shapes and times of what was asked of it."""
    asked = []

    def timed(x, weight, calls):
        seconds = calls * len(x) * weight.numel() * NANOSECOND
        asked.append((tuple(weight.shape), len(x), seconds))
        return seconds

    monkeypatch.setattr(throughput, "_timed", timed)
    return asked


def linear_weights(model):
    return [layer.weight for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]


def test_every_product_counts_and_each_shape_is_timed_once(model, clock):
    weights = linear_weights(model)
    measured = gemm_seconds(model, get_head(model), seconds=0.01)
    assert measured is not None
    of_decoder, of_head = measured
    assert of_decoder == pytest.approx(sum(weight.numel() for weight in weights) * NANOSECOND)
    assert of_head == pytest.approx(get_head(model).weight_VD.numel() * NANOSECOND)
    shapes = list(dict.fromkeys(shape for shape, _, _ in clock))
    assert len(shapes) == len({weight.shape for weight in weights}) + 1 < len(weights)
    assert [shape for shape, *_ in clock] == [shape for shape in shapes for other, *_ in clock if other == shape]


def test_it_takes_the_time_it_is_given_and_the_rows_it_may(model, clock):
    gemm_seconds(model, get_head(model), tokens=700, seconds=0.5)
    assert 0.1 < sum(seconds for *_, seconds in clock) < 0.5
    assert max(rows for _, rows, _ in clock) == 512, "256, 512 ..., at most 700"
    clock.clear()
    gemm_seconds(model, get_head(model), seconds=0.0)
    assert len(clock) == 2 * len({shape for shape, *_ in clock}), "once to warm up, once to time"


def test_a_large_product_has_few_rows(model, clock, monkeypatch):
    monkeypatch.setattr(throughput, "MOST_ELEMENTS", 64 * 40)
    gemm_seconds(model, get_head(model), seconds=0.5)
    assert all(rows * max(shape) <= 64 * 40 for shape, rows, _ in clock)


def test_on_a_real_clock(model):
    measured = gemm_seconds(model, get_head(model), seconds=0.02)
    assert measured is not None and all(0 < seconds < 1e-3 for seconds in measured)
    assert 1e6 < peak_rate(torch.float32, CPU, size=64, seconds=0.01) < 1e15


def test_peak_rate(clock):
    assert peak_rate(torch.bfloat16, CPU, size=128) == pytest.approx(2 / NANOSECOND)


def test_unknown_for_experts():
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
    )
    moe = Qwen3MoeForCausalLM(config)
    assert gemm_seconds(moe, get_head(moe)) is None


def test_unknown_for_experts_that_are_linear_layers(model):
    layer = model.model.layers[0]
    layer.mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 64) for _ in range(2)])
    assert gemm_seconds(model, get_head(model)) is None


def test_unknown_for_layers_of_another_kind():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    assert gemm_seconds(other, get_head(other)) is None


def test_a_small_layer_of_another_kind_does_no_harm(model):
    heads = model.model.layers[0].self_attn
    heads.k_proj.weight = torch.nn.Parameter(heads.k_proj.weight.to(torch.int8), requires_grad=False)
    assert gemm_seconds(model, get_head(model), seconds=0.0) is not None


def test_unknown_for_quantised_weights(model):
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    assert gemm_seconds(model, get_head(model)) is None


def test_unknown_for_sharded_weights(model):
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
        assert gemm_seconds(model, get_head(model)) is None
    finally:
        dist.destroy_process_group()


def test_distinct_tokens():
    prompts, spans = {"a": 10, "b": 7}, np.array([3, 5, 2, 8, 1])
    problem_id = np.array(["a", "b", "a", "a", "b"], object)
    lengths = spans + np.array([prompts[problem] for problem in problem_id])
    tokens = distinct_tokens(problem_id, lengths, spans)
    assert tokens.sum() == sum(prompts.values()) + spans.sum()
    assert tokens[0] == pytest.approx(3 + 10 / 3) and tokens[1] == 5 + 7 / 2


def test_a_share_above_the_limit_says_that_it_was_not_the_limit():
    assert of_the_limit(0.384) == "38% of the GEMM limit"
    assert of_the_limit(1.55).startswith("more than 100% of the GEMM limit (other work")

"""Tokens at a time from free memory, whatever the architecture calls its widths."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lark.student import memory as budget
from lark.student.memory import CPU_TOKENS, LEAST_TOKENS, MOST_TOKENS, estimate_scoring_tokens, is_out_of_memory

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPU = torch.device("cuda")


def random_student(architecture, **settings):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES | settings))


def test_a_cpu_gets_a_fixed_number():
    assert estimate_scoring_tokens(random_student("llama"), torch.device("cpu")) == CPU_TOKENS


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "mamba", "qwen3_moe", "gemma3_text"])
def test_more_free_memory_takes_more_tokens_within_bounds(architecture, monkeypatch):
    settings = {"n_embd": 32, "n_head": 4, "n_layer": 2} if architecture == "gpt2" else {}
    settings |= {"word_embed_proj_dim": 32} if architecture == "opt" else {}
    model = random_student(architecture, **settings)
    found = []
    for free in (0, 2**24, 2**27, 2**60):
        monkeypatch.setattr(budget, "get_free_bytes", lambda device, setting, free=free: free)
        found.append(estimate_scoring_tokens(model, GPU))
    assert found == sorted(found)
    assert found[0] == LEAST_TOKENS and found[-1] in (MOST_TOKENS, LEAST_TOKENS)


def test_a_student_twice_as_wide_gets_half_the_tokens(monkeypatch):
    monkeypatch.setattr(budget, "get_free_bytes", lambda device, setting: 2**25)
    narrow, wide = (
        estimate_scoring_tokens(random_student("llama", hidden_size=size, intermediate_size=2 * size), GPU)
        for size in (32, 64)
    )
    assert narrow == pytest.approx(2 * wide, rel=0.01)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_every_device_says_it_in_its_own_words(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("The size of tensor a (2) must match the size of tensor b (4)"))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_takes_what_weights_gradients_and_moments_leave(checkpointed, make_student, monkeypatch):
    model: Any = make_student().load_model(torch.float32)
    trained = sum(p.nbytes for p in model.parameters())

    def tokens(free):
        monkeypatch.setattr(budget, "get_free_bytes", lambda device, setting: free)
        return budget.estimate_training_tokens(model, torch.device("cuda"), checkpointed=checkpointed)

    assert tokens(trained) == budget.LEAST_TOKENS and tokens(2**50) == budget.MOST_TOKENS
    to_come = 4 * trained + trained // 2
    layers, hidden = len(model.model.layers), model.config.hidden_size
    one = sum(sum(p.shape) for p in model.model.layers[0].parameters() if p.ndim == 2) + 8 * hidden
    kept = one + layers * hidden if checkpointed else layers * one
    room = 1000 * budget.ACTIVATION_BYTES * kept
    assert tokens(to_come + int(room / budget.SHARE_OF_FREE_MEMORY)) == pytest.approx(1000, abs=1)
    model.requires_grad_(False)
    assert tokens(trained // 2 + int(room / budget.SHARE_OF_FREE_MEMORY)) == pytest.approx(1000, abs=1)


def test_training_on_a_cpu():
    assert budget.estimate_training_tokens(None, torch.device("cpu"), checkpointed=False) == budget.CPU_TRAINING_TOKENS

"""Rows that come and go in one cache against each row's own pass without any."""

import random
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from lark.generation.continuous_batching import Decoder, cache_bytes, new_cache, reason_against

SIZES: dict[str, Any] = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
)


def gemma3():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=types))


def mistral():
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def mistral_without_a_window():
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))


def phi():  # rotates a part of each head, which has keys and values of its own
    own: dict[str, Any] = {**SIZES, "num_key_value_heads": 4}
    return PhiForCausalLM(PhiConfig(**own))


def gpt2():  # learned positions
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=128, n_embd=32, n_layer=3, n_head=4))


@pytest.fixture(params=[gemma3, mistral, mistral_without_a_window, phi, gpt2], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@torch.inference_mode()
def test_logits_are_those_of_each_row_alone(model):
    # Rows are admitted, fed, released and closed up at random, long beyond windows, growths and the first prompts.
    rng = random.Random(0)
    decoder = Decoder(model, 5)
    going: dict[int, list[int]] = {}
    prompts = [[rng.randrange(50) for _ in range(rng.randrange(1, 14))] for _ in range(4)]

    def check(slots, logits_SV):
        for slot, logits_V in zip(slots, logits_SV, strict=True):
            if slot in going:
                alone = model(input_ids=torch.tensor([going[slot]]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits_V, alone, rtol=1e-4, atol=1e-4)

    checked = 0
    for step in range(150):
        if decoder.free and rng.random() < 0.15:
            sequences = [rng.choice(prompts) for _ in range(rng.randrange(1, decoder.free + 1))]
            slots, logits_SV = decoder.admit(sequences)
            going |= {slot: list(sequence) for slot, sequence in zip(slots, sequences, strict=True)}
            check(slots, logits_SV)
        if not going:
            continue
        new = [rng.randrange(50) for _ in decoder.start]
        for slot in going:
            going[slot].append(new[slot])
        logits_SV = decoder.advance(new)
        if step % 10 == 0 or step > 140:
            check(range(len(new)), logits_SV)
            checked += 1
        ended = [slot for slot in going if len(going[slot]) > 90 or rng.random() < 0.01]
        for slot in ended:
            del going[slot]
        decoder.release(ended)
        if going and rng.random() < 0.02:
            going = {new: going[old] for new, old in enumerate(decoder.compact())}
    assert checked > 10


@torch.inference_mode()
def test_a_longer_row_may_come_after_shorter_ones(model):
    decoder = Decoder(model, 2)
    decoder.admit([[1, 2], [3]])
    decoder.release([1])
    long = [5, 4, 3, 2, 1, 6, 7, 8, 9]
    slots, logits_SV = decoder.admit([long])
    assert slots == [1]
    torch.testing.assert_close(logits_SV[0], model(torch.tensor([long])).logits[0, -1], rtol=1e-4, atol=1e-4)
    found = decoder.advance([4, 5])
    for slot, ids in enumerate([[1, 2, 4], [*long, 5]]):
        torch.testing.assert_close(found[slot], model(torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_shared_prompts_are_read_once_and_give_what_separate_ones_give(model):
    prompts = [[7, 3, 9, 1], [2, 8]]
    shared, separate = Decoder(model, 4), Decoder(model, 4)
    _, logits_SV = shared.admit([prompts[0], prompts[1], prompts[0], prompts[1]])
    assert shared.passed_tokens == 2 * 4
    assert torch.equal(logits_SV[0], logits_SV[2]) and torch.equal(logits_SV[1], logits_SV[3])
    # The same passes, and each row's copy made by hand.
    separate.admit(prompts)
    for layer in separate._layers():
        layer.keep(torch.tensor([0, 1, 0, 1]))
    separate.start = separate.start * 2
    assert torch.equal(shared.advance([1, 2, 3, 4]), separate.advance([1, 2, 3, 4]))


@torch.inference_mode()
def test_trying_it_out_finds_no_reason_against(model):
    assert reason_against(model) is None


@torch.inference_mode()
def test_trying_it_out_finds_a_model_whose_positions_are_lost(model):
    def misplaced(module, arguments, keywords):
        if keywords.get("position_ids") is not None and keywords["input_ids"].shape[1] == 1:
            keywords["position_ids"] = keywords["position_ids"] + 3
        return arguments, keywords

    with model.register_forward_pre_hook(misplaced, with_kwargs=True):
        assert "would differ" in str(reason_against(model))


def test_layers_with_a_window_keep_no_more_than_it():
    torch.manual_seed(0)
    model = mistral().eval()
    decoder = Decoder(model, 1)
    with torch.inference_mode():
        decoder.admit([[1, 2, 3, 4, 5, 6]])
        for _ in range(100):
            decoder.advance([1])
    assert all(layer.keys is not None and layer.keys.shape[2] <= 64 + 4 for layer in decoder._layers())


def test_bytes_a_token(model):
    cache = new_cache(model)
    assert cache is not None
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", 4)
    assert cache_bytes(model) == 3 * 2 * heads * 8 * 4  # layers, keys and values, heads, their size, float32

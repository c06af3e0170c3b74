"""Sampling: what is drawn, in which batch, and what of it is shared."""

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tiny_student import END, SHAPE, byte_tokenizer, tiny_model
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from lark.generation.transformers_backend import generate_samples


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture
def draw(model, tokenizer):
    """Samples of eight prompts of unequal length, by (problem, sample)."""

    def samples(**changes):
        settings: dict[str, Any] = dict(samples=4, temperature=0.8, top_p=0.95, max_new_tokens=40, seed=0, batch_size=8)
        prompts = {f"p{i}": tokenizer("a problem of some words"[: 3 + 2 * i])["input_ids"] for i in range(8)}
        order = changes.pop("order", list(prompts))
        batches = generate_samples(
            changes.pop("model", model),
            tokenizer,
            [prompts[key] for key in order],
            order,
            **{"stop_ids": [tokenizer.eos_token_id], **settings, **changes},
        )
        return {(sample.problem_id, sample.sample): sample for batch in batches for sample in batch}

    return samples


def differing(first, second):
    assert first.keys() == second.keys()
    return sum(first[key] != second[key] for key in first)


def test_batch_size_and_order_of_problems_change_no_sample(draw):
    # Batches differ in the last bits of their sums, so a token on a border may tip: at most 1 % of samples may. On
    # this model none does.
    alone = draw(batch_size=1, max_new_tokens=16)
    assert len({sample.text for sample in alone.values()}) == 32
    for batch_size in (5, 8):
        assert differing(alone, draw(batch_size=batch_size, max_new_tokens=16)) <= 0.01 * 32
    shuffled = draw(batch_size=32, max_new_tokens=16, order=[f"p{i}" for i in (3, 7, 0, 1, 6, 2, 5, 4)])
    assert differing(alone, shuffled) <= 0.01 * 32


def test_positions_that_depend_on_the_longest_row_of_a_batch(draw, tokenizer, caplog):
    """A sample is the one that its problem alone would get; what stays below the border shares batches."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
    model, rows = tiny_model(tokenizer, rope_parameters=rope | {"original_max_position_embeddings": 24}), []

    def record(module, arguments, keywords):
        rows.append(keywords["input_ids"].shape[0])

    with model.register_forward_pre_hook(record, with_kwargs=True):
        together = draw(model=model, max_new_tokens=16)
    assert max(rows) == 8 and "positions" in caplog.text
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}  # its border is its last position
    with pytest.raises(ValueError, match="exceeds the model's 24 positions"):
        draw(model=tiny_model(tokenizer, rope_parameters=dynamic, max_position_embeddings=24))
    alone = {}
    for problem in ("p0", "p2", "p3", "p5", "p6"):  # prompts of 3 to 17 tokens: the later ones may pass 24
        alone |= draw(model=model, max_new_tokens=16, order=[problem])
    assert alone == {key: sample for key, sample in together.items() if key in alone}


def test_a_batch_that_has_mostly_ended_is_given_up(model, tokenizer):
    # One token in twelve is an end. Batches of 16 that wait for their longest sample would compute as many rows as if
    # all were nearly as long as that; the rows that are left over are read again, together.
    ends, prompts = list(range(0, 257, 12)), [tokenizer(text)["input_ids"] for text in ("one", "two", "three")]
    settings: dict[str, Any] = dict(temperature=1.0, top_p=1.0, max_new_tokens=100, seed=0, stop_ids=ends)
    computed = []

    def record(module, arguments, keywords):
        computed.append(keywords["input_ids"].shape[0])

    with model.register_forward_pre_hook(record, with_kwargs=True):
        batches = list(
            generate_samples(model, tokenizer, prompts, ["1", "2", "3"], samples=40, batch_size=16, **settings)
        )
    samples = [sample for batch in batches for sample in batch]
    found = {(sample.problem_id, sample.sample): sample for sample in samples}
    assert len(found) == len(samples) == 120
    first = [found[key, n].num_tokens for key in ("3", "1", "2") for n in range(40)]  # longest prompts begin
    waiting = sum(16 * max(first[i : i + 16]) for i in range(0, 112, 16))
    assert sum(computed) < 0.75 * waiting
    alone = generate_samples(model, tokenizer, prompts, ["1", "2", "3"], samples=40, batch_size=120, **settings)
    assert differing(found, {(s.problem_id, s.sample): s for batch in alone for s in batch}) <= 0.01 * 120


def test_where_memory_runs_out_half_as_many_go_on_from_where_they_were(draw, model, caplog):
    whole = draw()

    def short(module, arguments, keywords):
        if keywords["input_ids"].shape[0] > 6 and keywords["past_key_values"].get_seq_length() > 25:
            raise torch.OutOfMemoryError("out of memory, says the test")

    with model.register_forward_pre_hook(short, with_kwargs=True):
        found = draw(batch_size=16)
    assert differing(whole, found) <= 0.01 * 32
    assert ["evaluation.batch_size" in line.getMessage() for line in caplog.records] == [True, True]


def test_one_sample_that_does_not_fit_is_named(draw, model):
    def short(module, arguments, keywords):
        if keywords["use_cache"] and keywords["past_key_values"].get_seq_length() > 25:
            raise torch.OutOfMemoryError("out of memory, says the test")

    with model.register_forward_pre_hook(short, with_kwargs=True), pytest.raises(ValueError, match="max_new_tokens"):
        draw(batch_size=2)


def test_batch_size_is_chosen_by_memory_and_logged(draw, caplog):
    caplog.set_level("INFO", "lark")
    assert differing(draw(batch_size=None), draw()) <= 0.01 * 32
    assert [line.args[0] for line in caplog.records] == [256]


def hybrid(tokenizer):
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        **SHAPE,
        layer_types=["conv", "full_attention"],
        initializer_range=0.4,
    )
    return Lfm2ForCausalLM(config)


def state_space(tokenizer):
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config)


@pytest.mark.parametrize("make", [hybrid, state_space])
def test_models_of_other_caches_generate_too(draw, tokenizer, make):
    torch.manual_seed(0)
    other = make(tokenizer).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter *= 3  # peaked distributions
    alone = draw(model=other, batch_size=1, samples=2, max_new_tokens=12)
    assert len({sample.text for sample in alone.values()}) > 8
    together = draw(model=other, batch_size=5, samples=2, max_new_tokens=12)
    assert together == draw(model=other, batch_size=5, samples=2, max_new_tokens=12)
    assert differing(alone, together) <= 0.01 * 16


def test_seed_decides_the_samples(draw):
    first = draw()
    assert first == draw()
    assert differing(first, draw(seed=1)) > 0.9 * 32


def test_fewer_samples_and_fewer_tokens_are_a_part_of_more(draw):
    more, fewer, shorter = draw(samples=4), draw(samples=2), draw(max_new_tokens=20)
    assert all(more[key] == sample for key, sample in fewer.items())
    # Of a character of several bytes that is cut off, the decoder leaves a mark.
    assert all(more[key].text.startswith(sample.text.rstrip("\ufffd")) for key, sample in shorter.items())


@torch.no_grad()
def top_p_distribution(model, ids, temperature, top_p):
    """Next-token probabilities under top-p, written out."""
    probabilities = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
    kept = torch.zeros_like(probabilities)
    for token in probabilities.argsort(descending=True):
        kept[token] = probabilities[token]
        if kept.sum() >= top_p:
            break
    return kept / kept.sum()


def test_draws_follow_the_top_p_distribution(model, tokenizer):
    # One new token is drawn after the same prompt under many keys; sample 0 and sample 1 are independent draws.
    ids, count = tokenizer("draw")["input_ids"], 2000
    model.generation_config = GenerationConfig(top_k=2, do_sample=True, repetition_penalty=1.5)
    batches = generate_samples(
        model,
        tokenizer,
        [ids],
        ["draw"],
        samples=count,
        temperature=1.5,
        top_p=0.8,
        max_new_tokens=1,
        seed=3,
        batch_size=500,
        stop_ids=[tokenizer.eos_token_id],
    )
    observed = Counter(sample.text if not sample.stop else END for batch in batches for sample in batch)
    expected = top_p_distribution(model, ids, 1.5, 0.8)
    support = expected.nonzero().squeeze(1).tolist()
    names = {token: END if token == tokenizer.eos_token_id else tokenizer.decode([token]) for token in support}
    assert len(support) > 4 and set(observed) <= set(names.values())
    common = [
        token for token in support if count * expected[token] >= 5 and list(names.values()).count(names[token]) == 1
    ]
    rest = 1 - sum(expected[token].item() for token in common)
    counts = [observed[names[token]] for token in common]
    frequencies = [count * expected[token].item() for token in common]
    if rest * count >= 5:
        counts, frequencies = [*counts, count - sum(counts)], [*frequencies, rest * count]
    assert len(counts) > 4
    assert sum(counts) == count
    assert chisquare(counts, frequencies, sum_check=False).pvalue > 0.01


def test_greedy_is_the_greedy_of_transformers(draw, model, tokenizer):
    model.generation_config = GenerationConfig(top_k=50, do_sample=True, repetition_penalty=1.3)
    samples = draw(samples=1, temperature=0, batch_size=3)
    model.generation_config = GenerationConfig()
    for i in range(8):
        ids = tokenizer("a problem of some words"[: 3 + 2 * i], return_tensors="pt")
        output = model.generate(
            **{k: ids[k] for k in ("input_ids", "attention_mask")},
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = output[0, ids["input_ids"].shape[1] :]
        sample = samples[f"p{i}", 0]
        assert sample.num_tokens == len(new)
        assert sample.text == tokenizer.decode(new, skip_special_tokens=True)


def test_end_token_ends_a_row_and_only_that_row(draw, tokenizer):
    free = draw(stop_ids=[tokenizer.eos_token_id])
    # Any byte can be declared the end: what comes before its first occurrence is what was drawn without it.
    end = tokenizer("e")["input_ids"][0]
    stopped = draw(stop_ids=[end, tokenizer.eos_token_id])
    assert {sample.stop for sample in stopped.values()} == {True, False}
    checked = 0
    for key, sample in stopped.items():
        assert sample.truncated is not sample.stop
        whole = free[key]
        if sample.stop and "e" in whole.text:
            checked += 1
            assert sample.text == whole.text.partition("e")[0]
            assert sample.num_tokens == len(sample.text) + 1
        elif not sample.stop:
            assert sample == whole and sample.num_tokens == 40
    assert checked


def test_rows_outlast_others_that_have_ended(draw):
    # Rows leave the batch at different times; those that stay must not notice.
    ends = list(range(0, 257, 20))
    together = draw(samples=2, stop_ids=ends, max_new_tokens=60, batch_size=16)
    lengths = {sample.num_tokens for sample in together.values()}
    assert min(lengths) <= 10 and max(lengths) > 40
    alone = draw(samples=2, stop_ids=ends, max_new_tokens=60, batch_size=1)
    assert differing(together, alone) <= 0.01 * 16


def test_model_is_left_as_it_was(draw, model):
    model.train()
    model.model.layers[0].eval()
    settings = model.generation_config
    draw(samples=1)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    assert model.generation_config is settings
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": 0}, r"evaluation\.samples=0"),
        ({"temperature": -1.0}, r"evaluation\.temperature=-1"),
        ({"temperature": float("nan")}, r"evaluation\.temperature=nan"),
        ({"top_p": 0.0}, r"evaluation\.top_p=0"),
        ({"batch_size": 0}, r"evaluation\.batch_size=0"),
        ({"max_new_tokens": 0}, r"task\.max_new_tokens=0"),
        ({"max_new_tokens": 250}, r"task\.max_new_tokens=250.*17 tokens.*256"),
        ({"stop_ids": []}, "eos_token"),
    ],
)
def test_settings_out_of_range_are_named(draw, changes, named):
    with pytest.raises(ValueError, match=named):
        draw(**changes)


def test_lora_students_generate_with_their_adapters(draw, model):
    from peft import LoraConfig, get_peft_model

    plain = draw(samples=1, temperature=0)
    student = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted = draw(samples=1, temperature=0, model=student)
    assert differing(plain, adapted) > 4
    merged = student.merge_and_unload()
    assert differing(adapted, draw(samples=1, temperature=0, model=merged)) == 0


def test_samples_are_plain_records(draw):
    sample = next(iter(draw(samples=1).values()))
    assert json.loads(json.dumps(dataclasses.asdict(sample))) == dataclasses.asdict(sample)

"""Generation with transformers: prompts -> samples, reproducible whatever batch a sample is drawn in.

Shapes: R rows of a batch (one sample of one problem each), L tokens so far, S new tokens, V vocabulary.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from lark.answers import find_boxed
from lark.models import base_model

# Rows that have ended leave the batch every so many tokens: often enough that few dead rows are computed, seldom
# enough that restarting `generate` does not show.
_SEGMENT = 16


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generated text."""

    problem_id: str
    sample: int
    """Number among the problem's samples, from 0."""
    text: str
    """What was generated, special tokens included, without the end token."""
    num_tokens: int
    """Generated tokens, the end token included."""
    stop: bool
    """Ended by its own end token."""
    truncated: bool
    """Cut off at the largest number of new tokens."""
    boxed: bool
    r"""States an answer in a closed \boxed{...} outside its thought."""


def generate_samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
    stop_ids: Sequence[int],
    done: Collection[tuple[str, int]] = (),
) -> Iterator[list[Sample]]:
    """Draws samples from a causal language model, longest prompts first; yields them a batch at a time.

    A sample's randomness depends on (seed, problem, sample, position) alone. In exact arithmetic the batch a sample
    is drawn in, and the order of problems, therefore change nothing; rounding can still tip a token whose probability
    border lies at the drawn number. The model's own generation settings (a top_k, a repetition penalty) are not used.

    Args:
        model: transformers causal language model, or one wrapped by peft; used where it is and in its dtype. Between
            batches it is in the mode (train or eval) it came in.
        prompts: token ids of each problem's prompt.
        keys: problem ids, as many as prompts and distinct.
        samples: samples per problem.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: share of probability, after temperature, of the most likely tokens that are drawn from.
        max_new_tokens: tokens after which a sample is cut off.
        seed: of the sampling noise.
        batch_size: samples generated at once.
        stop_ids: tokens that end a sample.
        done: (problem id, sample number) of samples to leave out.

    Raises:
        ValueError: a setting is out of its range, or a prompt leaves no room for the new tokens.
    """
    check_sampling(samples, temperature, top_p, batch_size)
    if max_new_tokens < 1:
        raise ValueError(f"task.max_new_tokens={max_new_tokens} must be at least 1")
    if not stop_ids:
        raise ValueError("evaluation has no end token to stop at; give the tokenizer an eos_token")
    assert len(prompts) == len(keys) == len(set(keys)), "one distinct key per prompt"
    longest = max(map(len, prompts), default=0)
    limit = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"task.max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} "
            f"positions; set it to at most {limit - longest}, or shorten or leave out the long problems"
        )
    rows = [(i, n) for i, key in enumerate(keys) for n in range(samples) if (key, n) not in done]
    rows.sort(key=lambda row: -len(prompts[row[0]]))  # stable; the batch that needs most memory comes first
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        noise_RS = None
        if temperature > 0:
            noise_RS = np.stack([_noise(seed, keys[i], n, max_new_tokens) for i, n in batch])
        with _generating(model) as generator:
            tokens = _generate(
                generator, [prompts[i] for i, _ in batch], noise_RS, temperature, top_p, max_new_tokens, list(stop_ids)
            )
        yield [_sample(tokenizer, keys[i], n, ids, set(stop_ids)) for (i, n), ids in zip(batch, tokens, strict=True)]


def check_sampling(samples: int, temperature: float, top_p: float, batch_size: int) -> None:
    """ValueError for the first of these settings of `generate_samples` that is out of its range."""
    for name, value in {"samples": samples, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"evaluation.{name}={value} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"evaluation.temperature={temperature} must be 0 (most likely token) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"evaluation.top_p={top_p} must lie above 0 and not above 1 (1 draws from all tokens)")


def _noise(seed: int, problem_id: str, sample: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) of one sample, [S] in float32; a longer draw begins with a shorter one."""
    digest = hashlib.sha256(json.dumps([seed, problem_id, sample]).encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random(count, dtype=np.float32)


class KeyedSampler(LogitsProcessor):
    """Draws each row's next token by inverse distribution function from a given uniform number, leaving only that one.

    Together with greedy decoding this is sampling with noise of our own choosing: `generate` offers one random
    generator for the whole batch, under which a sample depends on its neighbours.

    Args:
        noise_RS: uniform numbers in [0, 1), per row and new token.
        prompt_length: tokens before the first new one.
    """

    def __init__(self, noise_RS: Tensor, prompt_length: int) -> None:
        self.noise_RS = noise_RS
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_R1 = self.noise_RS[:, input_ids.shape[1] - self.prompt_length, None]
        # In float64 the sum of a large vocabulary keeps the borders between tokens apart; Apple's GPUs lack it.
        precise = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative_RV = scores.to(precise).softmax(dim=-1).cumsum(dim=-1)
        # The noise is a multiple of 2^-24 below 1, so the product stays below the total and the token found, the first
        # whose cumulative probability exceeds it, has probability above 0.
        drawn_R1 = torch.searchsorted(cumulative_RV, noise_R1.to(precise) * cumulative_RV[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_R1, 0.0)


@contextmanager
def _generating(model: Any) -> Iterator[Any]:
    """The transformers model in eval mode and without generation settings of its own; restores both."""
    generator = base_model(model)
    training = [module for module in model.modules() if module.training]
    settings = generator.generation_config
    # `generate` fills whatever a given GenerationConfig leaves open from the model's own one.
    generator.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.inference_mode():
            yield generator
    finally:
        generator.generation_config = settings
        for module in training:
            module.training = True


def _generate(
    generator: Any,
    prompts: Sequence[Sequence[int]],
    noise_RS: np.ndarray | None,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    stop_ids: list[int],
) -> list[list[int]]:
    """New token ids of each prompt, up to and with its end token."""
    device = generator.device
    width = max(map(len, prompts))
    ids_RL = torch.tensor([[stop_ids[0]] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_RL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    stop = torch.tensor(stop_ids, device=device)
    all_noise_RS = None if noise_RS is None else torch.from_numpy(noise_RS).to(device)
    alive = torch.arange(len(prompts), device=device)
    tokens: list[list[int]] = [[] for _ in prompts]
    cache, produced = None, 0
    while len(alive) and produced < max_new_tokens:
        processors = LogitsProcessorList()
        if all_noise_RS is not None:
            processors.append(TemperatureLogitsWarper(float(temperature)))
            if top_p < 1:
                processors.append(TopPLogitsWarper(top_p))
            processors.append(KeyedSampler(all_noise_RS[alive], width))
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(_SEGMENT, max_new_tokens - produced),
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            return_dict_in_generate=True,
            use_cache=True,
        )
        output = generator.generate(
            input_ids=ids_RL,
            attention_mask=mask_RL,
            past_key_values=cache,
            generation_config=config,
            logits_processor=processors,
        )
        new_RS = output.sequences[:, ids_RL.shape[1] :]
        produced += new_RS.shape[1]
        ended_RS = torch.isin(new_RS, stop)
        ended_R = ended_RS.any(dim=1)
        length_R = torch.where(ended_R, ended_RS.int().argmax(dim=1) + 1, new_RS.shape[1])
        for row, new, length in zip(alive.tolist(), new_RS.tolist(), length_R.tolist(), strict=True):
            tokens[row] += new[:length]
        going = (~ended_R).nonzero().squeeze(1)
        cache = output.past_key_values
        if len(going) < len(alive):
            cache.batch_select_indices(going)
        alive, ids_RL = alive[going], output.sequences[going]
        mask_RL = torch.cat([mask_RL[going], mask_RL.new_ones(len(going), new_RS.shape[1])], dim=1)
    return tokens


def _sample(tokenizer: Any, key: str, number: int, ids: list[int], stop_ids: set[int]) -> Sample:
    stop = ids[-1] in stop_ids
    text = tokenizer.decode(ids[:-1] if stop else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Sample(
        problem_id=key,
        sample=number,
        text=text,
        num_tokens=len(ids),
        stop=stop,
        truncated=not stop,
        boxed=find_boxed(text) is not None,
    )

"""Generation with transformers' `generate`: prompts -> samples, reproducible whatever batch a sample is drawn in.

Shapes: S rows of a batch (one sample of one problem each), L new tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lark.common.errors import LarkError
from lark.common.log import logger
from lark.generation.sampling import draw_tokens, make_noise
from lark.student.context_length import find_rope_border
from lark.student.memory import get_free_bytes, is_out_of_memory, release_memory
from lark.student.model_parts import get_base_model

MOST_ROWS = 256
ROWS_OF_UNKNOWN_SIZE = 32
SHARE_OF_FREE_MEMORY = 0.5  # the rest: activations, what the allocator loses, other processes
# A batch waits for its longest sample. Once so many of its rows have ended it is given up, and the others are read
# again, together with those that other batches left over: that is one pass, and its rows are all in use.
MOST_ENDED = 3 / 4


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


@dataclass
class _Row:
    """A sample that waits, with the tokens it has so far."""

    problem_id: str
    sample: int
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)


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
    batch_size: int | None,
    stop_ids: Sequence[int],
    done: Collection[tuple[str, int]] = (),
) -> Iterator[list[Sample]]:
    """Draw samples from a causal language model in batches, longest prompts first; yields them as batches end.

    A sample's randomness depends on (seed, problem, sample, position) alone. In exact arithmetic the batch a sample
    is drawn in, and the order of problems, therefore change nothing; rounding can still tip a token whose probability
    border lies at the drawn number. With the same prompts, batch size, device and dtype, and the same samples done
    before, they are the same bit for bit. The model's own generation settings (a top_k, a repetition penalty) are not
    used.

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
        batch_size: samples generated at once; halved, with a warning, where they do not fit into memory. None: what
            `choose_batch_size` finds, which follows from the memory that is free.
        stop_ids: tokens that end a sample.
        done: (problem id, sample number) of samples to leave out.

    Raises:
        LarkError: a setting is out of its range, a prompt leaves no room for the new tokens, or one sample alone does
            not fit into memory.
    """
    base: Any = get_base_model(model)
    check_sampling(samples, temperature, top_p, batch_size)
    longest = check_prompts(prompts, keys, max_new_tokens, stop_ids)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise LarkError(
            f"task.max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} "
            f"positions; set it to at most {limit - longest}, or shorten or leave out the long problems"
        )
    rows = [
        _Row(key, n, ids)
        for key, ids in zip(keys, prompts, strict=True)
        for n in range(samples)
        if (key, n) not in done
    ]
    if not rows:
        return
    fresh = deque(sorted(rows, key=lambda row: -len(row.prompt)))  # what needs most memory comes first
    begun: deque[_Row] = deque()  # left over when most of their batch had ended
    size = batch_size or choose_batch_size(model, longest + max_new_tokens)
    border = find_rope_border(model)
    if crossing := sum(len(row.prompt) + max_new_tokens > border for row in rows):
        logger.warning(
            "%d of %d samples may pass %d tokens, from where on this student's positions depend on the longest row of "
            "a batch: they are drawn one at a time",
            *(crossing, len(rows), border),
        )
    while fresh or begun:
        queue = begun if len(begun) >= size or not fresh else fresh
        alone = len(queue[0].prompt) + max_new_tokens > border
        batch = [queue.popleft() for _ in range(1 if alone else min(size, len(queue)))]
        shortage = None
        try:
            with _generating(model):
                _extend_rows(base, batch, seed, temperature, top_p, max_new_tokens, stop_ids)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error).partition("\n")[0]
        if shortage is not None:  # outside the handler: the error would keep the failed pass alive
            if len(batch) == 1:
                raise LarkError(
                    f"one sample of up to {longest + max_new_tokens} tokens does not fit into memory ({shortage}); "
                    "lower task.max_new_tokens, or set model.dtype=bfloat16"
                )
            size = len(batch) // 2
            logger.warning(
                "out of memory with %d samples at once: going on with %d; evaluation.batch_size=%d saves the attempt",
                *(len(batch), size, size),
            )
            queue.extendleft(reversed(batch))
            release_memory(base.device)
            continue
        ended = []
        for row in batch:
            if row.tokens[-1] in stop_ids or len(row.tokens) == max_new_tokens:
                ended.append(decode_sample(tokenizer, row.problem_id, row.sample, row.tokens, stop_ids))
            else:
                begun.append(row)
        if ended:
            yield ended


def check_sampling(samples: int, temperature: float, top_p: float, batch_size: int | None) -> None:
    """Raise LarkError for the first of these settings of `generate_samples` that is out of its range."""
    for name, value in {"samples": samples, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise LarkError(f"evaluation.{name}={value} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise LarkError(f"evaluation.temperature={temperature} must be 0 (most likely token) or a positive number")
    if not 0 < top_p <= 1:
        raise LarkError(f"evaluation.top_p={top_p} must lie above 0 and not above 1 (1 draws from all tokens)")


def check_prompts(
    prompts: Sequence[Sequence[int]], keys: Sequence[str], max_new_tokens: int, stop_ids: Sequence[int]
) -> int:
    """Return the tokens of the longest prompt. Raises LarkError if nothing may be generated, or without end."""
    if max_new_tokens < 1:
        raise LarkError(f"task.max_new_tokens={max_new_tokens} must be at least 1")
    if not stop_ids:
        raise LarkError("evaluation has no end token to stop at; give the tokenizer an eos_token")
    assert len(prompts) == len(keys) == len(set(keys)), "one distinct key per prompt"
    assert all(len(ids) > 0 for ids in prompts), "a prompt has tokens"
    return max(map(len, prompts), default=0)


def choose_batch_size(model: Any, tokens: int) -> int:
    """Choose how many rows of so many tokens are generated at once: a power of two, at most 256, whose keys, values and
    logits fit into half of the free memory of the model's device.
    """
    base: Any = get_base_model(model)
    with _generating(model):
        token_bytes = measure_cache_bytes(base)
    if token_bytes == 0:
        logger.info("generation: %d samples at once; evaluation.batch_size sets others", ROWS_OF_UNKNOWN_SIZE)
        return ROWS_OF_UNKNOWN_SIZE
    release_memory(base.device)
    on_cpu = base.device.type == "cpu"
    free = psutil.virtual_memory().available if on_cpu else get_free_bytes(base.device, "evaluation.batch_size")
    vocabulary = base.get_input_embeddings().weight.shape[0]
    row_bytes = 1.25 * token_bytes * tokens + 16 * vocabulary  # logits in two precisions, a copy
    size = min(MOST_ROWS, 2 ** max(0, int(SHARE_OF_FREE_MEMORY * free / row_bytes).bit_length() - 1))
    logger.info(
        "generation: %d samples at once (%.0f KiB of keys and values a token, up to %d tokens a sample, %.1f GiB free)",
        *(size, token_bytes / 1024, tokens, free / 2**30),
    )
    return size


def measure_cache_bytes(model: Any) -> int:
    """Measure what a model's keys and values take for each token of a row; 0 where it keeps something else."""
    output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(x.nbytes for x in tensors if x is not None)


class _NoiseSampler(LogitsProcessor):
    """Leave only the drawn one of each row's tokens, so that greedy decoding is sampling with noise of our own.

    noise_SL: of the tokens to come; None with temperature 0.
    """

    def __init__(self, noise_SL: Tensor | None, temperature: float, top_p: float, stop_S: Tensor) -> None:
        self.noise_SL, self.temperature, self.top_p, self.stop_S = noise_SL, temperature, top_p, stop_S
        self.step = 0
        self.ended_S: Any = False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise_S = None if self.noise_SL is None else self.noise_SL[:, self.step]
        drawn_S = draw_tokens(scores, noise_S, self.temperature, self.top_p)
        self.step += 1
        self.ended_S = self.ended_S | torch.isin(drawn_S, self.stop_S)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_S[:, None], 0.0)


class _MostEnded(StoppingCriteria):
    """Stop a batch once most of its rows have ended."""

    def __init__(self, sampler: _NoiseSampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended_S = self.sampler.ended_S
        return torch.full_like(ended_S, bool(ended_S.float().mean() >= MOST_ENDED))


def _extend_rows(
    base: Any,
    rows: Sequence[_Row],
    seed: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> None:
    """Generate in one batch until most rows have ended, or the first reaches its largest number of tokens."""
    device, stop = base.device, sorted(stop_ids)
    sequences = [[*row.prompt, *row.tokens] for row in rows]
    width, steps = max(map(len, sequences)), max_new_tokens - max(len(row.tokens) for row in rows)
    padding = [width - len(ids) for ids in sequences]
    noise_SL = None
    if temperature > 0:
        noises = [make_noise(seed, row.problem_id, row.sample, len(row.tokens) + steps)[-steps:] for row in rows]
        noise_SL = torch.from_numpy(np.stack(noises)).to(device)
    sampler = _NoiseSampler(noise_SL, temperature, top_p, torch.tensor(stop, device=device))
    output = base.generate(
        input_ids=torch.tensor([[stop[0]] * n + ids for n, ids in zip(padding, sequences, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=steps, eos_token_id=stop, pad_token_id=stop[0]
        ),
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([_MostEnded(sampler)]),
    )
    for row, new in zip(rows, output[:, width:].tolist(), strict=True):
        end = next((place for place, token in enumerate(new) if token in stop), len(new) - 1)
        row.tokens += new[: end + 1]


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Put the transformers model into eval mode and take its own generation settings away; restore both."""
    generator: Any = get_base_model(model)
    training = [module for module in model.modules() if module.training]
    settings = generator.generation_config
    # `generate` fills whatever a given GenerationConfig leaves open from the model's own one.
    generator.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        generator.generation_config = settings
        for module in training:
            module.training = True


def decode_sample(tokenizer: Any, key: str, number: int, ids: list[int], stop_ids: Collection[int]) -> Sample:
    """Make a sample from its token ids, the end token included."""
    stop = ids[-1] in stop_ids
    text = tokenizer.decode(ids[:-1] if stop else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Sample(
        problem_id=key,
        sample=number,
        text=text,
        num_tokens=len(ids),
        stop=stop,
        truncated=not stop,
    )

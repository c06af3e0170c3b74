"""Generation with transformers: prompts -> samples, reproducible whatever batch a sample is drawn in.

Shapes: S rows of a batch (one sample of one problem each), L tokens so far, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from lark.answers.extract import find_boxed
from lark.common.errors import LarkError
from lark.generation.continuous_batching import Decoder, cache_bytes, reason_against
from lark.generation.sampling import draw, noise
from lark.student.memory import get_free_bytes, is_out_of_memory, release_memory
from lark.student.student import get_base_model

MOST_ROWS_OF_A_CPU = 64  # with more of them none gets cheaper
MOST_ROWS = 256
ROWS_OF_UNKNOWN_SIZE = 32
SHARE_OF_FREE_MEMORY = 0.5  # the rest: activations, what the allocator loses, other processes
# Samples that have ended are handed over, and new ones read in their places, once they are so large a share of the
# batch: a pass over few prompts costs about as much as a token for the whole batch, which waits for it. Where none are
# left to read, the places are closed up, which copies the cache.
FREE = 1 / 8


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


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What decides a sample, beside its row."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: frozenset[int]


@dataclass
class _Row:
    """A sample that waits or is under way."""

    problem_id: str
    sample: int
    prompt: Sequence[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    noise_L: np.ndarray | None = None

    def begin(self, settings: _Settings) -> None:
        if settings.temperature > 0:
            self.noise_L = noise(self.seed, self.problem_id, self.sample, settings.max_new_tokens)

    def next_noise(self) -> float:
        return 0.0 if self.noise_L is None else float(self.noise_L[len(self.tokens)])

    def ended(self, settings: _Settings) -> bool:
        return self.tokens[-1] in settings.stop_ids or len(self.tokens) == settings.max_new_tokens


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
    say: Callable[[str], None] = print,
) -> Iterator[list[Sample]]:
    """Draws samples from a causal language model, longest prompts first; yields them as they end.

    A sample's randomness depends on (seed, problem, sample, position) alone. In exact arithmetic the batch a sample
    is drawn in, and the order of problems, therefore change nothing; rounding can still tip a token whose probability
    border lies at the drawn number. With the same prompts, batch size, device and dtype, and the same samples done
    before, they are the same bit for bit. The model's own generation settings (a top_k, a repetition penalty) are not
    used.

    Samples of a problem share the pass over their prompt, and one that has ended makes room for the next. Where a
    model's cache does not allow that, whole batches are generated one after the other, which is said.

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
        batch_size: samples generated at once; halved, and said, where they do not fit into memory. None: what
            `fitting_batch_size` finds and says, which follows from the memory that is free.
        stop_ids: tokens that end a sample.
        done: (problem id, sample number) of samples to leave out.
        say: where those lines go.

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
        _Row(key, n, ids, seed)
        for key, ids in zip(keys, prompts, strict=True)
        for n in range(samples)
        if (key, n) not in done
    ]
    rows.sort(key=lambda row: -len(row.prompt))  # stable; what needs most memory comes first
    if not rows:
        return
    settings = _Settings(
        temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, stop_ids=frozenset(stop_ids)
    )
    with _generating(model):
        reason = reason_against(base)
    if reason is not None:
        say(f"generation  batch after batch, each sample with a prompt of its own ({reason})")
    size = batch_size or fitting_batch_size(model, longest + max_new_tokens, shares=reason is None, say=say)
    waiting, going, ended = deque(rows), dict[int, _Row](), list[_Row]()
    decoder = Decoder(base, size)
    while waiting or going:
        shortage = None
        try:
            with _generating(model):
                if reason is None:
                    _advance(decoder, waiting, going, ended, settings)
                else:
                    _whole_batch(base, size, waiting, ended, settings)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error).partition("\n")[0]
        if shortage is not None:  # outside the handler: the error would keep the failed pass alive
            if size == 1:
                raise LarkError(
                    f"one sample of up to {longest + max_new_tokens} tokens does not fit into memory ({shortage}); "
                    "lower task.max_new_tokens, or set model.dtype=bfloat16"
                )
            say(f"generation  out of memory with {size} samples at once: going on with {size // 2}")
            size //= 2
            # What they have so far is read again with their prompts.
            waiting.extendleft(sorted(going.values(), key=lambda row: len(row.prompt) + len(row.tokens)))
            going = {}
            decoder = Decoder(base, size)
            release_memory(base.device)
        if ended:
            yield [decoded(tokenizer, row.problem_id, row.sample, row.tokens, stop_ids) for row in ended]
            ended = []


def check_sampling(samples: int, temperature: float, top_p: float, batch_size: int | None) -> None:
    """LarkError for the first of these settings of `generate_samples` that is out of its range."""
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
    """Tokens of the longest prompt.  LarkError if nothing may be generated, or without end."""
    if max_new_tokens < 1:
        raise LarkError(f"task.max_new_tokens={max_new_tokens} must be at least 1")
    if not stop_ids:
        raise LarkError("evaluation has no end token to stop at; give the tokenizer an eos_token")
    assert len(prompts) == len(keys) == len(set(keys)), "one distinct key per prompt"
    assert all(len(ids) > 0 for ids in prompts), "a prompt has tokens"
    return max(map(len, prompts), default=0)


def fitting_batch_size(model: Any, tokens: int, *, shares: bool = True, say: Callable[[str], None] = print) -> int:
    """Rows of so many tokens whose keys, values and logits fit into half of the free memory of the model's device: a
    power of two, at most 256 (on a CPU 64). shares: as `reason_against` has it; otherwise a row's size is not known.
    """
    base: Any = get_base_model(model)
    if not shares:
        say(f"generation  {ROWS_OF_UNKNOWN_SIZE} samples at once; evaluation.batch_size=<number> sets others")
        return ROWS_OF_UNKNOWN_SIZE
    with _generating(model):
        each = cache_bytes(base)
    release_memory(base.device)
    on_cpu = base.device.type == "cpu"
    free = psutil.virtual_memory().available if on_cpu else get_free_bytes(base.device, "evaluation.batch_size")
    vocabulary = base.get_input_embeddings().weight.shape[0]
    row_bytes = 1.25 * each * tokens + 16 * vocabulary  # buffers grow by a quarter; logits in two precisions, a copy
    most = MOST_ROWS_OF_A_CPU if on_cpu else MOST_ROWS
    size = min(most, 2 ** max(0, int(SHARE_OF_FREE_MEMORY * free / row_bytes).bit_length() - 1))
    say(
        f"generation  {size} samples at once ({each / 1024:,.0f} KiB of keys and values a token, up to {tokens:,} "
        f"tokens a sample, {free / 2**30:.1f} GiB free)"
    )
    return size


def _advance(
    decoder: Decoder, waiting: deque[_Row], going: dict[int, _Row], ended: list[_Row], settings: _Settings
) -> None:
    """Read rows that wait into free places, then go on until enough rows have ended for others to be read.

    going: rows under way, by slot. ended: receives those that have ended. If it raises, every row is still in one of
    the three, with the tokens that were drawn.
    """
    if waiting and decoder.free:
        rows = list(islice(waiting, decoder.free))
        slots, logits_SV = decoder.admit([[*row.prompt, *row.tokens] for row in rows])
        for slot, row in zip(slots, rows, strict=True):
            row.begin(settings)
            going[slot] = waiting.popleft()
        _draw(decoder, slots, logits_SV, going, ended, settings)
    while going:
        free = len(decoder.start) - len(going)
        if free >= FREE * len(decoder.start):
            if waiting:
                return
            moved = [going[slot] for slot in decoder.compact()]
            going.clear()
            going.update(enumerate(moved))
        if len(ended) >= max(1, FREE * len(decoder.start)):
            return
        tokens = [going[slot].tokens[-1] if slot in going else 0 for slot in range(len(decoder.start))]
        _draw(decoder, range(len(tokens)), decoder.advance(tokens), going, ended, settings)


def _draw(
    decoder: Decoder,
    slots: Sequence[int],
    logits_SV: Tensor,
    going: dict[int, _Row],
    ended: list[_Row],
    settings: _Settings,
) -> None:
    """The next token of the rows in these slots (of those under way); rows that it ends leave."""
    numbers = [going[slot].next_noise() if slot in going else 0.0 for slot in slots]
    noise_S = torch.tensor(numbers, dtype=torch.float32, device=logits_SV.device)
    drawn = draw(logits_SV, noise_S, settings.temperature, settings.top_p).tolist()
    left = []
    for slot, token in zip(slots, drawn, strict=True):
        if slot in going:
            going[slot].tokens.append(token)
            if going[slot].ended(settings):
                ended.append(going.pop(slot))
                left.append(slot)
    decoder.release(left)


class _Draws(LogitsProcessor):
    """Leaves only the drawn one of each row's tokens: greedy decoding then is sampling with noise of our own."""

    def __init__(self, rows: Sequence[_Row], prompt_length: int, settings: _Settings) -> None:
        self.rows, self.prompt_length, self.settings = rows, prompt_length, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.prompt_length
        numbers = [0.0 if row.noise_L is None else float(row.noise_L[place]) for row in self.rows]
        noise_S = torch.tensor(numbers, dtype=torch.float32, device=scores.device)
        drawn_S = draw(scores, noise_S, self.settings.temperature, self.settings.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_S[:, None], 0.0)


def _whole_batch(base: Any, size: int, waiting: deque[_Row], ended: list[_Row], settings: _Settings) -> None:
    """The next rows, from their prompts to the last one's end, as transformers generates them."""
    rows = list(islice(waiting, size))
    for row in rows:
        row.begin(settings)
    width, stop = max(len(row.prompt) for row in rows), sorted(settings.stop_ids)
    padding = [width - len(row.prompt) for row in rows]
    output = base.generate(
        input_ids=torch.tensor(
            [[stop[0]] * n + list(row.prompt) for n, row in zip(padding, rows, strict=True)], device=base.device
        ),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=base.device),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=stop, pad_token_id=stop[0]
        ),
        logits_processor=LogitsProcessorList([_Draws(rows, width, settings)]),
    )
    for row, new in zip(rows, output[:, width:].tolist(), strict=True):
        end = next((place for place, token in enumerate(new) if token in settings.stop_ids), len(new) - 1)
        row.tokens = new[: end + 1]
        ended.append(waiting.popleft())


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """The transformers model in eval mode and without generation settings of its own; restores both."""
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


def decoded(tokenizer: Any, key: str, number: int, ids: list[int], stop_ids: Collection[int]) -> Sample:
    """A sample from its token ids, the end token included."""
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

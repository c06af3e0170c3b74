"""Decoding with a cache whose rows come and go: a sample takes the place of one that has ended.

All rows end in the newest column of the cache. One that began later, or with a shorter prompt, leaves the columns
before its first token masked; columns that no row needs any more are given up. Sequences that are the same, as the
prompts of a problem's samples are, go through the model once.

Shapes: S slots (rows of the cache), P distinct sequences of a pass, L tokens of its longest, W columns, H key-value
heads, E head size, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from lark.student.memory import estimate_scoring_tokens

_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_GROWTH = 0.25  # of the columns in use: what is copied when a buffer is full was written once and copied four times
_LEAST_GROWTH = 64  # columns


class GrowingLayer(DynamicLayer):
    """Keys and values [S, H, columns, E] of one layer, with room at the right.

    Columns `first` to `last` are in use, and index 0 of the buffers is column `base`. A layer with a `window` shows the
    next token only so many columns, itself included, and keeps no others when its buffers are full.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.base = self.first = self.last = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, end = self._begin(), self.last + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            assert self.keys is not None and self.values is not None
            if end - self.base > self.keys.shape[2]:
                self.rebase(begin, end + max(_LEAST_GROWTH, int(_GROWTH * (end - begin))))
            new = slice(self.last - self.base, end - self.base)
            self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        self.last = end
        shown = slice(begin - self.base, end - self.base)
        return self.keys[:, :, shown], self.values[:, :, shown]

    def _begin(self) -> int:
        """The first column that the next token sees."""
        return self.first if self.window is None else max(self.first, self.last - self.window + 1)

    def open(self, like: "GrowingLayer", slots: int, last: int) -> None:
        """Empty buffers for so many rows, their newest column being `last` - 1."""
        assert like.keys is not None and like.values is not None
        self.lazy_initialization(like.keys, like.values)
        self.keys, self.values = (x.new_zeros(slots, x.shape[1], 0, x.shape[3]) for x in (like.keys, like.values))
        self.base = self.last = last
        self.first = 0

    def rebase(self, begin: int, end: int) -> None:
        """Buffers for columns `begin` to `end`, with what is in use of them."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._moved(self.keys, begin, end), self._moved(self.values, begin, end)
        self.base = begin

    def _moved(self, old: Tensor, begin: int, end: int) -> Tensor:
        start, stop = max(begin, self.base), self.last
        new = old.new_zeros(*old.shape[:2], end - begin, old.shape[3])  # what is masked must be finite all the same
        new[:, :, start - begin : stop - begin] = old[:, :, start - self.base : stop - self.base]
        return new

    def put(self, slots: Tensor, other: "GrowingLayer", rows: Tensor) -> None:
        """Copy rows of another layer into slots, both ending in their newest column."""
        count = other.last if self.window is None else min(other.last, self.window - 1)
        if self.last - count < self.base:
            self.rebase(self.last - count, self.last + _LEAST_GROWTH)
        mine = slice(self.last - count - self.base, self.last - self.base)
        theirs = slice(other.last - count, other.last)
        assert self.keys is not None and self.values is not None and other.keys is not None and other.values is not None
        self.keys[slots, :, mine] = other.keys[rows, :, theirs]
        self.values[slots, :, mine] = other.values[rows, :, theirs]

    def keep(self, slots: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[slots], self.values[slots]

    def get_seq_length(self) -> int:
        return self.last - self.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        begin = self._begin()
        return self.last - begin + query_length, begin - self.first


def new_cache(model: Any) -> Cache | None:
    """An empty cache for a transformers model, or None where it has layers of another kind or takes no cache."""
    config = model.config.get_text_config(decoder=True)
    if not set(inspect.signature(model.forward).parameters) >= _INPUTS:
        return None
    layers: list[Any] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layers.append(GrowingLayer(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            layers.append(GrowingLayer())
        elif type(layer) is DummyLayer:  # takes keys and values from another layer, or needs none
            layers.append(layer)
        else:
            return None
    return Cache(layers=layers)


class Decoder:
    """At most `size` rows in progress on a transformers model, which is in eval mode and inference mode."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size = model, size
        self.cache: Any = None
        self.first = self.last = 0
        """Columns in use."""
        self.start: list[int | None] = []
        """Column of each slot's first token; None: the slot is free."""
        self.passed_tokens = 0
        """Tokens of all passes so far, padding included."""

    @property
    def free(self) -> int:
        return self.start.count(None) if self.used else self.size

    @property
    def used(self) -> int:
        return len(self.start) - self.start.count(None)

    def admit(self, sequences: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read sequences into free slots; their slots, and the logits [n, V] of what comes next."""
        assert 0 < len(sequences) <= self.free
        if not self.used:
            self.cache, self.start = None, [None] * len(sequences)
            self.first, self.last = 0, max(map(len, sequences))
        slots = [slot for slot, start in enumerate(self.start) if start is None][: len(sequences)]
        distinct: dict[tuple[int, ...], list[int]] = {}
        for place, sequence in enumerate(sequences):
            distinct.setdefault(tuple(sequence), []).append(place)
        order = sorted(distinct, key=lambda sequence: -len(sequence))
        logits: list[Tensor | None] = [None] * len(sequences)
        while order:
            count = max(1, estimate_scoring_tokens(self.model, self.model.device) // len(order[0]))
            batch, order = order[:count], order[count:]
            logits_PV, cache = self._read(batch)
            rows = [row for row, sequence in enumerate(batch) for _ in distinct[sequence]]
            places = [place for sequence in batch for place in distinct[sequence]]
            self._put([slots[place] for place in places], cache, rows)
            for row, place in zip(rows, places, strict=True):
                logits[place] = logits_PV[row]
        for slot, sequence in zip(slots, sequences, strict=True):
            self.start[slot] = self.last - len(sequence)
        self._trim()
        return slots, torch.stack([row for row in logits if row is not None])

    def _read(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Any]:
        """Next token's logits [P, V] of left-padded sequences, longest first, and their keys and values."""
        width, device = len(sequences[0]), self.model.device
        cache = new_cache(self.model)
        mask_PL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
        output = self.model(
            input_ids=torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in sequences], device=device),
            attention_mask=mask_PL,
            position_ids=(mask_PL.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.passed_tokens += width * len(sequences)
        return output.logits[:, -1], cache

    def _put(self, slots: list[int], cache: Any, rows: list[int]) -> None:
        if self.cache is None:
            self.cache = new_cache(self.model)
            for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
                if isinstance(mine, GrowingLayer):
                    mine.open(theirs, len(self.start), self.last)
        slots_R, rows_R = (torch.tensor(x, device=self.model.device) for x in (slots, rows))
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            if isinstance(mine, GrowingLayer):
                mine.put(slots_R, theirs, rows_R)

    def _trim(self) -> None:
        """Give up the columns before every row's first token."""
        self.first = min((start for start in self.start if start is not None), default=self.last)
        for layer in self._layers():
            layer.first = self.first

    def _layers(self) -> list[GrowingLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, GrowingLayer)]

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """One token more for every slot (for free ones, any): the logits [S, V] of what comes next."""
        device = self.model.device
        start_S1 = torch.tensor([self.last if x is None else x for x in self.start], device=device)[:, None]
        output = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=(torch.arange(self.first, self.last + 1, device=device) >= start_S1).long(),
            position_ids=self.last - start_S1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.last += 1
        self.passed_tokens += len(self.start)
        return output.logits[:, -1]

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.start[slot] = None
        if self.used:
            self._trim()

    def compact(self) -> list[int]:
        """Close up the free slots; the earlier number of each slot that is left."""
        kept = [slot for slot, start in enumerate(self.start) if start is not None]
        kept_S = torch.tensor(kept, device=self.model.device)
        for layer in self._layers():
            layer.keep(kept_S)
        self.start = [self.start[slot] for slot in kept]
        return kept


@torch.inference_mode()
def cache_bytes(model: Any) -> int:
    """What a model's cache takes for each token of a row."""
    cache: Any = new_cache(model)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.nbytes for x in tensors)


def reason_against(model: Any) -> str | None:
    """Why a `Decoder` would not give the model's own logits; None: it does.

    Tried on rows of unequal length, of which some share their beginning and one comes later.
    """
    if new_cache(model) is None:
        return f"{type(model).__name__} keeps more than the keys and values of its tokens"
    rows = [[3, 1, 4, 1, 5, 9], [3, 1, 4, 2, 7, 1], [2, 6, 5, 3]]
    late = [[8, 9, 7], [9, 3, 2]]
    decoder = Decoder(model, 3)
    try:
        decoder.admit([rows[0][:3], rows[1][:3], rows[2][:1]])
        for step in range(2):
            decoder.advance([rows[0][3 + step], rows[1][3 + step], rows[2][1 + step]])
        decoder.release([2])
        decoder.admit([late[0][:2]])
        found_SV = decoder.advance([rows[0][5], rows[1][5], late[0][2]])
        expected = [_last_logits(model, ids) for ids in (rows[0], rows[1], late[0])]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return f"{type(model).__name__}: {error}"
    difference = (found_SV.float() - torch.stack(expected)).abs().max().item()
    # Between experts, or in bfloat16, rounding alone may do much; a wrong mask or position does far more.
    allowed = 0.001 if found_SV.dtype == torch.float32 else 0.1
    if not difference <= allowed * max(1.0, max(x.abs().max().item() for x in expected)):
        return f"{type(model).__name__}: its logits would differ by {difference:.2g}"
    return None


def _last_logits(model: Any, ids: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()

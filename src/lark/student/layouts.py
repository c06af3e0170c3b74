"""How the rows of a step are laid out for forward-backward passes, and which layout costs less.

buckets: rows of similar length, right-padded to the longest. Padding is computed for nothing.
packed: rows one after another, none padded. Where the student's attention takes documents one by one (lark.student.attention),
in groups of similar length, that is all there is to it, but for what starting each group's operations takes on a GPU,
which is idle meanwhile if the step is small. Where it gets a mask instead, it also multiplies the tokens of different
documents, which costs dearly in long rows.

Shapes: N rows.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from lark.student.attention import PADDING, group_sizes
from lark.student.batching import micro_batches

ATTENTION_SLOWDOWN = 3.0  # of attention's multiplications against those of the matrices, measured on a CPU
GATHERING = 0.03  # of the matrices' time, what gathering documents for attention takes at most
LAUNCH = 2e9  # multiply-adds of which a GPU could do as many while one operation is started (10 us; estimated)
PASS_LAUNCHES, GROUP_LAUNCHES = 100, 40  # operations a layer, there and back: of a micro-batch, of a group in it


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a forward pass of a student takes, in multiply-adds of its matrices.

    token: of one token in all matrices of the decoder. pair: of two tokens in the attention of all layers.
    apart: whether attention takes the documents of a packed row one by one. start, group: of starting a micro-batch's
    operations, and those of each group of documents in it.
    """

    token: float
    pair: float
    apart: bool
    start: float = 0.0
    group: float = 0.0

    def of_bucket(self, lengths: np.ndarray) -> float:
        longest = float(lengths.max())
        return self.start + len(lengths) * (self.token * longest + self.pair * longest**2)

    def of_packed(self, lengths: np.ndarray) -> float:
        total = float(lengths.sum())
        if not self.apart:
            return (
                self.start + self.token * total + 2 * self.pair * total**2
            )  # a mask hides half of the places, and saves none
        pairs = (1 + PADDING) * float(np.square(lengths, dtype=np.float64).sum())
        starts = self.start + self.group * len(group_sizes(lengths))
        return starts + (1 + GATHERING) * self.token * total + self.pair * pairs


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Rows cut into micro-batches: indices of the rows of each, how they are laid out, the expected cost, and how many
    tokens the largest computes.
    """

    rows: list[np.ndarray]
    packed: bool
    cost: float
    tokens: int


def costs_of(model: Any, *, apart: bool) -> Costs:
    """Of a transformers causal language model."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    embedding = {id(p) for m in model.get_decoder().modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [
        p
        for name, p in model.get_decoder().named_parameters()
        if p.ndim >= 2 and id(p) not in embedding and "lora_" not in name
    ]
    # scores and their sums, each causal: half of the places
    pair = ATTENTION_SLOWDOWN * width * config.num_hidden_layers
    return Costs(token=sum(p.numel() for p in matrices), pair=pair, apart=apart)


def launched(costs: Costs, *, layers: int) -> Costs:
    """The costs on a GPU, where the host starts every operation, of a student of so many decoder layers."""
    return replace(costs, start=PASS_LAUNCHES * layers * LAUNCH, group=GROUP_LAUNCHES * layers * LAUNCH)


def cut(lengths: np.ndarray, *, layout: str, budget: int, costs: Costs) -> Cut:
    """Cut rows of `lengths` [N] (tokens) into micro-batches of at most `budget` computed tokens (a longer row goes
    alone), in `layout`; "auto" is the cheaper one.
    """
    if not len(lengths):
        return Cut(rows=[], packed=False, cost=0.0, tokens=0)
    options = []
    for packed, cost in ((False, costs.of_bucket), (True, costs.of_packed)):
        if layout in ("auto", "packed" if packed else "buckets"):
            rows = micro_batches(lengths, budget=budget, packed=packed)
            tokens = max(int(lengths[part].sum() if packed else len(part) * lengths[part].max()) for part in rows)
            options.append(Cut(rows=rows, packed=packed, cost=sum(cost(lengths[part]) for part in rows), tokens=tokens))
    return min(options, key=lambda option: option.cost)

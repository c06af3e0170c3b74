"""One packed row of tokens, in which sequences that begin alike are one tree, and its attention.

The candidates of a problem share their prompt. In a causal model a token's hidden state depends on what precedes it
alone, so the sequences of a micro-batch are paths in a tree whose nodes are their distinct beginnings. The student's
linear layers see every node once, in one row [1, X] without padding. Attention is that of variable-length sequences:
the queries of a path are the nodes that are new on it, its keys are all its nodes, and the causal mask is aligned at
the lower right. Without shared beginnings queries and keys are the same tokens, and nothing is gathered.

Shapes: X nodes, P paths, K nodes of all paths one after another, q and k queries and keys of one path, H heads, G
key-value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lark.student.transfer import copy_to_device

TREE_ATTENTION = "prefix_tree"  # its name among transformers' implementations
TRIAL_ATTENTION = "prefix_tree_trial"
LEAST_SAVING = 0.05  # of the tokens, for which gathering the keys pays
MASKED_QUERIES = 512  # of a path at most for which a mask costs no more than the half of the square that it spares
MASK_PLACES = 2**22  # of a mask at most: the backward pass keeps it


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """Paths of one packed row, whose new nodes lie one path after another.

    `cu_q` and `cu_k` (int32 [P + 1]) are the borders of the paths' queries and keys, and `longest_q` and `longest_k`
    the most of one path; `node_K` are the nodes whose keys those are (None: every path's own, in their order).
    `own_P` and `shared_P` count the nodes new on each path and those before them, for loops on the host.
    """

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    node_K: Tensor | None
    own_P: tuple[int, ...]
    shared_P: tuple[int, ...]

    def to(self, device: torch.device) -> "PrefixTree":
        """Copy to `device`."""
        return replace(self, **{k: copy_to_device(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)})


def build_prefix_tree(
    sequences: Sequence[Sequence[int] | np.ndarray], *, share: bool = True
) -> tuple[Tensor, Tensor, PrefixTree, list[np.ndarray]]:
    """Build the tree of sequences: token ids and positions (depths) of its nodes [X], the tree, and the nodes of each
    sequence's tokens. Without `share`, or where it would spare little, every sequence is a path of its own.
    """
    rows = [np.asarray(sequence, np.int64) for sequence in sequences]
    shared, order = _count_shared(rows)
    lengths = np.array([len(row) for row in rows])
    if not share or shared.sum() < LEAST_SAVING * lengths.sum():
        shared[:] = 0
    own = lengths - shared
    ends = np.cumsum(own[order])
    paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(rows)
    path = np.zeros(0, np.int64)
    for i, end, new in zip(order.tolist(), ends.tolist(), own[order].tolist(), strict=True):
        paths[i] = path = np.concatenate([path[: shared[i]], np.arange(end - new, end)])
    ids_X = np.concatenate([rows[i][shared[i] :] for i in order])
    depths_X = np.concatenate(
        [np.arange(first, end) for first, end in zip(shared[order].tolist(), lengths[order].tolist(), strict=True)]
    )
    new = order[own[order] > 0]  # a sequence that another begins with adds nothing
    tree = PrefixTree(
        cu_q=_cumulate(own[new]),
        cu_k=_cumulate(lengths[new]),
        longest_q=int(own[new].max()),
        longest_k=int(lengths[new].max()),
        node_K=torch.from_numpy(np.concatenate([paths[i] for i in new])) if shared[new].any() else None,
        own_P=tuple(own[new].tolist()),
        shared_P=tuple(shared[new].tolist()),
    )
    return torch.from_numpy(ids_X), torch.from_numpy(depths_X), tree, paths


def _count_shared(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Count what each row begins with that the one before it has too, in the order returned with it: lexicographic, in
    which a row shares most with the one before it.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())
    shared, previous = np.zeros(len(rows), np.int64), np.zeros(0, np.int64)
    for i in order:
        shorter = min(len(rows[i]), len(previous))
        different = np.flatnonzero(rows[i][:shorter] != previous[:shorter])
        shared[i] = different[0] if len(different) else shorter
        previous = rows[i]
    return shared, np.array(order)


def _cumulate(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32))


# ---- attention


def _attend_tree(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_tree: PrefixTree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query [1, H, X, E], key and value [1, G, X, E] -> [1, X, H, E].

    Without a tree: rows [R, H, L, E] -> [R, L, H, E], each causal by itself.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary positions make float32 of them
    tree = prefix_tree
    if tree is not None and tree.node_K is not None:
        key, value = _gather(key, tree.node_K), _gather(value, tree.node_K)
    if tree is not None and dropout == 0.0 and _has_kernel(query, value):
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        rows = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        borders = (tree.cu_q, tree.cu_k, tree.longest_q, tree.longest_k)
        return varlen_attn(*rows, *borders, scale=scaling, window_size=window, enable_gqa=True)[None], None  # type: ignore[union-attr]
    if query.device.type == "cuda" and query.shape[1] > key.shape[1]:  # no kernel for groups of heads in float32
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    settings = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] > key.shape[1]}
    if tree is None:
        return _attend_path(query, key, value, sliding_window, **settings).transpose(1, 2), None
    lengths = [own + shared for own, shared in zip(tree.own_P, tree.shared_P, strict=True)]
    pieces = zip(query.split(tree.own_P, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_attend_path(*piece, sliding_window, **settings).transpose(1, 2) for piece in pieces]
    return torch.cat(outputs, 1), None


def _gather(x: Tensor, node_K: Tensor) -> Tensor:
    """Gather the nodes of all paths: [1, G, X, E] -> [1, G, K, E]."""
    return x.squeeze(0).transpose(0, 1).index_select(0, node_K).transpose(0, 1)[None]  # a node is one piece of memory


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Tell whether flash attention takes such heads (on the meta device, as on a GPU)."""
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    fits = query.shape[3] == value.shape[3] <= 256 and query.shape[3] % 8 == 0
    return fits and query.device.type in ("cuda", "meta") and query.dtype in (torch.bfloat16, torch.float16)


def _attend_path(query: Tensor, key: Tensor, value: Tensor, window: int | None, **settings: Any) -> Tensor:
    """Attend causally by sdpa from the last q of k tokens, [R, H, q, E], to all of them, [R, G, k, E].

    Where `window` tokens are looked back only, as many queries at a time, so that a mask has at most window x
    (2 window) places, however long the path.
    """
    queries, keys = query.shape[2], key.shape[2]
    shared = keys - queries
    if window is None or keys <= window:
        if not shared:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
        if queries <= max(MASKED_QUERIES, shared) and queries * keys <= MASK_PLACES:
            mask_qk = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_(shared)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_qk, **settings)
        # the kernel's mask is aligned at the upper left: put queries that nobody reads before the others
        padded = F.pad(query, (0, 0, shared, 0))
        return F.scaled_dot_product_attention(padded, key, value, is_causal=True, **settings)[:, :, shared:]
    blocks = []
    for start in range(0, queries, window):
        stop, first = min(start + window, queries), max(shared + start - window + 1, 0)
        place_q = torch.arange(shared + start, shared + stop, device=query.device)[:, None]
        place_k = torch.arange(first, shared + stop, device=query.device)[None]
        mask_qk = (place_k <= place_q) & (place_k > place_q - window)
        part = (query[:, :, start:stop], key[:, :, first : shared + stop], value[:, :, first : shared + stop])
        blocks.append(F.scaled_dot_product_attention(*part, attn_mask=mask_qk, **settings))
    return torch.cat(blocks, 2)


AttentionInterface.register(TREE_ATTENTION, _attend_tree)


# ---- whether a student takes packed rows


def enable_packed_rows(model: Any, implementation: str) -> str | None:
    """Make the student's attention understand prefix trees: from here on `compute_hidden_states` takes them. Returns
    None, or why this student cannot (it is left as it was, and takes one row a forward pass).

    Whether it can is tried: an attention of another kind, or a layer that mixes tokens without attention, gives other
    hidden states. (Layers with a convolution are refused without trying.)
    """
    if implementation != "sdpa":
        return f"model.attention={implementation} takes whole rows"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.get_decoder().modules()):
        return f"{type(model).__name__} does not mix tokens by attention alone"
    windows = set[int | None]()

    def attend(*inputs: Any, sliding_window: int | None = None, **keywords: Any) -> tuple[Tensor, None]:
        windows.add(sliding_window)
        return _attend_tree(*inputs, sliding_window=sliding_window, **keywords)

    with torch.inference_mode():
        device = next(model.parameters()).device
        expected = [_compute_states(model, torch.tensor(ids, device=device)) for ids in _TRIAL]
        AttentionInterface.register(TRIAL_ATTENTION, attend)
        model.set_attn_implementation(TRIAL_ATTENTION)
        reason = _try_tree(model, expected) or _find_hidden_window(model.config.get_text_config(), windows)
    model.set_attn_implementation(implementation if reason else TREE_ATTENTION)
    return reason


_TRIAL = [[3, 1, 4, 1, 5], [3, 1, 4, 2, 7, 1, 8], [3, 1, 4, 2, 6, 9]]


def _compute_states(model: Any, ids_X: Tensor, **keywords: Any) -> Tensor:
    return model.get_decoder()(input_ids=ids_X[None], use_cache=False, **keywords).last_hidden_state[0]


def _try_tree(model: Any, expected: list[Tensor]) -> str | None:
    """Say why the trial's hidden states as a tree are not the `expected` ones of its rows, if so."""
    device = expected[0].device
    ids_X, depths_X, tree, paths = build_prefix_tree(_TRIAL)
    packed = {"position_ids": depths_X[None].to(device), "prefix_tree": tree.to(device)}
    try:
        states_XD = _compute_states(model, ids_X.to(device), **packed)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(model).__name__}: {error}"
    found = [states_XD[torch.from_numpy(path).to(device)] for path in paths]
    difference = max((a - b).abs().max() for a, b in zip(expected, found, strict=True))
    largest = max(a.abs().max() for a in expected)
    rounding = 0.02 if states_XD.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return None if difference <= rounding * largest else f"its hidden states would differ by {difference:.2g}"


def _find_hidden_window(config: Any, told: set[int | None]) -> str | None:
    """Say why attention would not look back a window only, where the mask alone says so, which is not made here."""
    types = getattr(config, "layer_types", None)
    if types is not None and not any(kind.startswith(("sliding", "chunked")) for kind in types):
        return None
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    hidden = [window for window in found if window is not None and window not in told]
    return f"its attention is not told of its window of {hidden[0]} tokens" if hidden else None

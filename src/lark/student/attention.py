"""Sequences that begin alike, computed as one tree of tokens: what several share goes through the student once.

The candidates of a problem share their prompt. In a causal model a token's hidden state depends on what precedes it
alone, so the sequences of a micro-batch are paths in a tree whose nodes are their distinct beginnings. The student's
linear layers see every node once, in one row without padding; only attention, a small part of the work, is computed
sequence by sequence: queries, keys and values are gathered into padded rows, and each node takes its result from one
of the rows that it is on. So attention needs no mask but the causal one, and costs what it costs without sharing.

Shapes: X nodes, R sequences of a group, L tokens of its longest, H heads, G key-value heads, E head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TREE_ATTENTION = "prefix_tree_sdpa"  # its name among transformers' implementations
PADDING = 0.15  # of a group's attention at most; more groups mean more and smaller calls
GROUP_TOKENS = 32768  # of a group at most: what is gathered at a time, however much longer sequences are than the tree


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sequences of similar length, right-padded: `node_RL` are their nodes (node 0 in the padding). `taken_M` are the
    places of the flattened [R * L] whose result goes to the nodes `into_M`.
    """

    node_RL: Tensor
    taken_M: Tensor
    into_M: Tensor


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """Nodes of one row of tokens, ancestors first, on the paths of sequences."""

    groups: tuple[Group, ...]

    def to(self, device: torch.device) -> "PrefixTree":
        """Copy to `device`."""
        return PrefixTree(
            groups=tuple(Group(**{k: v.to(device, non_blocking=True) for k, v in vars(g).items()}) for g in self.groups)
        )


def build_prefix_tree(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, PrefixTree, list[np.ndarray]]:
    """Build the tree of sequences: token ids and positions (depths) of its nodes [X], the tree, and the nodes of each
    sequence's tokens.
    """
    paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(sequences)
    ids, depths, nodes = [], [], 0
    previous, path = np.zeros(0, np.int64), np.zeros(0, np.int64)
    # In lexicographic order a sequence shares most with the one before it.
    for i in sorted(range(len(sequences)), key=lambda i: list(sequences[i])):
        own = np.asarray(sequences[i], np.int64)
        shorter = min(len(own), len(previous))
        different = np.flatnonzero(own[:shorter] != previous[:shorter])
        shared = int(different[0]) if len(different) else shorter
        path = np.concatenate([path[:shared], np.arange(nodes, nodes + len(own) - shared)])
        ids.append(own[shared:])
        depths.append(np.arange(shared, len(own)))
        nodes += len(own) - shared
        paths[i], previous = path, own
    ids_X, depths_X = torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(depths))
    return ids_X, depths_X, PrefixTree(groups=tuple(_build_groups(paths, nodes))), paths


def plan_group_sizes(lengths: np.ndarray) -> list[int]:
    """Plan how many sequences of `lengths` [R] (tokens), the longest first, each group takes."""
    sizes, start, ordered = [], 0, -np.sort(-lengths)
    for stop in range(1, len(ordered) + 1):
        padded = (stop + 1 - start) * ordered[start]
        most = min(GROUP_TOKENS, (1 + PADDING) * ordered[start : stop + 1].sum())
        if stop == len(ordered) or padded > most:
            sizes.append(stop - start)
            start = stop
    return sizes


def _build_groups(paths: list[np.ndarray], nodes: int) -> list[Group]:
    lengths = np.array([len(path) for path in paths])
    order = np.argsort(-lengths, kind="stable")
    seen = np.zeros(nodes, bool)
    groups, start = [], 0
    for size in plan_group_sizes(lengths):
        group = [paths[i] for i in order[start : start + size].tolist()]
        node_RL = np.zeros((len(group), len(group[0])), np.int64)
        new_RL = np.zeros(node_RL.shape, bool)
        for row, path in enumerate(group):
            node_RL[row, : len(path)] = path
            new_RL[row, : len(path)] = ~seen[path]
            seen[path] = True
        taken_M = np.flatnonzero(new_RL)
        groups.append(
            Group(
                node_RL=torch.from_numpy(node_RL),
                taken_M=torch.from_numpy(taken_M),
                into_M=torch.from_numpy(node_RL.reshape(-1)[taken_M]),
            )
        )
        start += size
    return groups


def enable_prefix_sharing(model: Any, implementation: str) -> str | None:
    """Make the student's attention understand prefix trees: from here on `compute_hidden_states` takes them, and
    sequences without one are right-padded rows. Returns None, or why this student cannot (it is left as it was).

    Whether it can is tried: an attention of another kind, or a layer that mixes tokens without attention, gives other
    hidden states. (Layers with a convolution are refused without trying.)
    """
    if implementation != "sdpa":
        return f"model.attention={implementation} takes whole rows"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.get_decoder().modules()):
        return f"{type(model).__name__} does not mix tokens by attention alone"
    windows = set[int]()
    inner = partial(_attend_in_window, ALL_ATTENTION_FUNCTIONS[implementation])
    AttentionInterface.register(TREE_ATTENTION, partial(_attend_tree, inner, windows))
    with torch.inference_mode():
        rows, padded = _compute_trial_rows(model)
        model.set_attn_implementation(TREE_ATTENTION)
        reason = _try_tree(model, rows, padded) or _find_hidden_window(model.config.get_text_config(), windows)
    if reason is not None:
        model.set_attn_implementation(implementation)
    return reason


_TRIAL = [[3, 1, 4, 1, 5], [3, 1, 4, 2, 7, 1, 8], [3, 1, 4, 2, 6, 9]]


def _compute_trial_rows(model: Any) -> tuple[list[Tensor], Tensor]:
    """Compute the trial's hidden states as always: of each row alone, and of all right-padded [R, L, D]."""
    decoder, device = model.get_decoder(), next(model.parameters()).device
    padded_RL = torch.zeros(len(_TRIAL), max(map(len, _TRIAL)), dtype=torch.int64)
    for row, ids in enumerate(_TRIAL):
        padded_RL[row, : len(ids)] = torch.tensor(ids)
    rows = [decoder(input_ids=torch.tensor([ids], device=device), use_cache=False) for ids in _TRIAL]
    padded = decoder(input_ids=padded_RL.to(device), use_cache=False)
    return [row.last_hidden_state[0] for row in rows], padded.last_hidden_state


def _try_tree(model: Any, rows: list[Tensor], padded_RLD: Tensor) -> str | None:
    """Say why the trial's hidden states as a tree are not those of its `rows`, if so."""
    device = rows[0].device
    ids_X, depths_X, tree, paths = build_prefix_tree(_TRIAL)
    where = {"input_ids": ids_X[None].to(device), "position_ids": depths_X[None].to(device)}
    try:
        output = model.get_decoder()(**where, use_cache=False, prefix_tree=tree.to(device))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(model).__name__}: {error}"
    nodes = [output.last_hidden_state[0][torch.from_numpy(path).to(device)] for path in paths]
    # another cut of the same sequences shows what rounding does
    rounding = max((a - one[: len(a)]).abs().max() for a, one in zip(rows, padded_RLD, strict=True))
    difference = max((a - one).abs().max() for a, one in zip(rows, nodes, strict=True))
    largest = max(a.abs().max() for a in rows)
    same = difference <= min(4 * rounding + 1e-5 * largest, 0.02 * largest)
    return None if same else f"its hidden states would differ by {difference:.2g}"


def _find_hidden_window(config: Any, told: set[int]) -> str | None:
    """Say why attention would not look back a window only, where the mask alone says so, which is not made here."""
    types = getattr(config, "layer_types", None)
    if types is not None and not any(kind.startswith(("sliding", "chunked")) for kind in types):
        return None
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    hidden = [window for window in found if window is not None and window not in told]
    return f"its attention is not told of its window of {hidden[0]} tokens" if hidden else None


def _attend_tree(
    inner: Callable[..., Tensor],
    windows: set[int],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_tree: PrefixTree | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query [1, H, X, E], key and value [1, G, X, E] -> [1, X, H, E].

    Without a tree: rows [R, H, L, E] -> [R, L, H, E], as always. `windows` learns which ones it is told of.
    """
    if (window := keywords.get("sliding_window")) is not None:
        windows.add(window)
    if prefix_tree is None:
        return inner(module, query, key, value, **keywords), None
    result_XHE: Tensor | None = None
    for group in prefix_tree.groups:
        output_RLHE = inner(module, *(_gather(x, group.node_RL) for x in (query, key, value)), **keywords)
        if result_XHE is None:  # autocast may have made it of another dtype than the queries
            result_XHE = output_RLHE.new_empty(query.shape[2], query.shape[1], value.shape[3])
        result_XHE[group.into_M] = output_RLHE.flatten(0, 1).index_select(0, group.taken_M)
    assert result_XHE is not None
    return result_XHE[None], None


def _gather(x: Tensor, node_RL: Tensor) -> Tensor:
    """Gather a group's rows: [1, H, X, E] -> [R, H, L, E]."""
    x_XD = x[0].transpose(0, 1).flatten(1)  # one piece of memory a node
    return x_XD.index_select(0, node_RL.view(-1)).view(*node_RL.shape, x.shape[1], -1).transpose(1, 2)


def _attend_in_window(
    attend: Callable[..., Any], module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **keywords: Any
) -> Tensor:
    """Attend causally by sdpa. In a layer that looks back `sliding_window` tokens only, as many queries at a time, so
    that a mask has at most window x (2 window) places, however long the row.
    """
    window, length = keywords.get("sliding_window"), query.shape[2]
    if window is None or length <= window:
        return attend(module, query, key, value, None, **keywords)[0]
    blocks = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(start - window + 1, 0)
        place_Q = torch.arange(start, stop, device=query.device)[:, None]
        place_K = torch.arange(first, stop, device=query.device)[None]
        mask_QK = (place_K <= place_Q) & (place_K > place_Q - window)
        part = (query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop])
        blocks.append(attend(module, *part, mask_QK[None, None], **keywords)[0])
    return torch.cat(blocks, 1)

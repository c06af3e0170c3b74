"""Prefix trees: each distinct beginning once, and hidden states as of sequences computed by themselves."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lark.student.attention import LEAST_SAVING, _attend_path, build_prefix_tree, enable_packed_rows
from lark.student.model_parts import compute_hidden_states

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8)


@given(sequences)
def test_every_distinct_beginning_is_one_node(rows):
    ids_X, depths_X, _, paths = build_prefix_tree(rows)
    beginnings = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    total = sum(map(len, rows))
    is_tree = total - len(beginnings) >= LEAST_SAVING * total
    assert len(ids_X) == len(depths_X) == (len(beginnings) if is_tree else total)
    assert [ids_X[path].tolist() for path in paths] == rows
    assert all(depths_X[path].tolist() == list(range(len(path))) for path in paths)
    assert all((np.diff(path) > 0).all() for path in paths), "ancestors first"


@given(sequences, st.booleans())
def test_queries_are_what_is_new_on_a_path_and_keys_the_whole_path(rows, share):
    ids_X, _, tree, paths = build_prefix_tree(rows, share=share)
    nodes = torch.arange(len(ids_X)) if tree.node_K is None else tree.node_K
    found = [nodes[start:stop].tolist() for start, stop in pairwise(tree.cu_k.tolist())]
    assert all(keys in [path.tolist() for path in paths] for keys in found)
    borders = list(pairwise(tree.cu_q.tolist()))
    for keys, (start, stop) in zip(found, borders, strict=True):
        assert keys[len(keys) - (stop - start) :] == list(range(start, stop)), "every node is a query once"
    assert borders[-1][1] == len(ids_X) and tree.cu_q.dtype == tree.cu_k.dtype == torch.int32
    assert tree.longest_q == max(stop - start for start, stop in borders) == max(tree.own_P)
    assert tree.longest_k == max(map(len, found))
    assert [own + shared for own, shared in zip(tree.own_P, tree.shared_P, strict=True)] == list(map(len, found))


def test_little_that_is_shared_is_not_gathered():
    rows = [[1, 2, *range(10, 60)], [1, 2, *range(60, 110)]]
    ids_X, _, tree, _ = build_prefix_tree(rows)
    assert tree.node_K is None and len(ids_X) == 104


@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize(("shared", "own"), [(0, 9), (4, 5), (13, 2), (3, 600)])
def test_a_path_against_dense_attention(shared, own, window):
    """Aligned at the lower right, in float64; the last case is too long for a mask."""
    torch.manual_seed(0)
    keys, groups = shared + own, 2
    query, key, value = (torch.randn(1, n, size, 8).double() for n, size in ((4, own), (2, keys), (2, keys)))
    k, v = (x.repeat_interleave(groups, 1) for x in (key, value))
    place_q, place_k = shared + torch.arange(own)[:, None], torch.arange(keys)[None]
    seen = (place_k <= place_q) & (place_k > place_q - (window or keys))
    scores = (query @ k.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    ours = _attend_path(query, key, value, window, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, scores.softmax(3) @ v, rtol=1e-12, atol=1e-12)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 16  # shorter than the rows below


def random_student(architecture, attention="sdpa", **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES | settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def some_rows():
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 64, 20).tolist()
    return [prompt + rng.integers(3, 64, length).tolist() for length in (30, 7, 22)] + [[5, 6, 7]]


def alone(model, rows):
    return [model.get_decoder()(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": WINDOW}),
        ("gemma3_text", {"sliding_window": WINDOW}),
        ("phi3", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)
def test_nodes_have_the_hidden_states_of_separate_sequences(architecture, settings):
    model, rows = random_student(architecture, **settings), some_rows()
    ids_X, depths_X, tree, paths = build_prefix_tree(rows)
    assert len(ids_X) == 20 + 30 + 7 + 22 + 3
    with torch.inference_mode():
        expected = alone(model, rows)
        assert enable_packed_rows(model, "sdpa") is None
        nodes_XD = compute_hidden_states(model, ids_X[None], depths_X[None], tree)
        for row, path, states in zip(rows, paths, expected, strict=True):
            torch.testing.assert_close(nodes_XD[torch.from_numpy(path)], states, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                compute_hidden_states(model, torch.tensor([row]), None), states, rtol=1e-5, atol=1e-5
            )


def dense_varlen(query, key, value, cu_q, cu_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """Stand in for torch's varlen_attn, whose kernels need a GPU: path by path by its definition."""
    assert enable_gqa and (longest_q, longest_k) == (cu_q.diff().max(), cu_k.diff().max())
    results = []
    for (start, stop), (first, last) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        q, k, v = query[start:stop], key[first:last], value[first:last]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        place_q, place_k = torch.arange(last - first)[-len(q) :, None], torch.arange(last - first)[None]
        seen = place_k <= place_q
        if window_size[0] >= 0:
            seen &= place_k >= place_q - window_size[0]
        weight = (torch.einsum("qhe,khe->hqk", q, k) * scale).masked_fill(~seen, -torch.inf).softmax(2)
        results.append(torch.einsum("hqk,khe->qhe", weight, v))
    return torch.cat(results)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": WINDOW}], ids=["full", "window"])
def test_what_a_gpus_kernel_is_given_is_what_the_loop_computes(settings, share, monkeypatch):
    model, rows = random_student("mistral", **{"sliding_window": None} | settings), some_rows()
    assert enable_packed_rows(model, "sdpa") is None
    ids_X, depths_X, tree, _ = build_prefix_tree(rows, share=share)
    with torch.inference_mode():
        expected = compute_hidden_states(model, ids_X[None], depths_X[None], tree)
        monkeypatch.setattr("lark.student.attention._has_kernel", lambda *_: True)
        monkeypatch.setattr("lark.student.attention.varlen_attn", dense_varlen)
        given = compute_hidden_states(model, ids_X[None], depths_X[None], tree)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "attention", "reason"),
    [
        ("lfm2", "sdpa", "does not mix tokens by attention alone"),
        ("qwen2_moe", "sdpa", "not told of its window of 16 tokens"),
        ("llama", "eager", "model.attention=eager"),
    ],
)
def test_a_student_that_cannot_share_is_left_as_it_was(architecture, attention, reason):
    settings = {
        "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
        "qwen2_moe": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "num_experts": 4},
    }
    model = random_student(architecture, attention, **settings.get(architecture, {}))
    assert reason in (enable_packed_rows(model, attention) or "")
    assert model.config._attn_implementation == attention


class Averaging(torch.nn.Module):
    """A layer of the kind that knows no paths: it mixes each token with the one before it in memory."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + torch.nn.functional.pad(x, (0, 0, 1, -1)))


def test_hidden_mixing_between_neighbours_is_found_by_trying():
    model = random_student("llama")
    model.model.layers[1].mlp = Averaging(model.model.layers[1].mlp)
    assert "hidden states would differ" in (enable_packed_rows(model, "sdpa") or "")
    assert model.config._attn_implementation == "sdpa"

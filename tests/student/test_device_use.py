"""A forward pass and a training step wait for no device, and start a bounded number of operations.

There is no GPU here: on the meta device, which takes the GPU's way through attention, everything that needs a value
(`.item()`, `.cpu()`, `bool()`) raises.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lark.scoring.pass_module import ScoringSettings
from lark.scoring.statistics_pass import summarise_tokens
from lark.student.attention import TREE_ATTENTION
from lark.student.batching import pack_rows
from lark.student.chat import TokenizedTrajectory
from lark.student.model_parts import compute_hidden_states, decoder_layers, get_head
from lark.training.sft_module import _weighted_surprisal

META = torch.device("meta")
LAYERS = 2


def meta_student(dtype=torch.bfloat16):
    """A student of Qwen2.5-0.5B's shape, with fewer layers."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.set_attn_implementation(TREE_ATTENTION)
    return model


def packed(documents, *, prompt=100, share=True, seed=0):
    """Trajectories of `documents` tokens each, every two of which share a prompt."""
    rng = np.random.default_rng(seed)
    rows, ids = [], []
    for i, tokens in enumerate(documents):
        ids = rng.integers(3, 1000, prompt).tolist() if i % 2 == 0 else ids
        row = ids + rng.integers(3, 1000, tokens).tolist()
        rows.append(TokenizedTrajectory(input_ids=row, prompt_tokens=prompt, end_of_turn=tokens - 1, steps=[0]))
    return pack_rows(rows, list(range(len(rows))), share=share).to(META)


def score(model, micro, keep="tokens"):
    with torch.inference_mode():
        hidden_XD = compute_hidden_states(model, micro.input_ids_1X, micro.position_ids_1X, micro.tree)
        return summarise_tokens(hidden_XD, micro, get_head(model), ScoringSettings(keep=keep), compiled=False)


def train(model, micro):
    _weighted_surprisal(model, micro, torch.ones(1, len(micro.rows), device=META)).sum().backward()


@pytest.fixture(scope="module")
def student():
    return meta_student()


@pytest.mark.parametrize("share", [True, False])
def test_nothing_in_a_unit_waits_for_the_device(student, share):
    micro = packed([300, 20, 700, 45], share=share)
    assert micro.tree is not None and (micro.tree.node_K is not None) == share
    sum_CR, *columns = score(student.eval(), micro)
    assert sum_CR.shape[1] == 4 and sum_CR.dtype == torch.float64 and len(columns) == 4
    train(student.train(), micro)
    assert student.model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize("broken", ["attention", "head", "loss"])
def test_something_that_waits_is_noticed(student, broken, monkeypatch):
    def waits(*inputs):
        return next(x for x in inputs if isinstance(x, torch.Tensor)).sum().item()

    place = {
        "attention": "lark.student.attention._gather",
        "head": "lark.student.token_statistics._multiply_in_float32",
        "loss": "lark.student.token_statistics._compute_error_in_place",
    }
    monkeypatch.setattr(place[broken], waits)
    with pytest.raises(RuntimeError, match="meta"):
        train(student.train(), packed([30, 40]))


class Operations(TorchDispatchMode):
    """Counts the operations that start work on the device: views do not."""

    def __init__(self):
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "_unsafe_view" not in str(func):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_by_layer(run, micro):
    """Count the operations that one more layer adds."""
    totals = []
    for layers in (LAYERS, LAYERS - 1):
        model = meta_student()
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
        with Operations() as operations:
            run(model, micro)
        totals.append(sum(operations.names.values()))
    return totals[0] - totals[1]


@pytest.mark.parametrize("share", [True, False])
def test_operations_of_a_layer_do_not_grow_with_the_documents(share):
    few, many = packed([50] * 4, share=share), packed([50] * 40, share=share)
    for run, most in ((score, 40), (train, 120)):
        assert count_by_layer(run, few) == count_by_layer(run, many) <= most, run.__name__


def test_a_loop_over_documents_is_noticed(monkeypatch):
    monkeypatch.setattr("lark.student.attention._has_kernel", lambda *_: False)
    assert count_by_layer(score, packed([50] * 4)) < count_by_layer(score, packed([50] * 6))


def compile_layers(model):
    """Compile as a GPU's student is, by a backend that runs here."""
    torch._dynamo.reset()
    counters.clear()
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("run", [score, train])
def test_layers_compile_to_one_graph_for_all_layouts(run, share):
    model = meta_student()
    compile_layers(model)
    for seed, documents in enumerate(([300, 20, 700, 45], [9, 8], [50] * 12)):
        run(model, packed(documents, share=share, seed=seed))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_break_is_noticed(monkeypatch):
    model = meta_student()
    monkeypatch.setattr("lark.student.attention._gather", lambda x, node_K: (torch._dynamo.graph_break(), x)[1])
    compile_layers(model)
    with pytest.raises(Unsupported):
        score(model, packed([30, 40]))

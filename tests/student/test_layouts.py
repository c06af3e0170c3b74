"""The cost model: what a layout costs, and that the cheaper one is taken."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lark.student.layouts import ATTENTION_SLOWDOWN, Costs, costs_of, cut, launched

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array)


@given(lengths=LENGTHS, budget=st.integers(1, 200), apart=st.booleans(), pair=st.floats(0, 10))
def test_auto_is_the_cheaper_of_both(lengths, budget, apart, pair):
    costs = Costs(token=10.0, pair=pair, apart=apart)
    buckets, packed, auto = (
        cut(lengths, layout=layout, budget=budget, costs=costs) for layout in ("buckets", "packed", "auto")
    )
    assert auto.cost == min(buckets.cost, packed.cost)
    assert not buckets.packed and packed.packed
    for one in (buckets, packed, auto):
        assert sorted(np.concatenate(one.rows)) == list(range(len(lengths)))


def test_costs_by_hand():
    lengths = np.array([10, 8])
    bucket = cut(lengths, layout="buckets", budget=100, costs=Costs(token=7.0, pair=0.5, apart=False))
    assert bucket.cost == pytest.approx(2 * (7 * 10 + 0.5 * 100))
    masked = cut(lengths, layout="packed", budget=100, costs=Costs(token=7.0, pair=0.5, apart=False))
    assert masked.cost == pytest.approx(7 * 18 + 2 * 0.5 * 18**2)
    apart = cut(lengths, layout="packed", budget=100, costs=Costs(token=7.0, pair=0.5, apart=True))
    assert apart.cost == pytest.approx(1.03 * 7 * 18 + 1.15 * 0.5 * (100 + 64))


def test_rows_of_one_length_are_not_packed_and_uneven_ones_are_unless_attention_takes_a_mask():
    even, uneven = np.full(16, 50), np.array([200, *[20] * 15])
    apart, masked = (Costs(token=1000.0, pair=20.0, apart=apart) for apart in (True, False))
    assert not cut(even, layout="auto", budget=400, costs=apart).packed
    assert cut(uneven, layout="auto", budget=4000, costs=apart).packed
    long_rows = np.array([4000, 3000, 2000, 1000])
    assert not cut(long_rows, layout="auto", budget=16_000, costs=masked).packed


def test_where_operations_are_started_one_by_one_small_steps_are_not_packed_and_large_ones_are():
    """Uneven rows come in many groups; on a GPU a small student would wait for each group's operations to start."""
    lengths = np.linspace(100, 2000, 32).astype(int)
    small = Costs(token=1e8, pair=3e4, apart=True)  # 100M parameters
    large = Costs(token=7e9, pair=1e6, apart=True)
    for costs, packed in ((small, True), (launched(small, layers=30), False), (launched(large, layers=30), True)):
        assert cut(lengths, layout="auto", budget=100_000, costs=costs).packed is packed


def test_costs_of_a_student(make_student):
    model = make_student().load_model(torch.float32)
    config, costs = model.config, costs_of(model, apart=True)
    layers = model.get_decoder().layers
    assert costs.token == sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert costs.pair == ATTENTION_SLOWDOWN * heads


def test_nothing_to_cut():
    assert cut(np.zeros(0, np.int64), layout="auto", budget=10, costs=Costs(token=1, pair=1, apart=True)).rows == []

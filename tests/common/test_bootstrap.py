"""Resamples do not depend on the blocks they come in; intervals by their definition."""

import numpy as np
import pytest
from scipy import stats

from lark.common.bootstrap import expand_percentiles, resample_sums, split_blocks


def test_blocks_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lark.common.bootstrap._CELLS", 100)
    blocks = list(split_blocks(25, 10))
    assert [row for block in blocks for row in block] == list(range(25)) and max(map(len, blocks)) == 10
    assert [len(block) for block in split_blocks(2, 1000)] == [1, 1] and list(split_blocks(0, 5)) == []


def test_resamples_are_the_same_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    ones_1G, x_2G = np.ones((1, 12)), np.random.default_rng(0).normal(size=(2, 12))
    counts, whole = resample_sums(ones_1G, x_2G, resamples=50, seed=3)
    assert counts.shape == (50, 1) and (counts == 12).all() and whole.shape == (50, 2)
    monkeypatch.setattr("lark.common.bootstrap._CELLS", 24)
    _, in_blocks = resample_sums(ones_1G, x_2G, resamples=50, seed=3)
    assert in_blocks == pytest.approx(whole, rel=1e-12)


def test_an_interval_is_widened_by_t_over_z() -> None:
    values_R = np.random.default_rng(0).normal(2.0, 1.0, 999)
    low, high = expand_percentiles(values_R, 5.0, around=2.0, df=4, level=0.9, factor=1.5)
    for end, tail in ((low, 0.05), (high, 0.95)):
        wider = 1.5 * stats.t.ppf(0.95, 4) / stats.norm.ppf(0.95)
        assert end == pytest.approx(5.0 + wider * (np.quantile(values_R, tail) - 2.0))

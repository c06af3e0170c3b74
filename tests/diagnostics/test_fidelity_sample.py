"""The sample that is followed exactly: which candidates, with which passes."""

import numpy as np
import pytest
from conftest import rows_of_a_pool

from lark.common.ranks import claim_alone
from lark.diagnostics.exact_gradients import ExactGradients
from lark.diagnostics.fidelity_sample import budget_of, measure_sample, of_sample, sample_rows
from lark.selection.scores.gradients import LarkHead
from lark.selection.scores.statistics import Length, Random


@pytest.fixture
def chosen(make_data):
    def make(problems=6, candidates=3, **settings):
        data = make_data(rows_of_a_pool(problems=problems, candidates=candidates), **settings)
        data.prepare_data()
        data.setup("fit")
        return data

    return make


def test_a_sample_holds_whole_problems_with_the_statistics_of_the_run(chosen):
    data = chosen()
    sample, manifest = measure_sample(data, ExactGradients(), claim_alone, problems=2)
    assert sample is not None and budget_of(data) == 2
    assert sample.groups.size.tolist() == [3, 3]
    rows = np.searchsorted(data.candidates.row_N, sample.row_N)
    assert sample["loss"].tolist() == data.candidates["loss"][rows].tolist()
    assert sample.of(ExactGradients())["loss_before"] == pytest.approx(sample["loss"], rel=1e-5)
    assert manifest["backward_tokens"] == data.trajectories.length[sample.row_N].sum()


def test_statistics_are_measured_where_no_rule_needed_them(chosen):
    data = chosen(selector=Length(sign=-1), baseline=Random(seed=0))
    assert not data.needs
    sample, manifest = measure_sample(data, ExactGradients(), claim_alone, problems=2)
    assert sample is not None
    found, rows = of_sample(sample, ExactGradients(), manifest, data, average="token", resamples=100, tolerance=0.05)
    assert np.isfinite(LarkHead()(sample)).all()
    assert len(rows) == 6 and np.isfinite(rows[0]["lark"])
    # the selector's score is minus length under another name: once is enough
    assert "lark (selector)" not in found["proxies"] and "random (baseline)" in found["proxies"]


def test_without_a_choice_there_is_no_sample(chosen):
    assert measure_sample(chosen(candidates=2), ExactGradients(), claim_alone, problems=2) == (None, {})


def test_whole_problems_are_sampled_whatever_the_order_of_rows():
    rng = np.random.default_rng(0)
    problem_N = np.repeat(np.array([f"p{i}" for i in range(100)], object), rng.integers(1, 6, 100))
    row_N = sample_rows(problem_N, budget=2, problems=10)
    names, counts = np.unique(problem_N[row_N].astype(str), return_counts=True)
    sizes = {name: int((problem_N == name).sum()) for name in names}
    assert len(names) == 10 and counts.tolist() == list(sizes.values()) and counts.min() > 2
    order = rng.permutation(len(problem_N))
    assert set(problem_N[order][sample_rows(problem_N[order], budget=2, problems=10)]) == set(names)
    assert len(set(problem_N[sample_rows(problem_N, budget=2, problems=20)]) & set(names)) == 10
    assert len(sample_rows(problem_N, budget=5, problems=10)) == 0

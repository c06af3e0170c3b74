"""The exact pass: against the passes that it stands for, each run by itself."""

import numpy as np
import pytest
from conftest import rows_of_a_pool

from lark.common.ranks import claim_alone
from lark.diagnostics.exact_gradients import (
    ExactGradients,
    find_budget,
    measure_rows,
    measure_sample,
    sample_rows,
)
from lark.scoring.passes import Gradients, LossDrops, Statistics
from lark.selection.scores.gradients import LarkHead
from lark.selection.scores.statistics import Length, Random


@pytest.fixture
def data(make_data):
    made = make_data(rows_of_a_pool(problems=4, candidates=3))
    made.prepare_data()
    return made


def test_columns_are_those_of_the_separate_passes(data):
    rows = data.scored[:6]
    exact, _ = measure_rows(data, ExactGradients(eta=1e-2), rows, claim_alone)
    gradients, _ = measure_rows(data, Gradients(), rows, claim_alone)
    for step, column in ((1e-2, "drop"), (5e-3, "drop_half")):
        drops, _ = measure_rows(data, LossDrops(eta=step), rows, claim_alone)
        assert exact[column] == pytest.approx(drops["drop"], rel=1e-4)
        assert exact["loss_before"] == pytest.approx(drops["loss_before"], rel=1e-6)
    assert exact["row"].tolist() == rows.tolist()
    assert exact["squared_norm"] == pytest.approx(gradients["squared_norm"], rel=1e-6)
    for ours, theirs in zip(exact["gram"], gradients["gram"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_sample_is_measured_once(data):
    claims = []

    def claim(name, folder, done):
        claims.append(done())
        return claim_alone(name, folder, done)

    first, _ = measure_rows(data, ExactGradients(), data.scored[:3], claim)
    again, _ = measure_rows(data, ExactGradients(), data.scored[:3], claim)
    measure_rows(data, ExactGradients(eta=1e-2), data.scored[:3], claim)
    assert claims == [False, True, False]
    assert again["drop"].tolist() == first["drop"].tolist()


def test_statistics_of_a_sample_come_with_their_means(data):
    columns, _ = measure_rows(data, Statistics(), data.scored[:3], claim_alone)
    assert columns["loss"] == pytest.approx(columns["sum_surprisal"] / columns["num_tokens"])


# ---- the sample


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
    assert find_budget(data) == 2
    sample = measure_sample(data, ExactGradients(), claim_alone, problems=2) or pytest.fail("no sample")
    assert sample.groups.size.tolist() == [3, 3]
    rows = np.searchsorted(data.candidates.row_N, sample.row_N)
    assert sample["loss"].tolist() == data.candidates["loss"][rows].tolist()
    assert sample.of(ExactGradients())["loss_before"] == pytest.approx(sample["loss"], rel=1e-5)


def test_statistics_are_measured_where_no_rule_needed_them(chosen):
    data = chosen(selector=Length(sign=-1), baseline=Random(seed=0))
    assert not data.needs
    sample = measure_sample(data, ExactGradients(), claim_alone, problems=2) or pytest.fail("no sample")
    assert np.isfinite(LarkHead()(sample)).all() and len(sample) == 6


def test_without_a_choice_there_is_no_sample(chosen):
    assert measure_sample(chosen(candidates=2), ExactGradients(), claim_alone, problems=2) is None


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

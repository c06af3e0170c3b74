"""The exact pass: against the passes that it stands for, each run by itself."""

import numpy as np
import pytest
import torch
from conftest import rows_of_a_pool

from lark.common.ranks import claim_alone
from lark.diagnostics.exact_gradients import (
    ExactGradients,
    find_budget,
    group_by_layers,
    measure_rows,
    measure_sample,
    sample_rows,
)
from lark.scoring.gradients import choose_parameters
from lark.scoring.passes import Gradients, LossDrops, Statistics
from lark.selection.scores.gradients import LarkHead
from lark.selection.scores.statistics import Length, Random
from lark.student.student import decoder_layers

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.fixture
def data(make_data):
    made = make_data(rows_of_a_pool(problems=4, candidates=3))
    made.prepare_data()
    return made


def test_columns_are_those_of_the_separate_passes(data):
    rows = data.scored[:6]
    exact, manifest = measure_rows(data, ExactGradients(eta=1e-2), rows, claim_alone)
    gradients, _ = measure_rows(data, Gradients(), rows, claim_alone)
    for step, column in ((1e-2, "drop"), (5e-3, "drop_half")):
        drops, _ = measure_rows(data, LossDrops(eta=step), rows, claim_alone)
        assert exact[column] == pytest.approx(drops["drop"], rel=1e-4)
        assert exact["loss_before"] == pytest.approx(drops["loss_before"], rel=1e-6)
    assert exact["row"].tolist() == rows.tolist()
    assert exact["squared_norm"] == pytest.approx(gradients["squared_norm"], rel=1e-6)
    for ours, theirs in zip(exact["gram"], gradients["gram"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    by_group = np.stack(list(exact["group_squared_norm"]))
    assert by_group.sum(1) == pytest.approx(exact["squared_norm"], rel=1e-9)
    assert by_group.shape[1] == len(manifest["choices"]["groups"])


def test_a_sample_is_measured_once(data):
    claims = []

    def claim(name, folder, done):
        claims.append(done())
        return claim_alone(name, folder, done)

    first, _ = measure_rows(data, ExactGradients(), data.scored[:3], claim)
    again, manifest = measure_rows(data, ExactGradients(), data.scored[:3], claim)
    measure_rows(data, ExactGradients(eta=1e-2), data.scored[:3], claim)
    assert claims == [False, True, False]
    assert again["drop"].tolist() == first["drop"].tolist()
    assert manifest["choices"]["groups"]


def test_statistics_of_a_sample_come_with_their_means(data):
    columns, _ = measure_rows(data, Statistics(), data.scored[:3], claim_alone)
    assert columns["loss"] == pytest.approx(columns["sum_surprisal"] / columns["num_tokens"])


def test_every_parameter_belongs_to_a_group_of_layers(make_student):
    model = make_student().load_trainable(torch.float32)
    chosen = choose_parameters(model, "all")
    groups = group_by_layers(model, chosen)
    names = dict(zip((name for name, _ in chosen), groups, strict=True))
    assert names["model.embed_tokens.weight"] == "embedding and head"  # tied
    assert {group for name, group in names.items() if ".layers.0." in name} == {"first third"}
    assert {group for name, group in names.items() if ".layers.1." in name} == {"middle third"}
    assert names["model.norm.weight"] == "other"


def test_under_lora_only_layers_have_groups(make_student):
    model = make_student(lora=LORA).load_trainable(torch.float32)
    assert len(decoder_layers(model)) == 2
    assert set(group_by_layers(model, choose_parameters(model, "trained"))) == {"first third", "middle third"}


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
    sample, manifest = measure_sample(data, ExactGradients(), claim_alone, problems=2) or pytest.fail("no sample")
    assert sample.groups.size.tolist() == [3, 3]
    rows = np.searchsorted(data.candidates.row_N, sample.row_N)
    assert sample["loss"].tolist() == data.candidates["loss"][rows].tolist()
    assert sample.of(ExactGradients())["loss_before"] == pytest.approx(sample["loss"], rel=1e-5)
    assert manifest["backward_tokens"] == data.trajectories.length[sample.row_N].sum()


def test_statistics_are_measured_where_no_rule_needed_them(chosen):
    data = chosen(selector=Length(sign=-1), baseline=Random(seed=0))
    assert not data.needs
    sample, _ = measure_sample(data, ExactGradients(), claim_alone, problems=2) or pytest.fail("no sample")
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

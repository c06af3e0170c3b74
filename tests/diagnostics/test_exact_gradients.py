"""The exact pass: against the passes that it stands for, each run by itself."""

import numpy as np
import pytest
import torch
from conftest import rows_of_a_pool

from lark.common.ranks import claim_alone
from lark.diagnostics.exact_gradients import ExactGradients, layer_groups, measured
from lark.scoring.gradients import choose_parameters
from lark.scoring.passes import Gradients, LossDrops, Statistics
from lark.student.student import decoder_layers

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.fixture
def data(make_data):
    made = make_data(rows_of_a_pool(problems=4, candidates=3))
    made.prepare_data()
    return made


def test_columns_are_those_of_the_separate_passes(data):
    rows = data.scored[:6]
    exact, manifest = measured(data, ExactGradients(eta=1e-2), rows, claim_alone)
    gradients, _ = measured(data, Gradients(), rows, claim_alone)
    for step, column in ((1e-2, "drop"), (5e-3, "drop_half")):
        drops, _ = measured(data, LossDrops(eta=step), rows, claim_alone)
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

    first, _ = measured(data, ExactGradients(), data.scored[:3], claim)
    again, manifest = measured(data, ExactGradients(), data.scored[:3], claim)
    measured(data, ExactGradients(eta=1e-2), data.scored[:3], claim)
    assert claims == [False, True, False]
    assert again["drop"].tolist() == first["drop"].tolist()
    assert manifest["choices"]["groups"]


def test_statistics_of_a_sample_come_with_their_means(data):
    columns, _ = measured(data, Statistics(), data.scored[:3], claim_alone)
    assert columns["loss"] == pytest.approx(columns["sum_surprisal"] / columns["num_tokens"])


def test_every_parameter_belongs_to_a_group_of_layers(make_student):
    model = make_student().load_trainable(torch.float32)
    chosen = choose_parameters(model, "all")
    groups = layer_groups(model, chosen)
    names = dict(zip((name for name, _ in chosen), groups, strict=True))
    assert names["model.embed_tokens.weight"] == "embedding and head"  # tied
    assert {group for name, group in names.items() if ".layers.0." in name} == {"first third"}
    assert {group for name, group in names.items() if ".layers.1." in name} == {"middle third"}
    assert names["model.norm.weight"] == "other"


def test_under_lora_only_layers_have_groups(make_student):
    model = make_student(lora=LORA).load_trainable(torch.float32)
    assert len(decoder_layers(model)) == 2
    assert set(layer_groups(model, choose_parameters(model, "trained"))) == {"first third", "middle third"}

"""Warm-up arms: how many rows and epochs, the checkpoints that are kept, their learning rates, the arm cache."""

import numpy as np
import pytest
import torch

from lark.scoring.passes import GradientMatches
from lark.selection.scores.gradients import GradMatch
from lark.training.arms import train
from lark.training.sft_module import SFTModule
from lark.training.warmup import EpochSaver, is_warmed_up, list_checkpoints, list_epoch_ends, make_warm_up_arm

WANTED = GradientMatches(warmup_share=0.5, epochs=3, validation_problems=4)


@pytest.fixture
def warm_up(make_data, make_trainer, tmp_path):
    """The data, and a function that trains its warm-up arm."""

    def make(**settings):
        data = make_data(**settings)
        data.prepare_data()
        arm = make_warm_up_arm(data, WANTED, tmp_path / "arms")

        def trained():
            train(
                arm,
                data,
                make_trainer=make_trainer,
                callbacks=[EpochSaver(arm)],
            )
            return arm

        return data, arm, trained

    return make


def test_a_share_of_the_candidates_by_hash(warm_up):
    data, arm, _ = warm_up()
    row = arm.selection.row
    assert len(row) == round(0.5 * len(data.scored)) and set(row) <= set(data.scored)
    assert (np.diff(row) > 0).all() and (arm.selection.weight == 1).all()
    again = warm_up(cache="again")[1]
    assert again.folder == arm.folder
    assert warm_up(cache="other", recipe={"lr": 1e-2})[1].folder != arm.folder


def test_epochs_end_where_every_row_has_been_seen_that_often(warm_up):
    data, arm, _ = warm_up(recipe={"batch_size": 5})
    rows, batch = len(arm.selection.row), data.recipe.batch_size
    assert rows % batch, "epochs end inside a step"
    assert list_epoch_ends(arm) == [int(np.ceil(e * rows / batch)) for e in (1, 2, 3)]


def test_checkpoints_hold_weights_and_moments_of_their_epoch(warm_up):
    data, _, trained = warm_up()
    arm = trained()
    kept = list_checkpoints(arm)
    steps = []
    for path, _ in kept:
        state = torch.load(path, weights_only=True)
        steps.append(state["global_step"])
        (optimizer,) = state["optimizer_states"]
        assert all(moment["step"] == state["global_step"] for moment in optimizer["state"].values())
        assert all(name.startswith("student_model.") for name in state["state_dict"])
    assert steps == list_epoch_ends(arm)
    last = torch.load(kept[-1][0], weights_only=True)["state_dict"]
    final = data.student.load_trained(arm.checkpoint, torch.float32).state_dict()
    for name, value in last.items():
        assert torch.equal(value, final[name.removeprefix("student_model.")]), name


def test_rates_are_the_means_over_the_epochs(warm_up):
    _, arm, _ = warm_up(recipe={"schedule": "constant", "warmup": 0.0, "lr": 0.5})
    ends = list_epoch_ends(arm)
    assert [rate for _, rate in list_checkpoints(arm)] == pytest.approx([0.5] * 3)
    _, arm, _ = warm_up(cache="cosine", recipe={"schedule": "cosine", "warmup": 0.0, "lr": 1.0})
    whole = [arm.recipe.compute_rate(step, ends[-1]) for step in range(ends[-1])]
    expected = [np.mean(whole[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert [rate for _, rate in list_checkpoints(arm)] == pytest.approx(expected)
    assert expected[0] > expected[1] > expected[2] > 0


def test_killed_and_gone_on_it_keeps_the_same_checkpoints(warm_up, monkeypatch):
    class KillError(Exception):
        pass

    whole = [torch.load(path, weights_only=True) for path, _ in list_checkpoints(warm_up()[2]())]
    _, arm, trained = warm_up(cache="killed", recipe={"checkpoint_every": 3, "lr": 1e-3 + 1e-12})
    step = SFTModule.training_step

    def killing(self, batch, batch_idx):
        if self.global_step == list_epoch_ends(arm)[1]:
            raise KillError
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SFTModule, "training_step", killing)
        with pytest.raises(KillError):
            trained()
    assert not is_warmed_up(arm) and list_checkpoints(arm)[0][0].is_file()
    parts = [torch.load(path, weights_only=True) for path, _ in list_checkpoints(trained())]
    assert is_warmed_up(arm)
    for a, b in zip(whole, parts, strict=True):
        assert a["global_step"] == b["global_step"]
        for name in a["state_dict"]:
            torch.testing.assert_close(a["state_dict"][name], b["state_dict"][name], rtol=0, atol=1e-7)
    list_checkpoints(arm)[1][0].unlink()
    assert arm.is_trained and not is_warmed_up(arm), "without its checkpoints it is trained again"


def test_the_rule_without_a_warm_up_says_who_trains_one(make_data):
    data = make_data(selector=GradMatch(validation_problems=4))
    data.prepare_data()
    with pytest.raises(ValueError, match=r"gradient_matches needs a warm-up arm, which python -m lark\.run"):
        data.score()

"""What held-out loss curves say of speed, and the record of an arm's own training loss."""

import csv
import math

import pytest

from lark.diagnostics.curves import OWN_LOSS, TrainingLoss, compare_with_baseline, find_steps_to, measure_own_loss
from lark.training.sft_module import SFTModule


def curve(*losses, every=10):
    return [{"step": every * i, "held_out/loss": loss} for i, loss in enumerate(losses)]


def test_steps_to_a_loss_lie_on_the_line_between_points():
    assert find_steps_to(1.5, curve(3.0, 2.0, 1.0)) == 15.0
    assert find_steps_to(2.0, curve(3.0, 2.0, 1.0)) == 10.0
    assert find_steps_to(3.0, curve(3.0, 2.0)) == 0.0
    assert find_steps_to(1.0, curve(3.0, 1.0, 2.0, 0.5)) == 10.0  # the first time
    assert math.isnan(find_steps_to(0.5, curve(3.0, 1.0)))


def test_an_arm_against_the_baseline():
    found = compare_with_baseline(curve(2.0, 1.0, 1.0), curve(2.0, 1.5, 1.0))
    assert found["area_ratio"] == pytest.approx((15 + 10) / (17.5 + 12.5))
    assert found["final_ratio"] == 1.0
    assert found["steps_to_baseline"] == 10.0 and found["steps_ratio"] == 0.5
    worse = compare_with_baseline(curve(2.0, 2.5), curve(2.0, 2.2))
    assert math.isnan(worse["steps_to_baseline"]), "a baseline that gained nothing is reached by nobody"
    same = compare_with_baseline(curve(2.0, 1.5), curve(2.0, 1.5))
    assert (same["area_ratio"], same["steps_ratio"]) == (1.0, 1.0)


def test_an_arm_that_never_comes_down_has_no_steps():
    found = compare_with_baseline(curve(2.0, 1.9), curve(2.0, 1.0))
    assert math.isnan(found["steps_to_baseline"]) and math.isnan(found["steps_ratio"])
    assert found["area_ratio"] > 1


def test_without_held_out_problems_there_is_nothing_to_say():
    assert compare_with_baseline([], []) == {"points": 0}


def test_training_loss_is_kept_through_an_interruption(make_data, make_trainer, tmp_path):
    data = make_data()
    data.prepare_data()
    data.setup("fit")

    def fit(until, checkpoint=None):
        module = SFTModule(student=data.student, recipe=data.recipe, steps=4, seed=0, folder=tmp_path)
        trainer = make_trainer(max_steps=until, callbacks=[TrainingLoss(tmp_path)], num_sanity_val_steps=0)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.losses.recent

    fit(2)
    whole = fit(4, tmp_path / "last.ckpt")
    with (tmp_path / OWN_LOSS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["train/loss"]) for row in rows] == pytest.approx(whole)
    found = measure_own_loss(tmp_path)
    assert found["steps"] == 4 and found["ratio"] == pytest.approx(whole[-1] / whole[0])
    assert measure_own_loss(tmp_path / "elsewhere") == {}

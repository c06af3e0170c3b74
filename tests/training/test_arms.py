"""What an arm's folder is named after."""

import pytest

from lark.training.arms import make_arm, make_untrained_arm

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.fixture
def make_ready(make_data):
    def make(**settings):
        data = make_data(**settings)
        data.prepare_data()
        data.setup("fit")
        return data

    return make


def test_the_untrained_student_is_one_whatever_it_would_be_trained_on(make_ready, tmp_path):
    """Keyed by student and evaluation: neither LoRA, nor the recipe, nor the pool and what is held out count."""
    plain = make_untrained_arm(make_ready(), {"seed": 0}, tmp_path)
    other = make_ready(recipe={"lr": 1.0}, student={"lora": LORA}, task={"held_out": 0.5, "max_length": 200})
    assert make_untrained_arm(other, {"seed": 0}, tmp_path).folder == plain.folder
    assert make_untrained_arm(other, {"seed": 1}, tmp_path).folder != plain.folder


def test_a_trained_student_is_keyed_by_what_decides_it(make_ready, make_trainer, tmp_path):
    def folder(ranks=1, **settings):
        data = make_ready(**settings)
        data.world_size = ranks
        return make_arm("selector", "lark", data, recipe=data.recipe, steps=3, arms=tmp_path).folder

    plain = folder()
    assert folder(student={"dtype": "float32"}) == plain, "what auto is on a CPU"
    assert folder(ranks=2, recipe={"micro_batch_tokens": 99, "spike": 2.0}) == plain
    assert folder(recipe={"lr": 1.0}) != plain and folder(student={"lora": LORA}) != plain
    dropout = LORA | {"lora_dropout": 0.1}
    drawn = [
        folder(n, student={"lora": dropout}, recipe={"micro_batch_tokens": tokens})
        for n, tokens in ((1, 99), (2, 99), (1, 50))
    ]
    assert len(set(drawn)) == 3, "each rank and micro-batch draws its own"

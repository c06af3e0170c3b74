"""The progress of a training: rates, what is said at the end."""

import re

import pytest
from points import Points

from lark.training import training_progress
from lark.training.sft_module import SFTModule
from lark.training.training_progress import TrainingProgress, describe, facts_of

SECONDS = 0.5  # a step takes, by the made-up clock


@pytest.fixture
def trained(make_data, make_trainer, tmp_path, monkeypatch):
    def run(*, steps=8, **settings):
        class Timed(SFTModule):
            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)
                clock[0] += SECONDS

            def on_validation_epoch_end(self):
                super().on_validation_epoch_end()
                clock[0] += 100.0  # which no step took

        clock = [0.0]
        monkeypatch.setattr(training_progress.time, "monotonic", lambda: clock[0])
        data, logger = make_data(**settings), Points()
        module = Timed(student=data.student, recipe=data.recipe, steps=steps, seed=0, folder=tmp_path)
        trainer = make_trainer(
            max_steps=steps,
            callbacks=[TrainingProgress("an arm")],
            logger=logger,
            log_every_n_steps=1,
            val_check_interval=3,
            check_val_every_n_epoch=None,
        )
        trainer.fit(module, datamodule=data)
        points = {step: found for step, found in logger.points if "train/seconds_left" in found}
        return data, module, trainer, points

    return run


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}], ids=["full", "lora"])
def test_rates_are_those_of_the_steps(lora, trained):
    data, _, _, points = trained(student={"lora": lora})
    batches = [data.step(number) for number in range(8)]
    assert sorted(points) == list(range(8))
    for step, found in points.items():
        assert found["train/seconds_left"] == pytest.approx(SECONDS * (7 - step))
        assert 0.05 < found["train/memory_gb"] < 10
        window = batches[max(0, step - 3) : step + 1]
        if step < 4:  # the first rates are those of a full window
            assert "train/trained_tokens_per_s" not in found
            continue
        expected = sum(batch.trained_tokens for batch in window) / (SECONDS * len(window))
        assert found["train/trained_tokens_per_s"] == pytest.approx(expected)


def test_effective_trajectories_are_logged(trained):
    data, *_, points = trained()
    for step, found in points.items():
        assert found["train/effective_trajectories"] == pytest.approx(data.step(step).effective)
        assert 1 <= found["train/effective_trajectories"] <= 6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_is_said_at_the_end(attention, trained):
    data, module, trainer, _ = trained(recipe={"micro_batch_tokens": 300}, student={"attention": attention})
    facts = facts_of(trainer, module)
    steps = [data.step(number) for number in range(8)]
    assert facts["row_tokens"] == sum(int(step.lengths.sum()) for step in steps)
    assert facts["trained_tokens"] == sum(step.trained_tokens for step in steps)
    computed = [micro.tokens for step in steps for micro, _ in module.micro_batches(step)]
    assert facts["computed_tokens"] == sum(computed)
    text = describe(facts)
    share = f"{facts['row_tokens'] / sum(computed):.0%}"
    tokens = rf".* tokens of trajectories in {sum(computed):,} computed \({share}\)"
    layout = "packed" if attention == "sdpa" else r"padded rows \(model\.attention=eager takes whole rows\)"
    pattern = rf"{layout}; micro-batches of 300 tokens; {tokens}; "
    assert re.match(pattern + r"\d+ trained tokens/s; \d\.\d\d GB$", text), text
    assert (sum(computed) < facts["row_tokens"]) == (attention == "sdpa")  # prompts begin alike
    assert "300 tokens (halved 2 times for want of memory)" in describe(facts | {"halvings": 2})

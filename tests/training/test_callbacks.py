"""Checkpoints of a training: when they are written, that one is there at any moment, signals; its progress."""

import os
import re
import signal

import pytest
import torch
from points import Points

from lark.common.signals import Signals, TerminatedError, handle_signals, is_requested
from lark.training import callbacks
from lark.training.callbacks import (
    CheckpointSaver,
    TrainingProgress,
    collect_training_facts,
    describe_training,
    find_checkpoint,
    replace_checkpoint,
)
from lark.training.sft_module import SFTModule

SECONDS = 0.5  # a step takes, by the made-up clock


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as a terminal has it: where tests run in a shell's background, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fit(make_data, make_trainer, tmp_path):
    """Trains so many steps with a Saver; `at` is called after each optimizer step and may send signals."""

    def run(*, steps=6, at=None, saver, **settings):
        class Called(SFTModule):
            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)
                if at is not None:
                    at(self.global_step)

        data = make_data()
        module = Called(student=data.student, recipe=data.recipe, steps=steps, seed=0, folder=tmp_path)
        trainer = make_trainer(
            max_steps=steps,
            callbacks=[Signals(), saver],
            val_check_interval=2,
            check_val_every_n_epoch=None,
            **settings,
        )
        last = find_checkpoint(saver.path)
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        return module

    return run


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_sigterm_in_a_step_saves_that_step_and_ends_with_143(fit, tmp_path, caplog):
    def at(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "last.ckpt"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError) as raised, handle_signals():
        fit(at=at, saver=CheckpointSaver(path, every=100, validate_every=2))
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert step_of(path) == 3
    assert f"by SIGTERM after optimizer step 3; the same command goes on from {path}" in caplog.text
    whole = fit(saver=CheckpointSaver(tmp_path / "whole.ckpt", every=100, validate_every=2))
    resumed = fit(saver=CheckpointSaver(path, every=100, validate_every=2))
    assert [point["step"] for point in resumed.curve] == [point["step"] for point in whole.curve]
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ctrl_c_in_a_step_saves_that_step_says_so_and_ends_with_130(fit, tmp_path, capfd, caplog):
    def at(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "last.ckpt"
    with pytest.raises(TerminatedError) as raised, handle_signals():
        fit(at=at, saver=CheckpointSaver(path, every=100, validate_every=2))
    assert raised.value.code == 130 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert step_of(path) == 3
    assert "lark: SIGINT: the step at hand is finished and saved first" in capfd.readouterr().err
    assert "by SIGINT after optimizer step 3" in caplog.text


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_more_does_not_wait_for_the_step(fit, tmp_path, capfd, first):
    def at(step):
        if step == 3:
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "last.ckpt"
    with pytest.raises(TerminatedError) as raised, handle_signals():
        fit(at=at, saver=CheckpointSaver(path, every=100, validate_every=2))
    assert raised.value.code == 130 and not path.exists()
    assert "lark: interrupted" in capfd.readouterr().err
    with handle_signals():  # and leaves nothing behind
        assert not is_requested()


def test_sigterm_before_validation_saves_with_the_held_out_point(fit, tmp_path):
    def at(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "last.ckpt"
    with pytest.raises(TerminatedError), handle_signals():
        fit(at=at, saver=CheckpointSaver(path, every=100, validate_every=2))
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 4 and saved["curve"][-1]["step"] == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_of_training_a_signal_ends_at_once_with_a_word(capfd, number, code):
    with pytest.raises(TerminatedError) as raised, handle_signals():
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 1)
        pytest.fail("it went on")
    assert raised.value.code == code
    said = f"lark: stopped by {number.name}; what is finished is kept, and the same command goes on from there"
    assert said in capfd.readouterr().err


def test_another_sigterm_does_not_disturb_the_saving(fit, tmp_path):
    class Twice(CheckpointSaver):
        def _finish_step(self, trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            super()._finish_step(trainer)

    path = tmp_path / "last.ckpt"
    with pytest.raises(TerminatedError), handle_signals():
        fit(at=lambda step: os.kill(os.getpid(), signal.SIGTERM), saver=Twice(path, every=100, validate_every=None))
    assert step_of(path) == 1


def test_a_checkpoint_every_so_many_steps(fit, tmp_path):
    written = []

    class Noted(CheckpointSaver):
        def _finish_step(self, trainer):
            before = self.path.stat().st_mtime_ns if self.path.exists() else 0
            super()._finish_step(trainer)
            if self.path.exists() and self.path.stat().st_mtime_ns != before:
                written.append(trainer.global_step)

    fit(steps=7, saver=Noted(tmp_path / "last.ckpt", every=3, validate_every=2))
    assert written == [3, 6]
    assert {path.name for path in tmp_path.glob("last*")} == {"last.ckpt"}


@pytest.mark.parametrize("dies_before", ["rename", "replace"])
def test_a_folder_is_replaced_so_that_one_is_always_there(dies_before, tmp_path, monkeypatch):
    """As a divided student's checkpoint is."""

    class FakeStrategy:
        @staticmethod
        def barrier(name):
            pass

    class FakeTrainer:
        is_global_zero, strategy, step = True, FakeStrategy, 0

        def save_checkpoint(self, path):
            path.mkdir()
            (path / "step").write_text(str(self.step))

    path, trainer = tmp_path / "last.ckpt", FakeTrainer()
    for trainer.step in (1, 2):
        replace_checkpoint(trainer, path)  # type: ignore[arg-type]
    assert (path / "step").read_text() == "2"
    trainer.step = 3
    with monkeypatch.context() as patch:
        patch.setattr(type(path), dies_before, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replace_checkpoint(trainer, path)  # type: ignore[arg-type]
    newest = find_checkpoint(path)
    assert newest is not None and (newest / "step").read_text() == "2"
    replace_checkpoint(trainer, path)  # type: ignore[arg-type]
    assert find_checkpoint(path) == path and (path / "step").read_text() == "3"
    assert {one.name for one in tmp_path.iterdir()} == {"last.ckpt"}


def test_nothing_to_go_on_from(tmp_path):
    assert find_checkpoint(tmp_path / "last.ckpt") is None


# ---- progress


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
        monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
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
    facts = collect_training_facts(trainer, module)
    steps = [data.step(number) for number in range(8)]
    assert facts["row_tokens"] == sum(int(step.lengths.sum()) for step in steps)
    assert facts["trained_tokens"] == sum(step.trained_tokens for step in steps)
    computed = [micro.tokens for step in steps for micro, _ in module.micro_batches(step)]
    assert facts["computed_tokens"] == sum(computed)
    text = describe_training(facts)
    share = f"{facts['row_tokens'] / sum(computed):.0%}"
    tokens = rf".* tokens of trajectories in {sum(computed):,} computed \({share}\)"
    layout = "packed" if attention == "sdpa" else r"one row at a time \(model\.attention=eager takes whole rows\)"
    pattern = rf"{layout}; micro-batches of 300 tokens; {tokens}; "
    assert re.match(pattern + r"\d+ trained tokens/s; \d\.\d\d GB$", text), text
    assert (sum(computed) < facts["row_tokens"]) == (attention == "sdpa")  # prompts begin alike
    assert "300 tokens (halved 2 times for want of memory)" in describe_training(facts | {"halvings": 2})

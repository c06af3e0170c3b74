"""Checkpoints of a training: when they are written, that one is there at any moment, SIGTERM."""

import os
import signal

import pytest
import torch

from lark.common.signals import Signals, TerminatedError, handle_signals, is_requested
from lark.training.saver import Saver, newest_checkpoint, replace_checkpoint
from lark.training.sft_module import SFTModule


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
        last = newest_checkpoint(saver.path)
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        return module

    return run


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_sigterm_in_a_step_saves_that_step_and_ends_with_143(fit, tmp_path, capsys):
    def at(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "last.ckpt"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError) as raised, handle_signals():
        fit(at=at, saver=Saver(path, every=100, validate_every=2))
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert step_of(path) == 3
    assert f"by SIGTERM after optimizer step 3; the same command goes on from {path}" in capsys.readouterr().out
    whole = fit(saver=Saver(tmp_path / "whole.ckpt", every=100, validate_every=2))
    resumed = fit(saver=Saver(path, every=100, validate_every=2))
    assert [point["step"] for point in resumed.curve] == [point["step"] for point in whole.curve]
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ctrl_c_in_a_step_saves_that_step_says_so_and_ends_with_130(fit, tmp_path, capfd):
    def at(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "last.ckpt"
    with pytest.raises(TerminatedError) as raised, handle_signals():
        fit(at=at, saver=Saver(path, every=100, validate_every=2))
    assert raised.value.code == 130 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert step_of(path) == 3
    out, err = capfd.readouterr()
    assert "lark: SIGINT: the step at hand is finished and saved first (Ctrl-C once more: at once)" in err
    assert "by SIGINT after optimizer step 3; the same command goes on" in out


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_more_does_not_wait_for_the_step(fit, tmp_path, capfd, first):
    def at(step):
        if step == 3:
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "last.ckpt"
    with pytest.raises(TerminatedError) as raised, handle_signals():
        fit(at=at, saver=Saver(path, every=100, validate_every=2))
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
        fit(at=at, saver=Saver(path, every=100, validate_every=2))
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
    class Twice(Saver):
        def _step_done(self, trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            super()._step_done(trainer)

    path = tmp_path / "last.ckpt"
    with pytest.raises(TerminatedError), handle_signals():
        fit(at=lambda step: os.kill(os.getpid(), signal.SIGTERM), saver=Twice(path, every=100, validate_every=None))
    assert step_of(path) == 1


def test_a_checkpoint_every_so_many_steps(fit, tmp_path):
    written = []

    class Noted(Saver):
        def _step_done(self, trainer):
            before = self.path.stat().st_mtime_ns if self.path.exists() else 0
            super()._step_done(trainer)
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
    newest = newest_checkpoint(path)
    assert newest is not None and (newest / "step").read_text() == "2"
    replace_checkpoint(trainer, path)  # type: ignore[arg-type]
    assert newest_checkpoint(path) == path and (path / "step").read_text() == "3"
    assert {one.name for one in tmp_path.iterdir()} == {"last.ckpt"}


def test_nothing_to_go_on_from(tmp_path):
    assert newest_checkpoint(tmp_path / "last.ckpt") is None

"""What a loss is judged by."""

import math

import pytest

from lark.training.divergence import LEAST, WINDOW, Losses


def test_a_spike_is_told_from_the_median_of_the_last_steps():
    losses = Losses(spike=3.0)
    for i in range(LEAST):
        assert losses.find_reason_to_stop(100.0 * (i + 1), 1.0) is None  # too few to know what is usual
        losses.append(1.0 if i else 50.0)
    assert losses.find_reason_to_stop(3.0, 1.0) is None
    reason = losses.find_reason_to_stop(3.1, 1.0)
    assert reason is not None and "3.1 is more than sft.spike=3 times the usual 1" in reason
    for _ in range(WINDOW):
        losses.append(2.0)
    assert losses.recent == [2.0] * WINDOW
    assert losses.find_reason_to_stop(3.1, 1.0) is None
    assert Losses(spike=3.0, recent=losses.recent).find_reason_to_stop(6.1, 1.0) is not None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_no_number_stops_from_the_first_step_on(loss, norm):
    for spike in (None, 2.0):
        assert Losses(spike=spike).find_reason_to_stop(loss, norm) is not None


def test_a_small_loss_is_no_spike():
    losses = Losses(spike=3.0, recent=[0.001] * WINDOW)
    assert losses.find_reason_to_stop(0.4, 1.0) is None and losses.find_reason_to_stop(0.6, 1.0) is not None


def test_without_a_spike_only_numbers_count():
    assert Losses(spike=None, recent=[1.0] * WINDOW).find_reason_to_stop(1e9, 1.0) is None

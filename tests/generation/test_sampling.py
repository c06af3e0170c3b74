"""Drawing tokens against a distribution that is written out: sorted, summed and cut in float64."""

import numpy as np
import pytest
import torch

from lark.generation.sampling import draw_tokens, make_noise


def written_out(logits_V, number, temperature, top_p):
    """The token that inverting the distribution function gives, by one sort in float64."""
    scaled = logits_V.double() / temperature
    probability = (scaled - scaled.max()).exp()
    probability /= probability.sum()
    order = sorted(range(len(probability)), key=lambda i: (-float(probability[i]), i))
    kept, total = set(), 0.0
    for token in order:
        if total >= top_p:
            break
        kept.add(token)
        total += float(probability[token])
    target, reached = number * sum(float(probability[token]) for token in kept), 0.0
    for token in sorted(kept):
        reached += float(probability[token])
        if reached > target:
            return token
    return max(kept)


@pytest.mark.parametrize("temperature", [0.05, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.95, 1.0])
def test_tokens_are_those_of_the_sorted_distribution(temperature, top_p):
    # With a vocabulary of 2,000, a nucleus at temperature 3 is among neither 64 nor 1,024 candidates.
    generator = torch.Generator().manual_seed(0)
    logits_RV = 3 * torch.randn(12, 2000, generator=generator)
    noise_R = torch.rand(12, generator=generator)
    expected = [written_out(row, float(u), temperature, top_p) for row, u in zip(logits_RV, noise_R, strict=True)]
    assert draw_tokens(logits_RV, noise_R, temperature, top_p).tolist() == expected


def test_of_equally_likely_tokens_at_the_border_the_first_belong_to_the_nucleus():
    logits_RV = torch.zeros(50, 300)  # all alike: 0.099 of the probability take 30 tokens, the first ones
    logits_RV[25:, 200:] = 5.0  # 100 likely ones
    noise_R = torch.linspace(0, 0.999, 25).repeat(2)
    drawn = draw_tokens(logits_RV, noise_R, 1.0, 0.099)
    assert drawn[:25].min() == 0 and drawn[:25].max() == 29
    assert drawn[25:].min() == 200 and drawn[25:].max() == 210
    expected = [written_out(row, float(u), 1.0, 0.099) for row, u in zip(logits_RV, noise_R, strict=True)]
    assert drawn.tolist() == expected


def test_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([0.01, 1.0, 10.0]).repeat(7)[:, None]  # of nuclei of all sizes
    logits_RV = scale * torch.randn(21, 3000, generator=generator)
    noise_R = torch.rand(21, generator=generator)
    together = draw_tokens(logits_RV, noise_R, 0.8, 0.9)
    alone = torch.cat([draw_tokens(logits_RV[i : i + 1], noise_R[i : i + 1], 0.8, 0.9) for i in range(21)])
    assert together.tolist() == alone.tolist()


def test_extreme_logits_give_the_only_likely_token():
    logits_RV = torch.full((3, 100), -torch.inf)
    logits_RV[:, 7] = 1e4
    assert draw_tokens(logits_RV, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1e-3, 0.95).tolist() == [7, 7, 7]
    assert draw_tokens(logits_RV, None, 0, 0.95).tolist() == [7, 7, 7]
    half = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    assert draw_tokens(half, torch.tensor([1 - 2**-24]), 1.0, 1.0).tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_named(temperature):
    logits_RV = torch.randn(6, 100)
    logits_RV[4, 3] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in float32; set model\.dtype"):
        draw_tokens(logits_RV, torch.rand(6), temperature, 0.9)


def test_noise_belongs_to_seed_problem_and_sample():
    first = make_noise(0, "a", 1, 50)
    assert first.dtype == np.float32 and first.min() >= 0 and first.max() < 1
    assert (make_noise(0, "a", 1, 20) == first[:20]).all()
    for other in (
        make_noise(1, "a", 1, 50),
        make_noise(0, "b", 1, 50),
        make_noise(0, "a", 2, 50),
        make_noise(0, 'a", 1', 1, 50),
    ):
        assert (other != first).all()

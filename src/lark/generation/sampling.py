"""Draw tokens: noise of a sample's own, and the nucleus (top-p) it is drawn from.

Shapes: R rows (one token of one sample each), S new tokens, V vocabulary, K candidates.
"""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from lark.common.errors import LarkError

# Candidates looked at before the whole vocabulary is: a language model's nucleus seldom has more tokens.
_CANDIDATES = (64, 1024)
_CPU_ROWS = 4  # at a time, so that their logits stay in the CPU's cache


def hash_sample(seed: int, problem_id: str, sample: int) -> bytes:
    """Hash what tells one sample of one problem from others, 32 bytes."""
    return hashlib.sha256(json.dumps([seed, problem_id, sample]).encode()).digest()


def make_noise(seed: int, problem_id: str, sample: int, count: int) -> np.ndarray:
    """Make `count` uniform numbers in [0, 1) of one sample, [S] in float32; a longer draw begins with a shorter one."""
    key = int.from_bytes(hash_sample(seed, problem_id, sample)[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count, dtype=np.float32)


def draw_tokens(logits_RV: Tensor, noise_R: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """Draw the next tokens [R]: by inverse distribution function, in the order of the vocabulary, from a given number
    a row.

    A row's token depends on that row alone. The nucleus is the smallest set of most likely tokens that holds `top_p`
    of the probability (after temperature); of equally likely tokens at its border those of lower id belong to it.

    Args:
        noise_R: uniform numbers in [0, 1); None with temperature 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: share of probability that is drawn from; 1 draws from all tokens.

    Raises:
        LarkError: a row has no finite largest logit, as from weights that have diverged or overflow in their dtype.
    """
    largest_R1 = logits_RV.amax(dim=1, keepdim=True)
    if not largest_R1.isfinite().all():
        raise LarkError(
            f"the student's logits are not finite in {str(logits_RV.dtype).removeprefix('torch.')}; set "
            "model.dtype=float32, or use weights that have not diverged"
        )
    if temperature == 0:
        return logits_RV.argmax(dim=1)
    assert noise_R is not None, "noise for every row"
    if logits_RV.device.type == "cpu" and len(logits_RV) > _CPU_ROWS:
        parts = zip(logits_RV.split(_CPU_ROWS), noise_R.split(_CPU_ROWS), strict=True)
        return torch.cat([draw_tokens(*part, temperature, top_p) for part in parts])
    # Relative to the largest, so that a low temperature overflows nothing.
    scaled_RV = (logits_RV.float() - largest_R1).div_(temperature)
    if top_p == 1:
        return _invert_distribution(scaled_RV.to(_choose_dtype(scaled_RV)).softmax(dim=1), noise_R)
    tokens_R = torch.empty(len(scaled_RV), dtype=torch.int64, device=scaled_RV.device)
    rows_R = torch.arange(len(scaled_RV), device=scaled_RV.device)
    size = scaled_RV.shape[1]
    for count in (*(count for count in _CANDIDATES if count < size), size):
        part_RV = scaled_RV if len(rows_R) == len(scaled_RV) else scaled_RV[rows_R]
        drawn_R, found_R = _draw_among_candidates(part_RV, noise_R[rows_R], top_p, count)
        tokens_R[rows_R] = drawn_R
        rows_R = rows_R[~found_R]
        if not len(rows_R):
            break
    return tokens_R


def _draw_among_candidates(scaled_RV: Tensor, noise_R: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor]:
    """Draw tokens [R] from what of the nucleus is among the `count` most likely tokens; tell whether that is all of
    it.
    """
    size, precise = scaled_RV.shape[1], _choose_dtype(scaled_RV)
    if count < size:
        ids_RK = scaled_RV.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        mass_RK = scaled_RV.gather(1, ids_RK).to(precise).exp()
        total_R1 = scaled_RV.exp().sum(dim=1, keepdim=True).to(precise)
    else:
        ids_RK, mass_RK = None, scaled_RV.to(precise).exp()
        total_R1 = mass_RK.sum(dim=1, keepdim=True)
    descending_RK, order_RK = mass_RK.sort(dim=1, descending=True, stable=True)  # equal ones by id
    before_RK = descending_RK.cumsum(dim=1) - descending_RK
    kept_RK = before_RK < top_p * total_R1
    # Had the last candidate an equal outside, that could be the one which belongs to the nucleus.
    found_R = kept_RK[:, -1].logical_not() if count < size else torch.ones_like(kept_RK[:, -1])
    if count < size:
        last_R = kept_RK.sum(dim=1, keepdim=True) - 1
        found_R &= descending_RK.gather(1, last_R).squeeze(1) > descending_RK[:, -1]
    kept_RK = torch.zeros_like(kept_RK).scatter_(1, order_RK, kept_RK)
    drawn_R = _invert_distribution(mass_RK * kept_RK, noise_R)
    return (drawn_R if ids_RK is None else ids_RK.gather(1, drawn_R[:, None]).squeeze(1)), found_R


def _invert_distribution(mass_RK: Tensor, noise_R: Tensor) -> Tensor:
    """Find the first column [R] whose cumulative share of the mass exceeds the noise."""
    cumulative_RK = mass_RK.cumsum(dim=1)
    # The noise is a multiple of 2^-24 below 1, so the product stays below the total, and what is found has mass.
    target_R1 = noise_R[:, None].to(mass_RK.dtype) * cumulative_RK[:, -1:]
    return torch.searchsorted(cumulative_RK, target_R1, right=True).squeeze(1)


def _choose_dtype(x: Tensor) -> torch.dtype:
    """Choose float64, whose sums over a large vocabulary keep the borders between tokens apart; Apple's GPUs lack
    it.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64

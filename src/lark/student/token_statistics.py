"""Token statistics and losses from hidden states and the LM head, in chunks; sums per trajectory.

Shapes: N scored tokens, D hidden size, V vocabulary, R rows (trajectories), C sets of coefficients. Logits exist for
one chunk of tokens at a time, in float32; no array grows with N x V.

Numerics: with y the observed token, everything is computed from the *other* tokens' mass, s = softplus(lse_rest - l_y)
and Brier = (1 - p_y)^2 + sum over v != y of p_v^2, so that confident tokens (p_y close to 1) keep their digits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RANK_CLIPS = (50, 100, 500)
CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time; a smaller product would read the head's weights too often
ACCELERATOR_CHUNK_BYTES = 512 * 2**20  # the same for memory that is faster, and products that are much faster
PIECE_BYTES = 4 * 2**20  # of them, what a CPU goes through a dozen times in its cache: 4 times faster than the chunk
VERSION = 1  # raise when a statistic changes its meaning: cached statistics are keyed by it


@dataclass(frozen=True, kw_only=True)
class Head:
    """Last linear map of a student: logits_NV = softcap(scale * hidden_ND @ weight_VD.T + bias_V)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def compute_logits(self, hidden_ND: Tensor) -> Tensor:
        """Compute float32 logits [N, V]; weights of half precision are multiplied as such, but no logit is rounded.
        (Such weights have no gradient here: see `compute_weighted_surprisal`.)
        """
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        if self.weight_VD.dtype in (torch.bfloat16, torch.float16):
            logits_NV = _multiply_in_float32(hidden_ND, self.weight_VD)
            logits_NV = logits_NV if self.bias_V is None else logits_NV + self.bias_V.float()
        else:
            logits_NV = F.linear(hidden_ND, self.weight_VD, self.bias_V).float()  # bfloat16 under autocast
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def choose_chunk(self) -> int:
        """Choose how many tokens' logits are computed at a time: on a CPU no more than it takes (D) that reading the
        weights costs less than writing the logits, on an accelerator whatever fits.
        """
        row_bytes = 4 * self.weight_VD.shape[0]
        if self.weight_VD.device.type != "cpu":
            return max(1, ACCELERATOR_CHUNK_BYTES // row_bytes)
        in_cache = PIECE_BYTES // row_bytes
        return max(1, min(CHUNK_BYTES // row_bytes, max(in_cache, self.weight_VD.shape[1])))


def _multiply_in_float32(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Compute hidden_ND @ weight_VD.T of two half-precision matrices, accumulated and returned in float32 [N, V].

    A plain product would round the logits to the weights' dtype: in bfloat16 to 3 digits, by which choices change.
    """
    if hidden_ND.device.type in ("cuda", "meta"):
        return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
    # Elsewhere no kernel returns float32: cast the weights, a few rows at a time so that no copy is whole.
    rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[1]))
    with torch.autocast(hidden_ND.device.type, enabled=False):
        hidden_ND = hidden_ND.float()
        return torch.cat([F.linear(hidden_ND, block_vD.float()) for block_vD in weight_VD.split(rows)], 1)


@dataclass(frozen=True)
class TokenStatistics:
    """Values of each scored token: surprisal (nats), Brier score, entropy (nats), rank (1: likeliest), ln sum p^2."""

    surprisal_N: Tensor
    brier_N: Tensor
    entropy_N: Tensor
    rank_N: Tensor
    log_sum_p2_N: Tensor


@torch.no_grad()
def compute_token_statistics(
    hidden_ND: Tensor, target_N: Tensor, head: Head, *, top_k: int | None = None, compiled: bool = False
) -> TokenStatistics:
    """Compute statistics of the observed tokens `target_N` under the student whose hidden states predict them.

    `top_k` computes the Brier score as LARK's released code does: from the k largest logits, softmax renormalised
    over them, p(y) = 0 when y is outside. It is biased; None is exact.
    `compiled` fuses the passes over the logits by torch.compile, which takes it a quarter of a minute once a process
    (and a compiler: see `find_compile_failure`); the values are equal to 1e-6. It does nothing for `top_k`.
    """
    compute = _fuse() if compiled and top_k is None else partial(_compute_in_place, top_k=top_k)
    chunk = head.choose_chunk()
    pieces = [
        compute(logits_NV, piece_N)
        for i in range(0, max(len(target_N), 1), chunk)
        for logits_NV, piece_N in zip(
            *_split(head.compute_logits(hidden_ND[i : i + chunk]), target_N[i : i + chunk]), strict=True
        )
    ]
    return TokenStatistics(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def _split(logits_NV: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors of N tokens into pieces whose logits a CPU holds in its cache; on a GPU there is one piece."""
    rows = max(1, PIECE_BYTES // (4 * logits_NV.shape[1])) if logits_NV.device.type == "cpu" else len(logits_NV)
    return [x.split(max(rows, 1)) for x in (logits_NV, *others)]


def _compute_in_place(logits_NV: Tensor, target_N: Tensor, top_k: int | None) -> tuple[Tensor, ...]:
    """Compute the fields of TokenStatistics. Overwrites `logits_NV`."""
    target_N1 = target_N[:, None]
    own_N = logits_NV.gather(1, target_N1).squeeze(1)
    rank_N = 1 + (logits_NV > own_N[:, None]).sum(1)
    brier_top_k_N = None if top_k is None else _brier_top_k(logits_NV, rank_N, top_k)

    logits_NV.scatter_(1, target_N1, -math.inf)
    peak_N = logits_NV.amax(1)
    exp_NV = logits_NV.sub_(peak_N[:, None]).exp()  # zero at the observed token from here on
    mass_N = exp_NV.sum(1)
    mass2_N = exp_NV.square().sum(1)
    moment_N = exp_NV.mul_(logits_NV.scatter_(1, target_N1, 0.0)).sum(1)  # sum of e^x x, x relative to the peak
    surprisal_N, brier_N, entropy_N, log_sum_p2_N = _combine_masses(own_N - peak_N, mass_N, mass2_N, moment_N)
    return surprisal_N, brier_N if brier_top_k_N is None else brier_top_k_N, entropy_N, rank_N, log_sum_p2_N


def _compute_out_of_place(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, ...]:
    """Compute the same in a form that fuses into two passes over the logits."""
    own_N = logits_NV.gather(1, target_N[:, None]).squeeze(1)
    rank_N = 1 + (logits_NV > own_N[:, None]).sum(1)
    is_own_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device)[None] == target_N[:, None]
    rest_NV = torch.where(is_own_NV, -math.inf, logits_NV)
    peak_N = rest_NV.amax(1)
    relative_NV = rest_NV - peak_N[:, None]
    exp_NV = relative_NV.exp()
    moment_NV = torch.where(is_own_NV, 0.0, exp_NV * relative_NV)
    # compiled for a CPU, a sum is taken number by number: in float32 that would cost two digits
    exact = torch.float64 if logits_NV.device.type == "cpu" else torch.float32
    sums = [x_NV.sum(1, dtype=exact).float() for x_NV in (exp_NV, exp_NV.square(), moment_NV)]
    surprisal_N, brier_N, entropy_N, log_sum_p2_N = _combine_masses(own_N - peak_N, *sums)
    return surprisal_N, brier_N, entropy_N, rank_N, log_sum_p2_N


@cache
def _fuse() -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    return torch.compile(_compute_out_of_place, dynamic=True)


@cache
def find_compile_failure(device: torch.device) -> str | None:
    """Find out why the statistics cannot be compiled for `device` (most often: no C++ compiler); None: they can."""
    logits_NV, target_N = torch.zeros(3, 5, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    try:
        _fuse()(logits_NV, target_N)
    except (OSError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return None


def _combine_masses(own_N: Tensor, mass_N: Tensor, mass2_N: Tensor, moment_N: Tensor) -> tuple[Tensor, ...]:
    """Compute surprisal, Brier, entropy and ln sum p^2 of a token from its logit x and the sums over the other tokens
    of e^x, e^2x and e^x x; all x relative to the other tokens' peak, as a difference of two large logits is exact,
    their sum is not.
    """
    rest_N = mass_N.log()
    surprisal_N = F.softplus(rest_N - own_N, threshold=50.0)
    log_p_N = -surprisal_N
    log_scale_N = -torch.logaddexp(rest_N, own_N)  # p of a token x above the peak is exp(log_scale + x)
    rest_p2_N = mass2_N * (2 * log_scale_N).exp()
    brier_N = torch.expm1(log_p_N).square() + rest_p2_N
    log_sum_p2_N = ((2 * log_p_N).exp() + rest_p2_N).log()
    entropy_N = log_p_N.exp() * surprisal_N - log_scale_N.exp() * (moment_N + mass_N * log_scale_N)
    return surprisal_N, brier_N, entropy_N, log_sum_p2_N


def _brier_top_k(logits_NV: Tensor, rank_N: Tensor, top_k: int) -> Tensor:
    """Compute ||p - onehot(y)||^2 with p the softmax over the top_k largest logits, 0 elsewhere."""
    error_NK = logits_NV.topk(min(top_k, logits_NV.shape[1]), dim=1).values.softmax(1)
    place_N1 = rank_N[:, None] - 1  # of y among the largest, which are in descending order
    inside_N1 = place_N1 < error_NK.shape[1]
    error_NK.scatter_add_(1, place_N1.clamp(max=error_NK.shape[1] - 1), -inside_N1.float())
    return error_NK.square().sum(1) + (~inside_N1).squeeze(1)


def compute_weighted_surprisal(hidden_ND: Tensor, target_N: Tensor, coefficient_CN: Tensor, head: Head) -> Tensor:
    """Compute sum_N coefficient_CN * -ln p(target_N), [C] in float32 (nats), in chunks: memory is one chunk's logits,
    whatever N and the vocabulary. With gradients there is one set of coefficients.
    """
    if torch.is_grad_enabled():
        (coefficient_N,) = coefficient_CN
        return _WeightedSurprisal.apply(hidden_ND, head.weight_VD, head.bias_V, target_N, coefficient_N, head)
    size = head.choose_chunk()
    surprisal_N = torch.cat(
        [
            F.cross_entropy(head.compute_logits(hidden_ND[i : i + size]), target_N[i : i + size], reduction="none")
            for i in range(0, max(len(target_N), 1), size)
        ]
    )
    # not a matrix product: under autocast that would round coefficients and surprisals to bfloat16
    return (coefficient_CN * surprisal_N).sum(-1)


class _WeightedSurprisal(torch.autograd.Function):
    """The sum of coefficient_N * surprisal_N, [1]. As the coefficients are known, its gradient is taken in the forward
    pass, where the logits are: three products with the head's weights, and none of the logits is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        coefficient_N: Tensor,
        head: Head,
    ) -> Tensor:
        kind = hidden_ND.device.type
        is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_cast else weight_VD.dtype
        cast_VD, size = weight_VD.to(dtype), head.choose_chunk()
        # Half-precision weights are multiplied as such, but on a CPU only where they are stored so.
        head = replace(head, weight_VD=cast_VD) if kind == "cuda" else head
        gradients = [
            torch.zeros_like(x) if x is not None and needed else None
            for x, needed in zip((hidden_ND, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        ]
        total = torch.zeros(1, device=hidden_ND.device)
        for i in range(0, len(target_N), size):
            part = slice(i, i + size)
            error_NV = head.compute_logits(hidden_ND[part])
            for piece in zip(*_split(error_NV, target_N[part], coefficient_N[part]), strict=True):
                total += _compute_error_in_place(*piece, head)  # type: ignore[call-arg]
            cast_NV = error_NV.to(dtype)
            if gradients[0] is not None:
                gradients[0][part] = cast_NV @ cast_VD
            if gradients[1] is not None:
                gradients[1] += cast_NV.T @ hidden_ND[part].to(dtype)
            if gradients[2] is not None:
                gradients[2] += error_NV.sum(0)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: once
        return (*(None if x is None else x.mul_(upstream[0]) for x in gradients), None, None, None)


def _compute_error_in_place(logits_NV: Tensor, target_N: Tensor, coefficient_N: Tensor, head: Head) -> Tensor:
    """Compute the sum of coefficient_N * surprisal_N; overwrite `logits_NV` with its gradient with respect to the
    product of hidden states and weights: coefficient * (p - onehot) * the slope of softcap and scale.
    """
    slope_NV = None if head.softcap is None else 1 - (logits_NV / head.softcap).square()
    target_N1 = target_N[:, None]
    own_N, peak_N = logits_NV.gather(1, target_N1).squeeze(1), logits_NV.amax(1)
    mass_N = logits_NV.sub_(peak_N[:, None]).exp_().sum(1)
    loss = (coefficient_N * (mass_N.log() - (own_N - peak_N))).sum()
    logits_NV.mul_((coefficient_N / mass_N)[:, None]).scatter_add_(1, target_N1, -coefficient_N[:, None])
    if slope_NV is not None:
        logits_NV.mul_(slope_NV)
    if head.scale != 1.0:
        logits_NV.mul_(head.scale)
    return loss


_COUNTS = ("num_tokens", "top1", "has_end", "sum_rank", *(f"sum_rank_{clip}" for clip in RANK_CLIPS), "end_rank")
_SUMS = ("sum_surprisal", "sum_brier", "sum_entropy", "end_surprisal", "end_brier", "end_entropy")


def sum_by_trajectory(tokens: TokenStatistics, row_N: Tensor, position_N: Tensor, end_of_turn_R: Tensor) -> Tensor:
    """Sum over each trajectory's span, float64 [columns, R]; `name_sums` tells what the columns are.

    `row_N` says which trajectory a token belongs to, `position_N` its place in the span, `end_of_turn_R` the span
    index of each row's end-of-turn token (-1: cut off; its values are then 0 and `has_end` is 0).
    """
    is_end_N = position_N == end_of_turn_R[row_N]
    rank_N = tokens.rank_N
    values = (tokens.surprisal_N, tokens.brier_N, tokens.entropy_N)
    counted = (torch.ones_like(rank_N), rank_N == 1, is_end_N, rank_N, *(rank_N.clamp(max=clip) for clip in RANK_CLIPS))
    columns = (*counted, rank_N * is_end_N, *values, *(torch.where(is_end_N, x_N, 0) for x_N in values))
    value_CN = torch.stack([x_N.double() for x_N in columns])
    return value_CN.new_zeros(len(columns), len(end_of_turn_R)).index_add_(1, row_N, value_CN)


def name_sums(sum_CR: np.ndarray) -> dict[str, np.ndarray]:
    """Name the columns of `sum_by_trajectory`; counts become int64 [R]."""
    named = dict(zip((*_COUNTS, *_SUMS), sum_CR, strict=True))
    return {name: values_R.astype(np.int64) if name in _COUNTS else values_R for name, values_R in named.items()}


def sum_by_step(
    surprisal_T: np.ndarray, steps: list[int], end: int, *, skip: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum by step of one trajectory: its tokens, its surprisal (nats), and that of its first `skip` tokens alone.

    `steps` are the span indices at which steps begin; tokens from `end` on (the end-of-turn token) belong to none.
    """
    if end == 0:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    starts = np.asarray(steps)
    values = surprisal_T[:end].astype(np.float64)
    counts = np.diff(np.append(starts, end))
    first = np.arange(end) - np.repeat(starts, counts) < skip
    return counts, np.add.reduceat(values, starts), np.add.reduceat(np.where(first, values, 0.0), starts)

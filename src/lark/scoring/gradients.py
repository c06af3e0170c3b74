"""Gradients of a trajectory's mean loss L: exact, projected, as Adam would follow them, and of the LM head alone.

Shapes: M trajectories, K candidates of one problem, d chosen parameters (as one vector, in their order), k projected
dimensions, J further vectors, N span tokens, V vocabulary, v one block of it, D hidden size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lark.common.errors import LarkError
from lark.student.batching import MicroBatch
from lark.student.model_parts import compute_hidden_states, decoder_layers, get_head
from lark.student.token_statistics import Head, compute_token_statistics, compute_weighted_surprisal

Parameters = list[tuple[str, nn.Parameter]]
"""Names and tensors; a tied tensor is there once."""
SIGNS = 2**22  # of a projection that exist at a time (16 MiB as float32), in whole blocks of SIGN_ROWS
SIGN_ROWS = 1024  # of a matrix of signs that are drawn together
COLUMNS = 2**18  # of the float64 copy that an inner product is summed from
HEAD_BYTES = 64 * 2**20  # of each float32 array that the head's gradients are made of


def choose_parameters(model: nn.Module, which: str) -> Parameters:
    """trained: those that require a gradient; all: every one; last:<n>: those of the last n decoder layers, with
    neither the norm after them nor the head.

    Under LoRA `trained` holds both factors, though the first has no gradient at the start (the second is zero).
    Raises LarkError where the model has fewer layers.
    """
    named = list(model.named_parameters())
    if which == "trained":
        return [(name, p) for name, p in named if p.requires_grad]
    if which == "all":
        return named
    count = int(which.removeprefix("last:"))
    layers = decoder_layers(model)
    if count > len(layers):
        raise LarkError(
            f"selector.score.parameters={which} asks for more decoder layers than the student has ({len(layers)}); "
            "set fewer, or all"
        )
    inside = {id(p) for layer in layers[len(layers) - count :] for p in layer.parameters()}
    return [(name, p) for name, p in named if id(p) in inside]


# ---- exact


def compute_gradient(model: nn.Module, micro: MicroBatch, parameters: Parameters) -> tuple[Tensor, list[Tensor]]:
    """L (nats/token) of the one trajectory in `micro`, and its gradient with respect to each of `parameters`.

    It is what training with average="trajectory" follows. The head works in chunks, so memory is that of the decoder's
    activations. A parameter that L does not depend on gets zeros.
    """
    assert len(micro.rows) == 1
    tokens = len(micro.target_N)
    with torch.enable_grad():
        hidden_XD = compute_hidden_states(model, micro.input_ids_1X, micro.position_ids_1X)
        mean_1N = torch.full((1, tokens), 1 / tokens, device=hidden_XD.device)
        loss = compute_weighted_surprisal(hidden_XD[micro.predict_N], micro.target_N, mean_1N, get_head(model))[0]
        tensors = [p for _, p in parameters]
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return loss.detach(), list(gradients)


def compute_flat_gradients(model: nn.Module, batch: Sequence[MicroBatch], parameters: Parameters) -> Tensor:
    """The gradients of M trajectories, one a micro-batch, float32 [M, d]."""
    size = sum(p.numel() for _, p in parameters)
    gradient_Md = torch.empty(len(batch), size, dtype=torch.float32, device=parameters[0][1].device)
    for micro, gradient_d in zip(batch, gradient_Md, strict=True):
        _, gradients = compute_gradient(model, micro, parameters)
        for place, gradient in zip(gradient_d.split([g.numel() for g in gradients]), gradients, strict=True):
            place.copy_(gradient.flatten())
    return gradient_Md


@torch.no_grad()
def compute_mean_surprisal(model: nn.Module, micro: MicroBatch) -> float:
    """L (nats/token) of the one trajectory in `micro`, its tokens added up in float64."""
    hidden_XD = compute_hidden_states(model, micro.input_ids_1X, micro.position_ids_1X)
    tokens = compute_token_statistics(hidden_XD[micro.predict_N], micro.target_N, get_head(model))
    return tokens.surprisal_N.cpu().double().mean().item()


def measure_loss_drop(model: nn.Module, micro: MicroBatch, parameters: Parameters, eta: float) -> tuple[float, float]:
    """(L(theta) - L(theta - eta grad L)) / eta and L(theta); the first tends to ||grad L||^2 as eta goes to 0.

    The step is taken in place; the parameters come back bit by bit.
    """
    before = compute_mean_surprisal(model, micro)
    _, gradients = compute_gradient(model, micro, parameters)
    with step_and_restore(parameters, gradients, eta):
        after = compute_mean_surprisal(model, micro)
    return (before - after) / eta, before


@contextmanager
def step_and_restore(parameters: Parameters, gradients: list[Tensor], eta: float) -> Iterator[None]:
    kept = [p.detach().clone() for _, p in parameters]
    try:
        with torch.no_grad():
            for (_, p), gradient in zip(parameters, gradients, strict=True):
                p.sub_(gradient, alpha=eta)
        yield
    finally:
        with torch.no_grad():
            for (_, p), value in zip(parameters, kept, strict=True):
                p.copy_(value)


def compute_inner_products(a_Kd: Tensor, b_Jd: Tensor) -> Tensor:
    """a_Kd @ b_Jd.T on the CPU in float64 [K, J], summed in float64 from COLUMNS columns at a time."""
    if a_Kd.device.type == "mps":  # Apple's GPUs have no float64
        a_Kd, b_Jd = a_Kd.cpu(), b_Jd.cpu()
    total_KJ = a_Kd.new_zeros(len(a_Kd), len(b_Jd), dtype=torch.float64)
    for i in range(0, a_Kd.shape[1], COLUMNS):
        total_KJ += a_Kd[:, i : i + COLUMNS].double() @ b_Jd[:, i : i + COLUMNS].double().T
    return total_KJ.cpu()


def compute_gram(vector_Kd: Tensor) -> Tensor:
    """The inner products of K vectors with each other, float64 [K, K] on the CPU."""
    return compute_inner_products(vector_Kd, vector_Kd)


# ---- projected


def project_gradients(gradient_Md: Tensor, parameters: Parameters, *, dimensions: int, seed: int) -> Tensor:
    """gradient_Md @ signs_dk / sqrt(k), float32 [M, k], whose inner products are unbiased estimates of the gradients'.

    2 M d k floating-point operations. The [d, k] matrix never exists: its signs are drawn SIGNS at a time, once for all
    M rows, and depend on seed, parameter name, element and `dimensions` alone, neither on M nor on the device.
    (Rademacher projection: Achlioptas 2003; for gradients as in TRAK, arXiv 2303.14186, and LESS, arXiv 2402.04333.)
    """
    projected_Mk = gradient_Md.new_zeros(len(gradient_Md), dimensions)
    block = max(1, SIGNS // dimensions // SIGN_ROWS) * SIGN_ROWS
    for (name, p), part_Mp in zip(parameters, gradient_Md.split([p.numel() for _, p in parameters], 1), strict=True):
        if part_Mp.any():  # LoRA's first factors have no gradient at the start
            for start in range(0, p.numel(), block):
                stop = min(start + block, p.numel())
                signs = draw_signs(name, start, stop, dimensions, seed=seed, device=gradient_Md.device)
                projected_Mk += part_Mp[:, start:stop] @ signs
    return projected_Mk / dimensions**0.5


def draw_signs(name: str, start: int, stop: int, dimensions: int, *, seed: int, device: torch.device) -> Tensor:
    """Draw rows start..stop of the matrix of random signs that `seed` and `name` stand for, float32 [stop - start, k].

    Every SIGN_ROWS rows come from a generator of their own on the CPU, so any part of the matrix can be made by itself
    and is the same on any device. A drawn word holds 64 signs.
    """
    words = -(-dimensions // 64)
    blocks = range(start // SIGN_ROWS, -(-stop // SIGN_ROWS))
    drawn = torch.cat([_draw_words(f"{seed}\x1f{name}\x1f{block}", (SIGN_ROWS, words)) for block in blocks])
    first = blocks.start * SIGN_ROWS
    bits = drawn[start - first : stop - first].to(device).flatten().view(torch.uint8)
    bits = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)).bitwise_and_(1)
    return bits.view(stop - start, 64 * words)[:, :dimensions].to(torch.float32).mul_(-2).add_(1)


def _draw_words(key: str, shape: tuple[int, int]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], signed=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


# ---- as Adam would


def compute_adam_direction(
    gradient_Md: Tensor, first_d: Tensor, second_d: Tensor, *, betas: tuple[float, float], eps: float
) -> Tensor:
    """m' / sqrt(v' + eps) with m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2, [M, d]: the direction in which Adam
    with moments m, v would step from gradient g.

    As LESS's released code computes it: without bias correction, and with eps inside the root (arXiv 2402.04333,
    section 3.1).
    """
    scale_Md = (betas[1] * second_d).addcmul(gradient_Md, gradient_Md, value=1 - betas[1]).add_(eps).sqrt_()
    return (gradient_Md * (1 - betas[0])).add_(betas[0] * first_d).div_(scale_Md)


def read_adam_moments(optimizer_state: dict[str, Any], parameters: Parameters) -> tuple[Tensor, Tensor]:
    """First and second moments of `parameters`, float32 [d] each, from a torch Adam or AdamW state dict over just these
    in this order. A parameter that was never stepped has zeros.
    """
    assert sum(len(group["params"]) for group in optimizer_state["param_groups"]) == len(parameters)
    moments = []
    for name in ("exp_avg", "exp_avg_sq"):
        parts = []
        for i, (_, p) in enumerate(parameters):
            moment = optimizer_state["state"].get(i, {}).get(name)
            parts.append(torch.zeros(p.numel()) if moment is None else moment.flatten().float())
            assert len(parts[-1]) == p.numel()
        moments.append(torch.cat(parts))
    return moments[0], moments[1]


# ---- of the head


@torch.no_grad()
def compute_head_gram(
    hidden_ND: Tensor,
    target_N: Tensor,
    tokens_K: list[int],
    head: Head,
    *,
    sketch: tuple[int, int] | None = None,
    seed: int = 0,
) -> Tensor:
    """Inner products <D_j, D_k> of the gradients of L_k with respect to the head's weight (as if it were tied to
    nothing), float64 [K, K], without a backward pass.

    D_k = (1/T_k) sum_t e_t h_t' [V, D], with e_t the gradient of token t's surprisal with respect to the product
    weight @ h_t: pi_t - onehot(y_t), times the slope of the head's softcap and scale where it has them. The tokens of
    candidate k are the next tokens_K[k] of the N.
    Exact: one block of the vocabulary at a time, D_k's rows of it for all candidates. With `sketch` = (a, b), from
    A' D_k B with seeded Rademacher A [V, a] / sqrt(a) and B [D, b] / sqrt(b), whose inner products are unbiased.
    Memory: a few arrays of HEAD_BYTES. Floating-point operations: 6 N V D, or N V (4 D + 2 a) with the sketch.
    """
    size = head.weight_VD.shape[1]
    hidden_ND = hidden_ND.float() if sketch is None else hidden_ND
    widest = max(len(target_N), len(tokens_K) * size if sketch is None else sketch[0])
    blocks = _compute_head_errors(hidden_ND, target_N, head, width=max(1, HEAD_BYTES // (4 * widest)))
    if sketch is None:
        total_KK = torch.zeros(len(tokens_K), len(tokens_K), dtype=torch.float64)
        for _, error_Nv in blocks:
            total_KK += compute_gram(_average_outer_products(error_Nv, hidden_ND, tokens_K))
        return total_KK
    a, b = sketch
    left_Na = hidden_ND.new_zeros(len(target_N), a, dtype=torch.float32)
    for block, error_Nv in blocks:
        left_Na += error_Nv @ draw_signs("head rows", block.start, block.stop, a, seed=seed, device=left_Na.device)
    right_Nb = hidden_ND.float() @ draw_signs("head columns", 0, size, b, seed=seed, device=left_Na.device)
    return compute_gram(_average_outer_products(left_Na, right_Nb, tokens_K)) / (a * b)


def _average_outer_products(left_Nv: Tensor, right_ND: Tensor, tokens_K: list[int]) -> Tensor:
    """(1/T_k) sum_t left_t right_t' over each candidate's tokens, flattened, [K, v D]."""
    parts = zip(left_Nv.split(tokens_K), right_ND.split(tokens_K), strict=True)
    return torch.stack([(left.T @ right).flatten() / len(left) for left, right in parts])


def _compute_head_errors(
    hidden_ND: Tensor, target_N: Tensor, head: Head, *, width: int
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of `width` rows of the head with the gradients of the surprisals with respect to their products,
    float32 [N, v]. The first of two rounds adds up the softmax's denominator.
    """
    vocabulary = head.weight_VD.shape[0]
    blocks = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]

    def logits(block: slice) -> Tensor:
        bias_v = None if head.bias_V is None else head.bias_V[block]
        return replace(head, weight_VD=head.weight_VD[block], bias_V=bias_v).compute_logits(hidden_ND)

    log_mass_N = torch.full((len(target_N),), -torch.inf, device=hidden_ND.device)
    for block in blocks:
        log_mass_N = torch.logaddexp(log_mass_N, logits(block).logsumexp(1))
    for block in blocks:
        logits_Nv = logits(block)
        error_Nv = (logits_Nv - log_mass_N[:, None]).exp_()
        inside = ((target_N >= block.start) & (target_N < block.stop)).nonzero().squeeze(1)
        error_Nv[inside, target_N[inside] - block.start] -= 1
        if head.softcap is not None:
            error_Nv *= 1 - (logits_Nv / head.softcap).square()
        yield block, error_Nv * head.scale if head.scale != 1.0 else error_Nv

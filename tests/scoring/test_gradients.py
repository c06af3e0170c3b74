"""Gradients of trajectories against dense autograd, explicit matrices and known random numbers.

Shapes: M trajectories, d parameters, k projected dimensions, N tokens, V vocabulary, D hidden size.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lark.scoring import gradients
from lark.scoring.gradients import (
    choose_parameters,
    compute_adam_direction,
    compute_flat_gradients,
    compute_gradient,
    compute_gram,
    compute_head_gram,
    compute_inner_products,
    compute_mean_surprisal,
    draw_signs,
    measure_loss_drop,
    project_gradients,
    read_adam_moments,
)
from lark.student.batching import lay_out_row
from lark.student.chat import TokenizedTrajectory
from lark.student.token_statistics import Head

CPU = torch.device("cpu")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


def trajectory(length, prompt_tokens, *, seed):
    tokens = np.random.default_rng(seed).integers(0, 250, length).tolist()
    return TokenizedTrajectory(input_ids=tokens, prompt_tokens=prompt_tokens, end_of_turn=-1, steps=[0])


ROWS = [trajectory(20, 7, seed=0), trajectory(33, 12, seed=1), trajectory(9, 0, seed=2)]
BATCH = [lay_out_row(row, i) for i, row in enumerate(ROWS)]


@pytest.fixture
def model(make_student):
    return make_student().load_model(torch.float32)


def dense_gradient(model, row, names):
    """L and its gradient by a backward pass through all logits, float64 [d]."""
    model = model.double()
    model.zero_grad()
    ids = torch.tensor(row.input_ids)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    first = max(row.prompt_tokens, 1)
    loss = F.cross_entropy(logits[first - 1 : -1], ids[first:])
    loss.backward()
    by_name = dict(model.named_parameters())
    gradient = torch.cat([by_name[name].grad.flatten() for name in names])
    model.float()
    return loss.item(), gradient


def some_parameters(*sizes):
    """Parameters of which only names and sizes matter."""
    return [(f"layer {i}", nn.Parameter(torch.zeros(size))) for i, size in enumerate(sizes)]


# ---- exact


@pytest.mark.parametrize("which", ["trained", "all", "last:1"])
def test_gradients_equal_a_dense_backward_pass(which, model):
    parameters = choose_parameters(model, which)
    names = [name for name, _ in parameters]
    ours_Md = compute_flat_gradients(model, BATCH, parameters)
    for row, micro, ours_d in zip(ROWS, BATCH, ours_Md, strict=True):
        loss, _ = compute_gradient(model, micro, parameters)
        expected_loss, expected_d = dense_gradient(model, row, names)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        assert ((ours_d.double() - expected_d).norm() / expected_d.norm()).item() < 1e-5


def test_a_chunked_head_does_not_change_the_gradient(model, monkeypatch):
    parameters = choose_parameters(model, "all")
    whole = compute_flat_gradients(model, BATCH, parameters)
    monkeypatch.setattr("lark.student.token_statistics.CHUNK_BYTES", 4 * 300 * 3)  # three tokens
    torch.testing.assert_close(compute_flat_gradients(model, BATCH, parameters), whole, rtol=1e-4, atol=1e-5)


def test_parameters_by_name(model):
    everything = [name for name, _ in choose_parameters(model, "all")]
    assert "model.embed_tokens.weight" in everything and "lm_head.weight" not in everything  # tied: once
    assert choose_parameters(model, "trained") == choose_parameters(model, "all")
    last = [name for name, _ in choose_parameters(model, "last:1")]
    assert last == [name for name in everything if name.startswith("model.layers.1.")] and last
    both = [name for name, _ in choose_parameters(model, "last:2")]
    assert both == [name for name in everything if name.startswith("model.layers.")]
    with pytest.raises(ValueError, match=r"parameters=last:3 asks for more decoder layers than the student has \(2\)"):
        choose_parameters(model, "last:3")


def test_at_loras_start_only_its_second_factor_has_a_gradient(make_student):
    model = make_student(lora=LORA).load_trainable(torch.float32).eval()
    parameters = choose_parameters(model, "trained")
    _, tensors = compute_gradient(model, BATCH[0], parameters)
    for (name, parameter), gradient in zip(parameters, tensors, strict=True):
        assert gradient.shape == parameter.shape
        assert bool(gradient.any()) == ("lora_B" in name)


def test_inner_products_are_summed_in_float64(monkeypatch):
    monkeypatch.setattr(gradients, "COLUMNS", 3)
    a = torch.tensor([[1e8, 1.0, -1e8, 0.5, 2.0]])
    assert compute_inner_products(a, torch.ones(1, 5)).tolist() == [[3.5]]  # float32 gives 2.5
    assert (a @ torch.ones(5, 1)).item() != 3.5
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    gram_KK = compute_gram(x)
    np.testing.assert_allclose(gram_KK, x.double() @ x.double().T, rtol=1e-12)
    np.testing.assert_allclose(gram_KK, gram_KK.T, rtol=1e-14)


# ---- one step


def test_the_loss_drop_tends_to_the_squared_gradient_norm(model):
    parameters, micro = choose_parameters(model, "all"), BATCH[2]
    square = dense_gradient(model, ROWS[2], [name for name, _ in parameters])[1].square().sum().item()
    model = model.double()  # but for its norms and logits, which are float32
    errors = []
    for eta in (2e-3, 1e-3, 5e-4):
        drop, loss = measure_loss_drop(model, micro, parameters, eta)
        assert loss == pytest.approx(compute_mean_surprisal(model, micro), rel=1e-12)
        errors.append(drop / square - 1)
    assert abs(errors[-1]) < 3e-3
    # what is left is the curvature's, of first order in eta
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_come_back_bit_by_bit(dtype, model, monkeypatch):
    model = model.to(dtype)
    parameters = choose_parameters(model, "last:1")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_loss_drop(model, BATCH[0], parameters, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    moved = []

    def interrupted(*_):
        if moved:
            raise KeyboardInterrupt
        moved.append(True)
        return 1.0

    monkeypatch.setattr(gradients, "compute_mean_surprisal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_loss_drop(model, BATCH[0], parameters, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- random signs


@pytest.mark.parametrize("dimensions", [1, 64, 100])
def test_signs_are_the_same_however_they_are_cut(dimensions, monkeypatch):
    monkeypatch.setattr(gradients, "SIGN_ROWS", 64)
    whole = draw_signs("a", 0, 300, dimensions, seed=1, device=CPU)
    assert whole.shape == (300, dimensions) and set(whole.flatten().tolist()) == {-1.0, 1.0}
    cuts = [(0, 7), (7, 8), (8, 130), (130, 300)]
    parts = [draw_signs("a", start, stop, dimensions, seed=1, device=CPU) for start, stop in cuts]
    assert torch.equal(torch.cat(parts), whole)
    for other in (
        draw_signs("b", 0, 300, dimensions, seed=1, device=CPU),
        draw_signs("a", 0, 300, dimensions, seed=2, device=CPU),
    ):
        agreement = (other * whole).mean().item()  # +-1 with equal odds: standard error 1 / sqrt(300 k)
        assert abs(agreement) < 4 / math.sqrt(whole.numel())


def test_signs_are_balanced_and_uncorrelated():
    signs = draw_signs("a", 0, 4096, 96, seed=0, device=CPU).double()
    rows = len(signs)
    z_k = signs.sum(0) / math.sqrt(rows)
    z_kk = (signs.T @ signs)[*np.triu_indices(96, 1)] / math.sqrt(rows)
    lag = (signs[1:] * signs[:-1]).sum(0) / math.sqrt(rows - 1)
    for z in (z_k, z_kk, lag):  # standard normal: mean square 1, spread sqrt(2 / count); none far out
        assert z.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / z.numel()))
        assert z.abs().max().item() < 5.5


def test_projection_is_the_product_with_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(gradients, "SIGN_ROWS", 64)
    sizes, k = (50, 7, 300), 70
    parameters = some_parameters(*sizes)
    x = torch.randn(5, sum(sizes), generator=torch.Generator().manual_seed(0))
    matrix_dk = torch.cat([draw_signs(f"layer {i}", 0, n, k, seed=3, device=CPU) for i, n in enumerate(sizes)])
    expected = x.double() @ matrix_dk.double() / math.sqrt(k)
    for signs in (1, 70 * 128, 2**22):  # one block of signs at a time, two, all
        monkeypatch.setattr(gradients, "SIGNS", signs)
        projected = project_gradients(x, parameters, dimensions=k, seed=3)
        torch.testing.assert_close(projected.double(), expected, rtol=1e-4, atol=1e-4)


def test_projection_depends_neither_on_the_other_rows_nor_on_other_parameters():
    parameters = some_parameters(1000, 200)
    x = torch.randn(6, 1200, generator=torch.Generator().manual_seed(0))
    together = project_gradients(x, parameters, dimensions=64, seed=0)
    for i in range(6):
        alone = project_gradients(x[i : i + 1], parameters, dimensions=64, seed=0)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-4)
    second = project_gradients(x[:, 1000:], parameters[1:], dimensions=64, seed=0)
    padded = x.clone()
    padded[:, :1000] = 0
    torch.testing.assert_close(project_gradients(padded, parameters, dimensions=64, seed=0), second, rtol=0, atol=0)


def test_projected_inner_products_are_unbiased_with_the_known_variance():
    """Var <Pa, Pb> = (|a|^2 |b|^2 + <a, b>^2 - 2 sum a_i^2 b_i^2) / k for random signs."""
    parameters, k, seeds = some_parameters(60, 40), 32, 2000
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(100, generator=generator)
    b = 0.5 * a + torch.randn(100, generator=generator)
    pair = torch.stack([a, b])
    estimates = np.array(
        [compute_gram(project_gradients(pair, parameters, dimensions=k, seed=seed))[0, 1] for seed in range(seeds)]
    )
    exact = compute_gram(pair).numpy()
    variance = (exact[0, 0] * exact[1, 1] + exact[0, 1] ** 2 - 2 * (a.double() * b.double()).square().sum().item()) / k
    assert abs(estimates.mean() - exact[0, 1]) < 4 * math.sqrt(variance / seeds)
    assert estimates.var() == pytest.approx(variance, rel=5 * math.sqrt(2.5 / seeds))


# ---- as Adam would


def stepped_adamw(*, betas, steps=5):
    torch.manual_seed(0)
    parameters = [("a", nn.Parameter(torch.randn(4, 3))), ("b", nn.Parameter(torch.randn(5)))]
    optimizer = torch.optim.AdamW([p for _, p in parameters], lr=0.01, betas=betas)
    for _ in range(steps):
        for _, p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return parameters, optimizer


def test_adam_direction_has_the_moments_of_a_real_step():
    betas, eps = (0.8, 0.95), 1e-8
    parameters, optimizer = stepped_adamw(betas=betas)
    first_d, second_d = read_adam_moments(optimizer.state_dict(), parameters)
    gradient_Md = torch.randn(2, 17)
    ours = compute_adam_direction(gradient_Md, first_d, second_d, betas=betas, eps=eps)
    before = gradient_Md.clone()
    for p, gradient in zip([p for _, p in parameters], gradient_Md[1].split([12, 5]), strict=True):
        p.grad = gradient.view_as(p)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    first, second = (torch.cat([state[i][name].flatten() for i in (0, 1)]) for name in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(ours[1], first / torch.sqrt(second + eps), rtol=1e-5, atol=1e-6)
    assert torch.equal(gradient_Md, before), "the gradients are left as they were"


def test_adam_direction_takes_eps_into_the_root_and_corrects_no_bias():
    direction = compute_adam_direction(
        torch.tensor([[3.0]]), torch.zeros(1), torch.zeros(1), betas=(0.9, 0.99), eps=0.07
    )
    assert direction.item() == pytest.approx(0.3 / math.sqrt(0.09 + 0.07))


def test_a_parameter_without_a_step_has_no_moments():
    parameters, optimizer = stepped_adamw(betas=(0.9, 0.999))
    state = optimizer.state_dict()
    del state["state"][0]
    first_d, second_d = read_adam_moments(state, parameters)
    assert not first_d[:12].any() and not second_d[:12].any()
    assert torch.equal(first_d[12:], state["state"][1]["exp_avg"]) and second_d[12:].all()


# ---- of the head


def head_case(*, softcap, scale, bias):
    torch.manual_seed(1)
    tokens_K, v, d = [6, 1, 11], 37, 5
    n = sum(tokens_K)
    head = Head(weight_VD=torch.randn(v, d), bias_V=torch.randn(v) if bias else None, softcap=softcap, scale=scale)
    return torch.randn(n, d), torch.randint(v, (n,)), tokens_K, head


def autograd_head_gram(hidden_ND, target_N, tokens_K, head):
    """Gradients of each L_k with respect to a copy of the head's weight, by autograd in float64."""
    vectors = []
    for hidden, target in zip(hidden_ND.double().split(tokens_K), target_N.split(tokens_K), strict=True):
        weight = head.weight_VD.double().requires_grad_()
        logits = F.linear(hidden, weight, None if head.bias_V is None else head.bias_V.double()) * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        vectors.append(torch.autograd.grad(F.cross_entropy(logits, target), weight)[0].flatten())
    stacked = torch.stack(vectors)
    return stacked @ stacked.T


@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (2.0, 0.7, True), (None, 0.3, True)])
@pytest.mark.parametrize("columns", [1, 5, 1000])
def test_head_gram_equals_autograd_in_blocks_of_any_width(softcap, scale, bias, columns, monkeypatch):
    case = head_case(softcap=softcap, scale=scale, bias=bias)
    monkeypatch.setattr(gradients, "HEAD_BYTES", 4 * 18 * columns)
    np.testing.assert_allclose(compute_head_gram(*case), autograd_head_gram(*case), rtol=2e-5, atol=1e-6)


def test_head_gram_of_a_student_is_that_of_its_untied_head(model):
    hidden, target = [], []
    for micro in BATCH:
        with torch.no_grad():
            hidden.append(gradients.compute_hidden_states(model, micro.input_ids_1X)[micro.predict_N])
        target.append(micro.target_N)
    counts = [len(t) for t in target]
    ours = compute_head_gram(torch.cat(hidden), torch.cat(target), counts, gradients.get_head(model))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    exact = [dense_gradient(model, row, ["lm_head.weight"])[1] for row in ROWS]
    np.testing.assert_allclose(ours, compute_gram(torch.stack(exact)), rtol=1e-4)


def test_sketched_head_gram_is_unbiased_and_independent_of_the_blocks(monkeypatch):
    case = head_case(softcap=2.0, scale=0.7, bias=False)
    exact = autograd_head_gram(*case)
    estimates = torch.stack([compute_head_gram(*case, sketch=(8, 4), seed=seed) for seed in range(1500)])
    error = estimates.mean(0) - exact
    assert (error.abs() < 4 * estimates.std(0) / math.sqrt(len(estimates))).all()
    assert (estimates.std(0) > 0.05 * exact.abs()).all(), "a sketch is not exact"
    monkeypatch.setattr(gradients, "HEAD_BYTES", 4 * 18 * 3)
    np.testing.assert_allclose(compute_head_gram(*case, sketch=(8, 4), seed=5), estimates[5], rtol=1e-4, atol=1e-6)

"""Weighted fine-tuning: values and gradients against dense losses, schedules, checkpoints, what stops it.

Shapes: N trained tokens, D hidden size, V vocabulary, C coefficient sets.
"""

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lark.student import token_statistics as stats
from lark.student.token_statistics import Head, compute_weighted_surprisal
from lark.training.recipe import Recipe
from lark.training.sft_module import SFTModule

AVERAGES = ["trajectory", "token"]


@pytest.fixture
def ready(make_data):
    """The small pool, scored and selected."""

    def make(**settings):
        data = make_data(**settings)
        data.prepare_data()
        data.setup("fit")
        return data

    return make


def sft(data, tmp_path, *, steps=4):
    return SFTModule(student=data.student, recipe=data.recipe, steps=steps, seed=0, folder=tmp_path)


def gradients(data, tmp_path, *, step=0, weights=None):
    """The whole gradient of one optimizer step as it accumulates over the micro-batches, and the number of these."""
    module = sft(data, tmp_path)
    module.load_student(torch.float32)
    if weights is not None:
        selection = data.selections["selector"]
        data.selections["selector"] = type(selection)(**{**vars(selection), "weight": weights})
    micro_batches = list(module.micro_batches(data.step(step)))
    for micro_batch in micro_batches:
        module.loss(*micro_batch).sum().backward()
    return flat_gradient(module.student_model.parameters()), len(micro_batches)


def flat_gradient(parameters):
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- the loss


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_head_equals_dense_cross_entropy(softcap, bias, monkeypatch):
    torch.manual_seed(0)
    n, d, v = 23, 8, 50
    monkeypatch.setattr(stats, "CHUNK_BYTES", 4 * v * 5)  # five tokens a chunk
    hidden, weight, bias_V = torch.randn(n, d), torch.randn(v, d), torch.randn(v) if bias else None
    target, coefficient = torch.randint(v, (n,)), torch.rand(1, n)
    ours = [t.clone().requires_grad_() for t in (hidden, weight, *([bias_V] if bias_V is not None else []))]
    head = Head(weight_VD=ours[1], bias_V=ours[2] if bias else None, softcap=softcap, scale=0.7)
    value = compute_weighted_surprisal(ours[0], target, coefficient, head)
    dense = [t.detach().double().requires_grad_() for t in ours]
    logits = F.linear(dense[0], dense[1], dense[2] if bias else None) * 0.7
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = coefficient.double() @ F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    (0.3 * value).sum().backward()
    (0.3 * expected).sum().backward()
    for a, b in zip(ours, dense, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() < 5e-7 * b.grad.norm()
    with torch.no_grad():  # held-out losses are of several sets
        both = compute_weighted_surprisal(hidden, target, torch.cat([coefficient, 2 * coefficient]), head)
    torch.testing.assert_close(both.double(), torch.stack([expected, 2 * expected])[:, 0], rtol=1e-6, atol=0)


def test_autocast_rounds_neither_coefficients_nor_surprisals():
    torch.manual_seed(0)
    target, coefficient = torch.randint(50, (40,)), torch.rand(1, 40)
    hidden, head = torch.randn(40, 8), Head(weight_VD=torch.randn(50, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = compute_weighted_surprisal(hidden, target, coefficient, head)
        logits = head.compute_logits(hidden)
    expected = coefficient.double() @ F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


def test_with_equal_weights_the_loss_is_the_models_own(ready, tmp_path):
    data = ready(recipe={"average": "token", "weighted": False})
    model = data.student.load_trainable(torch.float32)
    module = sft(data, tmp_path)
    module.load_student(torch.float32)
    batch = data.step(0)
    width = max(map(len, (row.input_ids for row in batch.encoded)))
    ids, labels = torch.zeros(6, width, dtype=torch.int64), torch.full((6, width), -100)
    for i, row in enumerate(batch.encoded):
        end, prompt = len(row.input_ids), row.prompt_tokens
        ids[i, :end] = torch.tensor(row.input_ids)
        labels[i, prompt:end] = ids[i, prompt:end]
    expected = model(input_ids=ids, labels=labels).loss
    ours = sum(module.loss(*micro_batch).sum() for micro_batch in module.micro_batches(batch))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("average", AVERAGES)
def test_weighted_loss_and_gradient_by_brute_force(average, ready, tmp_path):
    data = ready(recipe={"average": average, "micro_batch_tokens": 1})
    selection = data.selections["selector"]
    model = data.student.load_trainable(torch.float32).double()
    batch = data.step(0)
    rows = batch.rows
    weight = dict(zip(selection.row.tolist(), selection.weight.tolist(), strict=True))
    sums, tokens = [], []
    for row in data.trajectories.read_tokens(rows):
        ids = torch.tensor([row.input_ids])
        log_p = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        span = log_p.gather(1, ids[0, 1:, None])[row.prompt_tokens - 1 :, 0]
        sums.append(-span.sum())
        tokens.append(len(span))
    w = [weight[int(row)] for row in rows]
    if average == "trajectory":
        loss = sum(wi * s / t for wi, s, t in zip(w, sums, tokens, strict=True)) / len(rows)
    else:
        loss = sum(wi * s for wi, s in zip(w, sums, strict=True)) / sum(wi * t for wi, t in zip(w, tokens, strict=True))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    expected = flat_gradient(model.parameters())
    ours, _ = gradients(data, tmp_path)
    assert len(set(w)) > 1 and len(set(tokens)) > 1
    assert distance(ours, expected) < 1e-5  # float32 against float64


@pytest.mark.parametrize("average", AVERAGES)
def test_micro_batches_do_not_change_the_gradient(average, ready, tmp_path):
    one, count = gradients(ready(recipe={"average": average, "micro_batch_tokens": 1}), tmp_path)
    assert count == 6
    together, count = gradients(ready(recipe={"average": average, "micro_batch_tokens": 10_000}), tmp_path)
    assert count == 1
    assert distance(one, together) < 2e-6


@pytest.mark.parametrize("average", AVERAGES)
def test_packed_documents_do_not_see_each_other(average, ready, tmp_path):
    separate, _ = gradients(ready(recipe={"average": average, "micro_batch_tokens": 1}), tmp_path)
    packed, count = gradients(ready(recipe={"average": average, "micro_batch_tokens": 10_000}), tmp_path)
    assert count == 1
    assert distance(packed, separate) < 5e-6


@pytest.mark.parametrize("average", AVERAGES)
def test_weights_reach_the_gradient_at_micro_batch_one_and_their_scale_does_not(average, ready, tmp_path):
    data = ready(recipe={"average": average, "micro_batch_tokens": 1})
    rows = len(data.selections["selector"].row)
    plain, _ = gradients(ready(recipe={"average": average, "weighted": False}), tmp_path)
    ones, _ = gradients(data, tmp_path, weights=np.ones(rows))
    uneven = np.random.default_rng(0).uniform(0.2, 3, rows)
    weighted, _ = gradients(data, tmp_path, weights=uneven)
    assert distance(ones, plain) < 2e-6
    assert distance(weighted, plain) > 0.05
    if average == "token":  # the denominator carries the weights; over trajectories the selection's mean of 1 does
        scaled, _ = gradients(data, tmp_path, weights=7 * uneven)
        assert distance(scaled, weighted) < 2e-6


def test_a_selections_weights_have_mean_one_so_that_scaling_shares_changes_nothing(ready):
    for selection in ready().selections.values():
        assert selection.weight.mean() == pytest.approx(1, abs=1e-12)
        assert np.ptp(selection.weight / selection.q) < 1e-12


# ---- the module under a Trainer


class Watch(SFTModule):
    """Notes what holds when a step begins."""

    def training_step(self, batch, batch_idx):
        self.modes = {m.training for m in self.student_model.modules()}
        super().training_step(batch, batch_idx)


def fit(data, trainer, tmp_path, *, steps=4, kind=SFTModule, **keywords):
    module = kind(student=data.student, recipe=data.recipe, steps=steps, seed=0, folder=tmp_path)
    trainer.fit(module, datamodule=data, **keywords)
    return module


def test_it_trains_in_train_mode_also_after_validation(make_data, make_trainer, tmp_path):
    settings = {"num_sanity_val_steps": -1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    module = fit(make_data(), make_trainer(max_steps=2, **settings), tmp_path, steps=2, kind=Watch)
    assert module.modes == {True}
    assert [point["step"] for point in module.curve] == [0, 1, 2]


def test_dropout_is_on_and_seeded_by_the_step(make_data, make_trainer, tmp_path):
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": "all-linear"}

    def trained(dropout, seed_before):
        torch.manual_seed(seed_before)
        data = make_data(student={"lora": lora | {"lora_dropout": dropout}}, recipe={"lr": 0.05})
        module = fit(data, make_trainer(max_steps=3), tmp_path, steps=3)
        return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])

    with_dropout = trained(0.5, 1)
    assert torch.equal(with_dropout, trained(0.5, 2))
    assert not torch.allclose(with_dropout, trained(0.0, 1), atol=1e-4)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
def test_gradient_checkpointing_recomputes_and_changes_nothing(lora, ready, tmp_path):
    def forwards(on):
        data = ready(student={"gradient_checkpointing": on, "lora": lora}, recipe={"micro_batch_tokens": 10_000})
        module = sft(data, tmp_path)
        torch.manual_seed(0)
        module.load_student(torch.float32)
        calls = []
        for part in module.student_model.modules():
            if isinstance(part, nn.Module) and type(part).__name__ == "Qwen3MLP":
                part.register_forward_pre_hook(lambda *_: calls.append(1))
        module.loss(*next(module.micro_batches(data.step(0)))).sum().backward()
        return len(calls), flat_gradient(module.parameters())

    (plain, expected), (recomputed, gradient) = forwards(False), forwards(True)
    assert (plain, recomputed) == (2, 4)  # two layers
    assert distance(gradient, expected) < 1e-6


def test_a_lora_checkpoint_holds_what_is_trained_only(make_data, make_trainer, tmp_path):
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    trainer = make_trainer(max_steps=1)
    module = fit(make_data(student={"lora": lora}), trainer, tmp_path, steps=1)
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    saved = torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in saved)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_by_step(schedule, make_data, make_trainer, tmp_path):
    rates = []

    class Rates(SFTModule):
        def training_step(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            super().training_step(batch, batch_idx)

    recipe = {"schedule": schedule, "warmup": 0.2, "lr": 0.01}
    fit(make_data(recipe=recipe), make_trainer(max_steps=10), tmp_path, steps=10, kind=Rates)
    decay = [0.5 * (1 + math.cos(math.pi * i / 8)) if schedule == "cosine" else 1.0 for i in range(8)]
    assert rates == pytest.approx([0.005, 0.01, *(0.01 * d for d in decay)])


def test_clipping_bounds_the_step(make_data, make_trainer, tmp_path):
    norms = []

    class Norms(SFTModule):
        def on_before_optimizer_step(self, optimizer):
            norms.append(flat_gradient(self._list_trained()).norm().item())

    fit(make_data(recipe={"clip": 1e-3}), make_trainer(max_steps=2), tmp_path, steps=2, kind=Norms)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_and_names_the_trajectories(make_data, make_trainer, tmp_path):
    class Broken(SFTModule):
        def loss(self, micro, coefficient_CR):
            return super().loss(micro, coefficient_CR) * (math.nan if self.global_step == 1 else 1.0)

    data = make_data(recipe={"batch_size": 2})
    with pytest.raises(
        ValueError, match=r"optimizer step 1: loss nan.*sft\.lr=0\.001.*nats/token\): \d/\d: nan, \d/\d: nan$"
    ):
        fit(data, make_trainer(max_steps=3), tmp_path, steps=3, kind=Broken)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}], ids=["full", "lora"])
def test_bf16_mixed_rounds_the_products_only(attention, lora, make_data, make_trainer, tmp_path):
    """Weights, coefficients and their sums stay float32: losses differ by rounding, and the student still learns."""

    def curve(precision):
        data = make_data(recipe={"lr": 3e-3}, student={"lora": lora, "attention": attention})
        trainer = make_trainer(max_steps=8, precision=precision, num_sanity_val_steps=-1, val_check_interval=8)
        module = fit(data, trainer, tmp_path, steps=8)
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
        return [point["held_out/loss"] for point in module.curve]

    exact, mixed = curve("32-true"), curve("bf16-mixed")
    assert mixed == pytest.approx(exact, rel=0.02) and mixed[-1] < mixed[0] - 0.01


def test_memory_of_a_failed_micro_batch_is_free_when_it_is_tried_again(make_data, make_trainer, tmp_path):
    """Also where the backward pass is what failed."""
    hidden, alive = [], []

    class Failing(SFTModule):
        def loss(self, micro, coefficient_CR):
            if self.trainer.training and len(hidden) == 1:
                alive.append(hidden[0]() is not None)
            value = super().loss(micro, coefficient_CR)
            if self.trainer.training:
                hidden.append(weakref.ref(value))
            return value

        def manual_backward(self, loss, *args, **keywords):
            if len(hidden) == 1:
                raise torch.OutOfMemoryError("out of memory")
            super().manual_backward(loss, *args, **keywords)

    fit(make_data(), make_trainer(max_steps=1), tmp_path, steps=1, kind=Failing)
    assert alive == [False]


@pytest.mark.parametrize("spike", [3.0, None])
def test_a_spike_stops_and_names_its_trajectory_first(spike, make_data, make_trainer, tmp_path):
    class Spiking(SFTModule):
        bad = -1

        def loss(self, micro, coefficient_CR):
            factor = [50.0 if self.global_step == 10 and row == self.bad else 1.0 for row in micro.rows]
            return super().loss(micro, coefficient_CR * torch.tensor(factor))

    data = make_data(recipe={"batch_size": 2, "lr": 1e-5, "spike": spike})
    data.prepare_data()
    data.setup("fit")
    Spiking.bad = int(data.step(10).rows[0])
    if spike is None:
        assert fit(data, make_trainer(max_steps=12), tmp_path, steps=12, kind=Spiking).global_step == 12
        return
    name = f"{data.trajectories.problem_id[Spiking.bad]}/{data.trajectories.candidate_id[Spiking.bad]}"
    with pytest.raises(ValueError, match=rf"step 10: its loss of .* sft\.spike=3 times the usual .*\): {name}: \d+"):
        fit(data, make_trainer(max_steps=12), tmp_path, steps=12, kind=Spiking)


def test_out_of_memory_inside_a_step_halves_the_micro_batches_and_changes_nothing(make_data, make_trainer, tmp_path):
    class Small(SFTModule):
        most = 10**6

        def loss(self, micro, coefficient_CR):
            value = super().loss(micro, coefficient_CR)
            if self.trainer.training and micro.tokens > self.most:
                raise torch.OutOfMemoryError("out of memory")
            return value

    def trained(most):
        Small.most = most
        data = make_data(recipe={"micro_batch_tokens": 1000})
        return fit(data, make_trainer(max_steps=3), tmp_path, steps=3, kind=Small)

    plain, split = trained(10**6), trained(250)
    assert (plain.totals["halvings"], plain.budget) == (0, 1000)
    assert (split.totals["halvings"], split.budget) == (1, 537 // 2)  # half of the first step's tokens
    for a, b in zip(plain.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"a trajectory of \d+ tokens alone .*model\.gradient_checkpointing"):
        trained(20)


def test_rounding_the_weights_that_are_trained_is_refused(make_data, tmp_path):
    data = make_data()
    module = sft(data, tmp_path)

    class Half:
        precision = "bf16-true"

    module._trainer = Half()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16-true.*bf16-mixed"):
        module.configure_model()


@pytest.mark.parametrize(
    "wrong",
    [
        {"average": "mean"},
        {"schedule": "linear"},
        {"batch_size": 0},
        {"steps": 0},
        {"lr": 0.0},
        {"clip": float("nan")},
        {"warmup": 1.0},
        {"checkpoint_every": 0},
        {"micro_batch_tokens": 0},
        {"spike": 1.0},
    ],
)
def test_recipe_says_which_setting_is_wrong(wrong):
    with pytest.raises(ValueError, match=rf"sft\.{next(iter(wrong))}="):
        Recipe(**wrong)


def test_steps_follow_from_epochs():
    assert Recipe(epochs=3, batch_size=64).count_steps(100) == 5
    assert Recipe(steps=7).count_steps(100) == 7
    assert Recipe(epochs=0.01, batch_size=64).count_steps(10) == 1

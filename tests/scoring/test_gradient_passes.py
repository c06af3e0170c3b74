"""The gradient passes through the data module, against dense backward passes over all logits in float64.

Shapes: d parameters, k projected dimensions, J sub-tasks.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rows_of_a_pool
from selection.scores.test_gradients import gains_by_derivative, grace_by_the_formula
from torch import nn

from lark.common.cache import is_complete
from lark.scoring import gradient_passes
from lark.scoring.gradient_passes import GradientsModule, LossDropsModule, choose_examples
from lark.scoring.gradients import compute_flat_gradients, draw_signs
from lark.scoring.passes import GradientMatches, Gradients, HeadGradients, LossDrops, ProjectedGradients
from lark.selection.scores.gradients import Grace, GradMatch, GradNorm, LarkExact, LarkHead, LossDrop
from lark.training.datamodule import WarmUp
from lark.training.sft_module import SFTModule

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}


def passed(data, checkpoints=()):
    """The candidates with the columns of the passes that the rules need, LESS's from the checkpoints."""
    data.prepare_data()
    for wanted in data.needs:
        cached = is_complete(data.pass_folder(wanted))
        data.run_pass(wanted, cached=cached, warm_up=WarmUp(checkpoints=checkpoints, cost={}))
    return data.candidates


def trainable(data):
    """The model as the arm trains it, in float64 and without dropout."""
    torch.manual_seed(data.seed)
    return data.student.load_trainable(torch.float32).double().eval()


def with_untied_head(data):
    """The model in float64, its head a tensor of its own."""
    model = data.student.load_model(torch.float32).double()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def dense_loss(data, model, row) -> torch.Tensor:
    """L from all logits."""
    (encoded,) = data.trajectories.read_tokens(np.array([row]))
    ids, first = torch.tensor(encoded.input_ids), encoded.prompt_tokens
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[first - 1 : -1], ids[first:])


def dense_gradient(data, model, row, names) -> np.ndarray:
    """Gradient of L by a backward pass through all logits, [d]."""
    model.zero_grad()
    dense_loss(data, model, row).backward()
    named = dict(model.named_parameters())
    return torch.cat([named[name].grad.flatten() for name in names]).numpy()


def trained_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def projection(model, k, *, seed) -> np.ndarray:
    """The signs over sqrt(k) of the parameters that are trained, [d, k]."""
    named, device = dict(model.named_parameters()), torch.device("cpu")
    signs = [draw_signs(name, 0, named[name].numel(), k, seed=seed, device=device) for name in trained_names(model)]
    return torch.cat(signs).double().numpy() / np.sqrt(k)


def sketched(gradient_d, model, sketch, *, seed) -> np.ndarray:
    """A' D B / sqrt(a b) of the head's gradient D with matrices of signs A [V, a] and B [hidden size, b], flattened."""
    (rows, columns), (a, b), device = model.lm_head.weight.shape, sketch, torch.device("cpu")
    left = draw_signs("head rows", 0, rows, a, seed=seed, device=device).double().numpy()
    right = draw_signs("head columns", 0, columns, b, seed=seed, device=device).double().numpy()
    return (left.T @ gradient_d.reshape(rows, columns) @ right).flatten() / np.sqrt(a * b)


def mates(data, row):
    """The scored rows of a row's problem."""
    scored = data.scored
    return scored[data.trajectories.problem_id[scored] == data.trajectories.problem_id[row]]


# ---- Gram matrices


@pytest.mark.parametrize(
    ("parameters", "lora"), [("trained", None), ("trained", LORA), ("all", LORA), ("last:1", None)]
)
def test_gram_matrices_of_whole_problems(parameters, lora, make_data):
    data = make_data(selector=LarkExact(parameters=parameters), student={"lora": lora})
    rows = passed(data)
    columns = rows.of(Gradients(parameters=parameters))
    if parameters == "trained":
        model = trainable(data)
        names = trained_names(model)
    else:
        model = data.student.load_model(torch.float32).double()
        names = [name for name, _ in model.named_parameters() if parameters == "all" or "layers.1." in name]
    exact = {row: dense_gradient(data, model, row, names) for row in rows.row_N[:8].tolist()}
    for i, row in enumerate(exact):
        assert columns["gram_rows"][i].tolist() == mates(data, row).tolist()
        expected = [exact[row] @ exact[mate] for mate in columns["gram_rows"][i]]
        scale = columns["squared_norm"].max()
        np.testing.assert_allclose(columns["gram"][i], expected, rtol=1e-4, atol=1e-6 * scale)
        assert columns["squared_norm"][i] == columns["gram"][i][columns["gram_rows"][i].tolist().index(row)]
    tokens = int(data.trajectories.length[data.scored].sum())
    cost = data.costs[Gradients(parameters=parameters)]
    assert (cost["forward_tokens"], cost["backward_tokens"]) == (tokens, tokens)


def test_units_are_whole_problems_the_longest_first(make_data):
    data = make_data(selector=LarkExact())
    data.prepare_data()
    units = gradient_passes.plan_problem_units(data.trajectories, data.scored)
    assert sorted(row for unit in units for row in unit.tolist()) == data.scored.tolist()
    for unit in units:
        assert unit.tolist() == mates(data, unit[0]).tolist()
    tokens = [data.trajectories.length[unit].sum() for unit in units]
    assert tokens == sorted(tokens, reverse=True)


@pytest.mark.parametrize("batch_tokens", [50, 10_000])
def test_head_gradients_are_those_of_an_untied_head(batch_tokens, make_data):
    data = make_data(selector=LarkHead(), probe={"batch_tokens": batch_tokens})
    rows = passed(data)
    columns = rows.of(HeadGradients())
    model = with_untied_head(data)
    exact = {row: dense_gradient(data, model, row, ["lm_head.weight"]) for row in rows.row_N[:8].tolist()}
    for i, row in enumerate(exact):
        assert sorted(columns["gram_rows"][i]) == mates(data, row).tolist()
        expected = [exact[row] @ exact[mate] for mate in columns["gram_rows"][i]]
        np.testing.assert_allclose(columns["gram"][i], expected, rtol=1e-4)
    assert data.costs[HeadGradients()]["backward_tokens"] == 0


def test_a_sketch_of_the_head_is_its_gradient_between_two_matrices_of_signs(make_data):
    scores = {seed: LarkHead(sketch=(24, 16), projection_seed=seed) for seed in (0, 1)}
    data = make_data(selector=scores[0], baseline=scores[1])
    rows = passed(data)
    model = with_untied_head(data)
    exact = {row: dense_gradient(data, model, row, ["lm_head.weight"]) for row in rows.row_N[:8].tolist()}
    for seed, score in scores.items():
        columns = rows.of(score.needs[1])
        between = {row: sketched(gradient, model, (24, 16), seed=seed) for row, gradient in exact.items()}
        for i, row in enumerate(exact):
            expected = [between[row] @ between[mate] for mate in columns["gram_rows"][i]]
            np.testing.assert_allclose(columns["gram"][i], expected, rtol=1e-4)


# ---- projections and steps


def test_projected_gradients_are_the_gradients_times_the_signs(make_data, monkeypatch):
    k = 70
    data = make_data(selector=GradNorm(dimensions=k, projection_seed=3))
    wanted = ProjectedGradients(dimensions=k, projection_seed=3)
    rows = passed(data)
    vectors = rows.of(wanted)["vector"]
    assert vectors[0].dtype == np.float32
    model = trainable(data)
    matrix_dk = projection(model, k, seed=3)
    for i in (0, 5, len(rows) - 1):
        expected = dense_gradient(data, model, rows.row_N[i], trained_names(model)) @ matrix_dk
        np.testing.assert_allclose(vectors[i], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(GradNorm(dimensions=k, projection_seed=3)(rows)[0], -np.linalg.norm(vectors[0]))

    monkeypatch.setattr(gradient_passes, "BUFFER_BYTES", 4 * len(matrix_dk) * 5)  # five rows at a time
    cut = passed(make_data(cache="cut", selector=GradNorm(dimensions=k, projection_seed=3))).of(wanted)["vector"]
    for ours, other in zip(vectors, cut, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5 * np.abs(ours).max())


def test_loss_drops_by_a_step_on_a_copy(make_data):
    eta = 1e-2
    data = make_data(selector=LossDrop(eta=eta, parameters="last:1"))
    rows = passed(data)
    columns = rows.of(LossDrops(eta=eta, parameters="last:1"))
    statistics = passed(make_data()).statistics
    np.testing.assert_allclose(columns["loss_before"], statistics["loss"], rtol=1e-5)
    for i, row in enumerate(rows.row_N[:4].tolist()):
        model = data.student.load_model(torch.float32).double()
        last = [name for name, _ in model.named_parameters() if "layers.1." in name]
        gradient = torch.from_numpy(dense_gradient(data, model, row, last))
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, part in zip(last, gradient.split([named[name].numel() for name in last]), strict=True):
                named[name] -= eta * part.view_as(named[name])
            after = dense_loss(data, model, row).item()
        assert columns["drop"][i] == pytest.approx((statistics["loss"][i] - after) / eta, rel=1e-3, abs=1e-3)


def test_a_step_is_taken_in_float32_whatever_the_students_dtype(make_data):
    data = make_data(student={"dtype": "bfloat16"}, selector=LossDrop())
    data.prepare_data()
    for kind, dtype in ((LossDropsModule, torch.float32), (GradientsModule, torch.bfloat16)):
        wanted = LossDrops() if kind is LossDropsModule else Gradients()
        model = kind(wanted=wanted, inputs=data._inputs(), folder=data.cache).load_student(torch.device("cpu"))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("parameters", ["trained", pytest.param("all", marks=pytest.mark.slow)])
def test_layers_recompute_with_dropout_off(parameters, make_data, monkeypatch):
    calls, load = [], GradientsModule.load_student

    def counted(self, device):
        model = load(self, device)
        for module in model.modules():
            if type(module).__name__ == "Qwen3MLP":
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        return model

    def squared_norms(cache, **student):
        calls.clear()
        data = make_data(rows_of_a_pool(4, 3), cache=cache, selector=LarkExact(parameters=parameters), student=student)
        return passed(data).of(Gradients(parameters=parameters))["squared_norm"], len(calls)

    monkeypatch.setattr(GradientsModule, "load_student", counted)
    expected, once = squared_norms("plain", lora=LORA)
    recomputed, twice = squared_norms("recomputed", lora=LORA, gradient_checkpointing=True)
    assert 0 < once == twice / 2
    np.testing.assert_allclose(recomputed, expected, rtol=1e-5)  # dropout would show
    undropped, _ = squared_norms("no dropout", lora=LORA | {"lora_dropout": 0.0})
    np.testing.assert_allclose(undropped, expected, rtol=1e-5)


def test_identity_holds_what_a_gradient_depends_on(make_data):
    def name(parameters, seed=0, **student):
        data = make_data(selector=LarkExact(parameters=parameters), student=student)
        data.seed = seed
        data.prepare_data()
        return data.pass_folder(Gradients(parameters=parameters)).name

    full = name("trained")
    assert name("trained", seed=1) == full, "no random start"
    lora = name("trained", lora=LORA)
    assert (
        len({full, lora, name("trained", seed=1, lora=LORA), name("trained", lora=LORA | {"r": 4}), name("all")}) == 5
    )
    assert name("all", lora=LORA) == name("all", seed=1)


# ---- LESS


def warmed_up(data, make_trainer, folder):
    """Checkpoints after one and two optimizer steps, as a warm-up arm leaves them."""
    trainer = make_trainer(max_steps=1)
    checkpoints = []
    for steps, rate in ((1, 1e-3), (3, 4e-3)):
        module = SFTModule(student=data.student, recipe=data.recipe, steps=steps, seed=data.seed, folder=folder)
        data.selections = {}
        data.setup("fit")
        trainer = make_trainer(max_steps=steps)
        trainer.fit(module, datamodule=data)
        path = folder / f"{steps}.ckpt"
        trainer.save_checkpoint(path)
        checkpoints.append((path, rate))
    return tuple(checkpoints)


def matches_by_the_formula(data, checkpoints, wanted, examples, signs=None):
    """Every candidate's match from whole float64 matrices, [N]."""
    pool, rows = data.trajectories, data.scored
    subtask = (
        ["one"] * len(examples) if wanted.subtask is None else [str(v) for v in pool.column(wanted.subtask, examples)]
    )
    total = {task: np.zeros(len(rows)) for task in subtask}
    for path, rate in checkpoints:
        saved = torch.load(path, weights_only=True)
        model = trainable(data)
        names = trained_names(model)
        model.load_state_dict(
            {n.removeprefix("student_model."): w for n, w in saved["state_dict"].items()}, strict=False
        )
        state = saved["optimizer_states"][0]["state"]
        m, v = (
            torch.cat([state[i][k].flatten() for i in range(len(names))]).double().numpy()
            for k in ("exp_avg", "exp_avg_sq")
        )
        gradient = {row: dense_gradient(data, model, row, names) for row in rows.tolist()}
        b1, b2, eps = 0.9, 0.999, 1e-8

        def unit(vector):
            vector = vector if signs is None else vector @ signs
            return vector / np.linalg.norm(vector)

        toward = [unit(gradient[row]) for row in examples.tolist()]
        for i, row in enumerate(rows.tolist()):
            g = gradient[row]
            step = unit((b1 * m + (1 - b1) * g) / np.sqrt(b2 * v + (1 - b2) * g**2 + eps))
            for task in total:
                others = [
                    t
                    for t, example, name in zip(toward, examples, subtask, strict=True)
                    if name == task and pool.problem_id[example] != pool.problem_id[row]
                ]
                total[task][i] += rate * np.mean([step @ t for t in others]) if others else np.nan
    return np.nanmax(list(total.values()), axis=0)


def kinds(rows):
    """A pool column that puts every other candidate into another sub-task."""
    return [row | {"kind": "ab"[int(row["candidate_id"]) % 2]} for row in rows]


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        (LORA, {"subtask": "kind", "validation_problems": 3}),
        pytest.param(None, {"validation_problems": 2}, marks=pytest.mark.slow),
        (LORA, {"validation_problems": 32, "dimensions": 90, "projection_seed": 4}),
    ],
)
def test_matches_equal_the_formula(lora, settings, make_data, make_trainer, tmp_path, monkeypatch):
    score, wanted = GradMatch(**settings), GradientMatches(**settings)
    warm = make_data(kinds(rows_of_a_pool()), student={"lora": lora}, recipe={"lr": 0.02})
    warm.prepare_data()
    checkpoints = warmed_up(warm, make_trainer, tmp_path)

    data = make_data(kinds(rows_of_a_pool()), selector=score, student={"lora": lora}, recipe={"lr": 0.02})
    model, together = trainable(data), []
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(gradient_passes, "BUFFER_BYTES", 4 * 3 * size)  # three of a problem's four candidates

    def counted(student, batch, parameters):
        together.append(len(batch))
        return compute_flat_gradients(student, batch, parameters)

    monkeypatch.setattr(gradient_passes, "compute_flat_gradients", counted)
    rows = passed(data, checkpoints)
    assert max(together) == 3 and together.count(1) >= 2 * 6, "the fourth of six problems at two checkpoints"
    examples = choose_examples(wanted, data._inputs())
    problems = set(data.trajectories.problem_id[examples])
    assert len(problems) == min(settings["validation_problems"], 6) and (data.trajectories.correct[examples] == 1).all()
    signs = None if wanted.dimensions is None else projection(model, wanted.dimensions, seed=4)
    expected = matches_by_the_formula(data, checkpoints, wanted, examples, signs)
    assert np.ptp(expected) > 1e-4
    np.testing.assert_allclose(score(rows), expected, rtol=1e-3, atol=2e-6)
    lengths = data.trajectories.length
    tokens = 2 * int(lengths[data.scored].sum() + lengths[examples].sum())
    assert data.costs[wanted]["forward_tokens"] == data.costs[wanted]["backward_tokens"] == tokens


def test_a_matchs_identity_holds_its_examples(make_data):
    def name(seed=0, correct=None):
        data = make_data()
        data.seed = seed
        data.prepare_data()
        if correct is not None:  # another checker
            data.trajectories.correct[:] = correct
        return data.pass_folder(GradientMatches()).name

    assert name() == name()
    assert len({name(), name(seed=1), name(correct=1), name(correct=0)}) == 3, (
        "all correct and none known: the same rows"
    )


def test_validation_examples_without_verdicts_are_all_candidates(make_data):
    wanted = GradientMatches(validation_problems=2)
    unknown = [row | {"correct": None, "answer": None} for row in rows_of_a_pool()]
    data = make_data(unknown)
    data.prepare_data()
    examples = choose_examples(wanted, data._inputs())
    problems = set(data.trajectories.problem_id[examples])
    assert len(problems) == 2
    assert sorted(examples) == sorted(row for row in data.scored if data.trajectories.problem_id[row] in problems)
    assert not set(examples) - set(data.scored), "none is held out"


def test_a_candidate_with_no_example_of_another_problem_has_no_match(make_data, make_trainer, tmp_path):
    one = [row | {"correct": row["problem_id"] == "1"} for row in rows_of_a_pool()]
    warm = make_data(one, student={"lora": LORA})
    warm.prepare_data()
    assert "1" in warm.trajectories.problem_id[warm.scored]
    checkpoints = warmed_up(warm, make_trainer, tmp_path)
    data = make_data(one, selector=GradMatch(), student={"lora": LORA})
    rows = passed(data, checkpoints)
    np.testing.assert_array_equal(np.isnan(GradMatch()(rows)), rows["problem_id"] == "1")


# ---- rules


def by_the_formula(score, data) -> np.ndarray:
    """The score of every candidate from dense gradients in float64, [N]."""
    rows = data.scored.tolist()
    model = with_untied_head(data) if isinstance(score, LarkHead) else trainable(data)
    names = ["lm_head.weight"] if isinstance(score, LarkHead) else trained_names(model)
    gradients = np.stack([dense_gradient(data, model, row, names) for row in rows])
    losses = np.array([dense_loss(data, model, row).item() for row in rows])
    if isinstance(score, LarkHead) and score.sketch is not None:
        gradients = np.stack([sketched(gradient, model, score.sketch, seed=0) for gradient in gradients])
    if isinstance(score, GradNorm | Grace) and score.dimensions is not None:
        gradients = gradients @ projection(model, score.dimensions, seed=0)
    if isinstance(score, GradNorm):
        return -np.linalg.norm(gradients, axis=1)
    if isinstance(score, LossDrop):  # its limit for small steps
        return np.sum(gradients**2, axis=1) / losses
    problem, teacher = data.trajectories.problem_id[data.scored], data.trajectories.column("teacher", data.scored)
    score_N = np.empty(len(rows))
    for name in set(teacher if isinstance(score, Grace) else problem):
        if isinstance(score, Grace):
            of = teacher == name
            score_N[of] = -grace_by_the_formula(gradients[of], problem[of].tolist(), seed=score.seed)
        else:
            of = problem == name
            score_N[of] = gains_by_derivative(gradients[of], losses[of])
    return score_N


@pytest.mark.slow
@pytest.mark.parametrize(
    "score",
    [LarkExact(), LarkHead(), LarkHead(sketch=(8, 8)), LossDrop(), GradNorm(), GradNorm(dimensions=16), Grace(seed=0)],
    ids=lambda score: type(score).__name__,
)
def test_rules_over_gradients_choose_the_best_of_every_problem(score, make_data):
    data = make_data(selector=score)
    data.prepare_data()
    data.setup("fit")
    chosen, expected = data.selections["selector"], by_the_formula(score, data)
    np.testing.assert_allclose(chosen.score_N, expected, rtol=2e-2)
    problem = data.trajectories.problem_id[data.scored]
    best = [
        row for one in set(problem) for row in data.scored[problem == one][np.argsort(-expected[problem == one])[:2]]
    ]
    assert sorted(chosen.row.tolist()) == sorted(best)

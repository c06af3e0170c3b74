"""Scores over gradients: against derivatives, plain transcriptions of the formulas, and each other.

Shapes: K candidates of one problem, k projected dimensions.
"""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark.common.groups import unit_hash
from lark.scoring.passes import GradientMatches, Gradients, HeadGradients, LossDrops, ProjectedGradients, Statistics
from lark.selection.candidates import Candidates
from lark.selection.policies import Chi2
from lark.selection.rule import Rule
from lark.selection.scores.gradients import Grace, GradMatch, GradNorm, LarkExact, LarkHead, LossDrop
from lark.selection.scores.statistics import Lark
from lark.selection.selection import select


def candidates(problem_id, *, passes=None, teacher=None, kept=None, **statistics) -> Candidates:
    rows = len(problem_id)
    columns = {"teacher": teacher or [None] * rows, "correct": [np.nan] * rows, "kept": kept or [True] * rows}
    return Candidates(
        problem_id=np.array(problem_id, object),
        candidate_id=np.array([str(i) for i in range(rows)], object),
        row_N=10 + np.arange(rows),
        statistics={name: np.array(values) for name, values in statistics.items()},
        read_column=lambda name, row_N: np.array([columns[name][row - 10] for row in row_N], object),
        passes={
            wanted: {name: np.array(values) for name, values in columns.items()}
            for wanted, columns in (passes or {}).items()
        },
    )


def arrays(values):
    """One array a row, as a pass leaves them."""
    column = np.empty(len(values), object)
    column[:] = [np.asarray(value) for value in values]
    return column


def with_gradients(problem_id, vectors, losses, *, wanted=None, order=None, **columns) -> Candidates:
    """Candidates whose Gram matrices are those of `vectors`; `order` shuffles the rows inside `gram_rows`."""
    problem_id, vectors = np.array(problem_id), np.asarray(vectors, float)
    gram, gram_rows = [], []
    for i, problem in enumerate(problem_id):
        mates = np.flatnonzero(problem_id == problem)
        mates = mates if order is None else np.array([row for row in order if row in mates])
        gram.append(vectors[mates] @ vectors[i])
        gram_rows.append(10 + mates)
    passes = {wanted or Gradients(): {"gram": arrays(gram), "gram_rows": arrays(gram_rows)}}
    columns = {"num_tokens": np.full(len(problem_id), 7)} | columns
    return candidates(problem_id.tolist(), passes=passes, loss=losses, **columns)


def gains_by_derivative(vectors, losses, tokens=None):
    """d/dw_k of ||sum_i w_i grad L_i||^2 / sum_i w_i L_i at w = 1, by central differences; with `tokens`, of the loss
    averaged over them, at w = 1/K and with the rate itself added.
    """
    vectors, losses, step = np.asarray(vectors, float), np.asarray(losses, float), 1e-6

    def rate(w):
        return np.sum((w @ vectors) ** 2) / (w @ losses)

    def by_tokens(w):
        return rate(w * tokens / (w @ tokens))

    of, at = (rate, 1.0) if tokens is None else (by_tokens, 1 / len(losses))
    start, unit = np.full(len(losses), at), np.eye(len(losses)) * step
    slopes = [(of(start + unit[k]) - of(start - unit[k])) / (2 * step) for k in range(len(losses))]
    return np.array(slopes) + (0.0 if tokens is None else of(start))


# ---- LARK


def test_lark_exact_is_the_derivative_of_the_mixtures_rate():
    rng = np.random.default_rng(0)
    problem_id = ["p", "q", "p", "p", "q", "r", "p"]
    vectors, losses = rng.normal(size=(7, 5)), rng.uniform(0.2, 3, 7)
    gain_N = LarkExact()(with_gradients(problem_id, vectors, losses, order=rng.permutation(7)))
    for problem in "pqr":
        rows = [i for i in range(7) if problem_id[i] == problem]
        np.testing.assert_allclose(gain_N[rows], gains_by_derivative(vectors[rows], losses[rows]), rtol=1e-6)
        mixture = np.sum(vectors[rows].sum(0) ** 2) / losses[rows].sum()
        assert gain_N[rows].sum() == pytest.approx(mixture, rel=1e-12)


@pytest.mark.parametrize(
    ("score", "wanted"), [(LarkExact(average="token"), Gradients()), (LarkHead(average="token"), HeadGradients())]
)
def test_averaged_over_tokens_it_is_the_derivative_of_that_losses_rate(score, wanted):
    rng = np.random.default_rng(5)
    problem_id, tokens = ["p", "q", "p", "p", "q", "r", "p"], rng.integers(1, 90, 7)
    vectors, losses = rng.normal(size=(7, 5)), rng.uniform(0.2, 3, 7)
    losses[6] = math.nan  # counts in no mean of tokens either
    gain_N = score(with_gradients(problem_id, vectors, losses, num_tokens=tokens, wanted=wanted))
    assert np.isnan(gain_N[6])
    for problem in "pqr":
        rows = [i for i in range(6) if problem_id[i] == problem]
        expected_K = gains_by_derivative(vectors[rows], losses[rows], tokens[rows])
        np.testing.assert_allclose(gain_N[rows], expected_K, rtol=1e-6)


pools = st.lists(
    st.tuples(st.sampled_from("abc"), st.one_of(st.just(0.0), st.floats(1e-4, 20)), st.floats(0, 2)),
    min_size=1,
    max_size=12,
)


@given(pool=pools, head=st.booleans())
def test_with_orthogonal_gradients_of_brier_length_it_is_lark(pool, head):
    problem_id, loss, brier = map(list, zip(*pool, strict=True))
    vectors = np.diag(np.sqrt(brier))
    score, wanted = (LarkHead(), HeadGradients()) if head else (LarkExact(), Gradients())
    rows = with_gradients(problem_id, vectors, loss, wanted=wanted, brier=brier)
    np.testing.assert_allclose(score(rows), Lark()(rows), rtol=1e-9, atol=1e-12)


def test_a_filters_survivors_have_their_own_gram_matrix():
    rng = np.random.default_rng(1)
    vectors, losses = rng.normal(size=(5, 3)), rng.uniform(0.5, 2, 5)
    rows = with_gradients(["p"] * 5, vectors, losses, kept=[True, False, True, True, False])
    rule = Rule(name="lark_exact", score=LarkExact(), filter="kept", policy=Chi2(budget=1))
    score_N = select(rule, rows, seed=0).score_N
    kept = [0, 2, 3]
    np.testing.assert_allclose(score_N[kept], gains_by_derivative(vectors[kept], losses[kept]), rtol=1e-6)
    assert np.isnan(score_N[[1, 4]]).all()
    assert np.abs(score_N[kept] - LarkExact()(rows)[kept]).max() > 0.1


def test_rows_without_loss_or_gradient_get_no_score_and_count_in_no_sum():
    rng = np.random.default_rng(2)
    vectors, losses = rng.normal(size=(5, 3)), np.array([1.0, 0.0, 2.0, 1.5, math.nan])
    vectors[2] = math.nan
    gain_N = LarkExact()(with_gradients(["p"] * 5, vectors, losses))
    assert np.isnan(gain_N).tolist() == [False, True, True, False, True]
    alone = LarkExact()(with_gradients(["p"] * 2, vectors[[0, 3]], losses[[0, 3]]))
    np.testing.assert_allclose(gain_N[[0, 3]], alone, rtol=1e-12)


def test_needs_name_the_passes_with_their_settings():
    assert LarkExact(parameters="last:2").needs == (Statistics(), Gradients(parameters="last:2"))
    sketched = LarkHead(sketch=[8, 4], projection_seed=3)  # type: ignore[arg-type]
    assert sketched.needs == (Statistics(), HeadGradients(sketch=(8, 4), projection_seed=3))
    assert LossDrop(eta=0.1, parameters="all").needs == (LossDrops(eta=0.1, parameters="all"),)
    assert GradNorm(parameters="all").needs == (Gradients(parameters="all"),)
    projected = ProjectedGradients(parameters="all", dimensions=9, projection_seed=2)
    assert GradNorm(parameters="all", dimensions=9, projection_seed=2).needs == (projected,)
    assert Grace(seed=0, parameters="all", dimensions=9, projection_seed=2).needs == (projected,)
    match = {"warmup_share": 0.5, "epochs": 2, "validation_problems": 3, "subtask": "kind", "dimensions": 5}
    assert GradMatch(**match).needs == (GradientMatches(**match),)
    assert hash(sketched.needs) and hash(GradMatch().needs)  # passes are keys


# ---- one number from one column


def test_loss_drop_is_relative_to_the_loss():
    passes = {LossDrops(): {"drop": [0.5, 0.5, 1.0, -0.2], "loss_before": [2.0, 0.25, 0.0, 1.0]}}
    score_N = LossDrop()(candidates(["p"] * 4, passes=passes))
    np.testing.assert_allclose(score_N, [0.25, 2.0, math.nan, -0.2])


def test_grad_norm_takes_the_smallest_gradient_first():
    passes = {
        Gradients(): {"squared_norm": [4.0, 9.0]},
        ProjectedGradients(dimensions=2): {"vector": arrays([[3.0, 4.0], [0.0, 1.0]])},
    }
    rows = candidates(["p", "p"], passes=passes)
    assert GradNorm()(rows).tolist() == [-2.0, -3.0]
    assert GradNorm(dimensions=2)(rows).tolist() == [-5.0, -1.0]


def test_grad_match_is_the_column():
    wanted = GradientMatches(subtask="kind")
    rows = candidates(["p", "p"], passes={wanted: {"match": [0.25, math.nan]}})
    np.testing.assert_array_equal(GradMatch(subtask="kind")(rows), [0.25, math.nan])


# ---- GRACE


def grace_by_the_formula(vectors, problems, *, seed):
    """Ten splits by problem, one by one, by eigenvalues."""
    values = []
    for split in range(10):
        names = sorted(set(problems))
        draw = dict(zip(names, unit_hash(seed, [split] * len(names), names, salt="grace"), strict=True))
        test_names = sorted(names, key=draw.__getitem__)[: max(1, int(0.1 * len(names)))]
        test = [v for v, p in zip(vectors, problems, strict=True) if p in test_names]
        train = [v / math.sqrt(v @ v) for v, p in zip(vectors, problems, strict=True) if p not in test_names]
        c_train = sum(np.outer(v, v) for v in train) / len(train)
        c_test = sum(np.outer(v, v) for v in test) / len(test)
        w, u = np.linalg.eigh(c_train)
        w = (1 - 1e-3) * w + 1e-3 * w.mean()
        values.append(np.trace(u @ np.diag(1 / w) @ u.T @ c_test))
    return sum(values) / 10


def graced(teacher, problem_id, vectors, *, dimensions, seed=0):
    wanted = ProjectedGradients(dimensions=dimensions)
    rows = candidates(problem_id, teacher=teacher, passes={wanted: {"vector": arrays(vectors)}})
    return Grace(seed=seed, dimensions=dimensions)(rows)


@pytest.mark.parametrize("dimensions", [4, 60])  # fewer, and more, than there are rows
def test_grace_equals_its_formula_and_is_one_value_a_teacher(dimensions):
    rng = np.random.default_rng(0)
    problem_id = [str(i // 2) for i in range(50)]  # 25 problems
    teacher = ["a" if rng.random() < 0.5 else "b" for _ in problem_id]
    vectors = rng.normal(size=(50, dimensions)).astype(np.float32)
    score_N = graced(teacher, problem_id, vectors, dimensions=dimensions, seed=7)
    for name in "ab":
        his = [i for i in range(50) if teacher[i] == name]
        expected = grace_by_the_formula(vectors[his].astype(float), [problem_id[i] for i in his], seed=7)
        np.testing.assert_allclose(score_N[his], -expected, rtol=1e-8)
    other = graced(teacher, problem_id, vectors, dimensions=dimensions, seed=8)
    assert np.abs(other / score_N - 1).max() > 1e-3


def test_grace_prefers_gradients_that_share_directions():
    rng = np.random.default_rng(3)
    problem_id = [str(i) for i in range(20)] * 2
    teacher = ["aligned"] * 20 + ["scattered"] * 20
    direction = rng.normal(size=8)
    aligned = direction + 0.1 * rng.normal(size=(20, 8))
    scattered = rng.normal(size=(20, 8)) * np.linalg.norm(direction) / math.sqrt(8)
    score_N = graced(teacher, problem_id, [*aligned, *scattered], dimensions=8)
    assert score_N[0] > score_N[-1]
    # raw in testing, unit in training: twice the gradient is four times the value
    doubled = graced(teacher, problem_id, [*(2 * aligned), *scattered], dimensions=8)
    np.testing.assert_allclose(doubled[:20], 4 * score_N[:20], rtol=1e-10)
    np.testing.assert_allclose(doubled[20:], score_N[20:], rtol=1e-10)


def test_grace_holds_the_vectors_of_one_teacher_at_a_time():
    teachers, rows, k = 40, 8000, 64
    vectors = np.random.default_rng(0).normal(size=(rows, k)).astype(np.float32)
    teacher, problem_id = [str(i % teachers) for i in range(rows)], [str(i % 37) for i in range(rows)]
    columns = {"teacher": teacher, "problem_id": problem_id}
    wanted = ProjectedGradients(dimensions=k)
    all_rows = candidates(**columns, passes={wanted: {"vector": arrays(vectors)}})
    tracemalloc.start()
    Grace(seed=0, dimensions=k)(all_rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < vectors.nbytes


def test_teachers_with_too_few_problems_and_rows_without_teacher_have_no_value():
    vectors = np.random.default_rng(0).normal(size=(7, 3))
    vectors[6] = math.nan
    problem_id = ["0", "0", "0", "1", "2", "1", "2"]
    teacher = ["one", "one", "two", "two", "two", None, "two"]
    score_N = graced(teacher, problem_id, vectors, dimensions=3)
    assert np.isnan(score_N).tolist() == [True, True, False, False, False, True, False]
    expected = grace_by_the_formula(vectors[2:5], ["0", "1", "2"], seed=0)
    np.testing.assert_allclose(score_N[[2, 3, 4, 6]], -expected)
    with pytest.raises(ValueError, match=r"none of 1 teachers has gradients of two problems; give it a larger pool"):
        graced(["one", "one"], ["0", "0"], vectors[:2], dimensions=3)
    with pytest.raises(ValueError, match=r"no candidate names one; fill in `teacher`"):
        graced([None, None], ["0", "1"], vectors[:2], dimensions=3)


# ---- settings


@pytest.mark.parametrize(
    ("score", "wrong"),
    [
        (LarkExact, {"parameters": "head"}),
        (LarkExact, {"parameters": "last:0"}),
        (LarkExact, {"average": "tokens"}),
        (LarkHead, {"average": "mean"}),
        (LarkHead, {"sketch": (0, 4)}),
        (LarkHead, {"sketch": (4,)}),
        (LossDrop, {"eta": 0.0}),
        (LossDrop, {"parameters": "x"}),
        (GradNorm, {"dimensions": 0}),
        (GradNorm, {"parameters": "x"}),
        (GradMatch, {"warmup_share": 0.0}),
        (GradMatch, {"warmup_share": 1.5}),
        (GradMatch, {"epochs": 0}),
        (GradMatch, {"validation_problems": 1}),
        (GradMatch, {"dimensions": 0}),
        (Grace, {"dimensions": 0, "seed": 0}),
        (Grace, {"parameters": "x", "seed": 0}),
    ],
)
def test_a_score_says_which_setting_is_wrong(score, wrong):
    with pytest.raises(ValueError, match=rf"^selector\.score\.{next(iter(wrong))}=.*; set it "):
        score(**wrong)

"""Scores over the student's gradients (lark.scoring.passes): one number per candidate, higher = take it first, NaN =
never.

Notation: L_k mean surprisal of candidate k (nats/token), grad L_k its gradient over the parameters that the pass names,
sums over the valid candidates of one problem.

Shapes: N candidates, K valid candidates of one problem, k dimensions of a projection.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import unit_hash
from lark.scoring.passes import (
    GradientMatches,
    Gradients,
    HeadGradients,
    LossDrops,
    Pass,
    ProjectedGradients,
    Statistics,
    check_average,
    check_parameters,
)
from lark.selection.candidates import Candidates

SPLITS = 10
SMOOTHING = 1e-3  # share of the mean in each eigenvalue


@dataclass(frozen=True, kw_only=True)
class LarkExact:
    """LARK's gain with gradients in place of the proxy: g_k = (2 (G w)_k - R L_k) / sum L at w = 1, R = w'Gw / sum L.

    G is the Gram matrix of grad L_k over the problem's candidates, so g_k is the derivative of ||grad L(w)||^2 / L(w)
    by w_k for the mixture loss L(w) = sum w_k L_k, which LARK (arXiv 2605.30651) approximates by a diagonal G of Brier
    scores (ours). sum_k g_k = R. average=token: the gain of the loss that sft.average of that name trains.
    A filter's survivors have the Gram matrix of the survivors. Needs L_k > 0; other rows get NaN.
    parameters: trained | all | last:<n>.
    """

    parameters: str = "trained"
    average: str = "trajectory"

    def __post_init__(self) -> None:
        check_parameters(self.parameters, "selector.score.parameters")
        check_average(self.average, "selector.score.average")

    @property
    def needs(self) -> tuple[Pass, ...]:
        return Statistics(), Gradients(parameters=self.parameters)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return _compute_gram_gain(candidates, candidates.of(self.needs[1]), self.average)


@dataclass(frozen=True, kw_only=True)
class LarkHead:
    """`LarkExact` over the LM head alone, whose gradient (1/T) sum_t (pi_t - onehot(y_t)) h_t' needs no backward pass
    (ours).

    sketch: null takes it exactly; [rows, columns] estimates its inner products from a random projection of both sides,
    seeded by `projection_seed`.
    """

    sketch: tuple[int, int] | None = None
    projection_seed: int = 0
    average: str = "trajectory"

    def __post_init__(self) -> None:
        check_average(self.average, "selector.score.average")
        if self.sketch is not None:
            object.__setattr__(self, "sketch", tuple(self.sketch))  # a list, from YAML
            if len(self.sketch) != 2 or min(self.sketch) < 1:
                raise LarkError(
                    f"selector.score.sketch={list(self.sketch)} is no sketch; set it to null or [rows, columns], each "
                    "at least 1"
                )

    @property
    def needs(self) -> tuple[Pass, ...]:
        return Statistics(), HeadGradients(sketch=self.sketch, projection_seed=self.projection_seed)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return _compute_gram_gain(candidates, candidates.of(self.needs[1]), self.average)


def compute_squared_norms(candidates: Candidates, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the diagonals of the Gram matrices: each candidate's squared gradient norm, [N]."""
    pairs = zip(candidates.row_N.tolist(), columns["gram"], columns["gram_rows"], strict=True)
    return np.array([gram_K[np.flatnonzero(rows_K == row)[0]] for row, gram_K, rows_K in pairs])


def _compute_gram_gain(candidates: Candidates, columns: Mapping[str, np.ndarray], average: str) -> np.ndarray:
    """g_k = R + a_k (g~_k - R) with g~_k = (2 (G a)_k - K R L_k) / a'L, K R = a'Ga / a'L (docs/theory.md, 1.7); a_k is
    1, or T_k over the problem's mean T.
    """
    loss_N, gain_N = candidates["loss"], np.full(len(candidates), np.nan)
    for rows in candidates.groups.split():
        gram_KK = _select_gram(candidates.row_N[rows], columns["gram"][rows], columns["gram_rows"][rows])
        valid_K = (loss_N[rows] > 0) & np.isfinite(loss_N[rows]) & np.isfinite(gram_KK.diagonal())
        rows, gram_KK = rows[valid_K], gram_KK[valid_K][:, valid_K]
        if len(rows):
            tokens_K = candidates["num_tokens"][rows]
            share_K = tokens_K / tokens_K.mean() if average == "token" else np.ones(len(rows))
            product_K, total = gram_KK @ share_K, share_K @ loss_N[rows]
            ratio = share_K @ product_K / total
            own_K = (2 * product_K - ratio * loss_N[rows]) / total
            gain_N[rows] = share_K * own_K + (1 - share_K) * ratio / len(rows)
    return gain_N


def _select_gram(row_K: np.ndarray, gram: np.ndarray, gram_rows: np.ndarray) -> np.ndarray:
    """Return the Gram matrix [K, K] of the pool rows `row_K`, whose columns may hold further rows of the problem."""
    assert all(np.array_equal(rows, gram_rows[0]) for rows in gram_rows)
    place = {row: i for i, row in enumerate(gram_rows[0].tolist())}
    return np.stack(list(gram))[:, [place[row] for row in row_K.tolist()]]


@dataclass(frozen=True, kw_only=True)
class LossDrop:
    """(L(theta) - L(theta - eta grad L)) / (eta L): the relative drop of a trajectory's loss by one small SGD step on
    it, per unit of eta (ours). It tends to LARK's learnability factor ||grad L||^2 / L as eta goes to 0.

    parameters: trained | all | last:<n>, those that move. Needs L > 0; other rows get NaN.
    """

    parameters: str = "trained"
    eta: float = 1e-3

    def __post_init__(self) -> None:
        check_parameters(self.parameters, "selector.score.parameters")
        if not self.eta > 0:
            raise LarkError(f"selector.score.eta={self.eta} is no step; set it above 0, for example 1e-3")

    @property
    def needs(self) -> tuple[Pass, ...]:
        return (LossDrops(parameters=self.parameters, eta=self.eta),)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        columns = candidates.of(self.needs[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(columns["loss_before"] > 0, columns["drop"] / columns["loss_before"], np.nan)


@dataclass(frozen=True, kw_only=True)
class GradNorm:
    """-||grad L||: the smallest gradient first (arXiv 2601.14249, B.4).

    dimensions: null takes the norm itself, from the pass that `LarkExact` shares, which holds the float32 gradients of
    a problem's candidates together (4 K d bytes for d parameters). Where that is too much memory, set a number, such as
    512: the norm of a random projection, seeded by `projection_seed`, whose pass holds a few gradients at a time.
    parameters: trained | all | last:<n>.
    """

    parameters: str = "trained"
    dimensions: int | None = None
    projection_seed: int = 0

    def __post_init__(self) -> None:
        check_parameters(self.parameters, "selector.score.parameters")
        _check_dimensions(self.dimensions)

    @property
    def needs(self) -> tuple[Pass, ...]:
        if self.dimensions is None:
            return (Gradients(parameters=self.parameters),)
        return (_plan_projection(self.parameters, self.dimensions, self.projection_seed),)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        columns = candidates.of(self.needs[0])
        if self.dimensions is None:
            return -np.sqrt(columns["squared_norm"])
        return -_compute_norms(columns["vector"])


@dataclass(frozen=True, kw_only=True)
class GradMatch:
    """LESS (arXiv 2402.04333): how well a candidate's gradient, as Adam would follow it, points the way of correct
    trajectories of other problems, at the checkpoints of a warm-up arm. The fields are those of
    `lark.scoring.passes.GradientMatches`. The warm-up arm trains what the arms train; LESS takes LoRA.

    dimensions: null compares the gradients themselves, all of a problem's candidates in memory together. For a large
    student set a number, which is what bounds memory; LESS projects to 8,192 dimensions.
    NaN where there is no validation example of another problem.
    """

    warmup_share: float = 0.05
    epochs: int = 4
    validation_problems: int = 32
    subtask: str | None = None
    dimensions: int | None = None
    projection_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.warmup_share <= 1:
            raise LarkError(
                f"selector.score.warmup_share={self.warmup_share} is no share of the candidates; set it above 0 and to "
                "at most 1"
            )
        if self.epochs < 1:
            raise LarkError(f"selector.score.epochs={self.epochs} warms nothing up; set it to at least 1")
        if self.validation_problems < 2:
            raise LarkError(
                f"selector.score.validation_problems={self.validation_problems} leaves the candidates of that problem "
                "nothing to be compared with; set it to at least 2"
            )
        _check_dimensions(self.dimensions)

    @property
    def needs(self) -> tuple[Pass, ...]:
        return (GradientMatches(**vars(self)),)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        return candidates.of(self.needs[0])["match"]


@dataclass(frozen=True, kw_only=True)
class Grace:
    """Minus the GRACE value of the candidate's teacher (arXiv 2511.02833 and its released code): all candidates of the
    teacher whose gradients vary least outside the directions that they share come first.

    Over SPLITS splits of the teacher's problems, a tenth of them (at least one) for testing: the mean of
    tr(C_train^-1 C_test), C = G'G / n over projected gradients, each of unit norm in training and as it is in testing,
    C_train's eigenvalues w smoothed to (1 - 1e-3) w + 1e-3 mean(w). Splits are drawn by hash of (seed, split, problem),
    so that teachers who solved the same problems are tested on the same. The absolute value depends on the gradients'
    scale; only differences between teachers mean something. Fewer than two problems: no value (NaN).
    dimensions, projection_seed: of the projection. parameters: trained | all | last:<n>.
    Memory: a few float64 copies of one teacher's vectors.
    Raises LarkError where no candidate has a teacher, or no teacher has candidates of two problems.
    """

    seed: int
    dimensions: int = 512
    parameters: str = "trained"
    projection_seed: int = 0

    def __post_init__(self) -> None:
        check_parameters(self.parameters, "selector.score.parameters")
        _check_dimensions(self.dimensions)

    @property
    def needs(self) -> tuple[Pass, ...]:
        return (_plan_projection(self.parameters, self.dimensions, self.projection_seed),)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        vectors = candidates.of(self.needs[0])["vector"]
        norm_N = _compute_norms(vectors)
        has_direction_N = np.isfinite(norm_N) & (norm_N > 0)
        teacher_N, problem_N = candidates["teacher"], candidates["problem_id"].astype(str)
        teachers = sorted({teacher for teacher in teacher_N if teacher is not None})
        if not teachers:
            raise LarkError("selector grace chooses between teachers, but no candidate names one; fill in `teacher`")
        score_N = np.full(len(candidates), np.nan)
        for teacher in teachers:
            his_N = teacher_N == teacher
            rows = his_N & has_direction_N
            score_N[his_N] = -compute_grace(_stack(vectors[rows], self.dimensions), problem_N[rows], seed=self.seed)
        if np.isnan(score_N).all():
            raise LarkError(
                f"selector grace splits each teacher's problems, but none of {len(teachers)} teachers has gradients of "
                "two problems; give it a larger pool, or raise task.limit"
            )
        return score_N


def compute_grace(vector_Nk: np.ndarray, problem_N: np.ndarray, *, seed: int) -> float:
    """Compute the GRACE value of one teacher's projected gradients, none of them zero; lower is better, NaN with fewer
    than two problems.
    """
    problems, problem_index_N = np.unique(problem_N, return_inverse=True)
    if len(problems) < 2:
        return np.nan
    unit_Nk = vector_Nk / np.linalg.norm(vector_Nk, axis=1, keepdims=True)
    values = []
    for split in range(SPLITS):
        draw = unit_hash(seed, [split] * len(problems), problems, salt="grace")
        tested = np.zeros(len(problems), bool)
        tested[np.argsort(draw)[: max(1, len(problems) // 10)]] = True
        test_N = tested[problem_index_N]
        train_kk = unit_Nk[~test_N].T @ unit_Nk[~test_N] / (~test_N).sum()
        mean = np.trace(train_kk) / len(train_kk)
        smooth_kk = (1 - SMOOTHING) * train_kk + SMOOTHING * mean * np.eye(len(train_kk))
        test_Mk = vector_Nk[test_N]
        values.append((test_Mk.T * np.linalg.solve(smooth_kk, test_Mk.T)).sum() / len(test_Mk))
    return float(np.mean(values))


def _plan_projection(parameters: str, dimensions: int, seed: int) -> ProjectedGradients:
    return ProjectedGradients(parameters=parameters, dimensions=dimensions, projection_seed=seed)


def _compute_norms(vectors: np.ndarray) -> np.ndarray:
    """Return the norm of each row's array, float64 [N]."""
    return np.fromiter((np.linalg.norm(vector_k.astype(np.float64)) for vector_k in vectors), np.float64, len(vectors))


def _stack(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """Stack an array a row to float64 [N, k]."""
    vector_Nk = np.empty((len(vectors), dimensions))
    for i, vector_k in enumerate(vectors):
        vector_Nk[i] = vector_k
    return vector_Nk


def _check_dimensions(dimensions: int | None) -> None:
    if dimensions is not None and dimensions < 1:
        raise LarkError(f"selector.score.dimensions={dimensions} keeps nothing; set it to at least 1")

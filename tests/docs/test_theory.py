"""docs/theory.md: every numbered statement, against the scores and policies in float64.

The docstring of a test begins with the numbers of the statements that it tests.
Shapes: K candidates of one problem, T tokens of one trajectory, V vocabulary, d parameters.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pages import text_of
from scipy.linalg import expm
from scipy.stats import spearmanr
from selection.scores.test_gradients import candidates, with_gradients
from selection.test_policies import chi2, normal, solve, water_filling

from lark.common.groups import Groups
from lark.scoring.passes import Gradients
from lark.selection.policies import KL, Chi2, make_policy
from lark.selection.policy_weights import compute_weights
from lark.selection.scores.gradients import LarkExact
from lark.selection.scores.statistics import Lark
from lark.student.token_statistics import Head, compute_token_statistics
from lark.tasks import arithmetic

seeds = st.integers(0, 2**32 - 1)
THOROUGH = settings(max_examples=200, deadline=None)


def test_every_statement_of_the_page_has_a_test_and_no_other():
    stated = re.findall(r"^\*\*(\d\.\d)\*\*", text_of("docs/theory.md"), re.MULTILINE)
    assert stated == sorted(set(stated)) and len(stated) > 20
    docs = [f.__doc__ or "" for name, f in globals().items() if name.startswith("test_")]
    tested = {number for doc in docs for number in re.findall(r"\d\.\d", doc.partition(": ")[0])}
    assert tested == set(stated)


# ---- 1: from gradient flow to g


def rate(gram_KK, loss_K, w_K):
    """R(w) = ||grad L(w)||^2 / L(w)."""
    return w_K @ gram_KK @ w_K / (w_K @ loss_K)


@dataclass
class Problem:
    """A random problem: gradients that may be few, alike or far apart in size; losses; a proxy of the squared norms."""

    vector_Kd: np.ndarray
    loss_K: np.ndarray
    brier_K: np.ndarray

    @classmethod
    def drawn(cls, seed, *, spread=0.7, common=0.0, d=None):
        """Squared norms are the proxy times a log-normal factor of deviation `spread`; all share a direction of size
        `common`."""
        rng = np.random.default_rng(seed)
        K = int(rng.integers(2, 8))
        direction_Kd = rng.normal(size=(K, d or int(rng.integers(2, 60)))) + common * 3
        brier_K = rng.uniform(0.05, 1.0, K)
        norm_K = np.sqrt(brier_K * np.exp(spread * rng.normal(size=K)) * 10.0 ** rng.integers(-3, 4))
        unit_Kd = direction_Kd / np.linalg.norm(direction_Kd, axis=1, keepdims=True)
        return cls(norm_K[:, None] * unit_Kd, rng.uniform(0.05, 3.0, K), brier_K)

    @property
    def gram(self):
        return self.vector_Kd @ self.vector_Kd.T

    def gains(self):
        """g of lark_exact and of lark."""
        rows = with_gradients(["p"] * len(self.loss_K), self.vector_Kd, self.loss_K, brier=self.brier_K)
        return LarkExact()(rows), Lark()(rows)


def test_rho_is_the_rate_of_gradient_flow():
    """1.1: on a quadratic loss, whose flow is a matrix exponential."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    hessian, start = root @ root.T + 0.1 * np.eye(4), rng.normal(size=4)
    least = 2 * np.linalg.eigvalsh(hessian)[0]  # rho is never below it

    def loss(t):
        theta = expm(-t * hessian) @ start
        return theta @ hessian @ theta / 2

    for t in (0.0, 0.1, 1.0, 3.0):
        theta = expm(-t * hessian) @ start
        rho = np.sum((hessian @ theta) ** 2) / loss(t)
        slope = (np.log(loss(t + 1e-5)) - np.log(loss(t - 1e-5))) / 2e-5
        assert slope == pytest.approx(-rho, rel=1e-6)
        assert rho >= least and loss(t) <= loss(0) * np.exp(-least * t)


@pytest.mark.parametrize("eta", [1e-3, 0.1, 1.0])
def test_one_step_falls_by_rho_up_to_the_curvature(eta):
    """1.2: on a softmax regression, whose curvature is at most half the largest eigenvalue of the inputs' moments."""
    generator = torch.Generator().manual_seed(1)
    x_Td = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    y_T = torch.randint(0, 7, (12,), generator=generator)
    weight_Vd = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    before = F.cross_entropy(x_Td @ weight_Vd.T, y_T)
    (gradient_Vd,) = torch.autograd.grad(before, weight_Vd)
    after = F.cross_entropy(x_Td @ (weight_Vd - eta * gradient_Vd).T, y_T)
    beta = torch.linalg.eigvalsh(x_Td.T @ x_Td / 12)[-1] / 2
    rho = gradient_Vd.square().sum() / before
    relative = (((before - after) / (eta * before)) / rho - 1).item()
    assert -1e-9 >= relative >= -eta * beta.item() / 2  # convex: never more than rho


@given(seeds, st.floats(0, 1), st.sampled_from([1.0, 0.2, 7.0]))
@settings(deadline=None)
def test_g_is_the_gradient_of_the_mixtures_rate(seed, common, scale):
    """1.3, 1.4: at any multiple of w = 1; its sum is the mixture's rate."""
    p = Problem.drawn(seed, common=common)
    gram_KK, loss_K = torch.from_numpy(p.gram), torch.from_numpy(p.loss_K)
    w_K = torch.full_like(loss_K, scale, requires_grad=True)
    (expected_K,) = torch.autograd.grad(w_K @ gram_KK @ w_K / (w_K @ loss_K), w_K)
    g_K, _ = p.gains()
    size = np.abs(g_K).max()
    np.testing.assert_allclose(g_K, expected_K.numpy(), rtol=0, atol=1e-12 * size * len(g_K))
    assert g_K.sum() == pytest.approx(rate(p.gram, p.loss_K, np.ones(len(g_K))), rel=1e-9, abs=1e-12 * size)


@given(seeds, st.floats(0, 1), st.floats(0.1, 5))
@THOROUGH
def test_the_expected_score_is_a_lower_bound_of_the_mixtures_rate(seed, common, concentration):
    """1.5, 1.6: with what is missing to equality, and the best single candidate as the upper bound."""
    p = Problem.drawn(seed, common=common)
    K = len(p.loss_K)
    q_K, u_K = np.random.default_rng(seed).dirichlet(np.full(K, concentration)), np.full(K, 1 / K)
    g_K, _ = p.gains()
    log_slope_d = (q_K @ p.vector_Kd) / (q_K @ p.loss_K) - (u_K @ p.vector_Kd) / (u_K @ p.loss_K)
    missing = q_K @ p.loss_K * np.sum(log_slope_d**2)
    rho_K = p.gram.diagonal() / p.loss_K
    assert rate(p.gram, p.loss_K, q_K) == pytest.approx(q_K @ g_K + missing, rel=1e-9)
    assert u_K @ g_K == pytest.approx(rate(p.gram, p.loss_K, u_K), rel=1e-9)
    assert rate(p.gram, p.loss_K, q_K) <= q_K @ rho_K * (1 + 1e-12) <= rho_K.max() * (1 + 1e-9)


def by_token_average(gram_KK, loss_K, tokens_K):
    """R of the loss averaged over tokens as a function of the weights, by autograd: R and dR/dw at w = 1/K."""
    gram_KK, loss_K, tokens_K = (torch.as_tensor(x, dtype=torch.float64) for x in (gram_KK, loss_K, tokens_K))
    w_K = torch.full_like(loss_K, 1 / len(loss_K), requires_grad=True)
    u_K = w_K * tokens_K / (w_K @ tokens_K)
    R = u_K @ gram_KK @ u_K / (u_K @ loss_K)
    (slope_K,) = torch.autograd.grad(R, w_K)
    return R.item(), slope_K.numpy()


@given(seeds, st.floats(0, 1))
@settings(deadline=None)
def test_averaged_over_tokens_g_is_the_rate_and_its_slope(seed, common):
    """1.7: against autograd; with equal lengths it is 1.3."""
    p = Problem.drawn(seed, common=common)
    tokens_K = np.random.default_rng(seed).integers(1, 500, len(p.loss_K))
    rows = with_gradients(["p"] * len(p.loss_K), p.vector_Kd, p.loss_K, brier=p.brier_K, num_tokens=tokens_K)
    g_K = LarkExact(average="token")(rows)
    R, slope_K = by_token_average(p.gram, p.loss_K, tokens_K)
    np.testing.assert_allclose(g_K, R + slope_K, rtol=1e-9, atol=1e-9 * np.abs(slope_K).max())
    assert g_K.sum() == pytest.approx(len(g_K) * R, rel=1e-9)
    alike = with_gradients(["p"] * len(p.loss_K), p.vector_Kd, p.loss_K, num_tokens=[7] * len(p.loss_K))
    np.testing.assert_allclose(
        LarkExact(average="token")(alike), p.gains()[0], rtol=1e-9, atol=1e-12 * np.abs(g_K).max()
    )


# ---- 2: the proxy


def random_logits(T=9, V=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 2 * torch.randn(T, V, generator=generator, dtype=torch.float64)
    return logits_TV.requires_grad_(), torch.randint(0, V, (T,), generator=generator)


def statistics_of(logits_TV, y_T):
    """The probe's, whose last map is here the identity."""
    return compute_token_statistics(logits_TV.detach(), y_T, Head(weight_VD=torch.eye(logits_TV.shape[1]).double()))


def test_brier_is_the_squared_gradient_by_the_logits():
    """2.1: against autograd."""
    logits_TV, y_T = random_logits()
    (gradient_TV,) = torch.autograd.grad(F.cross_entropy(logits_TV, y_T, reduction="sum"), logits_TV)
    p_TV = logits_TV.softmax(1)
    expected_T = 1 - 2 * p_TV[range(9), y_T] + p_TV.square().sum(1)
    torch.testing.assert_close(gradient_TV.square().sum(1), expected_T.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(statistics_of(logits_TV, y_T).brier_N.double(), expected_T.detach(), rtol=1e-5, atol=0)


@given(seeds, st.sampled_from([1.0, 0.03, 40.0]))
@settings(deadline=None)
def test_orthogonal_gradients_of_one_kappa_give_larks_g_times_kappa(seed, kappa):
    """2.2: exact."""
    p = Problem.drawn(seed)
    p.vector_Kd = np.diag(np.sqrt(kappa * p.brier_K))
    exact_K, proxy_K = p.gains()
    np.testing.assert_allclose(exact_K, kappa * proxy_K, rtol=1e-10, atol=1e-12 * kappa * np.abs(proxy_K).max())


def test_among_logits_the_mean_loss_has_brier_over_length_and_the_summed_loss_has_rho():
    """2.3: against autograd; `lark_length` is lark_exact where all logits are parameters of their own."""
    vectors, loss, brier, tokens = [], [], [], [3, 9, 17]
    for T in tokens:
        logits_TV, y_T = random_logits(T=T, seed=T)
        statistics = statistics_of(logits_TV, y_T)
        loss.append(statistics.surprisal_N.double().mean().item())
        brier.append(statistics.brier_N.double().mean().item())
        mean, total = F.cross_entropy(logits_TV, y_T), F.cross_entropy(logits_TV, y_T, reduction="sum")
        (of_mean,) = torch.autograd.grad(mean, logits_TV, retain_graph=True)
        (of_sum,) = torch.autograd.grad(total, logits_TV)
        assert of_mean.square().sum().item() == pytest.approx(brier[-1] / T, rel=1e-5)
        assert (of_sum.square().sum() / total).item() == pytest.approx(brier[-1] / loss[-1], rel=1e-5)
        vectors.append(of_mean.numpy().ravel())
    apart_Kd = np.zeros((3, sum(map(len, vectors))))
    for k, vector in enumerate(vectors):
        apart_Kd[k, sum(map(len, vectors[:k])) :][: len(vector)] = vector
    exact_K = LarkExact()(with_gradients(["p"] * 3, apart_Kd, loss))
    by_length_K = Lark(length_exponent=1.0)(candidates(["p"] * 3, loss=loss, brier=brier, num_tokens=tokens))
    np.testing.assert_allclose(exact_K, by_length_K, rtol=1e-4)


@given(seeds, st.sampled_from([1.0, 0.03, 40.0]))
@settings(deadline=None)
def test_averaged_over_tokens_larks_formula_is_the_gain_per_token(seed, kappa):
    """2.7: times the trajectory's share of tokens."""
    p = Problem.drawn(seed)
    tokens_K = np.random.default_rng(seed).integers(1, 500, len(p.loss_K))
    gram_KK = np.diag(kappa * p.brier_K / tokens_K)
    R, slope_K = by_token_average(gram_KK, p.loss_K, tokens_K)
    total = tokens_K @ p.loss_K
    per_token_K = kappa / total * (2 * p.brier_K - tokens_K @ p.brier_K / total * p.loss_K)
    np.testing.assert_allclose(slope_K, tokens_K / tokens_K.mean() * (per_token_K - R), rtol=1e-9, atol=1e-9 * abs(R))


def of_tokens(token_Td):
    """Mean squared norm of the tokens' gradients, and c, the mean inner product of two over it."""
    T, square = len(token_Td), np.mean(np.sum(token_Td**2, axis=1))
    gram_TT = token_Td @ token_Td.T
    return square, (gram_TT.sum() - gram_TT.trace()) / (T * (T - 1)) / square


@given(seeds, st.integers(2, 40), st.floats(-1, 1))
@settings(deadline=None)
def test_a_mean_loss_divides_by_length_but_for_the_tokens_correlation(seed, T, common):
    """2.4: an identity, with c between -1/(T - 1) and 1."""
    rng = np.random.default_rng(seed)
    token_Td = rng.normal(size=(T, 5)) * rng.uniform(0.1, 3, (T, 1)) + common
    square, c = of_tokens(token_Td)
    assert np.sum(token_Td.mean(0) ** 2) == pytest.approx(square / T * (1 + (T - 1) * c), rel=1e-9, abs=1e-12)
    assert -1 / (T - 1) - 1e-12 <= c <= 1
    np.testing.assert_allclose(of_tokens(np.tile(token_Td[:1], (T, 1)))[1], 1)


@pytest.mark.parametrize("T", [2.0, 50.0, 3000.0])
@pytest.mark.parametrize("c", [0.0, 0.002, 0.3, 1.0])
def test_the_length_exponent_follows_from_the_correlation(T, c):
    """2.5: by central differences."""

    def log_kappa(log_T):
        return np.log((1 + (np.exp(log_T) - 1) * c) / np.exp(log_T))

    def slope(T):
        return (log_kappa(np.log(T) + 1e-5) - log_kappa(np.log(T) - 1e-5)) / 2e-5

    assert slope(T) == pytest.approx(-(1 - c) / (1 - c + c * T), rel=1e-6, abs=1e-9)
    if 0 < c < 1:  # the exponent is 1/2 at T = (1 - c) / c
        assert slope((1 - c) / c) == pytest.approx(-0.5)


@pytest.mark.parametrize("ends", [False, True])
def test_tokens_gradients_are_uncorrelated_on_the_students_own_text(ends):
    """2.6: over all texts of at most four tokens of three kinds, one of which ends them if `ends`."""
    generator = torch.Generator().manual_seed(2)
    embedding_VD, output_DV = (torch.randn(*shape, generator=generator).double() for shape in ((3, 4), (4, 3)))
    weights = [w.requires_grad_() for w in (embedding_VD, output_DV)]

    def logits(prefix):
        state_D = torch.full((4,), 0.3, dtype=torch.float64)
        for token in prefix:
            state_D = torch.tanh(0.7 * state_D + embedding_VD[token])
        return state_D @ output_DV

    squares: dict[str, float] = {"student": 0.0, "other": 0.0}
    crosses = squares.copy()
    texts = {y[: y.index(0) + 1] if ends and 0 in y else y for y in itertools.product(range(3), repeat=4)}
    mass = 0.0
    for y in texts:
        student, other, token_gradients = 1.0, 1.0, []
        for t, token in enumerate(y):
            log_p_V = logits(y[:t]).log_softmax(0)
            gradients = torch.autograd.grad(-log_p_V[token], weights, allow_unused=True, materialize_grads=True)
            token_gradients.append(torch.cat([g.flatten() for g in gradients]))
            student *= log_p_V[token].exp().item()
            other *= [0.2, 0.1, 0.7][token]
        gram_TT = torch.stack(token_gradients) @ torch.stack(token_gradients).T
        mass += student
        for law, probability in (("student", student), ("other", other)):
            squares[law] += probability * gram_TT.trace().item()
            crosses[law] += probability * (gram_TT.sum() - gram_TT.trace()).item()
    assert mass == pytest.approx(1, abs=1e-12)
    assert abs(crosses["student"]) < 1e-12 * squares["student"]
    assert abs(crosses["other"]) > 0.1 * squares["other"]


# ---- 3: the proxy's error


def residuals(gram_KK, brier_K, kappa):
    return gram_KK.sum(1) - kappa * brier_K


def differences(r_K, loss_K):
    """(2 r_k - l_k sum r) / sum L."""
    return (2 * r_K - loss_K / loss_K.sum() * r_K.sum()) / loss_K.sum()


def bounds(r_K, loss_K):
    """beta_k = ((2 - l_k) |r_k| + l_k sum over the others of |r_i|) / sum L."""
    share_K, size_K = loss_K / loss_K.sum(), np.abs(r_K)
    return ((2 - share_K) * size_K + share_K * (size_K.sum() - size_K)) / loss_K.sum()


def middle(gram_KK, brier_K):
    """The middle of the range of ||v_k||^2 / Brier_k."""
    kappa_K = gram_KK.diagonal() / brier_K
    return (kappa_K.max() + kappa_K.min()) / 2


def sure_pairs(g_K, beta_K, kappa):
    """True at [j, k] where g_j > g_k is sure for the exact scores."""
    return kappa * (g_K[:, None] - g_K[None, :]) > beta_K[:, None] + beta_K[None, :]


def check_order(exact_K, proxy_K, beta_K, kappa, slack=0.0):
    """Statements 3.4 to 3.6 on one problem; returns the share of pairs that are sure. `slack` is rounding's."""
    K, sure_KK = len(exact_K), sure_pairs(proxy_K, beta_K + slack, kappa)
    assert (exact_K[:, None] > exact_K[None, :])[sure_KK].all()
    order = np.argsort(-proxy_K)
    for B in range(1, K):
        if sure_KK[np.ix_(order[:B], order[B:])].all():
            assert set(order[:B]) == set(np.argsort(-exact_K)[:B])
    rank_K = np.argsort(order)
    apart = sum(abs(rank_K[j] - rank_K[k]) for j, k in unsure(sure_KK))
    rho: float = spearmanr(exact_K, proxy_K).statistic  # type: ignore[attr-defined]
    assert rho >= 1 - 12 * apart / (K * (K**2 - 1)) - 1e-9
    return 1 - len(unsure(sure_KK)) / (K * (K - 1) / 2)


def unsure(sure_KK):
    return [(j, k) for j, k in itertools.combinations(range(len(sure_KK)), 2) if not (sure_KK | sure_KK.T)[j, k]]


@given(seeds, st.floats(0, 1.5), st.floats(0, 1), st.floats(0.05, 20))
@THOROUGH
def test_the_proxys_error_and_its_bound(seed, spread, common, factor):
    """3.1, 3.2: for any kappa."""
    p = Problem.drawn(seed, spread=spread, common=common)
    kappa = factor * middle(p.gram, p.brier_K)
    exact_K, proxy_K = p.gains()
    r_K = residuals(p.gram, p.brier_K, kappa)
    error_K = exact_K - kappa * proxy_K
    scale = np.abs(exact_K).max() + kappa * np.abs(proxy_K).max()
    np.testing.assert_allclose(error_K, differences(r_K, p.loss_K), rtol=0, atol=1e-11 * scale)
    assert (np.abs(error_K) <= bounds(r_K, p.loss_K) + 1e-11 * scale).all()


def spread_bounds(p, kappa):
    """beta_k from the spread of kappa and the largest cosine alone."""
    norm_K = np.linalg.norm(p.vector_Kd, axis=1)
    cosine_KK = p.gram / np.outer(norm_K, norm_K) - np.eye(len(norm_K))
    spread = np.abs(norm_K**2 / p.brier_K / kappa - 1).max()
    parts = spread * kappa * p.brier_K + np.abs(cosine_KK).max() * norm_K * (norm_K.sum() - norm_K)
    return bounds(parts, p.loss_K)


@given(seeds, st.floats(0, 0.5), st.floats(0, 1))
@THOROUGH
def test_the_bound_through_spread_and_overlap_and_what_it_says_of_the_order(seed, spread, common):
    """3.3, 3.4, 3.5, 3.6: many dimensions, so that overlaps come from `common` alone."""
    p = Problem.drawn(seed, spread=spread, common=common / 30, d=3000)
    kappa = middle(p.gram, p.brier_K)
    exact_K, proxy_K = p.gains()
    beta_K = spread_bounds(p, kappa)
    sharper_K = bounds(residuals(p.gram, p.brier_K, kappa), p.loss_K)
    slack = 1e-11 * kappa * np.abs(proxy_K).max()
    assert (np.abs(exact_K - kappa * proxy_K) <= sharper_K + slack).all() and (sharper_K <= beta_K + slack).all()
    sure = check_order(exact_K, proxy_K, beta_K, kappa, slack)
    assert check_order(exact_K, proxy_K, sharper_K, kappa, slack) >= sure


def test_small_spread_and_overlap_make_the_order_sure():
    """3.4, 3.5, 3.6: the bound says something: here that all pairs but one are in order, and which three are best."""
    p = Problem(np.diag(np.sqrt([0.1, 0.2, 0.3, 0.4, 0.41])), np.full(5, 0.5), np.array([0.1, 0.2, 0.3, 0.4, 0.41]))
    p.vector_Kd *= np.sqrt([1.02, 0.98, 1.0, 1.02, 0.98])[:, None]
    kappa = middle(p.gram, p.brier_K)
    exact_K, proxy_K = p.gains()
    beta_K = spread_bounds(p, kappa)
    assert unsure(sure_pairs(proxy_K, beta_K, kappa)) == [(3, 4)]
    assert exact_K[3] > exact_K[4] and proxy_K[3] < proxy_K[4]  # and that one is indeed out of order
    assert check_order(exact_K, proxy_K, beta_K, kappa) == 0.9
    assert spearmanr(exact_K, proxy_K).statistic == pytest.approx(1 - 12 / (5 * 24))  # type: ignore[attr-defined]


def test_the_bound_is_attained():
    """3.3: by one candidate whose kappa is at the upper end, while the others' are at the lower."""
    p = Problem(
        np.diag(np.sqrt([0.3 * 1.5, 0.2 * 0.5, 0.7 * 0.5])), np.array([0.5, 1.0, 2.0]), np.array([0.3, 0.2, 0.7])
    )
    exact_K, proxy_K = p.gains()
    error_K = np.abs(exact_K - proxy_K)  # middle kappa: 1
    np.testing.assert_allclose(error_K[0], spread_bounds(p, 1.0)[0], rtol=1e-12)


def test_an_overlap_in_proportion_to_the_proxy_does_no_harm():
    """3.3: equal cosines of .4 among gradients of one size; kappa + alpha takes kappa's place."""
    gram_KK = 4.0 * (0.6 * np.eye(5) + 0.4)
    p = Problem(np.linalg.cholesky(gram_KK), np.linspace(0.5, 2.0, 5), np.full(5, 0.25))
    exact_K, proxy_K = p.gains()
    np.testing.assert_allclose(exact_K, 4.0 * (1 + 0.4 * 4) / 0.25 * proxy_K, rtol=1e-12)


def test_spearman_counts_inversions_by_their_distance():
    """3.6: sum of squared rank differences = 2 * sum over inverted pairs of their distance, for all permutations."""
    for K in range(2, 7):
        for rank in itertools.permutations(range(K)):
            pairs = [(i, j) for i, j in itertools.combinations(range(K), 2) if rank[i] > rank[j]]
            squares = sum((i - r) ** 2 for i, r in enumerate(rank))
            assert squares == 2 * sum(j - i for i, j in pairs)
            expected = 1 - 12 * sum(j - i for i, j in pairs) / (K * (K**2 - 1))
            assert 1 - 6 * squares / (K * (K**2 - 1)) == pytest.approx(expected)


@given(seeds, st.floats(0, 1.5))
@settings(deadline=None)
def test_rho_is_off_by_kappa(seed, spread):
    """3.7: ratios of rho above the ratio of the extreme kappas are in order."""
    p = Problem.drawn(seed, spread=spread)
    kappa_K, rho_K = p.gram.diagonal() / p.brier_K, p.brier_K / p.loss_K
    exact_K = p.gram.diagonal() / p.loss_K
    np.testing.assert_allclose(exact_K, kappa_K * rho_K, rtol=1e-12)
    sure_KK = rho_K[:, None] / rho_K[None, :] > kappa_K.max() / kappa_K.min() * (1 + 1e-9)
    assert (exact_K[:, None] > exact_K[None, :])[sure_KK].all()


@pytest.fixture
def scored(make_data, tmp_path):
    """Three problems of the embedded task with the embedded student's statistics and gradients."""
    arithmetic.generate(tmp_path / "task", problems=4, eval_problems=1, shifted_problems=1)
    data = make_data(
        selector=LarkExact(parameters="all"),
        student={"path": "shipped:tiny"},
        task={"pool": str(tmp_path / "task" / "pool.jsonl")},
    )
    data.prepare_data()
    data.score()
    return data


def test_bounds_and_lengths_on_a_real_student(scored):
    """2.4, 3.1, 3.2, 3.4, 3.5, 3.6: its gradients over all parameters, and one trajectory's token by token."""
    rows = scored.candidates
    columns = rows.of(Gradients(parameters="all"))
    exact_N = LarkExact(parameters="all")(rows)
    for a in (0.0, 1.0):
        proxy_N, brier_N = Lark(length_exponent=a)(rows), rows["brier"] * rows["num_tokens"] ** -a
        for of_problem in rows.groups.split():
            assert len(of_problem) > 3
            gram_KK, brier_K, loss_K = (
                np.stack(columns["gram"][of_problem]),
                brier_N[of_problem],
                rows["loss"][of_problem],
            )
            exact_K, proxy_K = exact_N[of_problem], proxy_N[of_problem]
            assert columns["gram_rows"][of_problem[0]].tolist() == rows.row_N[of_problem].tolist()
            kappa = np.median(gram_KK.sum(1) / brier_K)
            r_K = residuals(gram_KK, brier_K, kappa)
            slack = 1e-9 * np.abs(exact_K).max()
            np.testing.assert_allclose(exact_K - kappa * proxy_K, differences(r_K, loss_K), rtol=0, atol=slack)
            assert (np.abs(exact_K - kappa * proxy_K) <= bounds(r_K, loss_K) + slack).all()
            check_order(exact_K, proxy_K, bounds(r_K, loss_K), kappa, slack)

    shortest = int(np.argmin(rows["num_tokens"]))
    (encoded,) = scored.trajectories.read_tokens(rows.row_N[[shortest]])
    model = scored.student.load_model(torch.float32).double().eval()
    ids, first = torch.tensor(encoded.input_ids), encoded.prompt_tokens
    loss_T = F.cross_entropy(
        model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1], ids[first:], reduction="none"
    )
    T, parameters = len(loss_T), list(model.parameters())
    token_Td = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]) for loss in loss_T]
    ).numpy()
    square, c = of_tokens(token_Td)
    assert rows["num_tokens"][shortest] == T > 5
    assert columns["squared_norm"][shortest] == pytest.approx(square / T * (1 + (T - 1) * c), rel=1e-4)


# ---- 4: the policy


score_lists = st.lists(st.integers(-300, 300).map(lambda e: e / 100), min_size=2, max_size=7)
priors = st.lists(st.floats(0.05, 5), min_size=7, max_size=7)
taus = st.sampled_from([0.01, 0.3, 2.0, 100.0])


def threshold_taus(score, prior):
    """T_k = sum_j p_j (e_j - e_k)_+: the tau above which candidate k has weight."""
    e_K = np.array(score)
    return np.maximum(e_K[None, :] - e_K[:, None], 0) @ normal(prior)


@given(score_lists, priors, taus)
@THOROUGH
def test_weights_meet_the_optimality_conditions(score, prior, tau):
    """4.1, 4.2: stationary where positive, no gain elsewhere; and who is positive."""
    prior = prior[: len(score)]
    q_K, _ = solve(Chi2(tau=tau), score, prior)
    e_K, p_K = np.array(score), normal(prior)
    slope_K = e_K - tau * (q_K - p_K) / p_K  # of the objective
    nu = slope_K[np.argmax(e_K)]
    assert q_K[np.argmax(e_K)] > 0
    accuracy = 1e-9 * (1 + tau)
    np.testing.assert_allclose(slope_K[q_K > 0], nu, atol=accuracy)
    assert (slope_K <= nu + accuracy).all()
    np.testing.assert_allclose(q_K, p_K * np.maximum(0, 1 + (e_K - nu) / tau), atol=1e-9)
    threshold_K = threshold_taus(score, prior)
    clear_K = np.abs(threshold_K - tau) > 1e-9
    assert ((q_K > 0) == (threshold_K < tau))[clear_K].all()


@given(score_lists, priors, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_the_largest_tau_that_leaves_that_many(score, prior, budget):
    """4.3: in exact arithmetic on both sides of tau_B."""
    prior, ordered = prior[: len(score)], sorted(score, reverse=True)
    assume(len(score) > budget and ordered[0] - ordered[budget] > 1e-6)
    q_K, result = solve(Chi2(budget=budget), score, prior)
    p_K, tau_b = normal(prior), result.tau_G[0]
    assert tau_b == pytest.approx(threshold_taus(score, prior)[score.index(ordered[budget])], rel=1e-9)
    np.testing.assert_allclose(q_K, p_K * np.maximum(np.array(score) - ordered[budget], 0) / tau_b, atol=1e-9)
    np.testing.assert_allclose(q_K, water_filling(score, p_K, tau_b), atol=1e-9)
    assert np.count_nonzero(solve(Chi2(tau=tau_b * (1 - 1e-9)), score, prior)[0]) <= budget
    assert np.count_nonzero(solve(Chi2(tau=tau_b * (1 + 1e-6)), score, prior)[0]) > budget
    if len(set(prior)) == 1:
        gap = np.mean(ordered[:budget]) - ordered[budget]
        assert tau_b == pytest.approx(budget / len(score) * gap) and result.gap_G[0] == pytest.approx(gap)


@given(score_lists, priors, st.floats(1e-4, 3))
@THOROUGH
def test_a_radius_has_its_tau_and_while_all_have_weight_adds_standard_deviations(score, prior, radius):
    """4.4: chi2 and the expected score fall with tau."""
    assume(np.ptp(score) > 1e-3)
    prior = prior[: len(score)]
    e_K, p_K = np.array(score), normal(prior)
    q_K, result = solve(Chi2(radius=radius), score, prior)
    best = p_K[e_K == e_K.max()].sum()
    assert chi2(q_K, p_K) == pytest.approx(min(radius, 1 / best - 1), rel=1e-6)
    mean = p_K @ e_K
    deviation = np.sqrt(p_K @ (e_K - mean) ** 2)
    if np.sqrt(radius) * (mean - e_K.min()) < deviation * (1 - 1e-9):
        assert q_K @ e_K == pytest.approx(mean + np.sqrt(radius) * deviation, abs=1e-9)
        assert result.tau_G[0] == pytest.approx(deviation / np.sqrt(radius))
    else:
        assert q_K @ e_K <= mean + np.sqrt(radius) * deviation + 1e-9
    path = [solve(Chi2(tau=tau), score, prior)[0] for tau in (0.01, 0.1, 1.0, 10.0)]
    for sharper, flatter in itertools.pairwise(path):
        assert chi2(sharper, p_K) >= chi2(flatter, p_K) - 1e-9 and sharper @ e_K >= flatter @ e_K - 1e-9


@given(seeds, st.integers(2, 12), st.booleans())
def test_few_candidates_are_far_from_the_prior(seed, K, uniform):
    """4.5: any q on a set S, with equality at the prior on S; the effective sample size."""
    rng = np.random.default_rng(seed)
    p_K = np.full(K, 1 / K) if uniform else rng.dirichlet(np.ones(K))
    B = int(rng.integers(1, K + 1))
    inside = rng.permutation(K) < B
    q_K = np.zeros(K)
    q_K[inside] = rng.dirichlet(np.ones(B))
    least = 1 / p_K[inside].sum() - 1
    assert chi2(q_K, p_K) >= least - 1e-9 * (1 + least)
    assert chi2(np.where(inside, p_K, 0) / p_K[inside].sum(), p_K) == pytest.approx(least, rel=1e-9, abs=1e-12)
    if uniform:
        assert least == pytest.approx(K / B - 1)
        assert 1 / np.sum(q_K**2) == pytest.approx(K / (1 + chi2(q_K, p_K)))


# ---- 5: stability

changes = st.lists(st.floats(-1, 1), min_size=7, max_size=7)
near = st.lists(st.integers(-6, 6), min_size=2, max_size=7)
"""Scores with ties and close seconds, where a change moves most."""


def moved(policy, score, change, prior=None):
    """||dq||_1 under a change of the scores, and the results before and after it."""
    before, after = (solve(policy, e, prior)[1] for e in (score, np.add(score, change).tolist()))
    return np.abs(after.q_N - before.q_N).sum(), before, after


@given(near, priors, changes, st.sampled_from([1e-3, 0.3, 2.0, 100.0]), st.sampled_from(["chi2", "kl"]))
@THOROUGH
def test_at_fixed_tau_weights_move_by_half_the_changes_range_over_tau(score, prior, change, tau, kind):
    """5.1: for any prior, for kl as well."""
    change = tau * np.array(change[: len(score)])
    distance, _, _ = moved(make_policy(kind=kind, tau=tau), score, change, prior[: len(score)])
    assert distance <= np.ptp(change) / (2 * tau) + 1e-9
    assert np.ptp(change) <= 2 * np.abs(change).max()


def test_the_constant_of_fixed_tau_is_attained():
    """5.1: half the mass up, half down, all with weight before and after."""
    change = np.array([0.1, 0.1, -0.1, -0.1])
    distance, _, _ = moved(Chi2(tau=1.0), [0.0, 0.1, 0.2, 0.1], change)
    assert distance == pytest.approx(0.1)  # ||de||_inf / tau
    unequal, _, _ = moved(Chi2(tau=1.0), [0.0, 0.1, 0.2], [0.1, 0.1, -0.1], [1.0, 2.0, 3.0])
    assert unequal == pytest.approx(0.1)


@given(near, priors, changes, taus)
@THOROUGH
def test_scores_that_are_a_little_off_cost_the_objective_a_square(score, prior, change, tau):
    """5.2: the objective's loss by weights from changed scores."""
    prior, change = prior[: len(score)], np.array(change[: len(score)])
    p_K = normal(prior)

    def objective(q_K):
        return q_K @ np.array(score) - tau / 2 * chi2(q_K, p_K)

    best, _ = solve(Chi2(tau=tau), score, prior)
    off, _ = solve(Chi2(tau=tau), np.add(score, change).tolist(), prior)
    regret = objective(best) - objective(off)
    assert -1e-9 * (1 + tau) <= regret <= np.ptp(change) ** 2 / (4 * tau) + 1e-9 * (1 + tau)


@pytest.mark.parametrize("policy", [Chi2(budget=2), Chi2(radius=1.0), Chi2(radius=0.25)])
def test_neither_budget_nor_radius_has_a_global_constant(policy):
    """5.3: a tiny change exchanges two candidates."""
    for size in (1e-3, 1e-6, 1e-9):
        if policy.budget:
            distance, result, _ = moved(policy, [size, 0, 0, -1], [-size, size, 0, 0])
            assert distance == 2 and result.gap_G[0] <= size
        else:
            distance, _, _ = moved(policy, [size, 0.0], [-size, size])
            assert distance == pytest.approx(2 * np.sqrt(policy.radius))


budgets = st.integers(1, 5)


@given(near, changes, st.sampled_from([0.01, 0.2, 1.0, 3.0]), budgets)
@THOROUGH
def test_by_budget_weights_move_by_twice_the_changes_range_over_the_gap(score, change, size, budget):
    """5.4: uniform prior; the larger of the gaps before and after."""
    assume(len(score) > budget)
    change = size * np.array(change[: len(score)])
    distance, before, after = moved(Chi2(budget=budget), score, change)
    gap = max(before.gap_G[0], after.gap_G[0])
    assert distance * gap <= 2 * np.ptp(change) + 1e-9 <= 4 * np.abs(change).max() + 1e-9


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_the_constant_of_a_budget_is_attained(budget):
    """5.4: all chosen candidates change places with as many others; so 8 is not needed and 3.99 is too little."""
    score = np.repeat([1.0, -1.0], budget)
    change = -score * (1 + 1e-9)
    distance, result, _ = moved(Chi2(budget=budget), score.tolist(), change)
    assert distance == pytest.approx(2)
    assert distance * result.gap_G[0] / np.abs(change).max() == pytest.approx(4)


@given(near, priors, changes, st.sampled_from([0.01, 0.2, 1.0, 3.0]), budgets)
@THOROUGH
def test_with_any_prior_it_is_tau_b_and_the_mass_of_who_is_chosen(score, prior, change, size, budget):
    """5.5: the mass of the best before and after is at most 1."""
    assume(len(score) > budget)
    prior, change = prior[: len(score)], size * np.array(change[: len(score)])
    distance, before, after = moved(Chi2(budget=budget), score, change, prior)
    mass = normal(prior)[(before.q_N > 0) | (after.q_N > 0)].sum()
    assert distance * before.tau_G[0] <= 2 * mass * np.ptp(change) + 1e-9


def share_of_bound(policy, score_GK, prior_GK, change_GK):
    """||dq||_1 over what 5.1, 5.4 or 5.5 allows it, for G problems at once, [G]."""
    G, K = score_GK.shape
    groups, tie_N = Groups(np.repeat(np.arange(G), K), G), np.arange(G * K).astype(np.uint64)
    before, after = (
        compute_weights(policy, e_GK.ravel(), groups, tie_N, prior_GK.ravel(), seed=0)
        for e_GK in (score_GK, score_GK + change_GK)
    )
    distance_G = groups.sum(np.abs(after.q_N - before.q_N))
    mass_G = groups.sum(((before.q_N > 0) | (after.q_N > 0)) * prior_GK.ravel()) / prior_GK.sum(1)
    range_G = np.ptp(change_GK, axis=1)
    if policy.tau is not None:
        share_G = distance_G * 2 * policy.tau / range_G
    elif np.ptp(prior_GK) == 0:
        share_G = distance_G * np.maximum(before.gap_G, after.gap_G) / (2 * range_G)
    else:
        share_G = distance_G * before.tau_G / (2 * mass_G * range_G)
    return np.where(range_G > 1e-3, share_G, 0.0)  # below, rounding counts


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("policy", [Chi2(tau=0.5), KL(tau=0.5), Chi2(budget=1), Chi2(budget=3)])
def test_a_search_for_the_worst_case_comes_close_to_the_bounds_and_never_over(policy, uniform):
    """5.1, 5.4, 5.5: 1,000 problems climb, each keeping what moves its weights further."""
    rng = np.random.default_rng(0)
    score_GK, change_GK = rng.normal(size=(1000, 7)), rng.uniform(-1, 1, (1000, 7))
    prior_GK = np.ones((1000, 7)) if uniform else np.exp(2 * rng.normal(size=(1000, 7)))
    best_G = share_of_bound(policy, score_GK, prior_GK, change_GK)
    for _ in range(60):
        size = 10.0 ** rng.uniform(-3, 0.3)
        where_GK = rng.random((1000, 7)) < 0.4
        tried = [x_GK + size * where_GK * rng.normal(size=(1000, 7)) for x_GK in (score_GK, change_GK)]
        tried[0] = np.where(rng.random((1000, 7)) < 0.05, tried[0][:, rng.permutation(7)], tried[0])  # ties
        share_G = share_of_bound(policy, tried[0], prior_GK, tried[1])
        better_G1 = (share_G > best_G)[:, None]
        score_GK, change_GK = np.where(better_G1, tried[0], score_GK), np.where(better_G1, tried[1], change_GK)
        best_G = np.maximum(best_G, share_G)
    assert 0.85 < best_G.max() <= 1 + 1e-9


def test_with_a_prior_the_gap_alone_bounds_nothing():
    """5.5: a heavy candidate enters, of whom the gap before knows nothing."""
    prior, size = [1.0, 1.0, 1e9], 1e-3
    distance, result, _ = moved(Chi2(budget=2), [1.0, 0.0, 0.0], [0.0, -size, size], prior)
    assert result.gap_G[0] == pytest.approx(0.5) and distance == pytest.approx(2, rel=1e-3)
    assert distance * result.gap_G[0] > 900 * size


@given(seeds, st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.05, 1.0]))
@THOROUGH
def test_the_proxys_error_ends_up_in_the_weights(seed, spread, common, share):
    """5.6: weights from lark against weights from lark_exact."""
    p = Problem.drawn(seed, spread=spread, common=common)
    kappa = middle(p.gram, p.brier_K)
    exact_K, proxy_K = p.gains()
    error_K = exact_K / kappa - proxy_K
    tau = share * np.ptp(proxy_K)
    assume(tau > 1e-6)
    distance, _, _ = moved(Chi2(tau=tau), proxy_K.tolist(), error_K)
    assert distance <= np.ptp(error_K) / (2 * tau) + 1e-9
    assert np.ptp(error_K) <= 2 * bounds(residuals(p.gram, p.brier_K, kappa), p.loss_K).max() / kappa + 1e-9 * tau
    scaled, _ = solve(Chi2(budget=1), exact_K.tolist())
    distance, result, _ = moved(Chi2(budget=1), proxy_K.tolist(), error_K)
    np.testing.assert_allclose(solve(Chi2(budget=1), (exact_K / kappa).tolist())[0], scaled)  # kappa changes nothing
    assert distance * result.gap_G[0] <= 2 * np.ptp(error_K) + 1e-9 * np.ptp(proxy_K)

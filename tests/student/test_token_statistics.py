import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lark.student.token_statistics
from lark.student.token_statistics import (
    RANK_CLIPS,
    Head,
    TokenStatistics,
    compute_token_statistics,
    compute_weighted_surprisal,
    find_compile_failure,
    name_sums,
    sum_by_step,
    sum_by_trajectory,
)

FIELDS = ("surprisal_N", "brier_N", "entropy_N", "rank_N", "log_sum_p2_N")


def identity_head(vocabulary: int) -> Head:
    """A head under which the hidden states are the logits."""
    return Head(weight_VD=torch.eye(vocabulary))


def random_case(tokens=40, width=16, vocabulary=200, scale=1.0, seed=0) -> tuple[torch.Tensor, torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(tokens, width, generator=generator)
    weight_VD = scale * torch.randn(vocabulary, width, generator=generator)
    return hidden_ND, torch.randint(vocabulary, (tokens,), generator=generator), Head(weight_VD=weight_VD)


def float64_logits(hidden_ND: torch.Tensor, head: Head) -> np.ndarray:
    logits = hidden_ND.double().numpy() @ head.weight_VD.double().numpy().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double().numpy()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * np.tanh(logits / head.softcap)


def brute_force(logits_NV: np.ndarray, target_N: torch.Tensor, top_k: int | None = None) -> dict[str, np.ndarray]:
    """The definitions, in float64, one token at a time."""
    rows: dict[str, list[float]] = {name: [] for name in FIELDS}
    for logits, y in zip(logits_NV, target_N.tolist(), strict=True):
        log_p = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
        p = np.exp(log_p)
        onehot = np.arange(len(p)) == y
        if logits[y] == logits.max():  # ln p(y) is close to 0: its digits lie in the others' mass
            log_p[y] = -math.log1p(math.fsum(np.exp(logits[~onehot] - logits[y])))
        rows["surprisal_N"].append(float(-log_p[y]))
        rows["entropy_N"].append(-math.fsum(p * np.where(p > 0, log_p, 0)))
        rows["rank_N"].append(1 + int((logits > logits[y]).sum()))
        rows["log_sum_p2_N"].append(math.log(math.fsum(p * p)))
        if top_k is None:
            # 1 - p(y) as the others' sum: 1 - p would lose the digits of a confident token even in float64
            rows["brier_N"].append(math.fsum(p[~onehot]) ** 2 + math.fsum(p[~onehot] ** 2))
        else:
            largest = np.argsort(-logits, kind="stable")[:top_k]
            q = np.exp(logits[largest] - logits[largest].max())
            q /= q.sum()
            own = float(q[largest == y].sum())  # 0 where y is outside
            rows["brier_N"].append(1 - 2 * own + math.fsum(q * q))
    return {name: np.array(values) for name, values in rows.items()}


def as_numpy(tokens: TokenStatistics) -> dict[str, np.ndarray]:
    return {name: getattr(tokens, name).double().numpy() for name in FIELDS}


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("vocabulary", [2, 3, 200])
def test_statistics_equal_their_definitions_in_float64(vocabulary, scale):
    hidden_ND, target_N, head = random_case(vocabulary=vocabulary, scale=scale)
    expected = brute_force(float64_logits(hidden_ND, head), target_N)
    tokens = as_numpy(compute_token_statistics(hidden_ND, target_N, head))
    for name in FIELDS:
        np.testing.assert_allclose(tokens[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(tokens[name].sum(), expected[name].sum(), rtol=1e-5, err_msg=name)
    assert np.array_equal(tokens["rank_N"], expected["rank_N"])


@pytest.mark.parametrize(
    "settings",
    [
        {"bias_V": torch.linspace(-3, 3, 200)},
        {"scale": 0.25},
        {"softcap": 3.0},
        {"bias_V": torch.linspace(-3, 3, 200), "scale": 0.5, "softcap": 5.0},
    ],
)
def test_a_head_may_have_a_bias_a_scale_and_a_soft_cap(settings):
    hidden_ND, target_N, plain = random_case()
    head = Head(weight_VD=plain.weight_VD, **settings)
    expected = brute_force(float64_logits(hidden_ND, head), target_N)
    without = brute_force(float64_logits(hidden_ND, plain), target_N)
    tokens = as_numpy(compute_token_statistics(hidden_ND, target_N, head))
    for name in FIELDS:
        np.testing.assert_allclose(tokens[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    assert not np.allclose(tokens["brier_N"], without["brier_N"], rtol=0.01)


EXTREME = {
    "p(y) within 1e-7 of 1": [16.5, 0.0, 0.0],
    "p(y) closer to 1 than float32 can say": [40.0, 0.0, -3.0],
    "huge logits": [30000.0, 29999.5, 29998.0],
    "huge logits, confident": [30000.0, 29984.0, 29983.5],
    "huge negative logits": [-30000.0, -29999.0, -29990.0],
    "hopeless token": [-300.0, 5.0, 1.0],
    "all equal": [1.0, 1.0, 1.0],
    "surprisal beyond float32's exp": [-1000.0, 1000.0, 990.0],
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_keep_their_digits(name):
    logits_NV = torch.tensor([EXTREME[name]])
    target_N = torch.tensor([0])
    tokens = as_numpy(compute_token_statistics(logits_NV, target_N, identity_head(3)))
    expected = brute_force(logits_NV.double().numpy(), target_N)
    for field in ("surprisal_N", "brier_N"):
        np.testing.assert_allclose(tokens[field], expected[field], rtol=1e-5, atol=1e-37, err_msg=field)
    # the entropy of a distribution that is confident of another token is exact to 1e-7 nats only
    atol = 1e-37 if expected["rank_N"] == 1 else 1e-7
    np.testing.assert_allclose(tokens["entropy_N"], expected["entropy_N"], rtol=1e-5, atol=atol)
    np.testing.assert_allclose(tokens["log_sum_p2_N"], expected["log_sum_p2_N"], rtol=1e-5, atol=1e-6)
    assert tokens["rank_N"] == expected["rank_N"]


@pytest.mark.parametrize("vocabulary", [3, 50, 200])
@pytest.mark.parametrize("top_k", [1, 2, 50])
def test_top_k_renormalises_over_the_largest_and_gives_tokens_outside_no_probability(top_k, vocabulary):
    hidden_ND, target_N, head = random_case(vocabulary=vocabulary, scale=0.5)
    logits_NV = float64_logits(hidden_ND, head)
    target_N[:10] = torch.from_numpy(logits_NV.argmax(1))[:10]
    target_N[10:20] = torch.from_numpy(logits_NV.argmin(1))[10:20]
    expected = brute_force(logits_NV, target_N, top_k)
    tokens = as_numpy(compute_token_statistics(hidden_ND, target_N, head, top_k=top_k))
    for name in FIELDS:
        np.testing.assert_allclose(tokens[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    outside = expected["rank_N"] > top_k
    assert outside.any() == (top_k < vocabulary)
    assert (tokens["brier_N"][outside] > 1).all()


def test_top_k_keeps_the_digits_of_confident_tokens():
    logits_NV = torch.tensor([[12.0, 0.0, -1.0, -40.0]])
    tokens = compute_token_statistics(logits_NV, torch.tensor([0]), identity_head(4), top_k=3)
    expected = brute_force(logits_NV[:, :3].double().numpy(), torch.tensor([0]))["brier_N"]
    np.testing.assert_allclose(tokens.brier_N.numpy(), expected, rtol=1e-2)  # about 1e-10: 1 - 2 p + sum p^2 gives 0
    assert expected < 2e-10


def test_equal_logits_share_the_better_rank_and_count_as_inside_the_top_k():
    tokens = compute_token_statistics(torch.zeros(1, 4), torch.tensor([3]), identity_head(4), top_k=2)
    assert tokens.rank_N.tolist() == [1]
    assert tokens.brier_N.item() == pytest.approx(0.5)  # p = 1/2, 1/2


logit_lists = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=8)


@given(logits=logit_lists, shift=st.integers(-1000, 1000), data=st.data())
@settings(deadline=None)
def test_identities(logits, shift, data):
    target = data.draw(st.integers(0, len(logits) - 1))
    logits_NV, target_N = torch.tensor([logits]), torch.tensor([target])
    head = identity_head(len(logits))
    tokens = compute_token_statistics(logits_NV, target_N, head)
    surprisal, brier, entropy, rank, log_sum_p2 = (getattr(tokens, name).item() for name in FIELDS)
    p, sum_p2 = math.exp(-surprisal), math.exp(log_sum_p2)
    assert brier == pytest.approx(1 - 2 * p + sum_p2, abs=2e-6)
    assert surprisal >= 0 and 0 <= brier <= 2 and 1 <= rank <= len(logits)
    assert -1e-6 <= entropy <= math.log(len(logits)) + 1e-5
    assert 1 / len(logits) - 1e-6 <= sum_p2 <= 1 + 1e-6
    assert -log_sum_p2 <= entropy + 2e-5  # Renyi entropy of order 2 is at most Shannon's
    assert surprisal >= math.log(rank) - 1e-5  # rank r leaves at most 1/r
    # the other way round: averaged over the distribution, surprisal is entropy and Brier is 1 - sum p^2
    every = compute_token_statistics(logits_NV.expand(len(logits), -1), torch.arange(len(logits)), head)
    p_V = (-every.surprisal_N).exp()
    assert p_V.sum().item() == pytest.approx(1, abs=1e-5)
    assert (p_V * every.surprisal_N).sum().item() == pytest.approx(entropy, abs=1e-5)
    assert (p_V * every.brier_N).sum().item() == pytest.approx(1 - sum_p2, abs=1e-5)
    assert sorted(every.rank_N.tolist()) == sorted(1 + sum(x > y for x in logits) for y in logits)
    # a constant added to all logits changes nothing but rounding (at most half a unit in the last place of 1030)
    moved = compute_token_statistics(logits_NV + shift, target_N, head)
    assert moved.surprisal_N.item() == pytest.approx(surprisal, abs=2e-4)
    assert moved.brier_N.item() == pytest.approx(brier, abs=2e-4)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 39, 40, 1000])
def test_chunked_equals_dense(monkeypatch, chunk, top_k):
    hidden_ND, target_N, head = random_case()
    dense = as_numpy(compute_token_statistics(hidden_ND, target_N, head, top_k=top_k))
    asked = []
    logits = Head.compute_logits
    monkeypatch.setattr(lark.student.token_statistics, "CHUNK_BYTES", 4 * 200 * chunk + 3)
    monkeypatch.setattr(Head, "compute_logits", lambda self, hidden: asked.append(len(hidden)) or logits(self, hidden))
    chunked = as_numpy(compute_token_statistics(hidden_ND, target_N, head, top_k=top_k))
    for name in FIELDS:
        np.testing.assert_allclose(chunked[name], dense[name], rtol=2e-5, atol=1e-6, err_msg=name)
    # never logits of more tokens than fit, and none twice
    assert max(asked) <= chunk and sum(asked) == len(target_N) and len(asked) == -(-len(target_N) // chunk)


@pytest.mark.parametrize("stance", ["force_eager", "default"])
def test_fused_equals_plain(stance):
    """As it is written, and as it is compiled (where there is no compiler, as it is written once more)."""
    if find_compile_failure(torch.device("cpu")) is not None:
        stance = "force_eager"
    torch.manual_seed(0)
    hidden_ND, target_N = torch.randn(97, 16), torch.randint(0, 50_000, (97,))
    head = Head(weight_VD=torch.randn(50_000, 16))
    plain = vars(compute_token_statistics(hidden_ND, target_N, head))
    with torch.compiler.set_stance(stance):
        fused = vars(compute_token_statistics(hidden_ND, target_N, head, compiled=True))
    assert torch.equal(plain.pop("rank_N"), fused.pop("rank_N"))
    for name, values_N in plain.items():
        torch.testing.assert_close(fused[name], values_N, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.slow
def test_no_compiler_is_a_reason_not_an_error(tmp_path):
    module = "lark.student.token_statistics"
    script = f"import torch, {module} as m; print(m.find_compile_failure(torch.device('cpu')))"
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "compiler" in found.stdout


def test_no_tokens():
    _, _, head = random_case()
    tokens = compute_token_statistics(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64), head)
    assert all(len(getattr(tokens, name)) == 0 for name in FIELDS)
    assert tokens.rank_N.dtype == torch.int64


def test_nothing_is_kept_for_a_backward_pass_and_no_input_is_overwritten():
    hidden_ND, target_N, head = random_case()
    head.weight_VD.requires_grad_(True)
    before = hidden_ND.clone(), head.weight_VD.detach().clone()
    tokens = compute_token_statistics(hidden_ND, target_N, head, top_k=5)
    assert not any(getattr(tokens, name).requires_grad for name in FIELDS)
    assert torch.equal(hidden_ND, before[0]) and torch.equal(head.weight_VD, before[1])


def test_bfloat16_weights_give_float32_statistics():
    hidden_ND, target_N, head = random_case()
    low = Head(weight_VD=head.weight_VD.bfloat16())
    tokens = compute_token_statistics(hidden_ND.bfloat16(), target_N, low)
    logits_NV = (hidden_ND.bfloat16().double() @ low.weight_VD.T.double()).numpy()  # not rounded to bfloat16
    assert tokens.surprisal_N.dtype == torch.float32
    np.testing.assert_allclose(tokens.surprisal_N, brute_force(logits_NV, target_N)["surprisal_N"], rtol=1e-5)


def test_bfloat16_weights_have_the_gradients_of_a_plain_product(monkeypatch):
    monkeypatch.setattr(lark.student.token_statistics, "CHUNK_BYTES", 3000)  # the weights are cast in blocks
    hidden_ND, target_N, head = random_case()
    hidden_ND, weight_VD = hidden_ND.bfloat16().requires_grad_(), head.weight_VD.bfloat16().requires_grad_()
    bias_V = torch.randn(len(weight_VD))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ones_1N = torch.ones(1, len(target_N))
        loss = compute_weighted_surprisal(hidden_ND, target_N, ones_1N, Head(weight_VD=weight_VD, bias_V=bias_V))
        ours = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    logits_NV = F.linear(hidden_ND.float(), weight_VD.float(), bias_V)
    theirs = torch.autograd.grad(F.cross_entropy(logits_NV, target_N, reduction="sum"), (hidden_ND, weight_VD))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


# --- sums


@pytest.fixture
def measured() -> tuple[TokenStatistics, torch.Tensor, torch.Tensor]:
    """Three trajectories of 3, 0 and 4 tokens; the last row's end-of-turn token is cut off."""
    tokens = TokenStatistics(
        surprisal_N=torch.tensor([1.0, 2.0, 4.0, 0.5, 0.25, 8.0, 3.0]),
        brier_N=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        entropy_N=torch.tensor([2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0]),
        rank_N=torch.tensor([1, 60, 700, 1, 2, 120, 1]),
        log_sum_p2_N=torch.zeros(7),
    )
    return tokens, torch.tensor([0, 0, 0, 2, 2, 2, 2]), torch.tensor([0, 1, 2, 0, 1, 2, 3])


def test_sums_of_trajectories(measured):
    tokens, row_N, position_N = measured
    sums = name_sums(sum_by_trajectory(tokens, row_N, position_N, torch.tensor([2, 0, -1])).numpy())
    expected = {
        "num_tokens": [3, 0, 4],
        "sum_surprisal": [7.0, 0.0, 11.75],
        "sum_brier": [0.6, 0.0, 2.2],
        "sum_entropy": [3.0, 0.0, 10.0],
        "sum_rank": [761, 0, 124],
        "sum_rank_50": [101, 0, 54],
        "sum_rank_100": [161, 0, 104],
        "sum_rank_500": [561, 0, 124],
        "top1": [1, 0, 2],
        "has_end": [1, 0, 0],
        "end_surprisal": [4.0, 0.0, 0.0],
        "end_brier": [0.3, 0.0, 0.0],
        "end_entropy": [0.0, 0.0, 0.0],
        "end_rank": [700, 0, 0],
    }
    assert sums.keys() == expected.keys()
    assert {f"sum_rank_{clip}" for clip in RANK_CLIPS} <= sums.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(sums[name], values, rtol=1e-6, err_msg=name)
        counted = "rank" in name or name in ("num_tokens", "top1", "has_end")
        assert sums[name].dtype == (np.int64 if counted else np.float64)


def test_an_end_token_need_not_be_the_last(measured):
    tokens, row_N, position_N = measured
    sums = name_sums(sum_by_trajectory(tokens, row_N, position_N, torch.tensor([1, 0, 2])).numpy())
    assert sums["end_rank"].tolist() == [60, 0, 120]
    assert sums["end_surprisal"].tolist() == [2.0, 0.0, 8.0]


def test_long_trajectories_are_summed_in_float64():
    many = 200_000
    generator = torch.Generator().manual_seed(0)
    values_N = torch.rand(many, generator=generator) * torch.logspace(-6, 1, many)
    tokens = TokenStatistics(
        surprisal_N=values_N,
        brier_N=values_N,
        entropy_N=values_N,
        rank_N=torch.ones(many).long(),
        log_sum_p2_N=values_N,
    )
    zero_N = torch.zeros(many, dtype=torch.int64)
    sums = name_sums(sum_by_trajectory(tokens, zero_N, torch.arange(many), torch.tensor([many - 1])).numpy())
    np.testing.assert_allclose(sums["sum_surprisal"].item(), math.fsum(values_N.tolist()), rtol=1e-12)


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    skip=st.integers(0, 6),
    has_end=st.booleans(),
    seed=st.integers(0, 9),
)
def test_step_sums_equal_a_plain_loop(counts, skip, has_end, seed):
    end = sum(counts)
    surprisal_T = np.random.default_rng(seed).random(end + has_end).astype(np.float32)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    tokens, total, first = sum_by_step(surprisal_T, starts, end, skip=skip)
    assert tokens.tolist() == counts
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        inside = surprisal_T[start : start + count].tolist()
        assert total[i] == pytest.approx(math.fsum(inside), rel=1e-12)
        assert first[i] == pytest.approx(math.fsum(inside[:skip]), rel=1e-12)


def test_a_trajectory_of_the_end_token_alone_has_no_steps():
    assert [len(column) for column in sum_by_step(np.ones(1, np.float32), [0], 0, skip=2)] == [0, 0, 0]

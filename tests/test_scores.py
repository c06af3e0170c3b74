import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lark.candidates import Candidates
from lark.policies import Policy
from lark.scores import Constant, Lark, Length, Likelihood, Random, RankSurprisal, imported
from lark.selection import Rule, select
from lark.stats import TokenStatistics, trajectory_sums


def candidates(problem_id, candidate_id=None, **statistics) -> Candidates:
    rows = len(problem_id)
    ids = [str(i) for i in range(rows)] if candidate_id is None else candidate_id
    return Candidates(
        problem_id=np.array(problem_id, object),
        candidate_id=np.array(ids, object),
        row_N=np.arange(rows),
        statistics={name: np.array(values) for name, values in statistics.items()},
        read_column=lambda name, row_N: np.full(len(row_N), None, object),
    )


def from_tokens(problem_id, surprisal, rank, end_of_turn=None) -> Candidates:
    """Candidates whose statistics come from per-token values, through the sums that the probe stores."""
    row_N = torch.tensor([i for i, values in enumerate(surprisal) for _ in values], dtype=torch.int64)
    position_N = torch.tensor([t for values in surprisal for t in range(len(values))], dtype=torch.int64)
    surprisal_N = torch.tensor([s for values in surprisal for s in values], dtype=torch.float32)
    rank_N = torch.tensor([r for values in rank for r in values], dtype=torch.int64)
    tokens = TokenStatistics(
        surprisal_N=surprisal_N, brier_N=surprisal_N, entropy_N=surprisal_N, rank_N=rank_N, log_sum_p2_N=surprisal_N
    )
    end_R = [len(values) - 1 for values in surprisal] if end_of_turn is None else end_of_turn
    sums = trajectory_sums(tokens, row_N, position_N, torch.tensor(end_R), rows=len(surprisal))
    return candidates(problem_id, **{name: values.numpy() for name, values in sums.items()})


def lark_by_the_formula(problem_id, loss, brier, tokens, a=0.0) -> list[float]:
    """g_k = (L_k / sum L) (2 rho_k - sum rho L / sum L), one problem at a time, rho = Brier T^-a / L."""
    gains = [math.nan] * len(loss)
    for problem in set(problem_id):
        rows = [k for k in range(len(loss)) if problem_id[k] == problem and loss[k] > 0]
        total = math.fsum(loss[k] for k in rows)
        rho = {k: brier[k] * tokens[k] ** -a / loss[k] for k in rows}
        mean_rho = math.fsum(rho[k] * loss[k] for k in rows) / total if rows else 0
        for k in rows:
            gains[k] = loss[k] / total * (2 * rho[k] - mean_rho)
    return gains


pools = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.one_of(st.just(0.0), st.floats(1e-4, 20)),
        st.floats(0, 2),
        st.integers(1, 5000),
    ),
    min_size=1,
    max_size=15,
)


@given(pool=pools, a=st.sampled_from([0.0, 0.5, 1.0]))
def test_lark_equals_its_formula_and_sums_to_rho_bar(pool, a):
    problem_id, loss, brier, tokens = map(list, zip(*pool, strict=True))
    gain_N = Lark(length_exponent=a)(candidates(problem_id, loss=loss, brier=brier, num_tokens=tokens))
    np.testing.assert_allclose(gain_N, lark_by_the_formula(problem_id, loss, brier, tokens, a), rtol=1e-9, atol=1e-12)
    for problem in set(problem_id):
        rows = [k for k in range(len(pool)) if problem_id[k] == problem and loss[k] > 0]
        if rows:
            rho_bar = sum(brier[k] * tokens[k] ** -a for k in rows) / sum(loss[k] for k in rows)
            assert gain_N[rows].sum() == pytest.approx(rho_bar, rel=1e-9, abs=1e-12)


def test_lark_in_figures():
    rows = candidates(["p", "p", "q"], loss=[1.0, 3.0, 0.5], brier=[0.5, 0.3, 0.2], num_tokens=[10, 100, 7])
    np.testing.assert_allclose(Lark()(rows), [(2 * 0.5 - 0.2) / 4, (2 * 0.3 - 0.6) / 4, 0.4], atol=1e-15)
    by_length = Lark(length_exponent=1.0)(rows)
    rho_bar = (0.05 + 0.003) / 4
    np.testing.assert_allclose(by_length[:2], [(0.1 - rho_bar) / 4, (0.006 - 3 * rho_bar) / 4])


def test_rows_without_a_loss_get_no_lark_score_and_count_in_no_sum():
    loss, brier, tokens = [1.0, 0.0, math.nan, 3.0], [0.5, 0.9, 0.9, 0.3], [10, 0, 5, 100]
    gain_N = Lark()(candidates(["p"] * 4, loss=loss, brier=brier, num_tokens=tokens))
    assert np.isnan(gain_N).tolist() == [False, True, True, False]
    alone = Lark()(candidates(["p"] * 2, loss=[1.0, 3.0], brier=[0.5, 0.3], num_tokens=[10, 100]))
    assert gain_N[[0, 3]].tolist() == alone.tolist()
    assert np.isnan(Lark()(candidates(["p"], loss=[0.0], brier=[0.0], num_tokens=[1]))).all()


def test_a_filter_recomputes_lark_on_the_survivors():
    rows = candidates(
        ["p"] * 3, loss=[1.0, 3.0, 2.0], brier=[0.5, 0.3, 1.2], num_tokens=[10, 100, 50], kept=[True, True, False]
    )
    rule = Rule(name="lark", score=Lark(), filter="kept", policy=Policy(budget=1))
    score_N = select(rule, rows, seed=0).score_N
    np.testing.assert_allclose(score_N, [0.2, 0.0, math.nan], atol=1e-15)
    assert abs(Lark()(rows)[0] - 0.2) > 0.05


def test_likelihood_is_the_mean_log_probability():
    assert Likelihood()(candidates(["p", "p"], loss=[0.5, 2.0])).tolist() == [-0.5, -2.0]


def test_length_takes_the_longest_or_the_shortest_first():
    rows = candidates(["p", "p"], num_tokens=[5, 70])
    assert Length(sign=1)(rows).tolist() == [5.0, 70.0]
    assert Length(sign=-1)(rows).tolist() == [-5.0, -70.0]
    with pytest.raises(ValueError, match=r"selector\.score\.sign=0 is neither 1"):
        Length(sign=0)


token_values = st.lists(
    st.lists(st.tuples(st.floats(2**-7, 20, width=32), st.integers(1, 2000)), min_size=2, max_size=12),
    min_size=1,
    max_size=4,
)


@given(rows=token_values, clip=st.sampled_from([50, 100, 500, None]), cut=st.booleans())
def test_rank_surprisal_equals_its_formula_over_the_content_tokens(rows, clip, cut):
    surprisal, rank = ([[token[i] for token in row] for row in rows] for i in (0, 1))
    ends = [-1 if cut else len(row) - 1 for row in rows]
    scores = RankSurprisal(clip=clip)(from_tokens(["p"] * len(rows), surprisal, rank, ends))
    for score, row, end in zip(scores, rows, ends, strict=True):
        content = row if end == -1 else row[:end]
        ranks = sum(min(r, math.inf if clip is None else clip) for _, r in content)
        assert score == pytest.approx(-ranks / math.fsum(s for s, _ in content), rel=1e-9)


def test_rank_surprisal_without_surprisal_is_no_score():
    rows = from_tokens(["p", "p"], [[0.0, 3.0], [1.0]], [[1, 5], [7]])
    assert np.isnan(RankSurprisal()(rows)).all()


def test_rank_surprisal_takes_only_clips_that_the_statistics_keep():
    with pytest.raises(ValueError, match=r"selector\.score\.clip=64 is not kept by the statistics; set 50, 100, 500"):
        RankSurprisal(clip=64)


def test_random_depends_on_seed_and_ids_and_on_no_order():
    problem_id, candidate_id = ["p", "p", "q", "q"] * 500, [str(i) for i in range(2000)]
    score_N = Random(seed=0)(candidates(problem_id, candidate_id))
    order = np.random.default_rng(0).permutation(2000)
    shuffled = candidates([problem_id[i] for i in order], [candidate_id[i] for i in order])
    assert Random(seed=0)(shuffled).tolist() == score_N[order].tolist()
    assert abs(np.corrcoef(score_N, Random(seed=1)(candidates(problem_id, candidate_id)))[0, 1]) < 4 / math.sqrt(2000)
    assert score_N.min() >= 0 and score_N.max() < 1
    # Kolmogorov-Smirnov distance to the uniform distribution; 1.63 / sqrt(n) is passed once in a hundred seeds
    distance = np.abs(np.sort(score_N) - np.arange(2000) / 2000).max()
    assert distance < 1.63 / math.sqrt(2000)


def test_constant_says_the_same_of_all():
    assert Constant()(candidates(["p", "q"])).tolist() == [0.0, 0.0]


def test_a_function_is_imported_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rule_in_cwd.py").write_text("def score(candidates):\n    return -candidates['loss']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    score = imported("my_rule_in_cwd:score", "selector.score")
    assert score(candidates(["p"], loss=[2.0])).tolist() == [-2.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rule", "names no function; set it to module:function"),
        (":score", "names no function"),
        (".relative:score", "names no function"),
        ("no such module:score", "names no function"),
        ("no_such_module:score", "could not be imported .No module named 'no_such_module'.; is its folder"),
        ("math:no_such_function", "could not be imported .module 'math' has no attribute 'no_such_function'"),
        ("broken_rule:score", "could not be imported .*broken_rule.py, line 1"),
        ("math:pi", "is a float, not a function of the candidates"),
    ],
)
def test_what_cannot_be_imported_is_an_error_that_names_the_setting(path, message, tmp_path, monkeypatch):
    (tmp_path / "broken_rule.py").write_text("def score(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(ValueError, match=f"selector.score='{path}' {message}"):
        imported(path, "selector.score")

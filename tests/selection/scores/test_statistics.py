import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lark.config import build
from lark.scoring.passes import ContentAlone, LocalWindows, Statistics
from lark.selection.candidates import Candidates
from lark.selection.policies import Chi2, TopB
from lark.selection.rule import Between, Rule
from lark.selection.scores.statistics import (
    STATISTICS,
    Constant,
    DropFirst,
    Entropy,
    InstructionDifficulty,
    Lark,
    Learnability,
    Length,
    Likelihood,
    LocalLikelihood,
    Random,
    Rank,
    RankSurprisal,
)
from lark.selection.selection import select
from lark.student.token_statistics import TokenStatistics, name_sums, sum_by_step, sum_by_trajectory


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
    sums = name_sums(sum_by_trajectory(tokens, row_N, position_N, torch.tensor(end_R)).numpy())
    return candidates(problem_id, **sums)


def ragged(arrays) -> np.ndarray:
    column = np.empty(len(arrays), object)
    for i, array in enumerate(arrays):
        column[i] = np.asarray(array)
    return column


def from_steps(rows, *, skip=0, after_end=()) -> Candidates:
    """Candidates of one problem from (the surprisals of each step, the end-of-turn token's or None if it is cut off),
    with the statistics and step statistics that the probe stores. `after_end` are the surprisals of what probe.span
    adds after the end-of-turn token.
    """
    contents = [[s for step in steps for s in step] for steps, _ in rows]
    surprisal = [
        content if end is None else [*content, end, *after_end]
        for content, (_, end) in zip(contents, rows, strict=True)
    ]
    ends = [-1 if end is None else len(content) for content, (_, end) in zip(contents, rows, strict=True)]
    starts = [np.cumsum([0, *map(len, steps[:-1])]).tolist() for steps, _ in rows]
    columns = zip(
        *(
            sum_by_step(np.array(values, np.float32), start, len(content), skip=skip)
            for values, start, content in zip(surprisal, starts, contents, strict=True)
        ),
        strict=True,
    )
    scored = from_tokens(["p"] * len(rows), surprisal, [[1] * len(values) for values in surprisal], ends)
    with np.errstate(invalid="ignore"):
        loss_N = scored["sum_surprisal"] / scored["num_tokens"]
    steps = dict(zip(("step_tokens", "step_surprisal", "step_first_surprisal"), map(ragged, columns), strict=True))
    return replace(scored, statistics={**scored.statistics, "loss": loss_N, **steps})


def mean(values) -> float:
    """NaN if there are none."""
    return math.fsum(values) / len(values) if values else math.nan


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


@given(pool=pools, a=st.sampled_from([0.0, 1.0]))
def test_learnability_is_the_factor_that_larks_gain_weighs(pool, a):
    """g_k = (L_k / sum L) (2 rho_k - sum rho L / sum L), whatever the other candidates are."""
    problem_id, loss, brier, tokens = map(list, zip(*pool, strict=True))
    rows = candidates(problem_id, loss=loss, brier=brier, num_tokens=tokens)
    rho_N = Learnability(length_exponent=a)(rows)
    assert np.isnan(rho_N).tolist() == [not x > 0 for x in loss]
    one = candidates(range(len(loss)), loss=loss, brier=brier, num_tokens=tokens)  # a problem each: g is rho
    np.testing.assert_allclose(rho_N, Lark(length_exponent=a)(one), rtol=1e-12, atol=1e-300)
    for k in np.flatnonzero(np.isfinite(rho_N)):
        assert rho_N[k] == pytest.approx(brier[k] * tokens[k] ** -a / loss[k], rel=1e-12)


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
    rule = Rule(name="lark", score=Lark(), filter="kept", policy=Chi2(budget=1))
    score_N = select(rule, rows, seed=0).score_N
    np.testing.assert_allclose(score_N, [0.2, 0.0, math.nan], atol=1e-15)
    assert abs(Lark()(rows)[0] - 0.2) > 0.05


def test_likelihood_is_the_mean_log_probability_and_its_opposite_the_surprisal():
    rows = candidates(["p", "p"], loss=[0.5, 2.0])
    assert Likelihood()(rows).tolist() == [-0.5, -2.0]
    assert Likelihood(sign=-1)(rows).tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match=r"selector\.score\.sign=2 is neither 1 \(likeliest first\) nor -1 \(highest"):
        Likelihood(sign=2)


def test_entropy_takes_the_lowest_first_unless_told_otherwise():
    rows = candidates(["p", "p"], entropy=[0.5, 2.0])
    assert Entropy()(rows).tolist() == [-0.5, -2.0]
    assert Entropy(sign=1)(rows).tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match=r"selector\.score\.sign=0 is neither 1 \(highest entropy first\)"):
        Entropy(sign=0)


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


@pytest.mark.parametrize("score", [RankSurprisal, Rank])
def test_scores_by_rank_take_only_clips_that_the_statistics_keep(score):
    with pytest.raises(ValueError, match=r"selector\.score\.clip=64 is not kept by the statistics; set 50, 100, 500"):
        score(clip=64)


@given(rows=token_values, clip=st.sampled_from([50, 100, 500, None]))
def test_rank_is_minus_the_mean_clipped_rank_of_the_whole_span(rows, clip):
    surprisal, rank = ([[token[i] for token in row] for row in rows] for i in (0, 1))
    scores = Rank(clip=clip)(from_tokens(["p"] * len(rows), surprisal, rank))
    expected = [-mean([min(r, math.inf if clip is None else clip) for r in row]) for row in rank]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_an_empty_span_has_no_rank():
    assert np.isnan(Rank()(from_tokens(["p", "p"], [[], [1.0]], [[], [3]], [-1, 0]))).tolist() == [True, False]


# --- scores by steps

surprisals = st.floats(2**-7, 20, width=32)
step_values = st.lists(  # steps of surprisals, and the end-of-turn token's or None
    st.tuples(st.lists(st.lists(surprisals, min_size=1, max_size=5), max_size=4), st.one_of(st.none(), surprisals)),
    min_size=1,
    max_size=5,
)


@given(rows=step_values, skip=st.integers(0, 4))
def test_drop_first_is_the_mean_over_what_each_step_has_left(rows, skip):
    scores = DropFirst(skip=skip)(from_steps(rows, skip=skip))
    for score, (steps, end) in zip(scores, rows, strict=True):
        left = [s for step in steps for s in step[skip:]] + ([] if end is None else [end])
        assert score == pytest.approx(-mean(left), rel=1e-9, nan_ok=True)


@given(rows=step_values)
def test_drop_first_that_skips_nothing_is_likelihood(rows):
    candidates = from_steps(rows, skip=0)
    np.testing.assert_allclose(DropFirst(skip=0)(candidates), Likelihood()(candidates), rtol=1e-12)


def test_drop_first_in_figures():
    rows = [([[9.0, 8.0, 1.0], [7.0]], 0.5), ([[9.0, 8.0]], None)]  # nothing is left of the second
    np.testing.assert_allclose(DropFirst(skip=2)(from_steps(rows, skip=2)), [-(1.0 + 0.5) / 2, math.nan])
    with pytest.raises(
        ValueError, match=r"selector\.score\.skip=-1 is no number of tokens; set it to \$\{probe\.skip\}"
    ):
        DropFirst(skip=-1)


def with_windows(rows: Candidates, window_surprisal, steps_before=4) -> Candidates:
    windows = {LocalWindows(steps_before=steps_before): {"window_surprisal": ragged(window_surprisal)}}
    return replace(rows, passes=windows)


@given(rows=step_values, data=st.data())
def test_local_likelihood_is_the_mean_over_steps_whatever_their_length(rows, data):
    windows = [data.draw(st.lists(surprisals, min_size=len(steps), max_size=len(steps))) for steps, _ in rows]
    scores = LocalLikelihood(steps_before=2)(with_windows(from_steps(rows), windows, steps_before=2))
    for score, window, (steps, _) in zip(scores, windows, rows, strict=True):
        by_step = [-total / len(step) for total, step in zip(window, steps, strict=True)]
        assert score == pytest.approx(mean(by_step), rel=1e-9, nan_ok=True)


@given(rows=step_values)
def test_local_likelihood_whose_windows_hold_everything_is_the_mean_of_step_means(rows):
    scored = from_steps(rows)
    scores = LocalLikelihood()(with_windows(scored, scored["step_surprisal"]))
    np.testing.assert_allclose(scores, [mean([-mean(step) for step in steps]) for steps, _ in rows], rtol=1e-9)


def test_local_likelihood_in_figures():
    rows = from_steps([([[1.0], [3.0, 3.0, 3.0]], 50.0), ([], 2.0)])  # the second has no step
    rows = with_windows(rows, [[2.0, 6.0], []])
    np.testing.assert_allclose(LocalLikelihood()(rows), [(-2.0 - 6.0 / 3) / 2, math.nan])
    assert LocalLikelihood(steps_before=0).needs == (Statistics(), LocalWindows(steps_before=0))
    with pytest.raises(ValueError, match=r"selector\.score\.steps_before=-1 is no number of steps; set 0 or more"):
        LocalLikelihood(steps_before=-1)


@pytest.mark.parametrize("score", [DropFirst(skip=2), LocalLikelihood(), Rank(), InstructionDifficulty(max=None)])
def test_the_order_of_the_rows_changes_no_score_by_tokens(score):
    rng = np.random.default_rng(0)
    rows = [([rng.uniform(0, 5, rng.integers(1, 6)).tolist() for _ in range(rng.integers(5))], 1.0) for _ in range(40)]
    windows = [rng.uniform(0, 5, len(steps)) for steps, _ in rows]
    alone = rng.uniform(1, 50, (2, 40))

    def scores(order: np.ndarray) -> np.ndarray:
        scored = with_windows(from_steps([rows[i] for i in order], skip=2), [windows[i] for i in order])
        alone_columns = {"alone_tokens": alone[0, order], "alone_surprisal": alone[1, order]}
        return score(replace(scored, passes={**scored.passes, ContentAlone(): alone_columns}))

    order = rng.permutation(40)
    np.testing.assert_array_equal(scores(order), scores(np.arange(40))[order])


# --- instruction-following difficulty


def perplexity(surprisals: list[float]) -> float:
    """(prod_t p_t)^(-1/T)."""
    return math.prod(math.exp(-s) for s in surprisals) ** (-1 / len(surprisals)) if surprisals else math.nan


def with_content_alone(rows: Candidates, alone: list[list[float]]) -> Candidates:
    columns = {
        "alone_tokens": np.array([len(values) for values in alone]),
        "alone_surprisal": np.array([math.fsum(values) for values in alone]),
    }
    return replace(rows, passes={ContentAlone(): columns})


@given(rows=step_values, data=st.data())
def test_instruction_difficulty_is_a_ratio_of_perplexities_over_the_content(rows, data):
    alone = [data.draw(st.lists(st.floats(2**-7, 20), max_size=6)) for _ in rows]
    candidates = with_content_alone(from_steps(rows), alone)
    scores, kept = InstructionDifficulty(max=None)(candidates), InstructionDifficulty()(candidates)
    for score, passed, (steps, _), without_prompt in zip(scores, kept, rows, alone, strict=True):
        ratio = perplexity([s for step in steps for s in step]) / perplexity(without_prompt)
        assert score == pytest.approx(ratio, rel=1e-6, nan_ok=True)
        assert passed == (score if score < 1 else pytest.approx(math.nan, nan_ok=True))


def test_candidates_that_the_prompt_does_not_help_are_dropped():
    """Given the prompt 1 nat/token; alone 2, 1 and 1/2; the end-of-turn token's 30 nats do not count."""
    rows = with_content_alone(from_steps([([[1.0, 1.0]], 30.0)] * 3), [[2.0, 2.0, 2.0], [1.0], [0.5, 0.5]])
    np.testing.assert_allclose(InstructionDifficulty()(rows), [math.exp(-1), math.nan, math.nan])
    np.testing.assert_allclose(InstructionDifficulty(max=1.1)(rows), [math.exp(-1), 1.0, math.nan])
    np.testing.assert_allclose(InstructionDifficulty(max=None)(rows), [math.exp(-1), 1.0, math.exp(0.5)])
    with pytest.raises(ValueError, match=r"selector\.score\.max=0 drops every candidate"):
        InstructionDifficulty(max=0)


@given(rows=step_values, newline=surprisals)
def test_instruction_difficulty_leaves_out_what_comes_after_the_end_of_turn(rows, newline):
    alone = [[1.0, 2.0]] * len(rows)
    content, authors = (with_content_alone(from_steps(rows, after_end=after), alone) for after in ((), (newline,)))
    np.testing.assert_array_equal(InstructionDifficulty(max=None)(authors), InstructionDifficulty(max=None)(content))


# --- what scores need


@pytest.mark.parametrize("score", [Random(seed=0), Length(sign=1), Constant()])
def test_scores_that_ask_the_student_nothing_need_no_statistics(score):
    rows = candidates(["p", "q"], num_tokens=[3, 4])
    assert score.needs == () and np.isfinite(score(rows)).all()


@pytest.mark.parametrize("score", [Lark(), Likelihood(), Entropy(), Rank(), RankSurprisal(), DropFirst(skip=2)])
def test_scores_over_statistics_need_the_forward_pass_alone(score):
    assert score.needs == (Statistics(),)


def test_a_score_over_a_further_pass_needs_it_too():
    rows = from_steps([([[1.0]], 1.0)])
    for score in (LocalLikelihood(steps_before=3), InstructionDifficulty()):
        with pytest.raises(ValueError, match=f"the rule asks for {type(score.needs[1]).__name__}"):
            score(replace(rows, passes={}))


def test_the_names_of_statistics_are_those_that_the_probe_stores():
    sums = from_tokens(["p"], [[1.0]], [[1]]).statistics
    assert {*STATISTICS} == {*sums, "loss", "brier", "entropy"} - {"num_tokens"}


# --- a filter by a score


def test_a_filter_keeps_the_candidates_whose_score_lies_between():
    rows = with_content_alone(from_steps([([[1.0, 1.0]], 30.0)] * 3), [[2.0], [1.0], [0.5]])
    settings = {
        "_target_": "lark.selection.rule.Between",
        "score": {"_target_": "lark.selection.scores.statistics.InstructionDifficulty", "max": None},
        "max": 1,
    }
    below_one = build(OmegaConf.create(settings))
    assert below_one(rows).tolist() == [True, True, False]
    assert below_one.needs == (Statistics(), ContentAlone())
    assert Between(score=InstructionDifficulty(), min=0.1)(rows).tolist() == [True, False, False]  # NaN does not pass
    rule = Rule(name="shortest", score=Length(sign=-1), filter=below_one, policy=TopB(budget=3))
    assert select(rule, rows, seed=0).row.tolist() == [0, 1]


def test_a_filter_by_column_needs_the_forward_pass_only_for_a_statistic():
    assert Between(column="sum_rank_50").needs == Between(column="loss").needs == (Statistics(),)
    assert Between(column="num_tokens").needs == Between(column="judge").needs == ()


def test_a_filter_is_by_a_column_or_a_score():
    with pytest.raises(ValueError, match=r"selector\.filter\.column=None and .*score=None are neither set; set one"):
        Between(max=1)
    with pytest.raises(ValueError, match=r"selector\.filter\.column=loss and .* are both set; set one of them"):
        Between(column="loss", score=Likelihood())
    with pytest.raises(ValueError, match=r"selector\.filter\.score='loss' is not a score"):
        Between(score="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"selector\.filter\.score=.* has shape \(2,\) for 1 candidates"):
        Between(score=lambda rows: np.zeros(2))(candidates(["p"]))


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

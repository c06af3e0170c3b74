"""Racing without a student: which rules can be, estimates against dense conditioning, who is given up, margins."""

import itertools
import math

import numpy as np
import pytest

from lark.common.groups import Groups
from lark.scoring.forecast import ORDERS, Context, Forecast, context
from lark.selection.contests import Contest, clips, contests, raced
from lark.selection.judge import Heat, Judge, Problem, rehearsal
from lark.selection.policies import Policy
from lark.selection.race import Estimate, Field, Noise, Trial, calibration_size, cuts, margin_of, top
from lark.selection.scores.statistics import Entropy, Lark, Learnability, Likelihood, Random, RankSurprisal
from lark.selection.selection import Between, Rule
from lark.student.chat import Encoded

SCORES = (
    *(Lark(), Lark(length_exponent=1.0), Learnability()),
    *(RankSurprisal(clip=100), RankSurprisal(clip=None), Likelihood()),
)


def rule(score, name="rule", **settings):
    policy = settings.pop("policy", Policy(kind="top_b", budget=2))
    return Rule(name=name, score=score, policy=policy, **settings)


def contest(score, *, budget=2, places=None):
    return Contest(name="selector", rule=rule(score), places=places or budget, budget=budget)


def noise(width, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    token, candidate, problem = ((x := rng.normal(size=(width, width))) @ x.T + np.eye(width) / 9 for _ in range(3))
    return Noise(token_CC=scale * token, candidate_CC=scale * candidate / 50, problem_CC=scale * problem / 20)


def field(seen, tokens, *, problems=1, clip=(100,), seed=0):
    """Candidates with random sums, of `problems` problems in turn."""
    rng = np.random.default_rng(seed)
    seen_N, tokens_N, width = np.array(seen), np.array(tokens), 2 + len(clip)
    expected_total_NC = rng.uniform(0.5, 2, (len(seen), width)) * tokens_N[:, None]
    expected_NC = expected_total_NC * (seen_N / tokens_N)[:, None]
    end_NC = rng.uniform(0.1, 1, expected_NC.shape)
    end_NC[:, 2:] = end_NC[:, -1:]
    return Field(
        groups=Groups(np.arange(len(seen)) % problems, problems),
        clips=clip,
        tokens_N=tokens_N,
        seen_N=seen_N,
        sum_NC=expected_NC * rng.uniform(0.9, 1.1, expected_NC.shape),
        expected_NC=expected_NC,
        expected_total_NC=expected_total_NC,
        end_NC=end_NC,
    )


# Which rules


def test_what_a_race_has_to_leave_exact():
    chi2 = Policy(kind="chi2", budget=3)
    found = contests(
        {"selector": rule(Lark(), policy=chi2), "baseline": rule(RankSurprisal(clip=50))}, match="trajectories"
    )
    assert [(one.name, one.places, one.budget) for one in found] == [("selector", 4, 3), ("baseline", 3, 3)]
    assert clips(found) == (50,) and clips([contest(s) for s in SCORES]) == (100, None)
    (alone,) = contests({"selector": rule(Random(seed=0)), "baseline": rule(Likelihood(sign=-1))}, match="trajectories")
    assert alone.name == "baseline" and alone.places == 2
    (with_tau,) = contests({"selector": rule(Lark(), policy=Policy(kind="kl", budget=2, tau=0.1))}, match="tokens")
    assert with_tau.places == 2


@pytest.mark.parametrize(
    ("rules", "match", "says"),
    [
        ({"selector": rule(Entropy())}, "trajectories", r"selector=rule reads .* can be raced"),
        ({"selector": rule(Random(seed=0)), "baseline": rule(Entropy())}, "trajectories", "baseline=rule reads"),
        ({"selector": rule(Random(seed=0))}, "trajectories", "no rule chooses by the student's statistics"),
        ({"selector": rule(Lark(), policy=Policy(kind="chi2", tau=0.1))}, "trajectories", r"tau=0\.1"),
        ({"selector": rule(Lark(), policy=Policy(kind="prior"))}, "trajectories", "kind=prior"),
        ({"selector": rule(Lark(), policy=Policy(kind="top_b", budget=1, prior="x"))}, "trajectories", "prior=x"),
        ({"selector": rule(Random(seed=0)), "baseline": rule(Likelihood())}, "tokens", "match=tokens"),
        ({"selector": rule(Lark(), filter=Between(column="loss", max=1))}, "trajectories", "its filter"),
        ({"selector": rule(Lark(), filter="has_end")}, "trajectories", "its filter"),
    ],
)
def test_a_rule_that_cannot_be_raced_is_named(rules, match, says):
    with pytest.raises(ValueError, match=says) as error:
        contests(rules, match=match)
    assert "set probe.race=false" in str(error.value)


def test_filters_of_the_pool_are_raced():
    (one,) = contests({"selector": rule(Lark(), filter="correct")}, match="trajectories")
    assert one.identity(np.array([True, False])) != one.identity(np.array([True, True]))


# Foresight


def ending(padded, i):
    """The n-grams that end at token i of a sequence behind ORDERS - 1 signs for its start."""
    return [tuple(padded[i + ORDERS - n : i + ORDERS]) for n in range(1, ORDERS + 1)]


def in_words(sequences, starts):
    """`context` by sets of tuples: (repeated, position) of every span token."""
    padded = [[None] * (ORDERS - 1) + s for s in sequences]
    spans = [range(start, len(s)) for s, start in zip(sequences, starts, strict=True)]
    said = [{gram for i in span for gram in ending(s, i)} for s, span in zip(padded, spans, strict=True)]
    for k, (s, span) in enumerate(zip(padded, spans, strict=True)):
        others = set().union(*(grams for i, grams in enumerate(said) if i != k))
        for i in span:
            before = {gram for j in range(i) for gram in ending(s, j)}
            own, elsewhere = (sum(gram in grams for gram in ending(s, i)) for grams in (before, others))
            yield (ORDERS + 1) * own + elsewhere, i - span.start


def test_context_counts_ngrams_in_the_sequence_and_in_the_others():
    rng = np.random.default_rng(0)
    sequences = [[7, 8, 9, *rng.integers(0, 4, n).tolist()] for n in (30, 1, 50, 12)]
    starts = [3, 2, 3, 0]
    found = context(sequences, starts)
    assert list(zip(found.repeated_N.tolist(), found.position_N.tolist(), strict=True)) == list(
        in_words(sequences, starts)
    )
    pairs = [
        tuple([None, *s][i : i + 2]) for s, start in zip(sequences, starts, strict=True) for i in range(start, len(s))
    ]
    assert len({*zip(pairs, found.ngram_ON[1].tolist(), strict=True)}) == len(set(pairs))
    assert len(set(found.ngram_ON[1].tolist())) == len(set(pairs))


def test_forecast_learns_what_repeats_and_which_tokens_are_hard():
    rng = np.random.default_rng(0)

    def draw():
        parts = [context([rng.integers(0, 60, 150).tolist() for _ in range(4)], [5] * 4) for _ in range(20)]
        of = Context.joined(parts)
        token_N = np.unique(of.ngram_ON[0], return_inverse=True)[1]
        value_N = (token_N % 3) + 2.0 * (of.repeated_N >= ORDERS + 1) + rng.normal(0, 0.5, len(token_N))
        return of, np.stack([value_N, -value_N], 1)

    known, value_NC = draw()
    unseen, truth_NC = draw()
    found_NC = Forecast(known, value_NC)(unseen)
    assert np.mean((found_NC - truth_NC) ** 2) < 1.3 * 0.25 < np.mean((truth_NC - value_NC.mean(0)) ** 2) / 3
    new = context([[1000 + i for i in range(9)]], [0])
    assert np.isfinite(Forecast(known, value_NC)(new)).all()


# Estimates


def test_estimates_are_conditional_means_of_the_mixed_model():
    at, by = field([12, 0, 30, 7], [30, 25, 30, 40], clip=()), noise(2)
    found = at.estimate(by)
    n, width = len(at.seen_N), 2
    # unknowns: the problem's shift, each candidate's, and each candidate's noise before and after what was seen
    shift = slice(0, width)
    own = [slice(width * (1 + k), width * (2 + k)) for k in range(n)]
    before = [slice(width * (1 + n + k), width * (2 + n + k)) for k in range(n)]
    after = [slice(width * (1 + 2 * n + k), width * (2 + 2 * n + k)) for k in range(n)]
    prior = np.zeros((width * (1 + 3 * n),) * 2)
    prior[shift, shift] = by.problem_CC
    for k in range(n):
        prior[own[k], own[k]] = by.candidate_CC
        prior[before[k], before[k]] = by.token_CC * at.seen_N[k]
        prior[after[k], after[k]] = by.token_CC * (at.tokens_N - at.seen_N)[k]
    sums, ahead = np.zeros((n * width, len(prior))), np.zeros((n * width, len(prior)))
    for k, c in itertools.product(range(n), range(width)):
        for row, count, rest in ((sums, at.seen_N[k], before[k]), (ahead, (at.tokens_N - at.seen_N)[k], after[k])):
            row[k * width + c, [c, own[k].start + c]] = count
            row[k * width + c, rest.start + c] = 1
    seen = np.repeat(at.seen_N > 0, width)
    residual = (at.sum_NC - at.expected_NC).reshape(-1)[seen]
    gain = ahead @ prior @ sums[seen].T @ np.linalg.inv(sums[seen] @ prior @ sums[seen].T)
    expected = at.sum_NC + at.expected_total_NC - at.expected_NC + (gain @ residual).reshape(n, width)
    np.testing.assert_allclose(found.total_NC, expected, rtol=1e-6)
    known, a, s = prior[width:, width:], ahead[:, width:], sums[seen][:, width:]  # the problem's shift counts as known
    covariance = a @ (known - known @ s.T @ np.linalg.pinv(s @ known @ s.T) @ s @ known) @ a.T
    for k in range(n):
        block = slice(k * width, (k + 1) * width)
        np.testing.assert_allclose(found.covariance_NCC[k], covariance[block, block], rtol=1e-5, atol=1e-9)


def test_what_was_read_to_its_end_is_exact():
    at = field([30, 10], [30, 40])
    found = at.estimate(noise(3))
    np.testing.assert_array_equal(found.total_NC[0], at.sum_NC[0])
    assert not found.covariance_NCC[0].any() and found.covariance_NCC[1].any()


def test_noise_is_found_again():
    rng = np.random.default_rng(0)
    truth = noise(2, scale=0.1)
    residuals, problem = [], []
    for p in range(400):
        shift = rng.multivariate_normal([0, 0], truth.problem_CC)
        for _ in range(6):
            own = shift + rng.multivariate_normal([0, 0], truth.candidate_CC)
            residuals.append(own + rng.multivariate_normal([0, 0], truth.token_CC, int(rng.integers(40, 160))))
            problem.append(p)
    found = Noise.of(residuals, np.array(problem))
    for name in vars(truth):
        np.testing.assert_allclose(getattr(found, name), getattr(truth, name), rtol=0.25, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_the_rules_and_slopes_their_derivatives(score):
    at = field([12, 5, 30, 7, 9, 14], [30.0, 25, 30, 40, 33, 28], problems=2, clip=(100, None))
    found, one = at.estimate(noise(4, scale=1e-3)), contest(score)
    enters_N = np.array([True, True, True, True, False, True])
    score_N = found.scores(one, enters_N)
    np.testing.assert_array_equal(score_N[enters_N], score(found.candidates().where(enters_N)))
    assert np.isnan(score_N[4])
    slope_NC = found.slopes(one, enters_N)
    for i, c in itertools.product(np.flatnonzero(enters_N), range(4)):
        moved = found.total_NC.copy()
        moved[i, c] += (step := 1e-5)
        after = Estimate(field=at, total_NC=moved, covariance_NCC=found.covariance_NCC)
        now = after.scores(one, enters_N)[i]
        if isinstance(score, Lark):  # with the problem's sums as they were
            rows = enters_N & (at.groups.index_N == at.groups.index_N[i])
            scale_N = at.tokens_N**-score.length_exponent
            loss_N, brier_N = (found.total_NC[:, k] / at.tokens_N for k in (0, 1))
            total, rho = loss_N[rows].sum(), (brier_N * scale_N)[rows].sum() / loss_N[rows].sum()
            now = (2 * moved[i, 1] * scale_N[i] - rho * moved[i, 0]) / at.tokens_N[i] / total
        change = now - score_N[i]
        assert slope_NC[i, c] == pytest.approx(change / step, rel=1e-4, abs=1e-9)


# Who is given up


def test_beaten_is_by_enough_others_that_still_race():
    at = field([12, 5, 30, 7, 9, 14, 3, 8], [30, 25, 30, 40, 33, 28, 60, 50], problems=2)
    found, one = at.estimate(noise(3, scale=0.02)), contest(Likelihood(), budget=2)
    enters_N, out_N = np.arange(8) != 1, np.arange(8) == 2
    score_N, slope_NC = found.scores(one, enters_N), found.slopes(one, enters_N)
    for margin in (0.0, 0.5, 1.5):
        for i in range(8):
            ahead = 0
            for j in range(8):
                if j != i and j % 2 == i % 2 and enters_N[j] and not out_N[j]:
                    variance = sum(slope_NC[k] @ found.covariance_NCC[k] @ slope_NC[k] for k in (i, j))
                    ahead += (score_N[j] - score_N[i]) > margin * math.sqrt(variance)
            assert found.beaten(one, enters_N, out_N, margin)[i] == (not enters_N[i] or ahead >= 2), (margin, i)
    np.testing.assert_array_equal(found.beaten(one, enters_N, out_N, math.inf), ~enters_N)


def made_up(problems, *, seed=0, gap=0.0, candidates=6):
    """Problems whose candidates differ in how hard they are; candidate 0 is harder than the rest by `gap` nats."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(problems):
        rows, values = [], []
        for k in range(candidates):
            tokens = int(rng.integers(60, 200))
            ids = [1, 2, *rng.integers(3, 50, tokens).tolist()]
            rows.append(Encoded(input_ids=ids, prompt_tokens=2, end_of_turn=tokens - 1, steps=[0]))
            level = rng.normal(0, 0.15) + (gap if k == 0 else 0.0)
            surprisal = np.maximum(rng.gamma(1, 1, tokens) + level, 0.01)
            values.append(np.stack([surprisal, 1 - np.exp(-surprisal), 1 + np.floor(surprisal**3)], 1))
        made.append((rows, values))
    return made


def learnt(made, one, **settings):
    calibration = [(Problem.of(rows, {one: np.ones(len(rows), bool)}), values) for rows, values in made]
    return Judge([one], calibration, **settings)


def run(judge, rows, values, enters):
    """The race of one problem on values that are known already: who is given up, tokens read."""
    heat = Heat(judge, Problem.of(rows, enters))
    read = [0] * len(rows)
    for cut in cuts(max(len(x) for x in values)):
        read = [n if out else min(cut, len(x)) for n, out, x in zip(read, heat.out_K, values, strict=True)]
        heat.give_up([x[:n] for x, n in zip(values, read, strict=True)])
    return heat.out_K, [n if out else len(x) for n, out, x in zip(read, heat.out_K, values, strict=True)]


def test_a_candidate_far_behind_is_given_up_early_and_never_the_best():
    one = contest(Likelihood(), budget=1)
    judge = learnt(made_up(30), one, confidence=0.8)
    kept = 0
    for rows, values in made_up(20, seed=1, gap=2.0):
        out_K, read = run(judge, rows, values, {one: np.ones(len(rows), bool)})
        assert out_K[0] and read[0] <= 64 and not out_K.all()
        kept += not out_K[np.argmin([x[:, 0].mean() for x in values])]
    assert kept >= 14  # 0.8 of 20, less two standard errors


@pytest.mark.parametrize("score", SCORES)
def test_a_problems_race_is_the_rehearsed_one(score):
    one = contest(score, budget=2, places=3)
    made = made_up(12)
    judge = learnt(made, one, confidence=0.6)
    assert judge.gives_up
    for rows, values in made_up(4, seed=2, gap=0.5):
        problem = Problem.of(rows, {one: np.ones(len(rows), bool)})
        trial, _ = rehearsal([(problem, values)], clip=judge.clips, forecast=judge.forecast)
        out_N, read_N, final = trial.race(judge.margins, problem.enters, judge.noise)
        out_K, read = run(judge, rows, values, problem.enters)
        np.testing.assert_array_equal(out_K, out_N)
        np.testing.assert_array_equal(read, read_N)
        np.testing.assert_array_equal(np.isnan(final[one]), out_N)
        assert (~out_N).sum() >= one.places


def test_those_that_do_not_enter_are_not_read():
    one = contest(Likelihood(), budget=1)
    judge = learnt(made_up(30), one, confidence=0.8)
    (rows, values), *_ = made_up(1, seed=3)
    enters_K = np.array([True, True, False, True, True, False])
    out_K, read = run(judge, rows, values, {one: enters_K})
    assert out_K[~enters_K].all() and read[2] == read[5] == 0 and not out_K.all()


def test_with_confidence_1_nobody_is_given_up():
    one = contest(Lark())
    assert calibration_size(500, 1) == 500
    judge = learnt(made_up(12), one, confidence=1)
    assert not judge.gives_up and judge.record == [
        {"rule": "rule", "places": 2, "margin": math.inf, "overlap_in_calibration": 1.0}
    ]


def trial_and_noise(one, problems=40):
    trial, by = rehearsal([(Problem.of(rows, {}), values) for rows, values in made_up(problems)], clip=(100,))
    return trial, {one: np.ones(len(trial.tokens_N), bool)}, by


def overlaps(trial: Trial, one, enters, by, margin):
    """Of the choices, problem by problem, from the whole values."""
    out_N, _, final = trial.race({one: margin}, enters, by)
    whole_N = trial.sum_JNC[-1]
    full_N = -whole_N[:, 0] / trial.tokens_N
    shares = []
    for rows in trial.groups.split():
        left = [i for i in rows if not out_N[i]]
        right = set(sorted(rows, key=lambda i: -full_N[i])[: one.budget])
        shares.append(len(right & set(sorted(left, key=lambda i: -full_N[i])[: one.budget])) / len(right))
        assert np.isnan(final[one][rows][out_N[rows]]).all()
    return np.array(shares)


@pytest.mark.parametrize("confidence", [0.7, 0.9])
def test_margin_is_the_narrowest_that_keeps_the_confidence(confidence):
    one = contest(Likelihood())
    trial, enters, by = trial_and_noise(one)
    margin, overlap = margin_of(one, trial, enters, by, confidence=confidence)
    worst = np.maximum.reduce([1 - overlaps(trial, one, enters, by, m) for m in np.arange(margin, 5.01, 0.2)])
    assert (worst.sum() + 1) / 41 <= 1 - confidence and overlap == pytest.approx(1 - worst.mean())
    narrower = np.maximum(worst, 1 - overlaps(trial, one, enters, by, margin - 0.2))
    assert (narrower.sum() + 1) / 41 > 1 - confidence


def test_too_few_problems_calibrate_nothing():
    one = contest(Likelihood())
    assert margin_of(one, *trial_and_noise(one, problems=8), confidence=0.95) == (math.inf, 1.0)


def test_an_infinite_margin_gives_the_full_choice():
    one = contest(Likelihood())
    trial, enters, by = trial_and_noise(one)
    out_N, read_N, final = trial.race({one: math.inf}, enters, by)
    assert not out_N.any() and np.array_equal(read_N, trial.tokens_N)
    np.testing.assert_allclose(final[one], -trial.sum_JNC[-1][:, 0] / trial.tokens_N)
    np.testing.assert_array_equal(trial.overlap(one, enters, by, final[one]), 1)


def test_cuts_and_sizes():
    assert cuts(20) == [0] and cuts(33) == [0, 32] and cuts(500) == [0, 32, 64, 96, 144, 216, 324, 486]
    assert [calibration_size(n, 0.95) for n in (10, 100, 1500, 9000)] == [10, 60, 75, 100]


def test_top_takes_the_best_with_a_score():
    groups = Groups(np.array([0, 0, 0, 1, 1]), 2)
    np.testing.assert_array_equal(top(groups, np.array([1.0, 3, np.nan, np.nan, 0]), 2), [1, 1, 0, 0, 1])


def test_a_raced_rule_scores_only_what_was_not_given_up():
    found = field([5, 5, 5], [30, 30, 30]).estimate(noise(3)).candidates()
    one = raced(rule(Likelihood()))
    np.testing.assert_array_equal(one.scores(found), rule(Likelihood()).scores(found))
    stopped = type(found)(
        **{**vars(found), "statistics": {**found.statistics, "stopped": np.array([False, True, False])}}
    )
    np.testing.assert_array_equal(np.isnan(one.scores(stopped)), [False, True, False])
    assert one.needs == rule(Likelihood()).needs

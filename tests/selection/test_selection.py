import json
import math
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
from scipy.stats import spearmanr

from lark.common.groups import Groups
from lark.selection.candidates import Candidates
from lark.selection.export import export_selection
from lark.selection.policies import Chi2, Prior, Sample, make_policy
from lark.selection.rule import Between, Rule
from lark.selection.scores.statistics import Constant, Lark, Length, Likelihood, Random
from lark.selection.selection import Selection, compute_mean_spearman, select

TEACHERS = np.array(["terse", "verbose", "careful", "terse", None], object)


def pool(problems=30, seed=0) -> Candidates:
    """Problems p0, p1, ... of 1 to 5 candidates each; row numbers start at 100."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, problems)
    problem_id = np.repeat([f"p{i}" for i in range(problems)], sizes).astype(object)
    candidate_id = np.concatenate([np.arange(size) for size in sizes]).astype(str).astype(object)
    rows = len(problem_id)
    columns = {
        "teacher": TEACHERS[candidate_id.astype(int)],
        "correct": rng.choice([1.0, 0.0, math.nan], rows),
        "quality": np.array([None if x < 0.1 else x for x in rng.random(rows)], object),
        "label": np.array(["good"] * rows, object),
    }
    return Candidates(
        problem_id=problem_id,
        candidate_id=candidate_id,
        row_N=np.arange(rows) + 100,
        statistics={
            "loss": rng.uniform(0.1, 2, rows),
            "brier": rng.uniform(0, 1, rows),
            "num_tokens": rng.integers(1, 500, rows),
        },
        read_column=lambda name, row_N: columns[name][row_N - 100],
    )


def rule(score=None, *, filter=None, name="mine", **policy) -> Rule:
    return Rule(name=name, score=score or Lark(), policy=make_policy(**(policy or {"budget": 2})), filter=filter)


def ids(rows: Candidates, selection: Selection) -> dict[tuple[str, str], float]:
    """Weight by (problem, candidate)."""
    place = {row: i for i, row in enumerate(rows.row_N.tolist())}
    chosen = [place[row] for row in selection.row.tolist()]
    keys = zip(rows["problem_id"][chosen], rows["candidate_id"][chosen], strict=True)
    return dict(zip(keys, selection.weight.tolist(), strict=True))


def counts(selection: Selection) -> dict[str, int]:
    return selection.record["counts"]


POLICIES = [
    {"budget": 2},
    {"tau": 0.05},
    {"radius": 0.5},
    {"kind": "kl", "budget": 3},
    {"kind": "top_b", "budget": 3},
    {"kind": "sample", "budget": 3},
    {"kind": "prior"},
]


@pytest.mark.parametrize("policy", POLICIES)
def test_shares_sum_to_one_per_problem_and_weights_have_mean_one(policy):
    rows = pool()
    selection = select(rule(**policy), rows, seed=0)
    chosen = selection.row - 100
    for problem in set(rows["problem_id"]):
        assert selection.q[rows["problem_id"][chosen] == problem].sum() == pytest.approx(1, rel=1e-12)
    assert selection.weight.mean() == pytest.approx(1, rel=1e-12)
    ratio = selection.weight / selection.q
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert (selection.q > 0).all() and (np.diff(selection.row) > 0).all()
    assert selection.score.tolist() == selection.score_N[chosen].tolist()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("score", [Lark(), Constant(), Random(seed=3)])
def test_shuffling_the_pool_changes_no_selection(score, policy):
    rows = pool()
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = Candidates(
        problem_id=rows.problem_id[order],
        candidate_id=rows.candidate_id[order],
        row_N=rows.row_N[order],
        statistics={name: column[order] for name, column in rows.statistics.items()},
        read_column=rows.read_column,
    )
    straight, mixed = (ids(r, select(rule(score, **policy), r, seed=0)) for r in (rows, shuffled))
    assert straight.keys() == mixed.keys()
    np.testing.assert_allclose([mixed[key] for key in straight], list(straight.values()), rtol=1e-9)


@pytest.mark.parametrize("policy", POLICIES[:6])
def test_a_baseline_takes_as_many_rows_of_each_problem_with_equal_weights(policy):
    rows = pool()
    selector = select(rule(filter="correct", **policy), rows, seed=0)
    baseline = select(rule(Length(sign=1), budget=1), rows, seed=0, reference_selection=selector)
    problem_N = rows["problem_id"]
    taken = [Counter(problem_N[chosen.row - 100]) for chosen in (selector, baseline)]
    assert taken[0] == taken[1] == dict(selector.taken_by_problem)
    chosen = set((baseline.row - 100).tolist())
    for problem, number in taken[0].items():
        longest = sorted(np.flatnonzero(problem_N == problem), key=lambda i: -rows["num_tokens"][i])
        assert chosen & set(longest) == set(longest[:number])
    assert baseline.q == pytest.approx([1 / taken[0][problem] for problem in problem_N[baseline.row - 100]])
    assert counts(baseline)["short_of_selector"] == 0
    assert baseline.record["matched"] and baseline.record["policy"]["kind"] == "top_b"


def test_a_baseline_that_runs_out_of_rows_counts_how_many():
    rows = pool()
    selector = select(rule(budget=3), rows, seed=0)
    baseline = select(rule(Length(sign=1), filter="correct"), rows, seed=0, reference_selection=selector)
    passing = Counter(rows["problem_id"][rows["correct"] == 1])
    short = sum(max(0, number - passing[problem]) for problem, number in selector.taken_by_problem.items())
    assert short > 0
    assert counts(baseline)["short_of_selector"] == short == len(selector.row) - len(baseline.row)
    assert short > 0 and not baseline.record["matched"]


def test_all_takes_every_candidate_with_one_over_k_and_is_unmatched():
    rows = pool()
    selector = select(rule(), rows, seed=0)
    everything = select(rule(Constant(), kind="prior"), rows, seed=0, reference_selection=selector)
    assert everything.row.tolist() == rows.row_N.tolist()
    np.testing.assert_allclose(everything.q, 1 / rows.groups.spread(rows.groups.size))
    assert everything.record["matched"] is False
    assert select(rule(Constant(), kind="prior"), rows, seed=0).record["matched"] is True


def test_rows_of_weight_zero_leave_the_selection_and_are_counted():
    rows = Candidates(
        problem_id=np.array(["p"] * 4, object),
        candidate_id=np.array(list("0123"), object),
        row_N=np.arange(4),
        statistics={"loss": np.array([1.0, 2.0, 2.0, 3.0]), "num_tokens": np.arange(4)},
        read_column=lambda name, row_N: np.full(len(row_N), "t", object),
    )
    selection = select(rule(Likelihood(), budget=2), rows, seed=0)
    assert selection.row.tolist() == [0]  # the second best ties with the best excluded one
    assert selection.record["policy"]["zero_weight_in_top_b"] == 1
    assert counts(selection)["not_chosen"] == 3


def test_candidates_without_a_score_are_never_chosen_and_are_counted():
    rows = pool()
    missing_N = np.arange(len(rows)) % 3 == 0

    def score(candidates: Candidates) -> np.ndarray:
        missing = (None, math.nan, -math.inf)
        return np.array([missing[i % 9 // 3] if i % 3 == 0 else 1.0 * i for i in range(len(candidates))], object)

    policies = Chi2(budget=5), Prior(), Chi2(tau=1e9), Sample(budget=50)
    for policy in policies:
        selection = select(Rule(name="mine", score=score, policy=policy), rows, seed=0)
        assert not missing_N[selection.row - 100].any()
        assert counts(selection)["dropped_without_score"] == missing_N.sum()
        without = set(rows["problem_id"]) - set(rows["problem_id"][~missing_N])
        assert counts(selection)["problems_without_choice"] == len(without) > 0
    baseline = select(rule(score), rows, seed=0, reference_selection=select(rule(budget=5), rows, seed=0))
    assert not missing_N[baseline.row - 100].any()


def test_the_counts_account_for_every_candidate():
    rows = pool()
    selection = select(rule(Likelihood(), filter="correct"), rows, seed=0)
    figures = counts(selection)
    assert figures["candidates"] == len(rows)
    assert figures["dropped_by_filter"] == int((rows["correct"] != 1).sum())
    parts = ("dropped_by_filter", "dropped_without_score", "chosen", "not_chosen")
    assert sum(figures[part] for part in parts) == len(rows)
    assert figures["problems"] - figures["problems_without_choice"] == len(selection.taken_by_problem)


def test_filters_of_every_kind(tmp_path, monkeypatch):
    rows = pool()
    (tmp_path / "my_filter_in_cwd.py").write_text("def short(rows):\n    return rows['num_tokens'] < 200\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    number_N = np.array([math.nan if x is None else x for x in rows["quality"]])
    filters = {
        "correct": rows["correct"] == 1,
        "my_filter_in_cwd:short": rows["num_tokens"] < 200,
        Between(column="num_tokens", min=100, max=300): (rows["num_tokens"] >= 100) & (rows["num_tokens"] <= 300),
        Between(column="quality", min=0.5): number_N >= 0.5,
        Between(column="quality"): ~np.isnan(number_N),
        (lambda candidates: [None, *[True] * (len(candidates) - 1)]): np.arange(len(rows)) > 0,
        None: np.ones(len(rows), bool),
    }
    for which, expected in filters.items():
        mine = rule(filter=which)
        assert mine.compute_mask(rows).tolist() == expected.tolist(), which
        selection = select(mine, rows, seed=0)
        assert expected[selection.row - 100].all()
        assert np.isnan(selection.score_N[~expected]).all()


def test_a_prior_by_teacher_and_by_column():
    rows = pool()
    with pytest.raises(ValueError, match="prior=per_teacher needs a teacher in every candidate"):
        select(rule(Constant(), kind="prior", prior="per_teacher"), rows, seed=0)
    by_quality = select(rule(Constant(), kind="prior", prior="num_tokens"), rows, seed=0)
    tokens_N = rows["num_tokens"].astype(float)
    np.testing.assert_allclose(by_quality.q, tokens_N / rows.groups.spread(rows.groups.sum(tokens_N)))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda rows: None, "the score of selector mine is None for .* candidates; return one number a row"),
        (lambda rows: np.zeros((len(rows), 2)), r"the score of selector mine has shape \(\d+, 2\) for"),
        (lambda rows: 0.5, r"has shape \(\) for"),
        (lambda rows: np.zeros(len(rows) - 1), r"has shape .* return one number a row"),
        (lambda rows: [[0.0], [0.0, 1.0]] * len(rows), "is not one number for each of"),
        (
            lambda rows: ["high"] * len(rows),
            r"is not one number for each of \d+ candidates \(could not convert string to float",
        ),
        (lambda rows: np.full(len(rows), math.inf), r"is \+inf for some rows; return finite numbers or NaN"),
        (lambda rows: np.full(len(rows), math.nan), r"selector mine chose nothing of \d+ candidates \(0 filtered"),
    ],
)
def test_a_custom_score_that_is_not_one_number_a_row_is_one_sentence(score, message):
    with pytest.raises(ValueError, match=message) as error:
        select(rule(score), pool(), seed=0)
    assert "\n" not in str(error.value)


def test_what_a_custom_score_or_filter_raises_is_one_sentence_with_its_line():
    def broken(candidates):
        return candidates["num_tokens"] + None

    line = broken.__code__.co_firstlineno + 1
    for wrong, what in ((rule(broken), "score"), (rule(filter=broken), "filter")):
        said = (
            rf"the {what} of selector mine raised TypeError \(test_selection.py, line {line}\): .* \(correct it; HYDRA"
        )
        with pytest.raises(ValueError, match=said):
            select(wrong, pool(), seed=0)


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("num_tokens", "the filter of selector mine must be true, false or missing, but is .*Between"),
        ("label", "the filter of selector mine is not one number for each of .*'good'"),
        (Between(column="label"), "selector.filter.column=label is not one number for each of .*'good'"),
        (Between(column="num_tokens", min=1000), r"chose nothing of (\d+) candidates \(\1 filtered, 0 without a score"),
        (lambda rows: None, "the filter of selector mine is None"),
    ],
)
def test_a_filter_that_is_no_mask_or_lets_nothing_through_is_one_sentence(filter, message):
    with pytest.raises(ValueError, match=message):
        select(rule(filter=filter), pool(), seed=0)


def test_settings_of_a_rule_are_checked():
    with pytest.raises(ValueError, match=r"selector\.filter\.min=5 is above selector\.filter\.max=4"):
        Between(column="num_tokens", min=5, max=4)
    with pytest.raises(ValueError, match=r"selector\.score=None is not a score"):
        Rule(name="mine", score=None, policy=Chi2(budget=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"selector\.filter=\['correct'\] is not a filter"):
        rule(filter=["correct"])
    with pytest.raises(ValueError, match=r"selector\.score='loss' names no function"):
        rule("loss")


# --- the record


def test_the_records_figures_by_hand():
    rows = Candidates(
        problem_id=np.array(["p", "p", "p", "q", "q"], object),
        candidate_id=np.array(list("01201"), object),
        row_N=np.arange(5),
        statistics={"loss": np.array([1.0, 2.0, 4.0, 3.0, 1.0]), "num_tokens": np.array([10, 20, 30, 40, 50])},
        read_column=lambda name, row_N: np.array(["a", "b", "a", "b", "b"], object)[row_N],
    )
    selection = select(rule(Likelihood(), budget=2, name="likelihood"), rows, seed=0)
    # p: scores -1, -2 above the threshold -4, so 3 and 2 of 5; q: nothing is excluded, so 1/2 each
    np.testing.assert_allclose(selection.q, [0.6, 0.4, 0.5, 0.5])
    np.testing.assert_allclose(selection.weight, [1.2, 0.8, 1.0, 1.0])
    record = selection.record
    assert record["rule"] == "likelihood" and record["tokens"] == 120
    assert record["effective_sample_size"] == pytest.approx(16 / (1.44 + 0.64 + 2))
    assert list(record["teacher_share"]) == ["b", "a"]
    assert record["teacher_share"] == pytest.approx({"b": 0.7, "a": 0.3})
    assert record["within_problem_spearman"] == pytest.approx({"loss": -1.0, "num_tokens": 0.0})
    assert record["policy"]["budget"] == 2 and record["policy"]["problems_within_budget"] == 1
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize("policy", POLICIES)
def test_every_record_is_plain_json(policy):
    rows = pool()
    selector = select(rule(**policy), rows, seed=0)
    for selection in (selector, select(rule(Random(seed=0)), rows, seed=0, reference_selection=selector)):
        assert json.loads(json.dumps(selection.record, allow_nan=False)) == selection.record


def test_within_problem_spearman_is_the_mean_of_scipys():
    rng = np.random.default_rng(0)
    problem_N = rng.integers(0, 60, 300)
    a_N, b_N = rng.integers(0, 5, 300).astype(float), rng.integers(0, 5, 300)  # many ties, some constant problems
    a_N[rng.random(300) < 0.2] = math.nan
    each = []
    for problem in range(60):
        inside = (problem_N == problem) & ~np.isnan(a_N)
        if len(set(a_N[inside])) > 1 and len(set(b_N[inside])) > 1:
            each.append(spearmanr(a_N[inside], b_N[inside])[0])
    assert 30 < len(each) < 60
    assert compute_mean_spearman(a_N, b_N, Groups.from_ids(problem_N)) == pytest.approx(np.mean(each), rel=1e-12)


def test_within_problem_spearman_without_a_problem_that_counts_is_none():
    groups = Groups.from_ids(["p", "p", "q"])
    assert compute_mean_spearman(np.full(3, math.nan), np.arange(3), groups) is None
    assert compute_mean_spearman(np.ones(3), np.arange(3), groups) is None


# --- export

TEXTS = ["plain", 'quotes " and \\boxed{\\frac{1}{2}}', "lines\n\r\nand\ttabs", "☃ 𝒳 \u2028 é", ""]


def pool_row(row: int) -> dict:
    turns = [{"role": "user", "content": f"Problem {row}\n?"}, {"role": "assistant", "content": TEXTS[row % 5]}]
    return {
        "problem_id": f"p{row}",
        "candidate_id": "0",
        "teacher": None if row % 2 else "teacher",
        "answer": str(row),
        "correct": (True, False, None)[row % 3],
        "messages": turns,
    }


def test_the_export_loads_and_keeps_every_text(tmp_path):
    selection = select(rule(), pool(), seed=0)
    path = tmp_path / "selection.jsonl"
    export_selection(selection, lambda row_N: map(pool_row, row_N.tolist()), path, name="lark")
    lines = [json.loads(line) for line in path.read_bytes().decode().removesuffix("\n").split("\n")]
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(lines) == len(loaded) == len(selection.row)  # type: ignore[arg-type]
    for i, (line, row) in enumerate(zip(lines, loaded, strict=True)):
        source = pool_row(int(selection.row[i]))
        assert line == row
        assert line["messages"] == source.pop("messages")
        assert line["weight"] == selection.weight[i]
        expected = {**source, "rule": "lark", "score": selection.score[i], "share": selection.q[i]}
        assert line["meta"] == expected


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    selection = select(rule(), pool(), seed=0)
    path = tmp_path / "selection.jsonl"
    path.write_text("earlier")
    with pytest.raises(ValueError, match="longer"):
        export_selection(selection, lambda row_N: [pool_row(0)], path, name="lark")
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]

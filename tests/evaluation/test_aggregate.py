import json

import pytest

from lark.evaluation.aggregate import figures_of, summarise, write_figures


def record(problem, correct, *, answer: str | None = "1", stop=True, timed_out=False):
    return dict(
        problem_id=problem,
        correct=correct,
        answer=answer,
        boxed=correct,
        stop=stop,
        truncated=not stop,
        timed_out=timed_out,
        oversized=False,
        num_tokens=10 if stop else 20,
    )


RECORDS = [
    record("a", True),
    record("a", False, answer="2"),
    record("b", False, stop=False, timed_out=True, answer=None),
    record("b", False),
]


def test_summary_by_hand():
    assert summarise(RECORDS, pass_at=(1, 2)) == {
        "avg@2": 0.25,
        "pass@1": 0.25,
        "pass@2": 0.5,
        "maj@2": 0.25,
        "boxed": 0.25,
        "stop": 0.75,
        "truncated": 0.25,
        "tokens": 12.5,
        "timeouts": 1,
        "oversized": 0,
        "problems": 2,
        "samples": 2,
    }


def problem(name, **more):
    return {"problem_id": name, "problem": "?", "answer": "1", **more}


def test_levels_in_their_order():
    names = {"a": 10, "b": "2", "c": None, "d": "hard", "e": 2}
    problems = [problem(name, level=level) for name, level in names.items()]
    records = [record(name, name in "be") for name in names for _ in range(2)]
    levels = figures_of(records, problems, pass_at=[1], kind="math")["levels"]
    assert list(levels) == ["2", "10", "hard", "none"]
    assert [of["metrics"]["problems"] for of in levels.values()] == [2, 1, 1, 1]
    assert [of["metrics"]["avg@2"] for of in levels.values()] == [1, 0, 0, 0]
    assert levels["2"]["interval"]["low"] == levels["2"]["interval"]["high"] == 1
    assert not figures_of(records, [problem(name) for name in names], pass_at=[1], kind="math")["levels"]


def test_right_answers_that_differ_are_one_unless_a_problem_may_have_several():
    records = [record("a", True, answer="1 + 1"), record("a", True, answer="2 + 0")] + 2 * [record("a", False)]
    credit = {"math": 0.5, "reasoning_gym": 0.0}
    for kind, expected in credit.items():
        assert figures_of(records, [problem("a")], pass_at=[1], kind=kind)["metrics"]["maj@4"] == expected
        own = figures_of(records, [problem("a", checker=kind)], pass_at=[1], kind="exact")
        assert own["metrics"]["maj@4"] == expected


def test_what_is_written(tmp_path):
    problems = [problem("a", level=1), problem("b", level=1)]
    figures = {
        "eval": figures_of(RECORDS, problems, pass_at=[1], kind="math"),
        "other": figures_of(RECORDS[:2], [problem("a")], pass_at=[1], kind="math"),
    }
    write_figures(tmp_path, {"some": "identity"}, figures)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert list(written) == ["identity", "sets", "intervals", "levels"]
    assert list(written["levels"]) == ["eval"]
    assert written["sets"]["eval"] == written["levels"]["eval"]["1"]["metrics"]
    interval = written["intervals"]["eval"]
    assert (interval["metric"], interval["estimate"], interval["problems"]) == ("avg@2", 0.25, 2)
    assert 0 <= interval["low"] <= 0.25 <= interval["high"] <= 1
    one = written["intervals"]["other"]
    assert one["low"] is None and one["label"] == "one problem, no interval"


def test_as_many_samples_of_every_problem():
    with pytest.raises(AssertionError):
        summarise(RECORDS[:3])

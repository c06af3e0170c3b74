import json
import os
import time
from pathlib import Path

import pytest

from lark.answers.checker import KINDS, MAX_CHARACTERS, Answer, Checker, Verdict

PAIRS = [json.loads(line) for line in Path(__file__).with_name("answer_pairs.jsonl").read_text("utf-8").splitlines()]


def boxed(answer, gold, **fields):
    return Answer(text=rf"\boxed{{{answer}}}", gold=gold, **fields)


def test_verdicts_on_labelled_pairs():
    """Each pair has its own kind; `known` pairs are judged wrongly, and say why."""
    with Checker("exact", time_limit=60, workers=2) as checker:
        verdicts = checker.check([Answer(text=pair["text"], gold=pair["gold"], kind=pair["kind"]) for pair in PAIRS])
    apart = [
        f"{pair['kind']}: {pair['text']!r} for {pair['gold']!r} is {verdict.correct}, {pair['why']}"
        for pair, verdict in zip(PAIRS, verdicts, strict=True)
        if (verdict.correct == pair["correct"]) == ("known" in pair)
    ]
    assert not apart, "\n".join(apart)
    assert not any(verdict.timed_out or verdict.oversized for verdict in verdicts)


def test_labelled_pairs_are_many_and_of_both_outcomes():
    decided = [pair for pair in PAIRS if "known" not in pair]
    assert len(decided) >= 200
    for kind in ("math", "number", "choice"):
        outcomes = [pair["correct"] for pair in decided if pair["kind"] == kind]
        assert min(outcomes.count(True), outcomes.count(False)) >= 25
    assert len({(pair["kind"], pair["gold"], pair["text"]) for pair in PAIRS}) == len(PAIRS)


def test_only_algebra_takes_a_worker():
    items = [
        boxed("27.0", "27", kind="number"),
        boxed("B. x", "B", kind="choice"),
        boxed("a", "b", kind="exact"),
        boxed("27", "28"),
    ]
    with Checker("math") as checker:
        assert [v.correct for v in checker.check(items)] == [True, True, False, False]
        assert not checker._pools


def test_a_row_may_have_its_own_kind_and_pattern():
    items = [
        boxed("x+1", "1+x"),
        boxed("+01,000.00", "1000", kind="reasoning_gym", source_dataset="chain_sum"),
        Answer(text="I take B, finally", gold="B", kind="choice", pattern="take ([A-D])"),
        Answer(text="result: 5", gold="5", kind="number"),
        boxed("0.5", "1/2", kind="exact"),
    ]
    with Checker("math", pattern=r"result: (\S+)", workers=1) as checker:
        verdicts = checker.check(items)
    assert [v.correct for v in verdicts] == [True, True, True, True, False]
    assert [v.answer for v in verdicts] == ["x+1", "+01,000.00", "B", "5", "0.5"]


def test_hostile_answers_are_cut_off_and_the_others_are_judged():
    hostile = {
        "tower": "9^{9^{9^{9}}}",
        "nested": r"\sqrt{" * 1200 + "2" + "}" * 1200,
        "unread": r"\frac{",
        "null byte": "x\0",
        "surrogate": "x\ud800",
        "backslashes": "\\" * 9_000,
    }
    items = [boxed(answer, "5") for answer in hostile.values()]
    sane = [boxed("(x+1)^2", "x^2+2x+1"), boxed(r"\sqrt{8}", r"2\sqrt{2}")]
    with Checker("math", time_limit=2, workers=2) as checker:
        verdicts = checker.check([*sane, *items])
        again = checker.check(sane)  # workers that were killed have been replaced
    cut_off = [name for name, verdict in zip(hostile, verdicts[2:], strict=True) if verdict.timed_out]
    assert not any(verdict.correct for verdict in verdicts[2:])
    assert "tower" in cut_off and not {"unread", "null byte", "surrogate"} & set(cut_off)
    assert [v.correct for v in again] == [True, True]


@pytest.mark.parametrize("answer", ["1+" * 400_000, "{" * 500_000 + "}" * 500_000, r"\frac{" * 10_000 + "}{}" * 10_000])
@pytest.mark.parametrize("kind", ["math", "reasoning_gym"])
def test_overlong_answers_reach_no_worker(answer, kind):
    with Checker(kind) as checker:
        (verdict,) = checker.check([boxed(answer, "5", source_dataset="chain_sum")])
        assert verdict == Verdict(correct=False, answer=answer, oversized=True)
        assert not checker._pools
    assert len(answer) > MAX_CHARACTERS


@pytest.mark.parametrize("kind", ["number", "choice", "exact"])
def test_overlong_answers_cost_linear_time(kind):
    items = [boxed(text, "A" if kind == "choice" else "5") for text in ("1+" * 400_000, "(" * 900_000, "A " * 400_000)]
    start = time.process_time()
    with Checker(kind) as checker:
        assert not any(verdict.correct for verdict in checker.check(items))
    assert time.process_time() - start < 5


def test_a_pattern_that_backtracks_without_end_is_cut_off():
    hostile, sane = Answer(text="a" * 5_000, gold="5"), Answer(text="aab", gold="aa", kind="exact")
    with Checker("number", pattern=r"((?:a+)+)b") as checker:
        verdicts = checker.check([hostile, sane])
    assert [v.timed_out for v in verdicts] == [True, False]
    assert [v.correct for v in verdicts] == [False, True]


def test_code_in_an_answer_does_no_harm(tmp_path):
    # This verifier evaluates answers as Python.
    witness = tmp_path / "witness"
    codes = [
        f"open({str(witness)!r}, 'w').write('x')",
        f"__import__('os').system('touch {witness}')",
        f"__import__('subprocess').run(['touch', {str(witness)!r}])",
        f"__import__('os').kill({os.getpid()}, 0)",
        "__import__('os')._exit(1)",
    ]
    items = [boxed(code, "1 2 3", source_dataset="spiral_matrix") for code in [*codes, "1  2 3", "1 2 3"]]
    with Checker("reasoning_gym", time_limit=20, workers=1) as checker:
        verdicts = checker.check(items)
    assert [v.correct for v in verdicts] == [False] * 6 + [True]
    assert [v.timed_out for v in verdicts] == [False] * 4 + [True, False, False]
    assert not witness.exists()


def test_math_takes_gold_first():
    # math-verify is not symmetric: the last side of a chain of equations is what a text states.
    with Checker("math", workers=1) as checker:
        verdicts = checker.check([boxed("2+3=5", "5"), boxed("5", "2+3=5")])
    assert [v.correct for v in verdicts] == [True, False]


def test_reasoning_gym_uses_the_verifier_of_the_data_set():
    chain = [boxed(a, "1000", source_dataset="chain_sum") for a in ("+01,000.00", "1001", "1E9")]
    incomplete = boxed("cold,cord", "cold,cord,card", source_dataset="word_ladder")  # its verifier wants metadata
    with Checker("reasoning_gym", workers=1) as checker:
        assert [v.correct for v in checker.check(chain)] == [True, False, False]
        with pytest.raises(ValueError, match=r"word_ladder.*start_word"):
            checker.check([incomplete])


@pytest.mark.parametrize(
    ("kind", "item", "named"),
    [
        ("number", boxed("1", "one"), "task.checker"),
        ("choice", boxed("1", "12"), "task.checker='choice'"),
        ("reasoning_gym", boxed("1", "1"), "source_dataset"),
        ("reasoning_gym", boxed("1", "1", source_dataset="no_such"), "no_such"),
        ("math", boxed("1", "one", kind="number"), "number"),
        ("math", boxed("1", "1", kind="sympy"), "checker='sympy'"),
        ("math", boxed("1", "1", pattern="(a"), "pattern"),
    ],
)
def test_gold_answers_that_cannot_be_checked_are_refused(kind, item, named):
    with pytest.raises(ValueError, match=named):
        Checker(kind).validate([item])


def test_unknown_kind_and_limits_are_named():
    with pytest.raises(ValueError, match=r"task\.checker='sympy'"):
        Checker("sympy")
    with pytest.raises(ValueError, match=r"evaluation\.time_limit=0"):
        Checker("math", time_limit=0)
    with pytest.raises(ValueError, match=r"evaluation\.workers=0"):
        Checker("math", workers=0)
    with pytest.raises(ValueError, match=r"task\.pattern"):
        Checker("math", pattern="answer is")
    assert set(KINDS) == {"math", "number", "choice", "reasoning_gym", "exact"}


def test_workers_end_with_the_block():
    with Checker("math", workers=1) as checker:
        checker.check([boxed("x+1", "x+2")])
        (pool,) = checker._pools.values()
        pids = list(pool._pool_manager.worker_manager.workers)
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

import os

import pytest

from lark.verify import Answer, Checker


def boxed(answer, gold, **fields):
    return Answer(text=rf"\boxed{{{answer}}}", gold=gold, **fields)


def test_exact_and_number_use_no_worker():
    items = [boxed("27.0", "27"), boxed("27", "27"), boxed("28", "27"), Answer(text="none", gold="27")]
    with Checker("exact") as exact, Checker("number") as number:
        assert [v.correct for v in exact.check(items)] == [False, True, False, False]
        verdicts = number.check(items)
        assert exact._pool is None and number._pool is None
    assert [v.correct for v in verdicts] == [True, True, False, False]
    assert [v.answer for v in verdicts] == ["27.0", "27", "28", None]


def test_math_in_workers_and_a_tower_of_exponents_is_cut_off():
    cases = [
        (r"\frac{1}{2}", "0.5", True),
        (r"x^2 + 2x + 1", "(x+1)^2", True),
        (r"\left(3, \frac{\pi}{2}\right)", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("p - q", "p - q", True),
        (r"\text{east}", r"\text{west}", False),
        ("6", "5", False),
        ("9^{9^{9^{9}}}", "5", False),
        (r"\frac{", "5", False),
    ]
    items = [boxed(answer, gold) for answer, gold, _ in cases]
    with Checker("math", time_limit=1.5, workers=1) as checker:
        verdicts = checker.check(items)
        again = checker.check(items[:2])  # the worker that was killed has been replaced
    assert [v.correct for v in verdicts] == [correct for _, _, correct in cases]
    assert [v.timed_out for v in verdicts] == [False] * 6 + [True, False]
    assert [v.correct for v in again] == [True, True]


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
        ("reasoning_gym", boxed("1", "1"), "source_dataset"),
        ("reasoning_gym", boxed("1", "1", source_dataset="no_such"), "no_such"),
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


def test_workers_end_with_the_block():
    with Checker("math", workers=1) as checker:
        checker.check([boxed("1", "2")])
        assert checker._pool is not None
        pids = list(checker._pool._pool_manager.worker_manager.workers)
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

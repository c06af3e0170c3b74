"""One label an arm: short, the same in every seed, free of what does not matter."""

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from summaries import accuracies, arm, run

from lark.comparison.labels import UNTRAINED, label_arms

SAME = accuracies([1.0, 0.5, 0.0])


def student(rule: str, hash: str, **more):
    return arm(rule, hash, SAME, **more)


def labels(runs) -> set[str]:
    return set(label_arms(runs).arms) - {UNTRAINED}


def test_an_arm_of_many_runs_is_one_arm_under_its_rule_s_name() -> None:
    runs = [
        run(
            selector=student("lark", f"a{seed}"),
            baseline=student(rule, f"{rule}{seed}"),
            seed=seed,
            settings={"budget": 2, "baseline.name": rule, "selector.name": "lark", "selector.score.seed": seed},
        )
        for seed in (0, 1, 2)
        for rule in ("random", "rsr", "longest")
    ]
    labelled = label_arms(runs)
    assert list(labelled.arms) == [UNTRAINED, "random", "lark", "rsr", "longest"]
    for of_seed in labelled.arms.values():
        assert list(of_seed) == [0, 1, 2]
    assert [one["hash"] for one in labelled.arms["lark"].values()] == ["a0", "a1", "a2"]
    assert labelled.runs[4] == {"before": UNTRAINED, "baseline": "rsr", "selector": "lark"}
    assert labelled.notes == ()


def test_settings_that_move_together_are_named_once_and_by_the_shorter_name() -> None:
    runs = [
        run(
            selector=student("lark", f"a{budget}{seed}"),
            seed=seed,
            settings={"selector.policy.budget": budget, "budget": budget, "sft.steps": None},
        )
        for seed in (0, 1)
        for budget in (1, 2)
    ]
    assert labels(runs) == {"lark budget=1", "lark budget=2"}


def test_the_rule_s_own_settings_go_by_the_name_they_are_set_by() -> None:
    kinds = [
        run(selector=student("lark", kind), settings={"selector.policy.kind": kind, "selector.policy._target_": kind})
        for kind in ("chi2", "top_b")
    ]
    assert labels(kinds) == {"lark selector.policy.kind=chi2", "lark selector.policy.kind=top_b"}
    clips = [
        run(selector=student("lark", "a"), baseline=student("rsr", f"{clip}"), settings={"baseline.score.clip": clip})
        for clip in (50, None)
    ]
    assert labels(clips) == {"lark", "rsr baseline.score.clip=50", "rsr baseline.score.clip=null"}


def test_the_seed_is_no_part_of_a_label_unless_it_was_set_by_itself() -> None:
    def runs(*pairs):
        return [
            run(
                selector=student("lark", f"a{seed}"),
                baseline=student("random", f"r{seed}{of_score}"),
                seed=seed,
                settings={"baseline.score.seed": of_score},
            )
            for seed, of_score in pairs
        ]

    assert labels(runs((0, 0), (1, 1), (2, 2))) == {"lark", "random"}
    set_apart = {"lark", "random baseline.score.seed=0", "random baseline.score.seed=5"}
    assert labels(runs((0, 0), (0, 5), (1, 0), (1, 5))) == set_apart


def test_a_seed_set_for_one_rule_is_none_of_another_s() -> None:
    """Random follows the run's seed, coverage keeps one; for a baseline both its own and its selector's count."""
    runs = [
        run(
            selector=student(selector, f"{selector}{seed}"),
            baseline=student(baseline, f"{baseline} for {selector}{seed}"),
            seed=seed,
            settings={
                f"{role}.score.seed": 0 if rule == "coverage" else seed
                for role, rule in (("selector", selector), ("baseline", baseline))
            },
        )
        for seed in (0, 1, 2)
        for selector, baseline in (("lark", "random"), ("lark", "coverage"), ("coverage", "random"))
    ]
    labelled = label_arms(runs)
    expected = {UNTRAINED, "lark", "random for lark", "random for coverage", "coverage", "coverage for lark"}
    assert set(labelled.arms) == expected
    assert all(list(of_seed) == [0, 1, 2] for of_seed in labelled.arms.values())


def matched_to(hashes: dict[str, str], seed: int = 0):
    """Runs of one selector each, with the random baselines these hashes are of."""
    return [
        run(
            selector=student(rule, f"{rule}{seed}"),
            baseline=student("random", f"{hash}{seed}"),
            seed=seed,
            settings={
                "selector.name": rule,
                "selector.score._target_": f"lark.selection.scores.statistics.{rule}",
                "baseline.name": "random",
            },
        )
        for rule, hash in hashes.items()
    ]


def test_baselines_are_named_after_their_selectors_where_these_matter() -> None:
    assert labels(matched_to({"lark": "r", "rsr": "r"})) == {"lark", "rsr", "random"}
    assert labels(matched_to({"lark": "r", "rsr": "s"})) == {"lark", "rsr", "random for lark", "random for rsr"}
    three = matched_to({"lark": "r", "rsr": "r", "exact": "s"})
    assert labels(three) == {"lark", "rsr", "exact", "random", "random for exact"}
    four = matched_to({"lark": "r", "rsr": "r", "exact": "s", "head": "s"})
    of_four = {"random for lark or random for rsr", "random for exact or random for head"}
    assert labels(four) == {"lark", "rsr", "exact", "head"} | of_four


def test_settings_of_the_selector_that_a_baseline_is_matched_to() -> None:
    runs = [
        run(
            selector=student("lark", f"a{radius}"),
            baseline=student("random", f"r{radius}"),
            settings={"selector.policy.radius": radius},
        )
        for radius in (0.5, 2)
    ]
    assert labels(runs) == {
        f"{rule} selector.policy.radius={radius}" for rule in ("lark", "random for") for radius in (0.5, 2)
    }


def test_a_rule_in_both_roles() -> None:
    """As a baseline a rule takes equal weights; where that is the same student, it is the same arm."""
    first = run(selector=student("lark", "weighted"), baseline=student("rsr", "rsr"))
    second = run(selector=student("custom", "c"), baseline=student("lark", "equal"))
    third = run(selector=student("rsr", "rsr"), baseline=student("random", "r"))
    assert labels([first, second, third]) == {"lark", "lark for custom", "rsr", "custom", "random"}


def test_a_label_names_what_all_runs_of_its_arm_share() -> None:
    """With one trajectory a problem lark's weights are equal, and both roles the same student; with two they differ."""
    runs = [
        run(
            selector=student("lark", f"{budget}"),
            baseline=student("lark", f"{budget} as a baseline" if budget == 2 else "1"),
            settings={"budget": budget},
        )
        for budget in (1, 2)
    ]
    assert labels(runs) == {"lark budget=1", "lark budget=2", "lark budget=2 with equal weights"}


def test_two_rules_of_one_name_are_not_taken_for_one() -> None:
    runs = [
        run(
            selector=student("custom", "a"),
            baseline=student("custom", "b"),
            settings={"selector.score": "mine:first", "baseline.score": second},
        )
        for second in ("mine:second", "mine:first")
    ]
    assert labels(runs[:1]) == {"custom", "custom for custom"}
    assert labels(runs[1:]) == {"custom", "custom with equal weights"}


def test_seeds_that_are_missing_here_and_there_do_not_split_an_arm() -> None:
    runs = matched_to({"lark": "r", "rsr": "r"}, seed=0) + matched_to({"lark": "r"}, seed=1)
    runs += matched_to({"rsr": "r"}, seed=2)
    labelled = label_arms(runs)
    assert labels(runs) == {"lark", "rsr", "random"}
    assert list(labelled.arms["random"]) == [0, 1, 2]


def test_arms_of_other_settings_are_not_pooled_just_because_their_seeds_differ() -> None:
    runs = [
        run(selector=student("lark", f"a{seed}"), seed=seed, settings={"sft.lr": lr, "evaluation.samples": 4})
        for seed, lr in ((0, 1e-4), (1, 3e-4))
    ]
    labelled = label_arms(runs)
    assert set(labelled.arms) == {UNTRAINED, "lark sft.lr=0.0001", "lark sft.lr=0.0003"}
    assert list(labelled.arms[UNTRAINED]) == [0, 1]  # nothing of the recipe reaches the untrained student


def test_one_student_evaluated_in_two_ways() -> None:
    runs = [
        run(
            selector=arm("lark", "a", accuracies(values)),
            before=arm("before", f"b{samples}", accuracies(values)),
            settings={"evaluation.samples": samples},
        )
        for samples, values in ((4, [0.25, 0.5]), (8, [0.125, 0.5]))
    ]
    assert set(label_arms(runs).arms) == {
        f"{rule} evaluation.samples={samples}" for rule in (UNTRAINED, "lark") for samples in (4, 8)
    }


def test_one_student_whose_held_out_loss_is_of_two_spans() -> None:
    runs = [
        run(selector=student("lark", span), before=arm("before", span, SAME), settings={"probe.span": span})
        for span in ("content", "authors")
    ]
    labelled = label_arms(runs)
    assert set(labelled.arms) == {
        f"{rule} probe.span={span}" for rule in (UNTRAINED, "lark") for span in ("content", "authors")
    }
    assert labelled.notes == ()


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_an_arm_that_may_be_either_of_two_is_neither_in_any_order(order: Sequence[int]) -> None:
    """Of budget 1 there is but the seed in which all budgets came to one student."""
    hashes = {1: {0: "x"}, 2: {0: "x", 1: "y"}, 3: {0: "x", 1: "z"}}
    by_budget = [
        [run(selector=student("lark", hash), seed=seed, settings={"budget": budget}) for seed, hash in of_seed.items()]
        for budget, of_seed in hashes.items()
    ]
    arms = label_arms([one for index in order for one in by_budget[index]]).arms
    assert {
        label: {seed: one["hash"] for seed, one in of_seed.items()}
        for label, of_seed in arms.items()
        if label != UNTRAINED
    } == {f"lark budget={budget}": of_seed for budget, of_seed in hashes.items()}


def test_arms_linked_by_students_that_others_share_are_one() -> None:
    """Budgets 1 and 3 have no seed in common; both share a student with budget 2."""
    runs = [
        run(selector=student("lark", f"a{seed}"), seed=seed, settings={"budget": budget})
        for budget, seed in ((1, 0), (3, 1), (2, 0), (2, 1))
    ]
    for order in itertools.permutations(runs):
        arms = label_arms(order).arms
        assert set(arms) == {UNTRAINED, "lark"} and sorted(arms["lark"]) == [0, 1]


def test_rules_named_like_labels_keep_their_own_arms() -> None:
    runs = [
        run(
            selector=student("lark", f"a{budget}"),
            baseline=student(rule, rule),
            before=arm("before", "b", SAME),
            settings={"budget": budget},
        )
        for budget, rule in ((1, UNTRAINED), (2, "lark budget=1"))
    ]
    labelled = label_arms(runs)
    assert {label: of_seed[0]["hash"] for label, of_seed in labelled.arms.items()} == {
        UNTRAINED: "b",
        f"rule {UNTRAINED}": UNTRAINED,
        "lark budget=1": "a1",
        "lark budget=2": "a2",
        "rule lark budget=1": "lark budget=1",
    }
    assert labelled.runs[0] == {"before": UNTRAINED, "baseline": f"rule {UNTRAINED}", "selector": "lark budget=1"}


def test_the_last_of_two_students_that_no_setting_tells_apart_counts_and_this_is_said() -> None:
    runs = [run(selector=student("lark", hash), baseline=student("random", "r")) for hash in ("old", "new", "new")]
    labelled = label_arms(runs)
    assert labelled.arms["lark"][0]["hash"] == "new"
    (note,) = labelled.notes
    assert note.startswith("lark, seed 0: runs of the same settings have different students")


SETTINGS = {
    "budget": [1, 2],
    "match": ["tokens", "trajectories"],
    "sft.lr": [1e-4, 1e-3],
    "selector.policy.tau": [1, 2],
}


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(sorted(SETTINGS))), st.randoms(use_true_random=False))
def test_of_a_full_sweep_a_label_names_exactly_what_matters(matters: set[str], random) -> None:
    combinations = [dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())]
    runs = [
        run(
            selector=student("lark", json.dumps([seed, {name: combination[name] for name in sorted(matters)}])),
            seed=seed,
            settings=combination,
        )
        for seed in (0, 1)
        for combination in combinations
    ]
    random.shuffle(runs)
    labelled = label_arms(runs)
    assert len(labelled.arms) == 1 + 2 ** len(matters)
    for one, of_run in zip(runs, labelled.runs, strict=True):
        rule, *named = of_run["selector"].split()
        assert rule == "lark"
        assert set(named) == {f"{name}={one['settings'][name]}" for name in matters}
        assert labelled.arms[of_run["selector"]][one["seed"]]["hash"] == one["arms"]["selector"]["hash"]
    assert all(sorted(of_seed) == [0, 1] for of_seed in labelled.arms.values())

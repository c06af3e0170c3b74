"""Plotly figures against what they are made of, by brute force; rows of the trajectories' table."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lark.selection.candidates import Candidates
from lark.selection.policies import Policy
from lark.selection.selection import Rule, Selection, select
from lark.tracking.logging_metrics import selection_metrics, teacher_rows, trajectory_rows
from lark.tracking.wandb_plots import (
    DOTS,
    POINTS,
    against,
    held_out,
    of_choice,
    of_pair,
    overlap,
    scores_by_teacher,
    weights,
)

TEACHERS = ("a", "<b>b</b>", "c")


def make_candidates(problems: int = 40, *, loss: bool = True, seed: int = 0) -> Candidates:
    rng = np.random.default_rng(seed)
    size = problems * len(TEACHERS)
    teacher_N = np.array(TEACHERS * problems, object)
    statistics = {"num_tokens": rng.integers(5, 50, size)} | ({"loss": rng.random(size)} if loss else {})
    columns = {"teacher": teacher_N, "correct": rng.choice([0.0, 1.0, np.nan], size)}
    return Candidates(
        problem_id=np.repeat([f"p{i}" for i in range(problems)], len(TEACHERS)).astype(object),
        candidate_id=np.array([str(i % len(TEACHERS)) for i in range(size)], object),
        row_N=10 + np.arange(size),
        statistics=statistics,
        read_column=lambda name, row_N: columns[name][row_N - 10],
    )


def choose(candidates: Candidates, *, like: Selection | None = None, seed: int = 1) -> Selection:
    """By a score that is random, and missing for every tenth candidate."""
    score_N = np.random.default_rng(seed).random(len(candidates))
    score_N[::10] = np.nan
    rule = Rule(name=f"rule{seed}", score=lambda _: score_N, policy=Policy(kind="chi2", budget=2))  # type: ignore[arg-type]
    return select(rule, candidates, seed=0, like=like)


def traces(figure: Any) -> Any:
    return figure.data


def note(figure: Any) -> str:
    return figure.layout.annotations[0].text


def test_boxes_of_teachers() -> None:
    candidates = make_candidates()
    score_N = choose(candidates).score_N
    (box,) = traces(scores_by_teacher(candidates, score_N))
    assert set(box.y) == {"a", "&lt;b&gt;b&lt;/b&gt;", "c"}
    centred = score_N - np.repeat(np.nanmean(score_N.reshape(-1, len(TEACHERS)), axis=1), len(TEACHERS))
    of_c = centred[candidates["teacher"] == "c"]
    at = list(box.y).index("c")
    found = [of[at] for of in (box.lowerfence, box.q1, box.median, box.q3, box.upperfence)]
    assert found == pytest.approx(np.nanquantile(of_c, (0.05, 0.25, 0.5, 0.75, 0.95)))


def test_weights() -> None:
    equal, unequal = traces(weights({"equal": np.ones(1000), "unequal": np.array([0.5, 3.0, 0.5])}))
    assert equal.y == pytest.approx(equal.x, abs=1e-2) and len(equal.x) == POINTS
    assert (unequal.x, unequal.y) == (pytest.approx((0, 33.333, 66.667, 100)), pytest.approx((0, 75, 87.5, 100)))


def test_dots_are_candidates_with_both() -> None:
    candidates = make_candidates(problems=1000)
    selection = choose(candidates)
    chosen_N = np.isin(candidates.row_N, selection.row)
    rest, chosen = traces(against(candidates, selection.score_N, candidates["loss"], chosen_N, "loss"))
    assert len(rest.x) + len(chosen.x) == DOTS < len(candidates)
    place = {f"{p}/{c}": i for i, (p, c) in enumerate(zip(candidates.problem_id, candidates.candidate_id, strict=True))}
    for dots, is_chosen in ((rest, False), (chosen, True)):
        at = np.array([place[text.split(" ")[0]] for text in dots.text])
        assert set(chosen_N[at]) == {is_chosen}
        assert dots.x == pytest.approx(candidates["loss"][at], rel=1e-4)
        assert dots.y == pytest.approx(selection.score_N[at], rel=1e-4)


def test_overlap() -> None:
    candidates = make_candidates()
    selector = choose(candidates)
    baseline = choose(candidates, like=selector, seed=2)
    (cells,) = traces(overlap(candidates, {"selector": selector, "baseline": baseline}))
    taken = [{int(row) for row in one.row} for one in (selector, baseline)]
    values = []
    for problem in np.unique(candidates.problem_id):
        rows = set(candidates.row_N[candidates.problem_id == problem].tolist())
        ours, theirs = (rows & of for of in taken)
        if ours and theirs and ours != rows and theirs != rows:
            values.append(len(ours & theirs) / len(ours | theirs))
    assert cells.z[0][1] == cells.z[1][0] == pytest.approx(np.mean(values))
    assert cells.z[0][0] == cells.z[1][1] == 1


def test_what_there_is_nothing_for_says_so() -> None:
    candidates = make_candidates(loss=False)
    selection = choose(candidates)
    plots = of_choice(candidates, selection)
    assert plots.keys() == of_choice(make_candidates(), selection).keys()
    empty = [name for name, figure in plots.items() if not traces(figure)]
    assert empty == ["score_against_loss"]
    assert "not known" in note(plots["score_against_loss"])
    assert "nothing was trained" in note(held_out({"selector": []}))
    assert of_pair(candidates, {}, {}).keys() == of_pair(candidates, {"selector": selection}, {}).keys()


@pytest.mark.parametrize("limit", [200, 30, 4])
def test_rows_are_the_ends_of_every_teacher(limit: int) -> None:
    candidates = make_candidates()
    selection = choose(candidates)
    rows = trajectory_rows(candidates, selection, limit=limit)
    assert len(rows) <= limit and len({row["row"] for row in rows}) == len(rows)
    for teacher, count in Counter(row["teacher"] for row in rows).items():
        of_teacher = candidates["teacher"] == teacher
        scores = np.sort(selection.score_N[of_teacher & np.isfinite(selection.score_N)])[::-1]
        best, worst = (
            [row["score"] for row in rows if (row["teacher"], row["end"]) == (teacher, end)]
            for end in ("best", "worst")
        )
        assert best == scores[: len(best)].tolist()
        assert worst == scores[::-1][: len(worst)].tolist()
        assert count == len(best) + len(worst) <= len(scores)
    weight = dict(zip(selection.row.tolist(), selection.weight.tolist(), strict=True))
    assert [row["weight"] for row in rows] == [weight.get(row["row"], 0.0) for row in rows]


def test_figures_of_a_selection() -> None:
    candidates = make_candidates(loss=False)
    selection = choose(candidates)
    found = selection_metrics(selection, candidates)
    assert found["selection/trajectories"] == len(selection.row)
    correct = candidates["correct"][np.isin(candidates.row_N, selection.row)]
    assert found["selection/correct_share"] == pytest.approx(np.nanmean(correct))
    assert np.isnan(found["selection/score_with_loss"])
    rows = teacher_rows(candidates, selection)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["pool_share"] for row in rows] == pytest.approx([1 / 3] * 3)

"""ASLEC-CASL against a transcription of its formula, token by token."""

import numpy as np
import pytest

from lark.selection.candidates import Candidates
from lark.selection.policies import TopB
from lark.selection.rule import Rule
from lark.selection.scores.statistics import CausalLikelihood
from lark.selection.selection import select


def ragged(rows):
    column = np.empty(len(rows), object)
    column[:] = [np.array(row, float) for row in rows]
    return column


def make_candidates(rows, skip) -> Candidates:
    """Candidates of one problem whose steps have these surprisals."""
    statistics = {
        "step_tokens": ragged([[len(step) for step in steps] for steps in rows]),
        "step_surprisal": ragged([[sum(step) for step in steps] for steps in rows]),
        "step_first_surprisal": ragged([[sum(step[:skip]) for step in steps] for steps in rows]),
        "num_tokens": np.array([sum(map(len, steps)) + 1 for steps in rows]),
    }
    return Candidates(
        problem_id=np.full(len(rows), "p", object),
        candidate_id=np.arange(len(rows)).astype(str).astype(object),
        row_N=np.arange(len(rows)),
        statistics=statistics,
        read_column=lambda name, row_N: np.full(len(row_N), np.nan if name == "correct" else None, object),
    )


def draw_rows(seed, count):
    """Candidates of 0 to 5 steps of 1 to 7 tokens."""
    rng = np.random.default_rng(seed)
    return [[rng.uniform(0, 3, rng.integers(1, 8)).tolist() for _ in range(rng.integers(6))] for _ in range(count)]


def transcribe(rows, skip):
    """M - gamma F by the normal equations of M ~ b1 M_rest + b2 M_first + gamma F + c."""
    table = []
    for steps in rows:
        tokens = [-s for step in steps for s in step]
        first = [-s for step in steps for s in step[:skip]]
        rest = [-s for step in steps for s in step[skip:]]
        means = [np.mean(part) if part else np.nan for part in (tokens, rest, first)]
        table.append([*means, len(steps) / len(tokens) if tokens else np.nan])
    table = np.array(table)
    fitted = table[np.isfinite(table).all(1)]
    design = np.column_stack([fitted[:, 1:], np.ones(len(fitted))])
    gamma = np.linalg.solve(design.T @ design, design.T @ fitted[:, 0])[2]
    return gamma, table[:, 0] - gamma * table[:, 3]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("skip", [1, 2])
def test_the_score_is_the_transcriptions(seed, skip):
    rows = draw_rows(seed, 60)
    candidates, score = make_candidates(rows, skip), CausalLikelihood(skip=skip)
    gamma, wanted = transcribe(rows, skip)
    assert score.decisions(candidates)["gamma"] == pytest.approx([gamma], rel=1e-7)
    np.testing.assert_allclose(score(candidates), wanted, rtol=1e-7)
    order = np.random.default_rng(seed).permutation(60)
    shuffled = score(make_candidates([rows[i] for i in order], skip))
    np.testing.assert_allclose(shuffled, score(candidates)[order], rtol=1e-9)


def test_gamma_is_in_the_record_and_needs_four_candidates():
    score = CausalLikelihood(skip=1)
    candidates = make_candidates(draw_rows(0, 20), 1)
    selection = select(Rule(name="casl", score=score, policy=TopB(budget=2)), candidates, seed=0)
    assert selection.record["decisions"] == score.decisions(candidates) != {"gamma": [0.0]}
    few = make_candidates([[[1.0, 2.0]], [[3.0, 0.5]], []], 1)
    np.testing.assert_allclose(score(few), [-1.5, -1.75, np.nan])
    with pytest.raises(ValueError, match=r"selector\.score\.skip=0"):
        CausalLikelihood(skip=0)

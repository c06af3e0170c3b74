"""The step sampler, micro-batches, packed rows and coefficients against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lark.student.batching import (
    compute_loss_coefficients,
    draw_step_rows,
    lay_out_row,
    pack_rows,
    plan_alone,
    plan_packed,
    plan_prefix_units,
    take_rank_rows,
)
from lark.student.chat import TokenizedTrajectory

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array)


def encoded(rng, length, prompt):
    ids = rng.integers(1, 1000, length).tolist()
    return TokenizedTrajectory(input_ids=ids, prompt_tokens=prompt, end_of_turn=length - prompt - 1, steps=[0])


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(rows, batch_size, seed):
    steps = -(-3 * rows // batch_size)
    drawn = np.concatenate([draw_step_rows(rows, batch_size, seed=seed, step=step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_a_step_depends_on_seed_and_step_alone():
    def draw(step, seed=3):
        return draw_step_rows(50, 8, seed=seed, step=step).tolist()

    forward = [draw(step) for step in range(10)]
    np.random.seed(1)
    assert [draw(step) for step in reversed(range(10))] == forward[::-1]
    assert draw(0, seed=4) != forward[0]
    epochs = [draw_step_rows(50, 50, seed=3, step=epoch).tolist() for epoch in range(2)]
    assert epochs[0] != epochs[1]


@given(lengths=LENGTHS, world=st.integers(1, 5), data=st.data())
def test_ranks_partition_the_batch_and_get_equal_work(lengths, world, data):
    batch = np.array(data.draw(st.permutations(range(len(lengths)))))
    shares = [take_rank_rows(batch, lengths, rank=rank, world=world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    tokens = [lengths[share].sum() for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(tokens) - min(tokens) <= lengths.max()


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 150))
def test_micro_batches_cover_each_row_once_within_the_budget(lengths, budget):
    cuts = plan_packed(lengths, budget=budget)
    assert sorted(np.concatenate(cuts)) == list(range(len(lengths)))
    assert all(lengths[cut].sum() <= budget or len(cut) == 1 for cut in cuts)
    # any two bins together overflow, or one of them would not have been opened
    bins = sorted(int(lengths[cut].sum()) for cut in cuts)
    assert len(bins) < 2 or bins[0] + bins[1] > budget
    assert sorted(np.concatenate(plan_alone(lengths))) == list(range(len(lengths)))


@settings(deadline=None)
@given(
    problems=st.lists(
        st.tuples(st.integers(0, 20), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=8
    ),
    budget=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_prefix_units_cover_each_row_once_within_the_budget(problems, budget, seed):
    rows = [(i, prompt, span) for i, (prompt, spans) in enumerate(problems) for span in spans]
    problem, prompt, span = np.random.default_rng(seed).permutation(np.array(rows)).T
    cuts = plan_prefix_units(problem, prompt + span, span, budget=budget)
    assert sorted(np.concatenate(cuts)) == list(range(len(rows)))
    for cut in cuts:
        distinct = span[cut].sum() + sum(prompt[problem == i][0] for i in set(problem[cut]))
        assert distinct <= budget or len(cut) == 1
    whole = [i for i, (prompt_i, spans) in enumerate(problems) if prompt_i + sum(spans) <= budget]
    for i in whole:  # a problem that fits is not divided, so that its prompt is computed once
        assert sum(bool((problem[cut] == i).any()) for cut in cuts) == 1


@pytest.mark.parametrize("share", [True, False])
def test_packed_rows_against_a_plain_loop(share):
    rng = np.random.default_rng(0)
    first, second = (rng.integers(1, 1000, 9).tolist() for _ in range(2))
    tails = [rng.integers(1, 1000, length).tolist() for length in (4, 6, 3)]
    rows = [first + tails[0], second + tails[1], first + tails[2], first + tails[0], second[:1]]
    prompts = [9, 0, 8, 5, 0]  # the very first token is predicted by nothing
    numbers = [7, 8, 9, 4, 5]
    packed = pack_rows(
        [
            TokenizedTrajectory(input_ids=ids, prompt_tokens=prompt, end_of_turn=len(ids) - prompt - 1, steps=[0])
            for ids, prompt in zip(rows, prompts, strict=True)
        ],
        numbers,
        share=share,
    )
    assert packed.rows == tuple(numbers) and packed.position_ids_1X is not None
    assert packed.tokens == (9 + 9 + 4 + 6 + 3 if share else sum(map(len, rows)))
    expected = [
        (ids[t - 1], ids[t], ids[t], i, t - prompt, t - 1)
        for i, (ids, prompt) in enumerate(zip(rows, prompts, strict=True))
        for t in range(max(prompt, 1), len(ids))
    ]
    ids_X, depths_X = packed.input_ids_1X[0], packed.position_ids_1X[0]
    columns = (
        ids_X[packed.predict_N],
        packed.target_N,
        ids_X[packed.observed_N],
        packed.row_N,
        packed.position_N,
        depths_X[packed.predict_N],
    )
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


def test_a_row_laid_out_alone_is_that_row_packed():
    row = encoded(np.random.default_rng(0), 7, 3)
    alone, packed = lay_out_row(row, 5), pack_rows([row], [5])
    assert alone.tree is None and alone.position_ids_1X is None and alone.rows == packed.rows
    for name in ("input_ids_1X", "predict_N", "target_N", "observed_N", "row_N", "position_N"):
        assert torch.equal(getattr(alone, name), getattr(packed, name)), name


def test_no_rows_are_no_micro_batches():
    assert plan_packed(np.zeros(0, np.int64), budget=10) == plan_alone(np.zeros(0, np.int64)) == []


@given(
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=12).map(np.array),
    seed=st.integers(0, 1000),
    average=st.sampled_from(["trajectory", "token"]),
    ranks=st.integers(1, 3),
)
def test_coefficients_add_up_to_the_loss_of_the_global_batch(tokens, seed, average, ranks):
    rng = np.random.default_rng(seed)
    weights, surprisal = rng.uniform(0.1, 3, len(tokens)), [rng.exponential(1, t) for t in tokens]
    if average == "trajectory":
        loss = sum(w * s.mean() for w, s in zip(weights, surprisal, strict=True)) / len(tokens)
    else:
        loss = sum(w * s.sum() for w, s in zip(weights, surprisal, strict=True)) / (weights * tokens).sum()
    total = 0.0
    for rank in range(ranks):  # what each rank adds, with the global batch's denominators
        mine = np.arange(len(tokens))[rank::ranks]
        c = compute_loss_coefficients(
            tokens[mine],
            weights[mine],
            average=average,
            total_rows=len(tokens),
            total_weighted_tokens=float((weights * tokens).sum()),
        )
        total += sum(c[i] * surprisal[row].sum() for i, row in enumerate(mine))
    assert total == pytest.approx(loss, rel=1e-12)


def test_bad_settings_name_themselves():
    with pytest.raises(ValueError, match=r"sft\.batch_size=0"):
        draw_step_rows(3, 0, seed=0, step=0)
    with pytest.raises(ValueError, match=r"sft\.average='mean'"):
        compute_loss_coefficients(np.ones(1), np.ones(1), average="mean", total_rows=1, total_weighted_tokens=1.0)


def test_moving_keeps_everything_but_the_device():
    moved = pack_rows([encoded(np.random.default_rng(0), 5, 2)], [9]).to(torch.device("meta"))
    assert moved.rows == (9,) and moved.target_N.device.type == "meta" and moved.tree is not None
    assert moved.tree.cu_q.device.type == "meta" and moved.tree.own_P == (5,)

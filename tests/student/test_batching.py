"""The step sampler, micro-batches, collate and coefficients against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lark.student.batching import (
    collate,
    collate_prefix_tree,
    compute_loss_coefficients,
    draw_step_rows,
    plan_packed,
    plan_padded,
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
@given(lengths=LENGTHS, budget=st.integers(1, 150), packed=st.booleans())
def test_micro_batches_cover_each_row_once_within_the_budget(lengths, budget, packed):
    cuts = (plan_packed if packed else plan_padded)(lengths, budget=budget)
    assert sorted(np.concatenate(cuts)) == list(range(len(lengths)))
    for cut in cuts:
        cost = lengths[cut].sum() if packed else len(cut) * lengths[cut].max()
        assert cost <= budget or len(cut) == 1
    if packed:  # any two bins together overflow, or one of them would not have been opened
        bins = sorted(int(lengths[cut].sum()) for cut in cuts)
        assert len(bins) < 2 or bins[0] + bins[1] > budget


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


def test_collate_shared_against_collate():
    rng = np.random.default_rng(0)
    first, second = (rng.integers(1, 1000, 9).tolist() for _ in range(2))
    tails = [rng.integers(1, 1000, length).tolist() for length in (4, 6, 3)]
    rows = [first + tails[0], second + tails[1], first + tails[2], first + tails[0]]
    encoded_rows = [
        TokenizedTrajectory(input_ids=ids, prompt_tokens=9, end_of_turn=len(ids) - 10, steps=[0]) for ids in rows
    ]
    apart, shared = collate(encoded_rows, [7, 8, 9, 4]), collate_prefix_tree(encoded_rows, [7, 8, 9, 4])
    assert shared.tree is not None and shared.tokens == 9 + 9 + 4 + 6 + 3
    assert shared.rows == apart.rows
    for name in ("target_N", "row_N", "position_N"):
        assert torch.equal(getattr(shared, name), getattr(apart, name)), name
    flat = shared.input_ids_RL.view(-1)
    assert torch.equal(flat[shared.observed_N], shared.target_N)
    assert torch.equal(flat[shared.predict_N], apart.input_ids_RL.view(-1)[apart.predict_N])
    assert shared.position_ids_RL is not None
    depths = shared.position_ids_RL.view(-1)
    assert torch.equal(depths[shared.observed_N], shared.position_N + 9)
    assert torch.equal(depths[shared.predict_N], shared.position_N + 8)


def test_rows_that_share_little_are_padded():
    rng = np.random.default_rng(0)
    assert collate_prefix_tree([encoded(rng, 40, 3), encoded(rng, 40, 3)], [0, 1]).tree is None


def test_no_rows_are_no_micro_batches():
    for plan in (plan_packed, plan_padded):
        assert plan(np.zeros(0, np.int64), budget=10) == []


def test_collate_against_a_plain_loop():
    rng = np.random.default_rng(0)
    rows = [encoded(rng, length, prompt) for length, prompt in ((7, 3), (4, 1), (9, 8), (5, 0))]
    batch = collate(rows, [70, 71, 72, 73])
    assert batch.rows == (70, 71, 72, 73)
    width = 9
    assert batch.position_ids_RL is None
    assert batch.input_ids_RL.tolist() == [row.input_ids + [0] * (width - len(row.input_ids)) for row in rows]
    seen = []
    for i, row in enumerate(rows):
        start = i * width
        first = max(row.prompt_tokens, 1)  # the very first token is predicted by nothing
        seen += [(start + t - 1, row.input_ids[t], i, t - row.prompt_tokens) for t in range(first, len(row.input_ids))]
    columns = (batch.predict_N, batch.target_N, batch.row_N, batch.position_N)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == seen
    assert batch.tokens == 36


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
    batch = collate([encoded(np.random.default_rng(0), 5, 2)], [9])
    moved = batch.to(torch.device("meta"))
    assert moved.rows == (9,) and moved.target_N.device.type == "meta" and moved.position_ids_RL is None

"""The DataModule: scoring and selection inside setup, held-out problems, verdicts, overlong rows, order of the pool."""

import random
import shutil

import numpy as np
import pytest
import torch
from conftest import rows_of_a_pool

from lark.common.cache import read_json
from lark.common.table_cache import read_columns, read_row_numbers
from lark.pool.pool import mask_held_out
from lark.scoring.pass_module import PassModule
from lark.scoring.passes import Gradients, LocalWindows, MeanHidden, Statistics
from lark.scoring.statistics_pass import StatisticsModule
from lark.selection.policies import TopB
from lark.selection.rule import Rule
from lark.selection.scores.coverage import Coverage
from lark.selection.scores.gradients import GradNorm, LarkExact, LarkHead, LossDrop
from lark.selection.scores.statistics import InstructionDifficulty, Length, LocalLikelihood, Random
from lark.student.chat import load_template
from lark.training.arms import make_arm, train
from lark.training.batches import compute_held_out_coefficients
from lark.training.sft_module import SFTModule

POLICY = TopB(budget=2)
KINDS = [
    LarkExact(),
    LossDrop(),
    GradNorm(dimensions=16),
    LarkHead(),
    LocalLikelihood(),
    InstructionDifficulty(),
    Coverage(budget=2, seed=0),
]


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def chosen(data, arm="selector"):
    pool, selection = data.trajectories, data.selections[arm]
    keys = zip(pool.problem_id[selection.row], pool.candidate_id[selection.row], strict=True)
    return dict(zip(keys, selection.weight.tolist(), strict=True))


def test_a_plain_fit_scores_selects_and_trains(make_data, make_trainer, tmp_path):
    data = make_data()
    module = SFTModule(student=data.student, recipe=data.recipe, steps=3, seed=0, folder=tmp_path)
    make_trainer(max_steps=3).fit(module, datamodule=data)
    assert set(data.selections) == {"selector", "baseline"}
    assert module.global_step == 3
    before = data.student.load_model(torch.float32).get_input_embeddings().weight
    assert not torch.equal(module.student_model.get_input_embeddings().weight, before)


def test_setup_again_does_nothing(make_data, monkeypatch):
    data = ready(make_data())
    selections = dict(data.selections)
    monkeypatch.setattr(StatisticsModule, "predict_step", lambda *_: pytest.fail("scored again"))
    for stage in ("fit", "validate", "test", "fit"):
        data.setup(stage)
    assert all(data.selections[name] is selection for name, selection in selections.items())


def test_other_stages_do_not_score(make_data, monkeypatch):
    monkeypatch.setattr(StatisticsModule, "predict_step", lambda *_: pytest.fail("scored"))
    data = make_data()
    data.prepare_data()
    data.setup("test")
    assert not data.selections


def test_held_out_problems_are_never_candidates(make_data):
    data = ready(make_data())
    pool = data.trajectories
    out = set(pool.problem_id[mask_held_out(pool.problem_id, 0.25)])
    assert len(out) == 2
    assert not out & set(data.candidates["problem_id"])
    assert set(data.candidates["problem_id"]) | out == set(pool.problem_id)
    assert set(pool.problem_id[data.held_out_sample]) == out


def test_the_baseline_takes_as_many_rows_of_each_problem(make_data):
    data = ready(make_data())
    taken = [dict(data.selections[arm].taken_by_problem) for arm in ("selector", "baseline")]
    assert taken[0] == taken[1]


def test_held_out_loss_by_brute_force(make_data, make_trainer, tmp_path):
    data = make_data(recipe={"steps": 1})
    module = SFTModule(student=data.student, recipe=data.recipe, steps=1, seed=0, folder=tmp_path)
    trainer = make_trainer(max_steps=1, num_sanity_val_steps=-1)
    trainer.fit(module, datamodule=data)
    pool, model = data.trajectories, data.student.load_model(torch.float32).double()
    by_problem, of_correct = {}, {}
    for row in np.flatnonzero(pool.is_held_out):
        (encoded,) = pool.read_tokens(np.array([row]))
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            log_p = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        loss = -log_p.gather(1, ids[0, 1:, None])[encoded.prompt_tokens - 1 :].mean().item()
        by_problem.setdefault(pool.problem_id[row], []).append(loss)
        if pool.correct[row] == 1:
            of_correct.setdefault(pool.problem_id[row], []).append(loss)
    first = module.curve[0]
    assert first["step"] == 0
    assert first["held_out/loss"] == pytest.approx(np.mean([np.mean(v) for v in by_problem.values()]), rel=1e-5)
    assert first["held_out/loss_correct"] == pytest.approx(np.mean([np.mean(v) for v in of_correct.values()]), rel=1e-5)
    assert first["held_out/loss"] != pytest.approx(first["held_out/loss_correct"], rel=1e-3)
    header, line, *_ = (tmp_path / "loss.csv").read_text().splitlines()
    assert header == "step,held_out/loss,held_out/loss_correct" and line.split(",")[1] == str(first["held_out/loss"])


def test_held_out_coefficients_add_up(make_data):
    data = ready(make_data())
    row = data.trajectories.find_held_out()
    coefficient_CR = compute_held_out_coefficients(data.trajectories, row)
    tokens = data.trajectories.span_tokens[row]
    np.testing.assert_allclose((coefficient_CR * tokens).sum(1), 1)  # a constant surprisal comes out as itself
    wrong = data.trajectories.correct[row] != 1
    assert wrong.any() and not coefficient_CR[1][wrong].any()


def test_the_curve_takes_a_sample_the_ends_take_all(make_data, make_trainer, tmp_path, monkeypatch):
    """All held-out rows are read before training, once a student, and after it."""
    read, validate = [], SFTModule.validation_step

    def record(self, step, number):
        read.append(step.rows)
        validate(self, step, number)

    monkeypatch.setattr(SFTModule, "validation_step", record)
    losses = []
    for seed, passes in ((0, ["all", "some", "some", "all"]), (1, ["some", "some", "all"])):
        data = ready(make_data(task={"held_out_rows": 3}, recipe={"validations": 2}))
        data.seed = seed
        arm = make_arm("selector", "r", data, recipe=data.recipe, steps=4, arms=tmp_path / "arms")
        train(arm, data, make_trainer=make_trainer)
        assert [{3: "some", 8: "all"}[len(rows)] for rows in read] == passes
        assert all(set(rows) == set(data.held_out_sample) for rows in read if len(rows) == 3)
        facts = read_json(arm.folder / "trained.json")
        assert [point["step"] for point in facts["curve"]] == [0, 2, 4]
        assert (facts["held_out"]["start"]["step"], facts["held_out"]["end"]["step"]) == (0, 4)
        assert facts["curve"][-1]["held_out/loss"] != facts["held_out"]["end"]["held_out/loss"]
        losses.append((facts["curve"][0], facts["held_out"]["start"]))
        read.clear()
    assert losses[0] == losses[1]
    of_all = ready(make_data(task={"held_out_rows": None}))
    np.testing.assert_array_equal(of_all.held_out_sample, of_all.trajectories.find_held_out())


def test_null_verdicts_are_filled_by_the_checker_and_counted(make_data, monkeypatch):
    pool = ready(make_data()).trajectories
    truth = np.array([row["truth"] for row in rows_of_a_pool()], float)
    np.testing.assert_array_equal(pool.correct, truth)
    assert 0 < truth[:4].sum() < 4, "the four that were null are not all alike"
    assert pool.verdicts == {"filled": 4, "timed_out": 0, "no_gold": 0}
    monkeypatch.setattr("lark.student.checked_pool.Checker", lambda *_, **__: pytest.fail("checked again"))
    np.testing.assert_array_equal(ready(make_data()).trajectories.correct, truth)


def test_a_null_verdict_without_an_answer_stays_unknown(make_data):
    rows = [row | {"answer": None, "correct": None} for row in rows_of_a_pool()]
    data = ready(make_data(rows))
    assert np.isnan(data.trajectories.correct).all()
    pool = data.trajectories
    assert not compute_held_out_coefficients(pool, pool.find_held_out())[1].any()
    exported = list(data.trajectories.read_rows(np.array([3, 1])))
    assert [row["correct"] for row in exported] == [None, None]
    assert [row["candidate_id"] for row in exported] == ["3", "1"]


def test_overlong_rows_are_dropped_and_counted(make_data):
    data = ready(make_data(task={"max_length": 70}))
    pool = data.trajectories
    overlong = pool.length > 70
    assert 0 < overlong.sum() < len(overlong)
    assert pool.dropped["overlong"] == overlong.sum() and pool.truncated == 0
    assert not set(np.flatnonzero(overlong)) & {*pool.scored, *data.trajectories.find_held_out()}


def test_overlong_rows_are_cut_and_counted(make_data):
    whole = ready(make_data()).trajectories
    pool = ready(make_data(task={"max_length": 70, "overlong": "truncate"})).trajectories
    np.testing.assert_array_equal(pool.length, np.minimum(whole.length, 70))
    cut = np.flatnonzero(whole.length > 70)
    assert pool.dropped["overlong"] == 0 and pool.truncated == len(cut)
    for short, full in zip(pool.read_tokens(cut), whole.read_tokens(cut), strict=True):
        assert short.input_ids == full.input_ids[:70] and short.end_of_turn == -1


def test_overlong_rows_are_an_error_with_file_and_line(make_data):
    rows = rows_of_a_pool()
    with pytest.raises(
        ValueError, match=r"cache\.jsonl:\d+: \d+ tokens, more than task\.max_length=70; .*overlong=drop"
    ):
        make_data(rows, task={"max_length": 70, "overlong": "error"}).prepare_data()


def test_nothing_left_to_choose_from(make_data):
    with pytest.raises(ValueError, match=r"no candidate is left .*task\.max_length=10.*raise task\.max_length"):
        make_data(task={"max_length": 10}).prepare_data()


def test_the_order_of_the_pool_changes_no_selection(make_data):
    rows = rows_of_a_pool()
    shuffled = random.Random(1).sample(rows, len(rows))
    a, b = ready(make_data(rows, cache="a")), ready(make_data(shuffled, cache="b"))
    assert [row["problem_id"] for row in rows] != [row["problem_id"] for row in shuffled]
    for arm in ("selector", "baseline"):
        assert chosen(a, arm).keys() == chosen(b, arm).keys()
    assert chosen(a) == pytest.approx(chosen(b), abs=1e-6)
    assert len({round(weight, 3) for weight in chosen(a).values()}) > 5, "weights that differ from row to row"


def test_columns_of_the_pool(make_data):
    pool = ready(make_data()).trajectories
    rows = np.array([5, 2])
    source = rows_of_a_pool()
    assert pool.column("teacher", rows).tolist() == ["teacher 1", "teacher 2"]
    assert pool.column("text", rows).tolist() == [source[i]["messages"][-1]["content"] for i in (5, 2)]
    assert pool.column("truth", rows).tolist() == [float(source[i]["truth"]) for i in (5, 2)]
    with pytest.raises(ValueError, match="no column level"):
        pool.column("level", rows)


def test_columns_that_the_statistics_hide_are_named(make_data, caplog):
    caplog.set_level("INFO", logger="lark")
    data = make_data([row | {"loss": 1.0, "level": 3} for row in rows_of_a_pool()])
    data.prepare_data()
    make_data(cache="plain").prepare_data()
    (line,) = (one.getMessage() for one in caplog.records if one.levelname == "WARNING")
    assert "columns loss, " in line and "level" not in line


def test_a_batch_smaller_than_the_number_of_ranks(make_data):
    class TwoRanks:
        world_size = 2

    data = ready(make_data(recipe={"batch_size": 1}))
    data.trainer = TwoRanks()
    with pytest.raises(ValueError, match=r"sft\.batch_size=1 gives 2 ranks nothing to do"):
        data.train_dataloader()


def test_ranks_add_up_to_the_global_step(make_data):
    data = ready(make_data())
    sums = []
    for world in (1, 2, 3):
        steps = [data.step(1, rank=rank, world=world) for rank in range(world)]
        parts = [
            pair for step in steps for pair in zip(step.rows.tolist(), step.coefficient_CR[0].tolist(), strict=True)
        ]
        sums.append(sorted(parts))
    assert sums[0] == sums[1] == sums[2] and len(sums[0]) == 6


# ---- passes


def test_only_the_passes_that_the_rules_need_are_run(make_data, monkeypatch):
    monkeypatch.setattr(StatisticsModule, "predict_step", lambda *_: pytest.fail("scored"))
    data = ready(make_data(selector=Length(sign=1), baseline=Random(seed=0)))
    assert data.needs == [] and data.costs == {}
    assert set(data.candidates.statistics) == {"num_tokens"}
    np.testing.assert_array_equal(data.candidates["num_tokens"], data.trajectories.span_tokens[data.scored])
    assert not any(data.cost_of(data.rules["selector"]).values())
    with pytest.raises(ValueError, match="no column loss"):
        _ = data.candidates["loss"]


def test_what_choosing_costs(make_data):
    data = ready(make_data(selector=LocalLikelihood(steps_before=1), baseline=Random(seed=0)))
    tokens = int(data.trajectories.length[data.scored].sum())
    assert data.needs == [Statistics(), LocalWindows(steps_before=1)]
    assert data.costs[Statistics()]["forward_tokens"] == tokens
    cost = data.cost_of(data.rules["selector"])
    assert cost["forward_tokens"] > tokens and cost["seconds"] > 0 == cost["backward_tokens"]
    assert data.cost_of(data.rules["baseline"])["forward_tokens"] == 0


@pytest.fixture
def other_student(make_student, student_folder, tmp_path):
    """One with other weights, whose template makes every row ten tokens longer."""
    folder, template = tmp_path / "other", tmp_path / "other.jinja"
    shutil.copytree(student_folder, folder)
    model = make_student(path=str(folder)).load_model(torch.float32)
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    template.write_text("0123456789" + load_template("chatml", None))  # type: ignore[arg-type]
    return make_student(path=str(folder), template=str(template), name="other")


@pytest.mark.parametrize("max_length", [256, 85])
def test_another_students_choice(max_length, make_data, other_student, caplog):
    """The one that is asked decides, by its own tokens; what is trained and counted are the trained student's."""
    task = {"max_length": max_length}
    caplog.set_level("INFO", logger="lark")
    own = ready(make_data(cache="own", task=task))
    settings = {"path": other_student.path, "template": other_student.template}
    theirs = ready(make_data(cache="theirs", task=task, student=settings))
    mixed = ready(make_data(cache="mixed", task=task, scorer=other_student))
    np.testing.assert_array_equal(mixed.scored, theirs.scored)
    np.testing.assert_array_equal(mixed.candidates["loss"], theirs.candidates["loss"])
    assert chosen(mixed) == chosen(theirs)
    assert max_length == 85 or chosen(theirs) != chosen(own)  # two candidates a problem leave no choice
    too_long = len(own.scored) - len(theirs.scored)
    assert (too_long > 0) == (max_length == 85) and mixed.dropped["overlong_for_scorer"] == too_long
    assert any(line.startswith(f"scored by other, whose choice small gets; {too_long:,} ") for line in caplog.messages)
    row = mixed.selections["selector"].row
    np.testing.assert_array_equal(mixed.trajectories.length[row] + 10, mixed.scored_trajectories.length[row])
    step = mixed.set_active_arm("selector").step(0)
    np.testing.assert_array_equal(step.lengths, mixed.trajectories.length[step.rows])
    assert set(step.rows) <= set(row)
    assert step.encoded == mixed.trajectories.read_tokens(step.rows)


def test_the_trained_students_tokens_are_what_is_matched(make_data, other_student):
    data = make_data(scorer=other_student, selector=Length(sign=1), baseline=Length(sign=-1))
    data.match = "tokens"
    ready(data)
    rows = {name: selection.row for name, selection in data.selections.items()}
    tokens = {name: data.trajectories.span_tokens[row].sum() for name, row in rows.items()}
    assert {name: s.record["tokens"] for name, s in data.selections.items()} == tokens
    assert data.selections["baseline"].record["policy"]["tokens_minus_selector"] == (
        tokens["baseline"] - tokens["selector"]
    )
    assert len(rows["baseline"]) > len(rows["selector"])


def test_a_pass_is_shared_by_whoever_asks_the_same_student(make_data, other_student):
    settings = {"path": other_student.path, "template": other_student.template}
    one = ready(make_data(student=settings))
    other = make_data(scorer=other_student)
    other.prepare_data()
    assert other.statistics_folder == one.statistics_folder
    assert other.statistics_folder != ready(make_data()).statistics_folder


def test_what_steps_are_matters_to_passes_that_ask_for_them_only(make_data):
    folders = {}
    for splitter in ("sentences", "blank_lines"):
        data = make_data(probe={"step_splitter": splitter})
        data.prepare_data()
        wanted = (Statistics(), LocalWindows(), MeanHidden(), Gradients())
        folders[splitter] = [data.pass_folder(one) for one in wanted]
    same = [a == b for a, b in zip(*folders.values(), strict=True)]
    assert same == [False, False, True, True]


@pytest.mark.parametrize("score", KINDS)
def test_a_killed_pass_of_any_kind_goes_on(score, make_data, monkeypatch):
    """Cut off after some units and started again it gives what it would have given."""

    class KillError(Exception):
        pass

    settings = {"batch_tokens": 300, "shard_rows": 5}
    (wanted,) = (need for need in Rule(name="r", score=score, policy=POLICY).needs if need != Statistics())
    whole = make_data(cache="whole", selector=score, probe=settings)
    whole.prepare_data()
    whole.run_pass(wanted, cached=False)
    expected = read_columns(whole.pass_folder(wanted))

    data = make_data(cache="killed", selector=score, probe=settings)
    data.prepare_data()
    step, calls = PassModule.predict_step, []

    def killing(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 4:
            raise KillError
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PassModule, "predict_step", killing)
        with pytest.raises(KillError):
            data.run_pass(wanted, cached=False)
    assert 0 < len(read_row_numbers(data.pass_folder(wanted))) < len(data.scored)
    again = make_data(cache="killed", selector=score, probe=settings)
    again.prepare_data()
    again.run_pass(wanted, cached=False)
    columns = read_columns(again.pass_folder(wanted))
    assert set(columns) == set(expected)
    for name, values in expected.items():
        for a, b in zip(columns[name], values, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)

"""The race of a student: caches against whole forward passes, exact survivors, killed and resumed, from end to end."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import rows_of_a_pool
from lark_command import SMALL, lark
from transformers import AutoConfig, AutoModelForCausalLM

from lark.common.cache import complete, read_json
from lark.common.groups import Groups
from lark.scoring.race_pass import RaceModule, Runner, check_caches
from lark.scoring.statistics_pass import STEP_COLUMNS, TOKEN_COLUMNS, Probe
from lark.scoring.table_cache import read_columns, read_statistics, rows_done
from lark.selection.race import top
from lark.selection.scores.statistics import Entropy, Lark, Likelihood, Random, RankSurprisal
from lark.student.chat import Encoded
from lark.student.token_statistics import Head, token_statistics


class KillError(Exception):
    pass


@pytest.fixture(scope="module")
def pool():
    """21 problems to choose from, the others held out."""
    return rows_of_a_pool(problems=28, candidates=6)


RACE = {"race": True, "race_confidence": 0.5}


@pytest.fixture
def raced(make_data, pool):
    """A data module that has scored the pool by a race, or without one."""

    def run(cache="race", probe=RACE, **settings):
        data = make_data(pool, cache=cache, probe=probe, **settings)
        data.prepare_data()
        data.score()
        return data

    return run


# Reading on caches


def rows_that_differ():
    """Of other lengths, one with a shorter prompt, one whose prompt ends otherwise, one without any."""
    rng = np.random.default_rng(0)
    prompt = [3, 4, 5, 6, 7, 8]
    rows = [(prompt, 40), (prompt, 3), (prompt[:5], 90), ([*prompt[:5], 9], 1), (prompt, 64)]
    return [
        Encoded(input_ids=[*p, *rng.integers(0, 60, n).tolist()], prompt_tokens=len(p), end_of_turn=n - 1, steps=[0])
        for p, n in rows
    ]


def directly(model, head, row):
    ids = torch.tensor([row.input_ids])
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        first = max(row.prompt_tokens, 1)
        found = token_statistics(hidden[first - 1 : -1], ids[0, first:], head)
    return torch.stack([column.double() for column in vars(found).values()])


@pytest.mark.parametrize("budget", [1, 7, 100, 10_000])
@pytest.mark.parametrize("no_prompt", [False, True])
def test_reading_on_caches_is_reading_at_once(make_student, budget, no_prompt):
    model = make_student().load_model(torch.float32)
    rows = rows_that_differ()
    if no_prompt:
        rows.append(Encoded(input_ids=[9, 8, 7], prompt_tokens=0, end_of_turn=2, steps=[0]))
    head = Head(weight_VD=model.get_output_embeddings().weight)
    with torch.inference_mode():
        runner = Runner(model, rows, budget=budget, top_k=None, compiled=False)
        runner.leave(np.arange(len(rows)) == 4)  # before anything was read
        for cut in (5, 20, 33):
            runner.advance(cut)
            if cut == 20:
                runner.leave(np.arange(len(rows)) == 0)
        runner.advance(None)
    assert not len(runner.running)
    for k, row in enumerate(rows):
        expected = directly(model, head, row)
        read = {0: 20, 4: 0}.get(k, expected.shape[1])
        torch.testing.assert_close(runner.scored(k), expected[:, :read], rtol=1e-4, atol=1e-4)


def test_the_prompt_is_read_once(make_student):
    row = Encoded(input_ids=list(range(50)), prompt_tokens=41, end_of_turn=8, steps=[0])
    with torch.inference_mode():
        runner = Runner(make_student().load_model(torch.float32), [row] * 5, budget=1000, top_k=None, compiled=False)
        runner.advance(None)
    assert runner.computed_tokens == 40 + 5 * 9  # its last token predicts a candidate's first


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("mamba", "its cache holds LinearAttentionLayer, which are not repeated and cut"),
        ("qwen3_next", "its cache: `get_seq_length` can only be called on Attention layers.*"),
        ("rwkv", "on its cache it computes something else, by .*"),
    ],
)
def test_a_student_without_such_caches_is_refused(architecture, reason):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes)).eval()
    with pytest.raises(ValueError, match=rf"^model=small cannot be raced \({reason}\); set probe\.race=false$"):
        check_caches(model, "small")


def test_a_student_with_caches_of_tokens_is_not_refused(make_student):
    check_caches(make_student().load_model(torch.float32), "small")


# The pass


def same(a, b, where: slice | np.ndarray = slice(None)):
    for name in set(b) - {"row"}:
        for x, y in zip(np.asarray(a[name])[where], np.asarray(b[name])[where], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


def test_with_confidence_1_the_statistics_are_the_plain_ones(raced):
    data = raced(cache="whole", probe={"race": True, "race_confidence": 1.0, "keep": "tokens"})
    plain = raced(cache="plain", probe={"keep": "tokens"})
    columns = read_statistics(data.statistics_folder)
    same(columns, read_statistics(plain.statistics_folder))
    assert not columns["stopped"].any() and np.array_equal(columns["read_tokens"], columns["num_tokens"])
    data.select()
    plain.select()
    np.testing.assert_array_equal(data.selections["selector"].row, plain.selections["selector"].row)


@pytest.mark.parametrize("score", [Lark(), RankSurprisal(), Likelihood()], ids=["lark", "rsr", "likelihood"])
def test_survivors_are_exact_and_the_others_never_chosen(raced, score):
    data, plain = raced(selector=score, probe=RACE | {"keep": "tokens"}), raced(cache="plain", probe={"keep": "tokens"})
    columns, full = (read_statistics(one.statistics_folder) for one in (data, plain))
    out_N = columns["stopped"]
    assert 10 < out_N.sum() < len(out_N) and np.array_equal(out_N, columns["read_tokens"] < columns["num_tokens"])
    same(columns, full, ~out_N)
    np.testing.assert_array_equal(columns["num_tokens"], full["num_tokens"])
    for i in np.flatnonzero(out_N):
        read = columns["read_tokens"][i]
        for name in TOKEN_COLUMNS:
            np.testing.assert_allclose(columns[name][i][:read], full[name][i][:read], rtol=1e-4, atol=1e-4)
            assert np.isnan(columns[name][i][read:]).all() and len(columns[name][i]) == len(full[name][i])
        np.testing.assert_array_equal(columns["step_tokens"][i], full["step_tokens"][i])
        whole = np.cumsum(full["step_tokens"][i]) <= read
        np.testing.assert_array_equal(np.isfinite(columns["step_surprisal"][i]), whole)
        assert columns["sum_surprisal"][i] >= full["token_surprisal"][i][:read].sum() * (1 - 1e-5)
    for name in ("sum_entropy", "end_rank", "top1", "sum_rank_50"):
        assert np.isnan(columns[name][out_N]).all() and np.isfinite(columns[name][~out_N]).all()

    data.select()
    chosen = data.selections["selector"]
    assert not out_N[np.searchsorted(columns["row"], chosen.row)].any()
    np.testing.assert_array_equal(np.isfinite(chosen.score_N), ~out_N)
    full_N = score(plain.candidates)
    groups = Groups.from_ids(data.candidates["problem_id"])
    right_N, mine_N = top(groups, full_N, 2), top(groups, chosen.score_N, 2)
    assert (right_N & mine_N).sum() >= 0.5 * right_N.sum()


def test_what_it_came_to_is_said_and_kept(raced):
    said = []
    data = raced(say=said.append)
    columns = read_columns(data.statistics_folder)
    manifest = read_json(data.statistics_folder / "manifest.json")
    race = manifest["race"]
    assert race["stopped"] == columns["stopped"].sum() > 0
    assert race["span_tokens"] == columns["num_tokens"].sum() > race["read_tokens"] == columns["read_tokens"].sum()
    assert race["confidence"] == 0.5 and race["calibration_trajectories"] == 6 * 6
    assert race["contests"][0]["rule"] == "lark" and race["contests"][0]["places"] == 3
    prompt = data.trajectories.length - data.trajectories.span_tokens
    read = np.where(columns["read_tokens"] > 0, prompt[columns["row"]] + columns["read_tokens"], 0)
    assert manifest["forward_tokens"] == read.sum(), "those of the calibration once"
    (line,) = (line for line in said if line.startswith("race "))
    assert f"{race['stopped']:,} of {len(columns['row']):,} trajectories given up" in line
    raced(say=said.append)
    assert said[-1] == line, "also from the cache"


def test_how_the_pass_is_cut_changes_no_decision(raced):
    one = read_columns(raced(cache="a", probe=RACE | {"batch_tokens": 23}).statistics_folder)
    other = read_columns(raced(cache="b", probe=RACE | {"batch_tokens": 10_000, "shard_rows": 3}).statistics_folder)
    np.testing.assert_array_equal(one["read_tokens"], other["read_tokens"])
    same(one, {name: other[name] for name in other if name not in STEP_COLUMNS})


@pytest.mark.parametrize("units", [3, 10])
def test_a_killed_race_goes_on(raced, make_data, pool, monkeypatch, units):
    """Killed in the calibration (of 6 problems), and after it."""
    settings = RACE | {"shard_rows": 6}
    expected = read_columns(raced(cache="whole", probe=settings).statistics_folder)
    seen = []
    measure = RaceModule.measure

    def counted(self, batch):
        if len(seen) == units:
            raise KillError
        seen.append(batch[0][0])
        return measure(self, batch)

    data = make_data(pool, cache="killed", probe=settings)
    data.prepare_data()
    with monkeypatch.context() as patch:
        patch.setattr(RaceModule, "measure", counted)
        with pytest.raises(KillError):
            data.score()
    folder = data.statistics_folder
    assert not complete(folder) and complete(folder / "calibration") == (units > 6)
    assert len(rows_done(folder if units > 6 else folder / "calibration"))
    again = read_columns(raced(cache="killed", probe=settings).statistics_folder)
    same(again, expected)
    np.testing.assert_array_equal(again["stopped"], expected["stopped"])


def test_identity_follows_the_race(make_data, pool):
    def name(selector=None, baseline=None, **probe):
        rules = {"selector": selector or Lark(), "baseline": baseline or Random(seed=0)}
        data = make_data(pool, probe=probe, **rules)
        data.prepare_data()
        return data.statistics_folder.name

    plain = name()
    assert name(race_confidence=0.9) == plain and name(Likelihood()) == plain
    race = name(race=True)
    assert name(race=True, shard_rows=3) == race == name(race=True, baseline=Random(seed=1))
    others = [
        name(race=True, race_confidence=0.9),
        name(Likelihood(), race=True),
        name(Lark(length_exponent=1.0), race=True),
        name(race=True, baseline=Likelihood()),
        name(race=True, baseline=Likelihood(sign=-1)),
    ]
    assert len({plain, race, *others}) == 7


def test_settings_and_rules_that_cannot_be_raced_are_named(make_data):
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=r"probe\.race_confidence="):
            Probe(race_confidence=wrong)
    with pytest.raises(ValueError, match=r"selector=lark reads .* set probe\.race=false"):
        make_data(selector=Entropy(), probe={"race": True})
    with pytest.raises(ValueError, match=r"baseline=random reads .* set probe\.race=false"):
        make_data(baseline=Entropy(), probe={"race": True})


def test_from_end_to_end(tmp_path):
    words = [*SMALL, "stop_after=selection", f"paths.logs={tmp_path}", "baseline=rsr"]
    race = ["probe.race=true", "probe.race_confidence=0.6"]
    done = lark(*words, *race, f"hydra.run.dir={tmp_path / 'race'}")
    assert done.code == 0, done.err
    assert "race        confidence 0.6: " in done.out
    table = pq.read_table(tmp_path / "race" / "statistics.parquet").to_pandas()
    assert table["stopped"].any() and table.loc[table["stopped"], ["lark", "rsr"]].isna().all(axis=None)
    stopped = {(row.problem_id, row.candidate_id) for row in table[table["stopped"]].itertuples()}
    for arm in ("selector", "baseline"):
        lines = (tmp_path / "race" / arm / "selection.jsonl").read_text().splitlines()
        meta = [json.loads(line)["meta"] for line in lines]
        assert meta and not stopped & {(one["problem_id"], one["candidate_id"]) for one in meta}
    refused = lark(*words, *race, "selector=entropy", f"hydra.run.dir={tmp_path / 'no'}")
    assert refused.code == 1 and "set probe.race=false" in refused.err

"""The scoring pass: against the model's own logits, cut in any way, killed and resumed, cached by identity."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lark.common.cache import is_complete
from lark.common.table_cache import read_columns, read_row_numbers
from lark.scoring.pass_module import ScoringSettings
from lark.scoring.passes import Statistics
from lark.scoring.statistics_pass import STEP_COLUMNS, TOKEN_COLUMNS, StatisticsModule
from lark.student.student import Student
from lark.student.token_statistics import find_compile_failure

SCALARS = (
    "num_tokens",
    "sum_surprisal",
    "sum_brier",
    "sum_entropy",
    "sum_rank",
    "sum_rank_50",
    "top1",
    "end_surprisal",
)


class KillError(Exception):
    pass


def scored(data):
    data.prepare_data()
    data.score()
    return data


def direct(data, row):
    """ln p over the vocabulary at every place of a row's span, float64 [T, V], and the observed tokens [T]."""
    model = data.student.load_model(torch.float32).double()
    (encoded,) = data.trajectories.read_tokens(np.array([row]))
    ids = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        logp_TV = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)[encoded.prompt_tokens - 1 :]
    return logp_TV.numpy(), np.array(encoded.input_ids[encoded.prompt_tokens :]), encoded


@pytest.mark.parametrize("top_k", [None, 5])
def test_statistics_against_the_models_own_logits(make_data, top_k):
    data = scored(make_data(probe={"top_k": top_k, "keep": "tokens"}))
    columns = read_columns(data.statistics_folder)
    for i in (0, 5, 17):
        logp_TV, y_T, encoded = direct(data, columns["row"][i])
        p_TV, own = np.exp(logp_TV), logp_TV[np.arange(len(y_T)), y_T]
        rank = 1 + (logp_TV > own[:, None]).sum(1)
        if top_k is None:
            brier = 1 - 2 * np.exp(own) + (p_TV**2).sum(1)
        else:
            top = np.sort(p_TV)[:, ::-1][:, :top_k]
            mass = top.sum(1)
            brier = 1 - 2 * np.where(rank <= top_k, np.exp(own) / mass, 0) + ((top / mass[:, None]) ** 2).sum(1)
        entropy = -(p_TV * logp_TV).sum(1)
        expected = {
            "num_tokens": len(y_T),
            "sum_surprisal": -own.sum(),
            "loss": -own.mean(),
            "sum_brier": brier.sum(),
            "brier": brier.mean(),
            "sum_entropy": entropy.sum(),
            "sum_rank": rank.sum(),
            "sum_rank_50": np.minimum(rank, 50).sum(),
            "top1": (rank == 1).sum(),
            "has_end": 1,
            "end_surprisal": -own[-1],
            "end_rank": rank[-1],
        }
        for name, value in expected.items():
            assert columns[name][i] == pytest.approx(value, rel=1e-5), name
        per_token = (-own, rank, entropy, np.log((p_TV**2).sum(1)))
        for name, value in zip(TOKEN_COLUMNS, per_token, strict=True):
            np.testing.assert_allclose(columns[name][i], value, rtol=1e-4, atol=1e-5, err_msg=name)
        steps = np.split(-own[:-1], encoded.steps[1:])  # the end-of-turn token belongs to no step
        by_step = ([len(s) for s in steps], [s.sum() for s in steps], [s[:2].sum() for s in steps])
        for name, value in zip(STEP_COLUMNS, by_step, strict=True):
            np.testing.assert_allclose(columns[name][i], value, rtol=1e-5, err_msg=name)


def test_sums_alone_are_kept_unless_tokens_are_asked_for(make_data):
    columns = read_columns(scored(make_data()).statistics_folder)
    assert not set(TOKEN_COLUMNS) & set(columns)


def test_batch_composition_changes_no_statistic(make_data):
    alone = read_columns(scored(make_data(cache="a", probe={"batch_tokens": 1})).statistics_folder)
    together = read_columns(scored(make_data(cache="b", probe={"batch_tokens": 100_000})).statistics_folder)
    np.testing.assert_array_equal(alone["row"], together["row"])
    for name in SCALARS:
        np.testing.assert_allclose(alone[name], together[name], rtol=1e-5, err_msg=name)


def test_shared_prompts_change_no_statistic(make_data):
    """On by itself, where attention allows; both ways every row is computed, fewer tokens of them if shared."""
    data = {
        name: scored(make_data(cache=name, probe={"share": name == "shared", "keep": "tokens"}))
        for name in ("shared", "apart")
    }
    shared, apart = (read_columns(data[name].statistics_folder) for name in ("shared", "apart"))
    for name in SCALARS:
        np.testing.assert_allclose(shared[name], apart[name], rtol=1e-5, err_msg=name)
    for one, other in zip(shared["token_surprisal"], apart["token_surprisal"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    facts = {name: one.costs[Statistics()] for name, one in data.items()}
    assert facts["shared"]["choices"]["prompts"] == "shared"
    assert facts["apart"]["choices"]["prompts"] == "not shared (probe.share=false)"
    assert facts["shared"]["forward_tokens"] == facts["apart"]["forward_tokens"]
    assert facts["shared"]["computed_tokens"] < facts["shared"]["forward_tokens"] <= facts["apart"]["computed_tokens"]


def test_out_of_memory_halves_units_and_loses_nothing(make_data, monkeypatch):
    expected = read_columns(scored(make_data(cache="plenty")).statistics_folder)
    measure, attempts = StatisticsModule.measure, []

    def scarce(self, rows):
        attempts.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return measure(self, rows)

    monkeypatch.setattr(StatisticsModule, "measure", scarce)
    data = scored(make_data(cache="scarce"))
    columns = read_columns(data.statistics_folder)
    np.testing.assert_array_equal(columns["row"], expected["row"])
    for name in SCALARS:
        np.testing.assert_allclose(columns[name], expected[name], rtol=1e-5, err_msg=name)
    assert "lowered" in data.costs[Statistics()]["choices"]["out of memory"]
    assert sum(rows > 2 for rows in attempts) <= 3, "later units are not tried whole again"


def test_a_row_that_does_not_fit_by_itself_is_an_error(make_data, monkeypatch):
    def none_left(self, rows):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(StatisticsModule, "measure", none_left)
    with pytest.raises(ValueError, match=r"do not fit into memory .*can't allocate memory.*lower task\.max_length"):
        scored(make_data())


@pytest.mark.parametrize("compile", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiled_statistics_are_the_same(make_data, compile):
    if compile and find_compile_failure(torch.device("cpu")) is not None:
        with pytest.raises(ValueError, match=r"probe\.compile=true, but torch\.compile fails here .*set it to null"):
            scored(make_data(probe={"compile": True}))
        return
    data = scored(make_data(probe={"compile": compile}))
    expected = read_columns(scored(make_data(cache="other")).statistics_folder)
    columns = read_columns(data.statistics_folder)
    for name in SCALARS:
        np.testing.assert_allclose(columns[name], expected[name], rtol=1e-6, err_msg=name)
    assert data.costs[Statistics()]["choices"]["statistics"] == (
        "compiled" if compile else "not compiled (probe.compile=false)"
    )


def test_the_trainers_precision_does_not_reach_the_statistics(make_data):
    plain = read_columns(scored(make_data(cache="a")).statistics_folder)
    mixed = scored(make_data(cache="b", trainer={"precision": "bf16-mixed"}))
    np.testing.assert_array_equal(plain["sum_surprisal"], read_columns(mixed.statistics_folder)["sum_surprisal"])


@pytest.fixture
def forwards(monkeypatch):
    """Rows of each forward pass, and a switch that stops the pass before the n-th."""
    seen, stop_before = [], [10**9]
    step = StatisticsModule.predict_step

    def counted(self, batch, batch_idx):
        if len(seen) >= stop_before[0]:
            raise KillError
        seen.append(batch.tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(StatisticsModule, "predict_step", counted)
    return seen, stop_before


def test_a_killed_pass_goes_on_with_the_missing_rows_only(make_data, forwards):
    seen, stop_before = forwards
    settings = {"batch_tokens": 300, "shard_rows": 5}
    whole = scored(make_data(cache="whole", probe=settings))
    everything = [list(rows) for rows in seen]
    expected = (whole.statistics_folder / "statistics.parquet").read_bytes()
    seen.clear()

    data = make_data(cache="killed", probe=settings)
    data.prepare_data()
    stop_before[0] = 4
    with pytest.raises(KillError):
        data.score()
    done = read_row_numbers(data.statistics_folder)
    assert 0 < len(done) < len(data.trajectories.scored) and not is_complete(data.statistics_folder)

    seen.clear()
    stop_before[0] = 10**9
    again = scored(make_data(cache="killed", probe=settings))
    assert seen == [rows for rows in everything if not set(rows) <= set(done)], "the same batches, the missing ones"
    assert (again.statistics_folder / "statistics.parquet").read_bytes() == expected
    assert again.costs[Statistics()]["resumed_rows"] == len(done)
    assert not list(again.statistics_folder.glob("part-*"))


def test_a_lost_part_is_computed_again_also_with_other_batches(make_data, forwards):
    seen, stop_before = forwards
    data = make_data(probe={"batch_tokens": 300, "shard_rows": 3})
    data.prepare_data()
    stop_before[0] = 4
    with pytest.raises(KillError):
        data.score()
    before = set(read_row_numbers(data.statistics_folder).tolist())
    min(data.statistics_folder.glob("part-*")).unlink()
    kept = set(read_row_numbers(data.statistics_folder).tolist())
    lost = before - kept
    assert lost
    seen.clear()
    stop_before[0] = 10**9
    again = scored(make_data(probe={"batch_tokens": 1000}))
    computed = [row for rows in seen for row in rows]
    assert lost <= set(computed) and not kept & set(computed)
    assert sorted([*computed, *kept]) == again.trajectories.scored.tolist()


def test_killed_between_the_last_row_and_the_manifest(make_data, forwards, monkeypatch):
    seen, _ = forwards
    data = make_data()
    data.prepare_data()

    def killed(*_):
        raise KillError

    with monkeypatch.context() as patch:
        patch.setattr("lark.scoring.pass_module.write_json", killed)
        with pytest.raises(KillError):
            data.score()
    seen.clear()
    again = scored(make_data())
    assert seen == [] and is_complete(again.statistics_folder)
    assert len(read_columns(again.statistics_folder)["row"]) == len(again.trajectories.scored)


def test_cached_equals_fresh_and_loads_no_student(make_data, monkeypatch, caplog):
    caplog.set_level("INFO", logger="lark")
    fresh = scored(make_data())
    monkeypatch.setattr(Student, "load_model", lambda *_: pytest.fail("the student was loaded"))
    cached = scored(make_data())
    lines = [line for line in caplog.messages if line.startswith("statistics: ")]
    assert ["found in the cache" in line for line in lines] == [False] * (len(lines) - 1) + [True]
    for name in SCALARS:
        np.testing.assert_array_equal(fresh.candidates[name], cached.candidates[name])


def test_identity_follows_what_changes_a_statistic(make_data, tmp_path):
    other = tmp_path / "other.jinja"
    from lark.student.chat import load_template

    other.write_text(load_template("chatml", None).replace("{{", "{{ '' }}{{", 1))  # type: ignore[arg-type]

    def name(**settings):
        data = make_data(**settings)
        data.prepare_data()
        return data.statistics_folder.name

    base = name()
    for cut in ({"batch_tokens": 77}, {"shard_rows": 3}):
        assert name(probe=cut) == base
    assert name(recipe={"lr": 1.0}) == base and name(trainer={"max_steps": 3}) == base
    changed = [
        name(student={"template": str(other)}),
        name(student={"dtype": "bfloat16"}),
        name(student={"attention": "eager"}),
        name(probe={"span": "authors"}),
        name(probe={"top_k": 50}),
        name(probe={"keep": "tokens"}),
        name(probe={"skip": 3}),
        name(probe={"step_splitter": "blank_lines"}),
        name(task={"held_out": 0.5}),
        name(task={"max_length": 90}),
        name(task={"limit": 5}),
    ]
    assert len({base, *changed}) == len(changed) + 1


@pytest.mark.parametrize(
    "wrong", [{"keep": "all"}, {"span": "x"}, {"step_splitter": "x"}, {"top_k": 0}, {"batch_tokens": 0}, {"skip": -1}]
)
def test_probe_says_which_setting_is_wrong(wrong):
    with pytest.raises(ValueError, match=rf"probe\.{next(iter(wrong))}="):
        ScoringSettings(**wrong)


def test_no_temporary_file_is_left(make_data):
    folder: Path = scored(make_data()).statistics_folder
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "statistics.parquet"]

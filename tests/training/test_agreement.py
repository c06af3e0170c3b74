"""bfloat16 against float32: the comparison, and the dtype of the passes that follows. In real bfloat16 on the CPU."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import rows_of_a_pool, write_pool
from lark_command import lark
from lark_process import TWO_RANKS, finish, start
from scipy.stats import spearmanr
from tiny_student import byte_tokenizer, tiny_model

from lark.common.cache import read_json, write_json
from lark.common.groups import Groups, tie_hash
from lark.common.ranks import RUN_VARIABLE, Plan
from lark.scoring.passes import Statistics
from lark.scoring.table_cache import read_statistics
from lark.selection.scores.statistics import Length, Likelihood, LocalLikelihood, Random
from lark.student.student import Student
from lark.training.agreement import (
    agreement,
    candidates_of,
    choose_dtype,
    is_open,
    sample_rows,
    settle_dtype,
    statistics_in,
    unclaimed,
)

ACCELERATOR = torch.device("cuda")
SMALL = rows_of_a_pool(problems=16, candidates=4)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.setenv(RUN_VARIABLE, "")  # so that monkeypatch restores what a plan sets


@pytest.fixture
def settled(make_data, tmp_path):
    """A data module over the small pool after the comparison, wherever that is run; `least` as in `choose_dtype`."""

    def make(*, least=0.95, **settings):
        data = make_data(SMALL, **settings)
        data.prepare_data()
        choose_dtype(data, unclaimed, Plan(tmp_path), least=least)
        return data

    return make


# ---- two scores


def random_scores(rng, sizes):
    problem = np.repeat(np.arange(len(sizes)), sizes)
    a = rng.integers(0, 6, len(problem)).astype(float)  # with ties
    b = np.where(rng.random(len(a)) < 0.3, rng.integers(0, 6, len(a)), a)
    for scores in (a, b):
        scores[rng.random(len(a)) < 0.1] = np.nan
    return Groups.from_ids(problem), a, b


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_agreement_against_a_loop_over_problems(budget):
    rng = np.random.default_rng(budget)
    groups, a_N, b_N = random_scores(rng, rng.integers(1, 9, 60))
    tie_N = tie_hash(0, groups.index_N, range(len(a_N)))

    def ranked(score_N, rows):
        return sorted((r for r in rows if np.isfinite(score_N[r])), key=lambda r: (-score_N[r], tie_N[r]))

    problems, same, wanted, lost, rho = 0, 0, 0, 0, []
    for rows in groups.split():
        by_a, by_b = (ranked(score_N, rows.tolist()) for score_N in (a_N, b_N))
        if len({*by_a, *by_b}) <= budget:
            continue
        top_a, top_b = set(by_a[:budget]), set(by_b[:budget])
        problems += 1
        same += top_a == top_b
        wanted += len(top_a)
        lost += len(top_a - top_b)
        both = [row for row in by_a if row in by_b]
        if len(set(a_N[both])) > 1 and len(set(b_N[both])) > 1:
            rho.append(spearmanr(a_N[both], b_N[both])[0])
    result = agreement(a_N, b_N, groups, tie_N, budget=budget)
    assert 0 < same < problems < groups.count
    assert (result.problems, result.same) == (problems, same)
    assert result.changed == pytest.approx(lost / wanted)
    assert result.spearman == pytest.approx(np.mean(rho))
    assert result.share == same / problems


def test_a_score_agrees_with_itself_and_not_with_its_opposite():
    groups, a_N, _ = random_scores(np.random.default_rng(0), np.full(20, 6))
    a_N += np.arange(len(a_N)) / 1000  # no ties
    tie_N = tie_hash(0, groups.index_N, range(len(a_N)))
    alike = agreement(a_N, a_N.copy(), groups, tie_N, budget=2)
    assert (alike.share, alike.changed, alike.spearman) == (1.0, 0.0, pytest.approx(1.0))
    opposite = agreement(a_N, -a_N, groups, tie_N, budget=2)
    assert (opposite.share, opposite.spearman) == (0.0, pytest.approx(-1.0))


def test_problems_without_a_choice_do_not_count():
    groups = Groups.from_ids(["a", "a", "b", "b", "b"])
    scores = np.array([1.0, 2.0, 3.0, 1.0, np.nan])
    result = agreement(scores, -scores, groups, tie_hash(0, "aabbb", "12345"), budget=2)
    assert (result.problems, result.share, result.changed, result.spearman) == (0, 1.0, None, None)


# ---- whose candidates are compared


def test_whole_problems_are_sampled_whatever_the_order_of_rows():
    rng = np.random.default_rng(0)
    problem_N = np.repeat(np.array([f"p{i}" for i in range(100)], object), rng.integers(1, 6, 100))
    row_N = sample_rows(problem_N, budget=2, problems=10)
    names, counts = np.unique(problem_N[row_N].astype(str), return_counts=True)
    sizes = {name: int((problem_N == name).sum()) for name in names}
    assert len(names) == 10 and counts.tolist() == list(sizes.values()) and counts.min() > 2
    order = rng.permutation(len(problem_N))
    assert set(problem_N[order][sample_rows(problem_N[order], budget=2, problems=10)]) == set(names)
    assert len(set(problem_N[sample_rows(problem_N, budget=2, problems=20)]) & set(names)) == 10
    assert len(sample_rows(problem_N, budget=5)) == 0


def test_what_is_compared_are_the_statistics_of_the_pass(make_data):
    data = make_data(SMALL, student={"dtype": "float32"})
    data.prepare_data()
    data.score()
    rows = data.scored[sample_rows(data.trajectories.problem_id[data.scored], budget=2, problems=3)]
    checked = candidates_of(statistics_in("float32", data, rows), data)
    everything = read_statistics(data.statistics_folder)
    at = np.searchsorted(everything["row"], rows)
    np.testing.assert_array_equal(everything["row"][at], checked.row_N)
    for name in ("loss", "brier", "sum_rank_100", "num_tokens"):
        np.testing.assert_allclose(checked[name], everything[name][at], rtol=1e-5, err_msg=name)
    assert len(set(checked["problem_id"])) == 3
    bfloat16 = candidates_of(statistics_in("bfloat16", data, rows), data)
    assert 0 < np.abs(bfloat16["loss"] - checked["loss"]).max() < 0.3


# ---- the choice


def test_the_share_of_equal_sets_decides(settled, make_data):
    said = []
    share = settled().agreement["rules"]["lark"]["share"]
    for least, dtype in ((share, "bfloat16"), (share + 1e-6, "float32")):
        data = settled(least=least, say=said.append)
        assert data.agreement["passes"] == data.asked.dtype == dtype
        data.score()
        assert read_json(data.statistics_folder / "manifest.json")["identity"]["dtype"] == f"torch.{dtype}"
        explicit = make_data(SMALL, student={"dtype": dtype})
        explicit.prepare_data()
        assert data.statistics_folder.name == explicit.statistics_folder.name, "one cache, however it was settled"
        assert data.student.dtype == "auto", "what is trained and sampled stays as it was set"
    figures = data.agreement["rules"]["lark"]
    assert list(data.agreement["rules"]) == ["lark"], "random needs no statistics"
    assert figures["problems"] == len(set(data.trajectories.problem_id[data.scored])) == 12
    lines = [line for line in said if line.startswith("dtype ")]
    counts = f"{figures['same']} of 12 top-2 sets of lark as in float32 ({share:.0%}"
    assert lines[0] == f"dtype       bfloat16: {counts}), rank correlation {figures['spearman']:.3f}"
    assert lines[1].startswith(f"dtype       float32: in bfloat16 {counts}, less than ") and len(lines) == 2


def test_a_student_that_bfloat16_ruins_is_asked_in_float32(settled, tmp_path):
    """A shift of all logits by the same amount changes no prediction, but in bfloat16 it leaves no digits."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = tiny_model(tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1024.0)
    model.save_pretrained(tmp_path / "ruined")
    tokenizer.save_pretrained(tmp_path / "ruined")
    plain = settled(cache="plain").agreement["rules"]["lark"]
    data = settled(cache="ruined", student={"path": str(tmp_path / "ruined")})
    ruined = data.agreement["rules"]["lark"]
    assert data.asked.dtype == "float32"
    assert ruined["same"] < plain["same"]


def test_never_two_students_at_once_and_none_when_cached(settled, monkeypatch):
    loads, loaded = [], Student.load_model

    def load(self, dtype, **settings):
        gc.collect()
        assert all(earlier() is None for _, earlier in loads), "an earlier student is still there"
        model = loaded(self, dtype, **settings)
        loads.append((dtype, weakref.ref(model)))
        return model

    monkeypatch.setattr(Student, "load_model", load)
    first = settled()
    assert [dtype for dtype, _ in loads] == [torch.float32, torch.bfloat16]
    assert settled().agreement == first.agreement
    assert list(settled(baseline=LocalLikelihood()).agreement["rules"]) == ["lark", "likelihood"], "its stand-ins"
    others = settled(selector=Likelihood(), baseline=LocalLikelihood()).agreement["rules"]  # conftest calls it lark
    assert list(others) == ["lark", "lark (baseline)", "likelihood"]
    assert others["lark"] == others["likelihood"] and others["lark (baseline)"] == first.agreement["rules"]["lark"]
    assert len(loads) == 2, "the statistics serve all rules"


def test_nothing_to_compare(settled, monkeypatch):
    monkeypatch.setattr(Student, "load_model", lambda *_: pytest.fail("the student was loaded"))
    said = []
    data = settled(selector=Length(sign=1), baseline=Random(seed=0), say=said.append)
    assert data.asked.dtype == "bfloat16" and data.agreement["rules"] == {}
    assert "dtype       bfloat16: nothing to compare with float32, no rule reads the student's statistics" in said


def test_no_problem_offers_a_choice(make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(Student, "load_model", lambda *_: pytest.fail("the student was loaded"))
    said = []
    data = make_data(rows_of_a_pool(candidates=2), say=said.append)
    data.prepare_data()
    choose_dtype(data, unclaimed, Plan(tmp_path))
    assert data.asked.dtype == "bfloat16" and "no problem has more candidates than the budget" in said[-1]


def test_only_auto_on_an_accelerator_is_open(make_student, make_data, tmp_path, monkeypatch):
    assert is_open(make_student(), ACCELERATOR) and not is_open(make_student(), torch.device("cpu"))
    assert not any(is_open(make_student(dtype=dtype), ACCELERATOR) for dtype in ("float32", "bfloat16", "float16"))
    monkeypatch.setattr(Student, "load_model", lambda *_: pytest.fail("the student was loaded"))
    data = make_data(SMALL)
    data.prepare_data()
    settle_dtype(data, unclaimed, Plan(tmp_path))
    assert data.asked is data.scorer and data.agreement == {}
    assert not (tmp_path / "plan.json").exists() and not (data.cache / "agreement").exists()


def test_a_student_too_large_in_float32(settled, monkeypatch):
    def measure(*_):
        raise torch.OutOfMemoryError("64 GiB")

    monkeypatch.setattr("lark.training.agreement.measure", measure)
    with pytest.raises(ValueError, match=r"model\.dtype=auto .* small does not fit .* set model\.dtype=bfloat16"):
        settled()


# ---- in a run


def test_a_rank_obeys_the_plan(settled, make_data, tmp_path, monkeypatch):
    found = settled().agreement
    monkeypatch.setattr("lark.training.agreement.is_main", lambda: False)
    monkeypatch.setattr("lark.common.ranks.is_main", lambda: False)
    for dtype in ("float32", "bfloat16"):
        write_json(tmp_path / "plan.json", {"dtype": found | {"passes": dtype}})
        data = settled()
        assert data.asked.dtype == data.agreement["passes"] == dtype


def test_a_run_says_it_once_and_keeps_it(student_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lark.training.agreement.is_open", lambda *_: True)
    pool = write_pool(tmp_path / "pool.jsonl", SMALL)
    words = ("task=jsonl", "task.checker=number", f"task.pool={pool}", f"model.path={student_folder}", "logger=csv")
    for folder in ("first", "second"):  # the second finds everything cached
        paths = (f"paths.logs={tmp_path / 'logs'}", f"hydra.run.dir={tmp_path / folder}")
        done = lark(*words, *paths, "stop_after=statistics", "baseline=rsr", "task.max_length=256")
        assert done.code == 0, done.err
        (line,) = (line for line in done.out.splitlines() if line.startswith("dtype "))
        kept = read_json(tmp_path / folder / "summary.json")["agreement"]
        assert list(kept["rules"]) == ["lark", "rsr"] and kept == read_json(tmp_path / folder / "plan.json")["dtype"]
        assert line.startswith(f"dtype       {kept['passes']}: ") and " sets of lark " in line and "; " in line
    manifests = [read_json(path) for path in (tmp_path / "logs" / "cache" / "statistics").glob("*/manifest.json")]
    assert [manifest["identity"]["dtype"] for manifest in manifests] == [f"torch.{kept['passes']}"]


PATCHED = """
import lark.training.agreement
lark.training.agreement.is_open = lambda student, device: True
from lark.run import main
main()
"""


def test_two_ranks_settle_on_one_dtype(student_folder, tmp_path):
    (tmp_path / "patched.py").write_text(PATCHED)
    pool = write_pool(tmp_path / "pool.jsonl", SMALL)
    words = ("task=jsonl", "task.checker=number", f"task.pool={pool}", f"model.path={student_folder}", "logger=csv")
    paths = (f"paths.logs={tmp_path / 'logs'}", f"hydra.run.dir={tmp_path / 'run'}", "task.max_length=256")
    program = (str(tmp_path / "patched.py"),)
    output = finish(start(*words, *TWO_RANKS, "stop_after=selection", *paths, program=program))
    assert output.count("\ndtype ") == 1
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())["agreement"]
    folders = list((tmp_path / "logs" / "cache" / "agreement").glob("*/manifest.json"))
    dtypes = {json.loads(path.read_text())["identity"]["dtype"] for path in folders}
    assert dtypes == {"torch.float32", "torch.bfloat16"} and len(folders) == 2
    (statistics,) = (tmp_path / "logs" / "cache" / "statistics").glob("*/manifest.json")
    assert json.loads(statistics.read_text())["identity"]["dtype"] == f"torch.{kept['passes']}"
    assert Statistics().name in (tmp_path / "run" / "plan.json").read_text()

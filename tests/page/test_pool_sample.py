"""What a run keeps of its pool for the page: whole problems, the texts as they are trained, every choice."""

import numpy as np
import pytest
from conftest import rows_of_a_pool

from lark.common.groups import Groups
from lark.page import pool_sample
from lark.page.pool_sample import NAME, read_sample, sample_problems, shorten, write_sample


@pytest.fixture
def selected(make_data):
    data = make_data()
    data.prepare_data()
    data.setup("fit")
    return data


def test_columns_scores_and_weights_are_the_runs(selected, tmp_path):
    write_sample(tmp_path, selected, {"budget": 2})
    sample = read_sample(tmp_path)
    assert sample is not None
    candidates = selected.candidates
    assert sample.columns["problem_id"] == candidates.problem_id.tolist()
    assert sample.columns["candidate_id"] == candidates.candidate_id.tolist()
    assert sample.columns["teacher"] == candidates["teacher"].tolist()
    assert sample.columns["tokens"] == candidates["num_tokens"].tolist()
    np.testing.assert_allclose(sample.columns["loss"], candidates["loss"], rtol=1e-4)
    assert [bool(x) for x in sample.columns["correct"]] == [bool(x) for x in candidates["correct"]]
    for role, selection in selected.selections.items():
        np.testing.assert_allclose(np.array(sample.scores[role], float), selection.score_N, rtol=1e-4)
        weight_N = np.array(sample.weights[role])
        np.testing.assert_array_equal(candidates.row_N[weight_N > 0], selection.row)
        np.testing.assert_allclose(weight_N[weight_N > 0], selection.weight, rtol=1e-4)
    facts = sample.facts
    assert (facts["task"], facts["model"], facts["seed"], facts["settings"]) == ("sums", "small", 0, {"budget": 2})
    assert facts["problems"] == facts["of_problems"] == candidates.groups.count
    assert facts["trajectories"] == facts["of_trajectories"] == len(candidates)
    assert facts["arms"]["selector"]["record"]["counts"]["chosen"] == len(selected.selections["selector"].row)


def test_texts_are_the_pools_and_say_what_is_trained(selected, tmp_path):
    write_sample(tmp_path, selected, {})
    sample = read_sample(tmp_path)
    assert sample is not None
    rows = {(row["problem_id"], row["candidate_id"]): row for row in rows_of_a_pool()}
    ids = list(zip(sample.columns["problem_id"], sample.columns["candidate_id"], strict=True))
    pool, seen = selected.trajectories, 0
    for problem in sample.read_texts():
        of_problem = [key for key in ids if key[0] == problem["problem_id"]]
        assert len(of_problem) == len(problem["texts"])
        for key, text in zip(of_problem, problem["texts"], strict=True):
            question, trajectory = rows[key]["messages"]
            assert problem["question"] == {"text": question["content"]}
            assert (text["text"], text["untrained"]) == (trajectory["content"], None)
            assert sample.columns["characters"][ids.index(key)] == len(trajectory["content"])
            (encoded,) = pool.read_tokens(selected.candidates.row_N[[ids.index(key)]])
            whole = problem["prompt"]["text"] + text["text"] + text["end"]
            assert whole == pool.chat.tokenizer.decode(encoded.input_ids)
            assert text["end"].strip()
            seen += 1
    assert seen == len(ids)


def test_what_max_length_cuts_off_is_told_apart(make_data, tmp_path):
    data = make_data(task={"max_length": 60, "overlong": "truncate"})
    data.prepare_data()
    data.setup("fit")
    write_sample(tmp_path, data, {})
    sample = read_sample(tmp_path)
    assert sample is not None
    texts = [text for problem in sample.read_texts() for text in problem["texts"]]
    tokens = dict(zip([text["text"] for text in texts], sample.columns["tokens"], strict=True))
    cut = [text for text in texts if text["untrained"] is not None]
    assert 0 < len(cut) < len(texts)
    contents = {row["messages"][1]["content"] for row in rows_of_a_pool()}
    for text in cut:
        assert text["end"] == ""
        assert text["text"] + text["untrained"]["text"] in contents
        assert len(text["text"]) == tokens[text["text"]]  # this tokenizer reads bytes


def test_before_a_choice_there_are_texts_but_no_weights(make_data, tmp_path):
    data = make_data()
    data.prepare_data()
    data.score()
    write_sample(tmp_path, data, {})
    sample = read_sample(tmp_path)
    assert sample is not None
    assert sample.scores == sample.weights == sample.facts["arms"] == {}
    assert len(list(sample.read_texts())) == sample.facts["problems"]


def test_the_same_run_leaves_the_same_bytes(selected, tmp_path):
    for name in ("a", "b"):
        write_sample(tmp_path / name, selected, {})
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_large_pools_are_sampled_and_long_texts_cut(selected, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_sample, "TRAJECTORIES", 9)
    monkeypatch.setattr(pool_sample, "HEAD", 4)
    monkeypatch.setattr(pool_sample, "TAIL", 3)
    write_sample(tmp_path, selected, {})
    sample = read_sample(tmp_path)
    assert sample is not None
    facts, candidates = sample.facts, selected.candidates
    assert (facts["problems"], facts["trajectories"]) == (2, 8)
    assert (facts["of_problems"], facts["of_trajectories"]) == (candidates.groups.count, len(candidates))
    assert facts["cut"] == 8
    contents = {row["messages"][1]["content"] for row in rows_of_a_pool()}
    for text in (text for problem in sample.read_texts() for text in problem["texts"]):
        (whole,) = (
            c
            for c in contents
            if c.startswith(text["text"]) and c.endswith(text["tail"]) and len(c) == 7 + text["left_out"]
        )
        assert len(whole) > 7


def test_a_run_that_left_no_file_has_no_sample(tmp_path):
    assert read_sample(tmp_path) is None


def test_a_text_at_the_limit_is_whole():
    limit = pool_sample.HEAD + pool_sample.TAIL
    assert shorten("x" * limit) == {"text": "x" * limit}
    longer = shorten("a" * pool_sample.HEAD + "b" + "c" * pool_sample.TAIL)
    assert longer == {"text": "a" * pool_sample.HEAD, "left_out": 1, "tail": "c" * pool_sample.TAIL}


@pytest.mark.parametrize("limit", [1, 7, 40, 1_000])
def test_samples_are_whole_problems_that_do_not_depend_on_the_order(limit):
    rng = np.random.default_rng(limit)
    ids = [f"p{number}" for number in range(60) for _ in range(rng.integers(2, 9))]
    rows = sample_problems(Groups.from_ids(ids), list(dict.fromkeys(ids)), limit=limit)
    assert 0 < len(rows) <= limit
    sizes = {problem: ids.count(problem) for problem in ids}
    chosen = [ids[row] for row in rows]
    if limit >= max(sizes.values()):
        assert all(chosen.count(problem) == sizes[problem] for problem in chosen)
    shuffled = rng.permutation(len(ids))
    again = [ids[i] for i in shuffled]
    rows = sample_problems(Groups.from_ids(again), list(dict.fromkeys(again)), limit=limit)
    assert sorted(again[row] for row in rows) == sorted(chosen)
    if limit == 1_000:
        assert len(rows) == len(ids)

"""What the browser of trajectories gets: the pools' texts, who chose what, and no more than fits."""

import base64
import gzip
import json

import pytest
from page_folders import RULES, small_sweep

from lark.comparison.summaries import read_summaries
from lark.page import trajectories
from lark.page.contents import gather
from lark.page.trajectories import pack


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    small_sweep(folder)
    return gather(read_summaries([folder])).groups[0].pools


def unpacked(packed: str) -> list[dict]:
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_every_candidate_has_its_text_scores_and_weights(pools):
    heads, packed = pack(pools)
    ((pool,), (shown,)) = pools, unpacked(packed)
    assert [rule["label"] for rule in shown["rules"]] == list(RULES)
    assert all(rule["seeds"] == [0, 1] and rule["scored"] for rule in shown["rules"])
    columns, texts = pool.sample.columns, {}
    for problem in pool.sample.read_texts():
        texts[problem["problem_id"]] = problem
    row = 0
    for problem in shown["problems"]:
        assert problem["question"] == texts[problem["problem_id"]]["question"]
        for candidate, text in zip(problem["rows"], texts[problem["problem_id"]]["texts"], strict=True):
            assert candidate["text"] == text["text"] and candidate["end"] == text["end"]
            assert shown["teachers"][candidate["teacher"]] == columns["teacher"][row]
            assert candidate["scores"] == [choice.scores[row] for choice in pool.choices]
            for number, choice in enumerate(pool.choices):
                weights = [sample.weights[role][row] for role, sample in choice.by_seed.values()]
                chosen = [weight for weight in weights if weight]
                found = [entry[1:] for entry in candidate["chosen"] if entry[0] == number]
                if chosen:
                    assert found == [[pytest.approx(sum(chosen) / len(chosen), rel=1e-3), len(chosen)]]
                else:
                    assert not found
            row += 1
    assert row == len(columns["problem_id"]) == heads[0]["trajectories"]
    assert heads[0]["problems"] == 8 and heads[0]["of_problems"] == 32


def test_pools_share_the_limit_by_whole_problems(pools, monkeypatch):
    monkeypatch.setattr(trajectories, "TRAJECTORIES", 22)
    heads, packed = pack([*pools, *pools])
    for head, shown in zip(heads, unpacked(packed), strict=True):
        assert [len(problem["rows"]) for problem in shown["problems"]] == [5, 5]
        assert (head["problems"], head["trajectories"]) == (2, 10)


def test_bytes_are_bounded_too(pools, monkeypatch):
    _, whole = pack(pools)
    monkeypatch.setattr(trajectories, "PACKED_BYTES", len(whole) * 2 // 3)
    heads, packed = pack(pools)
    assert len(packed) <= len(whole) * 2 // 3
    assert 0 < heads[0]["problems"] < 8
    monkeypatch.setattr(trajectories, "PACKED_BYTES", 10)
    heads, _ = pack(pools)
    assert heads[0]["trajectories"] == 1  # each pool keeps one

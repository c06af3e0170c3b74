"""selection.jsonl as other trainers read it: datasets, and the rules of LLaMA-Factory's format."""

import json
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest

from lark.selection.export import count_repeats, export_repeated, export_selection, plan_repeats
from lark.selection.selection import Selection

TURNS = {
    "one answer": ["user", "assistant"],
    "with a system turn": ["system", "user", "assistant"],
    "several answers": ["user", "assistant", "user", "assistant"],
}


def selection_of(rows):
    one = np.ones(rows)
    return Selection(row=np.arange(rows), q=one, weight=one, score=one, record={}, score_N=one, taken_by_problem={})


def pool_row(i, roles, **fields):
    messages = [{"role": role, "content": f"{role} {i}.{turn}"} for turn, role in enumerate(roles)]
    return {"problem_id": str(i), "candidate_id": "0", "teacher": None, "answer": None, "correct": None} | {
        "messages": messages,
        **fields,
    }


def written(folder, rows):
    path = folder / "selection.jsonl"
    export_selection(selection_of(len(rows)), lambda row_N: (rows[i] for i in row_N), path, name="lark")
    return path


def load(path) -> list[dict]:
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache")
    )
    return list(loaded)


def factory_rows(folder, name):
    """(system, prompt, response) of every row as LLaMA-Factory takes them; None for a row that it would skip.

    By its documented rules for `formatting: sharegpt`: a tag that is left out of `tags` is none at all; a first turn by
    the system tag is the system prompt; then odd turns are the users and even ones the assistants, and as many of both.
    """
    info = json.loads((folder / "dataset_info.json").read_text())[name]
    assert info["formatting"] == "sharegpt" and (folder / info["file_name"]).suffix == ".jsonl"
    tags, column = info["tags"], info["columns"]["messages"]
    for line in (folder / info["file_name"]).read_text().splitlines():
        turns = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in json.loads(line)[column]]
        system = turns.pop(0)[1] if turns[0][0] == tags["system_tag"] else ""
        odd, even = (tags["user_tag"], tags["observation_tag"]), (tags["assistant_tag"], tags["function_tag"])
        fits = len(turns) % 2 == 0 and all(role in (odd, even)[i % 2] for i, (role, _) in enumerate(turns))
        yield (system, [text for _, text in turns[:-1]], turns[-1][1]) if fits else None


@pytest.mark.parametrize("kind", TURNS)
def test_llama_factory_finds_prompt_and_answer(tmp_path, kind):
    roles = TURNS[kind]
    written(tmp_path, [pool_row(i, roles) for i in range(3)])
    for i, row in enumerate(factory_rows(tmp_path, "selection")):
        texts = [f"{role} {i}.{turn}" for turn, role in enumerate(roles)]
        system = texts.pop(0) if roles[0] == "system" else ""
        assert row == (system, texts[:-1], texts[-1])


def test_llama_factory_skips_turns_that_do_not_alternate(tmp_path):
    written(tmp_path, [pool_row(0, ["user", "user", "assistant"])])
    assert list(factory_rows(tmp_path, "selection")) == [None]


def test_a_field_that_has_its_first_value_far_down_loads(tmp_path):
    """datasets takes a column's type from the first 10 MB, and fails when a later row has another."""
    padding = {"role": "user", "content": "x" * 100_000}
    fields = [{}] * 120 + [{"teacher": "late", "answer": "1"}] + [{}] * 3 + [{"correct": True, "answer": "2"}] + [{}]
    rows = [pool_row(i, ["assistant"], **some) for i, some in enumerate(fields)]
    for row in rows:
        row["messages"].insert(0, padding)
    loaded = load(written(tmp_path, rows))
    order = [120, 124, *(i for i in range(len(rows)) if i not in (120, 124))]
    assert [row["meta"]["problem_id"] for row in loaded] == [str(i) for i in order]
    for i, row in zip(order, loaded, strict=True):
        assert row["messages"] == rows[i]["messages"]
        assert [row["meta"][key] for key in ("teacher", "answer", "correct")] == [
            rows[i][key] for key in ("teacher", "answer", "correct")
        ]


def test_a_field_that_has_a_value_in_time_moves_nothing(tmp_path):
    path = written(tmp_path, [pool_row(i, ["user", "assistant"], teacher="t" if i else None) for i in range(4)])
    assert [row["meta"]["problem_id"] for row in load(path)] == ["0", "1", "2", "3"]


TEXTS = ["plain", 'quotes " and \\boxed{\\frac{1}{2}}', "lines\n\r\nand\ttabs", "☃ 𝒳 \u2028 é", ""]


def varied_row(row: int) -> dict:
    turns = [{"role": "user", "content": f"Problem {row}\n?"}, {"role": "assistant", "content": TEXTS[row % 5]}]
    return {
        "problem_id": f"p{row}",
        "candidate_id": "0",
        "teacher": None if row % 2 else "teacher",
        "answer": str(row),
        "correct": (True, False, None)[row % 3],
        "messages": turns,
    }


def test_the_export_loads_and_keeps_every_text(tmp_path):
    selection = selection_of(20)
    path = tmp_path / "selection.jsonl"
    export_selection(selection, lambda row_N: map(varied_row, row_N.tolist()), path, name="lark")
    lines = [json.loads(line) for line in path.read_bytes().decode().removesuffix("\n").split("\n")]
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(lines) == len(loaded) == len(selection.row)  # type: ignore[arg-type]
    for i, (line, row) in enumerate(zip(lines, loaded, strict=True)):
        source = varied_row(int(selection.row[i]))
        assert line == row
        assert line["messages"] == source.pop("messages")
        assert line["weight"] == selection.weight[i]
        expected = {**source, "rule": "lark", "score": selection.score[i], "share": selection.q[i]}
        assert line["meta"] == expected


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    selection = selection_of(20)
    path = tmp_path / "selection.jsonl"
    path.write_text("earlier")
    with pytest.raises(ValueError, match="longer"):
        export_selection(selection, lambda row_N: [varied_row(0)], path, name="lark")
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("times", [1, 2, 4])
def test_repeats_are_the_whole_numbers_nearest_to_the_weights(seed, times):
    rng = np.random.default_rng(seed)
    weight = rng.gamma(0.5, size=rng.integers(2, 60))
    lines = times * len(weight)
    count, quota = count_repeats(weight, lines), lines * weight / weight.sum()
    assert count.sum() == lines and (np.abs(count - quota) < 1).all()
    moved = np.abs(count - quota).sum()
    for give, take in rng.integers(len(weight), size=(200, 2)):  # no single line stands better elsewhere
        other = count + (np.arange(len(weight)) == take) - (np.arange(len(weight)) == give)
        assert np.abs(other - quota).sum() >= moved - 1e-9


def test_the_repeated_file_counts_like_the_weights(tmp_path):
    rows = [pool_row(i, ["user", "assistant"]) for i in range(3)]
    selection = replace(selection_of(3), weight=np.array([2.0, 0.9, 0.1]))
    facts = plan_repeats(selection, 2)
    assert facts == {"lines": 6, "rows": 2, "weight_left_out": pytest.approx(0.1 / 3), "error": pytest.approx(0.1 / 3)}
    path = tmp_path / "selection-repeated.jsonl"
    written(tmp_path, rows)
    export_repeated(selection, lambda row_N: (rows[i] for i in row_N), path, name="lark", lines=6)
    lines = load(path)
    assert [line["meta"]["problem_id"] for line in lines] == ["0", "1", "0", "1", "0", "0"]
    assert {line["weight"] for line in lines} == {1.0}
    assert list(json.loads((tmp_path / "dataset_info.json").read_text())) == ["selection", "selection-repeated"]
    assert plan_repeats(selection_of(3), 2) is None

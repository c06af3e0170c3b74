import dataclasses
import json

from lark.common.cache import write_json
from lark.evaluation.samples import (
    find_partial_files,
    gather_samples,
    open_samples,
    read_rows,
    read_verdicts,
    write_rows,
)
from lark.generation.transformers_backend import Sample

ONE, OTHER = "0123456789abcdef", "fedcba9876543210"


def sample(problem: str, number: int) -> dict:
    return dataclasses.asdict(
        Sample(problem_id=problem, sample=number, text="\u2028 line", num_tokens=3, stop=True, truncated=False)
    )


def test_the_files_of_all_ranks_are_gathered_and_no_others(tmp_path):
    for rank, identity in enumerate([ONE, ONE, OTHER]):
        with open_samples(tmp_path / "new", "eval", identity, rank) as file:
            file.add(sample("a", rank))
            file.add(sample("b", 0))
    folder = tmp_path / "new"
    with open(find_partial_files(folder, "eval", ONE)[1], "a") as file:
        file.write(json.dumps(sample("c", 0))[:30])  # cut off by a kill
    for name in ("eval[1]", "evaluation", "eval.x"):
        open_samples(folder, name, ONE, 0).close()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(find_partial_files(folder, "eval")) == 3 and len(find_partial_files(folder, "eval[1]")) == 1
    assert gather_samples(folder, "eval", ONE) == {key: sample(*key) for key in [("a", 0), ("a", 1), ("b", 0)]}
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_samples_of_a_finished_evaluation_are_taken_without_their_verdicts(tmp_path):
    write_rows(tmp_path / "samples-eval.jsonl", [sample("a", 0) | {"correct": True, "answer": "1"}])
    write_json(tmp_path / "evaluation.json", {"sets": {"eval": {"samples": ONE}}})
    assert gather_samples(tmp_path, "eval", ONE) == {("a", 0): sample("a", 0)}
    assert gather_samples(tmp_path, "eval", OTHER) == gather_samples(tmp_path, "other", ONE) == {}
    assert read_rows(tmp_path / "samples-eval.jsonl")[0]["answer"] == "1"


def test_verdicts_by_problem(tmp_path):
    rows = [("a", 1, True), ("a", 0, False), ("b", 0, True)]
    path = tmp_path / "samples.jsonl"
    write_rows(path, [dict(problem_id=p, sample=n, correct=c) for p, n, c in rows])
    assert read_verdicts(path) == {"a": [False, True], "b": [True]}

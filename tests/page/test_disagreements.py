"""Answers of the students: problems that they do not answer alike, on either side, with the verdict that shows it."""

from pathlib import Path

import pytest
from summaries import arm, run

from lark.common.cache import write_json
from lark.evaluation.samples import write_rows
from lark.page.disagreements import LENGTH, SHOWN, read_disagreements

RIGHT = {"selector": [4, 4, 2, 0, 0, 4, 4, 1], "baseline": [4, 0, 0, 4, 3, 1, 0, 0]}
"""Samples of four that are right, by problem."""
LABELS = {"selector": "lark", "baseline": "random"}


@pytest.fixture
def summary(tmp_path: Path) -> dict:
    arms = {}
    for role, counts in RIGHT.items():
        folder = tmp_path / role / "samples" / "eval"
        keys = [(str(problem), sample) for problem in range(len(counts)) for sample in range(4)]
        rows = [{"problem_id": key, "sample": n, "text": f"{role} {key} {n} " + "x" * 3 * LENGTH} for key, n in keys]
        said = [
            {"problem_id": key, "sample": n, "gold": key, "correct": n >= 4 - counts[int(key)], "answer": ""}
            for key, n in keys
        ]
        folder.mkdir(parents=True)
        write_rows(folder / "samples.jsonl", rows)
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "?"}]
        write_rows(folder / "problems.jsonl", [{"problem_id": key, "messages": turns} for key, n in keys if n == 0])
        write_json(folder / "verdicts" / "h.json", {"verdicts": said})
        accuracy: dict[str, dict[str, float | None]] = {
            "eval": {str(problem): count / 4 for problem, count in enumerate(counts)}
        }
        arms[role] = arm(LABELS[role], role, accuracy, answers={"eval": {"samples": "x", "verdicts": "h"}})
    return run(selector=arms["selector"], baseline=arms["baseline"])


def test_largest_differences_to_either_side_with_their_verdicts(summary: dict, tmp_path: Path) -> None:
    found = read_disagreements(tmp_path, summary, LABELS)
    assert [one.problem_id for one in found] == ["1", "6", "5", "3", "4"]
    assert len(found) <= SHOWN and {(one.set, one.question) for one in found} == {("eval", "?")}
    for one in found:
        ours, theirs = one.answers
        assert (ours.student, theirs.student) == ("lark", "random") and one.gold == one.problem_id
        assert (ours.right, theirs.right) == tuple(counts[int(one.problem_id)] for counts in RIGHT.values())
        assert (ours.is_right, theirs.is_right) == (ours.right > theirs.right, ours.right < theirs.right)
        assert all(len(answer.text) == LENGTH + 2 for answer in one.answers)


def test_without_samples_there_are_none(summary: dict, tmp_path: Path) -> None:
    assert read_disagreements(tmp_path / "elsewhere", summary, LABELS) == ()
    del summary["arms"]["selector"]["answers"]
    assert read_disagreements(tmp_path, summary, LABELS) == ()

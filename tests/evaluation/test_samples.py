import dataclasses
import json

from lark.evaluation.samples import gather, partial_file, partial_files, per_problem, resume
from lark.generation.transformers_backend import Sample


def sample(problem: str, number: int) -> Sample:
    return Sample(
        problem_id=problem, sample=number, text="\u2028 line", num_tokens=3, stop=True, truncated=False, boxed=False
    )


def append(path, *samples: Sample, cut: int | None = None) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for one in samples:
            file.write((json.dumps(dataclasses.asdict(one)) + "\n")[:cut])


def test_a_file_grows_and_is_taken_up_again(tmp_path, capsys):
    path = partial_file(tmp_path / "new", "eval", 0)
    assert resume(path, "one") == []
    append(path, sample("a", 0), sample("a", 1))
    append(path, sample("b", 0), cut=20)
    assert resume(path, "one") == [sample("a", 0), sample("a", 1)]
    assert path.read_bytes().endswith(b"}\n")  # the torn line is gone
    assert "2 samples are there" in capsys.readouterr().out
    append(path, sample("b", 0))
    assert len(resume(path, "one")) == 3
    assert resume(path, "another") == []
    assert "starting it again" in capsys.readouterr().out
    assert resume(path, "one") == []


def test_the_files_of_all_ranks_are_gathered(tmp_path):
    for rank, identity in enumerate(["one", "one", "another"]):
        path = partial_file(tmp_path, "eval", rank)
        resume(path, identity)
        append(path, sample("a", rank), sample("b", 0))
    append(partial_file(tmp_path, "eval", 1), sample("c", 0), cut=30)
    resume(partial_file(tmp_path, "eval[1]", 0), "one")
    resume(partial_file(tmp_path, "evaluation", 0), "one")
    files = partial_files(tmp_path, "eval")
    before = [path.read_bytes() for path in files]
    assert len(files) == 3
    assert len(partial_files(tmp_path, "eval[1]")) == 1
    assert sorted((s.problem_id, s.sample) for s in gather(files, "one")) == [("a", 0), ("a", 1), ("b", 0)]
    assert [path.read_bytes() for path in files] == before


def test_verdicts_by_problem(tmp_path):
    rows = [("a", 1, True), ("a", 0, False), ("b", 0, True)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(dict(problem_id=p, sample=n, correct=c)) + "\n" for p, n, c in rows))
    assert per_problem(path) == {"a": [False, True], "b": [True]}

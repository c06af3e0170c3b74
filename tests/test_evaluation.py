import json

import pytest
import torch
from tiny_student import byte_tokenizer, tiny_model

from lark.evaluation import Sampling, evaluate, summarise
from lark.metrics import average_at_k
from lark.samples import per_problem, read_samples
from lark.verify import Checker


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


PROBLEMS = [{"problem_id": f"p{i}", "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(6)]


@pytest.fixture
def run(model, tokenizer, tmp_path):
    def evaluation(**changes):
        settings = dict(samples=3, max_new_tokens=24, seed=5, batch_size=4, pass_at=(1, 3))
        with Checker("number", pattern=r"(\d)") as checker:
            return evaluate(
                model,
                tokenizer,
                lambda messages: tokenizer("".join(turn["content"] for turn in messages))["input_ids"],
                changes.pop("problems", PROBLEMS),
                **{
                    "checker": checker,
                    "path": tmp_path / "samples.jsonl",
                    "stop_ids": [tokenizer.eos_token_id],
                    "temperature": 1.0,
                    **settings,
                    **changes,
                },
            )

    return evaluation


def test_samples_are_saved_and_summed_up(run, tmp_path):
    summary = run()
    path = tmp_path / "samples.jsonl"
    records = read_samples(path)
    assert [(record["problem_id"], record["sample"]) for record in records] == [
        (f"p{i}", n) for i in range(6) for n in range(3)
    ]
    assert set(records[0]) == {
        *("problem_id", "sample", "text", "num_tokens", "stop", "truncated", "boxed", "answer", "correct", "timed_out")
    }
    assert list(summary) == [
        *("avg@3", "pass@1", "pass@3", "boxed", "stop", "truncated", "timeouts", "problems", "samples")
    ]
    correct = per_problem(path)
    assert list(correct) == [f"p{i}" for i in range(6)]
    assert summary["avg@3"] == pytest.approx(average_at_k(torch.tensor(list(correct.values()))).mean().item())
    assert summary["pass@3"] == pytest.approx(sum(map(any, correct.values())) / 6)
    assert summary["stop"] + summary["truncated"] == pytest.approx(1)
    assert (summary["problems"], summary["samples"], summary["timeouts"]) == (6, 3, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


def test_summary_by_hand():
    def record(problem, correct, stop, timed_out=False):
        return dict(
            problem_id=problem, correct=correct, boxed=correct, stop=stop, truncated=not stop, timed_out=timed_out
        )

    records = [
        record("a", True, True),
        record("a", False, True),
        record("b", False, False, timed_out=True),
        record("b", False, True),
    ]
    assert summarise(records, pass_at=(1, 2)) == {
        "avg@2": 0.25,
        "pass@1": 0.25,
        "pass@2": 0.5,
        "boxed": 0.25,
        "stop": 0.75,
        "truncated": 0.25,
        "timeouts": 1,
        "problems": 2,
        "samples": 2,
    }


class Killed(BaseException):
    pass


def test_an_evaluation_killed_twice_goes_on_where_it_stopped(run, model, tmp_path, monkeypatch):
    run()
    path, partial = tmp_path / "samples.jsonl", tmp_path / "samples.jsonl.partial"
    whole = path.read_bytes()
    path.unlink()
    begun, generate = [], model.generate  # rows of each batch begun

    def dies_in_batch(number):
        def dying(**kwargs):
            if kwargs["past_key_values"] is None:
                begun.append(len(kwargs["input_ids"]))
            if len(begun) == number:
                raise Killed
            return generate(**kwargs)

        begun.clear()
        monkeypatch.setattr(model, "generate", dying)

    dies_in_batch(3)
    with pytest.raises(Killed):
        run()
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 4  # a header and two batches
    partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # the kill came in the middle of a line

    dies_in_batch(2)
    with pytest.raises(Killed):
        run()
    assert len(partial.read_bytes().splitlines()) == 1 + 7 + 4
    assert not path.exists()

    dies_in_batch(0)  # never
    run()
    assert sum(begun) == 18 - 11
    assert path.read_bytes() == whole
    assert not partial.exists()


def test_partial_file_of_another_evaluation_is_not_used(run, tmp_path, capsys):
    run()
    expected = (tmp_path / "samples.jsonl").read_bytes()
    foreign = {"problem_id": "p0", "sample": 0, "text": "x", "num_tokens": 1}
    foreign |= {"stop": True, "truncated": False, "boxed": False}
    partial = tmp_path / "samples.jsonl.partial"
    partial.write_text('{"identity": "other"}\n' + json.dumps(foreign) + "\n")
    run()
    assert (tmp_path / "samples.jsonl").read_bytes() == expected
    assert "other prompts or settings" in capsys.readouterr().out


def test_what_cannot_be_checked_is_refused_before_generating(run, model, monkeypatch):
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ValueError, match=r"task\.checker='number'"):
        run(problems=[PROBLEMS[0] | {"answer": "one"}])
    with pytest.raises(ValueError, match=r"evaluation\.pass_at=4"):
        run(pass_at=(4,))
    with pytest.raises(ValueError, match=r"task\.eval"):
        run(problems=[])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"pass_at": [5]}, "pass_at=5"), ({"samples": 0}, "samples=0"), ({"top_p": 1.5}, "top_p=1.5")],
)
def test_sampling_checks_itself(changes, named):
    with pytest.raises(ValueError, match=f"evaluation.{named}"):
        Sampling(**changes)

import json
from dataclasses import replace

import pytest
from tiny_student import byte_tokenizer, tiny_model

from lark.answers.checker import Checker
from lark.evaluation.evaluate import Sampling, evaluate
from lark.evaluation.samples import find_partial_files, read_rows, read_verdicts
from lark.generation.backends import Backend
from lark.generation.transformers_backend import generate_samples

PROBLEMS = [{"problem_id": f"p{i}", "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(6)]
OTHERS = [{"problem_id": f"p{i}", "problem": f"{i} - 1?", "answer": str(i - 1), "level": i % 2} for i in range(1, 6)]


@pytest.fixture(scope="module")
def backend():
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)
    return Backend(
        generate=lambda prompts, keys, folder, **settings: generate_samples(
            model, tokenizer, prompts, keys, **settings, batch_size=4
        ),
        encode_prompt=lambda messages: tokenizer("".join(turn["content"] for turn in messages))["input_ids"],
        stop_ids=[tokenizer.eos_token_id],  # type: ignore[list-item]
        identity={"weights": "tiny"},
    )


@pytest.fixture
def run(backend, tmp_path):
    """Evaluates into a folder, by default of two sets; returns metrics.json."""

    def evaluation(by=backend, *, folder=tmp_path / "evaluation", sets=None, sampling=None, **changes):
        settings = {"max_new_tokens": 24, "seed": 5, "identity": {"some": "identity"}, "record": {"by": "a test"}}
        with changes.pop("checker", None) or Checker("number", pattern=r"(\d)") as checker:
            evaluate(
                by,
                {"eval": PROBLEMS, "other": OTHERS} if sets is None else sets,
                folder,
                checker=checker,
                sampling=Sampling(**{"samples": 3, "pass_at": (1, 3), "temperature": 1.0} | (sampling or {})),
                **settings | changes,
            )
        return json.loads((folder / "metrics.json").read_text())

    return evaluation


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_an_evaluation_leaves(run, tmp_path):
    metrics, folder = run(), tmp_path / "evaluation"
    files = {"evaluation.json", "metrics.json"}
    assert set(contents(folder)) == files | {
        f"{kind}-{name}.jsonl" for kind in ("samples", "problems") for name in ("eval", "other")
    }
    records = read_rows(folder / "samples-eval.jsonl")
    assert [(record["problem_id"], record["sample"]) for record in records] == [
        (f"p{i}", n) for i in range(6) for n in range(3)
    ]
    assert {"text", "num_tokens", "stop", "truncated", "boxed", "answer", "correct", "timed_out"} <= set(records[0])
    assert read_rows(folder / "problems-other.jsonl") == OTHERS
    correct = read_verdicts(folder / "samples-eval.jsonl")
    assert list(correct) == [f"p{i}" for i in range(6)]
    figures = metrics["sets"]["eval"]
    assert figures["avg@3"] == pytest.approx(sum(map(sum, correct.values())) / 18)
    assert figures["pass@3"] == pytest.approx(sum(map(any, correct.values())) / 6)
    assert metrics["intervals"]["eval"]["low"] <= figures["avg@3"] <= metrics["intervals"]["eval"]["high"]
    assert metrics["identity"] == {"some": "identity"}
    assert list(metrics["levels"]) == ["other"]
    assert [of["metrics"]["problems"] for of in metrics["levels"]["other"].values()] == [2, 3]


def test_how_to_repeat_it_is_written(run, tmp_path):
    rows = [
        *PROBLEMS[:2],
        PROBLEMS[2] | {"prompt": "boxed-1"},
        PROBLEMS[3] | {"messages": [{"role": "user", "content": "?"}]},
    ]
    run(sets={"eval": rows}, system="Think.")
    record = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert record["by"] == "a test"
    settings = {"samples": 3, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 24, "seed": 5, "stop_ids": [256]}
    assert record["sampling"].items() >= settings.items()
    assert record["sets"]["eval"]["prompts"] == {"system turn 'Think.'": 2, "boxed-1": 1, "messages of the row": 1}


class Killed(BaseException):
    pass


def dying(backend, samples):
    """The backend, until it has given so many samples; and how many it has given at a time."""
    drawn = []

    def generate(*prompts_keys_folder, **settings):
        for batch in backend.generate(*prompts_keys_folder, **settings):
            if sum(drawn) >= samples:
                raise Killed
            drawn.append(len(batch))
            yield batch

    return replace(backend, generate=generate), drawn


def test_an_evaluation_killed_again_and_again_loses_nothing(run, backend, tmp_path):
    run(folder=tmp_path / "whole")
    folder = tmp_path / "evaluation"
    killed, drawn = dying(backend, 8)
    with pytest.raises(Killed):
        run(killed)
    (partial,) = find_partial_files(folder, "eval")
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + sum(drawn)
    partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # the kill came in the middle of a line
    drawn_before = sum(drawn) - 1

    killed, drawn = dying(backend, 18 - drawn_before + 4)  # in the second set, the first of which is complete
    with pytest.raises(Killed):
        run(killed)
    assert len(partial.read_bytes().splitlines()) == 1 + 18
    drawn_before += sum(drawn)

    unharmed, drawn = dying(backend, 10**6)
    run(unharmed)
    assert drawn_before + sum(drawn) == (6 + 5) * 3
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_kill_while_answers_are_checked_loses_no_sample(run, backend, tmp_path, monkeypatch):
    run(folder=tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Checker, "check", lambda *_: (_ for _ in ()).throw(Killed))
        run()
    unable, _ = dying(backend, 0)
    run(unable)
    assert contents(tmp_path / "evaluation") == contents(tmp_path / "whole")


def test_two_ranks_share_the_problems_and_one_may_go_on_alone(run, backend, tmp_path):
    whole = run(folder=tmp_path / "whole")
    folder = tmp_path / "evaluation"
    second, drawn = dying(backend, 10**6)
    with pytest.raises(FileNotFoundError):  # rank 1 leaves metrics.json to rank 0
        run(second, rank=1, world=2)
    assert sum(drawn) == 3 * 3 + 2 * 3
    first, drawn = dying(backend, 10**6)
    assert run(first) == whole
    assert sum(drawn) == 3 * 3 + 3 * 3
    assert contents(folder).keys() == contents(tmp_path / "whole").keys()


def test_an_backend_that_rank_0_alone_may_use(run, backend, tmp_path):
    alone, drawn = dying(replace(backend, every_rank=False), 10**6)
    with pytest.raises(FileNotFoundError):
        run(alone, rank=1, world=2)
    assert not drawn
    run(alone, rank=0, world=2)
    assert sum(drawn) == (6 + 5) * 3


@pytest.mark.parametrize(
    "other",
    [{"identity": {"weights": "others"}}, {"encode_prompt": lambda messages: [1, 2, 3]}, {"stop_ids": [256, 5]}],
)
def test_samples_of_other_weights_prompts_and_settings_are_not_taken(run, backend, tmp_path, other):
    few = {"eval": PROBLEMS[:3]}
    run(folder=tmp_path / "whole", sets=few)
    run(replace(backend, **other), sets=few)
    killed, _ = dying(replace(backend, **other), 4)
    with pytest.raises(Killed):
        run(killed, sets={"eval": PROBLEMS[:4]})
    run(sets=few)
    assert contents(tmp_path / "evaluation") == contents(tmp_path / "whole")


def test_another_set_or_checker_draws_no_sample_again(run, backend, tmp_path):
    run(folder=tmp_path / "whole")
    run(sets={"eval": PROBLEMS})
    counting, drawn = dying(backend, 10**6)
    run(counting)
    assert sum(drawn) == 5 * 3  # those of the new set
    assert contents(tmp_path / "evaluation") == contents(tmp_path / "whole")
    unable, _ = dying(backend, 0)
    before = read_rows(tmp_path / "evaluation" / "samples-eval.jsonl")
    run(unable, sets={"eval": PROBLEMS}, checker=Checker("exact"))
    after = read_rows(tmp_path / "evaluation" / "samples-eval.jsonl")
    assert [row["text"] for row in after] == [row["text"] for row in before]
    assert [row["answer"] for row in after] != [row["answer"] for row in before]
    run(unable)  # the other set's samples are still there


def test_what_cannot_be_checked_is_refused_before_generating(run, backend):
    unable, _ = dying(backend, 0)
    with pytest.raises(ValueError, match=r"task\.checker='number'"):
        run(unable, sets={"eval": [PROBLEMS[0] | {"answer": "one"}]})
    with pytest.raises(ValueError, match=r"task\.eval"):
        run(unable, sets={"eval": []})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pass_at": [5]}, "pass_at=5"),
        ({"pass_at": []}, "pass_at=\\[\\]"),
        ({"samples": 0}, "samples=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"vllm_gpus": 0}, "vllm_gpus=0"),
        ({"vllm_memory": 90}, "vllm_memory=90"),
        ({"engine": "sglang"}, "engine='sglang'.*transformers, vllm"),
    ],
)
def test_sampling_checks_itself(changes, named):
    with pytest.raises(ValueError, match=f"evaluation.{named}"):
        Sampling(**changes)

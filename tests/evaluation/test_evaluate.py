import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_student import byte_tokenizer, tiny_model

from lark.answers.checker import Checker
from lark.evaluation.evaluate import Evaluator, Sampling
from lark.evaluation.samples import draw_samples, read_rows
from lark.evaluation.verdicts import read_answers
from lark.generation.backends import Backend
from lark.generation.transformers_backend import generate_samples
from lark.tasks.task import Task

PROBLEMS = [{"problem_id": f"p{i}", "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(6)]
OTHERS = [{"problem_id": f"p{i}", "problem": f"{i} - 1?", "answer": str(i - 1), "level": i % 2} for i in range(1, 6)]
SETS = {"eval": PROBLEMS, "other": OTHERS}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def tiny():
    tokenizer = byte_tokenizer()
    return tiny_model(tokenizer), tokenizer


@pytest.fixture
def make_backend(tiny):
    """A tiny model behind a backend that counts what it draws, and dies after so many samples."""
    model, tokenizer = tiny

    class Counting(Backend):
        def __init__(self, *, weights: str = "tiny", stop_ids=(256,), alive: int = 10**6):
            self.weights, self.stop_ids, self.alive, self.drawn = {"of": weights}, list(stop_ids), alive, 0  # type: ignore[assignment]

        @property
        def identity(self):
            return {"weights": self.weights, "engine": "counting"}

        def generate(self, prompts, keys, folder, **settings):
            for batch in generate_samples(model, tokenizer, prompts, keys, **settings, batch_size=4):
                if self.drawn >= self.alive:
                    raise Killed
                self.drawn += len(batch)
                yield batch

        def describe(self):
            return {"stops": ["<end>"], "device": "here"}

    return Counting


@pytest.fixture
def make_evaluator(tiny, tmp_path):
    def make(
        *, sets=None, checker="number", pattern: str | None = r"(\d)", system=None, seed=5, **sampling
    ) -> Evaluator:
        def encode(messages: Any) -> Any:
            return tiny[1]("".join(turn["content"] for turn in messages))["input_ids"]

        return Evaluator(
            task=Task(name="sums", pool="-", checker=checker, pattern=pattern, system=system, max_new_tokens=24),
            chat=SimpleNamespace(encode_prompt=encode),  # type: ignore[arg-type]
            problems=SETS if sets is None else sets,
            sampling=Sampling(**{"samples": 3, "pass_at": (1, 3), "temperature": 1.0} | sampling),
            checker=Checker(checker, pattern=pattern),
            seed=seed,
            folder=tmp_path / "samples",
            make_trainer=lambda: SimpleNamespace(world_size=1, global_rank=0, strategy=None, precision=""),  # type: ignore[arg-type,return-value]
        )

    return make


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_figures_come_from_samples_and_verdicts_that_are_kept(make_evaluator, make_backend, tmp_path):
    figures = make_evaluator().evaluate(make_backend(), "student")
    kept = figures["answers"]["eval"]
    folder = tmp_path / "samples" / kept["samples"]
    assert set(contents(folder)) == {
        "manifest.json",
        "problems.jsonl",
        "samples.jsonl",
        f"verdicts/{kept['verdicts']}.json",
    }
    answers = read_answers(folder, kept["verdicts"])
    assert [(answer["problem_id"], answer["sample"]) for answer in answers] == [
        (f"p{i}", n) for i in range(6) for n in range(3)
    ]
    assert {"text", "num_tokens", "stop", "truncated", "boxed", "gold", "answer", "correct", "timed_out"} <= set(
        answers[0]
    )
    assert read_rows(folder / "problems.jsonl")[2]["messages"] == [{"role": "user", "content": "2 + 1?"}]
    metrics, correct = figures["metrics"]["eval"], [answer["correct"] for answer in answers]
    assert metrics["avg@3"] == pytest.approx(sum(correct) / 18)
    assert figures["per_problem"]["eval"]["p0"] == pytest.approx(sum(correct[:3]) / 3)
    assert figures["intervals"]["eval"]["low"] <= metrics["avg@3"] <= figures["intervals"]["eval"]["high"]
    assert list(figures["levels"]) == ["other"]
    assert [level["metrics"]["problems"] for level in figures["levels"]["other"].values()] == [2, 3]


def test_the_manifest_says_how_to_repeat_it(make_evaluator, make_backend, tmp_path):
    rows = [
        *PROBLEMS[:2],
        PROBLEMS[2] | {"prompt": "boxed-1"},
        PROBLEMS[3] | {"messages": [{"role": "user", "content": "?"}]},
    ]
    figures = make_evaluator(sets={"eval": rows}, system="Think.").evaluate(make_backend(), "student")
    manifest = json.loads((tmp_path / "samples" / figures["answers"]["eval"]["samples"] / "manifest.json").read_text())
    settings = {"samples": 3, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 24, "seed": 5, "stop_ids": [256]}
    assert manifest["identity"]["sampling"] == settings
    assert manifest["set"]["prompts"] == {"system turn 'Think.'": 2, "boxed-1": 1, "messages of the row": 1}


def test_an_evaluation_killed_again_and_again_loses_nothing(make_evaluator, make_backend, tmp_path):
    killed = make_backend(alive=8)
    with pytest.raises(Killed):
        make_evaluator().evaluate(killed, "student")
    (partial,) = (tmp_path / "samples").glob("*/rank0.partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + killed.drawn
    partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # the kill came in the middle of a line
    drawn = killed.drawn - 1

    killed = make_backend(alive=18 - drawn + 4)  # in the second set, while the first is complete
    with pytest.raises(Killed):
        make_evaluator().evaluate(killed, "student")
    drawn += killed.drawn

    unharmed = make_backend()
    figures = make_evaluator().evaluate(unharmed, "student")
    assert drawn + unharmed.drawn == (6 + 5) * 3
    resumed = contents(tmp_path / "samples")
    (tmp_path / "samples").rename(tmp_path / "resumed")
    assert make_evaluator().evaluate(make_backend(), "student") == figures
    assert contents(tmp_path / "samples") == resumed


def test_a_kill_while_answers_are_checked_loses_no_sample(make_evaluator, make_backend, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Checker, "check", lambda *_: (_ for _ in ()).throw(Killed))
        make_evaluator().evaluate(make_backend(), "student")
    make_evaluator().evaluate(make_backend(alive=0), "student")


def test_ranks_share_the_problems_and_one_may_go_on_alone(make_evaluator, make_backend):
    evaluator, second, first = make_evaluator(), make_backend(), make_backend()
    for asked in evaluator.ask_sets(second):
        draw_samples(second, asked, rank=1, world=2, label="student")
    assert second.drawn == 3 * 3 + 2 * 3
    figures = evaluator.evaluate(first, "student")
    assert first.drawn == 3 * 3 + 3 * 3
    assert figures["metrics"]["eval"]["samples"] == 3


def test_two_jobs_draw_each_sample_once(make_evaluator, make_backend):
    backends = [make_backend() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda backend: make_evaluator().evaluate(backend, "student"), backends)
    assert one == other and sum(backend.drawn for backend in backends) == (6 + 5) * 3


def test_an_engine_that_spans_ranks_is_asked_by_the_first_of_them(make_evaluator, make_backend):
    evaluator, backends = make_evaluator(), [make_backend() for _ in range(4)]
    for rank, backend in enumerate(backends):
        backend.ranks = 2
        for asked in evaluator.ask_sets(backend):
            draw_samples(backend, asked, rank=rank, world=4, label="student")
    assert [backend.drawn for backend in backends] == [3 * 3 + 3 * 3, 0, 3 * 3 + 2 * 3, 0]


@pytest.mark.parametrize("other", [{"weights": "others"}, {"stop_ids": (256, 5)}])
def test_another_student_is_asked_by_itself(make_evaluator, make_backend, other):
    few = make_evaluator(sets={"eval": PROBLEMS[:3]})
    before = few.evaluate(make_backend(), "student")
    asked = make_backend(**other)
    after = few.evaluate(asked, "other")
    assert asked.drawn == 9 and after["answers"] != before["answers"]
    assert few.evaluate(make_backend(alive=0), "student") == before  # neither took the other's place


SAME = {
    "another set beside it": {"sets": SETS | {"third": OTHERS[:2]}},
    "another name": {"sets": {"renamed": PROBLEMS, "other": OTHERS}},
    "another order of rows": {"sets": {"eval": PROBLEMS[::-1], "other": OTHERS}},
    "another checker": {"checker": "exact", "pattern": None},
    "another pattern": {"pattern": r"(\d\d)"},
    "another right answer": {"sets": {"eval": [PROBLEMS[0] | {"answer": "7"}, *PROBLEMS[1:]], "other": OTHERS}},
    "another pass@k": {"pass_at": (2,)},
}
OTHER = {
    "another prompt": {"system": "Think."},
    "another problem": {"sets": {"eval": [PROBLEMS[0] | {"problem": "1 + 1?"}, *PROBLEMS[1:]], "other": OTHERS}},
    "another temperature": {"temperature": 0.5},
    "another seed": {"seed": 6},
}


@pytest.mark.parametrize(("changes", "again"), [(SAME, 0), (OTHER, 18)], ids=["same", "other"])
def test_what_draws_samples_again(make_evaluator, make_backend, changes, again):
    make_evaluator().evaluate(make_backend(), "student")
    for what, change in changes.items():
        backend, evaluator = make_backend(), make_evaluator(**change)
        evaluator.evaluate(backend, "student")
        news = 2 * 3 if "third" in evaluator.problems else 0
        assert (backend.drawn == news) if again == 0 else (backend.drawn >= again), what
        assert evaluator.is_done(backend), what


def test_verdicts_are_made_once_and_stay(make_evaluator, make_backend, monkeypatch, tmp_path):
    figures = make_evaluator().evaluate(make_backend(), "student")
    before = contents(tmp_path / "samples")
    make_evaluator(checker="exact", pattern=None).evaluate(make_backend(alive=0), "student")
    assert before.items() <= contents(tmp_path / "samples").items()  # an earlier run's link shows what it showed
    monkeypatch.setattr(Checker, "check", lambda *_: pytest.fail("checked again"))
    assert make_evaluator().evaluate(make_backend(alive=0), "student") == figures


def test_changed_verdicts_are_counted(make_evaluator, make_backend, caplog):
    caplog.set_level("INFO", "lark")
    sets = {"eval": PROBLEMS}
    before = make_evaluator(sets=sets).evaluate(make_backend(), "student")
    assert "changed:" not in caplog.text
    other = make_evaluator(sets=sets, checker="exact", pattern=None).evaluate(make_backend(), "student")
    differ = round(abs(before["metrics"]["eval"]["avg@3"] - other["metrics"]["eval"]["avg@3"]) * 18)
    assert f"changed: {differ} of 18" in caplog.text


def test_what_cannot_be_checked_is_refused_before_generating(make_evaluator):
    with pytest.raises(ValueError, match=r"task\.checker='number'"):
        make_evaluator(sets={"eval": [PROBLEMS[0] | {"answer": "one"}]})
    with pytest.raises(ValueError, match=r"task\.eval"):
        make_evaluator(sets={"eval": []})


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

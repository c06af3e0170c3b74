"""The table of single changes: what each change must have recomputed, and what it must not.

Keys are those of the real code path, compared without a forward pass: tokens (tokenising), scoring (the statistics'
pass), samples (the untrained student's), verdicts (on samples), arm (a training; its rule needs no student's opinion).
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import rows_of_a_pool, write_pool
from lark_process import finish, start

from lark.answers.checker import Checker
from lark.common import versions
from lark.common.cache import read_json
from lark.evaluation.evaluate import Evaluator, Sampling, identify_weights
from lark.evaluation.verdicts import locate_verdicts
from lark.scoring.pass_module import ScoringSettings
from lark.scoring.passes import GradientMatches, Statistics
from lark.selection.scores.statistics import Length, Random
from lark.student.chat import load_template
from lark.student.student import Student
from lark.tasks.task import Task
from lark.training.arms import make_arm
from lark.training.recipe import Recipe

NOTHING = set()
SCORES, TRAINS, SAMPLES, CHECKS = {"tokens", "scoring", "arm"}, {"arm"}, {"samples"}, {"verdicts"}
STUDENT = {"scoring", "samples", "arm"}
EVERYTHING = SCORES | SAMPLES
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
DROPOUT = LORA | {"lora_dropout": 0.1}


def change_rows(number=None, **columns):
    """Change columns of one row, or of all."""

    def change(rows):
        return [row | columns if number in (None, i) else row for i, row in enumerate(rows)]

    return change


def change_turn(number, turn, text):
    def change(rows):
        messages = [dict(message) for message in rows[number]["messages"]]
        messages[turn]["content"] = text
        return change_rows(number, messages=messages)(rows)

    return change


def change_prompt(rows):
    for number in range(4):
        rows = change_turn(number, 0, "What?")(rows)
    return rows


def change_file(name, **values):
    """Change entries of a JSON file of the student's folder (None: take one out)."""

    def change(folder):
        path = folder / name
        known = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))

    return change


def touch(name, text=""):
    return lambda folder: (folder / name).write_text(text)


# name: (what is changed, what must be recomputed)
ROWS = {
    "rows in another order": (lambda rows: rows[::-1], NOTHING),
    "a renamed teacher": (change_rows(5, teacher="other"), NOTHING),
    "all teachers unknown": (change_rows(teacher=None), NOTHING),
    "a judge's column": (change_rows(judge=0.5), NOTHING),
    "a judge's grade of one row": (change_rows(7, judge=0.5), NOTHING),
    "a null that was absent": (change_rows(judge=None), NOTHING),
    "one verdict": (lambda rows: change_rows(9, correct=not rows[9]["correct"])(rows), NOTHING),
    "one verdict unknown": (change_rows(9, correct=None), NOTHING),
    "a held-out verdict": (lambda rows: change_rows(17, correct=not rows[17]["correct"])(rows), TRAINS),
    "an answer": (lambda rows: [row | {"answer": "1"} if row["problem_id"] == "2" else row for row in rows], NOTHING),
    "a number as an id": (change_rows(5, candidate_id=1), NOTHING),
    "a trajectory": (change_turn(6, 1, "So \\boxed{12}"), SCORES),
    "a space in a trajectory": (lambda rows: change_turn(6, 1, rows[6]["messages"][1]["content"] + " ")(rows), SCORES),
    "a held-out trajectory": (change_turn(17, 1, "So \\boxed{12}"), SCORES),
    "a prompt": (change_prompt, SCORES),
    "a candidate's id": (change_rows(5, candidate_id="new"), SCORES),
    "a problem's id": (lambda rows: [r | {"problem_id": "x"} if r["problem_id"] == "2" else r for r in rows], SCORES),
    "a row more": (lambda rows: [*rows, rows[-1] | {"candidate_id": "new"}], SCORES),
    "a row less": (lambda rows: rows[1:], SCORES),
}
FILES = {
    "the end of texts": (change_file("tokenizer_config.json", eos_token="<|im_start|>"), EVERYTHING),
    "the beginning of texts": (change_file("tokenizer_config.json", bos_token="<|im_start|>"), SCORES),
    "a template of its own that is not used": (change_file("tokenizer_config.json", chat_template="x"), NOTHING),
    "the longest text its tokenizer warns of": (change_file("tokenizer_config.json", model_max_length=99), NOTHING),
    "how numbers are normed": (change_file("config.json", rms_norm_eps=1e-3), STUDENT),
    "a generation config, which nothing reads": (change_file("generation_config.json", eos_token_id=7), NOTHING),
    "a readme": (touch("README.md"), NOTHING),
    "code that is not run": (touch("modeling.py"), NOTHING),
}
TASK = {
    "name": ("other", NOTHING),
    "checker": ("exact", CHECKS),
    "pattern": ("is (.*)", CHECKS),
    "system": ("Be brief.", SAMPLES),
    "held_out": (0.5, {"scoring", "arm"}),
    "held_out_rows": (3, NOTHING),  # points of the curve; the student is the same
    "limit": (7, SCORES),
    "max_length": (250, NOTHING),  # no row is longer
    "overlong": ("error", NOTHING),
    "max_new_tokens": (7, SAMPLES),
    "on_error": ("drop", NOTHING),
    "overlap": ("drop", NOTHING),  # no problem is in two places
}
MODEL = {
    "name": ("other", NOTHING),
    "dtype": ("float32", NOTHING),  # what auto is on a CPU
    "attention": ("eager", STUDENT),
    "end_token": ("<|im_start|>", EVERYTHING),
    "lora": (LORA, TRAINS),
    "gradient_checkpointing": (True, NOTHING),
    "trust_remote_code": (True, NOTHING),  # there is no code
    "config": ({"rms_norm_eps": 1e-3}, STUDENT),
}
PROBE = {
    "top_k": (50, {"scoring"}),
    "keep": ("tokens", {"scoring"}),
    "span": ("authors", SCORES),
    "step_splitter": ("blank_lines", {"tokens", "scoring"}),
    "skip": (3, {"scoring"}),
    "batch_tokens": (99, NOTHING),
    "shard_rows": (3, NOTHING),
    "share": (False, NOTHING),
    "compile": (False, NOTHING),
    "model": ("tiny", NOTHING),  # the experiment hands it over as another student to ask
}
RECIPE = {
    "steps": (5, TRAINS),
    "epochs": (9.0, NOTHING),  # steps say how many
    "batch_size": (5, TRAINS),
    "lr": (1e-2, TRAINS),
    "warmup": (0.5, TRAINS),
    "schedule": ("constant", TRAINS),
    "weight_decay": (0.1, TRAINS),
    "betas": ((0.9, 0.95), TRAINS),
    "clip": (0.5, TRAINS),
    "average": ("token", TRAINS),
    "weighted": (False, TRAINS),
    "micro_batch_tokens": (99, NOTHING),
    "spike": (None, NOTHING),
    "validations": (3, NOTHING),
    "checkpoint_every": (3, NOTHING),
}
SAMPLING = {
    "samples": (5, SAMPLES),
    "pass_at": ((1,), NOTHING),
    "temperature": (0.5, SAMPLES),
    "top_p": (0.5, SAMPLES),
    "batch_size": (3, NOTHING),
    "engine": ("vllm", SAMPLES),
    "vllm_python": ("/elsewhere", NOTHING),
    "vllm_gpus": (1, NOTHING),
    "vllm_memory": (0.5, NOTHING),
}
OTHERS = {
    "seed": ({"seed": 1}, {"samples", "arm"}),
    "precision": ({"precision": "bf16-mixed"}, TRAINS),
    "ranks": ({"world_size": 2}, NOTHING),
    "an evaluation problem": (
        {"problems": {"set": [{"problem_id": "0", "problem": "How?", "answer": "1"}]}},
        SAMPLES,
    ),
    "a right answer": ({"problems": {"set": [{"problem_id": "0", "problem": "What?", "answer": "2"}]}}, CHECKS),
    "a renamed set": ({"problems": {"other": [{"problem_id": "0", "problem": "What?", "answer": "1"}]}}, NOTHING),
}
TOGETHER = {"task": TASK, "student": MODEL, "probe": PROBE, "recipe": RECIPE}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def keys(make_data, student_folder, cache, tmp_path):
    """Compute the keys of a run with one thing changed."""

    def compute(*, rows=None, folder=None, sampling=None, others=None, **settings):
        others = dict(others or {})
        if folder is not None:
            place = tmp_path / "student"
            shutil.copytree(student_folder, place, dirs_exist_ok=True)
            folder(place)
            settings["student"] = {"path": str(place)}
        changed = rows_of_a_pool() if rows is None else rows(rows_of_a_pool())
        data = make_data(rows=changed, selector=Length(sign=1), baseline=Random(seed=0), **settings)
        data.cache = cache
        data.seed = others.get("seed", data.seed)
        data.precision = others.get("precision", data.precision)
        data.world_size = others.get("world_size", 1)
        data.prepare_data()
        data.setup("fit")
        problems = others.get("problems", {"set": [{"problem_id": "0", "problem": "What?", "answer": "1"}]})
        evaluator = Evaluator(
            task=data.task,
            chat=data.trajectories.chat,
            problems=problems,
            sampling=Sampling(**sampling or {}),
            checker=Checker(data.task.checker, pattern=data.task.pattern),
            seed=data.seed,
            folder=tmp_path,
            make_trainer=lambda: pytest.fail("nothing is sampled"),
        )
        untrained = {"trained": None, "weights": identify_weights(data.student, None), "device": data.device}
        backend = evaluator.sampling.make_backend(data.student, data.trajectories.chat, **untrained)
        (asked,) = evaluator.ask_sets(backend)
        arm = make_arm("selector", "r", data, recipe=data.recipe, steps=data.recipe.count_steps(9), arms=tmp_path)
        return {
            "tokens": Path(data.trajectories.tokens.cache_files[0]["filename"]).parent.name,
            "scoring": data.pass_folder(Statistics()).name,
            "samples": asked.folder.name,
            "verdicts": locate_verdicts(asked, evaluator.checker)[0].name,
            "arm": arm.folder.name,
        }

    return compute


def find_changed(one, other):
    return {name for name in one if one[name] != other[name]}


def list_changes():
    for name, (change, expected) in ROWS.items():
        yield pytest.param({"rows": change}, expected, id=name)
    for name, (change, expected) in FILES.items():
        yield pytest.param({"folder": change}, expected, id=name)
    for part, table in TOGETHER.items():
        for name, (value, expected) in table.items():
            yield pytest.param({part: {name: value}}, expected, id=f"{part}.{name}")
    for name, (value, expected) in SAMPLING.items():
        yield pytest.param({"sampling": {name: value}}, expected, id=f"evaluation.{name}")
    for name, (change, expected) in OTHERS.items():
        yield pytest.param({"others": change}, expected, id=name)


PLAIN: dict[str, object] = {}
"""Keys of the run that nothing is changed in; the same in every test."""


@pytest.mark.parametrize(("change", "expected"), list_changes())
def test_a_single_change(change, expected, keys):
    if not PLAIN:
        PLAIN.update(keys())
    assert find_changed(PLAIN, keys(**change)) == expected


def test_every_setting_is_in_the_table():
    elsewhere = {
        Task: {"pool", "columns", "eval", "eval_limit"},  # rows, problems
        Student: {"id", "revision", "path", "template", "date", "adapter"},
    }
    known = {Task: TASK, Student: MODEL, ScoringSettings: PROBE, Recipe: RECIPE, Sampling: SAMPLING}
    for kind, table in known.items():
        assert {field.name for field in dataclasses.fields(kind)} == table.keys() | elsewhere.get(kind, set())


def test_dropped_held_out_rows(keys, tmp_path):
    """task.overlap=drop leaves out other rows with every evaluation set, held-out ones too."""
    asked = {row["problem_id"]: row["messages"][0]["content"] for row in rows_of_a_pool()} | {"none": "Why?"}
    found = {}
    for problem in ("none", "0", "4"):
        path = tmp_path / f"{problem}.jsonl"
        path.write_text(json.dumps({"problem_id": "0", "problem": asked[problem], "answer": "1"}) + "\n")
        found[problem] = keys(task={"eval": str(path), "overlap": "drop"})
    assert find_changed(found["none"], found["4"]) == TRAINS, "a held-out problem: its loss is of others"
    assert find_changed(found["none"], found["0"]) == {"scoring", "arm"}


def test_templates(keys, tmp_path):
    tokenizer: Any = None  # a named template asks it nothing
    path, chatml = tmp_path / "template.jinja", load_template("chatml", tokenizer)
    path.write_text(chatml)
    plain = keys()
    assert find_changed(plain, keys(student={"template": str(path)})) == NOTHING, "the same text"
    path.write_text("Hi. " + chatml)
    assert find_changed(plain, keys(student={"template": str(path)})) == EVERYTHING


def test_truncated_rows(keys):
    cut = {"overlong": "truncate"}
    assert find_changed(keys(task=cut | {"max_length": 80}), keys(task=cut | {"max_length": 81})) == SCORES


def test_dropout_is_drawn_by_ranks_and_micro_batches(keys):
    dropout = {"lora": DROPOUT}
    plain = keys(student=dropout)
    assert find_changed(plain, keys(student=dropout, others={"world_size": 2})) == TRAINS
    assert find_changed(plain, keys(student=dropout, recipe={"micro_batch_tokens": 99})) == TRAINS


def test_code_that_comes_with_the_weights(make_student, student_folder, tmp_path):
    shutil.copytree(student_folder, tmp_path / "student")
    found = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "student" / "modeling.py").write_text(text)
        student = make_student(path=str(tmp_path / "student"), trust_remote_code=True)
        found.append(student.identity())
    assert found[0] != found[1]


@pytest.mark.parametrize("library", versions.STUDENT_LIBRARIES)
def test_another_version_of_a_library(library, keys, monkeypatch):
    plain = keys()
    known = versions.library_version
    monkeypatch.setattr(versions, "library_version", lambda name: "0" if name == library else known(name))
    changed = find_changed(plain, keys())
    assert changed == (EVERYTHING if library in ("transformers", "tokenizers") else STUDENT)


@pytest.mark.parametrize(
    ("formula", "expected"),
    {
        "tokens": SCORES,  # prompts are keyed by their tokens
        "forward": {"scoring", "arm"},
        "training": TRAINS,
        "samples": SAMPLES,
        "verdicts": CHECKS,
        "metrics": NOTHING,  # computed each time
    }.items(),
)
def test_another_version_of_a_formula(formula, expected, keys, monkeypatch):
    plain = keys()
    monkeypatch.setitem(versions.FORMULAS, formula, 99)
    assert find_changed(plain, keys()) == expected


def test_sub_tasks_of_validation_examples_are_keyed(make_data):
    """A pass that reads a column of the pool is keyed by what it reads of it."""

    def find_key(levels):
        rows = [row | {"level": levels[i % len(levels)]} for i, row in enumerate(rows_of_a_pool())]
        data = make_data(rows=rows)
        data.prepare_data()
        return data.pass_folder(GradientMatches(subtask="level"))

    assert find_key([1, 2]) == find_key([1, 2]) != find_key([2, 1])
    assert re.fullmatch(r"[0-9a-f]{16}", find_key([1]).name)


@pytest.mark.slow
def test_whole_commands_compute_what_has_changed(student_folder, tmp_path):
    """What the student does not see costs nothing; a token's role in tokenizer_config.json costs all."""
    student = shutil.copytree(student_folder, tmp_path / "student")
    names = (f"task.pool={tmp_path / 'pool.jsonl'}", f"model.path={student}", f"paths.logs={tmp_path / 'logs'}")
    settings = ("task=jsonl", "task.checker=number", "task.max_length=256", "sft.steps=2", "stop_after=training")

    def run(name, rows, *words):
        write_pool(tmp_path / "pool.jsonl", rows)
        folder = tmp_path / "logs" / "runs" / name
        finish(start(*settings, *names, f"hydra.run.dir={folder}", "logger=csv", *words))
        plan = read_json(folder / "plan.json")
        scoring = next(value for key, value in plan.items() if key.startswith("statistics"))
        return [scoring, *(arm["action"] for arm in plan["arms"].values())]

    rows = rows_of_a_pool(problems=12)
    assert run("first", rows) == ["run", "train", "train"]
    unseen = [row | {"teacher": "renamed", "judge": 0.5} for row in reversed(rows)]
    assert run("unseen", unseen, "sft.validations=2", "model.dtype=float32") == ["reuse"] * 3
    change_file("tokenizer_config.json", eos_token="<|im_start|>")(student)
    assert run("role", rows) == ["run", "train", "train"]

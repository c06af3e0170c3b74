"""`python -m lark.evaluate` on the embedded student and a small one, as a user sees it."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import lark_command
import lark_process
import pytest
from generation.test_vllm_backend import STAND_IN
from lark_command import SMALL, Done, answered_lightly, lark
from omegaconf import OmegaConf
from trained_arm import LORA, write_arm

from lark import config as configuration
from lark.common.cache import read_json
from lark.evaluation.verdicts import read_answers

command = import_module("lark.evaluate")  # not the function of that name
LONG_ENOUGH = "task.max_new_tokens=60"
FEW = ("task.eval_limit=6", LONG_ENOUGH, "evaluation.samples=2", "logger=csv", "trainer=cpu")
PROGRAM = ("-m", "lark.evaluate")


@pytest.fixture(scope="module")
def evaluate():
    """The command in this process."""

    def run(*words: object) -> Done:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(lark_command, "command", command)
            return lark(*words)

    return run


def folder_of(out: str) -> Path:
    (line,) = (line for line in out.splitlines() if line.startswith("evaluation "))
    return Path(line.split(maxsplit=1)[1])


def contents(folder: Path) -> dict[str, Any]:
    """What a student answered in an evaluation or as an arm of a run, and what that came to."""
    figures = read_json(folder / "metrics.json")
    answers = {
        name: read_answers(folder / "samples" / name, kept["verdicts"]) for name, kept in figures["answers"].items()
    }
    return answers | {name: figures[name] for name in ("metrics", "intervals", "levels", "per_problem")}


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def first(evaluate, logs) -> Done:
    done = evaluate(*FEW, f"paths.logs={logs}")
    assert done.code == 0, done.err
    return done


def test_it_prints_a_table_leaves_files_and_finds_them_again(first, evaluate, logs):
    assert all(part in first.out for part in ("arithmetic · tiny · seed 0", "avg@2", "pass@2", "maj@2", "tokens"))
    folder = folder_of(first.out)
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "samples",
        "replay.yaml",
        "plan.json",
        "run.log",
    }
    assert {path.name for path in (folder / "samples").iterdir()} == {"eval", "shifted"}
    assert not first.err
    before = contents(folder)
    again = evaluate(*FEW, f"paths.logs={logs}")
    assert folder_of(again.out) == folder and "reuse " in again.out and contents(folder) == before
    replay = evaluate("--config-path", folder, "--config-name", "replay")
    assert replay.code == 0, replay.err
    assert folder_of(replay.out) != folder and contents(folder_of(replay.out)) == before


def test_a_multirun(first, evaluate, logs, tmp_path):
    done = evaluate("-m", *FEW, "seed=0,1", f"paths.logs={tmp_path}", f"paths.cache={logs / 'cache'}")
    assert done.code == 0, done.err
    metrics = {path.parent.name: contents(path.parent) for path in tmp_path.glob("evaluations/*/*/metrics.json")}
    assert metrics["0"] == contents(folder_of(first.out)) != metrics["1"]


@pytest.fixture(scope="module")
def run(logs) -> Path:
    """A run with two trained arms, which an earlier run left with one evaluation set."""
    for words in (("~task.sets.shifted",), ()):
        done = lark(*SMALL, LONG_ENOUGH, "trainer=cpu", f"paths.logs={logs}", *words)
        assert done.code == 0, done.err
    return done.folder


def test_a_checkpoint_does_as_it_did_in_its_run(run, first, evaluate, logs):
    for name, said in (("before", ()), ("selector", (f"checkpoint={run / 'selector'}",))):
        folder = folder_of(evaluate(*FEW, *said, f"paths.logs={logs}").out)
        assert contents(folder) == contents(run / name)
    assert read_json(folder / "samples" / "eval" / "manifest.json")["model"]["path"].endswith("checkpoint")


def test_an_adapter_as_a_checkpoint_and_merged(make_student, student_folder, evaluate, tmp_path):
    arm = tmp_path / "arm"
    write_arm(arm, make_student(lora=LORA))
    rows = [{"id": i, "problem": f"{i} + 1?", "answer": str(i + 1), "level": 1 + i % 2} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "task=jsonl",
        f"task.eval={tmp_path / 'sums.jsonl'}",
        *FEW,
        f"paths.logs={tmp_path}",
        "evaluation.temperature=1",
    )
    as_checkpoint = evaluate(*words, f"checkpoint={arm}", "model.dtype=float32")
    assert as_checkpoint.code == 0, as_checkpoint.err
    assert "level 1" in as_checkpoint.out and "level 2" in as_checkpoint.out
    merged = evaluate(*words, "model=smollm2", f"model.path={student_folder}", f"model.adapter={arm / 'checkpoint'}")
    plain = evaluate(*words, "model=smollm2", f"model.path={student_folder}")
    samples = [contents(folder_of(done.out))["eval"] for done in (as_checkpoint, merged, plain)]
    assert samples[0] == samples[1] != samples[2]
    other = evaluate(*words, f"checkpoint={arm}", "model.path=shipped:tiny")
    assert other.code == 1 and "was trained on other weights" in other.err
    levels = read_json(folder_of(merged.out) / "metrics.json")["levels"]["eval"]
    assert {level: of["metrics"]["problems"] for level, of in levels.items()} == {"1": 2, "2": 2}


@pytest.mark.slow
def test_another_engine(student_folder, evaluate, tmp_path, monkeypatch):
    for name, source in STAND_IN.items():  # of vLLM
        path = tmp_path / "stand_in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))
    words = ("task.eval_limit=6", "task.max_new_tokens=15", "evaluation.engine=vllm", f"paths.logs={tmp_path}")
    words = (*words, "logger=csv", "trainer=cpu", f"model.path={student_folder}")
    monkeypatch.setenv("DIE_AFTER", "10")
    died = evaluate(*words)
    assert died.code == 1
    assert died.err.startswith("lark: evaluation.engine=vllm") and "CUDA out of memory, says the stand-in" in died.err
    monkeypatch.delenv("DIE_AFTER")
    done = evaluate(*words)
    assert done.code == 0, done.err
    folder = folder_of(done.out)
    assert "eval: 10 of 24 samples are there" in (folder / "run.log").read_text()
    manifest = read_json(folder / "samples" / "eval" / "manifest.json")
    assert manifest["identity"]["student"]["engine"] == "vllm"
    assert manifest["engine"]["bit_reproducible"] is False
    assert len(contents(folder)["eval"]) == 6 * 4
    assert not (folder / "samples" / "eval" / "engine").exists()


# ---- more is asked of a finished run


def test_another_set_and_another_checker_draw_nothing_again(run, logs):
    """The plan says which samples were drawn: those of the new set alone."""
    plan, arms = read_json(run / "plan.json"), read_json(run / "summary.json")["arms"]
    for name in ("selector", "baseline"):
        assert plan["arms"][name]["action"] == "evaluate"
        assert plan[f"samples of {name}"] == [arms[name]["answers"]["shifted"]["samples"]]
    shown = {name: contents(run / name) for name in arms}

    def repeat(*words: str) -> dict[str, Any]:
        done = lark(*SMALL, LONG_ENOUGH, "trainer=cpu", f"paths.logs={logs}", *words)
        assert done.code == 0, done.err
        return read_json(done.folder / "plan.json")

    plan = repeat("task.checker=exact")
    assert all(plan[f"samples of {name}"] == [] for name in arms)
    assert {arm["action"] for arm in plan["arms"].values()} == {"evaluate"}
    assert {arm["action"] for arm in repeat()["arms"].values()} == {"reuse"}
    assert {name: contents(run / name) for name in arms} == shown  # the first run's links show what it saw


# ---- errors

DEFECTS = [  # overrides; what the one sentence has to name
    (["evaluation.engine=sglang"], "evaluation.engine='sglang'"),
    (["evaluation.samples=0"], "evaluation.samples=0"),
    (["evaluation.samples=x"], "evaluation.samples=x"),
    (["evaluation.pass_at=[9]"], "evaluation.pass_at=9"),
    (["+foo=1"], "foo"),
    (["seed=-1"], "seed=-1"),
    (["task=maths"], "task=maths"),
    (["task=jsonl"], "task.eval=<file>"),
    (["task=jsonl", "task.eval=/nowhere.jsonl"], "task.eval=/nowhere.jsonl"),
    (["model.path=/nowhere"], "model.path=/nowhere"),
    (["checkpoint=/nowhere"], "/nowhere"),
    (["checkpoint=3"], "checkpoint=3"),
    (["regrade=."], "regrade"),
    (["trainer=gpu"], "trainer.accelerator=gpu"),
    (["paths.logs=3"], "paths.logs=3"),
]


@pytest.mark.parametrize(("words", "named"), DEFECTS, ids=[" ".join(words) for words, _ in DEFECTS])
def test_a_wrong_setting_is_one_sentence(words, named, evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = [] if words[0].startswith("paths.logs") else [f"paths.logs={tmp_path}"]
    done = evaluate("logger=csv", f"hydra.run.dir={tmp_path / 'run'}", *logs, *words)
    assert done.code == 1
    assert done.err.startswith("lark: ") and done.err.count("\n") == 1 and named in done.err


def test_a_checkpoint_brings_its_own_student(run, evaluate, tmp_path):
    exported = run / "selector" / "checkpoint"
    (tmp_path / "exported").symlink_to(exported.resolve())
    done = evaluate(f"checkpoint={tmp_path / 'exported'}", f"paths.logs={tmp_path}")
    assert f"model.path={tmp_path / 'exported'}" in done.err
    for word in ("model=tiny_b", "model.template=llama3", "model.lora=null"):
        done = evaluate(f"checkpoint={run / 'selector'}", word, f"paths.logs={tmp_path}")
        assert done.code == 1
        assert f"leave {word} out" in done.err
    done = evaluate(f"checkpoint={run / 'before'}", f"paths.logs={tmp_path}")
    assert f"checkpoint={run / 'before'}" in done.err and "is the student before training" in done.err


# ---- processes


@pytest.mark.slow
def test_help_and_cfg_import_nothing_heavy(tmp_path):
    for words, part in ((["--help"], "checkpoint  seed"), (["--cfg", "job"], "checkpoint: null")):
        assert part in answered_lightly("evaluate", words, tmp_path)


def test_what_both_commands_take_is_the_same():
    ours, theirs = (OmegaConf.load(configuration.find_conf() / f"{name}.yaml") for name in ("evaluate", "config"))
    for block in ("evaluation", "paths"):
        assert ours[block] == theirs[block]  # type: ignore[index]


@pytest.mark.slow
def test_killed_and_resumed_it_is_as_if_it_had_not_been(first, evaluate, logs, tmp_path):
    words = (*FEW, "evaluation.batch_size=2", f"paths.cache={logs / 'cache'}", f"paths.logs={tmp_path}")

    def drawn(name: str) -> int:
        parts = [path.read_bytes().splitlines() for path in tmp_path.glob("samples/*/rank0.partial")]
        return sum(len(lines) - 1 for lines in parts if lines and read_set(lines[0]) == name)

    def read_set(header: bytes) -> str:
        return json.loads(header)["set"]

    lark_process.kill_when(lark_process.start(*words, program=PROGRAM), lambda: drawn("shifted") >= 2)
    assert drawn("eval") == 12 and 2 <= drawn("shifted") < 12
    done = evaluate(*words)
    assert done.code == 0, done.err
    assert "eval: 12 of 12 samples are there" in (folder_of(done.out) / "run.log").read_text()
    assert contents(folder_of(done.out)) == contents(folder_of(first.out))


@pytest.mark.slow
def test_two_ranks(first, logs, tmp_path):
    words = [word for word in FEW if not word.startswith("trainer")]
    places = (f"paths.logs={tmp_path}", f"paths.cache={logs / 'cache'}")
    out = lark_process.finish(lark_process.start(*words, *lark_process.TWO_RANKS, *places, program=PROGRAM))
    assert out.count("arithmetic · tiny · seed 0") == 1
    assert contents(folder_of(out)) == contents(folder_of(first.out))
    assert read_json(folder_of(out) / "metrics.json")["sampling"]["ranks"] == 2


@pytest.mark.slow
def test_the_ranks_of_a_run_evaluate_the_untrained_student_too(run, logs, tmp_path):
    """Scoring is cached and nothing is trained: the evaluation starts the ranks. Divided, no rank holds the student."""
    for trainer in ("ddp", "fsdp"):
        words = [f"trainer={trainer}", *lark_process.TWO_DEVICES, f"paths.logs={tmp_path / trainer}"]
        cached = (f"paths.cache={logs / 'cache'}", "baseline=none", "stop_after=null")
        arms = tmp_path / trainer / "arms"
        arms.parent.mkdir()
        arms.symlink_to(logs / "arms")
        out = lark_process.finish(lark_process.start(*SMALL, LONG_ENOUGH, *words, *cached))
        (folder,) = (tmp_path / trainer / "runs").glob("*/*/*")
        assert contents(folder / "before") == contents(run / "before"), out
        assert read_json(folder / "summary.json")["arms"]["before"]["sampling"]["ranks"] == 2
        log = (folder / "run.log").read_text()
        assert ("layers are divided over 2 ranks" in log) == (trainer == "fsdp")

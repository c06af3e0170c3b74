"""`python -m lark.evaluate` on the embedded student and a small one, as a user sees it."""

import json
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
from lark import evaluate as command
from lark.common.cache import read_json
from lark.evaluation.samples import read_rows, write_rows

LONG_ENOUGH = "task.max_new_tokens=60"
FEW = ("task.eval_limit=6", LONG_ENOUGH, "evaluation.samples=2", "logger=csv", "trainer=cpu")
PROGRAM = ("-m", "lark.evaluate")
OF_TWO_SETS = {f"{kind}-{name}.jsonl" for kind in ("samples", "problems") for name in ("eval", "shifted")}


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
    """What it came to, without what says how."""
    files = {name: (folder / name).read_bytes() for name in OF_TWO_SETS}
    return files | {key: value for key, value in read_json(folder / "metrics.json").items() if key != "identity"}


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
    others = {"metrics.json", "evaluation.json", "replay.yaml", "plan.json", "run.log"}
    assert {path.name for path in folder.iterdir()} == others | OF_TWO_SETS
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
    samples = {path.parent.name: path.read_text() for path in tmp_path.glob("evaluations/*/*/samples-eval.jsonl")}
    assert samples["0"] == (folder_of(first.out) / "samples-eval.jsonl").read_text() != samples["1"]


@pytest.fixture(scope="module")
def run(logs) -> Path:
    """A run with two trained arms."""
    done = lark(*SMALL, LONG_ENOUGH, "trainer=cpu", f"paths.logs={logs}")
    assert done.code == 0, done.err
    return done.folder


def test_a_checkpoint_does_as_it_did_in_its_run(run, first, evaluate, logs):
    for name, said in (("before", ()), ("selector", (f"checkpoint={run / 'selector'}",))):
        folder = folder_of(evaluate(*FEW, *said, f"paths.logs={logs}").out)
        ours, theirs = (read_json(place / "metrics.json") for place in (folder, run / name))
        assert ours["sets"] == theirs["sets"]
        assert ours["intervals"] == theirs["intervals"]
        for file in OF_TWO_SETS:
            assert (folder / file).read_bytes() == (run / name / file).read_bytes()
    assert read_json(folder / "evaluation.json")["model"]["path"].endswith("checkpoint")
    summary = read_json(run / "summary.json")["arms"]["selector"]
    assert summary["intervals"] == theirs["intervals"] and summary["levels"] == {}


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
    samples = [(folder_of(done.out) / "samples-eval.jsonl").read_text() for done in (as_checkpoint, merged, plain)]
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
    record = read_json(folder / "evaluation.json")
    assert record["engine"]["engine"] == "vllm"
    assert record["sets"]["eval"]["engine"]["bit_reproducible"] is False
    assert len(read_rows(folder / "samples-eval.jsonl")) == 6 * 4
    assert not list(folder.glob("engine-*"))


# ---- saved samples, checked again


def test_nothing_changes_where_nothing_has_changed(run, evaluate, logs):
    before = {name: read_json(run / name / "metrics.json") for name in ("before", "baseline", "selector")}
    done = evaluate(f"regrade={run}", f"paths.logs={logs}")
    assert done.code == 0, done.err
    assert done.out.count("0 of 12 verdicts") == 6
    assert {name: read_json(run / name / "metrics.json") for name in before} == before
    again = lark(*SMALL, LONG_ENOUGH, "trainer=cpu", f"paths.logs={logs}")
    assert {arm["action"] for arm in read_json(again.folder / "plan.json")["arms"].values()} == {"reuse"}


def test_changed_verdicts_are_counted(first, evaluate, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for path in folder_of(first.out).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    problems, samples = (read_rows(folder / f"{name}-eval.jsonl") for name in ("problems", "samples"))
    (wrong, *_) = (sample for sample in samples if not sample["correct"] and sample["answer"])
    of_problem = [sample for sample in samples if sample["problem_id"] == wrong["problem_id"]]
    changed = sum(sample["correct"] != (sample["answer"] == wrong["answer"]) for sample in of_problem)
    for problem in problems:  # its right answer is now another
        if problem["problem_id"] == wrong["problem_id"]:
            problem["answer"] = wrong["answer"]
    write_rows(folder / "problems-eval.jsonl", problems)
    before = read_json(folder / "metrics.json")
    done = evaluate(f"regrade={folder}", "task.checker=number", f"paths.logs={tmp_path}")
    assert done.code == 0, done.err
    assert f"eval: {changed} of 12 verdicts" in done.out and "shifted: 0 of 12 verdicts" in done.out
    after = read_json(folder / "metrics.json")
    assert read_json(folder / "metrics-before.json") == before
    assert after["sets"]["shifted"] == before["sets"]["shifted"]
    assert after["sets"]["eval"]["avg@2"] != before["sets"]["eval"]["avg@2"]
    assert after["identity"]["task"][0] == read_json(folder / "evaluation.json")["task"]["checker"] == "number"
    assert not list((tmp_path / "evaluations").glob("*/*"))


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
    (["regrade=/nowhere"], "regrade=/nowhere"),
    (["regrade=.", "checkpoint=."], "regrade=."),
    (["recheck=."], "recheck"),
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
    for word in ("model=tiny_b", "model.template=llama3", "model.lora=null"):
        done = evaluate(f"checkpoint={run / 'selector'}", word, f"paths.logs={tmp_path}")
        assert done.code == 1
        assert f"leave {word} out" in done.err
    done = evaluate(f"checkpoint={run / 'before'}", f"paths.logs={tmp_path}")
    assert f"checkpoint={run / 'before'}" in done.err and "is the student before training" in done.err


# ---- processes


@pytest.mark.slow
def test_help_and_cfg_import_nothing_heavy(tmp_path):
    for words, part in ((["--help"], "checkpoint  regrade"), (["--cfg", "job"], "checkpoint: null")):
        assert part in answered_lightly("evaluate", words, tmp_path)


def test_what_both_commands_take_is_the_same():
    ours, theirs = (OmegaConf.load(configuration.find_conf() / f"{name}.yaml") for name in ("evaluate", "config"))
    for block in ("evaluation", "paths"):
        assert ours[block] == theirs[block]  # type: ignore[index]


@pytest.mark.slow
def test_killed_and_resumed_it_is_as_if_it_had_not_been(first, evaluate, logs, tmp_path):
    words = (*FEW, "evaluation.batch_size=2", f"paths.cache={logs / 'cache'}", f"paths.logs={tmp_path}")

    def drawn(name: str) -> int:
        paths = list(tmp_path.glob(f"evaluations/*/*/samples-{name}.*.rank0.partial"))
        return sum(len(path.read_bytes().splitlines()) - 1 for path in paths)

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
    assert read_json(folder_of(out) / "evaluation.json")["sampling"]["ranks"] == 2

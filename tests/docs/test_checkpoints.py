"""docs/checkpoints.md: its commands, its Python and its YAML, in order, on a small student."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from lark_command import SMALL, lark
from pages import blocks, commands

from lark.export import main
from lark.student.student import Student

PAGE = "docs/checkpoints.md"
SMALL_LORA = ["model=tiny", "model.lora={r: 4, target_modules: all-linear}", *SMALL]
SMALL_TRL = "max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to='none', save_strategy='no', "

pytestmark = pytest.mark.slow
COMMANDS = [shlex.split(line)[2:] for line in commands(PAGE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def test_the_trained_student(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(place)
    (_, *words), *exports = COMMANDS[:3]
    done = lark(*(word for word in words if word != "model=smollm2"), *SMALL_LORA)
    assert done.code == 0, done.err
    assert (done.folder / "selector" / "checkpoint" / "README.md").is_file()
    for module, *words in exports:
        words = [word.replace("<run>", str(done.folder)) for word in words]
        assert module == "lark.export"
        monkeypatch.setattr(sys, "argv", [module, *words])
        main()
    assert (place / "student" / "adapter_model.safetensors").is_file()
    assert "## Evaluation" in (place / "student-merged" / "README.md").read_text()
    found: dict = {}
    exec(blocks(PAGE, "python")[0], found)
    assert len(found["answer"]) > 0 and capsys.readouterr().out


def test_the_selection_for_others(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    folders = []
    for module, *words in COMMANDS[3:]:
        assert module == "lark.run"
        done = lark(*words, *SMALL)
        assert done.code == 0, done.err
        folders.append(done.folder / "selector")
    weighted, repeated, equal = (
        [json.loads(line)["weight"] for line in (f / "selection.jsonl").open()] for f in folders
    )
    assert set(equal) == {1.0} and len(set(weighted)) > 1 and repeated == weighted
    assert len((folders[1] / "selection-repeated.jsonl").read_text().splitlines()) == 2 * len(weighted)
    (recipe,) = blocks(PAGE, "yaml")
    settings = yaml.safe_load(recipe.replace("<run>/selector", str(folders[0])))
    info = json.loads((Path(settings["dataset_dir"]) / "dataset_info.json").read_text())
    assert (folders[0] / info[settings["dataset"]]["file_name"]).is_file()
    trl(folders[0], blocks(PAGE, "python")[1])


def trl(folder: Path, code: str) -> None:
    """TRL trains, and on the very tokens that were scored."""
    student = Student(name="tiny", path="shipped:tiny")
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(student.folder))
    code = code.replace("<run>/selector", str(folder)).replace("SFTConfig(", f"SFTConfig({SMALL_TRL}")
    found: dict = {}
    exec(code, found)
    trainer = found["trainer"]
    assert trainer.state.global_step == 1
    rows = [json.loads(line) for line in (folder / "selection.jsonl").open()]
    encoded = student.load_chat().encode([row["messages"] for row in rows])
    for theirs, ours in zip(trainer.train_dataset, encoded, strict=True):
        assert theirs["input_ids"][: len(ours.input_ids)] == ours.input_ids
        trained = [token for token, label in zip(theirs["input_ids"], theirs["labels"], strict=True) if label != -100]
        assert trained == ours.input_ids[ours.prompt_tokens :]

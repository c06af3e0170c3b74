"""The run's own folder for an arm: who chose is said by each run, whoever trained the student."""

import json
import os

import pytest
import torch
from conftest import rows_of_a_pool
from trained_arm import trained_json

from lark.common.cache import write_json
from lark.selection.scores.statistics import Length, Random
from lark.student.student import save_student
from lark.training.arms import make_arm
from lark.training.run_folder import link_arm, write_selection


@pytest.fixture
def make_run(make_data, tmp_path):
    """Choose every candidate by a rule and link the arm, which is trained if no run before has done so."""

    def make(name, score, rows=None):
        data = make_data(rows=rows, selector=Random(seed=0), baseline=score)
        data.rules["baseline"] = type(data.rules["baseline"])(**vars(data.rules["baseline"]) | {"name": name})
        data.prepare_data()
        data.setup("fit")
        arm = make_arm("baseline", name, data, recipe=data.recipe, steps=3, arms=tmp_path / "arms")
        write_selection("baseline", name, data, tmp_path / name / "baseline")
        if not arm.is_trained:
            save_student(data.student.load_model(torch.float32), data.trajectories.chat, arm.checkpoint)
            write_json(arm.folder / "trained.json", trained_json(data.student))
        link_arm(arm, tmp_path / name / "baseline")
        return arm, tmp_path / name / "baseline"

    return make


def test_runs_that_share_an_arm_each_say_who_chose(make_run):
    rows = [row for row in rows_of_a_pool() if int(row["candidate_id"]) < 2]  # a budget of 2 takes all
    (one, longest), (other, shortest) = (
        make_run(n, Length(sign=s), rows) for n, s in (("longest", 1), ("shortest", -1))
    )
    assert one.folder == other.folder
    for name, folder in (("longest", longest), ("shortest", shortest)):
        assert json.loads((folder / "selection.json").read_text())["rule"] == name
        lines = (folder / "selection.jsonl").read_text().splitlines()
        assert {json.loads(line)["meta"]["rule"] for line in lines} == {name}
        assert f"by {name}" in (folder / "checkpoint" / "README.md").read_text()
        assert (folder / "checkpoint" / "model.safetensors").samefile(one.checkpoint / "model.safetensors")
    assert not {"README.md", "selection.json"} & {path.name for path in one.folder.rglob("*")}


def test_what_is_linked_is_found_after_all_logs_have_moved(make_run, tmp_path):
    _, folder = make_run("longest", Length(sign=1))
    (tmp_path / "moved").mkdir()
    for name in ("arms", "longest"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    assert (tmp_path / "moved" / "longest" / "baseline" / "checkpoint" / "config.json").is_file()
    assert not folder.exists()

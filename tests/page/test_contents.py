"""What a page is made of: labels over runs and seeds, pools, what is missing and what is left out."""

import shutil
from pathlib import Path

from page_folders import RULES, small_sweep

from lark.common.cache import read_json, write_json
from lark.comparison.summaries import read_summaries
from lark.page.contents import gather
from lark.page.pool_sample import NAME, read_sample

STOPPED = {"status": "finished", "stopped_after": "selection"}


def contents(folder: Path):
    return gather(read_summaries([folder]))


def test_runs_of_a_task_and_model_are_one_group_with_every_choice_by_seed(tmp_path):
    runs = small_sweep(tmp_path)
    (group,) = contents(tmp_path).groups
    assert (group.task, group.model) == ("made_up", "smollm2")
    assert list(group.curves) == list(RULES)  # the selector first
    assert all(list(by_seed) == [0, 1] for by_seed in group.curves.values())
    (pool,) = group.pools
    assert [choice.label for choice in pool.choices] == list(RULES)
    for choice in pool.choices:
        for seed, (role, sample) in choice.by_seed.items():
            assert sample.facts["arms"][role]["rule"] == choice.label
            assert sample.facts["seed"] == seed
    first = read_sample(runs[0])
    assert first is not None
    assert pool.choices[0].weights == first.weights["selector"]
    assert pool.choices[1].scores == first.scores["baseline"]


def test_shares_are_means_over_seeds_of_the_records(tmp_path):
    small_sweep(tmp_path)
    (group,) = contents(tmp_path).groups
    records = [s["arms"]["selector"]["selection"] for s in read_summaries([tmp_path])[:: len(RULES) - 1]]
    assert len(records) == 2
    for teacher, share in group.teacher_shares["lark"].items():
        assert abs(share - sum(record["teacher_share"][teacher] for record in records) / 2) < 1e-12


def test_runs_stopped_after_the_selection_are_shown_with_what_they_have(tmp_path):
    for run in small_sweep(tmp_path):
        write_json(run / "summary.json", STOPPED)
    (group,) = contents(tmp_path).groups
    assert group.compared is None and not group.left_out
    assert list(group.curves) == list(RULES)
    assert not any(curve for by_seed in group.curves.values() for curve in by_seed.values())
    assert set(group.teacher_shares) == set(RULES)
    assert [choice.label for choice in group.pools[0].choices] == list(RULES)


def test_a_run_stopped_after_training_has_its_curves(tmp_path):
    (run,) = small_sweep(tmp_path, rules=RULES[:2], seeds=(0,))
    curve = [{"step": 0, "held_out/loss": 1.0}, {"step": 9, "held_out/loss": 0.5}]
    write_json(run / "selector" / "trained.json", {"curve": curve})
    write_json(run / "summary.json", {"status": "finished", "stopped_after": "training"})
    (group,) = contents(tmp_path).groups
    assert group.curves["lark"][0] == curve
    assert group.curves["random"][0] == []


def test_a_stopped_run_beside_finished_ones_is_named_and_left_to_its_own_page(tmp_path):
    runs = small_sweep(tmp_path)
    write_json(runs[0] / "summary.json", STOPPED)
    (group,) = contents(tmp_path).groups
    (said,) = group.left_out
    assert str(runs[0]) in said and "selection" in said and "--page" in said


def test_runs_without_samples_are_counted(tmp_path):
    runs = small_sweep(tmp_path)
    (runs[0] / NAME).unlink()
    (group,) = contents(tmp_path).groups
    assert group.left_out[-1].startswith(f"1 of {len(runs)} runs left no candidates.jsonl.gz")
    assert group.pools


def test_another_pool_is_a_pool_of_its_own(tmp_path):
    small_sweep(tmp_path / "a")
    small_sweep(tmp_path / "b", problems=5)
    for run in (tmp_path / "b").glob("*/summary.json"):
        content = read_json(run)
        content["settings"]["task.limit"] = 5
        for arm in content["arms"].values():
            arm["hash"] += "five"
        write_json(run, content)
    (group,) = contents(tmp_path).groups
    assert [pool.sample.facts["problems"] for pool in group.pools] == [8, 5]
    assert len({pool.name for pool in group.pools}) == 2


def test_failed_runs_and_unfinished_ones_are_listed(tmp_path):
    runs = small_sweep(tmp_path)
    write_json(runs[1] / "summary.json", {"status": "failed", "error": "out of memory"})
    shutil.rmtree(runs[2])
    found = contents(tmp_path)
    lines = {line["folder"]: line for line in found.runs}
    assert lines[str(runs[1])]["status"] == "failed: out of memory"
    assert lines[str(runs[0])]["rules"] == "lark against random"
    assert len(lines) == len(runs) - 1


def test_a_diagnosis_for_each_selector_from_its_first_seed(tmp_path):
    runs = small_sweep(tmp_path)
    (group,) = contents(tmp_path).groups
    (diagnosis,) = group.diagnoses
    assert (diagnosis.label, diagnosis.seed) == ("lark", 0)
    assert len(diagnosis.rows) == 8 * 5
    (runs[0] / "diagnostics-candidates.csv").unlink()  # the next run's has more
    (group,) = contents(tmp_path).groups
    assert len(group.diagnoses[0].rows) == 8 * 5
    for run in runs:
        (run / "diagnostics.json").unlink()
    (group,) = contents(tmp_path).groups
    assert not group.diagnoses

"""Summaries from disk: in order, once, complete; and the best of several learning rates."""

from pathlib import Path

import pytest
from summaries import accuracies, arm, run

from lark.common.cache import write_json
from lark.common.errors import LarkError
from lark.comparison.comparison import compare
from lark.comparison.summaries import read_summaries, take_best_rates

FAILED = {"status": "failed", "error": "budget=0 is not a number"}


def one_run(**more):
    return run(
        selector=arm("lark", "a", accuracies([1.0] * 4)), baseline=arm("rsr", "b", accuracies([0.5] * 4)), **more
    )


def test_jobs_come_in_their_order(tmp_path) -> None:
    for job in range(12):
        write_json(tmp_path / str(job) / "summary.json", FAILED)
    assert [Path(one["folder"]).name for one in read_summaries([tmp_path])] == [str(job) for job in range(12)]


def test_a_run_named_in_several_ways_is_read_once(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "runs" / "a"
    write_json(folder / "summary.json", one_run())
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert len(read_summaries([folder, Path("runs"), Path("runs/../runs/a"), Path("link")])) == 1
    assert [one["folder"] for one in read_summaries([Path("runs")])] == [str(Path("runs/a"))]


def test_no_summary_is_an_error(tmp_path) -> None:
    with pytest.raises(LarkError, match="no summary"):
        read_summaries([tmp_path])


@pytest.mark.parametrize(
    "place",
    ["settings", "difference_of", "arms.before.cost", "arms.selector.curve", "arms.selector.metrics.eval.stop"],
)
def test_a_summary_of_another_version_names_what_it_lacks(place: str, tmp_path) -> None:
    content = one_run()
    *parts, key = place.split(".")
    part = content
    for name in parts:
        part = part[name]
    del part[key]
    write_json(tmp_path / "summary.json", content)
    with pytest.raises(LarkError, match=place):
        read_summaries([tmp_path])


def test_each_arm_is_taken_at_the_rate_of_its_lowest_held_out_loss() -> None:
    """The selector's best rate is not the baseline's; seeds and other settings stay apart, failed runs stay."""
    losses = {1e-5: (1.0, 0.8), 1e-4: (0.7, 0.9)}
    runs = [
        run(
            selector=arm("lark", f"a{lr}{seed}", accuracies([lr] * 4), held_out_loss=losses[lr][0], lr=lr),
            baseline=arm("rsr", f"b{lr}{seed}", accuracies([lr] * 4), held_out_loss=losses[lr][1], lr=lr),
            settings={"sft.lr": lr, "budget": budget},
            seed=seed,
        )
        for lr in losses
        for seed in (0, 1)
        for budget in (1, 2)
    ]
    taken = take_best_rates([*runs, {"status": "failed", "error": "x", "folder": "y"}])
    assert len(taken) == 5 and taken[-1]["folder"] == "y"
    for one in taken[:-1]:
        assert (one["arms"]["selector"]["lr"], one["arms"]["baseline"]["lr"]) == (1e-4, 1e-5)
        assert "sft.lr" not in one["settings"]
    (group,) = compare(taken).groups
    assert all("sft.lr" not in one.label for one in group.arms)
    assert any("rsr, seed 1: sft.lr=1e-05" in note for note in group.notes)
    assert all("try" in note for note in group.notes), "both rates are at an end of those that were tried"

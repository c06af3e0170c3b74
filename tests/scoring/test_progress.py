"""Progress of a pass: what is counted, the time left, what the logger and the manifest get."""

import re

import numpy as np
import pytest
from conftest import rows_of_a_pool
from points import Points

from lark.common import progress_line
from lark.common.cache import read_json
from lark.scoring import progress
from lark.scoring.passes import Statistics
from lark.scoring.progress import PassProgress, describe_pass
from lark.scoring.statistics_pass import StatisticsModule


class KillError(Exception):
    pass


def killed(*_):
    raise KillError


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes by the work done alone: a second for every token."""
    now = [100.0]
    step = StatisticsModule.predict_step

    def slow(self, batch, batch_idx):
        done = step(self, batch, batch_idx)
        now[0] += float(self.inputs.pool.length[batch].sum())
        return done

    monkeypatch.setattr(StatisticsModule, "predict_step", slow)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def passed(make_data, caplog):
    """Runs the statistics; returns its data module, manifest, what was said, and the points its logger got."""

    def run(*, batch_tokens=300, **settings):
        caplog.set_level("INFO", logger="lark")
        points = Points()
        probe = {"batch_tokens": batch_tokens, "shard_rows": 5}
        data = make_data(probe=probe, trainer={"callbacks": [PassProgress("a pass")]}, **settings)
        data.prepare_data()
        data.run_pass(Statistics(), cached=False, experiment_logger=points)
        found = [{name.removeprefix("scoring/"): value for name, value in one.items()} for _, one in points.points]
        return data, read_json(data.pass_folder(Statistics()) / "manifest.json"), caplog.messages, found

    return run


def test_figures_of_a_pass(passed):
    data, manifest, said, points = passed()
    rows, figures = data.scored, manifest["throughput"]
    assert figures["trajectories"] == len(rows) == manifest["rows"]
    assert figures["trajectories_per_s"] * figures["pass_seconds"] == pytest.approx(len(rows))
    assert figures["tokens_per_s"] * figures["pass_seconds"] == pytest.approx(manifest["forward_tokens"])
    assert figures["pass_seconds"] >= manifest["seconds"] > 0
    assert describe_pass(figures) in said[-1]
    assert data.costs[Statistics()]["throughput"] == figures
    rates = {name: figures[name] for name in ("trajectories_per_s", "tokens_per_s")}
    assert points == [{"trajectories": len(rows), **rates, "seconds_left": 0.0}], "at the end alone, being short"


def test_time_left_goes_by_tokens(passed, clock, monkeypatch):
    monkeypatch.setattr(progress, "LOGGER_SECONDS", -1.0)
    rows = rows_of_a_pool()
    for row in rows:
        row["messages"][-1]["content"] = int(row["problem_id"]) * "See.\n" + row["messages"][-1]["content"]
    data, manifest, _, points = passed(rows=rows, batch_tokens=1)
    total = int(data.trajectories.length[data.scored].sum())
    assert len(points) == len(data.scored) + 1, "the last is the final one"
    elapsed = [point["trajectories"] / point["trajectories_per_s"] for point in points]
    for point, seconds in zip(points, elapsed, strict=True):
        assert seconds + point["seconds_left"] == pytest.approx(total)
    share_of_rows = np.array([point["trajectories"] for point in points]) / len(data.scored)
    assert np.abs(share_of_rows - np.array(elapsed) / total).max() > 0.05, "by rows or batches it would be another"
    assert manifest["throughput"]["pass_seconds"] == pytest.approx(total)


def test_a_logger_gets_a_point_every_few_seconds(passed, clock, monkeypatch):
    monkeypatch.setattr(progress, "LOGGER_SECONDS", 500.0)
    data, *_, points = passed()
    elapsed = [point["trajectories"] / point["trajectories_per_s"] for point in points]
    assert 2 < len(points) < len(data.scored)
    assert min(np.diff([0, *elapsed[:-1]])) > 500


def test_a_pass_that_goes_on_counts_what_is_left(passed, monkeypatch):
    step, totals = StatisticsModule.predict_step, []

    def killed_later(self, batch, batch_idx):
        if batch_idx == 4:
            raise KillError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StatisticsModule, "predict_step", killed_later)
        with pytest.raises(KillError):
            passed()
    monkeypatch.setattr(PassProgress, "close", lambda self: totals.append((self.total, self.tokens)))
    data, manifest, said, _ = passed()
    kept = manifest["resumed_rows"]
    left = len(data.scored) - kept
    assert kept > 0 and left == manifest["throughput"]["trajectories"]
    assert totals[0][0] == totals[0][1] < data.trajectories.length[data.scored].sum()
    assert f"{left:,} trajectories" in said[-1]


def test_nothing_left_to_do(passed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lark.scoring.pass_module.write_json", killed)
        with pytest.raises(KillError):
            passed()
    _, manifest, _, points = passed()
    assert "throughput" not in manifest and points == []


def test_the_line_in_a_log_file(passed, clock, monkeypatch, capsys):
    monkeypatch.setattr(progress_line, "LOG_SECONDS", 0.0)
    data, *_ = passed()
    total = int(data.trajectories.length[data.scored].sum())
    lines = [line.strip() for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("a pass")]
    done = [
        int(found[1]) for line in lines if (found := re.match(rf"a pass: +\d+%\|.*\| (\d+)/{total} \[.*tokens", line))
    ]
    assert len(done) > 4 and done == sorted(set(done)) and done[-1] == total


def test_no_line_within_ten_seconds(passed, capsys):
    passed()
    assert "a pass" not in capsys.readouterr().err


def test_a_pass_in_words():
    figures = {"trajectories": 2142, "pass_seconds": 8.12, "trajectories_per_s": 263.79, "tokens_per_s": 17_474.3}
    assert describe_pass(figures) == "2,142 trajectories in 8.1 s: 263.8 trajectories/s, 17,474 tokens/s"
    assert describe_pass(figures | {"pass_seconds": 3723.0}).startswith("2,142 trajectories in 1:02:03: ")

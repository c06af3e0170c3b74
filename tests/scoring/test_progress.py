"""The progress of a pass: what it counts, the time left, the share of the GEMM limit, what stays in the manifest."""

import re

import numpy as np
import pytest
from conftest import rows_of_a_pool
from points import Points

from lark.common import progress_line as bar
from lark.common.cache import read_json
from lark.scoring import progress
from lark.scoring.passes import ContentAlone, Gradients, LocalWindows, MeanHidden, Statistics
from lark.scoring.progress import PassProgress, describe_pass, describe_rates
from lark.scoring.statistics_pass import ProbeModule

A_TOKEN, A_SCORED_TOKEN = 1e-6, 3e-6  # seconds: the GEMM limit of a made-up device


class KillError(Exception):
    pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes by the work done alone: a second for every distinct token."""
    now = [100.0]
    step = ProbeModule.predict_step

    def slow(self, batch, batch_idx):
        tokens = step(self, batch, batch_idx)
        now[0] += sum(distinct(self.work.pool, batch[0]))
        return tokens

    monkeypatch.setattr(ProbeModule, "predict_step", slow)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def distinct(pool, rows):
    """Tokens of each row, of its prompt only its part; every problem of the pool that is scored has four rows."""
    return [(pool.length[row] - pool.span_tokens[row]) / 4 + pool.span_tokens[row] for row in rows]


@pytest.fixture
def limit(monkeypatch):
    """Measured at once; how often it was measured."""
    measured = []
    monkeypatch.setattr(progress, "LIMIT_AFTER", -1.0)
    monkeypatch.setattr(
        progress, "gemm_seconds", lambda *_, seconds: measured.append(seconds) or (A_TOKEN, A_SCORED_TOKEN)
    )
    return measured


@pytest.fixture
def passed(make_data):
    """Runs a pass; its data module, callback, manifest, what was said, and the points its logger got."""

    def run(wanted=None, *, batch_tokens=300, **settings):
        said, points, seen = [], Points(), PassProgress("a pass")
        probe = {"batch_tokens": batch_tokens, "shard_rows": 5}
        data = make_data(probe=probe, trainer={"callbacks": [seen]}, say=said.append, **settings)
        data.prepare_data()
        wanted = wanted or Statistics()
        data.run_pass(wanted, cached=False, logger=points)
        found = [{name.removeprefix("scoring/"): value for name, value in one.items()} for _, one in points.points]
        return data, seen, read_json(data.pass_folder(wanted) / "manifest.json"), said, found

    return run


def test_figures_of_a_pass(passed):
    data, _, manifest, said, points = passed()
    pool, rows, figures = data.trajectories, data.scored, manifest["throughput"]
    assert figures["trajectories"] == len(rows) == manifest["rows"]
    assert figures["trajectories_per_s"] * figures["pass_seconds"] == pytest.approx(len(rows))
    assert figures["tokens_per_s"] * figures["pass_seconds"] == pytest.approx(pool.length[rows].sum())
    assert figures["tokens_per_s"] * figures["pass_seconds"] == pytest.approx(manifest["forward_tokens"])
    assert figures["pass_seconds"] >= manifest["seconds"] > 0
    assert "share_of_gemm_limit" not in figures, "a pass as short as this one pays for no measurement"
    assert said[-1] == f"statistics  {describe_pass(figures)}"
    assert data.costs[Statistics()]["throughput"] == figures
    rates = {name: figures[name] for name in ("trajectories_per_s", "tokens_per_s")}
    assert points == [{"trajectories": len(rows), **rates, "seconds_left": 0.0}], "at the end alone, being short"


def test_time_left_goes_by_tokens(passed, clock, monkeypatch):
    monkeypatch.setattr(progress, "LOGGER_SECONDS", -1.0)
    rows = rows_of_a_pool()
    for row in rows:
        row["messages"][-1]["content"] = int(row["problem_id"]) * "See.\n" + row["messages"][-1]["content"]
    data, _, manifest, _, points = passed(rows=rows, batch_tokens=1)
    total = sum(distinct(data.trajectories, data.scored))
    assert len(points) == len(data.scored) + 1, "the last is the final one"
    elapsed = [point["trajectories"] / point["trajectories_per_s"] for point in points]
    for point, seconds in zip(points, elapsed, strict=True):
        assert seconds + point["seconds_left"] == pytest.approx(total)
    share_of_rows = np.array([point["trajectories"] for point in points]) / len(data.scored)
    assert np.abs(share_of_rows - np.array(elapsed) / total).max() > 0.1, "by rows or batches it would be another"
    assert manifest["throughput"]["pass_seconds"] == pytest.approx(total)


def test_a_logger_gets_a_point_every_few_seconds(passed, clock):
    data, *_, points = passed()
    elapsed = [point["trajectories"] / point["trajectories_per_s"] for point in points]
    assert 2 < len(points) < len(data.scored)
    assert min(np.diff([0, *elapsed[:-1]])) > progress.LOGGER_SECONDS


def test_share_of_the_limit(passed, limit, clock):
    data, _, manifest, said, points = passed()
    pool, rows = data.trajectories, data.scored
    seconds = manifest["throughput"]["pass_seconds"]
    least = A_TOKEN * sum(distinct(pool, rows)) + A_SCORED_TOKEN * pool.span_tokens[rows].sum()
    assert manifest["throughput"]["share_of_gemm_limit"] == pytest.approx(least / seconds, rel=1e-2)
    assert points[-1]["share_of_gemm_limit"] == manifest["throughput"]["share_of_gemm_limit"]
    assert "0% of the GEMM limit" in said[-1]
    (given,) = limit
    assert given == progress.LIMIT_SECONDS < progress.LIMIT_SHARE * seconds, "once, and for a part of the pass"


def test_measuring_the_limit_is_not_the_pass(passed, limit, clock, monkeypatch):
    def slowly(*_, seconds):
        clock[0] += 10_000
        return A_TOKEN, A_SCORED_TOKEN

    monkeypatch.setattr(progress, "gemm_seconds", slowly)
    data, _, manifest, *_ = passed()
    assert manifest["throughput"]["pass_seconds"] == pytest.approx(sum(distinct(data.trajectories, data.scored)))


def test_a_limit_that_is_not_known_is_said_so(passed, limit, monkeypatch):
    monkeypatch.setattr(progress, "gemm_seconds", lambda *_, seconds: None)
    _, _, manifest, said, points = passed()
    assert manifest["throughput"]["share_of_gemm_limit"] is None
    assert said[-1].endswith("tokens/s, share of the GEMM limit unknown")
    assert "share_of_gemm_limit" not in points[-1]


def test_products_of_every_kind_of_pass(passed, limit):
    products = {}
    for wanted in (Statistics(), MeanHidden(), LocalWindows(steps_before=1), ContentAlone(), Gradients()):
        data, seen, manifest, *_ = passed(wanted, cache=wanted.name)
        assert seen.tokens == manifest["forward_tokens"] > 0
        products[wanted] = seen.products.tolist()
        assert ("share_of_gemm_limit" in manifest["throughput"]) == (wanted != Gradients())
    spans = int(data.trajectories.span_tokens[data.scored].sum())
    shared = round(sum(distinct(data.trajectories, data.scored)))
    assert products[Statistics()] == [pytest.approx(shared, abs=20), spans], "to the rounding of each batch's prompts"
    assert products[MeanHidden()] == [pytest.approx(shared, abs=20), 0]
    windows, scored = products[LocalWindows(steps_before=1)]
    assert windows > data.trajectories.length[data.scored].sum() and scored == spans
    alone, scored = products[ContentAlone()]
    assert alone < spans and scored == alone - len(data.scored)
    assert products[Gradients()] == [0, 0]
    assert len(limit) == 4


def test_a_pass_that_goes_on_counts_what_is_left(passed, monkeypatch):
    step, seen = ProbeModule.predict_step, []

    def killed(self, batch, batch_idx):
        if batch_idx == 4:
            raise KillError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ProbeModule, "predict_step", killed)
        with pytest.raises(KillError):
            passed()
    monkeypatch.setattr(PassProgress, "close", lambda self: seen.append((self.bar and self.bar.total, self.done)))
    data, callback, manifest, said, _ = passed()
    kept = manifest["resumed_rows"]
    left = len(data.scored) - kept
    assert kept > 0 and seen[0][0] == left == manifest["throughput"]["trajectories"]
    assert callback.done == pytest.approx(callback.total)
    assert f"scoring {left:,} trajectories, {kept:,} are kept of a pass that was interrupted" in "".join(said)
    assert said[-1].startswith(f"statistics  {left:,} trajectories in ")


def test_nothing_left_to_do(passed, monkeypatch):
    def killed(*_):
        raise KillError

    with monkeypatch.context() as patch:
        patch.setattr("lark.scoring.statistics_pass.write_json", killed)
        with pytest.raises(KillError):
            passed()
    *_, manifest, said, points = passed()
    assert "throughput" not in manifest and points == []
    assert "scoring 0 trajectories" in said[-1]


def test_the_line_in_a_log_file(passed, limit, clock, monkeypatch, capsys):
    monkeypatch.setattr(bar, "LOG_SECONDS", 0.0)
    data, *_ = passed()
    lines = [line.strip() for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("a pass")]
    assert len(lines) > 4
    assert re.match(r"a pass:   0%\|.*\| 0/24$", lines.pop(0))
    pattern = r"^a pass: +\d+%\|.*\| (\d+)/(\d+), (\d\d:\d\d) left, [\d.]+ trajectories/s, [\d.]+ tokens/s, \d+% of "
    found = [re.findall(pattern + "the GEMM limit$", line) for line in lines]
    assert all(found), lines
    done, total, left = zip(*(match[0] for match in found), strict=True)
    assert sorted(set(map(int, done))) == [*map(int, done)] and set(total) == {str(len(data.scored))}
    assert left[-1] == "00:00"


def test_no_line_within_ten_seconds(passed, capsys):
    passed()
    assert "a pass" not in capsys.readouterr().err


def test_numbers_of_any_size():
    figures = {"trajectories": 2142, "pass_seconds": 8.12, "trajectories_per_s": 263.79, "tokens_per_s": 17_474.3}
    text = "2,142 trajectories in 8.1 s: 264 trajectories/s, 17,500 tokens/s"
    assert describe_pass(figures) == text
    assert describe_pass(figures | {"share_of_gemm_limit": 0.614}) == f"{text}, 61% of the GEMM limit"
    assert describe_pass(figures | {"pass_seconds": 3723.0}).startswith("2,142 trajectories in 1:02:03: ")
    for rate, shown in ((0.0421, "0.04"), (3.14159, "3.14"), (31.4159, "31.4"), (1_234_567.0, "1,230,000")):
        assert describe_rates({"trajectories_per_s": rate, "tokens_per_s": 1.0}).startswith(f"{shown} trajectories/s")

"""The page's HTML as it is written, without a browser: its parts, what it escapes, what it may load, where files go."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_folders import HOSTILE, RULES, small_sweep

from lark import report
from lark.common.cache import write_json
from lark.comparison.summaries import read_summaries
from lark.page import write
from lark.page.write import NAME, PLOTLY, parse_number, write_own_page, write_page

VOID = ("meta", "link", "input", "br", "img")


class Parsed(HTMLParser):
    """Tags in their order with attributes, texts by the tag they stand in, and whether every tag was closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for within, text in self.texts if within == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    small_sweep(folder)
    write_page(read_summaries([folder]), folder / NAME)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Parsed(folder / NAME)


def embedded(page: Parsed) -> dict:
    (text,) = [text for text in page.text("script") if text.startswith('{"plot')]
    return json.loads(text)


def test_tables_have_the_printed_figures(page, folder, capsys):
    rows = [text for text in page.text("bdi") if text in RULES]
    assert rows == ["random", "lark", "longest"]  # as the printed table has them
    report.report([folder])
    printed = capsys.readouterr().out
    figures = [cell for cell in page.text("td") if re.fullmatch(r"[-+.\d,%]+", cell)]
    assert len(figures) > 20 and all(cell in printed for cell in figures)


def test_it_may_load_its_own_scripts_and_plotly_only(page):
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy.startswith("default-src 'none'")
    run = [text for text, script in zip(page.text("script"), page.of("script"), strict=True) if not script.get("type")]
    assert len(run) == 2
    for text in run:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert not re.match("[a-z]+:", attributes.get(name) or "") or attributes[name] == "data:,"
        assert not any(name.startswith("on") for name in attributes)
    assert embedded(page)["plotly"] == PLOTLY


def test_names_and_texts_cannot_leave_their_place(tmp_path):
    texts = [*HOSTILE, "null \x00 and half \ud800 a pair"]
    runs = small_sweep(tmp_path, names=HOSTILE, texts=texts, seeds=(0,))
    for run in runs:
        content = json.loads((run / "summary.json").read_text())
        content["arms"]["baseline"]["rule"] = HOSTILE[1]
        content["settings"]["baseline.name"] = HOSTILE[1]
        write_json(run / "summary.json", content)
    parsed = Parsed(write_page(read_summaries([tmp_path]), tmp_path / NAME))
    assert not parsed.open
    assert len(parsed.of("script")) == 4 and not parsed.of("img") and not parsed.of("b")
    for text in parsed.text("script"):
        if text.startswith('{"plot'):
            assert not set(text) & set("<>&'")
    shown = [text for _, text in parsed.texts]
    assert any(HOSTILE[1] in text for text in shown)
    assert "\x00" not in (tmp_path / NAME).read_text()


def test_what_is_missing_is_named(tmp_path):
    runs = small_sweep(tmp_path)
    for run in runs:
        for name in ("diagnostics.json", "diagnostics-candidates.csv", "candidates.jsonl.gz"):
            (run / name).unlink()
    parsed = Parsed(write_page(read_summaries([tmp_path]), tmp_path / NAME))
    missing = [p for p in parsed.of("p") if p.get("class") == "missing"]
    assert len(missing) == 1 + 1  # trajectories, noscript
    assert "candidates.jsonl.gz" in " ".join(text for _, text in parsed.texts)


def test_stopped_and_failed_runs_have_a_page(tmp_path):
    runs = small_sweep(tmp_path)
    for run in runs:
        write_json(run / "summary.json", {"status": "finished", "stopped_after": "selection"})
    parsed = Parsed(write_page(read_summaries([tmp_path]), tmp_path / NAME))
    assert "overlap" in " ".join(embedded(parsed)["plots"])
    assert "stopped after selection, as it was told to" in parsed.text("td")
    for run in runs:
        write_json(run / "summary.json", {"status": "failed", "error": "<out> of memory"})
    parsed = Parsed(write_page(read_summaries([tmp_path]), tmp_path / NAME))
    assert "failed: <out> of memory" in parsed.text("td")


def test_pages_share_one_library_and_a_sweep_s_page_links_to_its_runs(folder):
    runs = [folder / "0", folder / "1"]
    logs = folder / "logs"
    for run in runs:
        assert write_own_page(run, logs) == run / NAME
        assert embedded(Parsed(run / NAME))["plotly"] == f"../logs/{PLOTLY}"
    assert write_own_page(folder, logs) == folder / NAME
    assert (logs / PLOTLY).stat().st_size > 10**6
    links = {a["href"] for a in Parsed(folder / NAME).of("a")}
    assert {"0", "0/report.html", "1/report.html", "0/summary.json"} <= links


def test_the_first_screen_answers_in_words(page):
    asked = page.text("dt")
    assert [text for text in asked if text.strip()] == ["Result", "How sure", "Cost", "Pool"]
    (result,) = (text for text in page.text("bdi") if text.startswith("lark is "))
    assert all(name in result for name in RULES)


def test_few_columns_are_shown_and_the_others_are_behind_a_switch(page):
    arms, differences = (page.of("table")[number]["id"] for number in (0, 1))
    shown = [th for th in page.of("th") if "number" in (th.get("class") or "").split()]
    assert arms != differences and 0 < sum("more" not in th["class"].split() for th in shown) < len(shown)
    assert [box for box in page.of("input") if box.get("type") == "checkbox"]


def test_a_page_that_cannot_be_written_is_a_warning(folder, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_text", full)
    assert write_own_page(folder / "0", folder) is None
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("98,765,432", 98765432),
        ("+10.0 [+1.5, +12.0]", 10.0),
        ("-0.090", -0.09),
        ("56.2%", 56.2),
        ("<.001", 0.0005),
        ("1e-05", 1e-5),
        ("3/1/0", 3),
        ("", None),
    ],
)
def test_cells_are_sorted_by_their_numbers(text, value):
    assert parse_number(text) == (value if value is None else pytest.approx(value))

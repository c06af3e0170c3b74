"""docs/report.md: its commands, the limits and the parts it names."""

import re
import shlex
import subprocess
import sys

import pytest
from page_folders import small_sweep
from pages import ROOT, blocks, commands, text_of

from lark import report
from lark.page import pool_sample, trajectories
from lark.page.write import NAME, write_page

PAGE = "docs/report.md"
COMMANDS = [shlex.split(line) for line in commands(PAGE)]


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[2] == "lark.report"], ids=" ".join)
def test_report_commands(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_sweep(tmp_path / words[3] / "one")
    monkeypatch.setattr("sys.argv", words[2:])
    report.main()
    assert (tmp_path / words[-1]).is_file()


def test_the_limits_are_those_of_the_code():
    text = " ".join(text_of(PAGE).split())
    whole = pool_sample.HEAD + pool_sample.TAIL
    assert f"{pool_sample.TRAJECTORIES:,} trajectories at most, of texts longer than {whole:,} characters" in text
    assert f"the first {pool_sample.HEAD:,} and the last {pool_sample.TAIL:,}" in text
    assert (
        f"shows {trajectories.TRAJECTORIES:,} trajectories at most, and {trajectories.PACKED_BYTES // 10**6} MB" in text
    )


def test_the_parts_it_names_are_on_the_page(tmp_path):
    small_sweep(tmp_path)
    shown = write_page([tmp_path], tmp_path / NAME).read_text()
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|", text_of(PAGE), re.MULTILINE)[1:]
    names = [name for row in rows for name in row.split(", ") if name != "part"]
    headings = " ".join(re.findall(r"<(?:h[23]|caption)[^>]*>(.*?)</(?:h[23]|caption)>", shown))
    assert len(names) > 10
    for name in names:
        assert name.removeprefix("Does").rstrip("?").strip().lower() in headings.lower(), name


@pytest.mark.usefixtures("browser")  # the benchmark starts one of its own
def test_the_benchmark_prints_what_the_page_says():
    (words,) = [words for words in COMMANDS if words[1] == "benchmarks/page.py"]
    small = ["--arms", "2", "--problems", "20", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / words[1]), *words[2:], *small], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr  # 1: slower than the aim, on a busy machine
    (printed,) = blocks(PAGE, "console")
    pattern = re.escape(printed.strip()).replace(r"\.\.\.", r"[\d,.]+").replace(r"4\.82", r"[\d.]+")
    assert re.search(pattern, done.stdout), done.stdout

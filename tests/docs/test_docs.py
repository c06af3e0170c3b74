"""The site builds without a warning, and offline; commands of pages that have no test of their own."""

import html
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Opened
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lark_command import lark
from omegaconf import DictConfig, OmegaConf
from pages import ROOT, blocks, commands, composed, text_of

from lark import config as configuration

PAGES = {f"docs/{page}.md": page for page in ("index", "concepts", "your_own_pool", "your_own_task", "evidence", "faq")}
COMMANDS = [line for page in PAGES for line in commands(page) if line.startswith("python -m lark.")]


class Fetched(HTMLParser):
    """What a page makes a browser fetch: scripts, styles, images, frames, fonts that are loaded ahead."""

    def __init__(self, page: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "data", "poster") if tag != "link" else ("href",)
        self.addresses += [value for name, value in attrs if name in names and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: broken links, anchors and pages without a place would fail it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    told = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        addresses = Fetched(page).addresses
        assert any(address.endswith(".css") for address in addresses)
        assert not [address for address in addresses if re.match(r"(https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", text), sheet


def test_every_page_is_on_the_site(site: Path) -> None:
    """Those of docs/ and those of the top, at which links that left docs/ now end."""
    expected = {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")}
    assert expected | {"overview.html", "contributing.html", "changelog.html"} <= {p.name for p in site.glob("*.html")}
    assert 'href="overview.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="clusters.html"' in (site / "overview.html").read_text(encoding="utf-8")


def test_every_formula_is_drawn(site: Path) -> None:
    """In the page's order, each with its source, which screen readers and copying get."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text_of("docs/theory.md"), flags=re.DOTALL)
    formulas = [formula.strip(" $\n") for formula in re.findall(r"\$\$.*?\$\$|\$[^$]+\$", text, re.DOTALL)]
    drawn = (site / "theory.html").read_text(encoding="utf-8")
    sources = [html.unescape(source) for source in re.findall(r"<annotation[^>]*>(.*?)</annotation>", drawn, re.DOTALL)]
    as_written = [re.sub(r"\\(left|right)(?![a-z])", lambda side: rf"\Big{side[1][0]}", source) for source in sources]
    assert len(formulas) > 100
    assert [formula.split() for formula in as_written] == [formula.split() for formula in formulas]


def test_it_works_from_the_disk(site: Path, browser: Any) -> None:
    opened = Opened(browser, site / "theory.html", theme="dark")
    page = opened.page
    font = page.evaluate("document.fonts.ready.then(() => document.fonts.check('16px \"STIX Two Math\"'))")
    assert font
    page.click("input[name=query]")
    page.keyboard.type("data flow")
    page.wait_for_selector(".md-search-result__item")
    assert not opened.errors
    assert all(address.startswith(("file:", "data:", "blob:", "about:")) for address in opened.requests)
    opened.close()


def test_every_page_with_commands_has_a_test() -> None:
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    for page in (f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")):
        named = page in PAGES or any(f'"{page}"' in text for text in tests)
        assert named or not commands(page, "bash", "sbatch"), page


def test_make_docs() -> None:
    plan = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mkdocs build --strict" in plan


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the files that docs/your_own_task.md has saved, and a pool that breaks as on its page."""
    folder = tmp_path_factory.mktemp("workplace")
    for block in [block for name in PAGES for block in blocks(name, "python", "yaml")]:
        path = folder / block.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block, encoding="utf-8")
    return folder


def composed_here(command: str, folder: Path) -> DictConfig:
    """As `composed`, also with options from a folder of the user's."""
    if "--config-dir" not in command:
        return composed(command)
    words = shlex.split(command)
    own = words.pop(words.index("--config-dir") + 1)
    overrides = [word.partition(",")[0] for word in words[3:] if not word.startswith("-")]
    configuration.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configuration.folder()), version_base="1.3"):
        name = "evaluate" if "lark.evaluate" in words else "config"
        return compose(name, [f"hydra.searchpath=[file://{folder / own}]", *overrides])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" not in c and not re.search(r"<\w+>", c)])
def test_commands_compose(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    words = [word for word in shlex.split(command) if word not in ("--cfg", "job")]
    config = composed_here(shlex.join(words), workplace)
    groups = [str(name) for name in config if name != "hydra"]
    own = OmegaConf.masked_copy(config, groups)
    if "lark.evaluate" not in command:
        configuration.check(own)
        configuration.check_types(own)
        assert configuration.build(own.selector) is not None
    configuration.build(own.model)
    configuration.build(own.task)


def test_a_task_that_writes_its_files(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one kind of command that runs nowhere else: options and a function of the user's own."""
    (command,) = [c for c in COMMANDS if "task=products" in c and "stop_after=selection" in c]
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    done = lark(*shlex.split(command)[3:], "task.settings.problems=12", "logger=csv", "diagnostics=none")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (done.folder / "selector" / "selection.jsonl").read_text().splitlines()]
    assert len(rows) == 11  # of 12 problems, one held out, by the budget of 1
    assert {row["meta"]["teacher"] for row in rows} <= {"in_one_step", "by_adding"}
    assert " verdicts filled in" in done.out


def test_faults_are_told_as_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"role": "user", "content": "What is 2 + 3?"}
    first = {"problem_id": 1, "candidate_id": "a", "messages": [asked, {"role": "assistant", "content": "5"}]}
    missing = {"problem_id": 1, "candidate_id": "b", "mesages": []}
    empty = [asked, {"role": "assistant", "content": ""}]
    rows = [first, first, missing, first | {"problem_id": 2, "messages": empty, "correct": "yes"}]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    done = lark("task=jsonl", "task.pool=pool.jsonl", "stop_after=selection", "logger=csv")
    (shown,) = blocks("docs/your_own_pool.md", "console")
    assert done.code == 1
    assert shown.strip() in done.err


def test_the_rows_on_the_page_are_a_pool(tmp_path: Path) -> None:
    from lark.pool.pool import read_pool

    (rows,) = blocks("docs/your_own_pool.md", "json")
    (tmp_path / "pool.jsonl").write_text(rows)
    pool = read_pool(tmp_path / "pool.jsonl", cache=tmp_path)
    assert pool.rows["correct"] == [True, None]
    assert pool.dropped == {}

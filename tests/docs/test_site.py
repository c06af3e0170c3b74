"""The site builds without a warning, and offline."""

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Opened
from pages import ROOT, text_of

pytestmark = pytest.mark.slow


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
    assert len(pages) > 10
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

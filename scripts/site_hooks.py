"""Hooks of mkdocs.yml: files from outside docs/ as pages, formulas as MathML, their font."""

import html
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from math_core import LatexToMathML
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File at the top of the repository -> its page."""
FONT = "STIXTwoMath-Regular.ttf"  # an OpenType font for mathematics; ziamath carries it

_LINK = re.compile(r"\]\((?P<up>\.\./|docs/)?(?P<target>[\w./-]+\.md)(?P<anchor>#[^)]*)?\)")
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<formula>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_converter = LatexToMathML(annotation=True, fancy_error=False)


def on_files(files: Any, config: Any) -> Any:
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    font = metadata.distribution("ziamath").locate_file(f"ziamath/fonts/{FONT}")
    files.append(File.generated(config, f"assets/{FONT}", abs_src_path=str(font)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to and from the files at the top, as they lead on GitHub, led to their pages."""
    at_top = page.file.src_uri in OUTSIDE.values()

    def led(link: re.Match[str]) -> str:
        up, target, anchor = link["up"] or "", link["target"], link["anchor"] or ""
        if at_top and up == "docs/":
            return f"]({target}{anchor})"
        if up == ("" if at_top else "../") and target in OUTSIDE:
            return f"]({OUTSIDE[target]}{anchor})"
        return link[0]

    return _LINK.sub(led, markdown)


def on_page_content(text: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw themselves. Raises LatexError for one that cannot be read."""
    return _FORMULA.sub(_mathml, text)


def _mathml(formula: re.Match[str]) -> str:
    block = formula["open"] == "["
    # Browsers stretch a bracket that has an exponent only as one of a pair.
    written = re.sub(r"\\Big(l|r)(?![a-z])", lambda size: {"l": r"\left", "r": r"\right"}[size[1]], formula["formula"])
    drawn = _converter.convert_with_local_state(html.unescape(written), displaystyle=block)
    return f'<div class="formula">{drawn}</div>' if block else drawn

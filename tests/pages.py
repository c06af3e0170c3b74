"""What stands in the code blocks of README.md and docs/."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The page's code blocks in any of the languages."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text_of(page), re.DOTALL)


def commands(page: str, *languages: str) -> list[str]:
    """The lines of its shell blocks (or of those in `languages`), without the remarks behind them."""
    lines = [line for block in blocks(page, *(languages or ("bash",))) for line in block.splitlines()]
    return [line for line in (line.partition("  #")[0].strip() for line in lines) if line]

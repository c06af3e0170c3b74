"""What stands in the code blocks of README.md and docs/."""

import re
import shlex
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from lark import config as configuration

ROOT = Path(__file__).parents[2]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The page's code blocks in any of the languages."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text_of(page), re.DOTALL)


def commands(page: str, *languages: str) -> list[str]:
    """The lines of its shell blocks (or of those in `languages`), without the remarks behind them."""
    lines = [line for block in blocks(page, *(languages or ("bash",))) for line in block.splitlines()]
    return [line for line in (line.partition("  #")[0].strip() for line in lines) if line]


def composed(command: str) -> DictConfig:
    """The configuration of a lark command, of a multirun's first job."""
    words = shlex.split(command)
    name = "evaluate" if "lark.evaluate" in words else "config"
    start = words.index("lark.evaluate" if name == "evaluate" else "lark.run") + 1
    overrides = [word for word in words[start:] if word != "-m"]
    first = [word if re.search(r"[\[{\"]", word) else word.partition(",")[0] for word in overrides]
    configuration.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configuration.find_conf()), version_base="1.3"):
        return compose(name, first, return_hydra_config=True)

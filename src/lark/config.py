"""Where conf/ is, the one instantiate call, and configuration errors in one sentence.

Imports nothing heavy: `--help` and `--cfg job` must answer at once.
"""

import difflib
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

GROUPS = ("task", "model", "selector", "baseline", "trainer", "logger")
STOPS = ("statistics", "selection", "training")


def folder() -> Path:
    """conf/ of the installed package if it is there, else that of the checkout."""
    package = Path(__file__).parent
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"conf/config.yaml is neither in {package} nor in {package.parents[1]}; reinstall lark")


def register_resolvers() -> None:
    """${lark.sweep:} names a multirun by the hash of its command line, so the same command goes on where it stopped."""
    OmegaConf.register_new_resolver("lark.sweep", _sweep_name, replace=True)


def _sweep_name() -> str:
    words = sorted(word for word in sys.argv[1:] if word not in ("-m", "--multirun"))
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def build(node: Any, **keywords: Any) -> Any:
    """Instantiate a config node. What a constructor raises for a bad value reaches the user as it is."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **keywords)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (ValueError, TypeError, OSError)):
            cause = cause.__cause__
        if isinstance(cause, TypeError):
            raise ValueError(f"{cause} (in the settings of {getattr(node, '_target_', 'a group')})") from error
        if cause is not None:
            raise cause from error
        raise


def check(config: DictConfig) -> None:
    """What no constructor sees: the groups, and the settings that belong to the run as a whole."""
    for group in GROUPS:
        node = config.get(group)
        if not isinstance(node, DictConfig):
            raise ValueError(
                f"{group}={node} cannot replace a whole group here: a replay keeps its groups; override single "
                f"settings ({group}.<name>=...) or run python -m lark.run {group}={node} anew"
            )
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value; set {missing[0]}=... on the command line")
    if isinstance(config.seed, bool) or not isinstance(config.seed, int) or config.seed < 0:
        raise ValueError(f"seed={config.seed} is no whole number from 0 on; set for example seed=0")
    if config.stop_after not in (None, *STOPS):
        raise ValueError(f"stop_after={config.stop_after} is unknown; set it to one of {', '.join(STOPS)}, or null")
    if config.match != "trajectories":
        raise ValueError(f"match={config.match} is unknown; set match=trajectories")
    if isinstance(config.budget, bool) or not isinstance(config.budget, int) or config.budget < 1:
        raise ValueError(f"budget={config.budget} is no number of trajectories a problem; set it to 1 or more")


def sentence(error: BaseException) -> str:
    """The error in words for a user: what setting, which value, what to do."""
    text = str(error)
    unknown = re.search(r"Could not find '(\w+)/([^']*)'", text)
    if isinstance(error, HydraException) and unknown:
        group, option = unknown.groups()
        options = sorted(path.stem for path in (folder() / group).glob("*.yaml"))
        close = difflib.get_close_matches(option, options, 1)
        remedy = f"did you mean {close[0]}? It can be" if close else "set it to one of"
        return f"{group}={option} is unknown; {remedy} {', '.join(options)}"
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
        return f"{error.filename} cannot be written ({error.strerror}); set paths.logs to a folder you may write to"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return " ".join(text.replace("\n", " ").split()) + " (python -m lark.run --cfg job prints every setting)"
    return text

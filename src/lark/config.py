"""Where conf/ is, the one instantiate call, and configuration errors in one sentence.

Imports nothing heavy: `--help` and `--cfg job` must answer at once.
"""

import dataclasses
import difflib
import hashlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lark.common.errors import LarkError

GROUPS = ("task", "model", "selector", "baseline", "diagnostics", "trainer", "logger")
BLOCKS = ("probe", "sft", "evaluation")
VALUES = ("seed", "stop_after", "verbose", "budget", "match", "paths")
STOPS = ("statistics", "selection", "training")
SWEEP_VARIABLE = "LARK_SWEEP"
MATCHES = ("trajectories", "tokens")


def folder() -> Path:
    """conf/ of the installed package if it is there, else that of the checkout."""
    package = Path(__file__).parent
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"conf/config.yaml is neither in {package} nor in {package.parents[1]}; reinstall lark")


def absolute_config_path(words: list[str]) -> list[str]:
    """The command line with a --config-path of the working folder made absolute: Hydra would look beside its script."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).is_dir() else path

    flags = ("--config-path", "-cp")
    result = [
        f"--config-path={absolute(word.partition('=')[2])}" if word.startswith("--config-path=") else word
        for word in words
    ]
    return [absolute(word) if i and result[i - 1] in flags else word for i, word in enumerate(result)]


def register_resolvers() -> None:
    """${lark.sweep:} names a multirun by the hash of its command line, so the same command goes on where it stopped."""
    # from the environment, if it is there: the worker process of a launcher has another command line
    name = lambda: os.environ.get(SWEEP_VARIABLE) or sweep_name(sys.argv)  # noqa: E731
    OmegaConf.register_new_resolver("lark.sweep", name, replace=True)


def sweep_name(words: list[str]) -> str:
    """The name of the multirun that a command line starts."""
    told = sorted(word for word in words[1:] if word not in ("-m", "--multirun"))
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:12]


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
        if isinstance(cause, TypeError):  # a class of the user's own: ours are covered by check_types
            raise LarkError(f"{node.get('_target_')} does not take its settings: {cause}; correct them") from error
        if cause is not None:
            raise cause from error
        raise


def check(config: DictConfig) -> None:
    """What no constructor sees: the groups, and the settings that belong to the run as a whole."""
    check_names(config, groups=GROUPS, others=(*BLOCKS, *VALUES))
    if config.stop_after not in (None, *STOPS):
        raise LarkError(f"stop_after={config.stop_after} is unknown; set it to one of {', '.join(STOPS)}, or null")
    if not isinstance(config.verbose, bool):
        raise LarkError(f"verbose={config.verbose} is not true or false; set one of them")
    if config.match not in MATCHES:
        raise LarkError(f"match={config.match} is unknown; set it to {' or '.join(MATCHES)}")
    scorer = config.probe.get("model")
    if scorer is not None and scorer not in options("model"):
        raise LarkError(f"probe.model={scorer} is unknown; set it to null or one of {', '.join(options('model'))}")
    if isinstance(config.budget, bool) or not isinstance(config.budget, int) or config.budget < 1:
        raise LarkError(f"budget={config.budget} is no number of trajectories a problem; set it to 1 or more")


def check_names(config: DictConfig, *, groups: Iterable[str], others: Iterable[str]) -> None:
    """What every command's configuration has: its groups whole, nothing but these and `others`, a value for each, a
    seed and folders.
    """
    known = [*groups, *others]
    for group in groups:
        if not isinstance(config.get(group), DictConfig):
            raise LarkError(_whole_group(group))
    for name in config:
        if name not in known:
            raise LarkError(_no_setting(str(name), known))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise LarkError(f"{missing[0]} has no value; set {missing[0]}=... on the command line")
    if isinstance(config.seed, bool) or not isinstance(config.seed, int) or config.seed < 0:
        raise LarkError(f"seed={config.seed} is no whole number from 0 on; set for example seed=0")
    for name, path in config.paths.items():
        if not isinstance(path, str) or not path:
            raise LarkError(f"paths.{name}={path} is no folder; set it to one you may write to")


def check_types(config: DictConfig, names: Iterable[str] = (*GROUPS, *BLOCKS)) -> None:
    """Names and types of the settings against the dataclasses they build, which is what tells `sft.lr=abc` apart.

    Raises LarkError naming the setting, its value and what it takes. Values in range are the constructors' business.
    """
    for name in names:
        _check_node(name, config[name])


def _check_node(name: str, node: DictConfig) -> None:
    from hydra.utils import get_object

    target = node.get("_target_")
    if target is not None:
        try:
            schema = get_object(target)
        except (ImportError, ValueError) as error:
            raise LarkError(f"{name}._target_={target} cannot be imported; correct it") from error
        if isinstance(schema, type) and dataclasses.is_dataclass(schema):
            takes = [field.name for field in dataclasses.fields(schema) if field.init]
            hints = get_type_hints(schema)
            for key in (key for key in node if not str(key).startswith("_")):
                if key not in takes:
                    raise LarkError(_no_setting(f"{name}.{key}", [f"{name}.{other}" for other in takes]))
                if not _fits(node[key], hints[key]):
                    kind = _in_words(hints[key])
                    raise LarkError(f"{name}.{key}={node[key]}: this setting takes {kind}; correct it or leave it out")
    for key, value in node.items():
        if isinstance(value, DictConfig):
            _check_node(f"{name}.{key}", value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a config value may stand where `hint` is annotated; True for annotations that YAML cannot express."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in members)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if hint is str or hint is type(None):
        return isinstance(value, hint)
    if origin is dict or dataclasses.is_dataclass(hint):
        return isinstance(value, DictConfig)
    if origin in (list, tuple):
        if not isinstance(value, ListConfig):
            return False
        if origin is list or members[-1] is ...:
            return all(_fits(item, members[0]) for item in value)
        return len(value) == len(members) and all(map(_fits, value, members))
    return True


def _in_words(hint: Any) -> str:
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, members))
    if origin in (list, tuple):
        kinds = {_in_words(member).removeprefix("a ") for member in members if member is not ...}
        count = "" if origin is list or members[-1] is ... else f" of {len(members)}"
        return f"a list{count}, each a {' or '.join(sorted(kinds))}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a group of settings"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "something else")


def _no_setting(name: str, known: list[str]) -> str:
    group = name.partition(".")[0]
    if name in known:
        other = f"another option of {group}= has it" if group in GROUPS else "another command has it"
        return f"{name} is no setting here: {other}; leave it out (--cfg job prints those there are)"
    close = difflib.get_close_matches(name, known, 1)
    remedy = f"did you mean {close[0]}? " if close else ""
    return f"{name} is no setting; {remedy}--cfg job prints all of them"


def _settings() -> list[str]:
    """The names of all settings, whatever options the groups have."""
    found: set[str] = set()
    for path in sorted(folder().rglob("*.yaml")):
        text = path.read_text()
        if path.parent.parent != folder() and path.parent != folder():  # a plugin's, of Hydra's own
            continue
        inside = path.parent != folder() and "@package _global_" not in text
        plain = OmegaConf.to_container(OmegaConf.create(text))  # interpolations stay text
        found |= _names(plain, f"{path.parent.name}." if inside else "")
    found |= {name.replace("selector.", "baseline.", 1) for name in found if name.startswith("selector.")}
    return sorted({*GROUPS, *found} - {"defaults"})


def _names(node: Any, prefix: str) -> set[str]:
    if not isinstance(node, dict):
        return set()
    return {f"{prefix}{key}" for key in node}.union(*(_names(value, f"{prefix}{key}.") for key, value in node.items()))


def _whole_group(group: str) -> str:
    return (
        f"{group}=... cannot be replaced as a whole: a replay keeps its groups, override single settings "
        f"({group}.<name>=...); a new run takes {group}= one of {', '.join(options(group))}"
    )


def model_option(name: str) -> Any:
    """Build the student that `model=<name>` would be."""
    return build(_load_option("model", name)["model"])


def _load_option(group: str, name: str) -> Any:
    """Load a group's option over those that its defaults list names."""
    own: Any = OmegaConf.load(folder() / group / f"{name}.yaml")
    bases = [_load_option(group, base) for base in own.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*bases, own)


def options(group: str) -> list[str]:
    """The names that `group=` takes."""
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


def sentence(error: BaseException) -> str:
    """The error in words for a user: what setting, which value, what to do."""
    text = " ".join(str(error).split()) if isinstance(error, HydraException | OmegaConfBaseException) else str(error)
    if unknown := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, option = unknown.groups()
        if group == "hydra":  # a plugin's: hydra/launcher=joblib
            extras = "pip install -e '.[sweep]' (joblib) or '.[slurm]' (slurm) in the checkout"
            return f"hydra/{option} is not installed; {extras}, or leave it out"
        close = difflib.get_close_matches(option, options(group), 1)
        remedy = f"did you mean {close[0]}? It can be" if close else "set it to one of"
        return f"{group}={option} is unknown; {remedy} {', '.join(options(group))}"
    if unknown := re.search(r"Could not override '([^']*)'", text):
        name = unknown[1]
        return _whole_group(name) if name in GROUPS else _no_setting(name, _settings())
    if isinstance(error, OverrideParseException):
        reason = text.partition(" See https://")[0]
        quoted = f"'{str(error.override).partition('=')[0]}=\"...\"'"  # for the shell, and for Hydra
        return f"{error.override} is no setting=value ({reason}); quote what holds spaces, brackets or signs: {quoted}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"{text} (--cfg job prints every setting)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path and who may read and write there"
    return text

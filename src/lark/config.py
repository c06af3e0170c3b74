"""Find conf/, instantiate it, check settings by name and type, and put a user's errors into one sentence.

Imports nothing heavy: `--help` and `--cfg job` must answer at once.
"""

import dataclasses
import difflib
import errno
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lark.common.cache import check_name
from lark.common.errors import LarkError

GROUPS = ("task", "model", "selector", "baseline", "diagnostics", "trainer", "logger")
BLOCKS = ("probe", "sft", "evaluation", "cost")
VALUES: dict[str, Any] = {
    "seed": Annotated[int, 0],
    "stop_after": Literal["cost", "statistics", "selection", "training", None],
    "verbose": bool,
    "budget": Annotated[int, 1],
    "filter": str | dict | None,
    "repeat": Annotated[float, 1] | None,  # type: ignore[operator]
    "match": Literal["trajectories", "tokens"],
    "paths": dict,
}
"""Types of run-wide settings; Annotated[int, n] is a whole number of at least n."""

SWEEP_VARIABLE = "LARK_SWEEP"
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    dict: "a group of settings",
}


def find_conf() -> Path:
    """Return conf/ of the installed package if it is there, else that of the checkout."""
    package = Path(__file__).parent
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise LarkError(f"conf/config.yaml is neither in {package} nor in {package.parents[1]}; reinstall lark")


def resolve_config_path(words: list[str]) -> list[str]:
    """Make a --config-path of the working folder absolute in a command line: Hydra would look beside its script."""

    def resolve(path: str) -> str:
        if not Path(path).is_dir() and "://" not in path:
            raise LarkError(
                f"--config-path {path} is not a folder; name a run's, such as logs/runs/<task>/<model>/<time>"
            )
        return str(Path(path).resolve()) if "://" not in path else path

    flags = ("--config-path", "-cp")
    result = [
        f"--config-path={resolve(word.partition('=')[2])}" if word.startswith("--config-path=") else word
        for word in words
    ]
    return [resolve(word) if i and result[i - 1] in flags else word for i, word in enumerate(result)]


def register_resolvers() -> None:
    """Let ${lark.sweep:} name a multirun by the hash of its command line, so the same command continues it."""
    # from the environment, if it is there: the worker process of a launcher has another command line
    name = lambda: os.environ.get(SWEEP_VARIABLE) or hash_command(sys.argv)  # noqa: E731
    OmegaConf.register_new_resolver("lark.sweep", name, replace=True)


def hash_command(words: list[str]) -> str:
    """Return the name of the multirun that a command line starts."""
    told = sorted(word for word in words[1:] if word not in ("-m", "--multirun"))
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:12]


def build(node: Any, **keywords: Any) -> Any:
    """Instantiate a config node; what a constructor raises passes as it is."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **keywords)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, HydraException):
            cause = cause.__cause__
        if isinstance(cause, TypeError):  # a class of the user's own: ours are covered by check_types
            raise LarkError(f"{node.get('_target_')} does not take its settings: {cause}; correct them") from error
        raise cause or error from error


def compose(**groups: str) -> DictConfig:
    """Compose what a run with these group options is configured by, without a command line. Raises LarkError."""
    try:
        return deepcopy(_compose(*(f"{group}={option}" for group, option in groups.items())))
    except HydraException as error:
        raise LarkError(to_sentence(error)) from error


@cache  # half a second each
def _compose(*overrides: str) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return compose("config", list(overrides))


def build_part(config: DictConfig, name: str, settings: Mapping[str, Any]) -> Any:
    """Build the part of that name with further settings, which are checked as a command line's. Raises LarkError."""
    config = deepcopy(config)
    OmegaConf.set_struct(config, False)
    config[name] = OmegaConf.merge(config[name], to_plain(settings))
    node = OmegaConf.create({name: OmegaConf.to_container(config[name], resolve=True)})
    check_types(node, [name])
    return build(node[name])


def to_plain(value: Any) -> Any:
    """Return a setting as a configuration holds it: dicts, lists, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def list_options(group: str) -> list[str]:
    """List the names that `group=` takes."""
    return sorted(path.stem for path in (find_conf() / group).glob("*.yaml"))


def build_model_option(name: str) -> Any:
    """Build the student that `model=<name>` would be."""
    return build(_load_option("model", name)["model"])


def _load_option(group: str, name: str) -> Any:
    """Load a group's option over those that its defaults list names."""
    own: Any = OmegaConf.load(find_conf() / group / f"{name}.yaml")
    bases = [_load_option(group, base) for base in own.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*bases, own)


# --- checks


def check_config(config: DictConfig) -> None:
    """Validate groups and run-wide settings; components validate their own. Raises LarkError."""
    check_names(config, groups=GROUPS, others=(*BLOCKS, *VALUES))
    for name, hint in VALUES.items():
        _check_value(name, config[name], hint)
    _check_value("probe.model", config.probe.get("model"), Literal[*list_options("model"), None])
    check_types(config, ("sft", "task"))  # those whose classes are loaded at once: torch takes seconds
    build(config.sft)
    build(config.task).check_files()


def check_names(config: DictConfig, *, groups: Iterable[str], others: Iterable[str]) -> None:
    """Validate what every command's configuration has: its groups whole, nothing but these and `others`, a value for
    each setting, a seed and folders. Raises LarkError.
    """
    known = [*groups, *others]
    for group in groups:
        if not isinstance(config.get(group), DictConfig):
            raise LarkError(_explain_whole_group(group))
        check_name(config[group].get("name"), f"{group}.name")
    for name in config:
        if name not in known:
            raise LarkError(_explain_unknown(str(name), known))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise LarkError(f"{missing[0]} has no value; set {missing[0]}=... on the command line")
    _check_value("seed", config.seed, VALUES["seed"])
    for name, path in config.paths.items():
        if not isinstance(path, str) or not path:
            raise LarkError(f"paths.{name}={path} is not a folder; set it to one you may write to")


def check_types(config: DictConfig, names: Iterable[str] = (*GROUPS, *BLOCKS)) -> None:
    """Compare names and types of the settings with the classes they build, which is what tells `sft.lr=abc` apart.

    Raises LarkError naming the setting, its value and what it takes. Values in range are the constructors' business.
    """
    for name in names:
        _check_node(name, config[name])


def _check_node(name: str, node: DictConfig) -> None:
    """Check a config node, and those inside it, against the signature of its `_target_`."""
    from hydra.utils import get_object

    if (target := node.get("_target_")) is not None:
        try:
            schema = get_object(target)
        except (ImportError, ValueError) as error:
            remedy = "correct it; if an earlier version of LARK wrote it (replay.yaml), run the command again"
            raise LarkError(f"{name}._target_={target} cannot be imported: {remedy}") from error
        is_ours = inspect.isfunction(schema) and target.startswith("lark.")
        if is_ours or (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
            takes = inspect.signature(schema).parameters
            takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
            hints = get_type_hints(schema)
            for key in (str(key) for key in node if not str(key).startswith("_")):
                if key in takes:
                    _check_value(f"{name}.{key}", node[key], hints[key])
                elif not takes_any:
                    raise LarkError(_explain_unknown(f"{name}.{key}", [f"{name}.{other}" for other in takes]))
    for key, value in node.items():
        if isinstance(value, DictConfig):
            _check_node(f"{name}.{key}", value)


def _check_value(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise LarkError(f"{name}={value}: this setting takes {_describe(hint)}; correct it or leave it out")


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a config value may stand where `hint` is annotated; True for what YAML cannot express."""
    kind, members = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, member) for member in members)
    if kind is Annotated:
        return _fits(value, members[0]) and value >= members[1]
    if kind is Literal:
        return not isinstance(value, bool) and value in members
    if kind is float:
        return type(value) in (int, float)
    if kind in (int, bool, str, NoneType):
        return type(value) is kind
    if kind is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, DictConfig)
    if kind in (list, tuple):
        any_length = kind is list or members[-1] is ...
        hints = members[:1] * len(value) if any_length and isinstance(value, ListConfig) else members
        return isinstance(value, ListConfig) and len(value) == len(hints) and all(map(_fits, value, hints))
    return True


def _describe(hint: Any) -> str:
    kind, members = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_describe, members))
    if kind is Annotated:
        return f"{_describe(members[0])} of {members[1]} or more"
    if kind is Literal:
        return f"one of {', '.join('null' if member is None else str(member) for member in members)}"
    if kind in (list, tuple):
        kinds = sorted({_describe(member).removeprefix("a ") for member in members if member is not ...})
        count = "" if kind is list or members[-1] is ... else f" of {len(members)}"
        return f"a list{count}, each a {' or '.join(kinds)}"
    return WORDS.get(dict if dataclasses.is_dataclass(kind) else kind, "something else")


# --- sentences


def to_sentence(error: BaseException) -> str | None:
    """Say an error that a user can act on in one sentence: what setting, which value, what to do.

    Those are LarkError, what Hydra and OmegaConf raise, and OSError on a named path; None for any other, which is a
    defect of ours and shows its traceback.
    """
    if isinstance(error, LarkError):
        return str(error)
    if isinstance(error, OverrideParseException):
        reason = " ".join(str(error).split()).partition(" See https://")[0]
        quoted = f"'{str(error.override).partition('=')[0]}=\"...\"'"  # for the shell, and for Hydra
        return f"{error.override} is not setting=value ({reason}); quote what holds spaces, brackets or signs: {quoted}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_hydra(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the device ({error}); free some, or set paths.logs and paths.cache to another"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path and who may read and write there"
    return None


def _explain_hydra(text: str) -> str:
    if unknown := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, option = unknown.groups()
        if group == "hydra":  # a plugin's: hydra/launcher=joblib
            extras = "pip install -e '.[sweep]' (joblib) or '.[slurm]' (slurm) in the checkout"
            return f"hydra/{option} is not installed; {extras}, or leave it out"
        close = difflib.get_close_matches(option, list_options(group), 1)
        remedy = f"did you mean {close[0]}? It can be" if close else "set it to one of"
        return f"{group}={option} is unknown; {remedy} {', '.join(list_options(group))}"
    if unknown := re.search(r"Could not override '([^']*)'", text):
        name = unknown[1]
        return _explain_whole_group(name) if name in GROUPS else _explain_unknown(name, _list_settings())
    return f"{text} (--cfg job prints every setting)"


def _explain_unknown(name: str, known: list[str]) -> str:
    group = name.partition(".")[0]
    if name in known:
        other = f"another option of {group}= has it" if group in GROUPS else "another command has it"
        return f"{name} is not a setting here: {other}; leave it out (--cfg job prints those there are)"
    close = difflib.get_close_matches(name, known, 1)
    remedy = f"did you mean {close[0]}? " if close else ""
    return f"{name} is not a setting; {remedy}--cfg job prints all of them"


def _explain_whole_group(group: str) -> str:
    return (
        f"{group}=... cannot be replaced as a whole: a replay keeps its groups, override single settings "
        f"({group}.<name>=...); a new run takes {group}= one of {', '.join(list_options(group))}"
    )


def _list_settings() -> list[str]:
    """List the names of all settings, whatever options the groups have."""
    found = set(GROUPS)
    for path in sorted(find_conf().rglob("*.yaml")):
        text, package = path.read_text(), path.relative_to(find_conf()).parent.parts
        if package[:1] != ("hydra",):  # a plugin's own
            prefix = () if "@package _global_" in text else package
            found |= _flatten(OmegaConf.to_container(OmegaConf.create(text)), prefix)
    return sorted(found | {name.replace("selector.", "baseline.", 1) for name in found})


def _flatten(node: Any, prefix: tuple[str, ...]) -> set[str]:
    """Return the dotted names of all keys of a nested dict."""
    if not isinstance(node, dict):
        return set()
    names = {".".join((*prefix, key)) for key in node if key != "defaults"}
    return names.union(*(_flatten(value, (*prefix, key)) for key, value in node.items()))

"""Start a command that composes a configuration, and show a user his errors.

Imports nothing heavy: `--help` and `--cfg job` must answer at once.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lark import config as configuration

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


def start(hydra_main: Callable[[], Any], job: Callable[..., Any]) -> None:
    """Run the command line; errors a user can act on are one sentence and exit code 1, unless HYDRA_FULL_ERROR=1.

    job: `job(config, folder, group=...)`, what a further rank that Lightning launched does at once.
    """
    child = os.environ.get("LARK_RUN") if int(os.environ.get("LOCAL_RANK", "0")) > 0 else None
    check_flags(sys.argv[1:])
    os.environ.setdefault("TQDM_DISABLE", "1")  # of libraries; ours say themselves where they are shown
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing; what is printed is decided here
    try:
        sys.argv = configuration.resolve_config_path(sys.argv)
        os.environ[configuration.SWEEP_VARIABLE] = configuration.hash_command(sys.argv)
        _join(Path(child), job) if child else hydra_main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the job has begun; then lark.common.signals answers
        print("lark: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output (head) has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Exception as error:  # Hydra's: jobs answer for themselves
        sentence = configuration.to_sentence(error)
        if sentence is None or (FULL_ERROR and not child):  # a child inherits what was set above
            raise
        if isinstance(error, OSError) and not isinstance(error, HydraException) and not child:
            sentence += "; set paths.logs (or hydra.run.dir) to a folder you may write to"
        sys.exit(f"lark: {sentence}")
    finally:
        os.environ.pop(configuration.SWEEP_VARIABLE, None)


def check_flags(words: list[str]) -> None:
    """Exit with a sentence where a setting is written as an option: argparse would answer with a page of usage."""
    for flag in get_args_parser().parse_known_args(words)[1]:
        if flag.startswith("-"):
            name, _, value = flag.lstrip("-").partition("=")
            value = value or "".join(words[words.index(flag) + 1 :][:1]) or "<value>"
            sys.exit(f"lark: {flag} is not an option; settings are name=value: {name}={value}")


def write_replay(config: DictConfig, folder: Path) -> None:
    """Write replay.yaml: every group composed, so that nothing has to be chosen again; what depends on `seed`, `budget`
    or `paths.logs` still does, so that these can be overridden.
    """
    from lark.common.cache import write_text

    resolved = OmegaConf.to_container(config, resolve=False)
    hydra_block = {
        "run": {"dir": f"{folder.parent}/{folder.name.partition('-replay-')[0]}-replay-${{now:%Y-%m-%d_%H-%M-%S}}"},
        "job": {"name": "lark", "chdir": False},
        "output_subdir": ".hydra",
    }
    defaults = ["_self_"]
    text = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, "hydra": hydra_block, **dict(resolved)}))  # type: ignore[arg-type]
    write_text(folder / "replay.yaml", text)


def _join(folder: Path, job: Callable[..., Any]) -> None:
    """Do, as a further rank, the same job from its resolved configuration, no Hydra."""
    from lark.common.signals import TerminatedError

    config = OmegaConf.load(folder / "replay.yaml")
    assert isinstance(config, DictConfig)
    for key in ("hydra", "defaults"):
        config.pop(key, None)
    try:
        job(config, folder, group=folder.name)
    except TerminatedError:  # rank 0 answers for all; Lightning would kill it if this one failed first
        sys.exit(0)

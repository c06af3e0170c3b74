"""python -m lark.run: one paired comparison. Compose, plan, score and select, train and evaluate the arms, report.

torch, lightning and transformers are imported only after Hydra has composed the configuration.
"""

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lark import config as configuration

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""What a user can act on: one sentence, no traceback. Anything else is a defect of ours and shows where."""

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"

configuration.register_resolvers()


@hydra.main(version_base="1.3", config_path=str(configuration.folder()), config_name="config")
def hydra_main(config: DictConfig) -> float:
    """One job. In a multirun a failure is recorded and the sweep goes on; its end prints it and exits 1."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        configuration.check(config)
        write_replay(config, folder)
        return job(config, folder, group=folder.parent.name if sweep else folder.name)
    except Exception as error:  # whatever a job fails of, it is recorded and the sweep goes on
        record_failure(folder, error)
        known = isinstance(error, USER_ERRORS) and not FULL_ERROR
        if not sweep:
            if known:
                sys.exit(f"lark: {configuration.sentence(error)}")  # raised, Hydra would print the command line again
            raise
        if not known:
            traceback.print_exc()
        print(f"lark: {configuration.sentence(error)}", file=sys.stderr)
        return float("nan")


def write_replay(config: DictConfig, folder: Path) -> None:
    """replay.yaml: every group composed, so that nothing has to be chosen again; what depends on `seed`, `budget` or
    `paths.logs` still does, so that these can be overridden.
    """
    from lark.cache import write_text

    resolved = OmegaConf.to_container(config, resolve=False)
    hydra_block = {
        "run": {"dir": f"{folder.parent}/{folder.name}-replay"},
        "job": {"name": "lark", "chdir": False},
        "output_subdir": ".hydra",
    }
    defaults = ["_self_"]
    text = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, "hydra": hydra_block, **dict(resolved)}))  # type: ignore[arg-type]
    write_text(folder / "replay.yaml", text)


def record_failure(folder: Path, error: Exception) -> None:
    from lark.cache import write_json

    text = configuration.sentence(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
    write_json(folder / "summary.json", {"status": "failed", "error": text})


def job(config: DictConfig, folder: Path, *, group: str) -> float:
    from lark.experiment import run  # torch and its friends: seconds
    from lark.termination import terminable

    configuration.check_types(config)
    with terminable():
        return run(config, folder, group=group)


def child_main(folder: Path) -> None:
    """A further rank that Lightning launched: the same job from its resolved configuration, no Hydra."""
    resolved = OmegaConf.load(folder / "replay.yaml")
    assert isinstance(resolved, DictConfig)
    for key in ("hydra", "defaults"):
        resolved.pop(key, None)
    from lark.termination import TerminatedError

    try:
        job(resolved, folder, group=folder.name)
    except TerminatedError:  # rank 0 answers for all; Lightning would kill it if this one failed first
        sys.exit(0)


def main() -> None:
    """Errors a user can act on are one sentence and exit code 1; HYDRA_FULL_ERROR=1 shows the traceback."""
    child = os.environ.get("LARK_RUN") if int(os.environ.get("LOCAL_RANK", "0")) > 0 else None
    sys.argv = configuration.absolute_config_path(sys.argv)
    os.environ[configuration.SWEEP_VARIABLE] = configuration.sweep_name(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing; what is printed is decided here
    try:
        child_main(Path(child)) if child else hydra_main()
    except USER_ERRORS as error:  # Hydra's: jobs answer for themselves
        if FULL_ERROR and not child:  # a child inherits what was set above
            raise
        if isinstance(error, OSError) and not isinstance(error, HydraException) and not child:
            remedy = "set paths.logs (or hydra.run.dir) to a folder you may write to"
            sys.exit(f"lark: {error.filename} cannot be written ({error.strerror}); {remedy}")
        sys.exit(f"lark: {configuration.sentence(error)}")
    finally:
        os.environ.pop(configuration.SWEEP_VARIABLE, None)


if __name__ == "__main__":
    main()

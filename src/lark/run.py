"""python -m lark.run: one paired comparison. Compose, plan, score and select, train and evaluate the arms, report.

torch, lightning and transformers are imported only after Hydra has composed the configuration.
"""

import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lark import config as configuration
from lark.command import FULL_ERROR, start, write_replay
from lark.common.cache import check_run_folder
from lark.common.errors import LarkError

configuration.register_resolvers()


@hydra.main(version_base="1.3", config_path=str(configuration.find_conf()), config_name="config")
def hydra_main(config: DictConfig) -> float:
    """One job. In a multirun a failure is recorded and the sweep goes on; its end prints it and exits 1."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        check_run_folder(folder)
    except LarkError as error:  # nothing is written there, not even that it failed
        sys.exit(f"lark: {error}")
    try:
        configuration.check_config(config)
        write_replay(config, folder)
        return job(config, folder, group=folder.parent.name if sweep else folder.name)
    except Exception as error:  # whatever a job fails of, it is recorded and the sweep goes on
        sentence = configuration.to_sentence(error)
        record_failure(folder, sentence or f"{type(error).__name__}: {error}")
        shows_traceback = sentence is None or FULL_ERROR
        if not sweep:
            if shows_traceback:
                raise
            sys.exit(f"lark: {sentence}")  # raised, Hydra would print the command line again
        if shows_traceback:
            traceback.print_exc()
        print(f"lark: {sentence or error}", file=sys.stderr)
        return float("nan")


def record_failure(folder: Path, sentence: str) -> None:
    from lark.common.cache import write_json

    write_json(folder / "summary.json", {"status": "failed", "error": sentence})


def job(config: DictConfig, folder: Path, *, group: str) -> float:
    from lark.common.signals import handle_signals
    from lark.experiment.experiment import run  # torch and its friends: seconds

    configuration.check_types(config)
    with handle_signals():
        return run(config, folder, group=group)


def main() -> None:
    """Errors a user can act on are one sentence and exit code 1; HYDRA_FULL_ERROR=1 shows the traceback."""
    start(hydra_main, job)


if __name__ == "__main__":
    main()

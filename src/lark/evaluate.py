"""python -m lark.evaluate: ask any student the problems of a task's evaluation sets.

torch, lightning and transformers are imported only after Hydra has composed the configuration.
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lark import config as configuration
from lark.command import FULL_ERROR, start, write_replay
from lark.common.cache import check_run_folder
from lark.common.errors import LarkError

GROUPS = ("task", "model", "trainer", "logger")
BLOCKS = ("evaluation",)
VALUES = ("seed", "checkpoint", "paths")
MAIN = "evaluate"
"""The name of the configuration; another is that of a replay."""
OF_CHECKPOINT = ("path", "id", "revision", "dtype", "attention")
"""Settings of an arm's student that may be given: where its base is now, and how it is loaded."""

configuration.register_resolvers()


@hydra.main(version_base="1.3", config_path=str(configuration.find_conf()), config_name=MAIN)
def hydra_main(config: DictConfig) -> float:
    """Do one evaluation; returns avg@k on the first set."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        check_run_folder(folder)
        return _evaluate(config, folder, list(HydraConfig.get().overrides.task))
    except Exception as error:
        sentence = configuration.to_sentence(error)
        if FULL_ERROR or sentence is None:
            raise
        sys.exit(f"lark: {sentence}")


def _evaluate(config: DictConfig, folder: Path, overrides: list[str]) -> float:
    with open_dict(config):
        config.pop("sft", None)
    if isinstance(config.task, DictConfig) and OmegaConf.is_missing(config.task, "pool"):
        config.task.pool = "."  # nobody reads it
    check(config)
    if config.checkpoint is not None and HydraConfig.get().job.config_name == MAIN:
        take_checkpoint(config, overrides)
    write_replay(config, folder)
    group = folder.parent.name if HydraConfig.get().mode == RunMode.MULTIRUN else folder.name
    return job(config, folder, group=group)


def check(config: DictConfig) -> None:
    """Check names, groups and types; raises LarkError naming the setting."""
    configuration.check_names(config, groups=GROUPS, others=(*BLOCKS, *VALUES))
    if not isinstance(config.checkpoint, str | None):
        raise LarkError(f"checkpoint={config.checkpoint} is not a folder; set it to one, or to null")
    configuration.check_types(config, (*GROUPS, *BLOCKS))


def take_checkpoint(config: DictConfig, overrides: list[str]) -> None:
    """Put the student that was trained in the arm config.checkpoint in the place of config.model.

    Raises LarkError if it is not a trained arm, or the command line asks for another student.
    """
    from lark.training.arms import read_arm

    arm = Path(config.checkpoint)
    arm = arm.parent if arm.name == "checkpoint" else arm
    if (arm / "adapter_config.json").is_file():
        raise LarkError(f"checkpoint={arm} is an adapter, not an arm; set model.adapter={arm} and the model it is for")
    if (arm / "config.json").is_file():
        raise LarkError(f"checkpoint={arm} is a student, not an arm; set model.path={arm} model.template=own instead")
    student = read_arm(arm, "checkpoint=")["student"]
    for word in overrides:
        name = word.partition("=")[0].lstrip("+")
        if name == "model" or (name.startswith("model.") and name.removeprefix("model.") not in OF_CHECKPOINT):
            raise LarkError(
                f"checkpoint={config.checkpoint} brings its own student; leave {word} out, or the checkpoint (of a "
                f"student's settings it takes model.{', model.'.join(OF_CHECKPOINT)})"
            )
        if name.startswith("model."):
            key = name.removeprefix("model.")
            student |= {"path": None} if key == "id" else {}
            student[key] = config.model[key]
    if student["lora"] is None:  # all its weights are in the checkpoint
        student |= {"path": str((arm / "checkpoint").absolute()), "id": None, "revision": None, "adapter": None}
    config.checkpoint = str(arm.absolute())
    config.model = OmegaConf.create({"_target_": "lark.student.student.Student", **student})


def job(config: DictConfig, folder: Path, *, group: str) -> float:
    from lark.common.signals import handle_signals
    from lark.experiment.student_evaluation import run  # torch and its friends: seconds

    with handle_signals():
        return run(config, folder, group=group)


def main() -> None:
    """Errors a user can act on are one sentence and exit code 1; HYDRA_FULL_ERROR=1 shows the traceback."""
    start(hydra_main, job)


if __name__ == "__main__":
    main()

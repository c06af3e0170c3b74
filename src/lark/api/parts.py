"""Parts of a run, put together for the Python interface: configuration, rule, data module, passes.

Settings are composed from the files of the command line, so that names, defaults and checks are the same.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lark.api.results import Pool
from lark.common.cache import check_writable, hold_lock, is_complete
from lark.common.errors import LarkError
from lark.common.log import logger, open_log
from lark.config import build_part, compose, list_options
from lark.experiment.console import quiet_libraries
from lark.pool.files import store_rows
from lark.scoring.pass_module import ScoringSettings
from lark.scoring.passes import Pass
from lark.scoring.progress import PassProgress
from lark.selection.rule import Rule
from lark.student.student import Student
from lark.student.tokenized_pool import TokenizedPool
from lark.tasks.task import Task
from lark.training.datamodule import TrajectoryDataModule
from lark.training.recipe import Recipe
from lark.training.trainer import TrainerFactory

DEFAULT_MODEL = "qwen"
"""The option of `model=` whose settings a student has that no option names."""


@contextmanager
def open_session() -> Iterator[None]:
    """Show the few lines of a run, unless the logger `lark` has handlers of the user's own; keep libraries quiet."""
    with warnings.catch_warnings(), nullcontext() if logger.handlers else open_log(None):
        quiet_libraries()
        yield


def open_cache(cache: str | Path | None) -> Path:
    folder = cache or os.environ.get("LARK_CACHE") or "~/.cache/lark"
    return check_writable(Path(folder).expanduser(), "cache").absolute()


def name_option(student: Student) -> str:
    """Name the option of `model=` whose recipe the student has."""
    return student.name if student.name in list_options("model") else DEFAULT_MODEL


def compose_run(
    *, seed: int, device: str = "auto", rule: str | Rule | Callable = "lark", model: str = DEFAULT_MODEL, **values: Any
) -> DictConfig:
    """Compose a run's configuration, on one device; values: run-wide settings."""
    is_named = isinstance(rule, str) and ":" not in rule
    config = compose(selector=str(rule) if is_named else "custom", model=model)
    config.trainer.accelerator, config.trainer.devices = device, 1
    for name, value in {"seed": seed, **values}.items():
        config[name] = value
    return config


def make_rule(config: DictConfig, rule: str | Rule | Callable, settings: Mapping[str, Any]) -> Rule:
    """Make the rule of a name, of a function or of `module:function`, with these settings of `selector.`."""
    if isinstance(rule, Rule):
        if settings:
            raise LarkError(f"{', '.join(settings)}=...: a Rule brings its settings; leave them out, or name a rule")
        return rule
    given = dict(settings)
    own_filter = given.pop("filter") if callable(given.get("filter")) else None
    if not isinstance(rule, str):
        given |= {"score": "lark.selection.scores.statistics:Constant", "name": getattr(rule, "__name__", "custom")}
    elif ":" in rule:
        given |= {"score": rule, "name": given.get("name", rule.partition(":")[2])}
    made: Rule = build_part(config, "selector", given)
    made = made if isinstance(rule, str) else replace(made, score=rule)
    return made if own_filter is None else replace(made, filter=own_filter)


def make_data(
    config: DictConfig,
    pool: Pool,
    student: Student,
    selector: Rule,
    baseline: Rule | None = None,
    *,
    probe: ScoringSettings,
    recipe: Recipe | None = None,
    opened: TokenizedPool | None = None,
    needs: tuple[Pass, ...] = (),
) -> TrajectoryDataModule:
    """Make the data module of a run of this pool, student and rules; the pool is announced when it is first opened."""
    trainers = TrainerFactory(config.trainer, pool.cache)

    def make_trainer(label: str) -> Any:
        return trainers.make(callbacks=[PassProgress(label)], precision="32-true", inference_mode=False)

    data = TrajectoryDataModule(
        task=pool.task,
        student=student,
        selector=selector,
        baseline=baseline,
        recipe=recipe or build_part(config, "sft", {}),
        probe=probe,
        seed=config.seed,
        match=config.match,
        needs=needs,
        cache=pool.cache,
        make_trainer=make_trainer,
        precision=trainers.precision,
        opened=opened,
    )
    if opened is None:
        data.prepare_data()
    return data


def run_passes(data: TrajectoryDataModule) -> None:
    for wanted in data.needs:
        folder = data.pass_folder(wanted)
        with hold_lock(folder):
            data.run_pass(wanted, cached=is_complete(folder))


def find_task(problems: Any, cache: Path, settings: dict[str, Any]) -> Task:
    """Find the task whose evaluation sets `problems` are."""
    if isinstance(problems, Pool):
        return replace(problems.task, **settings)
    is_names = isinstance(problems, list) and all(isinstance(one, str) for one in problems)
    if not is_names and not isinstance(problems, Mapping):
        problems = store_rows(problems, cache / "given")
    return build_part(compose(task="jsonl"), "task", {"pool": ".", "eval": problems, **settings})

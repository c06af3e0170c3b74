"""Task `reasoning_gym`: problems of any data set of reasoning-gym, from a seed, for a pool sampled from teachers.

Run as a script with the settings as JSON on its standard input, it writes the files of one task: in a process of its
own, because some data sets of reasoning-gym walk over sets of strings, whose order the hash seed decides.
"""

import difflib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lark.common.cache import build_once, check_writable, identity_hash
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.versions import formula_versions
from lark.pool.files import write_rows
from lark.tasks.task import Task

SEED_STRIDE = 10_000_000
OFFSETS = {"eval": 1_000_000, "harder": 2_000_000, "pool": 3_000_000}
"""Item i of a data set is drawn from seed + i, so sets that far apart share no stream; their problems are compared too.
"""
VARIETY = 20  # items drawn for each that is wanted, at most: problems that came up before are skipped
ANY_ANSWER = "whatever reasoning_gym's verifier accepts"  # the gold of problems with many right answers
EXACT = ("arc_agi", "rearc")  # their verifiers need Python's tuples, which a file does not keep

Item = dict[str, Any]
"""An item of reasoning-gym: question, answer, metadata."""


@dataclass(frozen=True, kw_only=True)
class ReasoningGymTask(Task):
    """Problems of reasoning-gym: for a pool, an evaluation set of the same kind and a harder one."""

    pool: Any = None
    """Trajectories for the problems, sampled from teachers."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `generate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [name for name in inspect.signature(generate).parameters if name != "folder"]
        for name in self.settings:
            if name not in known:
                raise LarkError(f"task.settings.{name} is not a setting of this task; it has {', '.join(known)}")
        if not self.settings.get("tasks"):
            raise LarkError("task.settings.tasks names no data set; set it to some, such as [chain_sum, gsm_symbolic]")

    def prepare_pool(self, cache: Path) -> Any:
        if self.pool is None:
            problems = self._build(cache) / "problems.jsonl"
            raise LarkError(
                "task.pool=null leaves no trajectory, as reasoning_gym has problems only; sample some from teachers "
                f"(python -m lark.sample --problems {problems} --checker reasoning_gym --output pool.jsonl --teacher "
                "...) and set task.pool=pool.jsonl"
            )
        return super().prepare_pool(cache)

    def prepare_evaluation(self, cache: Path) -> dict[str, Path]:
        folder = self._build(cache)
        return {name: path for name in ("eval", "harder") if (path := folder / f"{name}.jsonl").exists()}

    def _build(self, cache: Path) -> Path:
        identity = {"settings": self.settings, **formula_versions("reasoning_gym", libraries=("reasoning-gym",))}
        folder = check_writable(cache, "paths.cache") / "tasks" / f"{self.name}-{identity_hash(identity)}"
        manifest = build_once(folder, identity, lambda folder: _generate_apart(folder, self.settings))
        for note in manifest["notes"]:
            logger.info("%s", note)
        return folder


def _generate_apart(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Call `generate` in a process whose hash seed is 0. Raises LarkError for a setting that cannot be used."""
    done = subprocess.run(
        [sys.executable, "-m", "lark.tasks.reasoning_gym", str(folder)],
        input=json.dumps(settings),
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if done.returncode == 2:
        raise LarkError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"writing {folder} failed:\n{done.stderr}")
    return {"notes": json.loads(done.stdout.splitlines()[-1])}


def generate(
    folder: Path,
    *,
    tasks: str | Iterable[str] | Mapping[str, Mapping[str, Any] | None],
    seed: int = 0,
    problems: int = 100,
    eval_problems: int = 50,
    harder_problems: int = 50,
    harder: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Write problems.jsonl (for a pool), eval.jsonl and harder.jsonl; return what is to be said of them.

    tasks: names of data sets, as a list or as text with commas, or name -> settings of that data set.
    problems, eval_problems, harder_problems: of each task.
    harder: name -> settings of the harder set. Where it says nothing, what the task's curriculum grades goes one level
        beyond the greatest value that the pool has; a task without such a level has no harder set.

    Equal arguments give equal files, but for time_intervals, whose dates are relative to today's.
    Raises LarkError naming the setting.
    """
    chosen = _check_settings(
        tasks, {"problems": problems, "eval_problems": eval_problems, "harder_problems": harder_problems}
    )
    rows: dict[str, list[dict[str, Any]]] = {"problems": [], "eval": [], "harder": []}
    notes: list[str] = []
    for name, config in chosen.items():
        seen: set[str] = set()
        rows["eval"] += _draw_rows(name, config, eval_problems, seed, "eval", seen)
        given = (harder or {}).get(name)
        beyond = dict(_raise_level(name, config) if given is None else given)
        if not beyond:
            notes.append(f"no harder problems of {name}: its curriculum has no level beyond the pool's")
        else:
            try:
                found = _draw_rows(name, config | beyond, harder_problems, seed, "harder", seen)
                rows["harder"] += [row | {"settings": beyond} for row in found]
            except LarkError as error:
                if given is not None:
                    raise
                notes.append(f"no harder problems of {name}: {error}")
        rows["problems"] += _draw_rows(name, config, problems, seed, "pool", seen)
    for name, content in rows.items():
        if content:
            write_rows(folder / f"{name}.jsonl", content, default=_make_plain)
    return notes


def draw_items(
    name: str,
    config: Mapping[str, Any],
    count: int,
    seed: int,
    seen: set[str],
    *,
    setting: str,
    accept: Callable[[Item], bool] = lambda item: True,
) -> Iterator[Item]:
    """Draw `count` accepted items of a data set whose questions are not in `seen`, where they are entered.

    setting: the user's setting that `config` comes from, with its value. Raises LarkError naming it.
    """
    import reasoning_gym  # takes a second to import, and only writing a task needs it

    size = VARIETY * count
    try:
        dataset = reasoning_gym.create_dataset(name, **config, size=size, seed=seed)
    except (TypeError, AssertionError, ValueError) as error:
        raise LarkError(f"{setting} is not what reasoning_gym takes: {error}") from error
    found = 0
    for index in range(size):
        try:
            item = dataset[index]
        except (ValueError, IndexError) as error:
            raise LarkError(f"{setting}: reasoning_gym fails to draw a problem ({error}); set it otherwise") from error
        if item["question"] not in seen and accept(item):
            seen.add(item["question"])
            yield item
            found += 1
            if found == count:
                return
    raise LarkError(
        f"{setting} yields only {found} of {count} distinct problems; ask for fewer problems or for wider settings"
    )


def _check_settings(tasks: Any, counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    from reasoning_gym.factory import DATASETS

    known = sorted(set(DATASETS) - {"composite"})
    tasks = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else tasks
    chosen = {name: dict(tasks[name] or {}) if isinstance(tasks, Mapping) else {} for name in tasks}
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
            raise LarkError(f"task.settings.tasks: reasoning_gym has no {name}; {hint}")
    for setting, count in counts.items():
        if count < 1:
            raise LarkError(f"task.settings.{setting}={count}: at least 1 problem is needed; set it to 1 or more")
    return chosen


def _raise_level(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that go one level of the curriculum beyond those of `config`."""
    from reasoning_gym.coaching.base_curriculum import RangeAttributeDefinition, ScalarAttributeDefinition
    from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum

    if name not in CURRICULA:
        return {}
    base, changes = DATASETS[name][1](**config), {}
    for attribute in create_curriculum(name).attributes.values():
        if isinstance(attribute, RangeAttributeDefinition):
            highest = attribute.upper_field_name
        elif isinstance(attribute, ScalarAttributeDefinition):
            highest = attribute.field_name
        else:
            continue
        value, levels = getattr(base, highest, None), list(attribute.levels)
        numbers = all(isinstance(level, int | float) and not isinstance(level, bool) for level in [value, *levels])
        if not numbers or levels != sorted(levels):
            continue
        assert value is not None
        if beyond := [level for level in levels if level > value]:
            changes[highest] = beyond[0]
            if isinstance(attribute, RangeAttributeDefinition):
                changes[attribute.lower_field_name] = value
    return changes


def _draw_rows(
    name: str, config: dict[str, Any], count: int, seed: int, part: str, seen: set[str]
) -> list[dict[str, Any]]:
    setting = f"task.settings.tasks={{{name}: {config}}}"
    items = draw_items(name, config, count, seed * SEED_STRIDE + OFFSETS[part], seen, setting=setting)
    return [
        {
            "problem_id": f"{name}-{number}",
            "problem": item["question"],
            "answer": ANY_ANSWER if item["answer"] is None else str(item["answer"]),
            "source_dataset": name,
            "metadata": item["metadata"],
            **({"checker": "exact"} if name in EXACT else {}),
        }
        for number, item in enumerate(items)
    ]


def _make_plain(value: Any) -> Any:
    """Make plain JSON of numpy's numbers, sets and dates."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


if __name__ == "__main__":
    try:
        notes = generate(Path(sys.argv[1]), **json.load(sys.stdin))
    except LarkError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(json.dumps(notes))

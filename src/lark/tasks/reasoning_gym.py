"""Task `reasoning_gym`: problems of any data set of reasoning-gym, from a seed, and worked solutions where they exist.

Run as a script with the settings as JSON on its standard input, it writes the files of one task: in a process of its
own, because some data sets of reasoning-gym walk over sets of strings, whose order the hash seed decides.
"""

import difflib
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lark.answers.extract import extract_answer
from lark.common.cache import atomic_write, check_writable, hold_lock, identity_hash, is_complete, read_json, write_json
from lark.common.errors import LarkError
from lark.common.versions import formula_versions
from lark.tasks.gold_steps import WITH_STEPS, Item, solutions
from lark.tasks.task import Say, Task

SEED_STRIDE = 10_000_000
OFFSETS = {"eval": 1_000_000, "harder": 2_000_000, "pool": 3_000_000}
"""Item i of a data set is drawn from seed + i, so sets that far apart share no stream; their problems are compared too.
"""
VARIETY = 20  # items drawn for each that is wanted, at most: problems that came up before are skipped
ANY_ANSWER = "whatever reasoning_gym's verifier accepts"  # the gold of problems with many right answers
EXACT = ("arc_agi", "rearc")  # their verifiers need Python's tuples, which a file does not keep


@dataclass(frozen=True, kw_only=True)
class GymTask(Task):
    """Problems of reasoning-gym: a pool (where solutions exist), an evaluation set of the same kind and a harder one.

    settings: see `generate`.   pool: one of your own in place of the worked solutions; null: those.
    system: also the pool's system turn.
    """

    pool: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [name for name in inspect.signature(generate).parameters if name not in ("folder", "system")]
        for name in self.settings:
            if name not in known:
                raise LarkError(f"task.settings.{name} is no setting of this task; it has {', '.join(known)}")
        if not self.settings.get("tasks"):
            raise LarkError("task.settings.tasks names no data set; set it to some, such as [chain_sum, gsm_symbolic]")

    def sources(self, cache: Path, say: Say = print) -> tuple[Any, dict[str, Path]]:
        folder = self._folder(cache)
        if self.pool is None:
            for line in read_json(folder / "manifest.json")["said"]:
                say(line)
            if not (folder / "pool.jsonl").exists():
                names = list(_names(self.settings["tasks"]))
                raise LarkError(
                    f"task.settings.tasks={names} come without worked solutions, which only "
                    f"{', '.join(WITH_STEPS)} have; sample a pool from teachers of your own (python -m lark.sample, "
                    f"with the problems in {folder / 'problems.jsonl'}) and set task.pool to it"
                )
        return folder / "pool.jsonl" if self.pool is None else self.pool, self.evaluation_files(cache, say)

    def evaluation_files(self, cache: Path, say: Say = print) -> dict[str, Path]:
        folder = self._folder(cache)
        return {name: path for name in ("eval", "harder") if (path := folder / f"{name}.jsonl").exists()}

    def _folder(self, cache: Path) -> Path:
        settings = self.settings | {"system": self.system}
        identity = {
            "settings": settings,
            "reasoning_gym": importlib.metadata.version("reasoning-gym"),
            **formula_versions("reasoning_gym", "arithmetic"),
        }
        folder = check_writable(cache, "paths.cache") / "tasks" / f"{self.name}-{identity_hash(identity)}"
        with hold_lock(folder):
            if not is_complete(folder):
                done = subprocess.run(
                    [sys.executable, "-m", "lark.tasks.reasoning_gym", str(folder)],
                    input=json.dumps(settings),
                    env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
                    capture_output=True,
                    text=True,
                )
                if done.returncode == 2:  # a setting that cannot be
                    raise LarkError(done.stderr.strip().splitlines()[-1])
                if done.returncode:
                    raise RuntimeError(f"writing {folder} failed:\n{done.stderr}")
                write_json(folder / "manifest.json", {"identity": identity, **json.loads(done.stdout.splitlines()[-1])})
        return folder


def generate(
    folder: Path,
    *,
    tasks: str | Iterable[str] | Mapping[str, Mapping[str, Any] | None],
    seed: int = 0,
    problems: int = 100,
    eval_problems: int = 50,
    harder_problems: int = 50,
    harder: Mapping[str, Mapping[str, Any]] | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Write pool.jsonl (if there are solutions), problems.jsonl (those of the pool), eval.jsonl, harder.jsonl.

    tasks: names of data sets, as a list or as text with commas, or name -> settings of that data set.
    problems, eval_problems, harder_problems: of each task.
    harder: name -> settings of the harder set. Where it says nothing, what the task's curriculum grades goes one level
        beyond the greatest value that the pool has; a task without such a level has no harder set.

    Equal arguments give equal files, but for time_intervals, whose dates are relative to today's.
    Returns what the manifest says. Raises LarkError naming the setting.
    """
    import reasoning_gym

    chosen = _checked(tasks, {"problems": problems, "eval_problems": eval_problems, "harder_problems": harder_problems})
    rows: dict[str, list[dict[str, Any]]] = {"pool": [], "problems": [], "eval": [], "harder": []}
    wrong: Counter[str] = Counter()
    notes: list[str] = []
    for name, config in chosen.items():
        seen: set[str] = set()
        for i, item in enumerate(_draw(name, config, eval_problems, seed, "eval", seen)):
            rows["eval"].append(_problem(name, i, item))
        given = (harder or {}).get(name)
        beyond = dict(_harder(name, config) if given is None else given)
        try:
            drawn = list(_draw(name, config | beyond, harder_problems, seed, "harder", seen)) if beyond else []
        except ValueError as error:
            if given is not None:
                raise
            drawn = []
            notes.append(f"no harder problems of {name}: {error}")
        rows["harder"] += [_problem(name, i, item) | {"settings": beyond} for i, item in enumerate(drawn)]
        if not beyond:
            notes.append(f"no harder problems of {name}: its curriculum has no level beyond the pool's")
        verify = reasoning_gym.get_score_answer_fn(name)
        for i, item in enumerate(_draw(name, config, problems, seed, "pool", seen)):
            rows["problems"].append(_problem(name, i, item))
            for row in _candidates(name, i, item, seed, system):
                answer = extract_answer(row["messages"][-1]["content"])
                if answer is not None and verify(answer=answer, entry=item) == 1.0:  # type: ignore[call-arg]
                    rows["pool"].append(row)
                else:
                    wrong[f"{row['teacher']}'s for {name}"] += 1
    for name, content in rows.items():
        if content:
            with atomic_write(folder / f"{name}.jsonl") as temporary:
                text = "".join(json.dumps(row, default=_plain) + "\n" for row in content)
                temporary.write_text(text, encoding="utf-8", newline="\n")
    return {"said": _lines(chosen, rows, wrong, notes), "wrong": dict(wrong), "notes": notes}


def _names(tasks: Any) -> Any:
    return [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else tasks


def _checked(tasks: Any, counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    from reasoning_gym.factory import DATASETS

    known = sorted(set(DATASETS) - {"composite"})
    tasks = _names(tasks)
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


def _draw(name: str, config: dict[str, Any], count: int, seed: int, part: str, seen: set[str]) -> Iterator[Item]:
    """`count` items whose questions are not in `seen`, where they are entered. Raises LarkError."""
    import reasoning_gym

    size = VARIETY * count
    setting = f"task.settings.tasks={{{name}: {config}}}"
    try:
        dataset = reasoning_gym.create_dataset(name, **config, size=size, seed=seed * SEED_STRIDE + OFFSETS[part])
    except (TypeError, AssertionError, ValueError) as error:
        raise LarkError(f"{setting} is not what reasoning_gym takes: {error}") from error
    found = 0
    for index in range(size):
        try:
            item = dataset[index]
        except (ValueError, IndexError) as error:
            raise LarkError(f"{setting}: reasoning_gym fails to draw a problem ({error}); set it otherwise") from error
        if item["question"] not in seen:
            seen.add(item["question"])
            yield item
            found += 1
            if found == count:
                return
    raise LarkError(f"{setting} yields only {found} of {count} distinct problems; ask for fewer, or for wider settings")


def _harder(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Settings one level of the curriculum beyond those of `config`."""
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


def _problem(name: str, number: int, item: Item) -> dict[str, Any]:
    answer = ANY_ANSWER if item["answer"] is None else str(item["answer"])
    return {
        "problem_id": f"{name}-{number}",
        "problem": item["question"],
        "answer": answer,
        "source_dataset": name,
        "metadata": item["metadata"],
        **({"checker": "exact"} if name in EXACT else {}),
    }


def _candidates(name: str, number: int, item: Item, seed: int, system: str | None) -> Iterator[dict[str, Any]]:
    prompt = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": item["question"]}]
    for teacher, text in solutions(name, item, seed):
        yield {
            "problem_id": f"{name}-{number}",
            "candidate_id": teacher,
            "teacher": teacher,
            "messages": [*prompt, {"role": "assistant", "content": text}],
            "answer": str(item["answer"]),
            "correct": True,
            "source_dataset": name,
        }


def _lines(chosen: Iterable[str], rows: dict[str, list[Any]], wrong: Counter[str], notes: list[str]) -> list[str]:
    bare = [name for name in chosen if name not in WITH_STEPS]
    counts = f"{len(rows['problems']):,} problems of {', '.join(chosen)}"
    lines = [f"gold steps  {len(rows['pool']):,} worked solutions to {counts}"]
    if bare:
        lines.append(f"gold steps  none for {', '.join(bare)}: their problems are evaluated, but are not in the pool")
    lines += [f"gold steps  {count:,} of {who} left out, as the verifier refuses them" for who, count in wrong.items()]
    return [*lines, *(f"gold steps  {note}" for note in notes)]


def _plain(value: Any) -> Any:
    """What JSON has no form for: numpy's numbers, sets, dates."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


if __name__ == "__main__":
    try:
        outcome = generate(Path(sys.argv[1]), **json.load(sys.stdin))
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(json.dumps(outcome))

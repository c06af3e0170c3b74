"""Saved samples, checked again by the verifier as it is now: nothing is generated.

metrics.json and the samples' files are written anew; what metrics.json said before is kept in metrics-before.json.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lark.answers.checker import Checker
from lark.answers.extract import find_boxed
from lark.common.cache import hold_lock, read_json, write_json
from lark.common.errors import LarkError
from lark.evaluation.aggregate import figures_of, write_figures
from lark.evaluation.arm_evaluation import verdict_versions
from lark.evaluation.evaluate import check_records, write_rows
from lark.evaluation.evaluation_table import print_figures
from lark.evaluation.samples import read_samples
from lark.tasks.problems import read_problems
from lark.tasks.task import Task

SHOWN = 20
"""Changed verdicts that are printed, of each set."""
_FIELDS = {"problem_id", "sample", "text", "num_tokens", "stop", "truncated"}
Record = dict[str, Any]


def recheck(
    path: Path, task: Task, *, told: Collection[str], cache: Path, say: Callable[[str], None] = print
) -> dict[Path, dict[str, Any]]:
    """Check the samples in `path` again and print the tables; what metrics.json says, by folder.

    Problems and checker are those of the evaluation (problems-<set>.jsonl, evaluation.json) where they are beside the
    samples, else the task's.

    Args:
        path: a file of samples, or a folder with some in it or in its folders: an evaluation's, an arm's, a run's.
        told: settings given by the user: task.checker and task.pattern then take the place of the evaluation's.

    Raises:
        LarkError: there are no samples, they are no samples of lark's, or their problems are not known.
    """
    results = {}
    for folder, names in _sample_sets(path).items():
        with hold_lock(folder):
            results[folder] = _recheck_folder(folder, names, task, told=told, cache=cache, say=say)
    return results


def _sample_sets(path: Path) -> dict[Path, list[str]]:
    """Names of evaluation sets whose samples there are, by folder."""
    if not path.exists():
        raise LarkError(f"recheck={path} does not exist; set it to a folder of an evaluation, or to a file of samples")
    within = [path.parent] if path.is_file() else [path, *sorted(one for one in path.iterdir() if one.is_dir())]
    found = {folder.resolve(): sorted(folder.glob("samples-*.jsonl")) for folder in within}
    if path.is_file() and path.resolve() not in {file.resolve() for files in found.values() for file in files}:
        raise LarkError(f"recheck={path} is no file called samples-<set>.jsonl; set it to one, or to a folder of them")
    names = {folder: [file.stem.removeprefix("samples-") for file in files] for folder, files in found.items() if files}
    if not names:
        raise LarkError(f"recheck={path} holds no samples-<set>.jsonl; set it to a folder of a finished evaluation")
    return names


def _recheck_folder(
    folder: Path,
    names: Sequence[str],
    task: Task,
    *,
    told: Collection[str],
    cache: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    record = _read(folder / "evaluation.json")
    asked = record.get("task", {})
    before = _read(folder / "metrics.json")
    kind = task.checker if "task.checker" in told else asked.get("checker", task.checker)
    pattern = task.pattern if "task.pattern" in told else asked.get("pattern", task.pattern)
    known = list(before.get("sets", {}))
    names = sorted(names, key=lambda name: known.index(name) if name in known else len(known))
    say(f"recheck     {folder}: {', '.join(names)}; checked by: {kind}" + (f", {pattern}" if pattern else ""))
    figures, checked = {}, {}
    with Checker(kind, pattern=pattern) as checker:
        for name in names:
            saved = _saved(folder / f"samples-{name}.jsonl")
            problems = _problems(folder, name, saved, task, cache)
            fresh = [record | {"boxed": find_boxed(record["text"]) is not None} for record in saved]
            checked[name] = check_records(fresh, problems, checker)
            _say_changes(name, saved, checked[name], problems, say)
            count = len(saved) // len(problems)
            pass_at = before.get("identity", {}).get("sampling", {}).get("pass_at", [1, count])
            figures[name] = figures_of(checked[name], problems, pass_at=pass_at, kind=kind)
    for name, records in checked.items():
        write_rows(folder / f"samples-{name}.jsonl", records)
    if record:
        write_json(folder / "evaluation.json", record | {"task": asked | {"checker": kind, "pattern": pattern}})
    if before:
        write_json(folder / "metrics-before.json", before)
    write_figures(folder, _identity(before.get("identity", {}), kind, pattern), figures)
    after = read_json(folder / "metrics.json")
    print_figures(folder.name, after)
    say(f"metrics     {folder / 'metrics.json'}" + ("; before: metrics-before.json" if before else ""))
    return after


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _identity(before: Mapping[str, Any], kind: str, pattern: str | None) -> dict[str, Any]:
    """That of the metrics, with the checks that they come from now."""
    if not before:
        return {}
    versions = before["versions"] | verdict_versions()
    return {**before, "task": [kind, pattern, *before["task"][2:]], "versions": versions}


def _saved(path: Path) -> list[Record]:
    """The samples of a file. Raises LarkError unless there are as many of each problem."""
    records = read_samples(path)
    if not records or (missing := sorted(_FIELDS - set.intersection(*(set(record) for record in records)))):
        raise LarkError(f"{path} holds no samples of lark's" + (f" (no {missing[0]})" if records else ""))
    counts = Counter(record["problem_id"] for record in records)
    if len(set(counts.values())) > 1:
        fewest, most = min(counts.values()), max(counts.values())
        raise LarkError(f"{path} has {fewest} samples of some problems and {most} of others; complete it first")
    return records


def _problems(folder: Path, name: str, records: Sequence[Record], task: Task, cache: Path) -> list[dict[str, Any]]:
    """The problems of the samples."""
    file = folder / f"problems-{name}.jsonl"
    if not file.is_file():
        files = task.prepare_evaluation(cache)
        if name not in files:
            raise LarkError(
                f"{file} is missing, and task={task.name} has no evaluation set {name} "
                f"(it has {', '.join(files) or 'none'}); set task.eval={{{name}: <file>}}"
            )
        file = files[name]
    sampled = {record["problem_id"] for record in records}
    problems = [problem for problem in read_problems(file) if problem["problem_id"] in sampled]
    if missing := sorted(sampled - {problem["problem_id"] for problem in problems}):
        raise LarkError(
            f"{file} lacks {len(missing)} of the {len(sampled)} problems that were sampled ({missing[0]} for one); "
            f"set task.eval={{{name}: <file>}} to the file they come from"
        )
    return problems


def _say_changes(
    name: str,
    before: Sequence[Record],
    after: Sequence[Record],
    problems: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> None:
    """How many verdicts have changed, and the first of them."""
    old = {(record["problem_id"], record["sample"]): record for record in before}
    pairs = [(old[record["problem_id"], record["sample"]], record) for record in after]
    changed = [(was, now) for was, now in pairs if was.get("correct") != now["correct"]]
    right = sum(now["correct"] for _, now in changed)
    read_otherwise = sum(was.get("answer") != now["answer"] for was, now in pairs)
    say(
        f"changed     {name}: {len(changed):,} of {len(after):,} verdicts ({right:,} to right, "
        f"{len(changed) - right:,} to wrong); {read_otherwise:,} answers are read otherwise"
    )
    golds = {problem["problem_id"]: problem["answer"] for problem in problems}
    for was, now in changed[:SHOWN]:
        verdict = "right" if now["correct"] else "cut off" if now["timed_out"] else "wrong"
        say(
            f"            {now['problem_id']} sample {now['sample']}: {_short(was.get('answer'))} was "
            f"{'right' if was.get('correct') else 'wrong'}, {_short(now['answer'])} is {verdict} "
            f"(right answer {_short(golds[now['problem_id']])})"
        )
    if len(changed) > SHOWN:
        say(f"            ... and {len(changed) - SHOWN:,} more")


def _short(answer: str | None, length: int = 40) -> str:
    """An answer on one line."""
    if answer is None:
        return "no answer"
    line = " ".join(answer.split())
    return repr(line if len(line) <= length else f"{line[: length - 3]}...")

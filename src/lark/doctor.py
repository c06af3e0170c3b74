"""The command `python -m lark.doctor`: what a pool holds, how it was understood, and what to set.

python -m lark.doctor pool.jsonl                             reads and checks it
python -m lark.doctor pool.jsonl model=qwen eval=eval.jsonl  counts the student's tokens, looks for evaluation problems
python -m lark.doctor                                        lists rules, students and tasks
"""

import argparse
import re
import shlex
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lark.common.cache import read_json
from lark.common.errors import LarkError
from lark.config import build_part, compose, find_conf, list_options, to_sentence

if TYPE_CHECKING:
    from lark.student.checked_pool import CheckedPool
    from lark.student.tokenized_pool import TokenizedPool

USAGE = "python -m lark.doctor [pool] [model=<name or folder>] [eval=<file>] [task.<setting>=...] [cache=<folder>]"


def build_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m lark.doctor", usage=USAGE, description=__doc__, formatter_class=form
    )
    parser.add_argument("words", nargs="*", help="a pool, and settings")
    return parser


def main() -> None:
    words = build_parser().parse_args().words
    try:
        pools = [word for word in words if "=" not in word or Path(word).exists()]
        settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word for word in words if word not in pools]))
        assert isinstance(settings, dict)
        if len(pools) > 1 or settings.keys() - {"model", "eval", "task", "cache"} or (settings and not pools):
            raise LarkError(f"{' '.join(words)} is not what the doctor takes: {USAGE}")
        if pools:
            examine(pools[0], settings)
        else:
            print("\n\n".join(list_choices(group) for group in ("selector", "model", "task")))
    except Exception as error:
        if (sentence := to_sentence(error)) is None:
            raise
        sys.exit(f"lark: {sentence}")


def list_choices(group: str) -> str:
    """List what a group of settings can be, each with the sentence that its file begins with."""
    lines = [{"selector": "Rules", "model": "Students", "task": "Tasks"}[group] + f" ({group}=...)"]
    for path in sorted((find_conf() / group).glob("*.yaml")):
        comments = re.findall(r"^# (?!@)(.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        lines.append(f"  {path.stem:<24}{comments[0] if comments else ''}")
    return "\n".join(lines)


def examine(path: str, settings: dict[str, Any]) -> None:
    """Print what the doctor finds in a pool. Raises LarkError where it cannot be read at all."""
    from lark.api.functions import load_student
    from lark.api.parts import open_cache, open_session
    from lark.student.checked_pool import CheckedPool
    from lark.student.tokenized_pool import TokenizedPool

    given = {"pool": path, "eval": settings.get("eval"), "on_error": "drop", **settings.get("task", {})}
    with open_session():
        task = build_part(compose(task="jsonl"), "task", given)
        cache = open_cache(settings.get("cache", "logs/cache"))
        print_line("reading", path)
        if (model := settings.get("model")) is None:
            pool: CheckedPool = CheckedPool(task, cache=cache)
        else:
            pool = TokenizedPool(task, load_student(model).load_chat(), cache=cache)
    advice = [*describe_rows(pool), *describe_places(pool)]
    if isinstance(pool, TokenizedPool):
        advice += describe_lengths(pool, str(model))
    else:
        print_line("lengths", "add model=<name or folder> to count its tokens; no weights are loaded")
    chosen = [f"task.pool={quote_value(path)}", *name_student(model)]
    own = [word.replace("eval=", "task.eval=", 1) for word in sys.argv[1:] if word.startswith(("eval=", "task."))]
    advised = {word.partition("=")[0] for word in advice}
    chosen += [word for word in own if word.partition("=")[0] not in advised]
    command = ["python", "-m", "lark.run", "task=jsonl", *chosen, *advice, "stop_after=selection"]
    print(f"\nNext:\n  {shlex.join(command)}")


def name_student(model: Any) -> list[str]:
    """Return the settings of a run that name this student."""
    if model is None or str(model) in list_options("model"):
        return [] if model is None else [f"model={model}"]
    kind = "path" if Path(str(model)).exists() else "id"
    return ["model=smollm2", f"model.{kind}={quote_value(str(model))}"]


def quote_value(value: str) -> str:
    """Return a setting's value as Hydra reads it back unchanged."""
    return value if re.fullmatch(r"[\w./~-]+", value) else '"' + value.replace('"', '\\"') + '"'


def describe_rows(pool: "CheckedPool") -> list[str]:
    """Print what was read, and what there is to choose among; return the settings that follow from it."""
    from lark.pool.pool import read_text_column
    from lark.pool.rows import Fault, describe_faults

    sizes = Counter(pool.problem_id)
    teachers = Counter(name or "no name" for name in read_text_column(pool.rows, "teacher"))
    shares = ", ".join(f"{name} {count / len(pool.rows):.0%}" for name, count in teachers.most_common(6))
    more = f" and {len(teachers) - 6} more" if len(teachers) > 6 else ""
    print_line("pool", f"{len(pool.rows):,} trajectories of {len(sizes):,} problems")
    print_line("teachers", shares + more)
    lost = {reason: count for reason, count in pool.dropped.items() if count and reason != "overlong"}
    if lost:
        print_line("! faults", ", ".join(f"{count:,} {reason}" for reason, count in lost.items()))
        importer = pool.task.plan_import()
        made = read_json(importer.build(pool.cache) / "manifest.json")["faults"] if importer else []
        for line in describe_faults([*(Fault(**fault) for fault in made), *pool.faults])[:5]:
            print_line("", line)
    alone = sum(size == 1 for size in sizes.values())
    least, most, budget = min(sizes.values()), max(sizes.values()), compose().budget
    spread = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    print_line("choice", f"{spread} candidates a problem; {alone:,} problems have one, so nothing is chosen there")
    right, wrong = int((pool.correct == 1).sum()), int((pool.correct == 0).sum())
    print_line(
        "verified",
        f"{right / len(pool.rows):.0%} right, {wrong / len(pool.rows):.0%} wrong, "
        f"{1 - (right + wrong) / len(pool.rows):.0%} unknown; {pool.verdicts['filled']:,} checked now against answers",
    )
    advice = ["task.on_error=drop"] if lost else []
    return [*advice, "budget=1"] if 1 < most <= budget else advice


def describe_places(pool: "CheckedPool") -> list[str]:
    """Print what stands in two places; return the settings that follow from it."""
    copies = pool.count_copies()
    asked_twice = sum(map(len, pool.repeated)) - len(pool.repeated)
    print_line(
        "duplicates",
        f"{copies:,} trajectories repeat another of their problem; {asked_twice:,} problems have a second id",
    )
    found = "; ".join(f"{one['in_pool']:,} of {one['problems']:,} in {name}" for name, one in pool.overlaps.items())
    print_line("overlap", f"evaluation problems in the pool: {found}" if found else "add eval=<file> to look for it")
    return ["task.overlap=drop"] if pool.in_sets else []


def describe_lengths(pool: "TokenizedPool", model: str) -> list[str]:
    """Print lengths in tokens; return the settings that follow from them."""
    import numpy as np

    middle, high, longest = np.quantile(pool.length, [0.5, 0.95, 1]).astype(int).tolist()
    limit, over = pool.task.max_length, int((pool.length > pool.task.max_length).sum())
    print_line("lengths", f"in tokens of {model}: median {middle:,}, 95% up to {high:,}, longest {longest:,}")
    if not over:
        return []
    print_line("! overlong", f"{over:,} rows have more than task.max_length={limit:,} tokens and are dropped")
    return [f"task.max_length={2 ** (longest - 1).bit_length()}"]


def print_line(label: str, text: str) -> None:
    print(textwrap.fill(text, 110, initial_indent=f"{label:<11}", subsequent_indent=" " * 11, break_long_words=False))


if __name__ == "__main__":
    main()

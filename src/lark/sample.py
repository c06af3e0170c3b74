"""`python -m lark.sample`: a pool of your own, written by teachers of your own.

Teachers are models that run here (transformers or vLLM) and OpenAI-compatible endpoints. What was sampled is kept: the
same command goes on where it stopped, and with more problems, samples or teachers asks only for what is new.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lark.common.errors import LarkError
from lark.common.log import open_log
from lark.comparison.printing import make_console, make_table
from lark.comparison.tables import format_number
from lark.teachers.teacher import ENGINES, read_teachers

_COMMON = (
    "samples",
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
    "concurrency",
    "timeout",
    "tries",
    "engine",
    "batch_size",
)

_FLAGS = {
    "task.checker": "--checker",
    "task.pattern": "--pattern",
    "evaluation.engine": "--engine",
    "evaluation.vllm_python": "the environment variable LARK_VLLM_PYTHON",
    "evaluation.batch_size": "--batch-size",
    "task.max_new_tokens": "--max-new-tokens",
}
"""What settings are called here that errors call by a run's name."""


def sample(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes the pool the command line asks for, prints the table and returns the manifest."""
    common = {name: getattr(arguments, name) for name in _COMMON}
    teachers = read_teachers(arguments.teacher, arguments.teachers, arguments.key, common)
    for teacher in teachers:
        teacher.read_key()  # before anything is loaded
    if arguments.limit is not None and arguments.limit < 1:
        raise LarkError(f"--limit {arguments.limit} leaves no problem; set it to 1 or more, or leave it out")

    from lark.answers.checker import Checker
    from lark.tasks.problems import read_problems
    from lark.teachers.make_pool import make_pool

    problems = read_problems(arguments.problems, limit=arguments.limit, setting="--problems")
    with Checker(arguments.checker, pattern=arguments.pattern) as checker:
        manifest = make_pool(
            problems,
            teachers,
            arguments.output,
            checker=checker,
            system=arguments.system,
            keep=arguments.keep,
            thinking=arguments.thinking,
            again=arguments.again,
            source=arguments.problems,
        )
    print_table(manifest)
    print(f"pool        {arguments.output}: {manifest['rows']:,} rows of {len(problems):,} problems")
    return manifest


def print_table(manifest: dict[str, Any]) -> None:
    """Every teacher's trajectories, and what they took: tokens in all, seconds and speed of this time."""
    teachers = manifest["teachers"]
    cells = {name: _cells(teacher) for name, teacher in teachers.items()}
    table = make_table("trajectories")
    table.add_column("teacher", no_wrap=True)
    shown = [column for column in next(iter(cells.values())) if any(row[column] for row in cells.values())]
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in cells.items():
        table.add_row(name, *(row[column] for column in shown))
    console = make_console()
    console.print(table)
    for name, teacher in teachers.items():
        if failures := teacher["figures"]["failures"]:
            reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(failures.items()))
            console.print(f"{name}, without a trajectory: {reasons}", soft_wrap=True)
        if timeouts := teacher["figures"]["timeouts"]:
            console.print(f"{name}: {timeouts} answers took too long to check and count as wrong", soft_wrap=True)


def _cells(teacher: dict[str, Any]) -> dict[str, str]:
    """A teacher's row of the table; a column in which all cells are empty is not shown."""
    figures, now = teacher["figures"], teacher["this_command"]
    count = figures["trajectories"]
    counted = count - figures["without_tokens"]
    is_endpoint = teacher["settings"]["url"] is not None
    seconds = now["seconds"]

    def share(figure: str) -> str:
        return format_number(figures[figure] / count, "{:.1%}") if count else ""

    return {
        "trajec-\ntories": f"{count:,}",
        "rows": f"{figures['rows']:,}" if figures["rows"] < count else "",
        "correct": share("correct"),
        "boxed": share("boxed"),
        "cut\noff": share("truncated"),
        "none": f"{sum(figures['failures'].values()):,}" if figures["failures"] else "",
        "mean\ntokens": f"{figures['trajectory_tokens'] / counted:,.0f}" if counted else "",
        "prompt\ntokens": f"{figures['prompt_tokens']:,}" if is_endpoint else "",
        "sampled\ntokens": f"{figures['tokens']:,}",
        "seconds": f"{seconds:,.1f}" if seconds else "",
        "tokens\n/s": f"{now['tokens'] / seconds:,.0f}" if seconds else "",
    }


def build_parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").partition("\n\n")
    command = argparse.ArgumentParser(prog="python -m lark.sample", description=about[0] + " " + about[2])
    add = command.add_argument
    add("--problems", type=Path, required=True, help="file of problems with answers, as for task.eval")
    add("--output", type=Path, required=True, help="the pool, a .jsonl file")
    add(
        "--teacher",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="a hub id (id@revision pins it), folder, .gguf file, or URL#MODEL of an endpoint; repeat for more",
    )
    add("--teachers", type=Path, metavar="FILE", help="YAML file of teachers with settings of their own")
    add(
        "--key",
        action="append",
        default=[],
        metavar="NAME=VARIABLE",
        help="the environment variable that holds a teacher's key",
    )
    add("--samples", type=int, default=1, help="trajectories of each teacher to each problem (1)")
    add("--temperature", type=float, default=0.6, help="0 = most likely token (0.6)")
    add("--top-p", type=float, default=0.95, help="share of probability that is drawn from (0.95)")
    add("--max-new-tokens", type=int, default=4096, help="after which a trajectory is cut off (4096)")
    add("--seed", type=int, default=0, help="of the sampling noise (0)")
    add("--system", help="system turn before each problem, asked with and stored")
    add("--concurrency", type=int, default=8, help="requests under way at each endpoint (8)")
    add("--timeout", type=float, default=900.0, help="seconds a request may take (900)")
    add("--tries", type=int, default=6, help="how often a request is made before it is given up (6)")
    add("--engine", choices=ENGINES, default="transformers", help="what runs models that are here")
    add("--batch-size", type=int, help="trajectories at a time under transformers (as many as fit into memory)")
    add("--checker", default="math", help="how answers are checked, as task.checker (math)")
    add("--pattern", help="regular expression whose group 1 is the answer, where it is not boxed")
    add(
        "--keep",
        choices=("all", "ended", "correct"),
        default="ended",
        help="trajectories that become rows (ended: a thought that was cut off must not be taught an end)",
    )
    add("--thinking", choices=("keep", "drop"), default="keep", help="reasoning that endpoints return apart (keep)")
    add("--limit", type=int, help="the first so many problems only")
    add("--again", action="store_true", help="ask again where a teacher gave nothing (filtered, empty, too long)")
    return command


def main(words: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(words)
    try:
        with open_log(None):
            sample(arguments)
    except (ValueError, OSError) as error:
        text = str(error)
        for setting, flag in _FLAGS.items():
            text = text.replace(setting, flag)
        sys.exit(f"lark: {text}")
    except KeyboardInterrupt:
        sys.exit("lark: interrupted; the same command goes on from what is there")


if __name__ == "__main__":
    main()

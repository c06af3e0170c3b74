"""The command `python -m lark.benchmarks`: list benchmarks, or prepare some ahead of a run.

python -m lark.benchmarks                           lists them, with their prompts
python -m lark.benchmarks math500 gsm8k=test.jsonl  prepares them, from the hub or a local file, ahead of a run
python -m lark.benchmarks math500=test.jsonl --show prints the exact prompt of the first problem as well
"""

import argparse
import json
import sys
from pathlib import Path

from lark.common.cache import check_writable, read_json
from lark.common.errors import LarkError
from lark.tasks.benchmarks import BENCHMARKS, PROMPTS, describe_benchmark, prepare_benchmark


def build_parser() -> argparse.ArgumentParser:
    about = "List the benchmarks, or prepare some of them ahead of a run, from the hub or from local files."
    parser = argparse.ArgumentParser(prog="python -m lark.benchmarks", description=about)
    parser.add_argument("sets", nargs="*", metavar="NAME[@PROMPT][=FILE]", help="benchmarks to prepare")
    parser.add_argument("--cache", type=Path, default=Path("logs/cache"), help="paths.cache of the runs (logs/cache)")
    parser.add_argument("--show", action="store_true", help="print the prompt of each one's first problem")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        for item in arguments.sets:
            name, _, source = item.partition("=")
            path = prepare_benchmark(name, source or None, check_writable(arguments.cache, "--cache"))
            print(f"benchmark  {describe_benchmark(read_json(path.with_name('manifest.json')), source or None)}")
            print(f"           {path}")
            if arguments.show:
                print(show_first_prompt(path))
        if not arguments.sets:
            print(list_benchmarks())
    except (LarkError, OSError) as error:
        sys.exit(f"lark: {error}")


def list_benchmarks() -> str:
    """List all benchmarks and all prompts."""
    lines = [f"{'name':<9}{'problems':>8}  {'checker':<9}{'prompt':<10}{'from the hub'}"]
    for name, benchmark in BENCHMARKS.items():
        place = f"{benchmark.hub}@{benchmark.revision}{' (gated)' if benchmark.gated else ''}"
        lines.append(f"{name:<9}{benchmark.problems:>8,}  {benchmark.checker:<9}{benchmark.prompt:<10}{place}")
    for prompt in PROMPTS.values():
        lines += ["", f"prompt {prompt.name} (sha256 {prompt.hash[:12]})"]
        lines += [f"  system: {prompt.system}"] if prompt.system is not None else []
        lines += ["  user:   " + prompt.user.replace("\n", "\n          ")]
    return "\n".join(lines)


def show_first_prompt(path: Path) -> str:
    """Return the turns of a prepared file's first problem, and its gold answer."""
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    turns = [f"--- {turn['role']}\n{turn['content']}" for turn in row["messages"]]
    return "\n".join([f"problem {row['problem_id']}", *turns, f"--- gold ({row['checker']})\n{row['answer']}"])


if __name__ == "__main__":
    main()

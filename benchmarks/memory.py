"""Does memory stay flat as the pool grows? Peaks of reading, tokenising, scoring and selecting at 1x and 10x the rows.

    python benchmarks/memory.py [--problems 800] [--candidates 5] [--words 12] [--times 10] [--format parquet]
    python benchmarks/memory.py --problems 4000 --no-scoring

A synthetic pool is streamed to a temporary folder of shards, once with `--problems` problems and once with `--times` as
many. A fresh process each reads it, fills in the verdicts, tokenises, scores with the embedded student, selects by
LARK and by chance (by length and by chance without scoring, which lets pools be larger in the same time), and writes
table and selection, all after doing so with a pool of 100 rows. This one samples its memory from /proc (Linux) every
few milliseconds. Anonymous memory is what the process needs for itself; resident memory also counts pages of
memory-mapped files, which the system takes back when they are wanted elsewhere. Growth is bytes per additional row: of
the peak within each part, and of what is left when it ends; buffers of a fixed size (batches of the student, blocks of
rows that are read, merged and written; some 50 MB) are in it as far as the small pool does not fill them, so the larger
both pools are, the truer it is. The last line is JSON.
"""

import argparse
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from profiles import resident_peak_bytes

PARTS = ("start", "read", "tokenise", "score", "select", "write")
SHARD_ROWS = 2_000  # rows a file of the synthetic pool
SAMPLE_SECONDS = 0.004


def synthetic(problems: int, candidates: int, words: int) -> Iterator[dict[str, Any]]:
    """Rows whose trajectories have about `words` words, in sentences of eight."""
    rng = random.Random(0)
    vocabulary = ["take", "add", "and", "then", "see", "gives", "sum", "one", "left", "carry", "write", "check"]
    for problem in range(problems):
        a, b = rng.randrange(1000), rng.randrange(1000)
        for candidate in range(candidates):
            chosen = rng.choices(vocabulary, k=rng.randint(words // 2, words + words // 2))
            sentences = [" ".join(chosen[i : i + 8]) + ". " for i in range(0, len(chosen), 8)]
            result = a + b + (rng.random() < 0.3)
            text = "".join(sentences) + f"So \\boxed{{{result}}}"
            messages = [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": text}]
            yield {
                "problem_id": f"problem-{problem:09d}",
                "candidate_id": f"candidate-{candidate}",
                "teacher": f"teacher-{candidate}",
                "messages": messages,
                "answer": str(a + b),
                "correct": None,
                "quality": rng.random(),
            }


def write_pool(folder: Path, rows: Iterator[dict[str, Any]], form: str) -> None:
    """Files of `SHARD_ROWS` rows each, one of which is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for number in itertools.count():
        shard = list(itertools.islice(rows, SHARD_ROWS))
        if not shard:
            return
        path = folder / f"pool-{number:05d}.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(shard), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in shard))


def work(pool: Path, cache: Path, scoring: bool) -> None:
    """What the fresh process does; a line on stdout says when a part begins, the last one what it was."""
    from lark.experiment.console import quiet_libraries

    quiet_libraries()
    warm = cache / "warm-up"
    warm.mkdir(parents=True)
    write_pool(warm / "pool", synthetic(20, 5, 12), "parquet")
    select_from(warm / "pool", warm, scoring, lambda part: None)
    tokens_N = select_from(pool, cache, scoring, say)
    peak = resident_peak_bytes()
    say("done", rows=len(tokens_N), tokens=int(tokens_N.sum()), peak=peak)


def say(part: str, **facts: Any) -> None:
    gc.collect()
    print(json.dumps({"part": part, **facts}), flush=True)


def select_from(pool: Path, cache: Path, scoring: bool, begin: Callable[[str], None]) -> Any:
    """From the pool to the written selection; `begin` hears of each part. Returns the tokens of each row."""
    from lightning import Trainer

    from lark.experiment.statistics_file import write_statistics
    from lark.pool.pool import read_pool
    from lark.scoring.pass_module import ScoringSettings
    from lark.selection.policies import Chi2, TopB
    from lark.selection.rule import Rule
    from lark.selection.scores.statistics import Lark, Length, Random
    from lark.student.student import Student
    from lark.tasks.task import Task
    from lark.training.datamodule import TrajectoryDataModule
    from lark.training.recipe import Recipe
    from lark.training.run_folder import write_selection

    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "inference_mode": False}
    data = TrajectoryDataModule(
        task=Task(name="synthetic", pool=str(pool), checker="number", max_length=2**20),
        student=Student(name="tiny", path="shipped:tiny", template="chatml", dtype="float32"),
        selector=Rule(name="lark", score=Lark() if scoring else Length(sign=1), policy=Chi2(budget=2)),
        baseline=Rule(name="random", score=Random(seed=0), policy=TopB(budget=2)),
        recipe=Recipe(steps=1, batch_size=16, lr=1e-4),
        probe=ScoringSettings(),
        seed=0,
        cache=cache,
        make_trainer=lambda label: Trainer(**quiet, default_root_dir=cache),
    )
    begin("read")
    read_pool(pool, cache=cache)
    begin("tokenise")
    data.prepare_data()
    begin("score")
    data.score()
    begin("select")
    data.select()
    begin("write")
    write_statistics(cache / "statistics.parquet", data.candidates, data.selections, data.rules)
    for name in data.rules:
        write_selection(name, data.rules[name].name, data, cache / name)
    begin("end")
    return data.trajectories.length


def status(process: int) -> dict[str, int]:
    """Bytes of anonymous and of resident memory; empty once the process is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in text.splitlines())
    if "RssAnon" not in fields:  # a zombie has no memory
        return {}
    return {short: int(fields[name].split()[0]) * 1024 for short, name in (("anon", "RssAnon"), ("resident", "VmRSS"))}


def measure(pool: Path, cache: Path, scoring: bool) -> dict[str, Any]:
    """Peaks by part of a fresh process over `pool`, what is left at the end of each part, and seconds."""
    command = [sys.executable, __file__, "--work", str(pool), str(cache), *([] if scoring else ["--no-scoring"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    events: list[tuple[float, dict[str, Any]]] = []

    def listen() -> None:
        assert process.stdout is not None
        events.extend((time.monotonic(), json.loads(line)) for line in process.stdout if line.startswith('{"part"'))

    listener = threading.Thread(target=listen)
    began = time.monotonic()
    listener.start()
    part, parts = "start", {name: {"anon": 0, "resident": 0, "left": 0, "seconds": 0.0} for name in PARTS}
    seen, last = 0, {}
    while process.poll() is None:
        now = status(process.pid)
        for at, event in events[seen:]:
            if part in parts:
                parts[part] |= {"left": last.get("anon", 0), "seconds": at - began}
            part, began, seen = event["part"], at, seen + 1
        if part in parts and now:
            for name in ("anon", "resident"):
                parts[part][name] = max(parts[part][name], now[name])
        last = now or last
        time.sleep(SAMPLE_SECONDS)
    listener.join()
    if process.returncode:
        sys.exit(f"the measured process failed with code {process.returncode}")
    return {**events[-1][1], "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", type=int, default=800, help="of the small pool")
    parser.add_argument("--candidates", type=int, default=5, help="a problem")
    parser.add_argument("--words", type=int, default=12, help="a trajectory; about four tokens each")
    parser.add_argument("--times", type=int, default=10, help="how much larger the large pool is")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="parquet")
    parser.add_argument("--no-scoring", dest="scoring", action="store_false", help="rules that need no student")
    parser.add_argument("--work", nargs=2, type=Path, metavar=("POOL", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work, scoring=arguments.scoring)
        return
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc, which only Linux has")
    if min(arguments.problems, arguments.candidates) < 1 or arguments.words < 4 or arguments.times < 2:
        parser.error("--problems and --candidates must be at least 1, --words 4 and --times 2")

    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for times in (1, arguments.times):
            folder = Path(temporary) / f"{times}x"
            rows = synthetic(arguments.problems * times, arguments.candidates, arguments.words)
            write_pool(folder, rows, arguments.format)
            size = sum(path.stat().st_size for path in folder.iterdir())
            result = measure(folder, Path(temporary) / f"cache-{times}x", arguments.scoring)
            results.append(result)
            print(
                f"{times}x: {result['rows']:,} rows, {result['tokens']:,} tokens, {size / 2**20:,.1f} MiB in "
                f"{len(list(folder.iterdir()))} {arguments.format} files; "
                f"peak resident {result['peak'] / 2**20:,.0f} MiB"
            )
            print("  MiB        anonymous, peak   at the end   resident, peak   seconds")
            for name, part in result["parts"].items():
                anon, left, resident = (part[key] / 2**20 for key in ("anon", "left", "resident"))
                print(f"  {name:<10} {anon:>15,.1f} {left:>12,.1f} {resident:>16,.1f} {part['seconds']:>9.1f}")
    small, large = results
    more = large["rows"] - small["rows"]
    growth = {
        name: {
            key: round((large["parts"][name][key] - small["parts"][name][key]) / more)
            for key in ("anon", "left", "resident")
        }
        for name in PARTS
    }
    anonymous = [max(part["anon"] for part in result["parts"].values()) for result in results]
    share = anonymous[1] / anonymous[0] - 1
    print(
        f"peak anonymous memory: {anonymous[0] / 2**20:,.0f} and {anonymous[1] / 2**20:,.0f} MiB, {share:+.0%} for "
        f"{large['rows'] / small['rows']:g} times the rows"
    )
    print(f"growth: bytes per additional row ({more:,} rows)")
    print("             anonymous, peak   at the end   resident, peak")
    for name, by in growth.items():
        print(f"  {name:<10} {by['anon']:>15,} {by['left']:>12,} {by['resident']:>16,}")
    print(
        json.dumps(
            {
                "rows": [result["rows"] for result in results],
                "peak_resident": [result["peak"] for result in results],
                "peak_anonymous": anonymous,
                "bytes_per_row": growth,
            }
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

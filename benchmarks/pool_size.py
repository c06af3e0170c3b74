"""Time and memory of reading, tokenising and choosing from a pool, by its size.

    python benchmarks/pool_size.py                 200,000 and 2,000,000 trajectories
    python benchmarks/pool_size.py 20000 200000    other sizes

Synthetic trajectories in Parquet shards of 100,000, eight a problem, some 60 tokens each. Each size is one command,
`python -m lark.run ... stop_after=selection` with rules that need no student's pass; its memory is that of the largest
process.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SHARD, CANDIDATES = 100_000, 8


def write_pool(folder: Path, rows: int) -> None:
    """Write synthetic trajectories as shards."""
    folder.mkdir()
    for start in range(0, rows, SHARD):
        numbers = range(start, min(start + SHARD, rows))
        columns = {
            "problem_id": [str(n // CANDIDATES) for n in numbers],
            "candidate_id": [str(n % CANDIDATES) for n in numbers],
            "teacher": [f"teacher-{n % CANDIDATES}" for n in numbers],
            "messages": [
                [
                    {"role": "user", "content": f"Compute {n // CANDIDATES} + {n // CANDIDATES % 97}."},
                    {"role": "assistant", "content": f"{n // CANDIDATES} plus that is {n}. " * (1 + n % 4)},
                ]
                for n in numbers
            ],
            "correct": [n % 3 > 0 for n in numbers],
        }
        pq.write_table(pa.table(columns), folder / f"part-{start:09}.parquet")


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Run the command in `folder` and return seconds and MB."""
    write_pool(folder / "pool", rows)
    words = ["task=jsonl", f"task.pool={folder / 'pool'}", "model=tiny", "selector=shortest", "baseline=random"]
    words += ["stop_after=selection", "logger=csv", f"paths.logs={folder / 'logs'}", "diagnostics=none"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lark.run", *words, f"hydra.run.dir={folder / 'run'}"], capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    selection = (folder / "run" / "selector" / "selection.jsonl").read_bytes().count(b"\n")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    print(*re.findall(r"^(?:pool|selected).*", done.stdout, re.MULTILINE), sep="\n", file=sys.stderr)
    return {"trajectories": rows, "seconds": round(seconds, 1), "peak_mb": round(peak), "chosen": selection}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[200_000, 2_000_000])
    for rows in parser.parse_args().sizes:  # ascending: the peak is that of the largest process so far
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), rows)), flush=True)


if __name__ == "__main__":
    main()

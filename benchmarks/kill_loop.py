"""Kill jobs at random and let them go on: is the table the same, is a sample drawn twice, is anything lost?

Two jobs with one rule in common work on one folder of logs and caches; one of them or both get SIGKILL after a random
time, again and again, while scoring, training, sampling and checking. Then they end in peace, answers are checked by
another checker, and everything is compared with jobs that were left alone.

    python benchmarks/kill_loop.py --kills 20
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from lark.common.cache import read_json
from lark.common.record_file import read_records
from lark.config import find_conf, register_resolvers

SETTINGS = (
    *("task.limit=60", "task.eval_limit=8", "sft.steps=6", "sft.checkpoint_every=1", "sft.validations=3"),
    *("evaluation.samples=2", "probe.shard_rows=20", "probe.batch_tokens=600", "task.max_new_tokens=48", "logger=csv"),
)
JOBS = {"random": ("baseline=random",), "longest": ("baseline=longest",)}


def start(logs: Path, name: str, *words: str) -> int:
    """Start a job in a child process, which has everything imported already; returns its process id."""
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        out = os.open(logs / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.setsid()
        from lark.experiment.experiment import run

        with initialize_config_dir(str(find_conf()), version_base="1.3"):
            config = compose("config", [*SETTINGS, *JOBS[name], *words, f"paths.logs={logs}"])
        (logs / "runs" / name).mkdir(parents=True, exist_ok=True)
        run(config, logs / "runs" / name, group=name)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Wait for a child and return its exit code; below 0: the signal it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_samples(logs: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every sample that is on disk, with the folder it belongs to; of a finished set those of samples.jsonl."""
    for folder in sorted(logs.glob("samples/*")):
        whole = folder / "samples.jsonl"
        if whole.exists():
            rows: Iterator[dict[str, Any]] = map(json.loads, whole.read_text().splitlines())
        else:
            rows = chain.from_iterable(map(read_records, folder.glob("rank*.partial")))
        yield from ((folder.name, row) for row in rows)


def list_figures(logs: Path) -> dict[str, Any]:
    """List what each job's table is made of."""
    found = {}
    for name in JOBS:
        summary = read_json(logs / "runs" / name / "summary.json")
        assert summary["status"] == "finished", summary
        arms = {
            role: {k: arm[k] for k in ("metrics", "held_out_loss", "curve")} for role, arm in summary["arms"].items()
        }
        found[name] = {"sets": summary["sets"], "arms": arms}
    return found


def run_in_peace(logs: Path, *words: str) -> dict[str, Any]:
    for name in JOBS:
        assert wait(start(logs, name, *words)) == 0, (logs / f"{name}.out").read_text()[-3000:]
    return list_figures(logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    register_resolvers()
    import lark.experiment.experiment  # noqa: F401  (before the forks)

    rng, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="lark-kills-"))
    alone, killed = folder / "alone", folder / "killed"
    for logs in (alone, killed):
        logs.mkdir()
    begin = time.monotonic()
    expected = run_in_peace(alone)
    took = (time.monotonic() - begin) / len(JOBS)
    print(f"left alone: {took:.1f} s a job")

    kills, seen, reached = 0, set(), Counter()
    while kills < arguments.kills:
        children = [start(killed, name) for name in JOBS]
        time.sleep(rng.uniform(0.1, 0.7) * took)
        for child in children:
            os.kill(child, signal.SIGKILL)
            kills += wait(child) == -signal.SIGKILL
        there = [(of, row["problem_id"], row["sample"]) for of, row in read_samples(killed)]
        assert len(there) == len(set(there)), "a sample was drawn twice"
        assert seen <= set(there), "a sample was lost"
        seen = set(there)
        reached[_describe_progress(killed, len(seen))] += 1
        if all((killed / "runs" / name / "summary.json").exists() for name in JOBS):
            seen = set()  # they were quicker than the signal: begin again
            for path in killed.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{kills} kills; how far the work had come: {dict(reached)}")
    assert run_in_peace(killed) == expected, "another table"
    samples = len(list(read_samples(killed)))
    assert samples == len(list(read_samples(alone)))
    print(f"the same table; {samples} samples, none drawn twice, none lost")
    regraded = run_in_peace(killed, "task.checker=exact")
    assert regraded == run_in_peace(alone, "task.checker=exact") and len(list(read_samples(killed))) == samples
    print("checked again by another checker: the same, no sample drawn")
    shutil.rmtree(folder)


def _describe_progress(logs: Path, samples: int) -> str:
    if not any(logs.glob("cache/statistics/*/manifest.json")):
        return f"{len(list(logs.glob('cache/statistics/*/part-*')))} parts scored"
    return f"{len(list(logs.glob('arms/*/trained.json')))} trained, {samples} samples"


if __name__ == "__main__":
    main()

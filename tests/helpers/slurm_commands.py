"""SLURM's commands as far as a run and submitit need them, with this machine as the one node: for tests.

    commands(folder, port)   the environment in which `sbatch`, `srun`, `scontrol requeue` and `sacct` are found

What SLURM does and these do too: a batch script is told of its tasks, but only srun's children are given ranks and a
step; a task that fails takes its step with it; a requeued job runs its script again.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("sbatch", "srun", "scontrol", "sacct")
FIRST_PORT = 15000
"""Lightning adds it to a job's number, for the port at which its ranks meet."""


def commands(folder: Path, port: int) -> dict[str, str]:
    """Puts the commands into `folder`. Its one job is number port - FIRST_PORT."""
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    return kept | {"PATH": f"{folder}:{kept['PATH']}", "CLUSTER": str(folder), "JOB": str(port - FIRST_PORT)}


def tasks(folder: Path) -> list[int]:
    """Process ids of the tasks that run now."""
    return [int(word) for word in (folder / "tasks").read_text().split()]


def sbatch(script: str) -> None:
    print(f"Submitted batch job {os.environ['JOB']}", flush=True)
    beside = subprocess.DEVNULL
    command = [sys.executable, __file__, "run", script]
    subprocess.Popen(command, start_new_session=True, stdin=beside, stdout=beside, stderr=beside)


def run(script: str) -> None:
    """What the node does with a batch script."""
    folder = Path(os.environ["CLUSTER"])
    (per_node,) = re.findall(r"--ntasks-per-node=(\d+)", Path(script).read_text())
    job = _job(int(per_node)) | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    while True:
        subprocess.run(["bash", script], env=os.environ | job, check=False)
        if not (folder / "requeue").exists():
            break
        (folder / "requeue").unlink()
    (folder / "over").touch()


def _job(per_node: int) -> dict[str, str]:
    names = {"JOB_ID": os.environ["JOB"], "JOB_NAME": "lark", "NNODES": 1, "JOB_NUM_NODES": 1}
    names |= {"NTASKS": per_node, "NTASKS_PER_NODE": per_node, "NODELIST": "127.0.0.1", "JOB_NODELIST": "127.0.0.1"}
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


def srun(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
    parser.add_argument("--unbuffered", action="store_true")
    parser.add_argument("--output")
    parser.add_argument("--error")
    parser.add_argument("--ntasks-per-node", type=int, default=os.environ.get("SLURM_NTASKS_PER_NODE"))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    told = parser.parse_args(words)
    started = []
    for rank in map(str, range(told.ntasks_per_node)):
        places = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
        streams = [
            path and path.replace("%j", os.environ["JOB"]).replace("%t", rank) for path in (told.output, told.error)
        ]
        out, err = (path and open(path, "a") for path in streams)  # noqa: SIM115
        environment = os.environ | _job(told.ntasks_per_node) | places
        started.append(subprocess.Popen(told.command, env=environment, stdout=out, stderr=err))
    (Path(os.environ["CLUSTER"]) / "tasks").write_text(" ".join(str(task.pid) for task in started))
    while any(task.poll() is None for task in started):
        if any(task.poll() for task in started):  # SLURM_KILL_BAD_EXIT
            for task in started:
                task.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    return max(abs(task.returncode) for task in started)


def scontrol(action: str, job: str) -> None:
    assert (action, job) == ("requeue", os.environ["JOB"])
    (Path(os.environ["CLUSTER"]) / "requeue").touch()


def sacct(*_: str) -> None:
    state = "COMPLETED" if (Path(os.environ["CLUSTER"]) / "over").exists() else "RUNNING"
    print(f"JobID|State|NodeList\n{os.environ['JOB']}|{state}|localhost")


if __name__ == "__main__":
    act = {"sbatch": sbatch, "run": run, "srun": srun, "scontrol": scontrol, "sacct": sacct}[sys.argv[1]]
    sys.exit(act(*sys.argv[2:]))

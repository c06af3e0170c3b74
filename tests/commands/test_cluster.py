"""Ranks that SLURM starts, by hand and through hydra/launcher=slurm: the same students as one process trains."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lark_process import DEADLINE, TWO_RANKS, start, wait_for
from omegaconf import OmegaConf
from safetensors.torch import load_file
from slurm_commands import FIRST_PORT, commands, tasks

from lark import config as configuration
from lark.common.cache import read_json

WORDS = (
    *("task.limit=24", "selector=longest", "baseline=none", "logger=csv", "stop_after=training"),
    *("sft.steps=30", "sft.validations=5", "sft.checkpoint_every=1", "sft.lr=1e-5"),
)
RUN = (sys.executable, "-m", "lark.run")


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with SLURM."""
    for port in range(FIRST_PORT + os.getpid() % 4000, FIRST_PORT + 10000):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return commands(tmp_path / "slurm", port)
    raise AssertionError("no port is free")


def finished(command: tuple[str, ...], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def arm(logs: Path) -> Path:
    (trained,) = logs.glob("arms/*/trained.json")
    return trained.parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arm that one process trains."""
    logs = tmp_path_factory.mktemp("alone")
    finished((*RUN, *WORDS, f"paths.logs={logs}"))
    return arm(logs)


def assert_same(ours: Path, theirs: Path) -> None:
    assert ours.name == theirs.name, "the recipe knows no devices"
    a, b = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (ours, theirs))
    for name in a.keys() | b.keys():
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)
    a, b = ([p["held_out/loss"] for p in read_json(f / "trained.json")["curve"]] for f in (ours, theirs))
    assert len(a) == 6 and a == pytest.approx(b, abs=1e-6)


@pytest.mark.slow
def test_two_tasks_of_srun_equal_one_process(alone: Path, cluster: dict[str, str], tmp_path: Path) -> None:
    own = "hydra.run.dir=${paths.logs}/runs/rank${oc.env:SLURM_PROCID}"  # as when the clock moves on between the two
    output = finished(
        ("srun", "--ntasks-per-node=2", *RUN, *WORDS, *TWO_RANKS, own, f"paths.logs={tmp_path / 'logs'}"), cluster
    )
    assert output.count("\nselected ") == 1, "one rank speaks"
    assert_same(arm(tmp_path / "logs"), alone)


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on(alone: Path, cluster: dict[str, str], tmp_path: Path) -> None:
    """Submitted by the launcher, told by SIGUSR2 that its time is over, requeued: the same folder and the same arm."""
    node = ("hydra.launcher.gpus_per_node=null", "hydra.launcher.tasks_per_node=2")
    words = ("hydra/launcher=slurm", *node, *TWO_RANKS, f"paths.logs={tmp_path}")
    sweep = start("-m", *WORDS, *words, **cluster)
    try:
        wait_for(sweep, lambda: any(tmp_path.glob("arms/*/training/last.ckpt")))
        for task in reversed(tasks(tmp_path / "slurm")):
            os.kill(task, signal.SIGUSR2)
        output, _ = sweep.communicate(timeout=DEADLINE)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, output
    (folder,) = tmp_path.glob("multiruns/*")
    (script,) = (path.read_text().splitlines() for path in folder.glob(".submitit/*/*_submission.sh"))
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR2@120", "#SBATCH --time=1440"} <= set(script)
    assert {f"export LARK_SWEEP={folder.name}", "export SLURM_KILL_BAD_EXIT=1"} <= set(script)
    (text,) = (path.read_text() for path in folder.glob(".submitit/*/*_0_log.out"))
    assert text.count(f"seed 0    {folder / '0'}") == 2
    assert (folder / "0" / "run.log").read_text().count("selector goes on from") == 1
    assert read_json(folder / "0" / "summary.json")["status"] == "finished"
    assert_same(arm(tmp_path), alone)


def launcher(*words: str) -> dict:
    configuration.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configuration.find_conf()), version_base="1.3"):
        config = compose("config", ["hydra/launcher=slurm", *words], return_hydra_config=True)
    config.hydra.job.num = 0
    settings = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items()}


def test_the_launcher_asks_for_a_task_a_gpu() -> None:
    settings = launcher("trainer=ddp", "trainer.num_nodes=2", "hydra.launcher.gpus_per_node=8")
    assert (settings["nodes"], settings["gpus_per_node"], settings["tasks_per_node"]) == (2, 8, 8)
    assert (launcher()["nodes"], launcher()["tasks_per_node"]) == (1, 1)

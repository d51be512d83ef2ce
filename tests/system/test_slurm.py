"""The printed batch script on a real Slurm of two nodes: it is stopped, requeued, loses a node, and ends as if not."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port
from tests.system.conftest import NODES, Cluster, until
from tests.test_preemption import _run_file
from tests.test_run import ENVIRONMENT, ROOT, _curve

STEPS = 150
WORDS = ("train.epochs=25", "train.grace_seconds=10", "checkpoint.every=10", "evaluate=null")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with two processes of one node, which nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    words = [*launcher, "train.py", _run_file(folder, dropout=0.0), *WORDS]
    subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return folder


def _submit(cluster: Cluster, run_file: str) -> str:
    """The number of the job that `nestling launch slurm --submit` made."""
    section = f"launch.slurm={{workdir: {ROOT}, python: {sys.executable}, port: {free_port()}}}"
    words = [sys.executable, "-m", "launch.cli", "launch", "slurm", run_file, "--nodes", "2", "--gpus-per-node", "0"]
    return cluster.call(*words, section, *WORDS, "--submit", **ENVIRONMENT).split()[-1]


def _steps(folder: Path) -> int:
    log = folder / "run/metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _equal(folder: Path, undisturbed: Path) -> None:
    ours, theirs = ([line["loss"] for line in _curve(path / "run")] for path in (folder, undisturbed))
    assert len(ours) == STEPS and ours == theirs


def test_a_signal_saves_and_requeues(cluster: Cluster, tmp_path: Path, undisturbed: Path) -> None:
    job = _submit(cluster, _run_file(tmp_path, undisturbed, dropout=0.0))
    until(lambda: _steps(tmp_path) >= 15, 120, f"training: {cluster.log()}")
    cluster.call("scancel", "--batch", "--signal=USR2", job)  # what Slurm does before the time limit
    until(lambda: cluster.state(job, "Restarts") == "1", 60, f"requeue: {cluster.log()}")
    until(lambda: cluster.state(job) == "PENDING", 60, "requeue")
    done = _steps(tmp_path)
    assert 15 <= done < STEPS and (tmp_path / f"run/checkpoints/step-{done}").exists()
    assert (tmp_path / "run/PREEMPTED").exists()
    _begin_again(cluster, job)
    until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 180, f"turn 2: {cluster.log()}")
    assert cluster.state(job) == "COMPLETED", cluster.log()
    assert "attempt 1" in cluster.log() and "resuming from" in cluster.log()
    _equal(tmp_path, undisturbed)


def test_a_node_dies(cluster: Cluster, tmp_path: Path, undisturbed: Path) -> None:
    """Its slurmd and all of its processes at once, without a word."""
    job = _submit(cluster, _run_file(tmp_path, undisturbed, dropout=0.0))
    until(lambda: _steps(tmp_path) >= 15, 120, f"training: {cluster.log()}")
    on_it = [p for p in psutil.process_iter() if _is_on(p, NODES[1], job)]
    assert on_it
    for process in [psutil.Process(cluster.daemons[NODES[1]].pid), *on_it]:
        process.send_signal(signal.SIGKILL)
    cluster.daemons[NODES[1]].wait()
    until(lambda: cluster.state(job, "Restarts") == "1", 90, f"requeue: {cluster.log()}")
    assert _steps(tmp_path) < STEPS
    cluster.start_node(NODES[1])
    _begin_again(cluster, job)
    until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 240, f"turn 2: {cluster.log()}")
    assert cluster.state(job) == "COMPLETED", cluster.log()
    _equal(tmp_path, undisturbed)


def _begin_again(cluster: Cluster, job: str) -> None:
    """Before the two minutes that Slurm waits; within the second in which turn 1 ends it revokes turn 2 with it."""
    cluster.call("scontrol", "update", f"jobid={job}", "StartTime=now+10")


def _is_on(process: psutil.Process, node: str, job: str) -> bool:
    try:
        name = process.environ().get("SLURMD_NODENAME")
        return process.environ().get("SLURM_JOB_ID") == job and name == node and "slurmstepd" not in process.name()
    except psutil.Error:
        return False

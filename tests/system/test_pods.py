"""The pods of the printed Job and TrainJob in two network namespaces, with the variables that the platform sets."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from launch.errors import EXIT_DONE, EXIT_PREEMPTED
from tests.system.conftest import until
from tests.test_preemption import _run_file
from tests.test_run import ENVIRONMENT, ROOT, _curve

SPACES = ("nestling-pod0", "nestling-pod1")
STEPS = 90
WORDS = ("train.epochs=15", "train.grace_seconds=10", "evaluate=null")


@pytest.fixture(scope="module")
def pods(debian: None) -> Iterator[None]:
    """Two namespaces with a cable between them; a file of hosts for each stands for the cluster's DNS."""

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    folders = [Path("/etc/netns") / space for space in SPACES]
    for space in SPACES:
        ip("netns", "delete", space, check=False)
        ip("netns", "add", space)
    try:
        ip("link", "add", "eth0", "netns", SPACES[0], "type", "veth", "peer", "name", "eth0", "netns", SPACES[1])
        for number, (space, folder) in enumerate(zip(SPACES, folders, strict=True)):
            ip("-n", space, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for card in ("eth0", "lo"):
                ip("-n", space, "link", "set", card, "up")
            folder.mkdir(parents=True, exist_ok=True)
            names = f"10.77.0.1 run-0.run run-node-0-0.run\n10.77.0.{number + 1} {socket.gethostname()}\n"
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        yield
    finally:
        for space, folder in zip(SPACES, folders, strict=True):
            ip("netns", "delete", space, check=False)
            (folder / "hosts").unlink(missing_ok=True)
            folder.rmdir()


def _containers(run_file: Path, kind: str) -> list[tuple[list[str], dict[str, str]]]:
    """Command and environment of each pod: those of the printed file and those that the controllers add."""
    section = f"launch.kubernetes={{image: i, kind: {kind}, python: {sys.executable}, volumes: {{a: /app/runs}}}}"
    words = [sys.executable, "-m", "launch.cli", "launch", "kubernetes", str(run_file), section, *WORDS]
    done = subprocess.run(
        [*words, "--nodes", "2", "--gpus-per-node", "0"], env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    documents: list[dict[str, Any]] = list(YAML(typ="safe", pure=True).load_all(done.stdout))
    by_kind = {document["kind"]: document["spec"] for document in documents if "spec" in document}
    if kind == "Job":
        pod, added = by_kind["Job"]["template"]["spec"], {}
    else:
        (node,) = by_kind["TrainingRuntime"]["template"]["spec"]["replicatedJobs"]
        pod = node["template"]["spec"]["template"]["spec"]
        added = {
            "PET_NNODES": str(by_kind["TrainJob"]["trainer"]["numNodes"]),
            "PET_NPROC_PER_NODE": str(by_kind["TrainJob"]["trainer"]["numProcPerNode"]),
            "PET_MASTER_ADDR": "run-node-0-0.run",
            "PET_MASTER_PORT": "29400",
        }
    (container,) = pod["containers"]
    # The mounted run file is this one.
    command = [str(run_file) if word == "/app/run/run.yaml" else word for word in container["command"]]
    given = {one["name"]: one["value"] for one in container["env"]} | added
    pods = []
    for index in ("0", "1"):
        own = {"JOB_COMPLETION_INDEX": index} | ({"PET_NODE_RANK": index} if added else {})
        pods.append((command, given | own))
    return pods


def _start(containers: list[tuple[list[str], dict[str, str]]]) -> list["subprocess.Popen[str]"]:
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", space, *command],
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for space, (command, environment) in zip(SPACES, containers, strict=True)
    ]


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_pods_train_one_is_taken_away_and_all_go_on(pods: None, tmp_path: Path, kind: str) -> None:
    run_file = Path(_run_file(tmp_path, dropout=0.0))
    containers = _containers(run_file, kind)
    log = tmp_path / "run/metrics.jsonl"
    running = _start(containers)
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 5, 150, "training")
    os.kill(running[1].pid, signal.SIGTERM)  # the kubelet's
    outs = [process.communicate(timeout=90)[0] for process in running]
    assert [process.returncode for process in running] == [EXIT_PREEMPTED] * 2, "\n".join(outs)
    assert len(log.read_text().splitlines()) < STEPS
    running = _start(containers)
    outs = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [EXIT_DONE] * 2, "\n".join(outs)
    assert "over 2 process(es)" in outs[0] and "resuming from" in outs[0]
    assert [line["step"] for line in _curve(tmp_path / "run")] == list(range(1, STEPS + 1))

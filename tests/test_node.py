"""The node entry: platforms' variables, meetings, real runs: `python -m pytest tests/test_node.py`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import node, reader
from launch.errors import EXIT_CHECK, EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, Preempted, UserError
from launch.meeting import Left, NotMet, meet
from launch.node import Nodes, read_nodes
from tests.conftest import free_port
from tests.test_preemption import _run_file
from tests.test_run import ENVIRONMENT, ROOT, _curve

# What each platform sets, as its documentation has it, on the second of two nodes.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "Slurm": {
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": "3",
        "NESTLING_HEAD": "10.0.0.1",
    },
    "Kubernetes": {
        "JOB_COMPLETION_INDEX": "1",
        "NESTLING_NODES": "2",
        "NESTLING_HEAD": "10.0.0.1",
        "NESTLING_JOB": "77",
    },
    "Kubeflow": {
        "JOB_COMPLETION_INDEX": "1",
        "PET_NODE_RANK": "1",
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_MASTER_ADDR": "10.0.0.1",
        "PET_MASTER_PORT": "29400",
        "NESTLING_JOB": "77",
    },
    "SkyPilot": {
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "77",
    },
    "AWS Batch": {
        "AWS_BATCH_JOB_NODE_INDEX": "1",
        "AWS_BATCH_JOB_NUM_NODES": "2",
        "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.1",
        "AWS_BATCH_JOB_ID": "77#1",
        "AWS_BATCH_JOB_ATTEMPT": "3",
    },
    "RunPod": {
        "NODE_RANK": "1",
        "NUM_NODES": "2",
        "NUM_TRAINERS": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29400",
        "NESTLING_JOB": "77",
    },
    "NESTLING_NODE_RANK": {
        "NESTLING_NODE_RANK": "1",
        "NESTLING_NODES": "2",
        "NESTLING_HEAD": "10.0.0.1",
        "NESTLING_JOB": "77",
        "NESTLING_ATTEMPT": "3",
    },
}


def _read(environment: dict[str, str], *flags: str) -> Nodes:
    return read_nodes(node._arguments([*flags, "run.yaml"]), 60, environment)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_platform_gives_the_same_nodes(name: str) -> None:
    found = _read(ENVIRONMENTS[name], "--nodes", "2", "--gpus-per-node", "8")
    port = 29400 if "29400" in ENVIRONMENTS[name].values() else 29500
    attempt = 3 if "3" in ENVIRONMENTS[name].values() else 0
    assert found == Nodes(name, 2, 1, 8, "10.0.0.1", port, "77", attempt, 60)


def test_nothing_set_is_one_node() -> None:
    assert _read({}, "--gpus-per-node", "0") == Nodes("one node", 1, 0, 0, "127.0.0.1", 29500, "0", 0, 60)


SLURM = ENVIRONMENTS["Slurm"]
REFUSED: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "nodes: 4 were asked for, Slurm gives 2": (SLURM, ("--nodes", "4")),
    "nodes: 2 were asked for, and nothing says which of them this is": ({}, ("--nodes", "2")),
    "SLURM_NODEID: got 2, allowed: 0 to 1": (SLURM | {"SLURM_NODEID": "2"}, ()),
    "SLURM_NODEID: got 'x', allowed: a whole number": (SLURM | {"SLURM_NODEID": "x"}, ()),
    "srun: got 8 tasks a node, allowed: 1": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, ()),
    "NESTLING_HEAD: missing": ({k: v for k, v in SLURM.items() if k != "NESTLING_HEAD"}, ()),
    "gpus: 8 were asked for, Slurm gives 4": (SLURM | {"SLURM_GPUS_ON_NODE": "4"}, ("--gpus-per-node", "8")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_world_that_was_not_asked_for_is_refused(message: str) -> None:
    environment, flags = REFUSED[message]
    with pytest.raises(UserError) as error:
        _read(environment, *flags)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_gpus_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/bash\necho 'GPU 0: H100 (UUID: a)'\necho 'GPU 1: H100 (UUID: b)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert node.gpus_here() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert node.gpus_here() == 1
    here = _read({}, "--gpus-per-node", "2")
    with pytest.raises(UserError, match="gpus: 2 were asked for, node 0 has 1"):
        node.check_node(here)


def test_a_network_card_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = _read({}, "--gpus-per-node", "0")
    for good in ("lo", "^docker", "=lo,eth"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", good)
        node.check_node(here)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    with pytest.raises(UserError, match="NCCL_SOCKET_IFNAME: got 'ib7', node 0 has "):
        node.check_node(here)


def _meet(facts: list[dict[str, Any]], seconds: float = 20, **more: Any) -> list[Any]:
    """What each of several nodes gets, exceptions too; the last one comes first."""
    port, got = free_port(), [None] * len(facts)

    def one(rank: int) -> None:
        try:
            got[rank] = meet(len(facts), rank, ("127.0.0.1", port), facts[rank], seconds, **more)  # pyright: ignore
        except (Exception, Preempted) as error:
            got[rank] = error  # pyright: ignore

    threads = [threading.Thread(target=one, args=(rank,)) for rank in reversed(range(len(facts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def _facts(**more: Any) -> dict[str, Any]:
    return {"same": {"job": "7", "code": "a"}, **more}


def test_nodes_that_are_equal_agree_on_the_smallest_budget(tmp_path: Path) -> None:
    got = _meet([_facts(), _facts(budget=512), _facts(budget=256)], shared=tmp_path)
    assert [answer["budget"] for answer in got] == [256, 256, 256]
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_differ_all_say_so() -> None:
    got = _meet([_facts(), {"same": {"job": "7", "code": "b"}}, _facts()])
    assert {str(error) for error in got} == {"code: node 1 has b, node 0 has a; allowed: the same on all nodes"}
    assert all(isinstance(error, UserError) for error in got)


def test_a_clock_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import meeting

    class Clock:
        monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

        @staticmethod
        def time() -> float:
            return time.time() + (60 if threading.current_thread() is late else 0)

    port, got = free_port(), []
    monkeypatch.setattr(meeting, "time", Clock)

    def come() -> None:
        with pytest.raises(UserError) as error:
            meet(2, 1, ("127.0.0.1", port), _facts(), 20)
        got.append(str(error.value))

    late = threading.Thread(target=come)
    late.start()
    with pytest.raises(UserError, match="clock: node 1 is"):
        meet(2, 0, ("127.0.0.1", port), _facts(), 20)
    late.join()
    assert got == ["clock: node 1 is +60 s from node 0, allowed: 10 s"]


def test_a_node_that_leaves_takes_the_others_along() -> None:
    got = _meet([_facts(), _facts(end=EXIT_CHECK, why="a gate"), _facts(end=EXIT_CRASH, why="a crash")])
    assert {str(error) for error in got} == {f"node 1 has left with exit code {EXIT_CHECK}: a gate"}
    assert [error.code for error in got if isinstance(error, Left)] == [EXIT_CHECK] * 3


def test_nodes_end_when_node_0_is_done_and_begin_again_together() -> None:
    got = _meet([_facts(end=EXIT_DONE), _facts(end=EXIT_DONE)])
    assert [answer["end"] for answer in got] == [EXIT_DONE] * 2
    done, late = _meet([_facts(end=EXIT_DONE), _facts()])  # whatever came between, the run is finished
    assert done["end"] == EXIT_DONE and isinstance(late, Left) and late.code == EXIT_DONE
    got = _meet([_facts(), _facts(end=EXIT_DONE), _facts(budget=64)])
    assert [(answer["end"], answer["budget"]) for answer in got] == [(None, 64)] * 3
    got = _meet([_facts(end=EXIT_CHECK, why="a gate"), _facts(end=EXIT_DONE)])
    assert [error.code for error in got if isinstance(error, Left)] == [EXIT_CHECK] * 2


def test_nodes_that_do_not_come() -> None:
    with pytest.raises(NotMet, match=r"node 1, 2 of 3 did not come in time"):
        meet(3, 0, ("127.0.0.1", free_port()), _facts(), 0.5)
    with pytest.raises(NotMet, match="node 0 does not answer"):
        meet(3, 1, ("127.0.0.1", free_port()), _facts(), 0.5)


def test_a_stop_ends_the_waiting() -> None:
    began = time.monotonic()
    with pytest.raises(Preempted):
        meet(2, 0, ("127.0.0.1", free_port()), _facts(), 20, lambda: time.monotonic() > began + 0.5)


def test_strangers_and_nodes_that_come_again_change_nothing() -> None:
    port, answers = free_port(), []
    head = threading.Thread(target=lambda: answers.append(meet(2, 0, ("127.0.0.1", port), _facts(), 20)))
    head.start()
    time.sleep(0.3)
    strange = [b"GET / HTTP/1.1\r\n\r\n", b"\n", b'{"rank": 1}\n', b"x" * 200_000, b'{"rank": 1, "same": 3}\n', b""]
    other_job = {"rank": 1, "end": None, "why": "", "budget": 1, "same": {"job": "8"}, "clock": time.time()}
    for text in (*strange, json.dumps(other_job).encode() + b"\n"):
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(text)
            time.sleep(0.05)
    assert head.is_alive()
    assert meet(2, 1, ("127.0.0.1", port), _facts(), 20)["budget"] is None
    head.join()
    assert len(answers) == 1


ENTRY = ["-m", "launch.node", "--nodes", "2", "--gpus-per-node", "0"]


def _start(
    run_file: str, rank: int, port: int, *words: str, program: list[str] = ENTRY, **environment: str
) -> "subprocess.Popen[str]":
    command = [sys.executable, *program, "--port", str(port)]
    named = {"NESTLING_NODE_RANK": str(rank), "NESTLING_HEAD": "127.0.0.1", "NESTLING_JOB": "7"}
    return subprocess.Popen(
        [*command, run_file, *words],
        cwd=ROOT,
        env=ENVIRONMENT | named | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _both(run_file: str, port: int, *words: str) -> list["subprocess.Popen[str]"]:
    return [_start(run_file, rank, port, *words) for rank in (0, 1)]


def test_two_nodes_with_different_run_files_never_train(tmp_path: Path) -> None:
    run_file, port = _run_file(tmp_path), free_port()
    nodes = [
        _start(run_file, 0, port),
        _start(run_file, 1, port, "train.seed=1", NCCL_DEBUG="INFO"),
    ]
    for process in nodes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == EXIT_USER, err
        said = [line for line in err.splitlines() if line.startswith("nestling: ")]
        assert len(said) == 2 and "run file: node 1 has " in said[0] and "NCCL_DEBUG: node 1 has INFO" in said[1], err
        assert "step" not in out
    assert not (tmp_path / "run").exists()


# A node whose turns end with these codes after so many seconds, in the place of supervised runs.
TURNS = """
import sys, time
from launch import errors, node
turns = iter(TURNS)
def supervise(command, before=None, entered=None):
    before(None)
    code, seconds = next(turns)
    time.sleep(seconds)
    return code
node.supervise = supervise
sys.exit(errors.exit_code(node.main, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("head", "other", "ends"),
    [
        ([(EXIT_DONE, 2)], [(EXIT_DONE, 0)], (EXIT_DONE, EXIT_DONE)),
        ([(EXIT_CHECK, 2)], [(EXIT_DONE, 0)], (EXIT_CHECK, EXIT_CHECK)),
        ([(EXIT_CRASH, 2)], [(EXIT_DONE, 0)], (EXIT_CRASH, EXIT_CRASH)),
        ([(EXIT_PREEMPTED, 2)], [(EXIT_DONE, 0)], (EXIT_PREEMPTED, EXIT_PREEMPTED)),
        ([(EXIT_DONE, 1)], [(EXIT_USER, 0)], (EXIT_DONE, EXIT_USER)),
    ],
    ids=["an export", "a gate", "a crash in the export", "a stop in the export", "too late to change it"],
)
def test_nodes_end_as_node_0_does(tmp_path: Path, head: Any, other: Any, ends: tuple[int, int]) -> None:
    run_file, port = _run_file(tmp_path), free_port()
    nodes = []
    for rank, turns in enumerate((head, other)):
        program = ["-c", TURNS.replace("TURNS", repr(turns)), "--nodes", "2", "--gpus-per-node", "0"]
        nodes.append(_start(run_file, rank, port, program=program))
    came = []
    for process in nodes:
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        came.append(process.returncode)
    assert tuple(came) == ends


def test_a_node_that_is_started_again_after_the_end_waits_for_nobody(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path)
    config = reader.read_run(Path(run_file), []).model_dump(mode="json")
    (tmp_path / "run").mkdir()
    record = tmp_path / "run/run.json"
    record.write_text(json.dumps({"finished": "2026-01-01", "config": config}))
    process = _start(run_file, 1, free_port())
    _, err = process.communicate(timeout=30)
    assert process.returncode == EXIT_DONE and "holds this run, which is finished" in err
    record.write_text(json.dumps({"finished": "2026-01-01", "config": config | {"loss": {}}}))
    process = _start(run_file, 1, free_port(), "--wait", "1")
    _, err = process.communicate(timeout=30)
    assert process.returncode == EXIT_CRASH and "node 0 does not answer" in err


@pytest.mark.slow
def test_two_nodes_train_stop_and_go_on(tmp_path: Path) -> None:
    """One is stopped, both end with 75; started again they end with the curve of two processes of one node."""
    run_file, port = _run_file(tmp_path / "a", dropout=0.0), free_port()
    nodes = _both(run_file, port, "train.max_steps=60", "train.epochs=20")
    log = tmp_path / "a/run/metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert nodes[0].poll() is None, nodes[0].communicate()
        time.sleep(0.05)
    nodes[1].send_signal(signal.SIGTERM)
    for process in nodes:
        _, err = process.communicate(timeout=90)
        assert process.returncode == EXIT_PREEMPTED, err
    nodes = _both(run_file, port, "train.max_steps=60", "train.epochs=20")
    for process in nodes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == EXIT_DONE, out + err
    other = _run_file(tmp_path / "b", tmp_path / "a", dropout=0.0)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    words = ["train.py", other, "train.max_steps=60", "train.epochs=20"]
    subprocess.run([*accelerate, *words], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    losses = [[line["loss"] for line in _curve(tmp_path / name / "run")] for name in "ab"]
    assert len(losses[0]) == 60 and losses[0] == losses[1]


@pytest.mark.slow
def test_a_node_that_is_killed_comes_again_and_the_run_goes_on(tmp_path: Path) -> None:
    run_file, port = _run_file(tmp_path, dropout=0.0), free_port()
    words = "train.max_steps=150", "train.epochs=30", "train.grace_seconds=5", "checkpoint.every=10"
    nodes = _both(run_file, port, *words)
    checkpoints = tmp_path / "run/checkpoints"
    while not checkpoints.exists() or not list(checkpoints.glob("step-*")):
        assert nodes[0].poll() is None, nodes[0].communicate()
        time.sleep(0.05)
    entry = psutil.Process(nodes[1].pid)
    for process in (entry, *entry.children(recursive=True)):
        process.kill()
    nodes[1].communicate()
    again = _start(run_file, 1, port, *words)
    for process in (nodes[0], again):
        out, err = process.communicate(timeout=240)
        assert process.returncode == EXIT_DONE, out + err
    assert len(_curve(tmp_path / "run")) == 150


@pytest.mark.slow
def test_a_node_that_cannot_start_ends_the_other(tmp_path: Path) -> None:
    run_file, port = _run_file(tmp_path), free_port()
    nodes = [_start(run_file, 0, port), _start(run_file, 1, port, NCCL_SOCKET_IFNAME="ib7")]
    codes = []
    for process in nodes:
        _, err = process.communicate(timeout=60)
        codes.append((process.returncode, "ib7" in err))
    assert codes == [(EXIT_USER, True), (EXIT_USER, True)]


@pytest.mark.slow
def test_a_crash_of_node_0_in_its_export_begins_again_with_the_others(tmp_path: Path) -> None:
    """Others have ended their part then, and nothing but this meeting could bring them back."""
    run_file, port = _run_file(tmp_path, dropout=0.0), free_port()
    nodes = _both(run_file, port, "train.max_steps=5", "export={}")

    def ranks(number: int) -> list[psutil.Process]:
        found = []
        for one in psutil.Process(nodes[number].pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended meanwhile
                found += [one] if one.environ().get("RANK") == str(number) else []
        return found

    for is_there in (True, False):  # until the second node's rank has begun, and ended
        while bool(ranks(1)) is not is_there:
            assert nodes[0].poll() is None, nodes[0].communicate()
            time.sleep(0.05)
    assert not (tmp_path / "run/bundle").exists()
    ranks(0)[0].kill()
    for process in nodes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == EXIT_DONE, out + err
        assert ("the run crashed; restart 1" in err) is (process is nodes[0]) and "not all nodes" not in err, err
    assert (tmp_path / "run/bundle/manifest.json").exists()

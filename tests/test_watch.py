"""Ranks that raise, are killed or stand still, in whole runs: `python -m pytest tests/test_watch.py`."""

import socket
import time
from pathlib import Path

import pytest

from tests import tiny_models
from tests.processes import marked
from tests.test_run import CPU2, ENVIRONMENT, ROOT, _curve, _finish, _pairs, _start

pytestmark = pytest.mark.usefixtures("no_process_left")
STALL = 3.0  # seconds
SOON = 60  # seconds, on a machine that others use too; a collective waits for 1,800


def _run_file(folder: Path, extra: str = "") -> str:
    """A run of a tiny BERT: 12 steps, several micro-batches each."""
    tiny_models.minilm(folder / "model")
    _pairs(folder / "train.jsonl", 96)
    _pairs(folder / "held_out.jsonl", 16, seed=1)
    path = folder / "run.yaml"
    path.write_text(
        f"""
model: {{path: {folder}/model, dropout: 0.0}}
data: {{sources: [{{path: {folder}/train.jsonl}}], cache_dir: {folder}/cache}}
train: {{run_dir: {folder}/run, global_batch_size: 8, micro_batch_tokens: 64, stall_seconds: {STALL}}}
checkpoint: {{every: 2}}
{extra}
"""
    )
    return str(path)


def _ended(
    monkeypatch: pytest.MonkeyPatch, faults: str, *words: str, launcher: str | None = CPU2
) -> tuple[int, str, str, float]:
    """Exit code, outputs and seconds from the fault to the end of the launcher; fails where a process is left over."""
    monkeypatch.setitem(ENVIRONMENT, "FAULTS", faults)
    code, out, err = _finish(_start(*words, launcher=f"{launcher} -m tests.faults"))
    ended = time.time()
    assert not marked()
    at = [float(line.split()[-1]) for line in out.splitlines() if "fault: " in line]
    return code, out, err, ended - min(at, default=ended)


def _said(err: str) -> str:
    """The one line that the run ended with, where no rank printed what broke because of it."""
    lines = [line for line in err.splitlines() if "nestling: " in line]
    assert len(lines) == 1, err
    # The launcher prints a traceback of its own.
    parts = err.split("Traceback (most recent call last):")[1:]
    ours = [part for part in parts if "trainer/main.py" in part.split("\nnestling: ")[0]]
    assert len(ours) == ("raised" in lines[0]), err
    assert "by peer" not in err and "DataLoader worker" not in err, err
    return lines[0]


WORDS = {"raise": "raised ValueError", "kill": "was killed", "stop": "has stood still for 3 s", "sleep": "has stood"}
PHASES = {"backward": "replay", "library": "step"}
CASES = [
    *(f"{place}:{kind}" for place in ("embed", "loss", "replay", "backward") for kind in ("raise", "kill", "stop")),
    *("embed:sleep", "loss:sleep", "replay:sleep", "backward:sleep", "worker:kill", "worker:stop"),
    *("library:raise", "library:kill", "library:stop"),
]
FAST = (("embed:stop", 1), ("replay:kill", 0))  # in `make test`: half a minute of CPU each, most of it imports


@pytest.mark.parametrize(
    ("case", "rank"),
    [
        pytest.param(case, rank, marks=[] if (case, rank) in FAST else pytest.mark.slow)
        for case in CASES
        for rank in (0, 1)
    ],
)
def test_a_rank_that_fails_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, rank: int
) -> None:
    place, kind = case.split(":")
    words = [f"train.loader_workers={int(place == 'worker')}"]
    words += ["loss.step=library"] * (place == "library")
    code, out, err, seconds = _ended(monkeypatch, f"{case}:{rank}:3", _run_file(tmp_path), *words)
    assert code == 1, out + err
    said = _said(err)
    print(f"{case} of rank {rank}: {seconds:.1f} s: {said}")
    who, where = f"rank {rank}", f"at step 3 in {PHASES.get(place, place)}; "
    if place == "worker":  # it is ahead of its rank
        who, where = f"a loader worker of {who}", "at step "
    elif case == "backward:sleep":  # nothing tells which rank of a collective of DDP does not come
        who = "rank 0, 1 or another"
    assert f"nestling: {who} {WORDS[kind]}" in said and where in said, err
    assert seconds < SOON
    assert ("made by the test" in err) == (kind == "raise")


@pytest.mark.slow
def test_it_goes_on_from_its_checkpoint_and_long_work_between_steps_is_no_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache build, a look at held-out loss, a checkpoint and an evaluation of twice the time each."""
    run_file = _run_file(tmp_path, f"evaluate: {{sources: [{{path: {tmp_path}/held_out.jsonl}}], loss_every: 3}}")
    code, out, err, _ = _ended(monkeypatch, "replay:kill:1:5", run_file)
    assert code == 1 and "rank 1 was killed at step 5 in replay" in _said(err), out + err
    long = [f"cache:{2 * STALL}:1:0", *(f"{place}:{2 * STALL}:0:6" for place in ("held_out", "checkpoint"))]
    code, out, err, _ = _ended(monkeypatch, " ".join([*long, f"evaluation:{STALL}:1:12"]), run_file)
    assert code == 0 and "resuming from" in out and out.count("fault: ") >= 5, out + err
    assert [line["step"] for line in _curve(tmp_path / "run")] == list(range(1, 13))
    assert not err or "nestling: " not in err, err
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert not [name for name in left if "partial" in name or "watch" in name], left


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "stop", "kill"])
@pytest.mark.parametrize("place", ["embed", "backward"])
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_under_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, place: str, kind: str) -> None:
    monkeypatch.setitem(ENVIRONMENT, "FAULT_ENGINE", "1")
    launcher = f"--config_file {ROOT}/configs/accelerate/{engine}.yaml --num_processes 2"
    code, out, err, seconds = _ended(monkeypatch, f"{place}:{kind}:1:3", _run_file(tmp_path), launcher=launcher)
    assert code == 1, out + err
    print(f"{engine} {place}:{kind}: {seconds:.1f} s")
    assert f"nestling: rank 1 {WORDS[kind]} " in (said := _said(err)), err
    assert f"at step 3 in {PHASES.get(place, place)}; " in said
    assert seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize("case", ["embed:raise", "worker:kill", "worker:stop"])
def test_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    place, kind = case.split(":")
    words = _run_file(tmp_path), f"train.loader_workers={int(place == 'worker')}"
    launcher = f"--config_file {ROOT}/configs/accelerate/single.yaml"
    code, out, err, seconds = _ended(monkeypatch, f"{case}:0:3", *words, launcher=launcher)
    assert code == 1, out + err
    assert f"rank 0 {WORDS[kind]}" in _said(err) and "at step " in err
    assert seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_each_node_sees_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Two launchers of two ranks each, told apart by what the fault's module takes for the namespace of pids."""
    run_file = _run_file(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setitem(ENVIRONMENT, "FAULTS", f"loss:{kind}:3:3")
    monkeypatch.setitem(ENVIRONMENT, "FAULT_NODES", "1")
    nodes = f"{CPU2} --num_machines 2 --num_processes 4 --main_process_ip 127.0.0.1 --main_process_port {port}"
    started = [_start(run_file, launcher=f"{nodes} --machine_rank {node} -m tests.faults") for node in (0, 1)]
    first, second = (_finish(process) for process in started)
    assert first[0] == second[0] == 1, (first, second)
    said = _said(second[2])
    assert f"rank 3 {WORDS[kind]}" in said and " at step 3 in loss; " in said
    said = _said(first[2])
    assert "a rank of another node" in said or "another node, which has stood still" in said

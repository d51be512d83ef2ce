"""Runs that are told to stop, are killed and go on elsewhere: `python -m pytest tests/test_preemption.py`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.errors import EXIT_PREEMPTED
from tests import tiny_models
from tests.processes import marked, ranks
from tests.test_run import CPU2, ENVIRONMENT, PORT, ROOT, _curve, _finish, _pairs, _start

pytestmark = pytest.mark.usefixtures("no_process_left")
STEPS = 12  # two epochs


def _run_file(folder: Path, like: Path | None = None, dropout: float = 0.1, extra: str = "") -> str:
    """A run of two epochs; of two tiny models no two are the same, so another run's may be taken."""
    folder.mkdir(exist_ok=True)
    model = like / "model" if like else tiny_models.minilm(folder / "model")
    _pairs(folder / "train.jsonl", 50)
    _pairs(folder / "held_out.jsonl", 16, seed=1)
    path = folder / "run.yaml"
    path.write_text(
        f"""
model: {{path: {model}, dropout: {dropout}}}
data: {{sources: [{{path: {folder}/train.jsonl}}], cache_dir: {folder}/cache}}
train: {{run_dir: {folder}/run, global_batch_size: 8, micro_batch_tokens: 64, epochs: 2, learning_rate: 1e-3}}
evaluate: {{sources: [{{path: {folder}/held_out.jsonl}}]}}
checkpoint: {{every: 5}}
{extra}
"""
    )
    return str(path)


def _launch(faults: str, *words: str, supervised: bool = True, launcher: str = CPU2) -> "subprocess.Popen[str]":
    accelerate = str(Path(sys.executable).parent / "accelerate")
    command = [accelerate, "launch", *PORT, *launcher.split(), "-m", "tests.faults", str(ROOT / "train.py"), *words]
    if supervised:
        command = [sys.executable, "-m", "launch.cli", "supervise", *command]
    environment = ENVIRONMENT | {"FAULTS": faults}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _until(done: Callable[[], Any], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _steps(folder: Path) -> int:
    log = folder / "run" / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _weights(folder: Path) -> bytes:
    return (folder / "run" / "model" / "model.safetensors").read_bytes()


def _nothing_left(folder: Path) -> None:
    assert not marked()
    assert not list((folder / "run").rglob(".partial*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, on two processes with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = _finish(_start(_run_file(folder), launcher=CPU2))
    assert code == 0, out + err
    return folder


STOPS: dict[str, Callable[["subprocess.Popen[str]"], Any]] = {
    "SIGTERM to the supervisor": lambda p: os.kill(p.pid, signal.SIGTERM),
    "SIGUSR2 to the supervisor": lambda p: os.kill(p.pid, signal.SIGUSR2),
    "SIGUSR1 to one rank": lambda p: os.kill(ranks()[1].pid, signal.SIGUSR1),
    "SIGTERM to the launcher": lambda p: psutil.Process(p.pid).children()[0].terminate(),
    "SIGTERM to every process, twice": lambda p: [
        os.killpg(p.pid, signal.SIGTERM),
        time.sleep(0.3),
        os.killpg(p.pid, signal.SIGTERM),
    ],
}


@pytest.mark.parametrize(
    "stop",
    [pytest.param(name, marks=[] if name == "SIGTERM to the supervisor" else pytest.mark.slow) for name in STOPS],
)
def test_a_stopped_run_saves_once_and_goes_on_to_the_same_weights(tmp_path: Path, whole: Path, stop: str) -> None:
    run_file = _run_file(tmp_path, whole)
    words = run_file, f"train.loader_workers={int('every' in stop)}"
    process = _launch("embed:3:all:8", *words)  # step 8, in the second epoch, is slow
    _until(lambda: _steps(tmp_path) >= 7, process)
    time.sleep(0.5)
    STOPS[stop](process)
    code, out, err = _finish(process, 60)
    assert code == EXIT_PREEMPTED, out + err
    assert "nestling: stopped" in err and "at step 7, which is saved" in err, err
    assert "every" in stop or "launcher" in stop or "Traceback" not in err, err  # which is torchrun's own
    assert "at step 7" in (tmp_path / "run" / "PREEMPTED").read_text()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"step-5", "step-7"}
    assert not [p.name for p in checkpoints.rglob("rng_state*")]
    _nothing_left(tmp_path)
    code, out, err = _finish(_start(run_file, launcher=CPU2))
    assert code == 0 and "resuming from" in out, out + err
    assert not (tmp_path / "run" / "PREEMPTED").exists()
    assert [line["step"] for line in _curve(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in _curve(tmp_path / "run")] == [line["loss"] for line in _curve(whole / "run")]
    assert _weights(tmp_path) == _weights(whole)


PLACES = {"cache": "cache:20:all:0", "evaluation": "evaluation:20:all:12"}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_stop_where_there_is_nothing_to_save_ends_at_once(tmp_path: Path, whole: Path, place: str) -> None:
    """And what is done stays done."""
    run_file = _run_file(tmp_path, whole)
    process = _launch(PLACES[place], run_file)
    out: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        out.append(line)
        if sum("fault: " in line for line in out) == 2:
            break
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = _finish(process, 60)
    assert time.monotonic() - started < 15
    assert code == EXIT_PREEMPTED and "nestling: stopped by SIGTERM; the same command goes on" in err, err
    assert (tmp_path / "run" / "PREEMPTED").exists()
    _nothing_left(tmp_path)
    code, said, err = _finish(_start(run_file, launcher=CPU2))
    assert code == 0 and ("resuming from" in said) == (place == "evaluation"), said + err
    assert _weights(tmp_path) == _weights(whole)


@pytest.mark.slow
def test_a_stop_during_a_checkpoint_waits_for_it(tmp_path: Path, whole: Path) -> None:
    run_file = _run_file(tmp_path, whole)
    process = _launch("checkpoint:3:0:5", run_file)
    _until(lambda: _steps(tmp_path) >= 5, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, out, err = _finish(process, 60)
    assert code == EXIT_PREEMPTED and "at step 5, which is saved" in err, out + err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-5"]
    _nothing_left(tmp_path)
    code, out, err = _finish(_start(run_file, launcher=CPU2))
    assert code == 0 and _weights(tmp_path) == _weights(whole), out + err


KILLED = {
    "a rank": lambda p: ranks()[1].kill(),
    "the launcher": lambda p: psutil.Process(p.pid).children()[0].kill(),
    "all ranks": lambda p: [ranks()[0].kill(), ranks()[1].kill()],
}


@pytest.mark.parametrize(
    "who", [pytest.param(w, marks=[] if w == "the launcher" else pytest.mark.slow) for w in KILLED]
)
def test_the_supervisor_goes_on_after_a_kill(tmp_path: Path, whole: Path, who: str) -> None:
    process = _launch("embed:3:all:8", _run_file(tmp_path, whole))
    _until(lambda: _steps(tmp_path) >= 7, process)
    KILLED[who](process)
    code, out, err = _finish(process, 120)
    assert code == 0 and "restart 1 of 3" in err and "resuming from" in out, out + err
    assert _weights(tmp_path) == _weights(whole)
    _nothing_left(tmp_path)


@pytest.mark.slow
def test_a_killed_supervisor_leaves_a_run_that_saves_and_ends(tmp_path: Path) -> None:
    process = _launch("embed:3:all:8", _run_file(tmp_path))
    _until(lambda: _steps(tmp_path) >= 7, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while marked() and time.monotonic() < deadline:
        time.sleep(0.2)
    _nothing_left(tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "step-7").exists()


@pytest.mark.slow
def test_one_process_without_a_launcher(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults", str(ROOT / "train.py"), run_file],
        cwd=ROOT,
        env=ENVIRONMENT | {"FAULTS": "embed:3:0:8"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _until(lambda: _steps(tmp_path) >= 7, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = _finish(process, 60)
    assert code == EXIT_PREEMPTED, out + err


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in _curve(folder / "run")]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 7])
def test_other_numbers_of_processes_go_on_with_the_same_curve(tmp_path: Path, batch: int) -> None:
    """1, 2, 3 and 2 processes by turns, 30 steps each, beside one process alone; 7 rows are shared by none of them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["train.optim=sgd", "train.learning_rate=0.01", "train.epochs=20", f"train.global_batch_size={batch}"]
    words += ["evaluate=null", "checkpoint.every=10"]
    one = _run_file(whole, dropout=0.0)
    code, out, err = _finish(_start(one, *words, "train.max_steps=120"))
    assert code == 0, out + err
    other = _run_file(parts, whole, dropout=0.0)
    for turn, processes in enumerate((1, 2, 3, 2), start=1):
        launcher = f"--config_file {ROOT}/configs/accelerate/cpu.yaml --num_processes {processes}"
        if processes == 1:
            launcher = f"--config_file {ROOT}/configs/accelerate/single.yaml"
        process = _launch(f"embed:20:all:{30 * turn + 1}", other, *words, "train.max_steps=120", launcher=launcher)
        if turn < 4:
            _until(lambda steps=30 * turn: _steps(parts) >= steps, process)
            process.send_signal(signal.SIGTERM)
        code, out, err = _finish(process, 120)
        assert code == (EXIT_PREEMPTED if turn < 4 else 0), out + err
        assert f"over {processes} process(es)" in out and ("resuming from" in out) == (turn > 1)
    assert len(_losses(parts)) == 120
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-5)


def test_what_may_go_on_and_what_begins_anew(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path)
    words = "evaluate=null", "train.max_steps=2", "checkpoint.every=1"

    def started(*more: str) -> tuple[int, str, str]:
        return _finish(_start(run_file, *words, *more))

    code, out, err = started("train.max_steps=4", "train.grace_seconds=1e-9", "checkpoint.every=100")
    assert code == 0 and "train.grace_seconds" not in out, out + err  # there was one checkpoint, at the end
    code, _, err = started()
    assert code == 2 and "holds a run that finished" in err and "--fresh" in err, err
    code, out, err = started("--fresh")
    assert code == 0 and "resuming" not in out, out + err
    assert len(_curve(tmp_path / "run")) == 4 and len(_curve(tmp_path / "run-2")) == 2
    # As if it had been killed before its end.
    record = json.loads((tmp_path / "run-2" / "run.json").read_text())
    (tmp_path / "run-2" / "run.json").write_text(json.dumps(record | {"finished": None}))
    here = f"train.run_dir={tmp_path}/run-2"
    code, _, err = started(here, "train.max_steps=3", "loss.arguments={scale: 10.0}")
    assert code == 2 and "loss.arguments.scale, train.max_steps" in err and "--force" in err, err
    code, out, err = started(here, "train.max_steps=3", "loss.arguments={scale: 10.0}", "--force")
    assert code == 0 and "resuming from" in out and "other settings (loss.arguments.scale" in err, out + err
    assert [line["step"] for line in _curve(tmp_path / "run-2")] == [1, 2, 3]
    # On other rows, and with other code.
    record = json.loads((tmp_path / "run-2" / "run.json").read_text())
    other = {"finished": None, "git": {"commit": "abc", "dirty": False}}
    (tmp_path / "run-2" / "run.json").write_text(json.dumps(record | other))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"anchor": "one more", "positive": "row"}\n')
    last = here, "train.max_steps=3", "loss.arguments={scale: 10.0}"
    code, _, err = started(*last)
    assert code == 2 and "holds an unfinished run on other rows (" in err and "train.jsonl has changed since)" in err, (
        err
    )
    code, out, err = started(*last, "--force")
    assert code == 0 and "going on with an unfinished run on other rows" in err, out + err
    assert "the run began with other versions, so bits may differ: commit of nestling abc -> " in out, out


@pytest.mark.slow
def test_checkpoints_that_take_longer_than_the_grace_period_are_written_more_often(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path)
    words = "train.grace_seconds=1", "evaluate=null", "checkpoint.every=null"
    code, out, err = _finish(_launch("checkpoint:2:0:6", run_file, *words, supervised=False))
    assert code == 0, out + err
    assert out.count("(train.grace_seconds): one every ") == 1, out


@pytest.mark.slow
@pytest.mark.parametrize("place", ["embed", "replay"])
@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_a_stop_under_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, place: str) -> None:
    """In the first pass, where nothing is lost, and after backwards, which leave buffers of the engine full."""
    monkeypatch.setitem(ENVIRONMENT, "FAULT_ENGINE", "1")
    launcher = f"--config_file {ROOT}/configs/accelerate/{engine}.yaml --num_processes 2"
    losses = []
    for stopped in (False, True):
        folder = tmp_path / str(stopped)
        run_file = _run_file(folder, tmp_path / "False" if stopped else None)
        if stopped:
            process = _launch(f"{place}:3:all:8", run_file, launcher=launcher)
            _until(lambda folder=folder: _steps(folder) >= 7, process)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            code, out, err = _finish(process, 90)
            assert code == EXIT_PREEMPTED and "at step 7, which is saved" in err, out + err
        code, out, err = _finish(_launch("", run_file, launcher=launcher))
        assert code == 0 and ("resuming from" in out) == stopped, out + err
        losses.append(_losses(folder))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_an_optimiser_state_in_shards_on_other_numbers_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Adam's moments: FSDP2 deals them anew to 3 processes and back to 2, ZeRO says that it does not."""
    monkeypatch.setitem(ENVIRONMENT, "FAULT_ENGINE", "1")
    launcher = f"--config_file {ROOT}/configs/accelerate/{engine}.yaml --num_processes "
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_file = _run_file(whole, dropout=0.0)
    code, out, err = _finish(_launch("", run_file, launcher=launcher + "2"))
    assert code == 0, out + err
    run_file = _run_file(parts, whole, dropout=0.0)
    for stop, processes in ((4, 2), (8, 3), (None, 2)):
        process = _launch(f"embed:20:all:{(stop or 98) + 1}", run_file, launcher=launcher + str(processes))
        if stop and (engine == "fsdp2" or processes == 2):
            _until(lambda stop=stop: _steps(parts) >= stop, process)
            process.send_signal(signal.SIGTERM)
        code, out, err = _finish(process, 120)
        if engine != "fsdp2" and processes == 3:
            assert code == 2 and "of 2 processes, got 3" in err, out + err
            assert "[rank" not in err, err
            continue
        assert code == (EXIT_PREEMPTED if stop else 0), out + err
        assert ("resuming from" in out) == (stop != 4)
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-5)


@pytest.mark.slow
def test_another_machine_goes_on_from_the_bucket_alone(tmp_path: Path, whole: Path, s3: str) -> None:
    run_file, url = _run_file(tmp_path, whole), "checkpoint.remote=s3://bucket/runs/one"
    process = _launch("embed:3:all:8", run_file, url)
    _until(lambda: _steps(tmp_path) >= 7, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = _finish(process, 90)
    assert code == EXIT_PREEMPTED and "at step 7, which is saved" in err, out + err
    assert "secret" not in out + err + (tmp_path / "run" / "run.json").read_text()
    for gone in ("run", "cache"):
        shutil.rmtree(tmp_path / gone)
    code, _, err = _finish(_launch("", run_file, url, "train.learning_rate=1.0", supervised=False))
    assert code != 0 and "other settings (train.learning_rate)" in err, err  # the bucket knows the run
    code, out, err = _finish(_launch("", run_file, url))
    assert code == 0 and "step-7" in out, out + err
    assert [line["step"] for line in _curve(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert _weights(tmp_path) == _weights(whole)
    _nothing_left(tmp_path)

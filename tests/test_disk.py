"""Runs on disks, with clocks and beside buckets that fail: `python -m pytest tests/test_disk.py`."""

import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import ranks
from tests.test_preemption import STEPS, _launch, _run_file, _steps, _until
from tests.test_run import ENVIRONMENT, _curve, _finish
from trainer.checkpoint import Writer, find_latest, folder_of, partial_name

pytestmark = pytest.mark.usefixtures("no_process_left")
DISK = {2: "ENOSPC", 4: "EROFS", 6: "EACCES", 8: "3"}  # what each checkpoint meets; the last is 3 s of a slow disk


@pytest.mark.slow
def test_a_run_goes_on_where_checkpoints_cannot_be_written_and_the_clock_goes_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "FAULT_CLOCK", "1")
    faults = " ".join(f"publish:{kind}:0:{step}" for step, kind in DISK.items()) + " folder:ENOSPC:0:10"
    words = _run_file(tmp_path), "checkpoint.every=2", "checkpoint.keep=9", "evaluate=null"
    code, out, err = _finish(_launch(faults, *words))
    assert code == 0 and "Traceback" not in err, out + err
    full = "No space left on device"
    for step, reason in ((2, full), (4, "Read-only file system"), (6, "Permission denied"), (10, full)):
        assert err.count(f"cannot write {folder_of(tmp_path / 'run', step)}: [Errno") == 1 and reason in err, err
    assert err.count("training goes on") == 4, err
    there = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert there == {"step-8", "step-12"}
    lines: list[Any] = _curve(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    seconds = [second for line in lines for second in line["seconds"].values()]
    assert seconds and min(seconds) >= 0, seconds


def test_a_full_disk_that_torch_meets_is_said_like_any_other(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 2)
    writer.begin(4, True)
    writer.later(lambda: torch.save({"a": torch.zeros(9)}, "/dev/full"))
    writer.publish(partial_name(tmp_path, 4), 4, {}, None)
    writer.wait()
    assert writer.problem and f"cannot write {folder_of(tmp_path, 4)}: " in writer.problem, writer.problem
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_last_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    code, out, err = _finish(_launch(f"publish:ENOSPC:0:{STEPS}", _run_file(tmp_path)))
    assert code == 2 and f"checkpoint of step {STEPS}: cannot write" in err, out + err
    assert err.count("Traceback") == 1, err  # the launcher's own
    warnings: list[str] = []
    assert find_latest(tmp_path / "run", warnings.append) == folder_of(tmp_path / "run", 10) and not warnings
    code, out, err = _finish(_launch("", _run_file(tmp_path, tmp_path)))
    assert code == 0 and "step-10" in out, out + err


@pytest.mark.slow
def test_a_bucket_that_is_gone_in_the_middle_ends_no_run(tmp_path: Path, s3: str) -> None:
    process = _launch("embed:3:all:8", _run_file(tmp_path), "checkpoint.remote=s3://bucket/runs/one")
    _until(lambda: _steps(tmp_path) >= 7 and ranks(), process)
    urllib.request.urlopen(urllib.request.Request(f"{s3}/moto-api/reset", method="POST"))
    code, out, err = _finish(process, 120)
    assert code == 0, out + err
    assert "there is no such bucket" in err and "the checkpoint is on this disk only" in err, err
    assert len(_curve(tmp_path / "run")) == STEPS and (tmp_path / "run" / "model").exists()

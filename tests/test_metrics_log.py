"""The log of a run on disks that fill up, and cut back at a resume: `python -m pytest tests/test_metrics_log.py`."""

import json
import logging
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.metrics_log import StepLog, rewind


def _log(log: StepLog, steps: range) -> None:
    for step in steps:
        state: Any = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=10**9, epoch=0.5)
        log.on_log(None, state, None, {"loss": 1.0})


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_that_a_full_disk_refused_are_written_when_it_takes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may grow beyond 1,000 bytes for a while; of the line that meets the limit the kernel writes a part."""
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with caplog.at_level(logging.WARNING, "nestling"):
            _log(log, range(1, 30))
            written = _steps(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert written == list(range(1, len(written) + 1)) and 2 < len(written) < 29
    assert len(caplog.records) == 1 and "metrics.jsonl: cannot be written: " in caplog.text
    _log(log, range(30, 32))
    assert _steps(path) == list(range(1, 32))


def test_a_resume_reads_only_what_it_cuts_off(tmp_path: Path) -> None:
    """A hole of a terabyte before the last lines stands for the steps that are done."""
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.seek(1 << 40)
        file.write(b"\n" + b"".join(b'{"step": %d}\n' % step for step in range(1000, 1010)) + b'{"step": 10')
    rewind(path, 1004)
    with path.open("rb") as file:
        file.seek(1 << 40)
        assert [json.loads(line)["step"] for line in file.read().splitlines() if line] == list(range(1000, 1005))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ('{"step": 1', ""),
        ('{"step": 1}\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 3}\n{"step": 4}\n', '{"step": 1}\n'),
        ('{"step": 1}\n{"st\n{"step": 4}\n', '{"step": 1}\n'),
        ('{"step": 3}\n', ""),
    ],
)
def test_what_a_resume_keeps(tmp_path: Path, text: str, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    rewind(path, 2)
    assert not path.exists()
    path.write_text(text)
    rewind(path, 2)
    assert path.read_text() == kept

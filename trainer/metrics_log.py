"""Where a run's numbers go: one line per logged step to metrics.jsonl and to the terminal.

TensorBoard, Weights & Biases and MLflow get the same numbers through the Trainer's own callbacks.
"""

import errno
import json
import logging
import math
import mmap
import os
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

_KEPT_LINES = 10_000  # some 5 MB


class StepLog(TrainerCallback):
    """Writes metrics.jsonl and prints a line per logged step. Rank 0 only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_print = 0.0
        self._lines: deque[bytes] = deque(maxlen=_KEPT_LINES)  # not written yet
        self._is_failing = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._lines.append(json.dumps(record(logs, state.global_step, state.epoch)).encode() + b"\n")
        self._write()
        # A terminal gets every line; a log file one in ten seconds, and always the first and the last.
        now = time.monotonic()
        told = state.global_step in (1, state.max_steps) or any(name.startswith("eval_") for name in logs)
        if told or sys.stderr.isatty() or now - self._last_print >= 10:
            self._last_print = now
            print(line(logs, state.global_step, state.max_steps), flush=True)

    def _write(self) -> None:
        """Append what is not written yet, or say once that it cannot be; never a part of a line."""
        text = b"".join(self._lines)
        try:
            with self._path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if file.write(text) < len(text):  # what the disk had room for
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._is_failing:
                say = (
                    "%s: cannot be written: %s; training goes on, the last %s lines are kept and written when it can be"
                )
                logging.getLogger("nestling").warning(say, self._path, error.strerror, f"{_KEPT_LINES:,}")
            self._is_failing = True
            return
        self._lines.clear()
        self._is_failing = False


class Board(TensorBoardCallback):
    """TensorBoard's curves, without which a run goes on where the disk is full; each log is another try."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        try:
            super().on_log(args, state, control, logs, **more)
        except OSError:  # StepLog says so of its own file
            self.tb_writer = None


def rewind(path: Path, step: int) -> None:
    """Cut off the lines after `step`, which a run that resumes there writes again, and one that was cut short.

    Reads what it cuts off, and one line before: a log of a million steps is not read.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            end = text.rfind(b"\n") + 1
            while end:
                begin = text.rfind(b"\n", 0, end - 1) + 1
                with suppress(ValueError):
                    if json.loads(text[begin:end])["step"] <= step:
                        break
                end = begin
        file.truncate(end)


def record(logs: dict[str, float], step: int, epoch: float | None) -> dict[str, Any]:
    """One line of metrics.jsonl from the Trainer's flat logs: `loss_384` becomes `loss_by_dim["384"]`,
    `eval_loss_384` likewise.

    What is not finite becomes null, which JSON has: the norm of a step that the scaler of fp16 skipped.
    """
    nested: dict[str, Any] = {"step": step, "epoch": epoch, "loss_by_dim": {}, "seconds": {}}
    for key, number in logs.items():
        value = number if math.isfinite(number) else None
        name, _, rest = key.partition("_")
        if name == "loss" and rest.isdigit():
            nested["loss_by_dim"][rest] = value
        elif key.startswith("eval_loss_"):
            nested.setdefault("eval_loss_by_dim", {})[key.removeprefix("eval_loss_")] = value
        elif name == "seconds":
            nested["seconds"][rest] = value
        elif key != "epoch":
            nested[key] = value
    return nested


def line(logs: dict[str, float], step: int, steps: int) -> str:
    """What the terminal shows of a step."""
    parts = [f"step {step}/{steps}", f"loss {logs['loss']:.4f}", f"lr {logs.get('learning_rate', 0):.2e}"]
    if "eval_loss" in logs:
        parts.insert(2, f"held-out loss {logs['eval_loss']:.4f}")
    measured = [name for name in logs if "@" in name]
    if measured:  # the first is of the largest dim
        parts.insert(2, f"{measured[0].removeprefix('eval_').replace('_', ' at ')} dims {logs[measured[0]]:.4f}")
    if "grad_norm" in logs:
        parts.append(f"grad norm {logs['grad_norm']:.3f}")
    if "real_tokens_per_s" in logs:
        parts.append(f"{logs['real_tokens_per_s']:,.0f} tokens/s")
    if "padded_over_real" in logs:
        parts.append(f"padded/real {logs['padded_over_real']:.2f}")
    return "  ".join(parts)

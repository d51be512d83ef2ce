"""Where a run's numbers go: one line per logged step to metrics.jsonl and to the terminal.

TensorBoard, Weights & Biases and MLflow get the same numbers through the Trainer's own callbacks.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class StepLog(TrainerCallback):
    """Writes metrics.jsonl and prints a line per logged step. Rank 0 only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_print = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record(logs, state.global_step, state.epoch)) + "\n")
        # A terminal gets every line; a log file one in ten seconds, and always the first and the last.
        now = time.monotonic()
        told = state.global_step in (1, state.max_steps) or any(name.startswith("eval_") for name in logs)
        if told or sys.stderr.isatty() or now - self._last_print >= 10:
            self._last_print = now
            print(line(logs, state.global_step, state.max_steps), flush=True)


def rewind(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a run that resumes there writes again, and one that was cut short."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except ValueError:
            continue
    path.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")


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

"""Starts train.py on a machine where one rank has little memory: `-m tests.limited_memory PHASE TOKENS train.py ...`.

Rank 1 is out of memory for micro-batches of more than TOKENS padded tokens in a PHASE of the step: embed (the first
pass), replay (not the last) or last (the replay that synchronises). torch's allocator on a CPU raises no such error.
"""

import os
import runpy
import sys
from typing import Any

import torch

from launch.world import engine_asked_for
from tests.cpu_engines import use_gloo
from trainer import engines


def limit(phase: str, tokens: int) -> None:
    """Patch this process's engines."""
    for engine in (engines.Single, engines.DDP, engines.FSDP2, engines.ZeRO):
        setattr(engine, "forward", _limited(engine.forward, phase, tokens))  # noqa: B010


def _limited(forward: Any, phase: str, tokens: int) -> Any:
    def limited(self: Any, features: dict[str, Any], synchronise: bool) -> torch.Tensor:
        now = "embed" if not torch.is_grad_enabled() else "last" if synchronise else "replay"
        if phase == now and features["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("as CUDA says it")
        return forward(self, features, synchronise)

    return limited


if __name__ == "__main__":
    if engine_asked_for():
        use_gloo()
    if os.environ["RANK"] == "1":
        limit(sys.argv[1], int(sys.argv[2]))
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""Makes a rank of a run raise, end or stand still at a stated place of a stated step, for tests only.

`FAULTS="PLACE:KIND:RANK:STEP ..." python -m tests.faults train.py RUN.yaml ...` is train.py with these faults. Kinds:
raise, user (a UserError), an OSError by its name (ENOSPC), kill, stop, term, sleep (forever), or seconds to sleep.
FAULT_ENGINE=1 runs the launcher's engine over gloo, FAULT_NODES=1 has each launcher's ranks believe that they are on a
machine of their own, FAULT_CLOCK=1 has the wall clock go backwards.
"""

import errno
import importlib
import os
import runpy
import signal
import sys
import time
from typing import Any

import torch

from launch.errors import UserError

# What a fault comes before. `backward` is the one that reduces gradients, `worker` is in a loader worker.
WHERE = {
    "embed": ("trainer.gradcache", "GradCache._embed_all"),
    "loss": ("trainer.gradcache", "GradCache._gradient_at_home"),
    "replay": ("trainer.gradcache", "GradCache._agree"),
    "library": ("sentence_transformers", "SentenceTransformerTrainer.compute_loss"),
    "worker": ("trainer.loader", "Steps.__getitem__"),
    "cache": ("trainer.exact_step", "token_cache"),
    "held_out": ("trainer.gradcache", "GradCache.loss"),
    "checkpoint": ("trainer.checkpoint", "partial_name"),
    "folder": ("trainer.checkpoint", "partial_of"),
    "publish": ("trainer.checkpoint", "publish"),  # in the thread that writes
    "evaluation": ("trainer.embedder", "ModelEmbedder.lengths"),
}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def fail(kind: str) -> None:
    """What is to happen, in the process that it is to happen to; says when, for the test's clock."""
    print(f"fault: {time.time()}", flush=True)
    if kind == "raise":
        raise ValueError("made by the test")
    if kind == "user":
        raise UserError("made by the test")
    if hasattr(errno, kind):
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
        time.sleep(5 * (kind == "term"))
    else:
        time.sleep(1e6 if kind == "sleep" else float(kind))


def install(place: str, kind: str, step: int) -> None:
    """Patch this process, which is the rank."""
    from trainer.trainer import ContrastiveTrainer

    now = 0
    training_step = ContrastiveTrainer.training_step

    def counted(self: ContrastiveTrainer, *arguments: Any, **named: Any) -> Any:
        nonlocal now
        now = self.state.global_step + 1
        return training_step(self, *arguments, **named)

    setattr(ContrastiveTrainer, "training_step", counted)  # noqa: B010  (a method to the type checker)
    module, path = WHERE["replay" if place == "backward" else place]
    target: Any = importlib.import_module(module)
    *holders, name = path.split(".")
    for holder in holders:
        target = getattr(target, holder)
    original = getattr(target, name)

    def replaced(*arguments: Any, **named: Any) -> Any:
        at = arguments[1] + 1 if place == "worker" else now
        if place == "publish":  # training has gone on
            at = int(arguments[1].name.removeprefix("step-"))
        if place in ("replay", "backward") and len(arguments) < 3:  # the agreement after the first pass
            at = 0
        if at == step and place != "backward":
            fail(kind)
        result = original(*arguments, **named)
        if at == step and place == "backward":
            setattr(torch.Tensor, "backward", lambda *_, **__: fail(kind))  # noqa: B010
        return result

    setattr(target, name, replaced)


if __name__ == "__main__":
    if os.environ.get("FAULT_ENGINE"):
        from tests.cpu_engines import use_gloo

        use_gloo()
    if os.environ.get("FAULT_NODES"):
        setattr(importlib.import_module("trainer.watch"), "_pid_namespace", lambda: os.environ["GROUP_RANK"])  # noqa: B010
    if os.environ.get("FAULT_CLOCK"):
        begin = time.time() + 5 * time.monotonic()
        time.time = lambda: begin - 5 * time.monotonic()
    for fault in os.environ["FAULTS"].split():
        where, what, rank, when = fault.split(":")
        if rank in ("all", os.environ.get("RANK", "0")):
            install(where, what, int(when))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

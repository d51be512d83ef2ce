"""run.json: everything that is needed to know what a run was and to do it again.

Written at the start (so that a killed run is known), completed at the end. Nothing of the environment is
copied, so no credential can end up in it.
"""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from launch.config import RunConfig
from launch.world import World

_PACKAGES = (
    "nestling",
    "torch",
    "sentence-transformers",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "peft",
    "deepspeed",
)


def start_record(config: RunConfig, argv: list[str], world: World, data: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a run that begins now."""
    return {
        "run_id": uuid.uuid4().hex,
        "config": config.model_dump(mode="json"),
        "argv": argv,
        "command": "accelerate launch train.py " + " ".join(argv),
        "git": _git(Path(__file__).parent),
        "versions": versions(),
        "devices": _devices(world),
        "world": {"processes": world.world_size, "processes_per_node": world.local_world_size, "nodes": world.nodes},
        "data": data,
        "started": now(),
        "finished": None,
        "seconds": {},
    }


def now() -> str:
    """This moment in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _devices(world: World) -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"CPU {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads per process"]


def _git(folder: Path) -> dict[str, Any]:
    def ask(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(folder), *words]
            return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
        except (OSError, subprocess.SubprocessError):
            return None

    status = ask("status", "--porcelain")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}

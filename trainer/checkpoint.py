"""Checkpoints that are whole or absent: written aside, listed in a manifest, renamed, found again by checking.

A checkpoint is `checkpoints/step-N/` with weights (safetensors), optimiser, scheduler, trainer state and
`manifest.json` (size and SHA-256 of every file, written last). Nothing is resumed from a folder whose files
differ from its manifest.
"""

import json
from collections.abc import Callable
from pathlib import Path

from launch.errors import UserError
from launch.files import list_files, publish_folder, remove_folder, write_json

MANIFEST = "manifest.json"
_PREFIX = "step-"
# Pruning below this would leave nothing to fall back to when the newest one is damaged on disk.
KEPT_AT_LEAST = 2


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return run_dir / "checkpoints" / f"{_PREFIX}{step}"


def partial_name(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is published."""
    return run_dir / "checkpoints" / f".partial-{step}"


def partial_of(run_dir: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step into; a leftover is removed."""
    partial = partial_name(run_dir, step)
    remove_folder(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path, facts: dict[str, object]) -> None:
    """Write the manifest of `partial` and rename it to `final`. One process only, after all ranks have written.

    `facts` (step, fingerprints) go into the manifest beside the files.
    """
    write_json(partial / MANIFEST, {"format": 1, **facts, "files": list_files(partial)})
    publish_folder(partial, final)


def problem_with(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be used, None if every file is what its manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        listed = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{checkpoint}: no readable {MANIFEST}"
    found = list_files(checkpoint)
    found.pop(MANIFEST, None)
    for name in sorted({*listed, *found}):
        if listed.get(name) != found.get(name):
            state = "missing" if name not in found else "not in the manifest" if name not in listed else "changed"
            return f"{checkpoint}: {name} is {state}"
    return None


def find_latest(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none; each damaged one is named through `warn`."""
    for step in sorted(_steps(run_dir), reverse=True):
        checkpoint = folder_of(run_dir, step)
        if (problem := problem_with(checkpoint)) is None:
            return checkpoint
        warn(f"{problem}; falling back to an older checkpoint")
    return None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder was written at."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def refuse_other_engine(checkpoint: Path, engine: str) -> None:
    """Raise UserError where another engine wrote the optimiser state of a checkpoint."""
    wrote = json.loads((checkpoint / MANIFEST).read_text())["engine"]
    if wrote != engine:
        where = f"configs/accelerate/{wrote}.yaml{' or cpu.yaml' if wrote == 'ddp' else ''}"
        raise UserError(
            f"{checkpoint}: its optimiser state is one of {wrote}, got {engine}; go on with {where}, or begin a new "
            f"run with model.path={checkpoint}: any engine reads its weights"
        )


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (at least two stay) and every leftover partial folder."""
    steps = sorted(_steps(run_dir))
    for step in steps[: -max(keep, KEPT_AT_LEAST)]:
        remove_folder(folder_of(run_dir, step))
    for partial in (run_dir / "checkpoints").glob(".partial-*"):
        remove_folder(partial)


def _steps(run_dir: Path) -> list[int]:
    names = (p.name for p in (run_dir / "checkpoints").glob(f"{_PREFIX}*") if p.is_dir())
    return [int(n.removeprefix(_PREFIX)) for n in names if n.removeprefix(_PREFIX).isdigit()]

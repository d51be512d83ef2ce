"""Checkpoints that are whole or absent: written aside, listed in a manifest, renamed, found again by checking.

A checkpoint is `checkpoints/step-N/` with weights (safetensors), optimiser, scheduler, trainer state and
`manifest.json` (size and SHA-256 of every file, written last). Nothing is resumed from a folder whose files
differ from its manifest.
"""

import atexit
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from launch.errors import EXIT_CRASH, UserError
from launch.files import digest_of, list_files, publish_folder, remove_folder, write_json

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
    # A changed manifest is seen by its own digest; a forged one is not.
    manifest = {"format": 1, **facts, "files": list_files(partial)}
    write_json(partial / MANIFEST, manifest | {"digest": digest_of(manifest)})
    publish_folder(partial, final)


class Unreadable(UserError):
    """A disk that does not give what lies there, which says nothing about the checkpoint: the next time it may."""

    code = EXIT_CRASH


def problem_with(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be used, None if every file is what its manifest says; raises Unreadable."""
    try:
        return _problem_with(checkpoint)
    except OSError as error:
        raise Unreadable(f"{error.filename or checkpoint}: cannot be read: {error.strerror}") from None


def _problem_with(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        listed, digest = manifest["files"], manifest.pop("digest")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint}: no readable {MANIFEST}"
    if digest != digest_of(manifest) or manifest.get("step") != step_of(checkpoint):
        return f"{checkpoint}: {MANIFEST} is changed, or of another step"
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


def refuse_other_engine(checkpoint: Path, engine: str, processes: int) -> None:
    """Raise UserError where another engine, or ZeRO on another number of processes, wrote the optimiser state."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    wrote, anew = manifest["engine"], f"begin a new run with model.path={checkpoint}: any engine reads its weights"
    if wrote != engine:
        where = f"configs/accelerate/{wrote}.yaml{' or cpu.yaml' if wrote == 'ddp' else ''}"
        raise UserError(
            f"{checkpoint}: its optimiser state is one of {wrote}, got {engine}; go on with {where}, or {anew}"
        )
    if engine.startswith("zero") and manifest["processes"] != processes:
        raise UserError(
            f"{checkpoint}: its optimiser state is one of {manifest['processes']} processes, got {processes}, to which "
            f"DeepSpeed does not deal it anew; go on with --num_processes {manifest['processes']}, or {anew}"
        )


def prune(run_dir: Path, keep: int, best: int | None = None, uploading: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints (two at least), the `best` and the one that is `uploading`, and what
    is half-written."""
    steps = sorted(set(_steps(run_dir)) - {best, uploading})
    for step in steps[: -max(keep, KEPT_AT_LEAST)]:
        remove_folder(folder_of(run_dir, step))
    for partial in (run_dir / "checkpoints").glob(".partial-*"):
        remove_folder(partial)


class Uploads(Protocol):
    """What checkpoints are handed to, see trainer/remote.py."""

    uploading: int | None

    def add(self, checkpoint: Path, keep: int, best: int | None) -> None: ...


class Writer:
    """Writes and publishes checkpoints in a thread of rank 0, one after the other, while training goes on.

    A checkpoint that cannot be written is said and leaves the older ones as they are; the next one is another try.
    """

    def __init__(self, run_dir: Path, keep: int, uploads: Uploads | None = None) -> None:
        self._run_dir, self._keep, self._uploads = run_dir, keep, uploads
        self._work: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self.problem: str | None = None  # of the last checkpoint
        self.seconds = 0.0  # from the beginning of the last checkpoint to its end
        atexit.register(self.wait)

    def begin(self, step: int, writes: bool) -> None:
        """Wait for the checkpoint before; on the rank that `writes`, make the folder that this one is written into."""
        self.wait()
        self._began = time.monotonic()
        self._work.clear()
        self.problem = None
        if writes:
            partial_of(self._run_dir, step)

    def later(self, work: Callable[[], None]) -> None:
        """Have the thread do `work` before it publishes."""
        self._work.append(work)

    def publish(self, written: Path, step: int, facts: dict[str, Any], best: int | None) -> None:
        """Have the thread write what is left to do of `written`, and publish it as the checkpoint of `step`."""

        def write() -> None:
            try:
                for work in self._work:
                    work()
                (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                publish(written, folder_of(self._run_dir, step), {"step": step, **facts})
                if self._uploads:
                    self._uploads.add(folder_of(self._run_dir, step), self._keep, best)
                prune(self._run_dir, self._keep, best, self._uploads.uploading if self._uploads else None)
            except Exception as error:
                self.fail(step, error)
            self.seconds = time.monotonic() - self._began

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def fail(self, step: int, error: Exception) -> None:
        """Keep why the checkpoint of `step` is not there, and remove what there is of it."""
        # A full disk comes as an OSError from Python, and as a text from safetensors and torch.
        texts = "os error", "file write failed", "iostream error"
        if not (isinstance(error, OSError) or any(text in str(error) for text in texts)):
            self.problem = f"checkpoint of step {step}: {type(error).__name__}: {error}"
        else:
            where, reason = folder_of(self._run_dir, step), str(error).splitlines()[0]
            self.problem = f"checkpoint of step {step}: cannot write {where}: {reason}"
        remove_folder(partial_name(self._run_dir, step))

    def wait(self) -> None:
        """Until what was begun is published."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def copied(state: Any, into: Any = None) -> Any:
    """`state`, tensors in dicts and lists, copied to the CPU; into the memory of an earlier copy where it fits."""
    if isinstance(state, torch.Tensor):
        if isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (state.shape, state.dtype):
            return into.copy_(state.detach())
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        before = into if isinstance(into, dict) else {}
        return {key: copied(value, before.get(key)) for key, value in state.items()}
    if isinstance(state, list | tuple):
        before = into if isinstance(into, list) and len(into) == len(state) else [None] * len(state)
        return [copied(value, one) for value, one in zip(state, before, strict=True)]
    return state


def _steps(run_dir: Path) -> list[int]:
    names = (p.name for p in (run_dir / "checkpoints").glob(f"{_PREFIX}*") if p.is_dir())
    return [int(n.removeprefix(_PREFIX)) for n in names if n.removeprefix(_PREFIX).isdigit()]

"""The folder of a run: locked while it is written, never shared with another run.

A run that was killed goes on in its folder when the same settings are given again; a finished one, one with other
settings and a folder of something else are refused.
"""

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from launch.config import RunConfig
from launch.errors import UserError
from launch.files import remove_folder
from launch.world import World

# What may differ between the parts of a resumed run: it changes neither the mathematics nor the data.
_FREE = (
    "train.run_dir",
    "train.logging_steps",
    "train.report_to",
    "train.loader_workers",
    "train.stall_seconds",
    "train.grace_seconds",
    "train.micro_batch_tokens",
    "train.graph_memory",
    "train.world_size",
    "data.cache_dir",
    "data.cache_url",
)
LEASE_NOTE = ".lease"  # tells trainer/lease.py that a lease is this folder's own
MARKER = "PREEMPTED"  # of a run that was told to stop and is to be started again
_FIXED = ("model", "data", "loss", "train")
_ANEW = "start anew in another: --fresh, or train.run_dir=FOLDER"


@contextmanager
def held(run_dir: Path, config: RunConfig, world: World, is_forced: bool = False) -> Iterator[Any]:
    """Lock the run folder for this run on rank 0; raises UserError where it belongs to another run.

    Yields the trainer.remote.Remote of a run that has an address for its checkpoints, on rank 0; elsewhere None.

    An unfinished run with other settings goes on with these where that `is_forced`.

    A folder that this run made and left without anything in it is removed again.
    """
    if world.rank:
        yield None
        return
    fresh = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"train.run_dir: cannot write to {run_dir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"train.run_dir: {run_dir} is in use by a run that is going on; {_ANEW}") from None
        try:
            has_record = (run_dir / "run.json").exists()
            if not fresh:
                _refuse_another_run(run_dir, config, is_forced)
            with _remote(config.checkpoint.remote, run_dir) as remote:
                if not has_record:  # the address may have brought one
                    _refuse_another_run(run_dir, config, is_forced)
                (run_dir / MARKER).unlink(missing_ok=True)
                yield remote
        finally:
            if fresh and {p.name for p in run_dir.iterdir()} <= {".lock", LEASE_NOTE}:
                remove_folder(run_dir)


def _remote(url: str | None, run_dir: Path) -> AbstractContextManager[Any]:
    if url is None:
        return nullcontext()
    from trainer.remote import opened  # imports torch, and a mistake is to answer at once

    return opened(url, run_dir, run_dir / LEASE_NOTE)


def mark(run_dir: Path, why: str) -> None:
    """Leave the marker of a run that is to be started again. Any rank may call."""
    with suppress(OSError):  # a node that does not share the folder
        (run_dir / MARKER).write_text(why + "\n")


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """run.json of a run that began here, None if none did. Raises UserError if it cannot be read."""
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"train.run_dir: {run_dir}/run.json is broken; choose another: train.run_dir=FOLDER") from None


def refuse_other_data(run_dir: Path, facts: list[dict[str, Any]], is_forced: bool = False) -> None:
    """Raise UserError where the run in this folder was trained on rows with another content, unless forced."""
    before = (read_record(run_dir) or {}).get("data", facts)
    for old, new in zip(before, facts, strict=False):
        if old["fingerprint"] != new["fingerprint"]:
            _refuse(run_dir, f"on other rows ({new['name']} has changed since)", is_forced)


def _refuse(run_dir: Path, how: str, is_forced: bool) -> None:
    if not is_forced:
        anew = f"{_ANEW}; or go on all the same: --force"
        raise UserError(f"train.run_dir: {run_dir} holds an unfinished run {how}; {anew}")
    logging.getLogger("nestling").warning("--force: going on with an unfinished run %s", how)


def _refuse_another_run(run_dir: Path, config: RunConfig, is_forced: bool) -> None:
    record = read_record(run_dir)
    if record is None:
        others = sorted(p.name for p in run_dir.iterdir() if p.name not in (".lock", LEASE_NOTE, MARKER))
        if others:
            some = ", ".join(others[:3])
            raise UserError(f"train.run_dir: {run_dir} holds files of something else ({some}); {_ANEW}")
        return
    if record.get("finished"):
        raise UserError(f"train.run_dir: {run_dir} holds a run that finished at {record['finished']}; {_ANEW}")
    was, now = _flat(record.get("config", {})), _flat(config.model_dump(mode="json"))
    differing = sorted(
        key for key in {*was, *now} if was.get(key) != now.get(key) and key.split(".")[0] in _FIXED and key not in _FREE
    )
    if differing:
        _refuse(run_dir, f"with other settings ({', '.join(differing)})", is_forced)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [_flat(value, f"{prefix}.{name}".lstrip(".")) for name, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}

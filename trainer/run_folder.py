"""The folder of a run: locked while it is written, never shared with another run.

A run that was killed goes on in its folder when the same settings are given again; a finished one, one with other
settings and a folder of something else are refused.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.config import RunConfig
from launch.errors import UserError
from launch.world import World

# What may differ between the parts of a resumed run: it changes neither the mathematics nor the data.
_FREE = (
    "train.run_dir",
    "train.logging_steps",
    "train.report_to",
    "train.loader_workers",
    "train.stall_seconds",
    "train.micro_batch_tokens",
    "train.graph_memory",
    "train.world_size",
    "data.cache_dir",
    "data.cache_url",
)
_FIXED = ("model", "data", "loss", "train")


@contextmanager
def held(run_dir: Path, config: RunConfig, world: World) -> Iterator[None]:
    """Lock the run folder for this run on rank 0; raises UserError where it belongs to another run.

    A folder that this run made and left without anything in it is removed again.
    """
    if world.rank:
        yield
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
            raise UserError(
                f"train.run_dir: {run_dir} is in use by a run that is going on; choose another: train.run_dir=FOLDER"
            ) from None
        if not fresh:
            _refuse_another_run(run_dir, config)
        try:
            yield
        finally:
            if fresh and [p.name for p in run_dir.iterdir()] == [".lock"]:
                (run_dir / ".lock").unlink()
                run_dir.rmdir()


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """run.json of a run that began here, None if none did. Raises UserError if it cannot be read."""
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"train.run_dir: {run_dir}/run.json is broken; choose another: train.run_dir=FOLDER") from None


def refuse_other_data(run_dir: Path, facts: list[dict[str, Any]]) -> None:
    """Raise UserError where the run in this folder was trained on rows with another content."""
    before = (read_record(run_dir) or {}).get("data", facts)
    for old, new in zip(before, facts, strict=False):
        if old["fingerprint"] != new["fingerprint"]:
            raise UserError(
                f"train.run_dir: {run_dir} holds an unfinished run on other rows: {new['name']} has changed since; "
                "choose another: train.run_dir=FOLDER"
            )


def _refuse_another_run(run_dir: Path, config: RunConfig) -> None:
    record = read_record(run_dir)
    if record is None:
        others = sorted(p.name for p in run_dir.iterdir() if p.name != ".lock")
        if others:
            raise UserError(
                f"train.run_dir: {run_dir} holds files of something else ({', '.join(others[:3])}); "
                "choose another: train.run_dir=FOLDER"
            )
        return
    if record.get("finished"):
        raise UserError(
            f"train.run_dir: {run_dir} holds a run that finished at {record['finished']}; "
            "choose another: train.run_dir=FOLDER, or remove it"
        )
    was, now = _flat(record.get("config", {})), _flat(config.model_dump(mode="json"))
    differing = sorted(
        key for key in {*was, *now} if was.get(key) != now.get(key) and key.split(".")[0] in _FIXED and key not in _FREE
    )
    if differing:
        raise UserError(
            f"train.run_dir: {run_dir} holds an unfinished run with other settings ({', '.join(differing[:5])}); "
            "choose another: train.run_dir=FOLDER"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {
            k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: tree}

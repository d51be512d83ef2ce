"""Files that appear whole or not at all: write to a partial name, flush to disk, rename, flush the parent.

The order is what makes it safe against a power cut: a rename that reaches the disk before the contents would
publish an empty file under the final name.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.errors import UserError


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def existing_above(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next(one for one in (path, *path.parents) if one.exists())


def fsync_path(path: Path) -> None:
    """Flush a file or the entries of a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(partial: Path, final: Path) -> None:
    """Flush everything in `partial` and rename it to `final`, which must not exist yet.

    Raises UserError if `final` exists: a published folder is never touched again.
    """
    for path in partial.rglob("*"):
        if path.is_file() and not path.is_symlink():
            fsync_path(path)
    for path in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
        fsync_path(path)
    if os.path.lexists(final):
        raise UserError(f"{final}: exists already, got a second one to write; choose another folder or remove it")
    partial.rename(final)
    fsync_path(final.parent)


def partial_folder(target: Path) -> Path:
    """Make the folder that becomes `target`, and remove what killed processes of this host left of one."""
    host = socket.gethostname()
    for stale in target.parent.glob(f".partial-{target.name}-{host}-*"):
        pid = int(stale.name.rpartition("-")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            remove_folder(stale)
        except PermissionError:
            pass
    partial = target.with_name(f".partial-{target.name}-{host}-{os.getpid()}")
    remove_folder(partial)
    partial.mkdir(parents=True)
    return partial


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `final` at the end of the block; an exception removes it."""
    partial = partial_folder(final)
    try:
        yield partial
        publish_folder(partial, final)
    finally:
        remove_folder(partial)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which replaces `path` in one step at the end of the block; an exception removes it."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        fsync_path(partial)
        partial.replace(path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step; a reader sees the old file or the new one. Half of a surrogate pair becomes `?`."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, content: Any) -> None:
    """Replace `path` with `content` as JSON in one step."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative name -> {"bytes", "sha256"} of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def remove_folder(folder: Path) -> None:
    """Remove a folder that may be half-written or already gone."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file while inside; other processes of this machine wait. A killed holder leaves no lock behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

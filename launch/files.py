"""Files that appear whole or not at all: write to a partial name, flush to disk, rename, flush the parent.

The order is what makes it safe against a power cut: a rename that reaches the disk before the contents would
publish an empty file under the final name.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.errors import UserError

_BLOCK = 1 << 20  # bytes per read while hashing


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def write_json(path: Path, content: Any) -> None:
    """Replace `path` with `content` as JSON in one step; a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


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

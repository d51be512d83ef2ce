"""Folders of flat arrays: built once per node, keyed by the facts that they were made from, memory-mapped.

`ROOT/KEY/NAME.bin` with a manifest of facts and hashes; a folder whose files differ from its manifest is built again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools import object_store
from data_tools.shards import MANIFEST
from launch.errors import UserError
from launch.files import exclusive, new_folder, remove_folder, write_json


def array_folder(
    root: Path,
    facts: dict[str, Any],
    dtypes: Mapping[str, type[np.generic]],
    build: Callable[[Path], None],
    url: str | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of `facts` by name, read-only; `build` writes their .bin files into the folder that it is given.

    What an object store has at `url`/KEY is fetched instead, and what it has not is uploaded once it is built. Call it
    before the process group exists: the first process of a node builds, the others wait on a file lock. Raises
    UserError where `root` cannot be written or the store does not answer.
    """
    key = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
    folder = root / key
    with exclusive(root / f".{key}.lock"):
        if not _is_whole(folder, facts, dtypes):
            remove_folder(folder)
            try:
                with new_folder(folder) as partial:
                    fetched = url is not None and _fetched(f"{url}/{key}", partial, facts, dtypes)
                    if not fetched:
                        build(partial)
                    files = {name: _hash(partial / f"{name}.bin") for name in dtypes}
                    write_json(partial / MANIFEST, {"facts": facts, "files": files})
                if url is not None and not fetched:
                    object_store.publish_folder_to(f"{url}/{key}", folder)
            except OSError as error:
                raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from error
    return {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in dtypes.items()}


def _fetched(url: str, folder: Path, facts: dict[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether the store has these arrays; then their files lie in `folder`, verified."""
    content = object_store.read_object(url, MANIFEST)
    try:
        manifest = json.loads(content or "null")
        if content is None or manifest["facts"] != facts:
            return False
        digests = {f"{name}.bin": manifest["files"][name] for name in names}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{url}/{MANIFEST}: broken; remove the folder, it is then built and uploaded again") from None
    object_store.fetch_folder(url, folder, digests, _hash)
    return True


def _is_whole(folder: Path, facts: dict[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether the folder holds exactly what its manifest says, hash by hash, and was made for these facts."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["facts"] == facts and all(
            manifest["files"][name] == _hash(folder / f"{name}.bin") for name in names
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

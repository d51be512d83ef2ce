"""`nestling publish BUNDLE TARGET`: a verified bundle to a folder, an object store or the Hugging Face hub.

A reader sees the whole bundle or none: a folder is renamed when it is whole, in an object store the manifest comes
last, at the hub all is one commit. What is published is never changed. Credentials are those that obstore and
huggingface_hub find in the environment; they are no part of TARGET.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from launch.errors import EXIT_DONE, CheckFailed, UserError, exit_code
from launch.files import new_folder
from trainer.export.encoder import MANIFEST, first_line, read_manifest
from trainer.export.verify import verify

_STORES = ("s3", "gs", "az")


def publish(bundle: Path, target: str) -> bool:
    """Bring the folder `bundle` to `target`; False if it is there already.

    Raises CheckFailed for a bundle that does not verify, and UserError where something else lies at `target` or it
    cannot be written. Nothing guards against two different bundles that are sent to one address at the same time.
    """
    require_whole(bundle)
    try:
        parts = urlsplit(target)
    except ValueError as error:
        raise UserError(f"TARGET: {target}: {error}; allowed: a folder or an address") from None
    if parts.scheme in ("", "file"):
        return _to_folder(bundle, Path(unquote(parts.path) if parts.scheme else target))
    if {"@", "?"} & set(target):
        raise UserError("TARGET: got an address with @ or ?, allowed: none; credentials belong in the environment")
    if parts.scheme in _STORES:
        return _to_store(bundle, target.rstrip("/"))
    if parts.scheme == "hf":
        return _to_hub(bundle, target)
    raise UserError(f"{target}: allowed: a folder, file://, {', '.join(f'{name}://' for name in _STORES)} or hf://")


def require_whole(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle that verifies. Raises CheckFailed with every reason why one does not."""
    if problems := verify(bundle):
        raise CheckFailed("\n".join(f"{bundle}: {problem}" for problem in problems))
    return read_manifest(bundle)


def _to_folder(bundle: Path, target: Path) -> bool:
    if target.resolve().is_relative_to(bundle.resolve()):
        raise UserError(f"{target}: lies in the bundle itself, which would change it; choose a folder elsewhere")
    if os.path.lexists(target):
        found = target / MANIFEST
        if not _is_there(bundle, found.read_bytes() if found.is_file() else None, str(target)):
            raise UserError(f"{target}: exists and holds no bundle, allowed: a new folder")
        return False
    try:
        with new_folder(target) as partial:
            shutil.copytree(bundle, partial, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
    return True


def _to_store(bundle: Path, url: str) -> bool:
    from data_tools.object_store import list_objects, publish_folder_to, read_object

    if _is_there(bundle, read_object(url, MANIFEST), url):
        return False
    _check_rest(bundle, list_objects(url), url)
    publish_folder_to(url, bundle, replaces=False)  # another process may have published since the look above
    return True


def _to_hub(bundle: Path, target: str) -> bool:
    from huggingface_hub import HfApi

    api, repo = HfApi(), target.removeprefix("hf://")
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        head = api.model_info(repo, files_metadata=True)
        there = {file.rfilename: file.size or 0 for file in head.siblings or []}
        there.pop(".gitattributes", None)  # the hub's own
        found = Path(api.hf_hub_download(repo, MANIFEST, revision=head.sha)).read_bytes() if MANIFEST in there else None
        if _is_there(bundle, found, target):
            return False
        _check_rest(bundle, there, target)
        # A commit of somebody else after `head` makes the hub refuse this one.
        api.upload_folder(repo_id=repo, folder_path=bundle, parent_commit=head.sha, commit_message="nestling publish")
    except UserError:
        raise
    except Exception as error:  # the hub's HTTP client has exception classes of its own
        raise UserError(f"{target}: {first_line(error)}") from None
    return True


def _is_there(bundle: Path, found: bytes | None, target: str) -> bool:
    """Whether the manifest `found` at `target` is this bundle's. Raises UserError if it is another's."""
    if found is not None and found != (bundle / MANIFEST).read_bytes():
        raise UserError(f"{target}: holds another bundle, which is never changed; choose another address")
    return found is not None


def _check_rest(bundle: Path, there: Mapping[str, int], target: str) -> None:
    """Raise UserError unless every file `there` (name -> bytes) may be what an upload of this bundle left behind."""
    for name, size in there.items():
        if not (bundle / name).is_file() or (bundle / name).stat().st_size != size:
            raise UserError(f"{target}: holds {name}, which is not of this bundle; choose an empty place or remove it")


def main(argv: Sequence[str]) -> int:
    """Publish one bundle and say where it lies."""
    parser = argparse.ArgumentParser(prog="nestling publish", description="Bring a verified bundle to where it is used")
    parser.add_argument("bundle", type=Path, help="folder that holds manifest.json")
    parser.add_argument("target", help="new folder, or address: file://, s3://, gs://, az://, hf://OWNER/NAME")
    arguments = parser.parse_args(argv)
    new = publish(arguments.bundle, arguments.target)
    print(f"{'published' if new else 'already published'}: {arguments.target}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

"""Folders and files in an object store (s3://, gs://, az://), through obstore.

Credentials and endpoint come from the environment variables that obstore reads, such as AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL. A file is written aside and renamed when it is verified; a folder's manifest
is uploaded last, so that half an upload is never taken for one.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_tools.shards import MANIFEST, read_manifest
from launch.errors import UserError
from launch.files import exclusive, new_file, sha256_of
from launch.preflight import require_extra
from launch.rows import SUFFIXES

_AT_ONCE = 8  # files that travel at the same time
_TRIES = 3  # of one file, each with the requests' own retries
_CHUNK = 8 << 20  # bytes held in memory per file


def read_object(url: str, name: str) -> bytes | None:
    """The object `url`/`name` whole, None if there is none. Raises UserError for a bucket that is not there."""
    import obstore

    with _one_line(url):
        try:
            return bytes(obstore.get(_store(url), name).bytes())
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None


def fetch_folder(
    url: str, folder: Path, digests: Mapping[str, str], hash_file: Callable[[Path], str] = sha256_of
) -> None:
    """Bring the files of `digests` (name -> what `hash_file` gives) from `url` into `folder`; whole ones stay.

    Hold a lock where other processes may do the same. Raises UserError where a file is missing or stays different.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = _store(url)

    def fetch(name: str) -> None:
        path = folder / name
        if not path.is_file() or hash_file(path) != digests[name]:
            _fetch(store, url, name, path, lambda partial: hash_file(partial) == digests[name])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, digests))


def publish_folder_to(url: str, folder: Path) -> None:
    """Upload every file of `folder` to `url`, its manifest last. Raises UserError where that cannot be done."""
    import obstore

    store = _store(url)

    def put(path: Path) -> None:
        with _one_line(url):
            obstore.put(store, path.relative_to(folder).as_posix(), path)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(put, [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST]))
    put(folder / MANIFEST)


def fetch_source(url: str, cache_dir: Path, hash_file: Callable[[Path], str]) -> Path:
    """A local copy of a folder of shards or of one file, kept by address and content below `cache_dir`.

    Safe to call from many processes of a node: one fetches, the others wait. `hash_file` gives a file's SHA-256.
    """
    if url.endswith(SUFFIXES):
        return _fetch_file(url, cache_dir, hash_file)
    content = read_object(url, MANIFEST)
    if content is None:
        raise UserError(
            f"{url}: no {MANIFEST} there; allowed: a folder of shards, or one file ending in {', '.join(SUFFIXES)}"
        )
    folder = _place(cache_dir, url, content)
    with exclusive(folder.with_name(f".{folder.name}.lock")):
        folder.mkdir(exist_ok=True)
        with new_file(folder / MANIFEST) as partial:
            partial.write_bytes(content)
        try:
            shards = read_manifest(folder).shards
        except UserError as error:
            raise UserError(str(error).replace(str(folder), url)) from None
        fetch_folder(url, folder, {shard.name: shard.sha256 for shard in shards}, hash_file)
    return folder


def _fetch_file(url: str, cache_dir: Path, hash_file: Callable[[Path], str]) -> Path:
    import obstore

    above, _, name = url.rpartition("/")
    store = _store(above)
    with _one_line(url):
        facts = obstore.get(store, name).meta  # a HEAD would not tell a missing bucket from a missing object
    path = _place(cache_dir, url, f"{facts['e_tag']} {facts['size']} {facts['last_modified']}".encode()) / name
    with exclusive(path.parent.with_name(f".{path.parent.name}.lock")):
        noted = path.with_name(f"{name}.sha256")
        if not (path.is_file() and noted.is_file() and hash_file(path) == noted.read_text()):
            path.parent.mkdir(exist_ok=True)
            _fetch(store, above, name, path, lambda partial: partial.stat().st_size == facts["size"])
            noted.write_text(sha256_of(path))
    return path


def _place(cache_dir: Path, url: str, content: bytes) -> Path:
    return cache_dir / "fetched" / hashlib.sha256(url.encode() + b"\0" + content).hexdigest()[:32]


def _fetch(store: Any, url: str, name: str, path: Path, is_whole: Callable[[Path], bool]) -> None:
    import obstore

    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        for left in reversed(range(_TRIES)):
            try:
                with partial.open("wb") as file, _one_line(f"{url}/{name}"):
                    for chunk in obstore.get(store, name).stream(min_chunk_size=_CHUNK):
                        file.write(chunk)
                if not is_whole(partial):
                    raise UserError(f"{url}/{name}: what came is not what was uploaded (size or checksum differs)")
                break
            except UserError:
                if not left:
                    raise
                time.sleep(1)


def _store(url: str) -> Any:
    require_extra("obstore", "cloud", url)
    from obstore.store import from_url

    with _one_line(url):
        return from_url(url, retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=60)})


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    """Say in one line what the store's client says in many."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine's files
            raise
        text = str(error)
        code = re.search(r"<Code>(\w+)</Code>", text)
        reason = f"{code[1]}: " if code else ""
        if "NoSuchBucket" in text:
            reason = "there is no such bucket; "
        elif re.search(r"status code: 40[13]|Unauthenticated|PermissionDenied", text):
            reason += "access refused; check the credentials in the environment (AWS_ACCESS_KEY_ID ...); "
        elif isinstance(error, FileNotFoundError):
            reason = "there is no such object; "
        raise UserError(f"{url}: {reason}{text.splitlines()[0].partition(': <?xml')[0][:300].rstrip(': ')}") from None

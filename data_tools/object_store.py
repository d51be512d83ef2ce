"""Folders and files in an object store (s3://, gs://, az://, or file:// for a folder that machines share), by obstore.

Credentials and endpoint come from the environment variables that obstore reads, such as AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL. A file is written aside and renamed when it is verified; a folder's manifest
is uploaded last, so that half an upload is never taken for one.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from data_tools.shards import MANIFEST, read_manifest
from launch.errors import EXIT_CRASH, EXIT_USER, UserError
from launch.files import exclusive, list_files, new_file, sha256_of
from launch.preflight import require_extra
from launch.rows import SUFFIXES

_AT_ONCE = 8  # files that travel at the same time
_TRIES = 3  # of one file, each with the requests' own retries
_CHUNK = 8 << 20  # bytes held in memory per file
_PARTS_AT_ONCE = 4  # of an upload, each of _CHUNK bytes or more
_MOST_PARTS = 9000  # of an upload; S3 allows 10,000

T = TypeVar("T")
Version = dict[str, str]  # of an object, as the store names it: e_tag, or generation number


class Failed(UserError):
    """What may succeed when it is tried again."""

    code = EXIT_CRASH


class Damaged(Failed):
    """What the store has is not what was uploaded: an object is missing, or its size or checksum differs."""

    code = EXIT_USER


def read_object(url: str, name: str) -> bytes | None:
    """The object `url`/`name` whole, None if there is none. Raises UserError for a bucket that is not there."""
    return persist(lambda: read_versioned(url, name)[0])


def read_versioned(url: str, name: str, patience: float = 60) -> tuple[bytes | None, Version | None]:
    """`read_object` and the version for `replace_object`; a store that fails is asked again for `patience` seconds."""
    import obstore

    with _one_line(url):
        try:
            found = obstore.get(_store(url, patience), name)
            return bytes(found.bytes()), _version(found.meta)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None, None


def write_object(url: str, name: str, content: bytes) -> None:
    """Write the object `url`/`name` whatever is there. Raises UserError where that cannot be done."""
    import obstore

    with _one_line(f"{url}/{name}"):
        obstore.put(_store(url), name, content)


def replace_object(url: str, name: str, content: bytes, version: Version | None, patience: float = 60) -> bool:
    """Write an object if it still has this version, None = if there is none; whether it was written.

    Where the answer is lost on the way, it may be written and False come back: read it then. A folder (file://) cannot
    compare and swap; a lock file does it among machines whose file system shares locks.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    mode: Any = version or "create"
    with _one_line(f"{url}/{name}"), ExitStack() as stack:
        if version and (folder := _shared_folder(url)):
            stack.enter_context(exclusive(folder / f".{name}.lock"))
            if read_versioned(url, name)[1] != version:
                return False
            mode = "overwrite"
        try:
            obstore.put(_store(url, patience), name, content, mode=mode)
            return True
        except (AlreadyExistsError, PreconditionError):
            return False
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return False


def list_objects(url: str, prefix: str = "") -> dict[str, int]:
    """Name -> size in bytes of every object below the folder `url`/`prefix`; names begin with the prefix."""
    import obstore

    def get() -> dict[str, int]:
        with _one_line(url):
            return {
                found["path"]: found["size"] for page in obstore.list(_store(url), prefix or None) for found in page
            }

    return persist(get)


def delete_objects(url: str, names: Sequence[str]) -> None:
    """Delete objects; those that are gone already are no error."""
    import obstore

    with _one_line(url), suppress(FileNotFoundError):
        obstore.delete(_store(url), names)


def upload_file(url: str, name: str, path: Path, digest: str, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Upload a file whose SHA-256 is `digest` to `url`/`name`, unless it is there with the same size and checksum.

    Holds a few chunks of it in memory; tries again where the store fails. Raises UserError where that does not help,
    where the file is not what `digest` says, and as soon as `is_stopped`; then there is no such object.
    """
    import obstore

    store, size, folder = _store(url), path.stat().st_size, _shared_folder(url)

    def is_there() -> bool:
        with suppress(FileNotFoundError):
            found = obstore.get(store, name, options={"head": True})
            if found.meta["size"] == size:
                return digest == (sha256_of(folder / name) if folder else found.attributes.get("sha256"))
        return False

    def put() -> None:
        with _one_line(f"{url}/{name}"):
            if is_there():
                return
            chunks = _checked_chunks(path, digest, is_stopped)
            obstore.put(
                store,
                name,
                chunks if size > _CHUNK else b"".join(chunks),
                attributes=None if folder else {"sha256": digest},
                chunk_size=max(_CHUNK, size // _MOST_PARTS),
                max_concurrency=_PARTS_AT_ONCE,
            )

    persist(put)


def persist(action: Callable[[], T]) -> T:
    """Do it, and where it raises Failed, after the requests' own retries, again after 1 s and 2 s."""
    for attempt in range(_TRIES - 1):
        try:
            return action()
        except Failed:
            time.sleep(2**attempt)
    return action()


def _checked_chunks(path: Path, digest: str, is_stopped: Callable[[], bool]) -> Iterator[bytes]:
    """The file in pieces; raises at its end, which takes the upload back, where it is not what `digest` says."""
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if is_stopped():
                raise UserError(f"{path}: its upload was stopped")
            seen.update(chunk)
            yield chunk
    if seen.hexdigest() != digest:
        raise UserError(f"{path}: changed on disk since its checksum was taken; not uploaded")


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


def publish_folder_to(
    url: str,
    folder: Path,
    digests: Mapping[str, str] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
    replaces: bool = True,
) -> None:
    """Upload `folder` to `url`, its manifest last and only if there is none; whole files there are not sent again.

    `digests` (name -> SHA-256) are all other files, where that is known. Another manifest there is removed first, or
    with `replaces` False an error. Raises UserError where it cannot be done, after some minutes of trying, and soon
    after `is_stopped()`.
    """
    try:
        manifest = (folder / MANIFEST).read_bytes()
        if digests is None:
            digests = {name: facts["sha256"] for name, facts in list_files(folder).items() if name != MANIFEST}
        there = read_object(url, MANIFEST)
        if there not in (None, manifest):
            if not replaces:
                raise UserError(f"{url}: has another {MANIFEST}; not replaced")
            delete_objects(url, [MANIFEST])
        for name, digest in digests.items():
            upload_file(url, name, folder / name, digest, is_stopped)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be uploaded: {error.strerror}") from None

    def publish() -> None:
        if is_stopped():
            raise UserError(f"{folder}: its upload was stopped")
        if not replace_object(url, MANIFEST, manifest, None) and read_object(url, MANIFEST) != manifest:
            raise UserError(f"{url}: another process has written another {MANIFEST} there meanwhile; not replaced")

    if there != manifest:
        persist(publish)


def fetch_source(url: str, cache_dir: Path, hash_file: Callable[[Path], str]) -> Path:
    """A local copy of a folder of shards or of one file, kept by address and content below `cache_dir`.

    Safe to call from many processes of a node: one fetches, the others wait. `hash_file` gives a file's SHA-256.
    """
    if url.endswith((*SUFFIXES, ".jsonl.zst")):
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

    def get() -> None:
        with partial.open("wb") as file, _one_line(f"{url}/{name}"):
            for chunk in obstore.get(store, name).stream(min_chunk_size=_CHUNK):
                file.write(chunk)
        if not is_whole(partial):
            raise Damaged(f"{url}/{name}: what came is not what was uploaded (size or checksum differs)")

    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        persist(get)


def _version(facts: Any) -> Version:
    return {key: facts[key] for key in ("e_tag", "version") if facts[key] is not None}


def _shared_folder(url: str) -> Path | None:
    return Path(unquote(url.removeprefix("file://"))) if url.startswith("file://") else None


def _store(url: str, patience: float = 60) -> Any:
    require_extra("obstore", "cloud", url)
    from obstore.store import from_url

    with _one_line(url):
        if _shared_folder(url):
            return from_url(url, mkdir=True, automatic_cleanup=True)
        return from_url(url, retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=patience)})


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
        kind, reason = Failed, f"{code[1]}: " if code else ""
        if "NoSuchBucket" in text:
            kind, reason = UserError, "there is no such bucket; "
        elif re.search(r"status code: 40[13]|Unauthenticated|PermissionDenied", text):
            kind = UserError
            reason += "access refused; check the credentials in the environment (AWS_ACCESS_KEY_ID ...); "
        elif isinstance(error, FileNotFoundError):
            kind, reason = Damaged, "there is no such object; "
        said = text.splitlines()[0].partition(": <?xml")[0]
        raise kind(f"{url}: {reason}{said[:300].rstrip(': ')}") from None

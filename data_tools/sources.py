"""Brings a source of the run file into a checked shard folder, once per content, for all processes of a node.

The reader is strict: a bad row stops the import with its line, and no row is ever left out silently. The copy
is keyed by the content of the file, so a moved file is not read again and a changed one always is.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from data_tools import object_store, readers
from data_tools.shards import MANIFEST, ColumnType, ShardWriter, read_manifest, verify_shards
from launch.config_data import ROLE, PlainSource
from launch.errors import UserError
from launch.files import exclusive, remove_folder, sha256_of
from launch.rows import SAVED, SHARDS, TABLES, TEXTS, Choose, Rows, column_problems, kind_of

_SHOWN = 5  # bad rows that are shown; the others are counted
_Finite = Annotated[float, Field(allow_inf_nan=False)]
# Roles that are no texts: their type, and what messages call it.
_NUMBERS: dict[str, tuple[TypeAdapter[Any], str]] = {
    "label": (TypeAdapter(Annotated[int, Field(ge=-(2**63), lt=2**63)]), "an integer"),
    "score": (
        TypeAdapter(_Finite | Annotated[list[_Finite], Field(min_length=1)]),
        "a finite number, or a list of them",
    ),
}


@dataclass(frozen=True)
class _Origin:
    """An opened source: its files, of which kind they are, its rows."""

    files: Sequence[Path]
    kind: str
    read: Callable[[Choose], Rows]
    license: str | None = None


def import_source(source: PlainSource, cache_dir: Path, max_rows: int | None = None) -> Path:
    """Shard folder with the rows of `source` under the names of their roles, checked; made if missing.

    Safe to call from many processes at once: one imports, the others wait for it. Raises UserError, one line
    for each of the first bad rows.
    """
    try:
        if source.path and not source.url:
            kind_of(Path(source.path))  # raises for what is no source before a folder is made for it
        for name in ("locks", "hashes", "sources"):
            (cache_dir / name).mkdir(parents=True, exist_ok=True)

        hash_file = partial(_remembered_hash, memory=cache_dir / "hashes")
        if source.url:
            fetched = object_store.fetch_source(source.url, cache_dir, hash_file)
            source = source.model_copy(update={"path": str(fetched)})
        place = str(Path(source.path).resolve()) if source.path else source.name
        with exclusive(cache_dir / "locks" / _key(place)):
            return _import(source, cache_dir, max_rows, hash_file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{source.name}: no space left for its copy in {cache_dir.absolute()}; free some or set data.cache_dir"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or source.name}: no permission: {error.strerror}") from None
        raise


def _import(source: PlainSource, cache_dir: Path, max_rows: int | None, hash_file: Callable[[Path], str]) -> Path:
    path = Path(source.path) if source.path else None
    if path is not None and (path / MANIFEST).is_file():
        manifest = verify_shards(path, hash_file)
        roles = _choose(source, list(manifest.columns))
        own = {column: column for column in manifest.columns if ROLE.fullmatch(column)}
        if roles == own and manifest.rows <= (max_rows or manifest.rows):
            return path
    origin = _open(source)
    before = [_stamp(file) for file in origin.files]
    content = [hash_file(file) for file in origin.files]
    key = _key(json.dumps([1, content, origin.kind, source.columns, max_rows, source.license or origin.license]))
    target = cache_dir / "sources" / key
    with exclusive(cache_dir / "locks" / key):
        if target.exists():
            try:
                verify_shards(target, hash_file)
                return target
            except UserError as error:
                print(f"nestling: {error}; imported again from {source.name}", file=sys.stderr, flush=True)
                remove_folder(target)
        _write(source, origin, target, max_rows, lambda: [_stamp(file) for file in origin.files] == before)
    return target


def _write(
    source: PlainSource, origin: _Origin, target: Path, max_rows: int | None, unchanged: Callable[[], bool]
) -> None:
    roles: dict[str, str] = {}

    def choose(columns: Sequence[str]) -> Sequence[str]:
        roles.update(_choose(source, columns))
        return list(dict.fromkeys(roles.values()))

    rows = islice(origin.read(choose), max_rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source.name}: has no rows; allowed: at least 1")
    checker = _Checker(roles, not source.columns, numbers_are_text=origin.kind in TABLES)
    read = bad = 0
    lines: list[str] = []
    kinds: dict[str, ColumnType] = {role: _kind(role, column, first[1]) for role, column in roles.items()}
    with ShardWriter(
        target,
        kinds or {"anchor": "text"},  # no roles are known if every row is bad
        source=source.name,
        license=source.license or origin.license,
        made_by="nestling import_source",
    ) as writer:
        for place, row in chain([first], rows):
            read += 1
            try:
                values = checker.check(row)
            except ValueError as error:
                bad += 1
                if bad <= _SHOWN:
                    at = f":{place}" if origin.kind in TEXTS else f": row {place}"
                    lines.append(f"{source.name}{at}: {error}")
                continue
            if not bad:
                writer.write(values)
        if bad:
            if bad > 1:  # one bad row is one line
                lines.append(f"{source.name}: {bad:,} of {read:,} rows are bad; nothing is imported")
            raise UserError("\n".join(lines))
        if not unchanged():
            raise UserError(f"{source.name}: changed while it was read; run again when nothing writes to it")


def _kind(role: str, column: str, row: Mapping[str, Any] | str) -> ColumnType:
    if role == "score":
        return "floats" if isinstance(row, Mapping) and isinstance(row.get(column), list) else "float"
    return "int" if role == "label" else "text"


class _Checker:
    """Turns a row of the file into values by role; ValueError says what is wrong with a bad one."""

    def __init__(self, roles: Mapping[str, str], roles_by_name: bool, numbers_are_text: bool):
        self._roles, self._by_name, self._numbers_are_text = roles, roles_by_name, numbers_are_text
        self._lengths: dict[str, int] = {}  # numbers in a list, 0 = a plain number, as the first row has them

    def check(self, row: Mapping[str, Any] | str) -> dict[str, Any]:
        if isinstance(row, str):
            raise ValueError(row)
        others = row.keys() - self._roles.keys() if self._by_name else ()
        if stray := sorted(name for name in others if ROLE.fullmatch(name)):
            raise ValueError(
                f"got a column {stray[0]!r} that the first row does not have; write it there too, null for none"
            )
        return {role: self._value(role, column, row) for role, column in self._roles.items()}

    def _value(self, role: str, column: str, row: Mapping[str, Any]) -> Any:
        if role.startswith("negative") and row.get(column) in (None, ""):
            return None  # the row has no such negative
        name = role if role == column else f"{role} (column {column!r})"
        if column not in row:
            raise ValueError(f"{name}: missing; got the columns {', '.join(map(repr, row))}")
        value = row[column]
        if role in _NUMBERS:
            kind, allowed = _NUMBERS[role]
            try:
                number = kind.validate_python(value, strict=not self._numbers_are_text)
            except ValidationError:
                raise ValueError(f"{name}: got {_shown(value)}, allowed: {allowed}") from None
            length = len(number) if isinstance(number, list) else 0
            if length != self._lengths.setdefault(role, length):
                like = f"a list of {self._lengths[role]} numbers" if self._lengths[role] else "one number"
                raise ValueError(f"{name}: got {_shown(value)}, allowed: {like}, as in the first row")
            return number
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}: got {_shown(value)}, allowed: text that is not empty")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name}: got half a surrogate pair, allowed: whole characters") from None
        return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"{value[:40]!r} ({'text' if value.strip() else 'empty'})"
    return f"{repr(value)[:40]} ({type(value).__name__})"


def _choose(source: PlainSource, columns: Sequence[str]) -> dict[str, str]:
    """Role -> column of the file. Raises UserError if a mapped column or the anchor is not there."""
    if problems := column_problems(source, columns):
        raise UserError("\n".join(problems))
    return source.columns or {name: name for name in columns if ROLE.fullmatch(name)}


def _open(source: PlainSource) -> _Origin:
    if source.path is None:
        return _dataset_origin(readers.open_hub(str(source.hub), source.split, source.revision), source)
    path = Path(source.path)
    kind = kind_of(path)
    if kind == SAVED:
        return _dataset_origin(readers.open_saved(path, source.split), source)
    if kind == SHARDS:
        manifest = read_manifest(path)
        files = [path / shard.name for shard in manifest.shards]
        return _Origin(files, kind, lambda choose: readers.read_parquet(files, choose), manifest.license)
    if kind in TEXTS:
        return _Origin([path], kind, lambda choose: readers.read_lines(path, choose))
    return _Origin([path], kind, lambda choose: readers.read_parquet([path], choose))


def _dataset_origin(rows: Any, source: PlainSource) -> _Origin:
    files = [Path(file["filename"]) for file in rows.cache_files]
    return _Origin(files, f"split {source.split}", lambda choose: readers.read_dataset(rows, source.name, choose))


def _stamp(path: Path) -> list[int]:
    # ctime too: a tool that puts back the old mtime cannot put back that
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _remembered_hash(path: Path, memory: Path) -> str:
    """SHA-256 of a file; computed again only if its size, times or inode changed."""
    stamp = _stamp(path)
    note = memory / f"{_key(str(path.resolve()))}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(note.read_text())
        if known["stamp"] == stamp:
            return known["sha256"]
    digest = sha256_of(path)
    own = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    own.write_text(json.dumps({"path": str(path), "stamp": stamp, "sha256": digest}))
    own.replace(note)
    return digest


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]

"""Brings a source of the run file into a checked shard folder, once per content, for all processes of a node.

The reader is strict: a bad row stops the import with its line, and no row is ever left out silently. The copy
is keyed by the content of the file, so a moved file is not read again and a changed one always is.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from data_tools import object_store, readers
from data_tools.shards import MANIFEST, ColumnType, ShardWriter, read_manifest, verify_shards
from launch.config import ROLE, PlainSource
from launch.errors import UserError
from launch.files import exclusive, remove_folder, sha256_of
from launch.preflight import SUFFIXES
from launch.reader import near_file

_SHOWN = 5  # bad rows that are shown; the others are counted
# Names that people give to the two columns of pairs; only used to suggest a mapping.
_USUAL_NAMES = {
    "anchor": ("query", "question", "queries", "sentence1", "text1", "title", "summary", "docstring", "text"),
    "positive": (
        "answer",
        "document",
        "passage",
        "pos",
        "sentence2",
        "text2",
        "body",
        "code",
        "response",
        "context",
    ),
}


@dataclass(frozen=True)
class _Origin:
    """An opened source: its files, how they are read, what a place is called, its rows."""

    files: Sequence[Path]
    variant: str
    unit: Literal["line", "row"]
    read: Callable[[readers.Choose], readers.Rows]
    license: str | None = None
    numbers_are_text: bool = False


def import_source(source: PlainSource, cache_dir: Path, max_rows: int | None = None) -> Path:
    """Shard folder with the rows of `source` under the names of their roles, checked; made if missing.

    Safe to call from many processes at once: one imports, the others wait for it. Raises UserError, one line
    for each of the first bad rows.
    """
    cache_dir = Path(cache_dir)

    def hash_file(path: Path) -> str:
        return _remembered_hash(path, cache_dir / "hashes")

    with _said_in_one_line(source, cache_dir):
        if source.path is not None and not source.url and not Path(source.path).exists():
            raise UserError(f"{source.path}: no such file or folder{near_file(Path(source.path))}")
        for name in ("locks", "hashes", "sources"):
            (cache_dir / name).mkdir(parents=True, exist_ok=True)
        if source.url:
            fetched = object_store.fetch_source(source.url, cache_dir, hash_file)
            source = source.model_copy(update={"path": str(fetched)})
        place = str(Path(source.path).resolve()) if source.path else source.name
        with exclusive(cache_dir / "locks" / _key(place)):
            return _import(source, cache_dir, max_rows, hash_file)


def _import(source: PlainSource, cache_dir: Path, max_rows: int | None, hash_file: Callable[[Path], str]) -> Path:
    path = Path(source.path) if source.path else None
    if path is not None and (path / MANIFEST).is_file():
        manifest = verify_shards(path, hash_file)
        asked = source.columns or {name: name for name in manifest.columns}
        if all(role == column for role, column in asked.items()) and manifest.rows <= (max_rows or manifest.rows):
            _choose(source, list(manifest.columns))
            return path
    origin = _open(source)
    before = [_stamp(file) for file in origin.files]
    content = [hash_file(file) for file in origin.files]
    key = _key(json.dumps([1, content, origin.variant, source.columns, max_rows, source.license or origin.license]))
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
        raise UserError(f"{source.name}: has no rows, allowed: at least 1")
    checker = _Checker(roles, source.columns is None, origin.numbers_are_text)
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
                    at = f":{place}" if origin.unit == "line" else f": row {place}"
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
    if role == "label":
        return "int"
    if role != "score":
        return "text"
    return "floats" if isinstance(row, Mapping) and isinstance(row.get(column), list) else "float"


class _Checker:
    """Turns a row of the file into values by role; ValueError says what is wrong with a bad one."""

    def __init__(self, roles: Mapping[str, str], roles_by_name: bool, numbers_are_text: bool):
        self._roles, self._by_name, self._numbers_are_text = roles, roles_by_name, numbers_are_text
        self._usual: set[str] = set()
        self._scores: int | None = None  # scores in a list; 0 = a plain number; None = no row yet

    def check(self, row: Mapping[str, Any] | str) -> dict[str, Any]:
        if isinstance(row, str):
            raise ValueError(row)
        self._usual = self._usual or set(self._roles.values())
        if self._by_name and not row.keys() <= self._usual:
            new = row.keys() - self._usual
            if stray := sorted(name for name in new if ROLE.fullmatch(name)):
                raise ValueError(
                    f"got a column {stray[0]!r} that the first row does not have; write it there too, null for none"
                )
            self._usual |= new
        return {role: self._value(role, column, row) for role, column in self._roles.items()}

    def _value(self, role: str, column: str, row: Mapping[str, Any]) -> Any:
        if role.startswith("negative") and row.get(column) in (None, ""):
            return None  # the row has no such negative
        name = role if role == column else f"{role} (column {column!r})"
        if column not in row:
            raise ValueError(f"{name}: missing; got the columns {', '.join(map(repr, row))}")
        value = row[column]
        try:
            if role == "label":
                return self._label(value)
            if role == "score":
                return self._score(value)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: got {_shown(value)}, allowed: {error}") from None
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}: got {_shown(value)}, allowed: text that is not empty")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name}: got half a surrogate pair, allowed: whole characters") from None
        return value

    def _label(self, value: Any) -> int:
        if self._numbers_are_text and isinstance(value, str):
            value = _parsed(int, value)
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
            raise ValueError("an integer")
        return value

    def _score(self, value: Any) -> Any:
        if self._numbers_are_text and isinstance(value, str):
            value = _parsed(float, value)
        numbers: list[Any] = value if isinstance(value, list) else [value]
        for number in numbers or [None]:
            if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
                raise ValueError("a finite number, or a list of them")
        length = len(numbers) if isinstance(value, list) else 0
        self._scores = length if self._scores is None else self._scores
        if length != self._scores:
            like = f"a list of {self._scores} numbers" if self._scores else "one number"
            raise ValueError(f"{like}, as in the first row")
        return [float(number) for number in numbers] if length else float(numbers[0])


def _parsed(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"{value[:40]!r} ({'text' if value.strip() else 'empty'})"
    return f"{repr(value)[:40]} ({type(value).__name__})"


def _choose(source: PlainSource, columns: Sequence[str]) -> dict[str, str]:
    """Role -> column of the file. Raises UserError if a mapped column or the anchor is not there."""
    listed = ", ".join(map(repr, columns))
    if source.columns is None:
        roles = {name: name for name in columns if ROLE.fullmatch(name)}
    else:
        roles = dict(source.columns)
        for role, column in roles.items():
            if column not in columns:
                close = difflib.get_close_matches(column, columns, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"{source.name}: no column {column!r} (for {role}); it has: {listed}{hint}")
    if "anchor" not in roles:
        if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
            listed += " (separated by semicolons or tabs? allowed: commas in .csv, tabs in .tsv)"
        guess = ", ".join(f"{role}: {_yaml(column)}" for role, column in _guess(columns).items())
        raise UserError(
            f"{source.name}: no column 'anchor'; it has: {listed}; say which column plays which "
            f"role, did you mean columns: {{{guess}}}?"
        )
    return roles


def _guess(columns: Sequence[str]) -> dict[str, str]:
    folded = {name.casefold().strip(): name for name in columns}
    guess: dict[str, str] = {}
    for role, usual in _USUAL_NAMES.items():
        left = [name for name in folded if folded[name] not in guess.values()]
        close = difflib.get_close_matches(role, left, 1, 0.75)
        found = next((name for name in (*close, *usual, *left) if name in left), None)
        guess[role] = folded[found] if found is not None else "NAME"
    return guess


def _yaml(name: str) -> str:
    return name if name.replace("_", "").isalnum() else json.dumps(name, ensure_ascii=False)


def _open(source: PlainSource) -> _Origin:
    if source.path is None:
        rows = readers.open_hub(str(source.hub), source.split, source.revision)
        return _dataset_origin(rows, source)
    path = Path(source.path)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            files = [path / shard.name for shard in manifest.shards]
            return _Origin(files, "shards", "row", lambda choose: readers.read_parquet(files, choose), manifest.license)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _dataset_origin(readers.open_saved(path, source.split), source)
        inside = ", ".join(sorted(item.name for item in path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{path}: folder holds {inside}; allowed: shards with {MANIFEST}, a data set saved by datasets, "
            f"or one file ({', '.join(SUFFIXES)})"
        )
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}, allowed: {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file (0 bytes), allowed: at least 1 row")
    if suffix == ".parquet":
        return _Origin([path], suffix, "row", lambda choose: readers.read_parquet([path], choose))
    if suffix in (".csv", ".tsv"):
        return _Origin([path], suffix, "line", lambda choose: readers.read_csv(path, choose), numbers_are_text=True)
    return _Origin([path], suffix, "line", lambda choose: readers.read_json_lines(path, choose))


def _dataset_origin(rows: Any, source: PlainSource) -> _Origin:
    files = [Path(file["filename"]) for file in rows.cache_files]
    return _Origin(
        files, f"split {source.split}", "row", lambda choose: readers.read_dataset(rows, source.name, choose)
    )


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
    partial = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    partial.write_text(json.dumps({"path": str(path), "stamp": stamp, "sha256": digest}))
    partial.replace(note)
    return digest


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextlib.contextmanager
def _said_in_one_line(source: PlainSource, cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{source.name}: no space left for its copy in {cache_dir.absolute()}; free some or set data.cache_dir"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or source.name}: no permission: {error.strerror}") from None
        raise

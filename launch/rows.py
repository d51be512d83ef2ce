"""What a local source is, and the rows of text files: the part of reading data that needs the standard library only.

`nestling check` looks at a file's beginning through the same functions that the import reads all of it with, so that
both see the same columns and say the same about a bad file.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from launch.config_data import ROLE, PlainSource
from launch.errors import UserError
from launch.files import read_json
from launch.reader import did_you_mean, near_file
from launch.yaml12 import inline

TABLES = (".csv", ".tsv")
TEXTS = (".jsonl", ".jsonl.gz", ".json", *TABLES)
SUFFIXES = (*TEXTS, ".parquet")
SHARDS, SAVED = "shards", "saved data set"

Choose = Callable[[Sequence[str]], Sequence[str]]
Rows = Iterator[tuple[int, dict[str, Any] | str]]

_LONGEST_FIELD = 64 << 20  # characters of one CSV field; more means a quote that is never closed
_JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
# Names that people give to the two columns of pairs; only used to suggest a mapping.
_USUAL_NAMES = {
    "anchor": ("query", "question", "queries", "sentence1", "text1", "title", "summary", "docstring", "text"),
    "positive": ("answer", "document", "passage", "pos", "sentence2", "text2", "body", "code", "response", "context"),
}


def kind_of(path: Path) -> str:
    """One of SUFFIXES, SHARDS or SAVED. Raises UserError for what is missing, empty or nothing of these."""
    if not path.exists():
        hint = near_file(path)
        if path.name in ("train", "held_out") and "did you mean" not in hint:
            hint = f"; make it: nestling data run CONFIG.yaml out={path.parent}"
        raise UserError(f"{path}: no such file or folder{hint}")
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return SHARDS
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return SAVED
        files = [p for p in sorted(path.iterdir()) if p.name.endswith(SUFFIXES)]
        hint = f"; did you mean {files[0]}?" if files else ""
        raise UserError(f"{path}: folder without manifest.json (shards) or state.json (a saved data set){hint}")
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path}: got suffix {path.suffix!r}, allowed: {', '.join(SUFFIXES)} or a folder of shards")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; allowed: at least one row")
    return suffix


def saved_folder(path: Path, split: str) -> Path:
    """Where the rows of a saved data set lie, of a DatasetDict those of `split`. Raises UserError if it has none."""
    if not (path / "dataset_dict.json").is_file():
        return path
    found = read_json(path / "dataset_dict.json")
    splits = found.get("splits") if isinstance(found, dict) else None
    if not isinstance(splits, list):
        raise UserError(f"{path / 'dataset_dict.json'}: names no splits; save the data set again")
    if split not in splits:
        raise UserError(f"{path}: has no split {split!r}; allowed: {', '.join(splits)}")
    return path / split


def column_problems(
    source: PlainSource, columns: Sequence[str] | None, needed: Sequence[str] = (), purpose: str = "every source"
) -> list[str]:
    """One line for each mapped column that the source has not, and for `anchor` and each needed role without a column.

    `columns` are None where they are not known yet; `negative` also stands for negative_1, negative_2 ...
    """
    problems = []
    listed = ", ".join(columns or ())
    for role, column in (source.columns or {}).items():
        if columns is not None and column not in columns:
            hint = did_you_mean(column, columns)
            problems.append(f"{source.name} has no column {column!r} (for {role}); allowed: {listed}{hint}")
    roles = list(source.columns) if source.columns else [name for name in columns or () if ROLE.fullmatch(name)]
    has = f"columns maps {', '.join(roles)}" if columns is None else f"its columns are {listed or 'none'}"
    if columns and len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        has += " (separated by semicolons or tabs? allowed: commas in .csv, tabs in .tsv)"
    wanted = ", ".join(f"{role}: {_guess(role, columns or ())}" for role in ("anchor", *(needed or ("positive",))))
    for role in ("anchor", *needed):
        if not any(name == role or (role == "negative" and name.startswith("negative_")) for name in roles):
            problems.append(
                f"{purpose} needs a column {role}, {source.name} has none; {has}; write columns: {{{wanted}}}"
            )
    return problems


def _guess(role: str, columns: Sequence[str]) -> str:
    folded = {name.casefold().strip(): name for name in columns}
    return next((inline(folded[name]) for name in (role, *_USUAL_NAMES.get(role, ())) if name in folded), "NAME")


def read_text(path: Path, choose: Choose, told: Callable[[int], None] = lambda done: None) -> Rows:
    """(place, row) of a file with one of TEXTS: its line from 1, and a dict of columns or what is wrong with the row.

    What makes the whole file unreadable is a UserError. `choose` is called once with the columns, before the first row;
    `told` now and then with the bytes of the file that are done.
    """
    lines = _lines(path, told)
    return read_table(path, lines, choose) if path.suffix in TABLES else read_json_lines(path, lines, choose)


def _lines(path: Path, told: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Line number and text of every line, unpacked where the name ends in .gz, without a byte order mark."""
    with path.open("rb") as file:
        lines: BinaryIO = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if number % 256 == 0:
                    told(file.tell())
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: byte {error.start + 1} of the line is {error.object[error.start]:#04x}, which "
                f"is not UTF-8; convert the file: iconv -f ENCODING -t UTF-8 {path.name} > utf8_{path.name} "
                "(ENCODING is often CP1252 or UTF-16)"
            ) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: gzip is damaged after line {number:,}: {error}; copy the file again") from None


def read_json_lines(path: Path, lines: Iterator[tuple[int, str]], choose: Choose) -> Rows:
    """One JSON object a line; blank lines between them hold no row."""
    chosen = False
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        if text == "{" or (number == 1 and text.startswith("[")):
            raise UserError(
                f"{path}:{number}: got a JSON document that is one list or spans lines, allowed: one "
                f"object a line; convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl"
            )
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            yield number, f"broken JSON: {error.msg} at column {error.colno}"
            continue
        except (RecursionError, ValueError) as error:  # nested too deeply; thousands of digits
            yield number, f"broken JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield number, f"got a JSON {_JSON_NAMES[type(row)]}, allowed: an object with named columns"
            continue
        if not chosen:
            choose(list(row))
            chosen = True
        yield number, row


def read_table(path: Path, lines: Iterator[tuple[int, str]], choose: Choose, strict: bool = True) -> Rows:
    """A table with a header line, fields quoted as in RFC 4180, separated by commas or (.tsv) tabs.

    Broken quoting is a UserError, or, not `strict`, what is wrong with a row.
    """
    limit = csv.field_size_limit(_LONGEST_FIELD)
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for at, line in lines:  # noqa: B007 (the number of the line that the reader has come to)
            yield line

    table = csv.reader(texts(), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    try:
        while True:
            start = at + 1
            try:
                fields = next(table, None)
            except csv.Error as error:
                if strict or header is None:
                    raise UserError(
                        f"{path}:{at}: broken CSV: {error}; a text with quotes, separators or line "
                        'breaks must stand in quotes, with "" for a quote in it'
                    ) from None
                for number in range(start, at + 1):  # a quote that nobody closes takes all lines behind it along
                    yield number, f"broken CSV: {error}"
                continue
            if header is None:
                header = fields
                if not header:
                    raise UserError(f"{path}:1: the header is empty; allowed: column names in the first line")
                if twice := {name for name in header if header.count(name) > 1}:
                    raise UserError(f"{path}:1: column {sorted(twice)[0]!r} stands there twice, allowed: once")
                choose(header)
            elif fields is None:
                break
            elif len(fields) == len(header):
                yield start, dict(zip(header, fields, strict=True))
            elif fields:
                yield start, f"got {len(fields)} fields, allowed: {len(header)} as in the header"
    finally:
        csv.field_size_limit(limit)

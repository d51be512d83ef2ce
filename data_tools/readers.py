"""Rows of every kind of file that nestling takes, streamed: one generator a kind, all of the same form.

Each yields (place, row): the line or row number from 1, and a dict of columns, or a text that says why this
row cannot be read. What makes the whole file unreadable is a UserError. `choose` is called once with the
file's columns before the first row and says which are needed.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.progress import Progress
from launch.errors import UserError

Choose = Callable[[Sequence[str]], Sequence[str]]
Rows = Iterator[tuple[int, dict[str, Any] | str]]

_LONGEST_FIELD = 64 << 20  # characters of one CSV field; more means a quote that is never closed
_BATCH = 1024  # rows decoded at once from columnar files


def _lines(path: Path, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """Line number and bytes of every line, unpacked where the name ends in .gz, without a byte order mark."""
    with path.open("rb") as file:
        lines: BinaryIO = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if number % 256 == 0:
                    progress.to(file.tell())
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: gzip is damaged after line {number:,}: {error}; copy the file again") from None


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: byte {error.start + 1} of the line is {error.object[error.start]:#04x}, which "
            f"is not UTF-8; convert the file: iconv -f ENCODING -t UTF-8 {path.name} > utf8_{path.name} "
            "(ENCODING is often CP1252 or UTF-16)"
        ) from None


def read_json_lines(path: Path, choose: Choose) -> Rows:
    """One JSON object a line; blank lines between them hold no row."""
    chosen = False
    with Progress(f"reading {path.name}", path.stat().st_size, "bytes") as progress:
        for number, line in _lines(path, progress):
            text = _decode(path, number, line).strip()
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


_JSON_NAMES = {
    list: "array",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def read_csv(path: Path, choose: Choose) -> Rows:
    """A table with a header line, fields quoted as in RFC 4180, separated by commas or (.tsv) tabs."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    with Progress(f"reading {path.name}", path.stat().st_size, "bytes") as progress:
        lines = (_decode(path, number, line) for number, line in _lines(path, progress))
        table = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(table, [])
            if twice := {name for name in header if header.count(name) > 1}:
                raise UserError(f"{path}:1: column {sorted(twice)[0]!r} stands there twice, allowed: once")
            if header:
                choose(header)
            start = table.line_num + 1
            for fields in table:
                if len(fields) == len(header):
                    yield start, dict(zip(header, fields, strict=True))
                elif fields:
                    yield start, f"got {len(fields)} fields, allowed: {len(header)} as in the header"
                start = table.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}:{table.line_num}: broken CSV: {error}; a text with quotes, separators or line "
                'breaks must stand in quotes, with "" for a quote in it'
            ) from None
        finally:
            csv.field_size_limit(limit)


def read_parquet(paths: Sequence[Path], choose: Choose) -> Rows:
    """Parquet files with the same columns, one after the other; places are rows over all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = 0
    columns: list[str] | None = None
    for path in paths:
        try:
            with pq.ParquetFile(path, buffer_size=1 << 20) as file:
                if columns is None:
                    columns = list(choose(file.schema_arrow.names))
                with Progress(f"reading {path.name}", file.metadata.num_rows, "rows") as progress:
                    for batch in file.iter_batches(_BATCH, columns=columns):
                        for row in batch.to_pylist():
                            place += 1
                            yield place, row
                        progress.to(place)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path}: damaged or no Parquet file (after row {place:,}): {reason}; copy or write it again"
            ) from None


def read_dataset(rows: Any, name: str, choose: Choose) -> Rows:
    """A `datasets.Dataset`."""
    columns = list(choose(rows.column_names))
    rows = rows.with_format(None).select_columns(columns)
    place = 0
    with Progress(f"reading {name}", len(rows), "rows") as progress:
        for batch in rows.iter(_BATCH):
            for values in zip(*(batch[column] for column in columns), strict=True):
                place += 1
                yield place, dict(zip(columns, values, strict=True))
            progress.to(place)


def open_saved(path: Path, split: str) -> Any:
    """A data set that `datasets` saved on disk, of a DatasetDict the split. Raises UserError."""
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:  # the library lets errors of fsspec, pyarrow and json through
        raise UserError(f"{path}: saved data set cannot be opened: {_first_line(error)}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{path}: split: got {split!r}, allowed: {', '.join(map(str, found))}")
        return found[split]
    return found


def open_hub(name: str, split: str, revision: str | None) -> Any:
    """A data set of the hub, `owner/name[:configuration]`. Raises UserError where offline or unknown."""
    datasets = _datasets()
    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(
            repository, configuration or None, split=split, revision=revision, keep_in_memory=False
        )
    except Exception as error:  # the library lets errors of its network and file layers through
        raise UserError(
            f"hub:{name}: cannot be loaded: {_first_line(error)}; check the name, split {split!r} and the "
            "network, or give a file by data.sources[].path"
        ) from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError('this source needs the package datasets: pip install "nestling[train]"') from None
    return datasets


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

"""Shard folders: `shard-00000.parquet ...` and a `manifest.json` that says what they hold and from where.

A folder is written streaming into a partial folder beside it and renamed when whole. Its fingerprint is a
hash of the values in their order, so neither the cut into shards nor the Parquet writer's version changes it.
"""

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.errors import UserError
from launch.files import partial_folder, publish_folder, remove_folder, sha256_of, write_json

MANIFEST = "manifest.json"
ColumnType = Literal["text", "int", "float", "floats"]

_GROUP_ROWS = 4096  # rows of a row group: what random access has to decode at most
_GROUP_BYTES = 16 << 20  # ... and its values in bytes, which bounds the writer's memory for long texts
_SHARD_BYTES = 256 << 20  # values of one shard before compression


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(_Frozen):
    """One Parquet file of a shard folder."""

    name: str = Field(pattern=r"^shard-[0-9]{5,}\.parquet$")
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Frozen):
    """What a shard folder holds, where it comes from and what was left out."""

    format: Literal["nestling-shards-1"] = "nestling-shards-1"
    columns: dict[str, ColumnType] = Field(min_length=1)
    rows: int = Field(ge=1)
    shards: Annotated[list[Shard], Field(min_length=1)]
    source: str
    license: str | None
    made_by: str
    dropped: dict[str, int]
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder. Raises UserError if it is missing, broken or of another program."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read, so this is no shard folder: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path}: no manifest of nestling shards, or a broken one: {place}: {first['msg']}") from None
    if manifest.rows != sum(shard.rows for shard in manifest.shards):
        raise UserError(f"{path}: broken: {manifest.rows} rows, but its shards have another sum")
    return manifest


def verify_shards(folder: Path, hash_file: Callable[[Path], str] = sha256_of) -> Manifest:
    """Compare every shard with the manifest by size and SHA-256. Raises UserError naming a bad file."""
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise UserError(f"{path}: missing, but the manifest lists it")
        if (size := path.stat().st_size) != shard.bytes:
            raise UserError(f"{path}: damaged: {size:,} bytes, the manifest says {shard.bytes:,}")
        if (got := hash_file(path)) != shard.sha256:
            raise UserError(f"{path}: damaged: SHA-256 {got}, the manifest says {shard.sha256}")
    return manifest


class ShardWriter:
    """Writes rows into a new shard folder; leaving the `with` block publishes it, an exception removes it.

    Memory is bounded by one row group. Raises UserError if the folder exists or no row was written.
    """

    def __init__(
        self, folder: Path, columns: Mapping[str, ColumnType], *, source: str, license: str | None, made_by: str
    ):
        import pyarrow as pa

        types = {"text": pa.string(), "int": pa.int64(), "float": pa.float64(), "floats": pa.list_(pa.float64())}
        self.dropped: dict[str, int] = {}
        self.rows = 0
        self._folder, self._columns = folder, dict(columns)
        self._facts = {"source": source, "license": license, "made_by": made_by}
        self._schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
        self._values = {name: hashlib.sha256() for name in columns}
        self._group: list[Mapping[str, Any]] = []
        self._group_bytes = self._shard_bytes = self._shard_rows = 0
        self._shards: list[Shard] = []
        self._file: Any = None

    def __enter__(self) -> "ShardWriter":
        self._partial = partial_folder(self._folder)
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row with a value of the right type, or None, for every column."""
        for name, kind in self._columns.items():
            value = row[name]
            data = b"" if value is None else _value_bytes(value, kind)
            self._values[name].update(b"-" if value is None else b"%d:" % len(data) + data)
            self._group_bytes += len(data)
        self.rows += 1
        self._group.append(row)
        if len(self._group) == _GROUP_ROWS or self._group_bytes >= _GROUP_BYTES:
            self._end_group()
            if self._shard_bytes >= _SHARD_BYTES:
                self._end_shard()

    def _end_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._file is None:
            self._path = self._partial / f"shard-{len(self._shards):05d}.parquet"
            self._file = pq.ParquetWriter(
                str(self._path), self._schema, compression="zstd", use_dictionary=False, write_statistics=False
            )
        self._file.write_table(pa.Table.from_pylist(self._group, self._schema), row_group_size=_GROUP_ROWS)
        self._shard_rows += len(self._group)
        self._shard_bytes += self._group_bytes
        self._group, self._group_bytes = [], 0

    def _end_shard(self) -> None:
        self._file.close()
        self._file = None
        self._shards.append(
            Shard(
                name=self._path.name,
                rows=self._shard_rows,
                bytes=self._path.stat().st_size,
                sha256=sha256_of(self._path),
            )
        )
        self._shard_bytes = self._shard_rows = 0

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            if self._file is not None:
                with contextlib.suppress(Exception):  # its end cannot be written to a full disk
                    self._file.close()
            remove_folder(self._partial)

    def _publish(self) -> None:
        if not self.rows:
            raise UserError(f"{self._folder}: no rows to write")
        if self._group:
            self._end_group()
        if self._file is not None:
            self._end_shard()
        parts = {name: [self._columns[name], values.hexdigest()] for name, values in self._values.items()}
        manifest = Manifest(
            columns=self._columns,
            rows=self.rows,
            shards=self._shards,
            dropped=self.dropped,
            fingerprint=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            **self._facts,
        )
        write_json(self._partial / MANIFEST, manifest.model_dump())
        publish_folder(self._partial, self._folder)


def _value_bytes(value: Any, kind: ColumnType) -> bytes:
    if kind == "text":
        return value.encode()
    if kind == "int":
        return b"%d" % value
    numbers: Sequence[float] = [value] if kind == "float" else value
    return struct.pack(f"<{len(numbers)}d", *numbers)

"""Rows of every kind of file that nestling takes, streamed: one generator a kind, all of the form of launch/rows.py.

Each yields (place, row): the line or row number from 1, and a dict of columns, or a text that says why this
row cannot be read. What makes the whole file unreadable is a UserError. `choose` is called once with the
file's columns before the first row and says which are needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.progress import Progress
from launch.errors import UserError
from launch.preflight import require_extra
from launch.rows import Choose, Rows, read_text, saved_folder

_BATCH = 1024  # rows decoded at once from columnar files


def read_lines(path: Path, choose: Choose, speaks: bool = True) -> Rows:
    """JSON lines, CSV or TSV; places are lines."""
    with Progress(f"reading {path.name}", path.stat().st_size, "bytes", speaks) as progress:
        yield from read_text(path, choose, progress.to)


def read_parquet(paths: Sequence[Path], choose: Choose, speaks: bool = True) -> Rows:
    """Parquet files with the same columns, one after the other; places are rows over all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = before = 0
    columns: list[str] | None = None
    for path in paths:
        try:
            with pq.ParquetFile(path, buffer_size=1 << 20) as file:
                if columns is None:
                    columns = list(choose(file.schema_arrow.names))
                with Progress(f"reading {path.name}", file.metadata.num_rows, "rows", speaks) as progress:
                    for batch in file.iter_batches(_BATCH, columns=columns):
                        for row in batch.to_pylist():
                            place += 1
                            yield place, row
                        progress.to(place - before)
                    before = place
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
    require_extra("datasets", "train", str(path))
    import datasets

    folder = saved_folder(path, split)
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the library lets errors of fsspec, pyarrow and json through
        raise UserError(f"{path}: saved data set cannot be opened: {_first_line(error)}") from None


def open_hub(name: str, split: str, revision: str | None) -> Any:
    """A data set of the hub, `owner/name[:configuration]`. Raises UserError where offline or unknown."""
    require_extra("datasets", "train", f"hub:{name}")
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split, revision=revision)
    except Exception as error:  # the library lets errors of its network and file layers through
        raise UserError(
            f"hub:{name}: cannot be loaded: {_first_line(error)}; check the name, split {split!r} and the "
            "network, or give a file by data.sources[].path"
        ) from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

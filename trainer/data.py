"""Training rows: every source is brought into checked shards, opened memory-mapped, in the order of the run file.

The column order follows the roles (anchor, positive, negatives, then score or label), because losses of
sentence-transformers go by position. Nothing here touches a process group: ranks of one node that import the
same source wait for each other on a file lock, so no collective can time out during a long import.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.shards import read_manifest
from data_tools.sources import import_source
from launch.config import RunConfig
from launch.config_data import ROLE, PlainSource
from launch.errors import UserError
from trainer.sampler import DataOrder, share_out


def open_sources(
    sources: Sequence[PlainSource], cache_dir: Path, max_rows: int | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Rows of all sources as one `datasets.Dataset`, and what each source is (name, fingerprint, rows, licence).

    A row without a negative that others have holds None there, be it in one source or between sources. Raises
    UserError where a source cannot be read, or where two sources differ in other columns than negatives.
    """
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList

    parts, facts = [], []
    for source in sources:
        folder = import_source(source, cache_dir, max_rows)
        manifest = read_manifest(folder)
        files: list[Any] = [str(folder / shard.name) for shard in manifest.shards]
        if any("::" in file for file in files):
            raise UserError(f"{folder}: got :: in the path, which datasets takes for an address; choose another folder")
        # Given as a list that is whole: no pattern is looked for in the paths, and the content is the key of the copy.
        listed: Any = DataFilesDict({"train": DataFilesList(files, [(manifest.fingerprint,)])})
        datasets.utils.disable_progress_bars()
        try:
            rows = datasets.Dataset.from_parquet(listed, datasets.Split.TRAIN, cache_dir=str(cache_dir / "arrow"))
        finally:
            datasets.utils.enable_progress_bars()
        roles = [column for column in rows.column_names if ROLE.fullmatch(column)]
        parts.append(rows.select_columns(sorted(roles, key=_position)))
        facts.append(
            {
                "name": source.name,
                "fingerprint": manifest.fingerprint,
                "rows": len(parts[-1]),
                "license": source.license or manifest.license or "unknown",
                "dropped": dict(manifest.dropped),
            }
        )
    first = _no_negatives(parts[0])
    for source, part in zip(sources, parts, strict=True):
        if _no_negatives(part) != first:
            raise UserError(
                f"data.sources: all need the same columns, negatives apart: {sources[0].name} has {', '.join(first)}, "
                f"{source.name} has {', '.join(_no_negatives(part))}"
            )
        if part.features.get("score") != parts[0].features.get("score"):
            names = f"{sources[0].name} and {source.name}"
            raise UserError(f"data.sources: score is a number in all sources or a list in all, got both: {names}")
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    rows = rows.select_columns(sorted(rows.column_names, key=_position))
    refuse_gaps(rows, facts, first, "allowed in negatives only")
    return rows, facts


def refuse_gaps(rows: Any, facts: Sequence[dict[str, Any]], columns: Sequence[str], allowed: str) -> None:
    """Raise UserError, naming source and row, where a row has nothing in one of `columns`."""
    for column in columns:
        cells = rows.data.column(column)
        if cells.null_count:
            number, source = cells.is_null().index(True).as_py(), 0
            while number >= facts[source]["rows"]:
                number -= facts[source]["rows"]
                source += 1
            raise UserError(f"{facts[source]['name']}: row {number + 1:,} has no {column}; {allowed}")


def _no_negatives(rows: Any) -> list[str]:
    return [column for column in rows.column_names if not column.startswith("negative")]


def _position(role: str) -> tuple[int, int]:
    order = ("anchor", "positive", "negative", "score", "label")
    name, _, number = role.partition("_")
    return order.index(name), int(number or 0)


def data_order(config: RunConfig, facts: Sequence[dict[str, Any]]) -> DataOrder:
    """The order of the rows of a run; `facts` as `open_sources` gives them.

    Raises UserError where no source fills a global batch, or where a source with a weight would never be read.
    """
    batch, steps = config.train.global_batch_size, config.data.epoch_steps
    weights = [source.weight for source in config.data.sources if source.weight is not None]
    sizes = tuple(fact["rows"] for fact in facts)
    caps = [source.epoch_rows or size for source, size in zip(config.data.sources, sizes, strict=True)]
    capped = tuple(min(size, cap) // batch for size, cap in zip(sizes, caps, strict=True))
    order = DataOrder(config.train.seed, batch, sizes, share_out(steps, weights) if steps else capped)
    for fact, cap, share in zip(facts, caps, order.batches, strict=True):
        if cap < min(batch, fact["rows"]):
            raise UserError(
                f"data.sources: {fact['name']} has epoch_rows {cap:,}; allowed: at least one global batch of {batch:,}"
            )
        if steps and fact["rows"] < batch:
            raise UserError(
                f"data.sources: {fact['name']} has a weight and {fact['rows']:,} rows; allowed: at least one global "
                f"batch of {batch:,}; lower train.global_batch_size or leave the source out"
            )
        if steps and not share:
            raise UserError(
                f"data.epoch_steps: got {steps}, of which {fact['name']} would get none; raise it or its weight"
            )
    if not order.steps_per_epoch:
        sizes = ", ".join(f"{f['name']} {f['rows']:,}" for f in facts)
        raise UserError(
            f"data.sources: a global batch comes from one source, and none has {batch:,} rows ({sizes}); "
            "lower train.global_batch_size"
        )
    return order


def steps_of_run(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of a whole run, as the Trainer counts them: a begun part of an epoch ends with a whole step."""
    return config.train.max_steps or math.ceil(steps_per_epoch * config.train.epochs)


def text_columns(columns: Sequence[str]) -> list[str]:
    """The columns that hold text, in order."""
    return [c for c in columns if c not in ("score", "label")]

"""Known positives: pairs that are right for masks although the global batch does not hold them.

A table of two sorted uint64 arrays on disk, the anchors' and the positives' text_ids; a step looks up the anchors of
its batch by binary search and touches no other part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.progress import Progress
from trainer.arrays import array_folder
from trainer.targets import join
from trainer.tokens import text_id

_FILES: dict[str, type[np.generic]] = {"anchor": np.uint64, "positive": np.uint64}
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class KnownPositives:
    """Distinct pairs of text_ids in ascending order, [pairs] uint64 each."""

    anchor: np.ndarray
    positive: np.ndarray

    def of(self, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pairs whose anchor is among `anchors` (text_ids in any order), [found] uint64 each."""
        wanted = np.unique(anchors)
        found, positives = join(wanted, (self.anchor, self.positive))
        return wanted[found], np.asarray(positives)


def known_positives(rows: Any, facts: Sequence[dict[str, Any]], cache_dir: Path) -> KnownPositives:
    """The table of these rows, built first where `cache_dir` has none that is whole; `array_folder` says who may call.

    `rows` is a `datasets.Dataset` with columns anchor and positive, `facts` say what it is made of, as `open_sources`
    gives both. Building takes 16 bytes of memory a row.
    """

    def build(folder: Path) -> None:
        pairs = np.empty((len(rows), 2), np.uint64)
        with Progress("reading known positives", len(rows), "rows") as progress:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                batch = rows[start : start + _ROWS_AT_ONCE]
                for column, name in enumerate(_FILES):
                    pairs[start : start + _ROWS_AT_ONCE, column] = [text_id(text) for text in batch[name]]
                progress.to(start)
        for array, name in zip(np.unique(pairs, axis=0).T, _FILES, strict=True):
            array.tofile(folder / f"{name}.bin")

    made_from = {"format": 1, "data": [fact["fingerprint"] for fact in facts]}
    return KnownPositives(**array_folder(cache_dir / "known", made_from, _FILES, build))

"""The table of known positives finds what a walk over all pairs finds: `python -m pytest tests/test_known.py`."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from trainer.batching import make_plan
from trainer.known import KnownPositives, known_positives
from trainer.loader import Steps
from trainer.sampler import DataOrder
from trainer.tokens import TokenCache, text_id


def _table(pairs: list[tuple[str, str]], folder: Path, fingerprint: str = "f") -> KnownPositives:
    rows = datasets.Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]})
    return known_positives(rows, [{"fingerprint": fingerprint}], folder)


def _pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [(f"Anchor {draw.randrange(count // 5)}", f"positive {draw.randrange(count)}") for _ in range(count)]


@pytest.mark.parametrize(
    "batch", [[], ["nothing known"], ["Anchor 3"], ["anchor  7", "ANCHOR 7", "Anchor 0", "x"], None]
)
def test_all_pairs_of_the_anchors_of_a_batch_and_no_others(tmp_path: Path, batch: list[str] | None) -> None:
    pairs = _pairs(9000)  # more than are read at once
    table = _table(pairs, tmp_path)
    batch = [a for a, _ in pairs] if batch is None else batch
    ids = np.array([text_id(text) for text in batch], np.uint64)
    anchors, positives = table.of(ids)
    assert anchors.dtype == positives.dtype == np.uint64
    expected = {(text_id(a), text_id(p)) for a, p in pairs if text_id(a) in set(ids.tolist())}
    found = list(zip(anchors.tolist(), positives.tolist(), strict=True))
    assert set(found) == expected and len(found) == len(expected)
    assert not isinstance(anchors, np.memmap), "a copy, so that the table is not held open"


def test_a_table_is_kept_by_content_and_built_again_when_damaged(tmp_path: Path) -> None:
    pairs = _pairs(50)
    expected = [np.array(array) for array in (_table(pairs, tmp_path).anchor, _table(pairs, tmp_path).positive)]
    (folder,) = (p for p in (tmp_path / "known").iterdir() if p.is_dir())
    inode = (folder / "anchor.bin").stat().st_ino
    _table(pairs, tmp_path)
    assert (folder / "anchor.bin").stat().st_ino == inode
    data = bytearray((folder / "positive.bin").read_bytes())
    data[100] ^= 1
    (folder / "positive.bin").write_bytes(data)
    again = _table(pairs, tmp_path)
    assert np.array_equal(again.anchor, expected[0]) and np.array_equal(again.positive, expected[1])
    _table(pairs[1:], tmp_path, "other")
    assert len([p for p in (tmp_path / "known").iterdir() if p.is_dir()]) == 2


def _cache(texts: list[list[str]]) -> TokenCache:
    """A cache of these rows in memory, one token a text."""
    ids = np.array([[text_id(text) for text in row] for row in texts], np.uint64)
    number = np.unique(ids, return_inverse=True)[1].astype(np.int32)
    lengths: Any = {"query": None, "document": None}
    return TokenCache(["anchor", "positive", "negative"], number, np.arange(ids.size + 1), ids, ids, lengths)


def test_steps_mask_what_rows_and_table_say(tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = [[f"anchor {draw.randrange(9)}", *(f"positive {draw.randrange(30)}" for _ in range(2))] for _ in range(24)]
    pairs = [(f"ANCHOR {draw.randrange(9)}", f"Positive {draw.randrange(30)}") for _ in range(40)]
    order = DataOrder(0, 24, (24,))
    shares = []
    for known in (None, _table(pairs, tmp_path)):
        plan = partial(make_plan, world_size=2)
        steps = Steps(_cache(texts), order, plan, 64, known)
        shares.append(steps[0]["batch"].plan.masked_share)
        right = {(row[0], row[1]) for row in texts} | ({(a.lower(), p.lower()) for a, p in pairs} if known else set())
        left_out = sum((row[0], text) in right for row in texts for other in texts for text in other[1:]) - len(texts)
        assert shares[-1] == pytest.approx(left_out / (24 * 47))
    assert shares[1] > 1.5 * shares[0] > 0

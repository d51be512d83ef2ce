"""Equal and nearly equal pairs: the stages `sign`, `match`, `resolve` and `dedup`.

MinHash (Broder 1997) by rensa over runs of five words, banded; candidates of a band are compared by their whole
signature. Memory is bounded: a task holds one part, or one band of one range of hashes, never the corpus.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.chunk import PAIR
from data_tools.runner import Output
from data_tools.split import forms, hash_of, normalise, word_runs
from launch.files import new_file

SIGNED = 120  # permutations: a similarity of 0.8 is estimated with a deviation of 0.037
_SEED = 1
_RANGE_ROWS = 200_000  # rows that a task of `match` holds at once
_GROUPS = 4  # tasks that share the bands
_LEADERS = 8  # of a bucket: rows that later ones are compared with
_PAIR, _POSITIVE, _DOCUMENT = range(3)  # identities of a row beside its bands
_IDENTITIES = 3


def rows_of_band(threshold: float) -> int:
    """Rows of a band: the most with which a pair at `threshold` shares a band with probability 0.997."""
    return max(r for r in (1, 2, 3, 4, 5, 6, 8, 10, 12) if 1 - (1 - threshold**r) ** (SIGNED // r) >= 0.997)


def sign_stage(output: Output, part: str, near: float | None) -> None:
    """Identities and band hashes uint64 [3 + bands, n] and signatures uint32 [n, 120] of the rows of a part."""
    import pyarrow.parquet as pq

    rows = pq.read_table(part, columns=["anchor", "positive", "document"]).to_pylist()
    anchors, positives = [normalise(row["anchor"]) for row in rows], [forms(row["positive"]) for row in rows]
    identities = [
        [hash_of(f"{anchor}\0{plain}") for anchor, (plain, _) in zip(anchors, positives, strict=True)],
        [hash_of(plain) for plain, _ in positives],
        [hash_of(row["document"]) for row in rows],
    ]
    keys = np.array(identities, dtype=np.uint64)
    if near is not None:
        import rensa

        runs = [sorted(word_runs(form.split())) for _, form in positives]
        digests = rensa.RMinHash.digests_from_token_sets(runs, SIGNED, _SEED)  # pyright: ignore
        signatures = np.array(digests, dtype=np.uint32)
        bands = signatures.reshape(len(rows), -1, rows_of_band(near)).astype(np.uint64)
        hashes = np.zeros(bands.shape[:2], dtype=np.uint64)
        for column in range(bands.shape[2]):  # a polynomial with an odd 64-bit factor, then mixed from above
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + bands[:, :, column] + np.uint64(1)
            hashes ^= hashes >> np.uint64(29)
        keys = np.concatenate([keys, hashes.T])
        _save(output, "signature", signatures)
    _save(output, "keys", keys)
    output.facts = {"rows": len(rows), "keys": len(keys)}


def _save(output: Output, name: str, values: np.ndarray) -> None:
    with new_file(output.folder / f"{output.task:05d}.{name}") as path:
        np.ascontiguousarray(values).tofile(path)


def match_units(rows: int, keys: int) -> list[list[Any]]:
    """The tasks of `match`: [keys that are compared, range of hashes, number of ranges]."""
    compared = [_PAIR, *range(_IDENTITIES, keys)]
    ranges = -(-rows // _RANGE_ROWS)
    return [[group, r, ranges] for i in range(_GROUPS) if (group := compared[i::_GROUPS]) for r in range(ranges)]


def match_stage(output: Output, unit: list[Any], signed: str, sizes: list[list[int]], near: float | None) -> None:
    """Edges int64 [m, 2], (later row, earlier row) over all parts; `sizes` has [rows, keys] of each part."""
    wanted, this_range, ranges = unit
    threshold = near or 1.0
    least = threshold - 2.5 * (threshold * (1 - threshold) / SIGNED) ** 0.5
    firsts = np.cumsum([0, *(rows for rows, _ in sizes)])
    edges: list[tuple[int, int]] = []
    with _Signatures(Path(signed), firsts, near is not None) as signatures:
        for key in wanted:
            hashes, numbers = [], []
            for part, (rows, _) in enumerate(sizes):
                file = Path(signed) / f"{part:05d}.keys"
                values = np.fromfile(file, dtype=np.uint64, count=rows, offset=8 * rows * key)
                mine = np.flatnonzero(values % np.uint64(ranges) == this_range)
                hashes.append(values[mine])
                numbers.append(mine + firsts[part])
            for bucket in _buckets(np.concatenate(hashes), np.concatenate(numbers)):
                if key == _PAIR:
                    edges += [(later, int(bucket[0])) for later in bucket[1:].tolist()]
                else:
                    edges += _similar(bucket, signatures, least)
    found = np.array(sorted(set(edges)), dtype=np.int64).reshape(-1, 2)
    _save(output, "edges", found)
    output.facts = {"edges": len(found)}


def _buckets(hashes: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows with one hash, ascending, where there are several."""
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], rows[order]
    cuts = np.flatnonzero(np.diff(hashes)) + 1
    starts, ends = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(rows)]])
    for i in np.flatnonzero(ends - starts > 1):
        yield rows[starts[i] : ends[i]]


def _similar(bucket: np.ndarray, signatures: "_Signatures", least: float) -> Iterator[tuple[int, int]]:
    """Each row with the first earlier one that it is like; rows unlike all lead the comparison from then on."""
    leaders: list[tuple[int, np.ndarray]] = []
    for row in bucket.tolist():
        own = signatures.of(row)
        earlier = next((other for other, theirs in leaders if np.mean(own == theirs) >= least), None)
        if earlier is not None:
            yield row, earlier
        elif len(leaders) < _LEADERS:
            leaders.append((row, own))


class _Signatures:
    """Signatures by row, read one at a time: mapped files would count as memory."""

    def __init__(self, folder: Path, firsts: np.ndarray, present: bool):
        count = len(firsts) - 1 if present else 0
        self._firsts = firsts
        self._files = [os.open(folder / f"{part:05d}.signature", os.O_RDONLY) for part in range(count)]

    def __enter__(self) -> "_Signatures":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            os.close(file)

    def of(self, row: int) -> np.ndarray:
        part = int(np.searchsorted(self._firsts, row, side="right")) - 1
        data = os.pread(self._files[part], 4 * SIGNED, 4 * SIGNED * (row - int(self._firsts[part])))
        return np.frombuffer(data, dtype=np.uint32)


def resolve_stage(output: Output, unit: Any, matched: str, signed: str, sizes: list[list[int]]) -> None:
    """Which rows are left out, uint8 [rows] (0 kept, 1 equal pair, 2 near-copy), and which documents belong together.

    Rows go in order: one is left out for an earlier one that is kept. One task; some 100 bytes an edge are held.
    """
    files = sorted(Path(matched).glob("*.edges"))
    edges = np.concatenate([np.fromfile(file, dtype=np.int64).reshape(-1, 2) for file in files])
    edges = np.unique(edges, axis=0)
    firsts = np.cumsum([0, *(rows for rows, _ in sizes)])
    # Identities of the rows that have an edge, part by part.
    touched = np.unique(edges)
    known = np.zeros((_IDENTITIES, len(touched)), dtype=np.uint64)
    for part, (rows, _) in enumerate(sizes):
        here = slice(*np.searchsorted(touched, (firsts[part], firsts[part] + rows)))
        keys = np.fromfile(Path(signed) / f"{part:05d}.keys", dtype=np.uint64, count=_IDENTITIES * rows)
        known[:, here] = keys.reshape(_IDENTITIES, rows)[:, touched[here] - firsts[part]]
    later, earlier = (np.searchsorted(touched, edges[:, side]) for side in (0, 1))
    equal_pair = known[_PAIR, later] == known[_PAIR, earlier]
    equal_text = known[_POSITIVE, later] == known[_POSITIVE, earlier]
    left_out = np.zeros(int(firsts[-1]), dtype=np.uint8)
    for (row, kept), same_pair, same_text in zip(edges.tolist(), equal_pair.tolist(), equal_text.tolist(), strict=True):
        # Equal positives with other anchors stay: the loss knows them. Nearly equal ones would be false negatives.
        if not left_out[kept] and (same_pair or not same_text):
            left_out[row] = 1 if same_pair else left_out[row] or 2
    _save(output, "left_out", left_out)
    documents = known[_DOCUMENT, later], known[_DOCUMENT, earlier]
    _save(output, "joins", _joins(edges, *documents, Path(signed), [rows for rows, _ in sizes]))


def _joins(edges: np.ndarray, later: np.ndarray, earlier: np.ndarray, signed: Path, rows: list[int]) -> np.ndarray:
    """Pairs of documents, uint64 [m, 2], where more than half of the rows of one are like rows of the other.

    A note that thousands of documents have does not make them one. `later` and `earlier` are the documents of `edges`.
    """
    both_ways = [later, earlier, edges[:, 0].astype(np.uint64)], [earlier, later, edges[:, 1].astype(np.uint64)]
    shared = np.unique(np.concatenate([np.stack(way, axis=1)[later != earlier] for way in both_ways]), axis=0)
    pairs, counts = np.unique(shared[:, :2], axis=0, return_counts=True)
    documents = np.unique(pairs[:, 0])
    sizes = np.zeros(len(documents), dtype=np.int64)
    for part, length in enumerate(rows):
        here = np.fromfile(signed / f"{part:05d}.keys", np.uint64, count=length, offset=8 * length * _DOCUMENT)
        sizes += np.bincount(np.searchsorted(documents, here[np.isin(here, documents)]), minlength=len(documents))
    return pairs[2 * counts > sizes[np.searchsorted(documents, pairs[:, 0])]]


def dedup_stage(output: Output, unit: list[Any], resolved: str) -> None:
    """Rows of PAIR that are kept; `unit` is [part, its first row, its rows]."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part, first, rows = unit
    left_out = np.fromfile(Path(resolved) / "00000.left_out", dtype=np.uint8, count=rows, offset=first)
    counts = Counter(left_out[left_out > 0].tolist())
    for code, reason in ((1, "equal to an earlier pair"), (2, "positive is a near-copy of an earlier one")):
        if counts[code]:
            output.counts[reason] += counts[code]
    output.write(pq.read_table(part).filter(pa.array(left_out == 0)).to_pylist(), PAIR)

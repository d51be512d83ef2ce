"""Exact nearest-neighbour search at every dim of one embedding, in one pass over the documents.

The products of the segments between two dims add up, so that one full-width matrix product serves all dims. It is done
in fp32 and only proposes: what it cannot rule out is scored again in fp64, row by row, so neither tiles nor threads nor
the number of ranks change a result, and ties go to the smaller index.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.config_evaluate import Vectors
from launch.errors import UserError

if TYPE_CHECKING:
    import torch

    from launch.world import World

DEPTH = 100
OVERSAMPLING = 4  # binary: so many times DEPTH are ranked again
_SLACK = 32  # proposals beyond the asked depth; too few only cost time
_QUERY_TILE, _DOCUMENT_TILE = 256, 4096
_RESCORED_TOGETHER = 1 << 22  # numbers: 32 MB in fp64
_GRID = 2.0**40  # cosines are rounded to multiples of 1e-12, so that what rounding alone tells apart is a tie
_LATENCY_SECONDS = 0.3  # of searches at each dim


@dataclass(frozen=True)
class Found:
    """The best documents of each query, best first: indices int64 [q, k] and cosines float64 [q, k]."""

    index: np.ndarray
    cosine: np.ndarray


@dataclass(frozen=True)
class Share:
    """A rank's documents: indices in the corpus, int64 [m], ascending because of ties, and vectors, float32 [m, d]."""

    index: np.ndarray
    vectors: np.ndarray


def search(queries: np.ndarray, documents: np.ndarray, dims: Sequence[int], k: int = DEPTH) -> dict[int, Found]:
    """The k documents (or all, if fewer) of highest cosine for each query, at each dim (first components).

    `queries` [q, d] and `documents` [n, d] float32, of any length; documents may be a memory map. A zero vector has
    cosine 0 with everything. Memory: tiles of 256 x 4096, and k + 32 proposals a query and dim. Raises UserError if a
    vector is not finite.
    """
    import torch

    refuse_not_finite("query", queries)
    k = min(k, len(documents))
    width = min(k + _SLACK, len(documents))
    dims = sorted(set(dims))
    asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
    pools = [_Pool(len(queries), width) for _ in dims]
    room = torch.empty(2, _QUERY_TILE * _DOCUMENT_TILE)  # taken once: fresh memory costs as much as the sums
    for start, tile, norms in _tiles(documents, dims):
        for row in range(0, len(asked), _QUERY_TILE):
            rows, low = slice(row, row + _QUERY_TILE), 0
            shape = len(asked[rows]), len(tile)
            sums, scores = (part[: shape[0] * shape[1]].view(shape) for part in room)
            for pool, dim, norm in zip(pools, dims, norms, strict=True):
                torch.addmm(sums, asked[rows, low:dim], tile[:, low:dim].T, beta=min(low, 1), out=sums)
                torch.mul(sums, 1 / norm, out=scores)  # the query's own norm does not change an order
                pool.offer(rows, scores, start)
                low = dim
    found = {}
    for pool, dim in zip(pools, dims, strict=True):
        index, best = pool.index.numpy(), pool.best.numpy().astype(np.float64)
        # A sum of dim products in any order is off by at most dim 2^-24 |q||d| (Higham 2002, eq. 3.5, with
        # Cauchy-Schwarz); 8 more roundings for norms and quotients; two sums are compared.
        margin = 2 * (dim + 8) * 2.0**-24 * np.linalg.norm(queries[:, :dim].astype(np.float64), axis=1)
        found[dim] = _ranked(*_rescored(queries, documents, index, dim), k)
        if width < len(documents):
            for row in np.flatnonzero(best[:, k - 1] - best[:, -1] <= margin):
                floor = float(best[row, k - 1] - margin[row])
                again = _search_all(queries[row : row + 1], documents, dim, floor, k)
                found[dim].index[row], found[dim].cosine[row] = again.index[0], again.cosine[0]
    return found


def search_stored(
    queries: np.ndarray, share: Share, dims: Sequence[int], stored: Vectors, world: "World", k: int = DEPTH
) -> dict[int, Found]:
    """Search in the documents of all ranks, vectors stored as `stored`; the result on every rank, the same for any
    number of ranks. All ranks must call with the same queries.

    int8: both sides' codes are compared. binary: the 4k of least Hamming distance (ties: smaller index) are ranked
    again by the query's own numbers and the documents' int8 codes.
    """
    if stored == "float32":
        local: dict[int, Any] = {
            dim: (f.cosine, share.index[f.index], -f.cosine)
            for dim, f in search(queries, share.vectors, dims, k).items()
        }
    elif stored == "int8":
        local = {}
        for dim in dims:
            codes = quantise(share.vectors[:, :dim], "int8").astype(np.float32)
            f = search(quantise(queries[:, :dim], "int8").astype(np.float32), codes, [dim], k)[dim]
            local[dim] = (f.cosine, share.index[f.index], -f.cosine)
    else:
        local = {dim: _binary(queries[:, :dim], share, dim, OVERSAMPLING * k) for dim in dims}
    first = OVERSAMPLING * k if stored == "binary" else k
    if world.world_size > 1:
        import torch

        parts: list[Any] = [None] * world.world_size
        torch.distributed.all_gather_object(parts, local)
        local = {
            dim: tuple(np.concatenate(p, axis=1) for p in zip(*(q[dim] for q in parts), strict=True)) for dim in dims
        }
    found = {}
    for dim in dims:
        cosine, index, distance = local[dim]
        order = np.lexsort((index, distance), axis=-1)[:, :first]
        found[dim] = _ranked(np.take_along_axis(cosine, order, 1), np.take_along_axis(index, order, 1), k)
    return found


def quantise(vectors: np.ndarray, stored: Vectors) -> np.ndarray:
    """Vectors [n, d] as they are stored: float32; int8 [n, d], each vector scaled so that its largest number is 127,
    which leaves its direction; binary, uint8 [n, ceil(d / 8)], a bit 1 where the number is above 0, first bit highest.
    """
    if stored == "binary":
        return np.packbits(vectors > 0, axis=1)
    if stored == "int8":
        largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return np.rint(vectors / largest * 127).astype(np.int8)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def bytes_per_vector(dim: int, stored: Vectors) -> int:
    """What one stored vector takes in memory; what binary ranks again by lies on disk."""
    return {"float32": 4 * dim, "int8": dim, "binary": -(-dim // 8)}[stored]


def search_latency(queries: np.ndarray, documents: np.ndarray, dim: int, stored: Vectors) -> dict[str, Any]:
    """Milliseconds of one exact search by faiss for the top 10: one query, one thread, the median.

    Flat indexes: inner product, scalar quantiser of 8 bits, Hamming distance without the second ranking.
    """
    import faiss
    from threadpoolctl import threadpool_limits

    codes, asked = (quantise(side[:, :dim], stored) for side in (documents, queries))
    if stored == "binary":
        padded = -codes.shape[1] % 8  # faiss's kernels want whole 64-bit words
        codes, asked = (np.pad(side, ((0, 0), (0, padded))) for side in (codes, asked))
        index: Any = faiss.IndexBinaryFlat(8 * codes.shape[1])
    elif stored == "int8":
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
        index = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
        codes, asked = codes.astype(np.float32), asked.astype(np.float32)
    else:
        index = faiss.IndexFlatIP(dim)
    index.add(codes)
    k, times = min(10, len(documents)), []
    faiss.omp_set_num_threads(1)
    with threadpool_limits(limits=1):
        begin = time.perf_counter()
        # At least 5 after the first, which warms caches up and is not counted.
        while len(times) < 6 or (time.perf_counter() - begin < _LATENCY_SECONDS and len(times) < 1001):
            query = asked[len(times) % len(asked)][None]
            start = time.perf_counter()
            index.search(query, k)
            times.append(time.perf_counter() - start)
    return {
        "dim": dim,
        "vectors": stored,
        "ms_per_query": float(np.median(times[1:])) * 1e3,
        "searches_timed": len(times) - 1,
        "threads": 1,
        "documents": len(documents),
        "bytes_per_vector": bytes_per_vector(dim, stored),
    }


def refuse_not_finite(kind: str, vectors: np.ndarray, first: int = 0) -> None:
    """UserError if a vector holds NaN or infinity: a ranking by it would look like a result."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(
            f"evaluate: {len(bad)} of {len(vectors)} {kind} vectors hold NaN or infinity, first number "
            f"{first + bad[0]}; the model diverged: lower train.learning_rate or set train.precision to fp32 or bf16"
        )


class _Pool:
    """The `width` best proposals of each query so far, best first."""

    def __init__(self, queries: int, width: int) -> None:
        import torch

        self.best = torch.full((queries, width), -torch.inf)
        self.index = torch.zeros((queries, width), dtype=torch.int64)

    def offer(self, rows: slice, scores: "torch.Tensor", start: int) -> None:
        """Take what beats the last one in; `scores` [rows, tile] of the documents from `start` on."""
        import torch

        best, index = self.best[rows], self.index[rows]
        if best[:, -1].isneginf().any():  # everything is still wanted
            fresh, where = scores, torch.arange(start, start + scores.shape[1]).expand(scores.shape)
        else:
            beats = (scores > best[:, -1:]).numpy()
            row, column = np.divmod(np.flatnonzero(beats.ravel()), beats.shape[1])
            counts = np.bincount(row, minlength=len(beats))
            fresh = torch.full((len(beats), int(counts.max())), -torch.inf)
            where = torch.zeros(fresh.shape, dtype=torch.int64)
            place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
            fresh.numpy()[row, place] = scores.numpy()[row, column]
            where.numpy()[row, place] = column + start
        self.best[rows], order = torch.cat([best, fresh], 1).topk(best.shape[1], dim=1)
        self.index[rows] = torch.cat([index, where], 1).gather(1, order)


def _tiles(documents: np.ndarray, dims: Sequence[int]) -> Any:
    """(first index, fp32 tile, its norms at each dim); a zero vector's norm is 1."""
    import torch

    for start in range(0, len(documents), _DOCUMENT_TILE):
        rows = np.ascontiguousarray(documents[start : start + _DOCUMENT_TILE], dtype=np.float32)
        refuse_not_finite("document", rows, start)
        tile = torch.from_numpy(rows)
        norms = [torch.linalg.vector_norm(tile[:, :dim], dim=1) for dim in dims]
        yield start, tile, [torch.where(norm > 0, norm, 1) for norm in norms]


def _rescored(queries: np.ndarray, documents: np.ndarray, index: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, index) of the documents `index` [q, w]: each from its own two rows alone, in fp64.

    A product of two fp32 numbers is exact in fp64, and numpy adds up each row in the same order, so equal rows give
    equal numbers.
    """
    cosines = np.empty(index.shape)
    step = max(1, _RESCORED_TOGETHER // (index.shape[1] * dim or 1))
    for row in range(0, len(index), step):
        rows = slice(row, row + step)
        asked = queries[rows, :dim].astype(np.float64)[:, None]
        theirs = documents[index[rows], :dim].astype(np.float64)
        lengths = np.sqrt((theirs * theirs).sum(-1) * (asked * asked).sum(-1))
        cosines[rows] = (theirs * asked).sum(-1) / np.where(lengths > 0, lengths, 1)
    return np.rint(cosines * _GRID) / _GRID, index


def _search_all(queries: np.ndarray, documents: np.ndarray, dim: int, floor: float, k: int) -> Found:
    """The k best for one query among all documents whose fp32 score is not below `floor`: no tie is crowded out."""
    best, index = np.empty((1, 0)), np.empty((1, 0), dtype=np.int64)
    for start, tile, (norm,) in _tiles(documents, [dim]):
        scores = (tile[:, :dim].numpy() @ queries[0, :dim].astype(np.float32)) / norm.numpy()
        near = start + np.flatnonzero(scores >= floor)[None]
        fresh = _rescored(queries, documents, near, dim)[0]
        kept = _ranked(np.concatenate([best, fresh], 1), np.concatenate([index, near], 1), k)
        best, index = kept.cosine, kept.index
    return Found(index, best)


def _ranked(cosines: np.ndarray, index: np.ndarray, k: int) -> Found:
    order = np.lexsort((index, -cosines), axis=-1)[:, :k]
    return Found(np.take_along_axis(index, order, 1), np.take_along_axis(cosines, order, 1))


def _binary(queries: np.ndarray, share: Share, dim: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cosine with the int8 codes, index, Hamming distance) of the k documents of least distance."""
    import faiss

    refuse_not_finite("query", queries)
    refuse_not_finite("document", share.vectors)
    codes, asked = (quantise(side[:, :dim], "binary") for side in (share.vectors, queries))
    distance, near = faiss.knn_hamming(asked, codes, min(k, len(codes)))
    cosine = _rescored(queries, quantise(share.vectors[:, :dim], "int8"), near, dim)[0]
    return cosine, share.index[near], distance

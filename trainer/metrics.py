"""Exact search, retrieval metrics per query, and what they say with which certainty.

Everything here is numpy on vectors that are already there; the same functions judge PyTorch, ONNX and
quantised files. Metrics are trec_eval's, through pytrec_eval, so they compare with BEIR's and MTEB's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.errors import UserError

_TREC = {
    "ndcg@10": "ndcg_cut_10",
    "mrr@10": "recip_rank",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "map@100": "map_cut_100",
}
METRICS = tuple(_TREC)
_DEPTH = 100
_RESAMPLES = 10_000
_EXACT_UP_TO = 13  # 2**13 sign patterns are fewer than _RESAMPLES: take all of them
_CELLS = 4_000_000  # numbers drawn at once: 32 MB
_QUERY_TILE = 512
_LATENCY_SECONDS = 0.3  # of searches at each dim


def search(
    queries: np.ndarray, documents: np.ndarray, k: int = _DEPTH, dim: int | None = None, tile: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest cosine for each query: indices int64 [q, k] and cosines float64 [q, k].

    Exact; `dim` truncates and renormalises first; k is cut to the number of documents. Ties go to the
    smaller index, whatever `tile`, BLAS or number of threads: unit vectors are rounded to multiples of 2^-26
    (1.5e-8), so each product is a multiple of 2^-52, every partial sum stays below 2 (Cauchy-Schwarz) and
    float64 adds them without any rounding. Memory: the vectors, one float64 tile of documents, 512 x tile.
    Raises UserError if a vector is not finite.
    """
    refuse_not_finite("query", queries)
    refuse_not_finite("document", documents)
    k = min(k, len(documents))
    grid = _unit_on_grid(queries, dim)
    best = np.full((len(queries), 0), 0.0)
    index = np.zeros((len(queries), 0), dtype=np.int64)
    for start in range(0, len(documents), tile):
        part = _unit_on_grid(documents[start : start + tile], dim)
        width = min(k, best.shape[1] + len(part))
        new_best, new_index = np.empty((len(grid), width)), np.empty((len(grid), width), dtype=np.int64)
        for row in range(0, len(grid), _QUERY_TILE):
            rows = slice(row, row + _QUERY_TILE)
            scores = np.concatenate([best[rows], grid[rows] @ part.T], axis=1)
            fresh = np.broadcast_to(np.arange(start, start + len(part)), (len(scores), len(part)))
            new_best[rows], new_index[rows] = _top(scores, np.concatenate([index[rows], fresh], axis=1), width)
        best, index = new_best, new_index
    order = np.lexsort((index, -best), axis=-1)
    return np.take_along_axis(index, order, 1), np.take_along_axis(best, order, 1)


def score(
    relevant: Sequence[set[int]], queries: np.ndarray, documents: np.ndarray, dims: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    """Every metric of METRICS per query, float64 [q], at each dim of one embedding (truncated, renormalised).

    `relevant[i]` holds the indices of the documents that answer query i, at least one. map@100 divides by
    all relevant documents as trec_eval does; sentence-transformers divides by at most 100.
    """
    import pytrec_eval

    truth = {str(i): {str(d): 1 for d in docs} for i, docs in enumerate(relevant)}
    judge = pytrec_eval.RelevanceEvaluator(truth, set(_TREC.values()))
    scores = {}
    for dim in dims:
        ranking, _ = search(queries, documents, _DEPTH, dim)
        # pytrec_eval breaks ties by document name; falling whole numbers leave it none to break.
        run = {
            str(i): {str(d): float(len(docs) - place) for place, d in enumerate(docs.tolist())}
            for i, docs in enumerate(ranking)
        }
        judged = judge.evaluate(run)
        values = {name: np.array([judged[str(i)][trec] for i in range(len(relevant))]) for name, trec in _TREC.items()}
        # Reciprocal rank has no cut in trec_eval: 1/11 and less is beyond place 10.
        values["mrr@10"][values["mrr@10"] < 1 / 10.5] = 0.0
        scores[dim] = values
    return scores


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of columns: mean of b - a, its 95 % interval, and a two-sided p; float64 [m] each."""

    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def compare(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Comparison:
    """Compare values [q, m] or [q] of the same queries: percentile bootstrap and permutation test.

    Under the null hypothesis a query's two values may be swapped, which flips the sign of its difference:
    10,000 random sign patterns (all 2^q up to 13 queries); p counts patterns at least as far from 0 as the
    observed one, itself included (Phipson and Smyth 2010), so it is never 0. One seed, one answer.
    """
    differences = (b - a).reshape(len(a), -1)
    low, high = interval(differences, -1.0, 1.0, seed)
    observed = differences.mean(axis=0)
    hits, drawn = np.zeros(differences.shape[1]), 0
    for signs in _sign_patterns(len(differences), seed):
        flipped = signs @ differences / len(differences)
        hits += (np.abs(flipped) >= np.abs(observed) - 1e-12).sum(axis=0)
        drawn += len(signs)
    exact = len(differences) <= _EXACT_UP_TO
    p = hits / drawn if exact else (hits + 1) / (drawn + 1)
    return Comparison(observed, low, high, p)


def interval(values: np.ndarray, least: float = 0.0, most: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each column's mean, [q, m] -> low, high [m]: percentile bootstrap, 10,000 times.

    One query says nothing about others: then the interval is all that is possible, [least, most].
    """
    count, columns = values.shape
    if count < 2:
        return np.full(columns, least), np.full(columns, most)
    random = np.random.default_rng(seed)
    means = []
    for rows in _chunks(count):
        drawn = random.integers(count, size=(rows, count))
        drawn += np.arange(rows)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(times @ values / count)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low, high


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of a family of p values, in the given order."""
    corrected, running = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = running
    return corrected


def search_latency(queries: np.ndarray, documents: np.ndarray, dim: int) -> dict[str, float | int]:
    """Milliseconds of one exact float32 search for the top 10: one query, one thread, the median."""
    from threadpoolctl import threadpool_limits

    corpus = np.ascontiguousarray(documents[:, :dim], dtype=np.float32)
    asked = np.ascontiguousarray(queries[:, :dim], dtype=np.float32)
    k = min(10, len(corpus))
    times: list[float] = []
    with threadpool_limits(limits=1):
        begin = time.perf_counter()
        # At least 5 after the first, which warms caches up and is not counted.
        while len(times) < 6 or (time.perf_counter() - begin < _LATENCY_SECONDS and len(times) < 1001):
            query = asked[len(times) % len(asked)]
            start = time.perf_counter()
            found = corpus @ query
            np.argpartition(found, len(found) - k)[-k:]
            times.append(time.perf_counter() - start)
    timed = times[1:]
    return {
        "dim": dim,
        "ms_per_query": float(np.median(timed)) * 1e3,
        "searches_timed": len(timed),
        "threads": 1,
        "documents": len(corpus),
        "bytes_per_vector": 4 * dim,
    }


def refuse_not_finite(kind: str, vectors: np.ndarray) -> None:
    """UserError if a vector holds NaN or infinity: a ranking by it would look like a result."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(
            f"evaluate: {len(bad)} of {len(vectors)} {kind} vectors hold NaN or infinity, first number "
            f"{bad[0]}; the model diverged: lower train.learning_rate or set train.precision to fp32 or bf16"
        )


def _unit_on_grid(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """float64 unit vectors of the first `dim` numbers, rounded to multiples of 2^-26; zero stays zero."""
    cut = vectors[:, :dim].astype(np.float64)
    cut /= np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
    return np.rint(cut * 2.0**26) * 2.0**-26


def _top(scores: np.ndarray, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row by (score down, index up), in no order."""
    if scores.shape[1] == k:
        return scores, index
    chosen = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
    threshold = np.take_along_axis(scores, chosen, 1).min(axis=1, keepdims=True)
    for row in np.flatnonzero((scores >= threshold).sum(axis=1) > k):
        chosen[row] = np.lexsort((index[row], -scores[row]))[:k]
    return np.take_along_axis(scores, chosen, 1), np.take_along_axis(index, chosen, 1)


def _chunks(count: int) -> list[int]:
    """Sizes that sum to _RESAMPLES, each small enough that `size x count` draws fit in memory."""
    size = max(1, min(_RESAMPLES, _CELLS // count))
    return [min(size, _RESAMPLES - start) for start in range(0, _RESAMPLES, size)]


def _sign_patterns(count: int, seed: int):
    """Blocks of sign patterns, float64 [rows, count] of -1 and 1."""
    if count <= _EXACT_UP_TO:
        bits = np.arange(2**count)[:, None] >> np.arange(count)
        yield 1.0 - 2.0 * (bits & 1)
        return
    random = np.random.default_rng([seed, 1])
    for rows in _chunks(count):
        yield 1.0 - 2.0 * random.integers(2, size=(rows, count), dtype=np.int8)

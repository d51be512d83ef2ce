"""Retrieval metrics per query, and what they say with which certainty.

Metrics are trec_eval's, through pytrec_eval, so they compare with BEIR's and MTEB's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_TREC = {
    "ndcg@10": "ndcg_cut_10",
    "mrr@10": "recip_rank",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "map@100": "map_cut_100",
}
METRICS = tuple(_TREC)
_RESAMPLES = 10_000
_EXACT_UP_TO = 13  # 2**13 sign patterns are fewer than _RESAMPLES: take all of them
_CELLS = 4_000_000  # numbers drawn at once: 32 MB


def judge(relevant: Sequence[Mapping[int, int]], ranking: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of METRICS per query, float64 [q], of `ranking`, document indices int64 [q, k], best first.

    `relevant[i]` maps the indices of the documents that answer query i, at least one, to their grades. map@100 divides
    by all relevant documents as trec_eval does; sentence-transformers divides by at most 100.
    """
    import pytrec_eval

    truth = {str(i): {str(d): grade for d, grade in grades.items()} for i, grades in enumerate(relevant)}
    evaluator = pytrec_eval.RelevanceEvaluator(truth, set(_TREC.values()))
    # pytrec_eval breaks ties by document name; falling whole numbers leave it none to break.
    falling = [float(place) for place in range(ranking.shape[1], 0, -1)]
    run = {str(i): dict(zip(map(str, docs), falling, strict=True)) for i, docs in enumerate(ranking.tolist())}
    judged = evaluator.evaluate(run)
    values = {name: np.array([judged[str(i)][trec] for i in range(len(relevant))]) for name, trec in _TREC.items()}
    # Reciprocal rank has no cut in trec_eval: 1/11 and less is beyond place 10.
    values["mrr@10"][values["mrr@10"] < 1 / 10.5] = 0.0
    return values


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

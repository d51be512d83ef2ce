"""Retrieval metrics at every dim: one search of ours against sentence-transformers' evaluator, once a dim.

Both are given the same vectors, so no time is spent in a model; by hand the rival would embed the corpus once a dim
too. 1,000 queries x 100,000 passages of 384 dims, five dims, cosine; every metric of ours by both, compared.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.common import (
    Cost,
    against_rival,
    finish,
    in_fresh_process,
    one_thread,
    options,
    peak,
    reset_peak,
    table,
    timed,
)

DIMS = (384, 256, 128, 64, 32)
METRICS = {
    "ndcg@10": "ndcg@k",
    "mrr@10": "mrr@k",
    "recall@10": "recall@k",
    "recall@100": "recall@k",
    "map@100": "map@k",
}


@dataclass(frozen=True)
class Result:
    """What one side took and found: mean of each metric at each dim."""

    cost: Cost
    extra_bytes: int
    means: dict[tuple[int, str], float]


def problem(queries: int, documents: int) -> tuple[np.ndarray, np.ndarray, list[dict[int, int]]]:
    """Vectors [q, 384] and [n, 384] in which a query lies near the mean of its 1 to 5 relevant passages."""
    random = np.random.default_rng(0)
    corpus = random.standard_normal((documents, DIMS[0]), dtype=np.float32)
    relevant = [
        dict.fromkeys(random.integers(documents, size=random.integers(1, 6)).tolist(), 1) for _ in range(queries)
    ]
    asked = np.stack([corpus[list(found)].mean(axis=0) for found in relevant])
    return asked + 2.5 * random.standard_normal(asked.shape, dtype=np.float32), corpus, relevant


class Given:
    """A model for both sides; a text is the number of its vector."""

    artifact, width = "pytorch", DIMS[0]

    def __init__(self, queries: np.ndarray, documents: np.ndarray) -> None:
        import torch

        self.device = torch.device("cpu")
        self._queries, self._documents = torch.from_numpy(queries), torch.from_numpy(documents)

    def lengths(self, texts: list[str], role: str) -> np.ndarray:
        return np.ones(len(texts), dtype=np.int64)

    def vectors(self, texts: list[str], role: str) -> Any:
        held = self._queries if role == "query" else self._documents
        return held[[int(text) for text in texts]]

    def encode_query(self, texts: list[str], truncate_dim: int | None = None, **_: Any) -> Any:
        return self.vectors(texts, "query")[:, :truncate_dim]

    def encode_document(self, texts: list[str], truncate_dim: int | None = None, **_: Any) -> Any:
        return self.vectors(texts, "document")[:, :truncate_dim]


def ours(queries: int, documents: int) -> Result:
    """Embeds, searches and judges as `nestling eval` does."""
    from trainer.evaluation import score
    from trainer.retrieval import RetrievalSet

    asked, corpus, relevant = problem(queries, documents)
    texts = RetrievalSet([str(i) for i in range(queries)], [str(i) for i in range(documents)], relevant)
    model: Any = Given(asked, corpus)
    world: Any = SimpleNamespace(rank=0, world_size=1)
    before = reset_peak()
    scored, cost = timed(lambda: score(model, texts, DIMS, batch_tokens=8192, world=world))
    means = {(d, m): float(scored.by_metric["float32", d][m].mean()) for d in DIMS for m in METRICS}
    return Result(cost, peak() - before, means)


def rivals(queries: int, documents: int) -> Result:
    """Its evaluator at each dim."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    asked, corpus, relevant = problem(queries, documents)
    model: Any = Given(asked, corpus)
    names = [str(i) for i in range(max(queries, documents))]
    texts = [dict(zip(names[:count], names[:count], strict=True)) for count in (queries, documents)]
    judged = {names[i]: {names[d] for d in found} for i, found in enumerate(relevant)}

    def evaluate() -> dict[tuple[int, str], float]:
        means = {}
        for dim in DIMS:
            evaluator = InformationRetrievalEvaluator(
                texts[0],
                texts[1],
                judged,
                precision_recall_at_k=[10, 100],
                truncate_dim=dim,
                score_functions={"cosine": cos_sim},
            )
            found: Any = evaluator.compute_all_metrics(model)["cosine"]
            for name, theirs in METRICS.items():
                means[dim, name] = float(found[theirs][int(name.partition("@")[2])])
        return means

    before = reset_peak()
    means, cost = timed(evaluate)
    return Result(cost, peak() - before, means)


def _alone(side: str, queries: int, documents: int) -> Result:
    """What a fresh process runs: a small set first, so that the libraries are warm."""
    run = {"ours": ours, "rival": rivals}[side]
    run(50, 500)
    return run(queries, documents)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    queries, documents = (200, 20_000) if args.quick else (1000, 100_000)
    results = {side: in_fresh_process(_alone, side, queries, documents) for side in ("rival", "ours")}
    theirs, mine = results["rival"], results["ours"]
    apart = max(abs(theirs.means[key] - value) for key, value in mine.means.items())
    print()
    table(
        ["side", "CPU s", "wall s", "extra MiB", *(f"ndcg@10 at {dim}" for dim in DIMS)],
        [
            [side, r.cost.cpu, r.cost.wall, f"{r.extra_bytes / 2**20:,.0f}", *(r.means[d, "ndcg@10"] for d in DIMS)]
            for side, r in results.items()
        ],
    )
    where = (
        f"{queries:,} queries x {documents:,} passages, dims {', '.join(map(str, DIMS))}, given vectors, one thread, "
        f"evaluator's default corpus chunk; all {len(METRICS)} metrics at all dims agree to {apart:.0e}"
    )
    if apart > 1e-6:
        raise SystemExit(f"the two sides differ by {apart:.1e}")
    return finish(
        against_rival("evaluate", (theirs.cost, theirs.extra_bytes), (mine.cost, mine.extra_bytes), where), args
    )


if __name__ == "__main__":
    sys.exit(main())

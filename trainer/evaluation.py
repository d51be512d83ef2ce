"""Retrieval quality: every metric of base and tuned model, at every dim and storage of one embedding pass.

`score` embeds, searches and judges one model, `compare` turns scored models into evaluation.json (DESIGN: results,
comparisons, tradeoffs), `examples` into evaluation_queries.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.config_evaluate import Vectors
from launch.errors import UserError
from trainer import metrics
from trainer.embed import embed, embed_share
from trainer.retrieval import RetrievalSet
from trainer.search import Found, search_latency, search_stored

if TYPE_CHECKING:
    from launch.world import World
    from trainer.embedder import Embedder

MAIN_METRIC = "ndcg@10"
_EXAMPLES = 10  # most improved and most hurt queries that are kept with their texts
_PASSAGES = 3  # best passages shown per example and model


@dataclass(frozen=True)
class Scored:
    """One model on one set: metrics per query, float64 [q], by storage and dim; the best documents at full width."""

    artifact: str
    by_metric: dict[tuple[Vectors, int], dict[str, np.ndarray]]
    top: Found
    latency: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dims(self) -> list[int]:
        """Largest first."""
        return sorted({dim for _, dim in self.by_metric}, reverse=True)


def score(
    embedder: "Embedder",
    retrieval: RetrievalSet,
    dims: Sequence[int],
    stored: Sequence[Vectors] = ("float32",),
    *,
    batch_tokens: int,
    world: "World",
    timed: bool = False,
) -> Scored:
    """Metrics of a model on a set at each dim and storage; float32 is always among them. All ranks must call.

    `timed` also measures one search at each, on rank 0 over its share of the documents. Raises UserError if a dim is
    wider than the vectors or a vector is not finite.
    """
    dims = sorted(set(dims) or {embedder.width}, reverse=True)
    if dims[-1] < 1 or dims[0] > embedder.width:
        raise UserError(f"dims: got {dims}, allowed: 1 to {embedder.width}, the width of the model's vectors")
    queries = embed(embedder, retrieval.queries, "query", batch_tokens=batch_tokens, world=world)
    share = embed_share(embedder, retrieval.documents, "document", batch_tokens=batch_tokens, world=world)
    by_metric, latency, top = {}, [], None
    kinds: list[Vectors] = ["float32", *(kind for kind in stored if kind != "float32")]
    for kind in kinds:
        found = search_stored(queries, share, dims, kind, world)
        top = top or found[dims[0]]
        for dim in dims:
            by_metric[kind, dim] = metrics.judge(retrieval.relevant, found[dim].index)
            if timed and world.rank == 0:
                latency.append(search_latency(queries, share.vectors, dim, kind))
    assert top is not None
    return Scored(embedder.artifact, by_metric, top, latency)


def compare(
    retrieval: RetrievalSet, scored: Mapping[str, Scored], name: str = "domain", seed: int = 0
) -> dict[str, Any]:
    """The contents of evaluation.json for one set, without gates and averages.

    `scored` maps "base" and "tuned" (or one of them) to their scores. The first is compared with the last at each dim;
    the last one's other dims and storages are weighed against its full width in float32. `p_holm` corrects p over the
    comparisons of one metric.
    """
    cells: list[tuple[str, Vectors, int, str]] = [
        (model, stored, dim, metric)
        for model, one in scored.items()
        for stored, dim in one.by_metric
        for metric in metrics.METRICS
    ]
    values = np.stack([scored[m].by_metric[stored, dim][metric] for m, stored, dim, metric in cells], axis=1)
    low, high = metrics.interval(values, seed=seed)
    results = [
        {
            "set": name,
            "model": model,
            "artifact": scored[model].artifact,
            "vectors": stored,
            "dim": dim,
            "metric": metric,
            "value": float(values[:, i].mean()),
            "ci95": [float(low[i]), float(high[i])],
            "queries": len(retrieval.queries),
            "documents": len(retrieval.documents),
        }
        for i, (model, stored, dim, metric) in enumerate(cells)
    ]
    base, tuned = next(iter(scored)), list(scored)[-1]
    one, two, dims = scored[base], scored[tuned], scored[tuned].dims
    comparisons, tradeoffs = [], []
    for metric in metrics.METRICS:
        if base != tuned:
            pairs = [(one.by_metric["float32", d][metric], two.by_metric["float32", d][metric]) for d in dims]
            for dim, outcome in zip(dims, _outcomes(pairs, seed), strict=True):
                sides = {"a": base, "b": tuned, "artifact": two.artifact, "vectors": "float32", "dim": dim}
                comparisons.append({"set": name, **sides, "metric": metric, **outcome})
        smaller = [key for key in two.by_metric if key != ("float32", dims[0])]
        full = two.by_metric["float32", dims[0]][metric]
        pairs = [(full, two.by_metric[key][metric]) for key in smaller]
        for key, outcome in zip(smaller, _outcomes(pairs, seed), strict=True):
            keys = {"a": ("float32", dims[0]), "b": key}
            sides = {s: {"artifact": two.artifact, "vectors": v, "dim": d} for s, (v, d) in keys.items()}
            tradeoffs.append({"set": name, "model": tuned, "metric": metric, **sides, **outcome})
    size = {"queries": len(retrieval.queries), "documents": len(retrieval.documents)}
    return {
        "sets": {name: size | {"fingerprint": retrieval.fingerprint}},
        "results": results,
        "comparisons": comparisons,
        "tradeoffs": tradeoffs,
        "latency": two.latency,
    }


def joined(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Evaluations of several sets as one."""
    sets = {name: facts for one in evaluations for name, facts in one["sets"].items()}
    lists = ("results", "comparisons", "tradeoffs", "latency")
    return {"sets": sets} | {key: [entry for one in evaluations for entry in one[key]] for key in lists}


def _outcomes(pairs: list[tuple[np.ndarray, np.ndarray]], seed: int) -> list[dict[str, Any]]:
    """Difference, interval, p, p_holm and wins of each pair of columns; the pairs are one family."""
    if not pairs:
        return []
    a, b = (np.stack(side, axis=1) for side in zip(*pairs, strict=True))
    found = metrics.compare(a, b, seed=seed)
    numbers = (side.tolist() for side in (found.difference, found.low, found.high, found.p))
    counts = (side.sum(axis=0).tolist() for side in (b > a, b == a, b < a))
    return [
        {
            "difference": difference,
            "ci95": [low, high],
            "p": p,
            "p_holm": corrected,
            "wins": wins,
            "ties": ties,
            "losses": losses,
        }
        for difference, low, high, p, corrected, wins, ties, losses in zip(
            *numbers, metrics.holm(found.p.tolist()), *counts, strict=True
        )
    ]


def examples(retrieval: RetrievalSet, scored: Mapping[str, Scored]) -> dict[str, Any]:
    """The contents of evaluation_queries.json: queries that gained and lost most between the first and the last model
    at full width, with their best passages."""
    base, tuned = next(iter(scored)), list(scored)[-1]
    dim = scored[tuned].dims[0]
    values = {name: scored[name].by_metric["float32", dim][MAIN_METRIC] for name in (base, tuned)}
    change = values[tuned] - values[base]
    order = np.argsort(-change, kind="stable")
    improved = [int(i) for i in order[:_EXAMPLES] if change[i] > 0]
    hurt = [int(i) for i in order[::-1][:_EXAMPLES] if change[i] < 0]

    def best(name: str, i: int) -> dict[str, Any]:
        top = scored[name].top
        ranked = zip(top.index[i, :_PASSAGES].tolist(), top.cosine[i, :_PASSAGES].tolist(), strict=True)
        passages = [
            {"document": retrieval.documents[d], "cosine": c, "relevant": d in retrieval.relevant[i]} for d, c in ranked
        ]
        return {"value": float(values[name][i]), "top": passages}

    def example(i: int) -> dict[str, Any]:
        return {
            "query": retrieval.queries[i],
            "relevant": [retrieval.documents[d] for d in sorted(retrieval.relevant[i])[:_PASSAGES]],
            "relevant_count": len(retrieval.relevant[i]),
            "difference": float(change[i]),
            "base": best(base, i),
            "tuned": best(tuned, i),
        }

    counts = {"improved": change > 0, "same": change == 0, "hurt": change < 0}
    return {
        "metric": MAIN_METRIC,
        "dim": dim,
        "counts": {name: int(held.sum()) for name, held in counts.items()},
        "improved": [example(i) for i in improved],
        "hurt": [example(i) for i in hurt],
    }


def format_p(p: float | None) -> str:
    """A p value for people: three decimals, and a bound instead of a zero."""
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"

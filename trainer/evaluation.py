"""Retrieval evaluation on held-out pairs: base against tuned, at every dim of one embedding.

`retrieval_set` makes queries, documents and judgements from pairs, `evaluate` turns the models' vectors into
evaluation.json (DESIGN: results, comparisons, tradeoffs) and evaluation_queries.json, `table` into text.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.errors import UserError
from trainer import metrics

MAIN_METRIC = "ndcg@10"
_ARTIFACT = "pytorch"  # what the vectors come from
_EXAMPLES = 10  # most improved and most hurt queries that are kept with their texts
_PASSAGES = 3  # best passages shown per example and model


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, the documents that are searched, and for each query the indices of those that answer it."""

    queries: list[str]
    documents: list[str]
    relevant: list[set[int]]

    def __post_init__(self) -> None:
        if not self.queries:
            raise UserError("evaluate.sources: no rows, so no queries; give held-out rows with anchor and positive")
        if len(self.documents) < 2:
            raise UserError(
                f"evaluate.sources: got {len(self.documents)} distinct positive(s), allowed: at least 2, "
                f"because a search in one document always finds it; give more held-out rows"
            )
        for query, documents in zip(self.queries, self.relevant, strict=True):
            if not documents or not all(0 <= d < len(self.documents) for d in documents):
                raise UserError(
                    f"evaluate.sources: query {query[:80]!r} has no relevant document in the corpus; leave it out"
                )


def retrieval_set(
    rows: Iterable[dict[str, Any]], max_queries: int | None = None, max_documents: int | None = None, seed: int = 0
) -> RetrievalSet:
    """Distinct anchors are queries, distinct positives documents; all positives of an anchor are relevant.

    What is drawn, and the order of both, follow a hash keyed by `seed`: the order of rows changes nothing.
    Documents that answer a drawn query stay; others fill up to `max_documents`. Raises UserError if there is
    no row, a row lacks a text, fewer than 2 documents are left, or the relevant ones exceed `max_documents`.
    """
    answers: dict[str, set[str]] = {}
    for number, row in enumerate(rows):
        anchor, positive = row.get("anchor"), row.get("positive")
        if not isinstance(anchor, str) or not isinstance(positive, str):
            raise UserError(
                f"evaluate.sources: row {number} needs a text as anchor and as positive, got texts in "
                f"{', '.join(k for k, v in row.items() if isinstance(v, str)) or 'no column'}; "
                f"set columns of the source"
            )
        answers.setdefault(anchor, set()).add(positive)

    def place(text: str) -> bytes:
        key = seed.to_bytes(16, "little", signed=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=16).digest()

    queries = sorted(answers, key=place)[:max_queries]
    wanted = set().union(*(answers[query] for query in queries))
    others = sorted(set().union(*answers.values()) - wanted, key=place)
    if max_documents is not None:
        if len(wanted) > max_documents:
            raise UserError(
                f"evaluate.max_documents: got {max_documents}, but {len(queries)} queries have {len(wanted)} "
                f"relevant passages; allowed: at least {len(wanted)}, or lower evaluate.max_queries"
            )
        others = others[: max_documents - len(wanted)]
    documents = sorted([*wanted, *others], key=place)
    index = {text: i for i, text in enumerate(documents)}
    return RetrievalSet(queries, documents, [{index[text] for text in answers[query]} for query in queries])


def evaluate(
    retrieval: RetrievalSet, vectors: dict[str, tuple[np.ndarray, np.ndarray]], dims: Sequence[int], seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(evaluation, queries): the contents of evaluation.json and of evaluation_queries.json.

    `vectors` maps "base" and "tuned" (or one of them) to vectors [q, d] of the queries and [n, d] of the
    documents, in the order of `retrieval`. The first model is compared with the last at each dim; the last
    one's smaller dims are weighed against its largest. `p_holm` corrects p over the dims of one metric.
    Raises UserError if a dim is wider than the vectors or a vector is not finite.
    """
    dims = sorted(set(dims), reverse=True)
    for name, (queries, documents) in vectors.items():
        assert len(queries) == len(retrieval.queries), name
        assert len(documents) == len(retrieval.documents), name
        if not dims or dims[-1] < 1 or dims[0] > queries.shape[1]:
            raise UserError(f"loss.dims: got {dims}, allowed: 1 to {queries.shape[1]}, the width of the {name} model")
    scores = {
        name: metrics.score(retrieval.relevant, queries, documents, dims)
        for name, (queries, documents) in vectors.items()
    }

    def column(model: str, dim: int, metric: str) -> np.ndarray:
        return scores[model][dim][metric]

    names = list(vectors)
    cells = [(name, dim, metric) for name in names for dim in dims for metric in metrics.METRICS]
    values = np.stack([column(*cell) for cell in cells], axis=1)  # [q, cells]
    low, high = metrics.interval(values, seed=seed)
    results = [
        {
            "model": name,
            "artifact": _ARTIFACT,
            "dim": dim,
            "metric": metric,
            "value": float(values[:, i].mean()),
            "ci95": [float(low[i]), float(high[i])],
            "queries": len(retrieval.queries),
            "documents": len(retrieval.documents),
        }
        for i, (name, dim, metric) in enumerate(cells)
    ]

    base, tuned = names[0], names[-1]
    comparisons, tradeoffs = [], []
    for metric in metrics.METRICS:
        if base != tuned:
            pairs = [(column(base, dim, metric), column(tuned, dim, metric)) for dim in dims]
            for dim, outcome in zip(dims, _outcomes(pairs, seed), strict=True):
                sides = {"a": base, "b": tuned, "artifact": _ARTIFACT, "dim": dim}
                comparisons.append(sides | {"metric": metric} | outcome)
        pairs = [(column(tuned, dims[0], metric), column(tuned, dim, metric)) for dim in dims[1:]]
        for dim, outcome in zip(dims[1:], _outcomes(pairs, seed), strict=True):
            sides = {side: {"artifact": _ARTIFACT, "dim": d} for side, d in (("a", dims[0]), ("b", dim))}
            tradeoffs.append({"model": tuned, "metric": metric} | sides | outcome)

    evaluation = {
        "results": results,
        "comparisons": comparisons,
        "tradeoffs": tradeoffs,
        "latency": [metrics.search_latency(*vectors[tuned], dim) for dim in dims],
    }
    return evaluation, _examples(retrieval, vectors, scores, dims[0])


def table(evaluation: dict[str, Any]) -> str:
    """Plain text, one line a dim: base, tuned, difference with interval and p, bytes, share kept."""
    rows = rows_by_dim(evaluation, MAIN_METRIC)

    def shown(form: str, *values: Any) -> str:
        return "-" if values[0] is None else form.format(*values)

    change = "{:+.4f} [{:+.4f}, {:+.4f}]"
    columns = [
        ["dim", *(str(row["dim"]) for row in rows)],
        *([name, *(shown("{:.4f}", row[name] and row[name]["value"]) for row in rows)] for name in ("base", "tuned")),
        ["difference [95 % interval]", *(shown(change, row["difference"], *(row["ci95"] or ())) for row in rows)],
        ["p (Holm)", *(format_p(row["p_holm"]) for row in rows)],
        ["bytes/vector", *(str(row["bytes"]) for row in rows)],
        ["kept", *(shown("{:.1f} %", row["kept"] and 100 * row["kept"]) for row in rows)],
        ["ms/search", *(shown("{:.2f}", row["ms"]) for row in rows)],
    ]
    aligned = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    text = ["  ".join(line) for line in zip(*aligned, strict=True)]
    one = evaluation["results"][0]
    return "\n".join([f"{MAIN_METRIC} over {one['queries']} queries and {one['documents']} documents", *text])


def rows_by_dim(evaluation: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """What `table` and the report show of a metric: a dictionary a dim, largest first, None if unknown."""

    def chosen(kind: str) -> list[dict[str, Any]]:
        return [entry for entry in evaluation.get(kind, []) if entry["metric"] == metric]

    results = {(entry["model"], entry["dim"]): entry for entry in chosen("results")}
    compared = {entry["dim"]: entry for entry in chosen("comparisons")}
    traded = {entry["b"]["dim"]: entry for entry in chosen("tradeoffs")}
    latency = {entry["dim"]: entry["ms_per_query"] for entry in evaluation.get("latency", [])}
    rows = []
    for dim in sorted({dim for _, dim in results}, reverse=True):
        base, tuned = results.get(("base", dim)), results.get(("tuned", dim))
        last = tuned or base
        full = (rows[0]["tuned"] or rows[0]["base"]) if rows else last
        rows.append(
            {
                "dim": dim,
                "base": base,
                "tuned": tuned,
                **{key: compared.get(dim, {}).get(key) for key in ("difference", "ci95", "p_holm")},
                "bytes": 4 * dim,
                "kept": last["value"] / full["value"] if last and full and full["value"] else None,
                "tradeoff": traded.get(dim),
                "ms": latency.get(dim),
            }
        )
    return rows


def format_p(p: float | None) -> str:
    """A p value for people: three decimals, and a bound instead of a zero."""
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _outcomes(pairs: list[tuple[np.ndarray, np.ndarray]], seed: int) -> list[dict[str, Any]]:
    """Difference, interval, p and p_holm of each pair of columns; the pairs are one family."""
    if not pairs:
        return []
    found = metrics.compare(*(np.stack(side, axis=1) for side in zip(*pairs, strict=True)), seed=seed)
    numbers = (side.tolist() for side in (found.difference, found.low, found.high, found.p))
    return [
        {"difference": difference, "ci95": [low, high], "p": p, "p_holm": corrected}
        for difference, low, high, p, corrected in zip(*numbers, metrics.holm(found.p.tolist()), strict=True)
    ]


def _examples(
    retrieval: RetrievalSet,
    vectors: dict[str, tuple[np.ndarray, np.ndarray]],
    scores: dict[str, dict[int, dict[str, np.ndarray]]],
    dim: int,
) -> dict[str, Any]:
    """Queries that gained and lost most between the first and the last model, with their best passages."""
    base, tuned = next(iter(vectors)), list(vectors)[-1]
    change = scores[tuned][dim][MAIN_METRIC] - scores[base][dim][MAIN_METRIC]
    order = np.argsort(-change, kind="stable")
    improved = [int(i) for i in order[:_EXAMPLES] if change[i] > 0]
    hurt = [int(i) for i in order[::-1][:_EXAMPLES] if change[i] < 0]

    chosen = np.array(improved + hurt, dtype=np.int64)
    found = {
        name: metrics.search(queries[chosen], documents, _PASSAGES, dim)
        for name, (queries, documents) in vectors.items()
    }

    def best(name: str, place: int, i: int) -> dict[str, Any]:
        ranked = zip(*(part[place].tolist() for part in found[name]), strict=True)
        top = [
            {"document": retrieval.documents[d], "cosine": c, "relevant": d in retrieval.relevant[i]} for d, c in ranked
        ]
        return {"value": float(scores[name][dim][MAIN_METRIC][i]), "top": top}

    examples = [
        {
            "query": retrieval.queries[i],
            "relevant": [retrieval.documents[d] for d in sorted(retrieval.relevant[i])[:_PASSAGES]],
            "relevant_count": len(retrieval.relevant[i]),
            "difference": float(change[i]),
            "base": best(base, place, i),
            "tuned": best(tuned, place, i),
        }
        for place, i in enumerate(improved + hurt)
    ]
    counts = {"improved": change > 0, "same": change == 0, "hurt": change < 0}
    return {
        "metric": MAIN_METRIC,
        "dim": dim,
        "counts": {name: int(held.sum()) for name, held in counts.items()},
        "improved": examples[: len(improved)],
        "hurt": examples[len(improved) :],
    }

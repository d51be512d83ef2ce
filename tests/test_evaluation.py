"""trainer/evaluation.py and metrics.py against sentence-transformers, scipy and plain loops."""

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim

from launch.errors import UserError
from trainer.evaluation import RetrievalSet, evaluate, retrieval_set, rows_by_dim, table
from trainer.metrics import METRICS, compare, holm, interval, score, search

DIMS = (64, 32, 8)


def problem(queries: int = 40, documents: int = 300, seed: int = 0) -> tuple[RetrievalSet, np.ndarray, np.ndarray]:
    """Random vectors in which a query lies near its 1 to 14 relevant documents, and not always nearest."""
    random = np.random.default_rng(seed)
    corpus = random.normal(size=(documents, 64)).astype(np.float32)
    relevant = [
        set(random.choice(documents, size=random.integers(1, min(15, documents)), replace=False).tolist())
        for _ in range(queries)
    ]
    asked = np.stack([corpus[sorted(found)].mean(axis=0) for found in relevant])
    asked = (asked + random.normal(scale=0.6, size=asked.shape)).astype(np.float32)
    texts = RetrievalSet([f"q{i}" for i in range(queries)], [f"d{i:04d}" for i in range(documents)], relevant)
    return texts, asked, corpus


class Encoded:
    """A model for sentence-transformers' evaluator whose vectors are given."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors = vectors

    def encode(self, texts: list[str], truncate_dim: int | None = None, **_: Any) -> torch.Tensor:
        return torch.tensor(np.stack([self.vectors[text] for text in texts])[:, :truncate_dim])

    encode_query = encode_document = encode


def by_sentence_transformers(texts: RetrievalSet, model: Any, dim: int) -> dict[str, float]:
    names = [f"{i:06d}" for i in range(len(texts.documents))]
    judge = InformationRetrievalEvaluator(
        {str(i): query for i, query in enumerate(texts.queries)},
        dict(zip(names, texts.documents, strict=True)),
        {str(i): {names[d] for d in found} for i, found in enumerate(texts.relevant)},
        precision_recall_at_k=[10, 100],
        truncate_dim=dim,
        score_functions={"cosine": cos_sim},
    )
    found: Any = judge.compute_all_metrics(model)["cosine"]
    return {name: float(found[f"{name.split('@')[0]}@k"][int(name.split("@")[1])]) for name in METRICS}


def by_hand(relevant: set[int], query: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    q, d = query.astype(float), documents.astype(float)
    cosines = d @ q / np.linalg.norm(d, axis=1) / np.linalg.norm(q)
    ranked = sorted(range(len(d)), key=lambda i: (-cosines[i], i))
    hits = [place for place, i in enumerate(ranked, start=1) if i in relevant]
    ideal = sum(1 / math.log2(place + 1) for place in range(1, min(10, len(relevant)) + 1))
    return {
        "ndcg@10": sum(1 / math.log2(place + 1) for place in hits if place <= 10) / ideal,
        "mrr@10": 1 / hits[0] if hits[0] <= 10 else 0.0,
        "recall@10": sum(place <= 10 for place in hits) / len(relevant),
        "recall@100": sum(place <= 100 for place in hits) / len(relevant),
        "map@100": sum(n / place for n, place in enumerate(hits, start=1) if place <= 100) / len(relevant),
    }


@pytest.mark.parametrize("documents", [300, 7])
def test_metrics_equal_sentence_transformers_and_plain_loops(documents: int) -> None:
    texts, asked, corpus = problem(documents=documents)
    model = Encoded(dict(zip(texts.queries + texts.documents, [*asked, *corpus], strict=True)))
    scores = score(texts.relevant, asked, corpus, DIMS)
    for dim in DIMS:
        for name, value in by_sentence_transformers(texts, model, dim).items():
            assert scores[dim][name].mean() == pytest.approx(value, abs=1e-6), (dim, name)
        for i, found in enumerate(texts.relevant):
            for name, value in by_hand(found, asked[i, :dim], corpus[:, :dim]).items():
                assert scores[dim][name][i] == pytest.approx(value, abs=1e-6), (dim, name, i)
    if documents == 300:
        assert 0.1 < scores[32]["ndcg@10"].mean() < 0.9, "the problem must be neither trivial nor hopeless"


def test_a_real_model_scores_as_in_sentence_transformers(minilm: Any) -> None:
    rows = [
        {"anchor": f"{verb} a {thing}", "positive": f"How to {other} {thing}s safely"}
        for verb, other in (("remove", "delete"), ("make", "create"), ("find", "search for"))
        for thing in (
            "folder",
            "user",
            "disk partition",
            "network interface",
            "calendar",
            "zip file",
            "process",
        )
    ]
    texts = retrieval_set([*rows, {"anchor": "make a user", "positive": "useradd manual"}])
    asked, corpus = (minilm.encode(part, normalize_embeddings=True) for part in (texts.queries, texts.documents))
    for dim, scores in score(texts.relevant, asked, corpus, (384, 16)).items():
        expected = by_sentence_transformers(texts, minilm, dim)
        assert {n: v.mean() for n, v in scores.items()} == pytest.approx(expected, abs=1e-6)


def test_search_is_exact_and_tiles_change_nothing() -> None:
    _, asked, corpus = problem(documents=500)
    q, d = (v[:, :32].astype(float) / np.linalg.norm(v[:, :32].astype(float), axis=1)[:, None] for v in (asked, corpus))
    expected = np.argsort(-(q @ d.T), axis=1)[:, :20]
    results = [search(asked, corpus, 20, 32, tile) for tile in (1, 19, 20, 64, 499, 10_000)]
    for index, cosines in results:
        assert np.array_equal(index, expected)
        np.testing.assert_allclose(cosines, np.take_along_axis(q @ d.T, expected, 1), atol=3e-8)
        assert np.array_equal(cosines, results[0][1]), "bit for bit"


def test_ties_go_to_the_smaller_index_in_every_tiling() -> None:
    random = np.random.default_rng(1)
    base = random.normal(size=(9, 48)).astype(np.float32)
    which = random.integers(9, size=400)
    corpus = base[which]  # each vector about 44 times, at places that a BLAS kernel treats differently
    asked = random.normal(size=(11, 48)).astype(np.float32)
    cosines = asked.astype(float) @ (base / np.linalg.norm(base, axis=1)[:, None]).T.astype(float)
    for row, best in enumerate(np.argsort(-cosines, axis=1)):
        expected = [i for group in best for i in np.flatnonzero(which == group)][:100]
        for tile in (7, 64, 4096):
            assert search(asked[row : row + 1], corpus, 100, tile=tile)[0][0].tolist() == expected
    collapsed, _ = search(asked, np.ones((700, 48), np.float32), 10, tile=64)
    assert np.array_equal(collapsed, np.tile(np.arange(10), (11, 1)))
    nothing, cosine = search(np.zeros((1, 4), np.float32), np.eye(4, dtype=np.float32), 2)
    assert nothing.tolist() == [[0, 1]] and cosine.tolist() == [[0.0, 0.0]]


def test_vectors_that_are_not_finite_are_refused() -> None:
    texts, asked, corpus = problem()
    corpus[[17, 40], 3] = np.nan, np.inf
    with pytest.raises(UserError, match=r"2 of 300 document vectors .* first number 17") as error:
        evaluate(texts, {"tuned": (asked, corpus)}, DIMS)
    assert "\n" not in str(error.value)
    asked[0, 0] = np.nan
    with pytest.raises(UserError, match="1 of 40 query vectors"):
        search(asked, corpus)


def pairs(count: int = 60) -> list[dict[str, str]]:
    return [{"anchor": f"question {i % 40}", "positive": f"answer {i % 50}"} for i in range(count)]


def test_set_is_independent_of_row_order_and_drawn_by_seed() -> None:
    rows = pairs()
    drawn = retrieval_set(rows, 10, 30, seed=5)
    assert drawn == retrieval_set(rows[::-1] + rows, 10, 30, seed=5)
    assert set(drawn.queries) != set(retrieval_set(rows, 10, 30, seed=6).queries)
    assert len(set(drawn.queries)) == 10 and len(set(drawn.documents)) == 30
    assert set(retrieval_set(rows, 5, 30, seed=5).queries) < set(drawn.queries)
    whole = retrieval_set(rows, 10, None, seed=5)
    assert len(whole.documents) == 50, "the corpus stays whole when queries are drawn"
    for one in (drawn, whole):
        for query, found in zip(one.queries, one.relevant, strict=True):
            assert {one.documents[d] for d in found} == {r["positive"] for r in rows if r["anchor"] == query}


@pytest.mark.parametrize(
    ("rows", "limits", "says"),
    [
        ([], (None, None), "no rows"),
        ([{"anchor": "a", "positive": "b"}], (None, None), "got 1 distinct positive"),
        ([{"anchor": "a", "text": "b"}], (None, None), "row 0 .* texts in anchor, text"),
        ([{"anchor": "a", "positive": "b"}, {"anchor": None, "positive": "c"}], (None, None), "row 1"),
        (pairs(), (10, 5), r"max_documents: got 5, .* at least 1\d"),
    ],
)
def test_sets_that_cannot_be_judged(rows: list[dict[str, Any]], limits: tuple[Any, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        retrieval_set(rows, *limits)


def test_a_query_without_answer_is_refused() -> None:
    with pytest.raises(UserError, match="'lonely' has no relevant document"):
        RetrievalSet(["q", "lonely"], ["a", "b"], [{1}, set()])
    with pytest.raises(UserError, match="no queries"):
        RetrievalSet([], ["a", "b"], [])


@pytest.mark.parametrize("count", [5, 12, 80])
def test_comparison_equals_scipy(count: int) -> None:
    random = np.random.default_rng(count)
    a = random.uniform(size=count)
    b = np.clip(a + random.normal(0.04, 0.15, size=count), 0, 1)
    got = compare(a, b, seed=3)
    assert got.difference[0] == pytest.approx((b - a).mean())
    expected = scipy.stats.permutation_test(
        (b, a),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        n_resamples=10_000,
        vectorized=True,
    )
    exact = count <= 12
    assert got.p[0] == pytest.approx(expected.pvalue, abs=1e-12 if exact else 0.015)
    bounds = scipy.stats.bootstrap(
        (b - a,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    np.testing.assert_allclose([got.low[0], got.high[0]], bounds, atol=0.02 * (bounds.high - bounds.low) + 1e-3)
    again = compare(a, b, seed=3)
    assert (got.low, got.high, got.p) == (again.low, again.high, again.p)


def test_error_rates_are_as_promised() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 60, 1500))  # 1,500 comparisons in which nothing differs
    got = compare(a, b)
    # 5 % of 1,500 is 75 with a standard deviation of 8.4.
    assert 45 <= (got.p < 0.05).sum() <= 105
    covered = ((got.low <= 0) & (got.high >= 0)).mean()
    assert 0.92 <= covered <= 0.97


def test_comparison_at_the_edges() -> None:
    same = compare(np.linspace(0, 1, 30), np.linspace(0, 1, 30))
    assert (same.difference[0], same.low[0], same.high[0], same.p[0]) == (0, 0, 0, 1)
    one = compare(np.array([0.2]), np.array([0.9]))
    assert (one.low[0], one.high[0], one.p[0]) == (-1, 1, 1), "one query proves nothing"
    sure = compare(np.zeros(40), np.full(40, 0.5))
    assert sure.p[0] == pytest.approx(1 / 10_001)
    low, high = interval(np.array([[0.0, 1.0]]))
    assert low.tolist() == [0, 0] and high.tolist() == [1, 1]


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_evaluation_says_what_the_format_promises() -> None:
    texts, asked, corpus = problem()
    noise = np.random.default_rng(9).normal(scale=1.2, size=asked.shape).astype(np.float32)
    evaluation, queries = evaluate(texts, {"base": (asked + noise, corpus), "tuned": (asked, corpus)}, [8, 64, 32])
    evaluation = json.loads(json.dumps(evaluation, allow_nan=False))
    queries = json.loads(json.dumps(queries, allow_nan=False))
    assert len(evaluation["results"]) == 2 * 3 * len(METRICS)
    assert len(evaluation["comparisons"]) == 3 * len(METRICS)
    assert len(evaluation["tradeoffs"]) == 2 * len(METRICS)
    fields = {"model", "artifact", "dim", "metric", "value", "ci95", "queries", "documents"}
    values = {}
    for entry in evaluation["results"]:
        assert set(entry) == fields
        assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]
        assert (entry["queries"], entry["documents"]) == (40, 300)
        values[entry["model"], entry["dim"], entry["metric"]] = entry["value"]
    for entry in evaluation["comparisons"]:
        a, b = (values[entry[side], entry["dim"], entry["metric"]] for side in "ab")
        assert entry["difference"] == pytest.approx(b - a)
        assert entry["p_holm"] >= entry["p"]
    for entry in evaluation["tradeoffs"]:
        a, b = (values["tuned", entry[side]["dim"], entry["metric"]] for side in "ab")
        assert entry["a"] == {"artifact": "pytorch", "dim": 64}
        assert entry["difference"] == pytest.approx(b - a)
    assert [entry["dim"] for entry in evaluation["latency"]] == [64, 32, 8]
    assert all(0 < entry["ms_per_query"] < 1000 for entry in evaluation["latency"])

    assert sum(queries["counts"].values()) == 40
    gains = [entry["difference"] for entry in queries["improved"]]
    assert gains == sorted(gains, reverse=True) and all(gain > 0 for gain in gains)
    best = queries["improved"][0]
    i = texts.queries.index(best["query"])
    expected = by_hand(texts.relevant[i], asked[i], corpus)["ndcg@10"]
    assert best["tuned"]["value"] == pytest.approx(expected)
    order, cosines = search(asked[i : i + 1], corpus, 3)
    assert [entry["document"] for entry in best["tuned"]["top"]] == [texts.documents[d] for d in order[0]]
    assert [entry["relevant"] for entry in best["tuned"]["top"]] == [d in texts.relevant[i] for d in order[0].tolist()]
    assert [entry["cosine"] for entry in best["tuned"]["top"]] == cosines[0].tolist()

    lines = table(evaluation).splitlines()
    assert lines[0] == "ndcg@10 over 40 queries and 300 documents"
    assert [line.split()[0] for line in lines[1:]] == ["dim", "64", "32", "8"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert f"{values['tuned', 8, 'ndcg@10']:.4f}" in lines[-1] and " 32 " in lines[-1]
    kept = values["tuned", 8, "ndcg@10"] / values["tuned", 64, "ndcg@10"]
    assert rows_by_dim(evaluation, "ndcg@10")[-1]["kept"] == pytest.approx(kept)


def test_one_model_one_query_one_dim() -> None:
    texts = RetrievalSet(["q"], ["a", "b"], [{1}])
    vectors = np.eye(2, dtype=np.float32)
    evaluation, queries = evaluate(texts, {"base": (vectors[1:], vectors)}, [2])
    assert evaluation["comparisons"] == evaluation["tradeoffs"] == []
    assert {entry["value"] for entry in evaluation["results"]} == {1.0}
    assert evaluation["results"][0]["ci95"] == [0.0, 1.0]
    assert queries["improved"] == queries["hurt"] == []
    assert "1.0000" in table(evaluation)


def test_a_dim_wider_than_the_model_is_refused() -> None:
    texts, asked, corpus = problem()
    with pytest.raises(UserError, match=r"got \[128, 8\], allowed: 1 to 64"):
        evaluate(texts, {"tuned": (asked, corpus)}, [128, 8])

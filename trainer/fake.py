"""A model without its weights: parameters, memory and FLOPs, by torch's own fake tensors and FLOP counter.

A fake tensor has a shape and no data: forward and backward run as they would, and nothing is computed. The model is
loaded, frozen and given adapters by the code that does so for a run; only the files of weights are left aside.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from launch import config as schema
from trainer.model import Role, load_model, max_length_of
from trainer.trainable import choose_trained


def length_of(model: SentenceTransformer, role: Role) -> int:
    """Longest input of this role in tokens; 512 where the model names no limit."""
    return max_length_of(model, role) or 512


class FakeEncoder:
    """The model that a run would train, of its configs alone."""

    def __init__(self, settings: schema.Model, checkpointing: bool = False, bf16: bool = False) -> None:
        """Raises UserError where the model's configs or tokenizer cannot be read, and as `choose_trained`."""
        self._settings, self._checkpointing, self._bf16 = settings, checkpointing, bf16
        self._mode = FakeTensorMode()
        self._load = cache(self._loaded)
        self.activations = cache(self._activations)
        self.model = self._load("sdpa")
        encoder: Any = self.model[0]
        self.layers = int(getattr(encoder.auto_model.config, "num_hidden_layers", 1))
        self.width = self.model.get_embedding_dimension() or 1
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        # Parameters, and those of them that are trained.
        self.sizes = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)

    @cached_property
    def flops(self) -> dict[str, tuple[float, float]]:
        """FLOPs of `forward` and of `both` passes, for each token and for each squared length of a text."""
        counted, most = [], min(128, length_of(self.model, "document"))
        lengths = most // 2, most  # tokens and squares of lengths are told apart by two
        model = self._load("eager")  # whose matmuls are all counted as such
        for length in lengths:
            with self._mode, FlopCounterMode(display=False) as counter:
                output = self._embed(model, 2, length)
                forward = counter.get_total_flops()
                output.sum().backward()
            counted.append((forward / 2, counter.get_total_flops() / 2))
        tokens, squares = np.linalg.solve([[length, length**2] for length in lengths], counted)
        return {"forward": (tokens[0], squares[0]), "both": (tokens[1], squares[1])}

    def _activations(self, rows: int, length: int) -> int:
        """Bytes at the highest point of forward and backward, weights and gradients not counted."""
        self.model.zero_grad()
        live = _Live(self.model.parameters())
        weights = live.now
        with self._mode, live:
            for _ in range(2):  # the second one adds to gradients that are there
                self._embed(self.model, rows, length).sum().backward()
        gradients = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return live.peak - weights - gradients

    def _loaded(self, attention: str) -> SentenceTransformer:
        settings = self._settings.model_copy(update={"attention": attention})
        with self._mode, _without_weights():
            model = load_model(settings, "cpu")
            choose_trained(model, settings, seed=0)
        encoder: Any = model[0]
        if self._checkpointing:
            encoder.auto_model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def _embed(self, model: SentenceTransformer, rows: int, length: int) -> Tensor:
        features = {name: torch.ones(rows, length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        with torch.autocast("cpu", torch.bfloat16) if self._bf16 else nullcontext():
            return model(features)["sentence_embedding"]


@contextmanager
def _without_weights() -> Iterator[None]:
    """Inside, transformers and sentence-transformers make models of their configs and open no file of weights."""

    def made(cls: Any, _path: Any, *_: Any, config: Any, attn_implementation: str, **__: Any) -> Any:
        model = cls._from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
        model.tie_weights()  # which else comes with the weights' first values
        return model

    def as_it_is(_cls: Any, *_: Any, model: Any, **__: Any) -> Any:
        return model

    def stay(self: Any, *_: Any, **__: Any) -> Any:  # on the CPU; torch cannot move fake parameters
        return self

    with (
        no_init_weights(),
        patch.object(nn.Module, "to", stay),
        patch.object(PreTrainedModel, "from_pretrained", classmethod(made)),
        patch.object(Module, "load_torch_weights", classmethod(as_it_is)),
    ):
        yield


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their highest number."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

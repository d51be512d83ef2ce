"""Texts -> unit vectors, the work shared over ranks: what evaluation and mining embed with.

Distinct texts are sorted by token length and dealt in stripes of world_size, one text per rank, direction
alternating, as the training step does it: every rank runs the same number of batches of nearly the same
shape, which engines that gather parameters in the forward pass need.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_tools.progress import Progress

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from launch.world import World

_MEASURED_TOGETHER = 1024  # texts tokenised in one call to learn their lengths


def embed(
    model: "SentenceTransformer",
    texts: list[str],
    kind: Literal["query", "document"],
    *,
    prompt: str | None,
    max_length: int | None,
    batch_tokens: int,
    world: "World",
) -> np.ndarray:
    """Vectors of `texts` in their order, float32 [n, d], of unit length.

    All ranks must call with the same texts; every rank gets the whole array. `prompt` is put before every
    text, None = nothing is. `max_length` in tokens with prompt and special tokens, None = the model's own.
    `batch_tokens` bounds rows x longest of a batch; one longer text makes a batch of its own. Equal to
    `model.encode(texts, prompt=prompt, normalize_embeddings=True)` up to rounding.
    """
    import torch

    distinct: dict[str, int] = {}
    places = np.fromiter((distinct.setdefault(text, len(distinct)) for text in texts), np.int64, len(texts))
    unique = list(distinct)
    arguments: dict[str, Any] = {"prompt": prompt, "task": kind}
    if max_length is not None:
        arguments["max_length"] = max_length

    lengths = _lengths(model, unique, arguments, world)
    stripes = deal(lengths, world.world_size)
    vectors = np.empty((len(unique), model.get_embedding_dimension() or 0), dtype=np.float32)
    with _evaluating(model), Progress(f"embedding {kind} texts", len(unique), "texts", world.rank == 0) as progress:
        for first, last in cuts(lengths[stripes].max(axis=1), batch_tokens):
            batch = [unique[i] for i in stripes[first:last, world.rank]]
            features = model.preprocess(batch, **arguments)
            features = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in features.items()}
            out = torch.nn.functional.normalize(model(features, task=kind)["sentence_embedding"].float(), dim=1)
            vectors[stripes[first:last].T] = _gather(out, world).cpu().numpy()  # [world, rows, d]
            progress.to(min(last * world.world_size, len(unique)))
    return vectors[places]


def deal(lengths: np.ndarray, ranks: int) -> np.ndarray:
    """Which text goes to which rank, int64 [stripes, ranks]: longest first, direction alternating.

    The last stripe is filled up with the shortest text. Two ranks differ by at most the longest text.
    """
    order = np.argsort(-lengths, kind="stable")
    filled = np.concatenate([order, np.repeat(order[-1:], -len(order) % ranks)]).reshape(-1, ranks)
    filled[1::2] = filled[1::2, ::-1]
    return filled


def cuts(longest: np.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of stripes that fit `batch_tokens` (rows of one rank x longest), at least one stripe each.

    `longest` [stripes], in tokens, descends: the first stripe of a batch is its longest.
    """
    first = 0
    for stripe in range(1, len(longest) + 1):
        if stripe == len(longest) or (stripe + 1 - first) * longest[first] > batch_tokens:
            yield first, stripe
            first = stripe


def _lengths(model: "SentenceTransformer", texts: list[str], arguments: dict[str, Any], world: "World") -> np.ndarray:
    """Tokens of each text after truncation, int64 [n]. All ranks must call: each measures its part."""
    import torch

    lengths = torch.zeros(len(texts), dtype=torch.int64)
    mine = range(world.rank, len(texts), world.world_size)
    for start in range(0, len(mine), _MEASURED_TOGETHER):
        part = mine[start : start + _MEASURED_TOGETHER]
        chunk = [texts[i] for i in part]
        features = model.preprocess(chunk, **arguments)
        if "attention_mask" in features:
            measured = features["attention_mask"].sum(dim=1)
        elif "cu_seq_lens_q" in features:  # flash attention: one flat row, no padding
            measured = features["cu_seq_lens_q"].diff()
        else:  # static embeddings have no padding; characters order them well enough
            measured = torch.tensor([len(text) for text in chunk])
        lengths[part.start : part.stop : part.step] = measured.to(torch.int64)
    if world.world_size > 1:
        lengths = lengths.to(model.device)
        torch.distributed.all_reduce(lengths)
    return lengths.cpu().numpy()


def _gather(vectors: "torch.Tensor", world: "World") -> "torch.Tensor":
    """[rows, d] of each rank -> [world, rows, d] on every rank. All ranks must call with equal shapes."""
    import torch

    if world.world_size == 1:
        return vectors[None]
    out = vectors.new_empty(world.world_size * len(vectors), vectors.shape[1])
    torch.distributed.all_gather_single(out, vectors.contiguous())
    return out.view(world.world_size, *vectors.shape)


@contextmanager
def _evaluating(model: "SentenceTransformer") -> Iterator[None]:
    """Without gradients and dropout; each module's own training flag comes back, whatever happens."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode

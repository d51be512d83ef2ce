"""Texts -> unit vectors, the work shared over ranks: what evaluation and mining embed with.

Distinct texts are sorted by token length and dealt in stripes of world_size, one text per rank, direction
alternating, as the training step does it: every rank runs the same number of batches of nearly the same
shape, which engines that gather parameters in the forward pass need.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from data_tools.progress import Progress
from trainer.embedder import Embedder
from trainer.model import Role
from trainer.search import Share

if TYPE_CHECKING:
    from launch.world import World

Told = Callable[[int], None] | None
MEASURED_TOGETHER = 1024  # texts tokenised in one call to learn their lengths
_IN_MEMORY = 1 << 30  # bytes of a rank's vectors; more lie in a temporary file


def embed(
    embedder: Embedder, texts: list[str], role: Role, *, batch_tokens: int, world: "World", told: Told = None
) -> np.ndarray:
    """Vectors of `texts` in their order, float32 [n, d], of unit length, on every rank.

    All ranks must call with the same texts. `batch_tokens` bounds rows x longest of a batch; one longer text makes a
    batch of its own. `told` as in embed_share.
    """
    import torch

    share = embed_share(embedder, texts, role, batch_tokens=batch_tokens, world=world, told=told)
    if world.world_size == 1:
        out = np.empty_like(share.vectors)
        out[share.index] = share.vectors
        return out
    parts = [None] * world.world_size
    torch.distributed.all_gather_object(parts, share)
    vectors = np.empty((len(texts), embedder.width), dtype=np.float32)
    for part in parts:
        assert part is not None
        vectors[part.index] = part.vectors
    return vectors


def embed_share(
    embedder: Embedder, texts: list[str], role: Role, *, batch_tokens: int, world: "World", told: Told = None
) -> Share:
    """This rank's part of the vectors: together the ranks have each text once. All ranks must call with the same texts.

    `told` hears how many distinct texts are done; without it rank 0 shows progress. Beyond 1 GiB the part is a memory
    map of a temporary file (TMPDIR), which is gone with the process.
    """
    distinct: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        distinct.setdefault(text, []).append(place)
    unique = list(distinct)
    lengths = _lengths(embedder, unique, role, world)
    stripes = deal(lengths, world.world_size)
    # The last stripe may repeat a text, so that all ranks have as many; it counts where it comes first.
    _, first_places = np.unique(stripes.ravel(), return_index=True)
    owned = np.sort(first_places[first_places % world.world_size == world.rank] // world.world_size)
    wanted = [(row, place) for row in owned.tolist() for place in distinct[unique[stripes[row, world.rank]]]]
    rows, places = np.array(wanted, dtype=np.int64).reshape(-1, 2).T
    slots = np.argsort(np.argsort(places))
    vectors = _room(len(places), embedder.width)
    with Progress(f"embedding {role} texts", len(unique), "texts", not told and world.rank == 0) as progress:
        for first, last in cuts(lengths[stripes].max(axis=1), batch_tokens):
            batch = [unique[i] for i in stripes[first:last, world.rank]]
            found = embedder.vectors(batch, role).cpu().numpy()
            here = slice(*np.searchsorted(rows, (first, last)))
            vectors[slots[here]] = found[rows[here] - first]
            (told or progress.to)(min(last * world.world_size, len(unique)))
    return Share(np.sort(places), vectors)


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


def _room(rows: int, width: int) -> np.ndarray:
    """Room for float32 vectors [rows, width], on disk where it is large."""
    if rows * width * 4 <= _IN_MEMORY:
        return np.empty((rows, width), dtype=np.float32)
    return np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(rows, width))


def _lengths(embedder: Embedder, texts: list[str], role: Role, world: "World") -> np.ndarray:
    """Tokens of each text after truncation, int64 [n]. All ranks must call: each measures its part."""
    import torch

    lengths = torch.zeros(len(texts), dtype=torch.int64)
    mine = range(world.rank, len(texts), world.world_size)
    for start in range(0, len(mine), MEASURED_TOGETHER):
        part = mine[start : start + MEASURED_TOGETHER]
        measured = embedder.lengths([texts[i] for i in part], role)
        lengths[part.start : part.stop : part.step] = torch.from_numpy(measured).to(torch.int64)
    if world.world_size > 1:
        lengths = lengths.to(embedder.device)
        torch.distributed.all_reduce(lengths)
    return lengths.cpu().numpy()

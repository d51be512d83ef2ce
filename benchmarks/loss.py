"""The loss stage alone: embeddings to gradients at the embeddings, speed and memory.

python -m benchmarks.loss [--quick] [--json FILE]

The rival's stage is `calculate_loss(with_backward=True)` of CachedMultipleNegativesRankingLoss under MatryoshkaLoss on
cached embeddings, one tensor a column, at the chunk of scores that is fastest for each shape. One thread, fp32. The
largest shape is measured in fresh processes, which gives its memory too. The full run takes about ten minutes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import (
    RIVAL,
    Claim,
    Cost,
    finish,
    in_fresh_process,
    one_thread,
    options,
    peak,
    progress,
    reset_peak,
    table,
    timed,
)
from benchmarks.sides import cached_loss, objective, relative_error

if TYPE_CHECKING:
    from torch import Tensor

CHUNKS = (16, 64, 256, 1024)
HEADLINE = (768, 5)  # width and number of dims of the claims


@dataclass(frozen=True)
class Shape:
    """Pairs in the batch, width of the embeddings, Matryoshka dims."""

    batch: int
    width: int
    dims: int

    @property
    def matryoshka(self) -> list[int]:
        """Dims in halves from the full width."""
        return [self.width >> k for k in range(self.dims)]


@dataclass(frozen=True)
class Result:
    """One loss stage."""

    cost: Cost
    extra_bytes: int  # peak above what the process held before
    loss: float
    gradient: "Tensor | None"  # [2, batch, width]; None from another process


def _embeddings(shape: Shape) -> Any:
    """Anchors and candidates [2, batch, width] that fit together as well as those of a model in training."""
    import torch

    draw = torch.Generator().manual_seed(0)
    pair = torch.randn(2, shape.batch, shape.width, generator=draw)
    pair[1] += 0.3 * pair[0]
    return torch.nn.functional.normalize(pair, dim=-1)


def rival_stage(shape: Shape, chunk: int, rows: int | None = None) -> Result:
    """sentence-transformers' stage, of all anchors or the first `rows` against all candidates."""
    import torch
    from torch import nn

    class Width(nn.Module):
        """As much of a SentenceTransformer as the constructors of the losses use."""

        def get_embedding_dimension(self) -> int:
            return shape.width

        def __getitem__(self, _: int) -> nn.Module:
            return nn.Identity()

    _, cached = cached_loss(Width(), shape.matryoshka, chunk)
    anchors, candidates = _embeddings(shape)
    columns = [anchors[:rows].clone().requires_grad_(), candidates.clone().requires_grad_()]
    before = reset_peak()
    value, cost = timed(lambda: cached.calculate_loss([[column] for column in columns], None, with_backward=True))
    extra = peak() - before
    gradient = None if rows else torch.stack([c.grad for c in columns if c.grad is not None])
    return Result(cost, extra, float(value), gradient)


def our_stage(shape: Shape) -> Result:
    """The fused stage."""
    import torch

    from trainer.batching import make_plan
    from trainer.infonce import infonce

    ids = np.arange(2 * shape.batch).reshape(shape.batch, 2)
    lengths = np.ones_like(ids)
    plan = make_plan(ids, ids, lengths, world_size=1, micro_batch_tokens=1 << 30, masks=False)
    row = torch.from_numpy(plan.texts[0] // 2)
    is_anchor = torch.from_numpy(plan.is_anchor)
    anchors, candidates = _embeddings(shape)
    anchors, candidates = anchors[row[is_anchor]], candidates[row[~is_anchor]]
    minimised = objective(shape.matryoshka)
    before = reset_peak()
    loss, cost = timed(lambda: infonce(anchors, candidates, plan.targets(0), minimised))
    extra = peak() - before
    gradient = torch.empty(2, shape.batch, shape.width)
    gradient[0, row[is_anchor]] = loss.anchor_gradient
    gradient[1, row[~is_anchor]] = loss.candidate_gradient
    return Result(cost, extra, float(loss.value), gradient)


def _alone(shape: Shape, chunk: int | None) -> Result:
    """What a fresh process runs: a small stage first, so that the libraries are warm."""
    small = Shape(256, shape.width, shape.dims)
    for now in (small, shape):
        result = our_stage(now) if chunk is None else rival_stage(now, chunk)
    return Result(result.cost, result.extra_bytes, result.loss, None)


def best_chunk(shape: Shape) -> int:
    """The rival's fastest chunk, found on 1,024 anchors against all candidates."""
    rows = min(1024, shape.batch)
    return min(CHUNKS, key=lambda chunk: rival_stage(shape, chunk, rows).cost.cpu)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    batches = (1024, 2048) if args.quick else (1024, 4096, 16_384)
    shapes = [Shape(b, *HEADLINE) for b in batches]
    if not args.quick:
        shapes += [Shape(b, w, d) for b in batches for w in (384, 768, 1024) for d in (1, 5) if (w, d) != HEADLINE]
    else:
        shapes += [Shape(batches[0], 384, 1)]
    largest = shapes[len(batches) - 1]
    our_stage(shapes[0])  # warm
    rival_stage(shapes[0], 64)

    lines, speedups, memory, agreement = [], {}, 0.0, 0.0
    for shape in shapes:
        chunk = best_chunk(shape)
        if shape == largest:
            ours, theirs = in_fresh_process(_alone, shape, None), in_fresh_process(_alone, shape, chunk)
            memory = theirs.extra_bytes / ours.extra_bytes
        else:
            ours, theirs = our_stage(shape), rival_stage(shape, chunk)
        error = abs(ours.loss / theirs.loss - 1)
        if ours.gradient is not None and theirs.gradient is not None:
            error = relative_error(ours.gradient, theirs.gradient)
            agreement = max(agreement, error)
        speedups[shape] = theirs.cost.cpu / ours.cost.cpu
        lines.append(
            [f"{shape.batch:,}", shape.width, shape.dims, chunk, theirs.cost.cpu, ours.cost.cpu, speedups[shape]]
            + [f"{r.extra_bytes / 2**20:,.0f}" if shape == largest else "-" for r in (theirs, ours)]
            + [error]
        )
        progress(f"{shape}: {speedups[shape]:.2f} times")
    print()
    header = ["batch", "width", "dims", "rival's chunk", "rival CPU s", "our CPU s", "speedup"]
    table([*header, "rival's extra MiB", "our extra MiB", "error"], lines)
    headline = {shape.batch: speedups[shape] for shape in shapes if (shape.width, shape.dims) == HEADLINE}
    common = f"width {HEADLINE[0]}, {HEADLINE[1]} dims, fp32, one thread, rival at its fastest chunk of {CHUNKS}"
    all_of_them = ", ".join(f"{batch:,}: {value:.2f}" for batch, value in headline.items())
    claims = [
        Claim(
            "loss.d768_dims5.speedup",
            min(headline.values()),
            "times",
            "higher",
            RIVAL,
            f"CPU time of the loss stage, least over batches ({all_of_them}), {common}; gradients agree to "
            f"{agreement:.0e}",
        ),
        Claim(
            "loss.d768_dims5.memory_ratio",
            memory,
            "times",
            "higher",
            RIVAL,
            f"peak extra resident memory of the loss stage in a fresh process, batch {largest.batch:,}, {common}",
        ),
    ]
    return finish(claims, args)


if __name__ == "__main__":
    sys.exit(main())

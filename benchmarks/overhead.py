"""What a cached step costs beside a plain one that holds everything in memory.

python -m benchmarks.overhead [--quick] [--json FILE]

Plain is MatryoshkaLoss(MultipleNegativesRankingLoss): one graph over the whole batch. Both sides train all-MiniLM-L6-v2
with five dims on docstring-function rows whose texts are all cut to the same number of tokens, so nothing is padded,
no text repeats, and no gain of the plan can flatter us. Ours cuts the batch into micro-batches, and plain embeds its
columns in pieces of the same shape; plain with whole columns is shown beside it. Sides alternate, and each claim is the
median of the ratios within a round. The last micro-batch is always embedded twice, so `kept` costs one forward of it.
The full run takes about five minutes.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import RIVAL, Claim, finish, one_thread, options, progress, table, timed
from benchmarks.sides import (
    SCALE,
    docstring_pairs,
    gradient,
    minilm,
    our_step,
    padded_columns,
    plan_of,
    relative_error,
    tokenised,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from trainer.tokens import TokenCache

DIMS = [384, 256, 128, 64, 32]


def plain_step(model: "SentenceTransformer", columns: list[dict[str, Any]], piece: int) -> "Tensor":
    """One plain step, columns embedded in pieces of so many texts; returns the gradient."""
    import torch
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
    from torch import nn

    class Pieces(nn.Module):
        """The model run piece by piece, with all graphs in memory."""

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            texts = len(features["input_ids"])
            parts = [
                {k: v[i : i + piece] if isinstance(v, torch.Tensor) else v for k, v in features.items()}
                for i in range(0, texts, piece)
            ]
            return {"sentence_embedding": torch.cat([model(part)["sentence_embedding"] for part in parts])}

        def get_embedding_dimension(self) -> int:
            return DIMS[0]

    pieces: Any = Pieces()
    model.zero_grad(set_to_none=True)
    loss = MatryoshkaLoss(pieces, MultipleNegativesRankingLoss(pieces, scale=SCALE), DIMS)
    loss([dict(column) for column in columns], torch.empty(0)).backward()
    return gradient(model)


def cached_step(model: "SentenceTransformer", cache: "TokenCache", tokens: int, keep_graphs: bool) -> "Tensor":
    """One step of ours; returns the gradient."""
    model.zero_grad(set_to_none=True)
    our_step(model, cache, np.arange(len(cache)), DIMS, keep_graphs, tokens)
    return gradient(model)


def long_enough(rows: Sequence[tuple[str, str]], length: int) -> list[tuple[str, str]]:
    """Rows of two texts that are both cut to this number of tokens."""
    model = minilm(length)
    tokens = [model.preprocess(list(texts))["attention_mask"].sum(1).numpy() for texts in zip(*rows, strict=True)]
    return [row for row, shorter in zip(rows, np.minimum(*tokens), strict=True) if shorter == length]


def measure(rows: Sequence[tuple[str, str]], length: int, piece: int, rounds: int, folder: Path) -> list[Claim]:
    """Both ratios for rows whose texts are cut to `length` tokens, in micro-batches of `piece` texts."""
    model = minilm(length)
    cache = tokenised(f"overhead{length}", rows, model, folder)
    everything = np.arange(len(rows))
    assert (cache.lengths(everything) == length).all(), "texts of other lengths"
    plan = plan_of(cache, everything, piece * length)
    assert (np.diff(plan.cuts) == piece).all(), plan.cuts
    micro_batches = len(plan.cuts) - 1
    columns = padded_columns(rows, model)
    sides: dict[str, Callable[[], Tensor]] = {
        "plain, whole columns": partial(plain_step, model, columns, len(rows)),
        "plain, the same pieces": partial(plain_step, model, columns, piece),
        "ours, all graphs kept": partial(cached_step, model, cache, piece * length, True),
        "ours, no graph kept": partial(cached_step, model, cache, piece * length, False),
    }
    gradients = {name: side() for name, side in sides.items()}  # warm
    whole, plain, kept, recompute = sides
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        # Every second round runs backwards, so no side always follows the same one.
        for name in list(sides)[:: -1 if number % 2 else 1]:
            seconds[name].append(timed(sides[name])[1].cpu)
        progress(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {s[-1]:.2f}" for name, s in seconds.items()))
    median = {name: statistics.median(s) for name, s in seconds.items()}
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds[plain], strict=True)] for name in sides}
    errors = {name: relative_error(gradients[name], gradients[plain]) for name in sides}
    print()
    table(
        [f"{len(rows)} rows of 2 x {length} tokens", "CPU s, median", "over plain, median", "least", "most", "error"],
        [
            [name, median[name], statistics.median(r), min(r), max(r), errors[name]]  # the gradient's relative error
            for name, r in ratios.items()
        ],
    )
    forward = (median[recompute] - median[kept]) / (micro_batches - 1)
    table(
        ["what ours costs more", "CPU s", "of the plain step"],
        [
            [what, cost, cost / median[plain]]
            for what, cost in (
                (
                    f"embedding {micro_batches - 1} micro-batches again where no graph is kept",
                    (micro_batches - 1) * forward,
                ),
                ("embedding the last micro-batch again (the above / micro-batches)", forward),
                ("everything else", median[kept] - forward - median[plain]),
            )
        ],
    )
    conditions = (
        f"CPU time of a whole step over MatryoshkaLoss(MultipleNegativesRankingLoss) with all graphs of the same "
        f"micro-batches in memory (with whole columns it takes {median[whole] / median[plain]:.2f} of that), "
        f"{len(rows)} rows of 2 texts of exactly {length} tokens (no padding, no repeats), {micro_batches} "
        f"micro-batches of {piece} texts, all-MiniLM-L6-v2, {len(DIMS)} dims, one thread, median of {rounds} paired "
        f"ratios; gradients agree to {max(errors.values()):.0e}"
    )
    return [
        Claim(f"overhead.{claim}", statistics.median(ratios[name]), "times", "lower", RIVAL, conditions)
        for claim, name in (("kept", kept), ("recompute", recompute))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    length, count, piece, rounds = (16, 16, 4, 3) if args.quick else (64, 32, 8, 5)
    rows = long_enough(docstring_pairs(), length)[:count]
    progress(f"{len(rows)} rows")
    with tempfile.TemporaryDirectory() as folder:
        return finish(measure(rows, length, piece, rounds, Path(folder)), args)


if __name__ == "__main__":
    sys.exit(main())

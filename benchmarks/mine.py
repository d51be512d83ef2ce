"""Hard negatives: `nestling data mine` against sentence-transformers' mine_hard_negatives, model and rules the same.

Pairs of texts of mixed length (docstrings and functions), all-MiniLM-L6-v2, one thread; margin 0.95, the 4 nearest.
Both sides load the model. The rival's batch of 32 is its default.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Cost,
    against_rival,
    finish,
    in_fresh_process,
    one_thread,
    options,
    peak,
    reset_peak,
    table,
    timed,
)
from benchmarks.sides import MINILM, docstring_pairs, minilm

_TOKENS = 256  # the model's own limit
_NEGATIVES = 4


@dataclass(frozen=True)
class Result:
    """What one side took, and the negatives of each pair."""

    cost: Cost
    extra_bytes: int
    negatives: dict[tuple[str, str], list[str | None]]


def _pairs(count: int) -> list[tuple[str, str]]:
    """Pairs whose anchors and positives stand in one pair each: there the rules of both sides agree."""
    rows, anchors, positives = [], set[str](), set[str]()
    for anchor, positive in docstring_pairs():
        if anchor.casefold() not in anchors and positive.casefold() not in positives:
            rows.append((anchor, positive))
            anchors.add(anchor.casefold())
            positives.add(positive.casefold())
    return rows[:count]


def _alone(side: str, count: int) -> Result:
    one_thread()
    rows = _pairs(count)
    names = [f"negative_{n}" for n in range(1, _NEGATIVES + 1)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if side == "ours":
            from data_tools.readers import read_parquet
            from data_tools.shards import ShardWriter
            from trainer import mine

            columns: Any = {"anchor": "text", "positive": "text"}
            with ShardWriter(Path(folder, "in"), columns, source="made", license=None, made_by="benchmark") as writer:
                for anchor, positive in rows:
                    writer.write({"anchor": anchor, "positive": positive})
            words = [f"{folder}/in", "--model", MINILM, "--out", f"{folder}/out", "--cache-dir"]
            more = ["--negatives", str(_NEGATIVES), "--window", "0", "50"]
            before = reset_peak()
            _, cost = timed(lambda: mine.main([*words, f"{folder}/cache", *more]))
            extra = peak() - before
            found = read_parquet(sorted(Path(folder, "out/train").glob("*.parquet")), lambda c: c, speaks=False)
            made = [row for _, row in found if isinstance(row, dict)]
        else:
            from datasets import Dataset
            from sentence_transformers.util import mine_hard_negatives

            given = Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [p for _, p in rows]})
            before = reset_peak()
            mined, cost = timed(
                lambda: mine_hard_negatives(
                    given,
                    minilm(_TOKENS),
                    range_max=50,
                    relative_margin=0.05,
                    num_negatives=_NEGATIVES,
                    output_format="n-tuple",
                    verbose=False,
                )
            )
            extra = peak() - before
            made = [dict(row) for row in mined]
    kept = {(row["anchor"], row["positive"]): [row[name] for name in names] for row in made}
    return Result(cost, extra, kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    count = 150 if args.quick else 1000
    results = {side: in_fresh_process(_alone, side, count) for side in ("rival", "ours")}
    theirs, mine = results["rival"], results["ours"]
    both = [pair for pair, found in mine.negatives.items() if pair in theirs.negatives and None not in found]
    same = sum(mine.negatives[pair] == theirs.negatives[pair] for pair in both)
    print()
    table(
        ["side", "CPU s", "wall s", "extra MiB", "rows with negatives"],
        [
            [
                side,
                r.cost.cpu,
                r.cost.wall,
                f"{r.extra_bytes / 2**20:,.0f}",
                sum(None not in n for n in r.negatives.values()),
            ]
            for side, r in results.items()
        ],
    )
    where = (
        f"{count:,} docstring-function pairs at {_TOKENS} tokens, one thread; of {len(both):,} rows that both filled, "
        f"{same:,} have the same negatives"
    )
    return finish(against_rival("mine", (theirs.cost, theirs.extra_bytes), (mine.cost, mine.extra_bytes), where), args)


if __name__ == "__main__":
    sys.exit(main())

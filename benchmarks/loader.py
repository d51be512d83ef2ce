"""What feeds a step: features sliced from the token cache against a collator that tokenises, and the plan's time.

python -m benchmarks.loader [--quick] [--json FILE]

Both sides make padded features of the same docstring-function rows in batches of 128, one thread each. Ours includes
the plan and makes all features twice, as a step that keeps no graph does; building the cache is shown apart.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RIVAL, Claim, finish, one_thread, options, table, timed
from benchmarks.sides import MICRO_BATCH_TOKENS, docstring_pairs, minilm

MAX_LENGTH = 256
BATCH = 128
PLAN_PAIRS, PLAN_RANKS = 65_536, 8


def feed(rows: Sequence[tuple[str, str]], repeats: int) -> Claim:
    """Tokens per CPU second that reach the model, ours over the rival's."""
    import datasets
    import torch
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    from trainer.batching import make_plan
    from trainer.loader import BatchFeatures
    from trainer.tokens import Padder, token_cache

    model = minilm(MAX_LENGTH)
    anchors, positives = map(list, zip(*rows, strict=True))
    data = datasets.Dataset.from_dict({"anchor": anchors, "positive": positives})
    lines: list[dict[str, Any]] = [dict(zip(("anchor", "positive"), row, strict=True)) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        opened = [
            timed(partial(token_cache, data, "docstrings", data.column_names, fresh, Path(folder)))
            for fresh in (minilm(MAX_LENGTH), minilm(MAX_LENGTH))
        ]
        (cache, build_cost), (_, open_cost) = opened
        tokens = int(cache.lengths(np.arange(len(rows))).sum())
        padder, device = Padder(model), torch.device("cpu")
        collator = SentenceTransformerDataCollator(model.preprocess)

        def ours() -> int:
            made = 0
            for start in range(0, len(rows), BATCH):
                here = np.arange(start, min(start + BATCH, len(rows)))
                plan = make_plan(
                    cache.token_id[here],
                    cache.text_id[here],
                    cache.lengths(here),
                    world_size=1,
                    micro_batch_tokens=MICRO_BATCH_TOKENS,
                )
                features = BatchFeatures(cache, padder, here, device, False)
                for texts in plan.micro_batches(0) * 2:
                    made += int(features(texts)["attention_mask"].sum())
            return made // 2

        def rival() -> int:
            batches = (collator(lines[start : start + BATCH]) for start in range(0, len(rows), BATCH))
            return sum(int(b["anchor_attention_mask"].sum() + b["positive_attention_mask"].sum()) for b in batches)

        for side in (ours, rival):  # warm; repeated texts of a batch are made once
            made = side()
            assert 0.98 * tokens < made <= tokens, (side.__name__, made, tokens)
        costs = {side: min((timed(side)[1] for _ in range(repeats)), key=lambda c: c.cpu) for side in (ours, rival)}
    table(
        [f"{len(rows):,} rows, {tokens:,} tokens", "CPU s", "wall s", "tokens / CPU s"],
        [
            [name, cost.cpu, cost.wall, tokens / cost.cpu]
            for name, cost in (
                ("ours: plan, slice and pad, twice", costs[ours]),
                (f"{RIVAL}: tokenise and pad", costs[rival]),
                ("ours, once for all epochs: build the cache", build_cost),
                ("ours, at each start: check and open it", open_cost),
            )
        ],
    )
    conditions = (
        f"CPU time, {len(rows):,} docstring-function rows ({tokens:,} tokens) in batches of {BATCH}, maximal length "
        f"{MAX_LENGTH}, one thread, least of {repeats} runs; ours with the plan and every feature made twice, "
        f"without building the cache once ({build_cost.cpu:.1f} s)"
    )
    return Claim("loader.speedup", costs[rival].cpu / costs[ours].cpu, "times", "higher", RIVAL, conditions)


def plan_time(rows: Sequence[tuple[str, str]], pairs: int, repeats: int) -> Claim:
    """Seconds of the plan of a huge batch in which no text repeats, which is the longest plan."""
    from trainer.batching import make_plan

    model = minilm(MAX_LENGTH)
    columns = [model.preprocess(list(texts))["attention_mask"].sum(1).numpy() for texts in zip(*rows, strict=True)]
    lengths = np.stack(columns, 1)[np.random.default_rng(0).integers(0, len(rows), pairs)]
    identities = np.random.default_rng(1).permutation(2 * pairs).reshape(pairs, 2).astype(np.uint64)
    runs = [
        timed(
            lambda: make_plan(
                identities, identities, lengths, world_size=PLAN_RANKS, micro_batch_tokens=MICRO_BATCH_TOKENS
            )
        )
        for _ in range(repeats)
    ]
    cost = min((cost for _, cost in runs), key=lambda c: c.cpu)
    plan = runs[0][0]
    micro_batches = len(plan.cuts) - 1
    real, padded = np.sum([plan.tokens(rank) for rank in range(PLAN_RANKS)], axis=0)
    table(
        [f"plan of {pairs:,} pairs", "CPU s", "wall s", "micro-batches", "padded / real"],
        [[f"{PLAN_RANKS} ranks", cost.cpu, cost.wall, micro_batches, float(padded / real)]],
    )
    conditions = (
        f"CPU time of one plan, {pairs:,} pairs of distinct texts, lengths drawn from {len(rows):,} docstring-function "
        f"rows cut to {MAX_LENGTH} tokens, {PLAN_RANKS} ranks, {MICRO_BATCH_TOKENS} tokens a micro-batch, masks on, "
        f"one thread, least of {repeats} runs"
    )
    return Claim("loader.plan_seconds_65536", cost.cpu, "s", "lower", None, conditions)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    rows = docstring_pairs()
    if args.quick:
        rows = rows[: 8 * BATCH]
    repeats = 2 if args.quick else 5
    claims = [feed(rows, repeats), plan_time(rows, PLAN_PAIRS, repeats)]
    return finish(claims, args)


if __name__ == "__main__":
    sys.exit(main())

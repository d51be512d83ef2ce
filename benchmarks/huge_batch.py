"""65,536 rows in one process: memory against what a step has to hold, and time a row against a batch of 4,096.

python -m benchmarks.huge_batch [--quick] [--json FILE]

The model is a small BERT with random weights, the texts are short and all distinct, one thread, fp32, no graph kept.
Each figure comes from a fresh process, warmed by a small step of another model whose memory is given back. Memory
is the peak of resident memory over the step less what was resident before the model was loaded. What a step has to
hold:

model       parameters and their gradients: 2 x 4 bytes x parameters
activations what autograd saves of one micro-batch, the largest of the plan (distinct tensors; parameters not counted)
loss tile   tile_lines of trainer/infonce.py x (dims + 1) x candidates x 4 bytes
embeddings  and their gradients: 2 x 4 bytes x rows x 2 texts x width

Time a row is CPU time of the step, plan and features included, without the loss stage, whose work a row grows with the
batch and which is shown apart. sentence-transformers' own loss is run on the batches that it does in reasonable time.
How glibc gives freed memory back decides much of the peak: the conditions say what MALLOC_MMAP_THRESHOLD_ was.
The full run takes about six minutes.
"""

import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import (
    RIVAL,
    Claim,
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
from benchmarks.sides import (
    MICRO_BATCH_TOKENS,
    cached_loss,
    column_names,
    gradient,
    made_texts,
    our_step,
    plan_of,
    relative_error,
    tiny_model,
    tokenised,
    watched_loss_stage,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from trainer.tokens import TokenCache

NAME = "huge"
WIDTH, LAYERS = 64, 1
DIMS = [64, 32]
LONGEST = 24  # tokens
CHUNK = 256  # rows of scores that the rival holds, for all candidates
MIB = 1 << 20


@dataclass(frozen=True)
class Result:
    """One step."""

    rows: int
    extra: int  # peak bytes above what was resident before the model was loaded
    cpu: float  # seconds without the loss stage
    loss_stage: float  # CPU seconds
    gradient: "Tensor"
    activations: int = 0  # bytes; 0 where they were not measured

    @property
    def parts(self) -> list[tuple[str, str, int]]:
        """What a step has to hold: its name, how it is computed, and bytes."""
        from trainer.infonce import tile_lines

        parameters, texts = len(self.gradient), 2 * self.rows
        lines, buffers = min(self.rows, tile_lines(self.rows, len(DIMS), "cpu")), len(DIMS) + 1
        return [
            ("model and gradients", f"2 x 4 bytes x {parameters:,} parameters", 8 * parameters),
            ("activations", f"saved by autograd, a micro-batch of {MICRO_BATCH_TOKENS} tokens", self.activations),
            (
                "loss tile",
                f"{lines} lines x {buffers} x {self.rows:,} candidates x 4 bytes",
                4 * lines * buffers * self.rows,
            ),
            ("embeddings and gradients", f"2 x 4 bytes x {texts:,} texts x {WIDTH}", 8 * texts * WIDTH),
        ]

    @property
    def expected(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, _, size in self.parts)


def our_steps(folder: Path, rows: int, repeats: int) -> list[Result]:
    """Steps of ours on the first rows; the first step has a fresh process for itself."""
    import torch

    from trainer.engines import Single

    before = _warm(folder)
    model = tiny_model(folder / "model", WIDTH, LAYERS, LONGEST)
    cache, everything = _cache(folder, model), np.arange(rows)
    marks: dict[str, float] = {}

    class Watched(Single):
        """Says when the loss stage begins and ends: between the forwards without a graph and those with one."""

        def forward(self, features: dict[str, Any], synchronise: bool) -> "Tensor":
            graph = torch.is_grad_enabled()
            if graph:
                marks.setdefault("end", time.process_time())
            embeddings = super().forward(features, synchronise)
            if not graph:
                marks["begin"] = time.process_time()
            return embeddings

    results = []
    for _ in range(repeats):
        marks.clear()
        model.zero_grad(set_to_none=True)
        reset_peak()
        _, cost = timed(lambda: our_step(model, cache, everything, DIMS, False, engine=Watched(model)))
        stage, extra = marks["end"] - marks["begin"], peak() - before
        results.append(Result(rows, extra, cost.cpu - stage, stage, gradient(model)))
    activations = _activations(model, cache, everything)
    return [replace(result, activations=activations) for result in results]


def rival_step(folder: Path, rows: int) -> Result:
    """One step of sentence-transformers on the same rows, in a fresh process."""
    import torch

    from trainer.tokens import Padder

    before = _warm(folder)
    model = tiny_model(folder / "model", WIDTH, LAYERS, LONGEST)
    cache, padder = _cache(folder, model), Padder(model)
    columns = [padder(cache.texts(np.arange(rows) * 2 + column), "cpu") for column in (0, 1)]
    loss, cached = cached_loss(model, DIMS, CHUNK, MICRO_BATCH_TOKENS)
    stage = watched_loss_stage(cached)
    reset_peak()
    _, cost = timed(lambda: loss(columns, torch.empty(0)).backward())
    return Result(rows, peak() - before, cost.cpu - stage[0].cpu, stage[0].cpu, gradient(model))


def _warm(folder: Path) -> int:
    """Run a small step of both sides, give its memory back, and return the bytes that are resident then."""
    import torch

    model = tiny_model(folder / "model", WIDTH, LAYERS, LONGEST)
    our_step(model, _cache(folder, model), np.arange(64), DIMS, False, tokens=256)
    texts = made_texts(64, LONGEST)
    loss, _ = cached_loss(model, DIMS, CHUNK, MICRO_BATCH_TOKENS)
    loss([model.preprocess(texts[:32]), model.preprocess(texts[32:])], torch.empty(0)).backward()
    del model, loss
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return reset_peak()


def _cache(folder: Path, model: "SentenceTransformer") -> "TokenCache":
    """The cache of all rows, which main has built."""
    from trainer.tokens import token_cache

    rows = range(int((folder / "rows").read_text()))  # their number is enough to find the cache
    return token_cache(rows, NAME, column_names(2), model, folder)


def _activations(model: "SentenceTransformer", cache: "TokenCache", rows: np.ndarray) -> int:
    """Bytes that autograd saves for the micro-batch with the most padded tokens, parameters not counted."""
    import torch

    from trainer.loader import BatchFeatures
    from trainer.memory import saved_bytes
    from trainer.tokens import Padder

    plan = plan_of(cache, rows)
    padded = plan.padded[0]
    texts = plan.micro_batches(0)[int(padded.argmax())]
    features = BatchFeatures(cache, Padder(model), rows, torch.device("cpu"), False)(texts)
    return saved_bytes(lambda: model(features), model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    huge, small, repeats = (8192, 1024, 2) if args.quick else (65_536, 4096, 2)
    rival_sizes = (1024,) if args.quick else (4096, 8192)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = made_texts(2 * huge, LONGEST)
        rows = list(zip(texts[:huge], texts[huge:], strict=True))
        (folder / "rows").write_text(str(huge))
        tokenised(NAME, rows, tiny_model(folder / "model", WIDTH, LAYERS, LONGEST), folder)
        progress(f"{huge:,} rows")

        def ours(rows: int, repeats: int) -> list[Result]:
            results = in_fresh_process(our_steps, folder, rows, repeats)
            seconds = ", ".join(f"{r.cpu:.1f} + {r.loss_stage:.1f}" for r in results)
            peaks = f"{results[0].extra / MIB:.0f} of {results[0].expected / MIB:.0f} MiB"
            progress(f"ours, {rows:,} rows: {seconds} CPU s with the loss stage last; {peaks}")
            return results

        few = ours(small, repeats)
        (many,) = ours(huge, 1)
        if not args.quick:
            few += ours(small, repeats)  # before and after, as the machine may have changed its speed
        theirs = []
        for size in rival_sizes:
            theirs.append(in_fresh_process(rival_step, folder, size))
            progress(f"{RIVAL}, {size:,} rows: {theirs[-1].cpu:.1f} + {theirs[-1].loss_stage:.1f} CPU s")
    return finish(_report(many, few, theirs), args)


def _report(many: Result, few: Sequence[Result], theirs: Sequence[Result]) -> list[Claim]:
    """Print what was found; `few` are the smaller steps of ours, the first of them in a fresh process."""
    print()
    lines = [[what, how, size / MIB] for what, how, size in many.parts]
    lines += [["expected", "sum of the above", many.expected / MIB], ["measured", "peak", many.extra / MIB]]
    table([f"memory of a step, {many.rows:,} rows", "formula", "MiB"], lines)
    row_time = fmean(result.cpu for result in few)
    error = relative_error(few[0].gradient, theirs[0].gradient)
    lines: list[list[object]] = []
    for side, result, cpu, agreement in (
        ("ours", few[0], row_time, error),
        *((RIVAL, result, result.cpu, "-") for result in theirs),
        ("ours", many, many.cpu, "-"),
    ):
        expected = result.expected / MIB if result.activations else "-"
        line = [side, f"{result.rows:,}", cpu, cpu / result.rows * 1e3, result.loss_stage]
        lines.append([*line, result.loss_stage / result.rows * 1e3, result.extra / MIB, expected, agreement])
    lines.append([RIVAL, f"{many.rows:,}", *["not run"] * 7])
    header = ["side", "rows", "CPU s without loss stage", "ms a row", "loss stage CPU s", "ms a row", "peak extra MiB"]
    table([*header, "expected MiB", "relative error of the gradient"], lines)
    model = f"a {LAYERS}-layer BERT of width {WIDTH}, {len(DIMS)} dims, texts of 6 to {LONGEST} tokens, all distinct"
    allocator = f"MALLOC_MMAP_THRESHOLD_ {os.environ.get('MALLOC_MMAP_THRESHOLD_', 'not set')}"
    common = (
        f"{model}, one process and thread, fp32, no graph kept, {allocator}; at {few[0].rows:,} rows gradients agree "
        f"with {RIVAL} to {error:.0e}"
    )
    return [
        Claim(
            "huge_batch.peak_over_expected",
            many.extra / many.expected,
            "peak / expected bytes",
            "lower",
            None,
            f"peak extra resident memory of {many.rows:,} rows in a fresh process, {many.extra / MIB:.0f} MiB, "
            f"over model with gradients + activations of one micro-batch + loss tile + embeddings and their gradients, "
            f"{many.expected / MIB:.0f} MiB; {common}",
        ),
        Claim(
            "huge_batch.row_time_ratio",
            many.cpu / many.rows / (row_time / few[0].rows),
            "times",
            "lower",
            None,
            f"CPU time a row without the loss stage, {many.rows:,} rows over {few[0].rows:,} (mean of {len(few)} "
            f"steps), {common}",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())

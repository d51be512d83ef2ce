"""Real tokens a second, FLOP/s utilisation and peak memory of whole training steps on one GPU, in bf16.

python -m benchmarks.gpu [--quick] [--json FILE]

Both sides train a BERT of the shape of bert-base (random weights, 109 M parameters) under accelerate's autocast to bf16
with AdamW, on the same made texts of 6 to 256 tokens, no two the same, dropout off. A step of ours is the whole of
trainer/exact_step.py, plan and features included, at its best of a few micro-batch budgets, without kept graphs and
with train.graph_memory=auto. The rival's columns lie on the device already, and it has its best of a few mini-batch
sizes. Seconds are wall clock, the device waited for. Utilisation counts forward and backward over real tokens once.
What a step has to hold:

training    weights and gradients and AdamW's two moments: 16 bytes x parameters
activations what autograd saves of the largest micro-batch (distinct tensors, bf16 copies of weights among them)
loss tile   tile_lines of trainer/infonce.py x (dims + 1) x candidates x 4 bytes, on a GPU (dims + 2)
embeddings  and their gradients: 2 x 4 bytes x texts x width

Without CUDA --quick runs the same code on the CPU with a tiny shape: that it runs is all that this shows.
"""

import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import RIVAL, Claim, finish, one_thread, options, peak, progress, reset_peak, table
from benchmarks.sides import (
    SCALE,
    cached_loss,
    gradient,
    made_texts,
    padded_columns,
    relative_error,
    tiny_model,
    tokenised,
)
from launch.config import RunConfig
from launch.errors import UserError, exit_code
from launch.world import World

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from trainer.batching import Plan
    from trainer.exact_step import ExactStep
    from trainer.tokens import TokenCache

MIB = 1 << 20
GOAL = 0.4  # of the peak on one H100


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    width: int
    layers: int
    heads: int
    vocabulary: int | None
    longest: int  # tokens
    rows: int
    dims: list[int]
    budgets: tuple[int, ...]  # tokens of our micro-batches
    sizes: tuple[int, ...]  # texts of the rival's mini-batches
    repeats: int


_BASE: dict[str, Any] = {"width": 768, "layers": 12, "heads": 12, "vocabulary": 30_522, "longest": 256}
FULL = Shape(
    **_BASE,
    rows=4096,
    dims=[768, 512, 256, 128, 64],
    budgets=(8192, 16_384, 32_768, 65_536),
    sizes=(32, 64, 128, 256),
    repeats=5,
)
QUICK = Shape(**_BASE, rows=512, dims=[768, 256, 64], budgets=(8192, 32_768), sizes=(64, 128), repeats=2)
ON_CPU = Shape(64, 2, 4, None, 32, 16, [64, 32], (128, 256), (4, 8), 1)


@dataclass
class Result:
    """Steps of one side with one setting."""

    setting: int  # tokens of a micro-batch, texts of a mini-batch
    seconds: list[float] = field(default_factory=list)  # of each step but the first
    extra: int = 0  # peak bytes above what was there before the model
    expected: list[tuple[str, str, int]] = field(default_factory=list)  # name, formula, bytes
    gradient: "Tensor | None" = None  # of the first step, on the CPU
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """Seconds of its fastest step; infinite where the device's memory was too small."""
        return min(self.seconds, default=float("inf"))


@dataclass(frozen=True)
class Bench:
    """Everything that does not change between sides and settings."""

    shape: Shape
    device: "torch.device"
    folder: Path
    rows: list[tuple[str, str]]
    cache: "TokenCache"

    @property
    def real_tokens(self) -> int:
        """Of one step: every text once."""
        return int(self.cache.lengths(np.arange(len(self.rows))).sum())

    def model(self) -> "SentenceTransformer":
        """A fresh copy of the model on the device, under autocast to bf16 as accelerate puts it around."""
        import torch
        from accelerate.utils import convert_outputs_to_fp32

        model = load(self.folder, self.shape).to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        setattr(model, "forward", convert_outputs_to_fp32(autocast(model.forward)))  # noqa: B010  (a method)
        return model

    def wait(self) -> float:
        """The clock after all work of the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def give_back(self) -> int:
        """Give freed memory back and return the bytes that are held, from where on the peak counts."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return reset_peak()

    def peak(self) -> int:
        """Bytes at most held since `give_back`."""
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak()

    def steps(self, model: "SentenceTransformer", result: Result, step: Callable[[int], object], repeats: int) -> None:
        """Take a first step, whose gradient is kept, and timed ones; all of them move the weights with AdamW."""
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=self.device.type == "cuda")
        for number in range(1 + repeats):
            began = self.wait()
            step(number)
            if number == 0:
                result.gradient = gradient(model).cpu()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number:
                result.seconds.append(self.wait() - began)


def load(folder: Path, shape: Shape) -> "SentenceTransformer":
    """The model on the CPU in fp32."""
    return tiny_model(folder / "model", shape.width, shape.layers, shape.longest, shape.heads, shape.vocabulary)


def ours(bench: Bench, tokens: int, graph_memory: float | str, repeats: int) -> Result:
    """Steps of trainer/exact_step.py, as a run has them."""
    from trainer.exact_step import ExactStep, Tokenised
    from trainer.sampler import DataOrder

    shape, result = bench.shape, Result(tokens)
    config = RunConfig.model_validate(
        {
            "model": {"path": "made"},
            "data": {"sources": [{"path": "made"}], "cache_dir": str(bench.folder)},
            "loss": {"dims": shape.dims, "arguments": {"scale": SCALE}, "mask_known_positives": False},
            "train": {
                "global_batch_size": shape.rows,
                "micro_batch_tokens": tokens,
                "precision": "bf16",
                "graph_memory": graph_memory,
            },
        }
    )
    before = bench.give_back()
    model = bench.model()
    order = DataOrder(config.train.seed, shape.rows, (shape.rows,))
    exact = ExactStep(config, model, Tokenised(bench.cache, order), World(0, 0, 1, 1, 1), bool)

    def step(number: int) -> object:
        return exact.run(model, exact.steps[number]["batch"], lambda surrogate: surrogate.backward())

    bench.steps(model, result, step, repeats)
    result.extra = bench.peak() - before
    result.metrics = exact.metrics()
    result.expected = _expected(bench, model, exact)
    return result


def theirs(bench: Bench, size: int, repeats: int) -> Result:
    """Steps of sentence-transformers on the same rows."""
    import torch

    result = Result(size)
    before = bench.give_back()
    model = bench.model()
    columns = [
        {k: v.to(bench.device) if isinstance(v, torch.Tensor) else v for k, v in column.items()}
        for column in padded_columns(bench.rows, model)
    ]
    loss, _ = cached_loss(model, bench.shape.dims, size)
    bench.steps(model, result, lambda _: loss(columns, torch.empty(0)).backward(), repeats)
    result.extra = bench.peak() - before
    return result


def _expected(bench: Bench, model: "SentenceTransformer", exact: "ExactStep") -> list[tuple[str, str, int]]:
    """What a step without kept graphs has to hold: name, formula, bytes."""

    from trainer.infonce import tile_lines
    from trainer.loader import BatchFeatures
    from trainer.memory import saved_bytes
    from trainer.tokens import Padder

    shape, batch = bench.shape, exact.steps[0]["batch"]
    plan: Plan = batch.plan
    padded = plan.padded[0]
    texts = plan.micro_batches(0)[int(padded.argmax())]
    features = BatchFeatures(bench.cache, Padder(model), batch.rows, bench.device, False)(texts)
    activations = saved_bytes(lambda: model(features), model)
    count, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) for frozen in (1, 0))
    lines = min(shape.rows, tile_lines(shape.rows, len(shape.dims), bench.device.type))
    buffers = len(shape.dims) + 1 + (bench.device.type == "cuda")
    return [
        ("training", f"4 bytes x {count:,} + 12 bytes x {trained:,} parameters", 4 * count + 12 * trained),
        ("activations", f"saved by autograd, {len(texts)} texts of {int(padded.max()):,} padded tokens", activations),
        (
            "loss tile",
            f"{lines:,} lines x {buffers} x {shape.rows:,} candidates x 4 bytes",
            4 * lines * buffers * shape.rows,
        ),
        (
            "embeddings and gradients",
            f"2 x 4 bytes x {2 * shape.rows:,} texts x {shape.width}",
            16 * shape.rows * shape.width,
        ),
    ]


def _tried(measure: Callable[[int, int], Result], settings: Sequence[int], what: str) -> Result:
    """The best of a side's settings by one step each; one that does not fit the device's memory is out."""
    import torch

    found = []
    for setting in settings:
        try:
            found.append(measure(setting, 1))
            progress(f"{what} {setting:,}: {found[-1].best:.3f} s")
        except torch.OutOfMemoryError:
            progress(f"{what} {setting:,}: out of memory")
    if not found:
        raise UserError(f"{what}: got out of memory at {settings[0]:,}; allowed: a device with more memory, or --quick")
    return min(found, key=lambda result: result.best)


def measure(shape: Shape, device: "torch.device", folder: Path) -> list[Claim]:
    """Run both sides and print what was found."""
    from trainer import flops

    texts = made_texts(2 * shape.rows, shape.longest)
    rows = list(zip(texts[: shape.rows], texts[shape.rows :], strict=True))
    plain = load(folder, shape)
    bench = Bench(shape, device, folder, rows, tokenised("gpu", rows, plain, folder))
    progress(f"{shape.rows:,} rows, {bench.real_tokens:,} tokens")
    budget = _tried(lambda tokens, n: ours(bench, tokens, 0.0, n), shape.budgets, "ours, micro-batch tokens").setting
    size = _tried(partial(theirs, bench), shape.sizes, f"{RIVAL}, mini_batch_size").setting
    sides = {
        "ours, no graph kept": ours(bench, budget, 0.0, shape.repeats),
        "ours, graph_memory=auto": ours(bench, budget, "auto", shape.repeats),
        f"{RIVAL}, mini_batch_size {size}": theirs(bench, size, shape.repeats),
    }
    recompute, auto, rival = sides.values()
    best = min(recompute, auto, key=lambda result: result.best)

    per_token, per_square = flops.of_training(plain) or (0.0, 0.0)
    squares = np.square(bench.cache.lengths(np.arange(shape.rows)), dtype=np.float64).sum()
    work, limit = per_token * bench.real_tokens + per_square * float(squares), flops.device_peak(device, "bf16")
    used = {name: work / result.best / limit if limit else None for name, result in sides.items()}
    assert recompute.gradient is not None and rival.gradient is not None
    error = relative_error(recompute.gradient, rival.gradient)
    print()
    table(
        ["side", "seconds a step", "real tokens a second", "TFLOP/s", "of the peak", "peak MiB", "padded / real"],
        [
            [
                name,
                result.best,
                bench.real_tokens / result.best,
                work / result.best / 1e12,
                "not known" if used[name] is None else used[name],
                result.extra / MIB,
                result.metrics.get("padded_over_real", "-"),
            ]
            for name, result in sides.items()
        ],
    )
    expected = sum(size for _, _, size in recompute.expected)
    lines = [[name, formula, size / MIB] for name, formula, size in recompute.expected]
    lines += [["expected", "sum of the above", expected / MIB], ["measured", "peak", recompute.extra / MIB]]
    table(["memory of a step, no graph kept", "formula", "MiB"], lines)

    where = _where(device)
    parameters = sum(p.numel() for p in plain.parameters())
    common = (
        f"{where}; bf16 autocast and AdamW, one process, random BERT of {shape.layers} layers of {shape.width}, "
        f"{parameters:,} parameters, {len(shape.dims)} dims, {shape.rows:,} rows of 2 texts of 6 to {shape.longest} "
        f"tokens, all distinct, dropout off, least of {shape.repeats} steps; bf16 gradients {error:.0e} apart"
    )
    ours_at = f"best of {', '.join(map(str, shape.budgets))} tokens a micro-batch, {budget}"
    rival_at = f"mini_batch_size {size}, best of {', '.join(map(str, shape.sizes))}"
    peaks = f"{recompute.extra / MIB:.0f} of {expected / MIB:.0f} MiB, no graph kept, {budget} tokens a micro-batch"
    utilised = f"forward and backward over real tokens once, goal {GOAL} on an H100" if limit else "MFU is not known"
    speed = f"{ours_at}, without kept graphs or with graph_memory=auto, {recompute.best:.3g} and {auto.best:.3g} s"
    kind = "peak / expected bytes"
    return [
        Claim(
            "gpu.tokens_per_s", bench.real_tokens / best.best, "real tokens / s", "higher", None, f"{speed}; {common}"
        ),
        Claim(
            "gpu.mfu", work / best.best / limit if limit else None, "of peak", "higher", None, f"{utilised}; {common}"
        ),
        Claim("gpu.speedup", rival.best / best.best, "times", "higher", RIVAL, f"{speed}; {rival_at}; {common}"),
        Claim("gpu.peak_over_expected", recompute.extra / expected, kind, "lower", None, f"{peaks}; {common}"),
    ]


def _where(device: "torch.device") -> str:
    import torch

    if device.type == "cpu":
        return "on a CPU, not on a GPU, with a tiny shape"
    return f"one {torch.cuda.get_device_name(device)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; raises UserError for the full form without CUDA."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    import torch

    if not torch.cuda.is_available() and not args.quick:
        raise UserError("device: got none with CUDA, allowed: one GPU, or --quick, which runs the same code on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = ON_CPU if device.type == "cpu" else QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        return finish(measure(shape, device, Path(folder)), args)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

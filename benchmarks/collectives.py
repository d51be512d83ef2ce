"""What a step sends for its embeddings: collectives and bytes, counted in real steps of both sides on gloo processes.

python -m benchmarks.collectives [--quick] [--json FILE]

Both sides train one small model (fp64, so that gradients can be compared to rounding) under DDP on the same distinct
texts, over batch sizes, columns, dims and micro-batches. Counted is what each side calls: every function of
torch.distributed that sends more than one element, and for sentence-transformers the backward of its
differentiable all-gather, which is one reduce-scatter on NCCL and which gloo only imitates with other calls. Bytes are
those that a rank sends of its own part to each other rank, (ranks - 1) * part, which is what a ring sends of both
collectives. DDP's own reduction of the parameters' gradients, once a step on both sides, is not counted. The full run
takes about four minutes.
"""

import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import RIVAL, Claim, finish, one_thread, options, progress, table
from benchmarks.sides import MadeBatch, cached_loss, gradient, objective, relative_error, scatters_within, tiny_model

WIDTH, LAYERS = 32, 2
DIMS = {1: [32], 5: [32, 24, 16, 8, 4]}
LONGEST = 16  # tokens
# Where the part of one rank is among the arguments.
GATHERS = {"all_gather": 1, "all_gather_single": 1, "all_gather_into_tensor": 1, "_all_gather_base": 1}
SCATTERS = {"reduce_scatter": 0, "reduce_scatter_single": 0, "reduce_scatter_tensor": 0, "_reduce_scatter_base": 0}
OTHERS = ("all_reduce", "broadcast", "reduce", "gather", "scatter", "all_to_all", "all_to_all_single", "send", "isend")


@dataclass(frozen=True)
class Setting:
    """One step."""

    ranks: int
    batch: int  # rows over all ranks
    columns: int
    dims: int
    micro_batch: int  # texts

    @property
    def chunks(self) -> int:
        """The rival's loss chunks."""
        return -(-self.batch // self.ranks // self.micro_batch)


@dataclass
class Sent:
    """What one rank sends for embeddings and for their gradients in a step."""

    gathers: int = 0
    scatters: int = 0
    gathered_bytes: int = 0
    scattered_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.gathered_bytes + self.scattered_bytes

    def add(self, kind: str, part: Any) -> None:
        """Count a collective in which each rank has a part of this shape."""
        import torch.distributed as dist

        size = (dist.get_world_size() - 1) * part.numel() * part.element_size()
        if kind == "gather":
            self.gathers += 1
            self.gathered_bytes += size
        else:
            self.scatters += 1
            self.scattered_bytes += size


@contextmanager
def counted() -> Iterator[Sent]:
    """Count what this process calls of torch.distributed; raises AssertionError if it sends in another way."""
    import torch.distributed as dist
    from torch import Tensor

    sent, within = Sent(), False

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            if not within:
                if name in GATHERS:
                    sent.add("gather", args[GATHERS[name]])
                elif name in SCATTERS:
                    sent.add("scatter", args[SCATTERS[name]])
                else:
                    assert isinstance(args[0], Tensor) and args[0].numel() == 1, f"{name} sends {args[0]}"
            return call(*args, **kwargs)

        return watching

    @contextmanager
    def scatter(part: Tensor) -> Iterator[None]:
        nonlocal within
        sent.add("scatter", part)
        within = True
        try:
            yield
        finally:
            within = False

    originals = {name: getattr(dist, name) for name in (*GATHERS, *SCATTERS, *OTHERS)}
    try:
        for name, call in originals.items():
            setattr(dist, name, watched(name, call))
        with scatters_within(scatter):
            yield sent
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)


def measure(rank: int, folder: Path, settings: Sequence[Setting]) -> list[tuple[Sent, Sent, float]]:
    """What one rank sends in our step and in the rival's, and the relative error between their gradients."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from trainer.engines import DDP
    from trainer.gradcache import GradCache

    one_thread()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the all-gather that sentence-transformers calls
    if rank == 0:
        tiny_model(folder, WIDTH, LAYERS, LONGEST)
    dist.barrier()
    model = tiny_model(folder, WIDTH, LAYERS, LONGEST).double()
    wrapper = DistributedDataParallel(model)
    results = []
    for setting in settings:
        batch, dims = MadeBatch(setting.batch, setting.columns, LONGEST), DIMS[setting.dims]
        plan = batch.plan(setting.ranks, setting.micro_batch * LONGEST)
        wrapper.zero_grad(set_to_none=True)
        with counted() as ours:
            GradCache(DDP(wrapper), objective(dims), seed=0).step(plan, partial(batch.features, model), 0)
        computed = gradient(wrapper)

        columns = batch.columns(model, rank, setting.ranks)
        loss, cached = cached_loss(model, dims, setting.micro_batch, gather=True)
        setattr(cached, "model", wrapper)  # noqa: B010  (what its trainer does after wrapping)
        wrapper.zero_grad(set_to_none=True)
        with counted() as theirs:
            loss(columns, torch.empty(0)).backward()
        results.append((ours, theirs, relative_error(computed, gradient(wrapper))))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    from tests.distributed import run

    args = options(__doc__).parse_args(argv)
    one_thread()
    batches = (16, 32, 64) if args.quick else (64, 128, 256)
    micro_batches = (4,) if args.quick else (8, 32)
    columns = (2, 5) if args.quick else (2, 3, 5)
    found: dict[Setting, tuple[Sent, Sent, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        for ranks in (2, 4):
            settings = [Setting(ranks, *values) for values in itertools.product(batches, columns, DIMS, micro_batches)]
            by_rank = run(measure, ranks, folder, settings, timeout=500)
            for setting, results in zip(settings, zip(*by_rank, strict=True), strict=True):
                # Every rank sends as much.
                assert all(result[:2] == results[0][:2] for result in results), (setting, results)
                found[setting] = (*results[0][:2], max(result[2] for result in results))
            progress(f"{ranks} ranks: {len(settings)} settings")
    _print(found)
    _print_growth(found, batches)

    ours, theirs, errors = zip(*found.values(), strict=True)
    times = [t.bytes / o.bytes for o, t in zip(ours, theirs, strict=True)]
    conditions = (
        f"most over {len(found)} settings: 2 and 4 gloo processes, batches {batches}, columns {columns}, dims "
        f"{tuple(DIMS)}, {micro_batches} texts a micro-batch, DDP, fp64; gradients agree to {max(errors):.0e}; in the "
        f"same settings the rival sends {min(times):.1f} to {max(times):.0f} times our bytes and calls"
    )
    claims = []
    for name, unit in (("gathers", "all-gathers a step"), ("scatters", "reduce-scatters a step")):
        ours_now, theirs_now = ([getattr(sent, name) for sent in side] for side in (ours, theirs))
        about = f"{conditions} {min(theirs_now)} to {max(theirs_now)}"
        claims.append(Claim(f"collectives.embedding_{name}_max", max(ours_now), unit, "lower", RIVAL, about))
    return finish(claims, args)


def _print(found: dict[Setting, tuple[Sent, Sent, float]]) -> None:
    """One line a setting; the rival's counts beside C*D all-gathers and C*D*k reduce-scatters."""
    print()
    header = ["ranks", "batch", "columns C", "dims D", "micro-batch", "loss chunks k", "our gathers", "scatters", "KiB"]
    header += ["their gathers", "C*D", "scatters", "C*D*k", "KiB", "their / our KiB", "gradient: relative error"]
    lines: list[list[object]] = []
    for s, (ours, theirs, error) in found.items():
        line: list[object] = [s.ranks, s.batch, s.columns, s.dims, s.micro_batch, s.chunks]
        line += [ours.gathers, ours.scatters, ours.bytes / 1024]
        line += [theirs.gathers, s.columns * s.dims, theirs.scatters, s.columns * s.dims * s.chunks]
        lines.append([*line, theirs.bytes / 1024, theirs.bytes / ours.bytes, error])
    table(header, lines)


def _print_growth(found: dict[Setting, tuple[Sent, Sent, float]], batches: Sequence[int]) -> None:
    """How bytes grow when the batch doubles, at the most columns and dims and the smallest micro-batch."""
    lines = []
    for side, name in enumerate(("ours", RIVAL)):
        for what in ("gathered_bytes", "scattered_bytes"):
            for ranks in (2, 4):
                sizes = [
                    getattr(sent[side], what)
                    for s, sent in found.items()
                    if (s.ranks, s.columns, s.dims) == (ranks, 5, 5)
                    and s.micro_batch == min(other.micro_batch for other in found)
                ]
                growth = " ".join(f"{after / before:.2f}" for before, after in itertools.pairwise(sizes))
                lines.append([name, what.replace("_", " "), ranks, *(size / 1024 for size in sizes), growth])
    table(["side", "KiB a rank sends", "ranks", *(f"batch {b}" for b in batches), "growth at each doubling"], lines)


if __name__ == "__main__":
    sys.exit(main())

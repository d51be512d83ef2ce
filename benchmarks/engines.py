"""What a step sends under each engine, and its gradient's error: both sides on real gloo processes.

python -m benchmarks.engines [--quick] [--json FILE]

One small random BERT in fp32 under DDP, FSDP2 and ZeRO-1, 2 and 3, ours in fast and lean mode, beside the unmodified
loss of sentence-transformers. Each is run with two numbers of micro-batches, to show what grows with them; the first
step of each gives the gradient, the last is counted. Counted are the collective operators of torch's dispatcher
(c10d), which DDP in C++, FSDP2 and DeepSpeed all call, whatever gloo makes of them; only the backward of torch's
differentiable all-gather, which sentence-transformers calls, is counted as the one reduce-scatter that it is on NCCL.
Bytes are what a rank sends in a ring, as a mean over ranks. ZeRO's include its optimiser's step (learning rate 0).
DeepSpeed has the settings of configs/deepspeed, but for sizes that this small model would not reach.
"""

import itertools
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import RIVAL, Claim, finish, one_thread, options, progress, table
from benchmarks.sides import MadeBatch, cached_loss, gradient, objective, relative_error, scatters_within, tiny_model
from tests.cpu_engines import quiet_deepspeed
from tests.distributed import run
from trainer import collectives
from trainer.engines import engine_of
from trainer.gradcache import GradCache

MODES = {"ddp": ["fast"]} | {name: ["fast", "lean"] for name in ("fsdp2", "zero1", "zero2", "zero3")}
WIDTH, LAYERS, LONGEST = 32, 2, 16  # LONGEST in tokens
DIMS, COLUMNS = [32, 16, 8], 2
ROWS, QUICK_ROWS = 12, 6  # of each rank; half of them make half as many micro-batches
TOKENS, MINI_BATCHES = (80, 40), (6, 3)  # budgets of our micro-batches; texts of the rival's, which make as many
BUCKET = 20_000  # elements: one of configs/deepspeed, 50,000,000, would hold the whole model of 60,000
LIMIT = 400.0  # seconds for processes that one engine needs
WEIGHTS, GRADIENTS, GATHERS, SCATTERS, OTHER = "weights", "gradients", "embedding gathers", "scatters", "other"
KINDS, COUNTED = (WEIGHTS, GRADIENTS, GATHERS, SCATTERS, OTHER), "counted already"
# Of each operator what engines use it for, which argument is the whole of it, and how often that goes round a ring.
OPERATORS = dict.fromkeys(("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"), (WEIGHTS, 0, 1))
OPERATORS |= {"_reduce_scatter_base_": (GRADIENTS, 1, 1), "reduce_": (GRADIENTS, 0, 1), "allreduce_": (GRADIENTS, 0, 2)}
OPERATORS |= {"broadcast_": (OTHER, 0, 1), "barrier": (OTHER, 0, 0)}


@dataclass(frozen=True)
class Result:
    """One step; where it raised there is no more than the exception's first line."""

    micro_batches: int = 0  # of a rank
    error: float = math.nan  # of the whole gradient, relative
    calls: Counter[str] = field(default_factory=Counter)  # by KINDS
    sent: Counter[str] = field(default_factory=Counter)  # bytes, likewise
    raised: str = ""


@contextmanager
def counted(result: Result) -> Iterator[None]:
    """Count this process's collectives; those of embeddings are told by who calls them, others by their operator."""
    ranks = dist.get_world_size()
    within = [""]  # kinds of what is running, the innermost last

    def count(kind: str, times: int, tensors: list[Tensor]) -> None:
        result.calls[kind] += 1
        result.sent[kind] += times * sum(t.numel() * t.element_size() for t in tensors) * (ranks - 1) // ranks

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(t, DTensor) for t in types):
                return NotImplemented  # comes again with the local tensors
            assert func.namespace != "_c10d_functional", f"{func} is not counted"
            if func.namespace == "c10d" and within[-1] != COUNTED:
                kind, place, times = OPERATORS[func._opname]
                tensors = tree_leaves(args[place])
                if sum(t.numel() for t in tensors) == 1:
                    kind = OTHER  # norms, overflow flags, our agreement to finish
                count(within[-1] or kind, times, tensors)
            return func(*args, **(kwargs or {}))

    @contextmanager
    def inside(kind: str, part: Tensor | None = None) -> Iterator[None]:
        if part is not None:
            count(SCATTERS, ranks, [part])
        within.append(kind)
        try:
            yield
        finally:
            within.pop()

    with (
        patch.object(collectives, "gather_embeddings", inside(GATHERS)(collectives.gather_embeddings)),
        patch.object(collectives, "scatter_gradient", inside(SCATTERS)(collectives.scatter_gradient)),
        patch.object(nn, "all_gather", inside(GATHERS)(nn.all_gather)),
        scatters_within(partial(inside, COUNTED)),
        Watch(),
    ):
        yield


def prepared(name: str, model: Any) -> Any:
    """The model as the engine has it. All ranks must call."""
    if name == "ddp":
        return DistributedDataParallel(model)
    if name == "fsdp2":
        for layer in model[0].auto_model.encoder.layer:
            fully_shard(layer)
        return fully_shard(model)
    import deepspeed

    file = Path(__file__).parents[1] / "configs" / "deepspeed" / f"{name}.json"
    stage = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"] | {"reduce_bucket_size": BUCKET}
    if name == "zero3":  # with the file's threshold every parameter would stay gathered
        stage |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": stage}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with patch.object(torch, "compile", lambda function, **_: function):  # Muon's import would load inductor, for 3 s
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def gradient_of(wrapper: Any, model: Any, step: Callable[[], object]) -> Tensor:
    """The whole gradient after a step, under ZeRO just before its optimiser's. All ranks must call."""
    if not hasattr(wrapper, "zero_optimization_stage"):
        wrapper.zero_grad(set_to_none=True)
        step()
        return gradient(model)
    from deepspeed.utils import safe_get_full_grad

    seen: list[Tensor] = []

    def look_and_step(own_step: Callable[[], object] = wrapper.step) -> None:
        parts: list[Any] = [safe_get_full_grad(p) for p in model.parameters() if p.requires_grad]
        seen.extend(part.flatten().clone() for part in parts)
        own_step()

    with patch.object(wrapper, "step", look_and_step):
        step()
    return torch.cat(seen)


def our_steps(wrapper: Any, model: Any, batch: MadeBatch, mode: str) -> Iterator[tuple[int, Callable[[], object]]]:
    """A rank's micro-batches, and a step, which all ranks must call."""
    engine = engine_of(wrapper, lambda loss: loss.backward(), "lean" if mode == "lean" else "fast")
    assert engine.mode == mode, f"asked for {mode}, got {engine.mode}"
    gradcache = GradCache(engine, objective(DIMS), seed=0)
    for tokens in TOKENS:
        plan = batch.plan(dist.get_world_size(), tokens)
        yield len(plan.cuts) - 1, partial(gradcache.step, plan, partial(batch.features, model), 0)


def their_steps(wrapper: Any, model: Any, columns: list[Any], rows: int) -> Iterator[tuple[int, Callable[[], object]]]:
    """The same for the rival's unmodified loss of a rank's columns."""

    def step(loss: Callable[..., Any]) -> object:
        value = loss(columns, torch.empty(0)) / 1  # batches of a step, by which its trainer divides
        if not hasattr(wrapper, "zero_optimization_stage"):
            return value.backward()
        wrapper.set_gradient_accumulation_boundary(is_boundary=True)  # as its trainer has accelerate do
        wrapper.backward(value, scale_wrt_gas=False)
        return wrapper.step()

    for size in MINI_BATCHES:
        loss, cached = cached_loss(model, DIMS, size, gather=True)
        setattr(cached, "model", wrapper)  # noqa: B010  (what its trainer does after wrapping)
        yield COLUMNS * -(-rows // size), partial(step, loss)


def measure(rank: int, ranks: int, rows: int, folder: Path, name: str, sides: Sequence[str]) -> list[list[Result]]:
    """For each side what this rank sends in a step of `rows` rows a rank, with few and with many micro-batches.

    All ranks must call.
    """
    one_thread()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the all-gather that sentence-transformers calls
    if name.startswith("zero"):
        # DeepSpeed asks for all of them, also where the process group is there.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        quiet_deepspeed()
    if rank == 0:
        tiny_model(folder, WIDTH, LAYERS, LONGEST)
    dist.barrier()
    alone = tiny_model(folder, WIDTH, LAYERS, LONGEST).double()
    batch = MadeBatch(rows * ranks, COLUMNS, LONGEST)
    cached_loss(alone, DIMS, rows)[0](batch.columns(alone), torch.empty(0)).backward()
    found = []
    for side in sides:
        found.append(results := [])
        model = tiny_model(folder, WIDTH, LAYERS, LONGEST)
        wrapper = prepared(name, model)
        theirs = their_steps(wrapper, model, batch.columns(model, rank, ranks), rows)
        for micro_batches, step in theirs if side == RIVAL else our_steps(wrapper, model, batch, side):
            error = relative_error(gradient_of(wrapper, model, step).double(), gradient(alone))
            if name == "ddp":
                step()  # the first of all sends the order of its buckets
            results.append(Result(micro_batches, error))
            with counted(results[-1]):
                step()
    return found


def of_processes(ranks: int, rows: int, folder: Path, name: str, sides: Sequence[str]) -> list[list[Result]]:
    """Results of new processes, the same on all ranks; a rival that waits for ever or dies is one that raises."""
    try:
        by_rank: list[list[list[Result]]] = run(measure, ranks, ranks, rows, folder, name, sides, timeout=LIMIT)
        assert by_rank == by_rank[:1] * ranks, f"ranks differ: {by_rank}"
    except AssertionError as error:
        if RIVAL not in sides:
            raise
        of_traceback = re.findall(r"^\w[\w.]*: .*", str(error), re.MULTILINE)
        return [[Result(raised=" ".join([str(error), *of_traceback][-1].split()))]]
    return by_rank[0]


def _check(name: str, side: str, results: list[Result]) -> None:
    """Raise AssertionError where ours calls more than its mode promises."""
    for calls in (result.calls for result in results):
        assert calls[GATHERS] == calls[SCATTERS] == 1, (name, side, calls)
        if (name, side) == ("fsdp2", "fast"):  # a group for each layer and one for what is outside of them
            assert calls[WEIGHTS] == calls[GRADIENTS] == LAYERS + 1, calls
    # ZeRO-3 gathers weights for each forward and backward in both modes: DeepSpeed holds whole gradients only.
    for kind in () if side == "lean" else (GRADIENTS,) if name == "zero3" else (WEIGHTS, GRADIENTS):
        few, many = (result.calls[kind] for result in results)
        assert few == many, f"{name} fast: collectives of {kind} grow with the micro-batches, {few} to {many}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    worlds, rows = ((2,), QUICK_ROWS) if args.quick else ((2, 4), ROWS)
    found: dict[tuple[int, str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks, (name, modes) in itertools.product(worlds, MODES.items()):
            for sides in (modes, [RIVAL]):  # the rival may hang or die
                results = of_processes(ranks, rows, Path(folder) / "model", name, sides)
                found |= {(ranks, name, side): of_side for side, of_side in zip(sides, results, strict=True)}
            progress(f"{ranks} ranks, {name}")
    _print(found)

    errors, theirs = [], []
    for (ranks, name, side), results in found.items():
        if side == RIVAL:
            theirs.append(f"{ranks} x {name} {results[0].raised.partition(':')[0] or f'{results[-1].error:.0e}'}")
        else:
            _check(name, side, results)
            errors += [result.error for result in results]
    conditions = (
        f"most over {len(errors)} steps: {' and '.join(map(str, worlds))} gloo processes, {', '.join(MODES)}, fast and "
        f"lean, {rows} rows a rank in few and many micro-batches, random BERT in fp32, against {RIVAL} in one process "
        f"in fp64; its own loss under the same engines: {', '.join(theirs)}"
    )
    return finish([Claim("engines.max_gradient_error", max(errors), "relative", "lower", RIVAL, conditions)], args)


def _print(found: dict[tuple[int, str, str], list[Result]]) -> None:
    """One line for each engine and side; a cell holds the values of few and of many micro-batches."""
    print("\ncollectives a step and KiB that a rank sends, for few / many micro-batches; errors are relative")
    lines: list[list[object]] = []
    for key, results in found.items():
        cells = []
        for r in results:
            texts = [text for kind in KINDS for text in (str(r.calls[kind]), f"{r.sent[kind] / 1024:.1f}")]
            texts = [str(r.micro_batches), *texts, f"{r.error:.1e}"]
            cells.append([*[""] * (len(texts) - 1), r.raised] if r.raised else texts)
        lines.append([*key, *map(" / ".join, zip(*cells, strict=True))])
    header = ["ranks", "engine", "side", "micro-batches", *(part for kind in KINDS for part in (kind, "KiB"))]
    table([*header, "gradient's error, or what was raised"], lines)


if __name__ == "__main__":
    sys.exit(main())

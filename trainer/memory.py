"""What fits into memory: the graphs that a step keeps, and the micro-batch that a run begins with."""

from collections.abc import Callable

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.errors import UserError, leave_word
from trainer import collectives
from trainer.batching import Plan
from trainer.engines import Engine

GIB = 1 << 30


class MemoryRanOut(Exception):
    """One rank is out of memory where the others wait for it: the run ends and goes on with smaller micro-batches."""

    def __init__(self, step: int, micro_batch_tokens: int) -> None:
        """`micro_batch_tokens` is the budget to go on with."""
        super().__init__(step, micro_batch_tokens)
        self.step, self.micro_batch_tokens = step, micro_batch_tokens

    def told(self) -> UserError:
        """Tell `nestling supervise` the budget; returns what is said. Only this rank knows."""
        leave_word("memory.", str(self.micro_batch_tokens))
        return UserError(
            f"step {self.step}: rank {collectives.rank()} is out of memory where the others wait for it; start again, "
            f"from the last checkpoint, with train.micro_batch_tokens={self.micro_batch_tokens}, or let nestling "
            "supervise do it"
        )


class GraphMemory:
    """Room for graphs of the first pass, the same on all ranks: `train.graph_memory` of the run's config."""

    def __init__(self, asked: float | str, processes: int) -> None:
        """`asked` are GiB, or auto; `processes` share this machine."""
        self._bytes = None if isinstance(asked, str) else asked * GIB  # None = not measured yet
        self._processes = processes
        self._per_token = 0.0  # bytes of a kept graph

    def measure(self, engine: Engine, model: nn.Module, features: dict[str, Tensor]) -> None:
        """Note what the graph of one micro-batch holds, the largest over ranks. All ranks must call.

        `features` of the longest micro-batch go through the engine; no state is left.
        """
        if self._bytes == 0 or engine.mode == "lean":
            return
        device = features["input_ids"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            held = saved_bytes(lambda: engine.forward(features, synchronise=False), model)
        largest = torch.tensor([held / features["input_ids"].numel()], dtype=torch.float64, device=device)
        if collectives.world_size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        self._per_token = largest.item()

    def after_a_step(self, device: torch.device) -> None:
        """With `auto`, once: take what a whole step leaves free, the least over ranks. All ranks must call."""
        if self._bytes is not None:
            return
        free = torch.tensor([free_bytes(device, self._processes)], dtype=torch.float64, device=device)
        if collectives.world_size() > 1:
            dist.all_reduce(free, dist.ReduceOp.MIN)
        self._bytes = free.item()
        say(f"graph memory: {self._bytes / GIB:.3g} GiB a process for kept graphs (train.graph_memory=auto)")

    def kept(self, plan: Plan) -> int:
        """Leading micro-batches whose graphs fit; the same number on all ranks."""
        if not self._per_token or not self._bytes:
            return 0
        return int(np.searchsorted(np.cumsum(plan.padded.max(0)) * self._per_token, self._bytes, side="right"))

    def keep_none(self) -> None:
        """After an error of memory."""
        self._bytes = 0.0


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd saves in `forward`, parameters of `model` not counted."""
    held: dict[int, int] = {}
    keep: list[Tensor] = []  # what is saved must live on, or another tensor would get its address

    def pack(saved: Tensor) -> Tensor:
        keep.append(saved)
        held[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        forward()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in held.items() if place not in parameters)


def largest_micro_batch(plan: Plan) -> int:
    """Padded tokens of the largest micro-batch of a plan, over all ranks."""
    return int(plan.padded.max())


def fitting_tokens(trial: Callable[[int], None], most: int, least: int, device: torch.device) -> int:
    """The largest of `most`, half of it and so on at which `trial` fits on every rank. All ranks must call.

    Raises UserError where `least`, one text of the greatest length, does not.
    """
    tokens = most
    while True:
        does_not_fit = 0
        try:
            trial(tokens)
        except torch.OutOfMemoryError:
            does_not_fit = 1
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not collectives.highest(does_not_fit, device):
            return tokens
        tokens = halved(tokens, least)


def halved(tokens: int, least: int) -> int:
    """Half a budget, but `least` tokens; raises UserError where it is that low already."""
    if tokens <= least:
        raise UserError(
            f"memory: out of it with micro-batches of one text of {least:,} tokens; lower model.max_seq_length, write "
            "train.gradient_checkpointing=true, or take another engine: configs/accelerate/fsdp2.yaml or zero3.yaml"
        )
    return max(tokens // 2, least)


def free_bytes(device: torch.device, processes: int) -> float:
    """Bytes that may go to kept graphs: on a GPU nine tenths of what a step leaves free, on a CPU half of what the
    machine has left, shared by its `processes`."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        return max(0.0, 0.9 * (torch.cuda.mem_get_info(device)[0] + unused))
    return 0.5 * psutil.virtual_memory().available / processes


def say(line: str) -> None:
    """Print on rank 0."""
    if collectives.rank() == 0:
        print(line, flush=True)

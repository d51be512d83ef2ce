"""Every collective of the step: one all-gather, one reduce-scatter of embeddings, two 1-element reductions.

All ranks must call each of them, in the same order. With one process nothing is sent.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.watch import waiting


def world_size() -> int:
    """Processes in the process group, 1 without one. No collective."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 without a process group. No collective."""
    return dist.get_rank() if dist.is_initialized() else 0


@waiting()
def gather_embeddings(local: Tensor) -> Tensor:
    """Embeddings of all ranks [world_size * texts, width], rank by rank.

    All ranks must call, with equal shapes [texts, width].
    """
    if (size := world_size()) == 1:
        return local
    received = local.new_empty(size * len(local), local.shape[1])
    dist.all_gather_single(received, local.contiguous())
    return received


@waiting()
def scatter_gradient(gradient: Tensor) -> Tensor:
    """Sum over ranks of the gradient at gathered embeddings, for those that this rank embedded.

    `gradient` is [world_size * texts, width], the result [texts, width]. All ranks must call.
    """
    size = world_size()
    if size == 1:
        return gradient
    home = gradient.new_empty(len(gradient) // size, gradient.shape[1])
    dist.reduce_scatter_single(home, gradient)
    return home


@waiting()
def highest(code: int, device: torch.device) -> int:
    """The highest of the ranks' codes. All ranks must call; it waits for the device."""
    if world_size() == 1:
        return code
    codes = torch.tensor([code], dtype=torch.int32, device=device)
    dist.all_reduce(codes, dist.ReduceOp.MAX)
    return int(codes.item())

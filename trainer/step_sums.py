"""What is logged of the exact step: tokens, shares, seconds and losses, summed over the steps between two logs."""

import time
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist
from torch import Tensor

from trainer import collectives
from trainer.loader import Batch


class StepSums:
    """Sums over the steps since the last log."""

    def __init__(self, training_flops: tuple[float, float] | None, flat: bool) -> None:
        """`training_flops` for each token and each squared length, of forward and backward; `flat` pads nothing."""
        self.flat = flat
        self.peak: float | None = None  # FLOP/s of a device
        self._flops = training_flops
        self._clear()

    def _clear(self) -> None:
        self._count = 0
        self._by_dim: Tensor | None = None
        self._seconds: dict[str, float] = {}
        # [real, padded, computed again] tokens, distinct and masked shares, squared lengths
        self._numbers = np.zeros(6)
        self._since = time.perf_counter()

    def add(self, batch: Batch, kept: int, by_dim: Tensor, seconds: dict[str, float], other: float) -> None:
        """Count one step; `other` seconds lie between the last step's end and this one's start."""
        plan = batch.plan
        tokens = np.add.reduceat(plan.lengths, plan.cuts[:-1], axis=1) if self.flat else plan.padded
        last = tokens.shape[1] - 1  # always computed again, but where it is the only one
        again = int(tokens[:, min(kept, last) :].sum()) if last else 0
        self._numbers += (
            plan.lengths.sum(),
            tokens.sum(),
            again,
            plan.distinct_share,
            plan.masked_share,
            np.square(plan.lengths, dtype=np.float64).sum(),
        )
        self._by_dim = by_dim.clone() if self._by_dim is None else self._by_dim + by_dim
        for phase, value in (*seconds.items(), ("plan", batch.seconds), ("optimiser", other)):
            self._seconds[phase] = self._seconds.get(phase, 0.0) + value
        self._count += 1

    def take(self, dims: Sequence[int]) -> dict[str, float]:
        """Means per step and shares, then start anew. All ranks must call."""
        count = max(1, self._count)
        elapsed = time.perf_counter() - self._since
        real, padded, again, distinct, masked, squares = self._numbers.tolist()
        metrics: dict[str, float] = {}
        if self._by_dim is not None:
            by_dim = self._by_dim / count
            if collectives.world_size() > 1:
                dist.all_reduce(by_dim)
                by_dim /= collectives.world_size()
            metrics |= {f"loss_{dim}": value for dim, value in zip(dims, by_dim.tolist(), strict=True)}
        metrics |= {f"seconds_{phase}": value / count for phase, value in self._seconds.items()}
        metrics |= {
            "real_tokens_per_s": real / elapsed,
            "padded_over_real": padded / max(1.0, real),
            "recomputed_share": again / max(1.0, padded),
            "distinct_share": distinct / count,
            "masked_share": masked / count,
        }
        if self.peak and self._flops:
            done = self._flops[0] * real + self._flops[1] * squares
            metrics["mfu"] = done / (elapsed * self.peak * collectives.world_size())
        self._clear()
        return metrics

"""What the exact step reads: for each step number its plan and its texts, sliced from the token cache.

A plain DataLoader over step numbers: nothing shards it again, every rank makes the same plan, and a resume begins at
its step.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from launch.errors import ignore_stops, signal_at_parents_end
from trainer.batching import Plan
from trainer.known import KnownPositives
from trainer.model import Role
from trainer.sampler import DataOrder
from trainer.tokens import Padder, TokenCache, role_of


@dataclass(frozen=True)
class Batch:
    """One global batch: its plan, and the rows that it is made of."""

    plan: Plan
    rows: np.ndarray  # int64 [global_batch_size], in the numbering of the token cache
    step: int  # since the run began, the key of this step's randomness
    micro_batch_tokens: int  # the plan's budget
    seconds: float  # spent on the plan


class Steps(Dataset[dict[str, Batch]]):
    """Plans by step since the run began, as long as an epoch; pure in its arguments and its budget, so that loader
    workers may make them ahead."""

    def __init__(
        self,
        cache: TokenCache,
        order: DataOrder,
        plan: Callable[..., Plan],
        micro_batch_tokens: int,
        known: KnownPositives | None = None,
    ) -> None:
        """`plan` is make_plan with all that is the same for every batch."""
        self._cache, self._order, self._plan, self._known = cache, order, plan, known
        self.micro_batch_tokens = micro_batch_tokens  # may be lowered: loader workers keep what they began with

    def __len__(self) -> int:
        return self._order.steps_per_epoch

    def __getitem__(self, number: int) -> dict[str, Batch]:
        import time

        start = time.perf_counter()
        rows = self._order.rows_of_step(*divmod(number, len(self)))
        text_ids = self._cache.text_id[rows]
        plan = self._plan(
            self._cache.token_id[rows],
            text_ids,
            self._cache.lengths(rows),
            micro_batch_tokens=self.micro_batch_tokens,
            known=self._known and self._known.of(text_ids[:, 0]),
        )
        seconds = time.perf_counter() - start
        return {"batch": Batch(plan, rows, number, self.micro_batch_tokens, seconds)}

    def with_this_budget(self, batch: Batch) -> Batch:
        """The batch, planned again if it was planned with a larger budget than this."""
        if batch.micro_batch_tokens <= self.micro_batch_tokens:
            return batch
        return self[batch.step]["batch"]


def batches_of(steps: Steps, first: int, end: int, workers: int) -> Iterator[dict[str, Batch]]:
    """Batches of the steps from `first` to before `end`, of all epochs: loader workers end with the iterator.

    They are dicts without the key `labels`, as the Trainer wants them.
    """
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, end),
        num_workers=workers,
        worker_init_fn=_end_with_rank,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # of seeds that nothing uses; torch's own is the run's
    )
    return iter(loader)


def _end_with_rank(_: int) -> None:
    """Have the kernel end this loader worker when its rank ends, however that does, and even where it is stopped.

    Without, as on other systems, torch ends a worker that is not stopped within 5 seconds. What asks a whole group of
    processes to stop is for the rank to answer, which still reads batches.
    """
    ignore_stops()
    signal_at_parents_end(signal.SIGKILL)


class BatchFeatures:
    """Makes model inputs of texts of one batch, by their numbers in the batch (row * columns + column)."""

    def __init__(self, cache: TokenCache, padder: Padder, rows: np.ndarray, device: torch.device, apart: bool) -> None:
        self._cache, self._padder, self._rows, self._device, self._apart = cache, padder, rows, device, apart

    def __call__(self, numbers: np.ndarray) -> dict[str, Any]:
        """New features each time: a module may write into them."""
        columns = len(self._cache.columns)
        texts = self._cache.texts(self._rows[numbers // columns] * columns + numbers % columns)
        features = self._padder(texts, self._device)
        if self._apart:
            role: Role = role_of(self._cache.columns[int(numbers[0]) % columns])
            features["task"] = role
            if (length := self._cache.prompt_length[role]) is not None:
                features["prompt_length"] = length
        return features

"""What the exact step reads: for each step number its plan and its texts, sliced from the token cache.

A plain DataLoader over step numbers: nothing shards it again, every rank makes the same plan, and a resume that walks
over done steps reads no row.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from launch.errors import ignore_stops, signal_at_parents_end
from trainer.batching import Plan
from trainer.known import KnownPositives
from trainer.model import Role
from trainer.sampler import DataOrder, StepNumbers
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
    """Plans by (epoch, step); pure in its arguments and its budget, so loader workers may make them ahead."""

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

    def __getitem__(self, number: tuple[int, int]) -> dict[str, Batch]:
        import time

        start = time.perf_counter()
        epoch, step = number
        rows = self._order.rows_of_step(epoch, step)
        text_ids = self._cache.text_id[rows]
        plan = self._plan(
            self._cache.token_id[rows],
            text_ids,
            self._cache.lengths(rows),
            micro_batch_tokens=self.micro_batch_tokens,
            known=self._known and self._known.of(text_ids[:, 0]),
        )
        seconds = time.perf_counter() - start
        number_of_all = epoch * self._order.steps_per_epoch + step
        return {"batch": Batch(plan, rows, number_of_all, self.micro_batch_tokens, seconds)}

    def with_this_budget(self, batch: Batch) -> Batch:
        """The batch, planned again if it was planned with a larger budget than this."""
        if batch.micro_batch_tokens <= self.micro_batch_tokens:
            return batch
        return self[divmod(batch.step, len(self))]["batch"]


def step_loader(steps: Steps, workers: int, done: int = 0) -> DataLoader[dict[str, Batch]]:
    """The Trainer's loader: batches are dicts without the key `labels`, one per step.

    The Trainer drops the first `done` steps of the first epoch that it asks for.
    """
    return DataLoader(
        steps,
        batch_sampler=StepNumbers(len(steps), done),
        collate_fn=_only,
        num_workers=workers,
        worker_init_fn=_end_with_rank,
        prefetch_factor=2 if workers else None,
    )


def _end_with_rank(_: int) -> None:
    """Have the kernel end this loader worker when its rank ends, however that does, and even where it is stopped.

    Without, as on other systems, torch ends a worker that is not stopped within 5 seconds. What asks a whole group of
    processes to stop is for the rank to answer, which still reads batches.
    """
    ignore_stops()
    signal_at_parents_end(signal.SIGKILL)


def _only(items: list[dict[str, Batch]]) -> dict[str, Batch]:
    (item,) = items
    return item


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

"""Which rows make which global batch: a pure function of (seed, epoch, step), the same for every world size.

A keyed permutation maps positions to rows in O(1) memory, so a billion rows need no index array and a resume
skips nothing. It is a balanced Feistel network (Luby and Rackoff, 1988) over the next power of four, made a
permutation of exactly `size` numbers by cycle walking (Black and Rogaway, 2002).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Four rounds make a strong pseudorandom permutation of a large domain; small halves mix less per round.
_ROUNDS = 8


def permute(positions: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """Images of `positions` under the permutation of range(size) that `key` names, int64 of the same shape.

    `size` lies in 1..2**62, every position in range(size).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
    round_keys = np.frombuffer(digest, "<u8")
    images = _feistel(positions.astype(np.uint64), np.uint64(half), round_keys)
    # The domain is less than four times as large as `size`, so a walk ends after four tries on average.
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], np.uint64(half), round_keys)
    return images.astype(np.int64)


def _feistel(numbers: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): an input bit flips half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class DataOrder:
    """The order of all rows: an epoch takes every row once, and each global batch comes from one source.

    Rows are numbered over all sources, one after the other; `sizes` holds the rows of each source. What does
    not fill a batch of its source is left out of that epoch; another epoch leaves out other rows.
    """

    seed: int
    global_batch_size: int
    sizes: tuple[int, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch; 0 if no source fills one."""
        return sum(size // self.global_batch_size for size in self.sizes)

    @property
    def rows_left_out(self) -> int:
        """Rows that an epoch leaves out, for the log."""
        return sum(size % self.global_batch_size for size in self.sizes)

    def rows_of_step(self, epoch: int, step: int) -> np.ndarray:
        """Rows of batch `step` (from 0) of `epoch` (from 0), int64 [global_batch_size]."""
        steps = self.steps_per_epoch
        assert 0 <= step < steps, f"step {step} of an epoch of {steps}"
        batch = int(permute(np.array([step]), steps, self.seed, epoch, "schedule")[0])
        source = 0
        while batch >= self.sizes[source] // self.global_batch_size:
            batch -= self.sizes[source] // self.global_batch_size
            source += 1
        positions = batch * self.global_batch_size + np.arange(self.global_batch_size)
        return sum(self.sizes[:source]) + permute(positions, self.sizes[source], self.seed, epoch, source)


class StepNumbers:
    """Batch sampler of a plain DataLoader over steps: each batch is one number, `(epoch, step)`.

    An iteration always begins at the epoch's first step: on a resume the Trainer walks over the numbers that
    are done, which reads no row.
    """

    # The Trainer reaches `set_epoch` at `dataloader.batch_sampler.batch_sampler` only.
    batch_sampler = property(lambda self: self)

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps = steps_per_epoch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration belongs to."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([(self._epoch, step)] for step in range(self._steps))

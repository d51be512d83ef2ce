"""Which rows make which global batch: a pure function of (seed, epoch, step), the same for every world size.

A keyed permutation maps positions to rows in O(1) memory, so a billion rows need no index array and a resume
skips nothing. It is a balanced Feistel network (Luby and Rackoff, 1988) over the next power of four, made a
permutation of exactly `size` numbers by cycle walking (Black and Rogaway, 2002).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

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


def share_out(steps: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Steps of each source, in proportion to `weights` (> 0) by the largest remainder; they sum to `steps`."""
    exact = [Fraction(weight) * steps / sum(map(Fraction, weights)) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: whole[i] - exact[i])  # of equal ones the first
    for i in by_remainder[: steps - sum(whole)]:
        whole[i] += 1
    return tuple(whole)


@dataclass(frozen=True)
class DataOrder:
    """The order of all rows; each global batch comes from one source.

    Rows are numbered over all sources, one after the other; `sizes` holds the rows of each source. A source is an
    endless stream of batches, pass after pass over its rows, each pass in another order; what does not fill a batch
    is left out of that pass. An epoch takes the next batches of each stream, in a shuffled order: one pass of every
    source, or as many batches as `shares` says by source. So a source's rows come once before any comes again, but
    where one epoch holds the end of a pass and the beginning of the next, their batches are mixed.
    """

    seed: int
    global_batch_size: int
    sizes: tuple[int, ...]
    shares: tuple[int, ...] | None = None

    @property
    def batches(self) -> tuple[int, ...]:
        """Global batches of an epoch by source."""
        return self.shares or tuple(size // self.global_batch_size for size in self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch; 0 if no source fills one."""
        return sum(self.batches)

    @property
    def rows_left_out(self) -> int:
        """Rows that a pass over all sources leaves out, for the log."""
        return sum(size % self.global_batch_size for size in self.sizes)

    def rows_of_step(self, epoch: int, step: int) -> np.ndarray:
        """Rows of batch `step` (from 0) of `epoch` (from 0), int64 [global_batch_size]."""
        steps = self.steps_per_epoch
        assert 0 <= step < steps, f"step {step} of an epoch of {steps}"
        batch = int(permute(np.array([step]), steps, self.seed, epoch, "schedule")[0])
        source = 0
        while batch >= self.batches[source]:
            batch -= self.batches[source]
            source += 1
        size = self.sizes[source]
        # Batch number of the source's stream -> which pass over its rows, and where in it.
        number, within = divmod(epoch * self.batches[source] + batch, size // self.global_batch_size)
        positions = within * self.global_batch_size + np.arange(self.global_batch_size)
        return sum(self.sizes[:source]) + permute(positions, size, self.seed, number, source)

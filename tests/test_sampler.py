"""The data order is a keyed permutation: `python -m pytest tests/test_sampler.py`."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from trainer.sampler import DataOrder, StepNumbers, permute


@given(st.integers(1, 5000), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_number_is_hit_once(size: int, seed: int) -> None:
    images = permute(np.arange(size), size, seed, 3)
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))


@given(st.integers(2, 2**62), st.integers(0, 2**32), st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_no_two_positions_of_a_huge_domain_meet(size: int, seed: int, first: int) -> None:
    positions = np.unique(np.concatenate([np.arange(500) + first, np.arange(500) * 997]) % size)
    images = permute(positions, size, seed)
    assert len(np.unique(images)) == len(positions)
    assert images.min() >= 0 and images.max() < size


def test_keys_give_unrelated_uniform_permutations() -> None:
    size, keys = 10, 4000
    images = np.stack([permute(np.arange(size), size, key) for key in range(keys)])
    # Each of 10 x 10 (position, image) pairs has mean keys / 10; chi-squared with 81 degrees of freedom.
    observed = np.stack([np.bincount(images[:, p], minlength=size) for p in range(size)])
    assert ((observed - keys / size) ** 2 / (keys / size)).sum() < 140  # p = 5e-5
    assert len(np.unique(images, axis=0)) > 0.999 * keys  # of 3.6 million permutations
    # Neighbours do not stay neighbours: ranks of a large permutation are uncorrelated with their positions.
    large = permute(np.arange(100_000), 100_000, 1)
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(large, permute(np.arange(100_000), 100_000, 2))[0, 1]) < 0.02


def test_an_epoch_takes_every_row_that_fills_a_batch_once_and_mixes_no_sources() -> None:
    order = DataOrder(seed=7, global_batch_size=8, sizes=(100, 5, 41))
    assert order.steps_per_epoch == 12 + 0 + 5 and order.rows_left_out == 4 + 5 + 1
    left_out = []
    schedules = []
    for epoch in range(3):
        batches = [order.rows_of_step(epoch, step) for step in range(order.steps_per_epoch)]
        assert all(batch.dtype == np.int64 and batch.shape == (8,) for batch in batches)
        rows = np.concatenate(batches)
        assert len(np.unique(rows)) == len(rows) == 17 * 8 and rows.min() >= 0 and rows.max() < 146
        source = np.searchsorted([100, 105], np.stack(batches), side="right")
        assert (source == source[:, :1]).all() and (source != 1).all()
        schedules.append(source[:, 0].tolist())
        left_out.append(set(range(100)) - set(rows))
    assert schedules[0] != schedules[1] != schedules[2]
    assert left_out[0] != left_out[1] != left_out[2]
    again = DataOrder(seed=7, global_batch_size=8, sizes=(100, 5, 41))
    assert np.array_equal(again.rows_of_step(1, 9), order.rows_of_step(1, 9))
    other = DataOrder(seed=8, global_batch_size=8, sizes=(100, 5, 41))
    assert not np.array_equal(other.rows_of_step(1, 9), order.rows_of_step(1, 9))


def test_a_billion_rows_need_no_index() -> None:
    order = DataOrder(seed=0, global_batch_size=65_536, sizes=(10**9,))
    started = time.process_time()
    rows = order.rows_of_step(5, order.steps_per_epoch - 1)
    assert time.process_time() - started < 1.0  # 0.05 s here; an index would take minutes and 8 GB
    assert len(np.unique(rows)) == 65_536 and rows.max() < 10**9
    counts = np.bincount(rows // 10**8, minlength=10)
    assert abs(counts - 6553.6).max() < 5 * 6553.6**0.5


class _Numbers(Dataset[tuple[int, int]]):
    def __getitem__(self, index: tuple[int, int]) -> dict[str, tuple[int, int]]:  # type: ignore[override]
        return {"number": index}


@pytest.mark.parametrize("skipped", [0, 2])
def test_the_trainers_loop_reaches_the_epoch_and_skips_numbers_only(skipped: int) -> None:
    from accelerate import skip_first_batches

    loader = DataLoader(_Numbers(), batch_sampler=StepNumbers(4), collate_fn=lambda batch: batch[0]["number"])  # type: ignore[arg-type]
    assert len(loader) == 4
    loader = skip_first_batches(loader, skipped) if skipped else loader
    loader.batch_sampler.batch_sampler.set_epoch(3)  # type: ignore[union-attr]  # what Trainer._run_epoch does
    assert list(loader) == [(3, step) for step in range(skipped, 4)]
    assert list(loader) == [(3, step) for step in range(skipped, 4)]

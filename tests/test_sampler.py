"""The data order is a keyed permutation: `python -m pytest tests/test_sampler.py`."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.sampler import DataOrder, permute, share_out


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


@given(st.integers(1, 10**6), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_shares_are_proportional_to_the_weights_and_sum_to_the_epoch(steps: int, weights: list[float]) -> None:
    shares = share_out(steps, weights)
    assert sum(shares) == steps
    quotas = np.array(weights) / sum(weights) * steps
    assert np.abs(shares - quotas).max() < 1 + 1e-9
    # Nobody who was rounded up had a smaller remainder than somebody who was rounded down.
    remainder, up = quotas - np.floor(quotas), shares > np.floor(quotas)
    assert not up.any() or up.all() or remainder[up].min() >= remainder[~up].max() - 1e-6


def test_shares_of_one_step() -> None:
    assert share_out(10, [1, 2, 2]) == (2, 4, 4)
    assert share_out(2, [1, 1, 1]) == (1, 1, 0), "of equal remainders the first"
    assert share_out(7, [0.1, 0.2, 0.4]) == (1, 2, 4)


@given(st.integers(0, 2**32), st.integers(1, 7), st.data())
@settings(max_examples=40, deadline=None)
def test_weighted_sources_cycle_through_their_rows_and_fill_every_epoch(seed: int, batch: int, draw) -> None:
    sizes = draw.draw(st.lists(st.integers(batch, 60), min_size=1, max_size=4))
    weights = draw.draw(st.lists(st.floats(0.2, 5), min_size=len(sizes), max_size=len(sizes)))
    steps = draw.draw(st.integers(1, 30))
    order = DataOrder(seed, batch, tuple(sizes), share_out(steps, weights))
    assert order.steps_per_epoch == steps
    first = np.cumsum([0, *sizes])
    stream: list[list[np.ndarray]] = [[] for _ in sizes]
    for epoch in range(4):
        counts = [0] * len(sizes)
        by_source: list[set[tuple[int, ...]]] = [set() for _ in sizes]
        for step in range(steps):
            rows = order.rows_of_step(epoch, step)
            assert rows.shape == (batch,) and rows.dtype == np.int64
            source = int(np.searchsorted(first, rows[0], side="right")) - 1
            assert (rows >= first[source]).all() and (rows < first[source + 1]).all(), "one source a batch"
            counts[source] += 1
            by_source[source].add(tuple(rows.tolist()))
            fresh = DataOrder(seed, batch, tuple(sizes), share_out(steps, weights))  # as a resumed run asks
            assert np.array_equal(fresh.rows_of_step(epoch, step), rows)
        assert tuple(counts) == order.shares
        # The epoch holds exactly the next batches of each stream, whatever order it took them in.
        for source, size in enumerate(sizes):
            per_pass = size // batch
            numbers = range(epoch * counts[source], (epoch + 1) * counts[source])
            alone = DataOrder(seed, batch, tuple(sizes[: source + 1]))  # an epoch of it is one pass
            expected = set()
            for number in numbers:
                positions = number % per_pass * batch + np.arange(batch)
                one = first[source] + permute(positions, size, seed, number // per_pass, source)
                expected.add(tuple(one.tolist()))
                stream[source].append(one)
            assert by_source[source] == expected
            assert alone.batches[source] == per_pass
    for source, size in enumerate(sizes):
        per_pass = size // batch
        for start in range(0, len(stream[source]), per_pass):
            one_pass = np.concatenate(stream[source][start : start + per_pass])
            assert len(np.unique(one_pass)) == len(one_pass), "no row repeats before the source is through"


def test_a_pass_over_a_weighted_source_is_one_epoch_without_weights() -> None:
    plain = DataOrder(seed=3, global_batch_size=4, sizes=(40,))
    halves = DataOrder(seed=3, global_batch_size=4, sizes=(40,), shares=(5,))
    for epoch in range(3):
        whole = {tuple(plain.rows_of_step(epoch, step)) for step in range(10)}
        parts = [{tuple(halves.rows_of_step(2 * epoch + half, step)) for step in range(5)} for half in (0, 1)]
        assert parts[0] | parts[1] == whole and not parts[0] & parts[1]


def test_weights_over_a_billion_rows_need_no_index() -> None:
    order = DataOrder(0, 65_536, (10**9, 70_000, 3 * 10**8), share_out(100_000, [3, 0.5, 1]))
    started = time.process_time()
    seen = [order.rows_of_step(10**6, step) for step in (0, 99_999)]
    assert time.process_time() - started < 2.0
    assert all(len(np.unique(rows)) == 65_536 and rows.max() < 10**9 + 70_000 + 3 * 10**8 for rows in seen)

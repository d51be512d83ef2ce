"""Batches by step of a run, made here or by workers: `python -m pytest tests/test_loader.py`."""

from functools import partial

import numpy as np
import psutil
import pytest

from tests.test_known import _cache
from trainer.batching import make_plan
from trainer.loader import Steps, batches_of
from trainer.sampler import DataOrder

TEXTS = [[f"anchor {i}", f"positive {i}", f"negative {i}"] for i in range(24)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_gets_the_batches_of_its_steps_across_epochs(workers: int) -> None:
    """The order is asked for each epoch and step by itself; a billion steps that are done cost nothing."""
    order = DataOrder(3, 8, (24,))
    steps = Steps(_cache(TEXTS), order, partial(make_plan, world_size=2), 64)
    for first in (0, 2, 3 * 10**9 + 1):
        batches = [item["batch"] for item in batches_of(steps, first, first + 5, workers)]
        assert [batch.step for batch in batches] == list(range(first, first + 5))
        for batch in batches:
            np.testing.assert_array_equal(batch.rows, order.rows_of_step(batch.step // 3, batch.step % 3))


def test_workers_end_with_the_iterator() -> None:
    steps = Steps(_cache(TEXTS), DataOrder(3, 8, (24,)), partial(make_plan, world_size=2), 64)
    before = {process.pid for process in psutil.Process().children()}
    batches = batches_of(steps, 0, 10**6, 2)
    next(batches)
    assert len({process.pid for process in psutil.Process().children()} - before) >= 2
    del batches
    left = [p for p in psutil.Process().children() if p.pid not in before and "resource_tracker" not in p.cmdline()[-1]]
    assert not psutil.wait_procs(left, timeout=5)[1]

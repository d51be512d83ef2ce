"""Sources of a run file as training rows and their order: `python -m pytest tests/test_data.py`."""

from typing import Any

import pytest

from launch.config import RunConfig
from launch.errors import UserError
from trainer.data import data_order


def _config(*sources: dict[str, Any], batch: int = 8, **sections: Any) -> RunConfig:
    data = {"sources": list(sources), **sections.pop("data", {})}
    return RunConfig.model_validate(
        {"model": {"path": "owner/name"}, "data": data, "train": {"global_batch_size": batch}, **sections}
    )


def _weighted(*weights: float, steps: int) -> RunConfig:
    sources = [{"path": f"{name}.csv", "weight": float(w)} for name, w in zip("abc", weights, strict=False)]
    return _config(*sources, data={"epoch_steps": steps})


def _facts(*rows: int) -> list[dict[str, Any]]:
    return [{"name": f"{name}.csv", "rows": count} for name, count in zip("abc", rows, strict=False)]


def test_the_order_of_a_run_follows_its_weights() -> None:
    order = data_order(_weighted(2, 1, steps=9), _facts(8, 100))
    assert order.batches == (6, 3) and order.steps_per_epoch == 9 and order.rows_left_out == 4
    plain = data_order(_config({"path": "a.csv"}, {"path": "b.csv"}, {"path": "c.csv"}), _facts(17, 7, 100))
    assert plain.batches == (2, 0, 12)


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        (
            _weighted(1, 5, steps=9),
            (100, 7),
            "data.sources: b.csv has a weight and 7 rows; allowed: at least one global batch of 8; "
            "lower train.global_batch_size or leave the source out",
        ),
        (_weighted(1, 9, steps=4), (80, 80), "data.epoch_steps: got 4, of which a.csv would get none; raise it or its"),
        (
            _config({"path": "a.csv"}, {"path": "b.csv"}),
            (7, 5),
            "data.sources: a global batch comes from one source, and none has 8 rows (a.csv 7, b.csv 5); lower train.",
        ),
    ],
)
def test_a_source_that_would_not_be_read_is_refused_by_name(config: RunConfig, rows: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        data_order(config, _facts(*rows))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)

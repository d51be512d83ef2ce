"""Sources of a run file as training rows and their order: `python -m pytest tests/test_data.py`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from data_tools.shards import ShardWriter
from launch.config import RunConfig
from launch.config_data import Source
from launch.errors import UserError
from trainer.data import data_order, open_sources, refuse_gaps


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


def test_a_capped_source_goes_on_with_its_other_rows() -> None:
    config = _config({"path": "a.csv", "epoch_rows": 20}, {"path": "b.csv", "epoch_rows": 500}, {"path": "c.csv"})
    order = data_order(config, _facts(48, 16, 100))
    assert order.batches == (2, 2, 12)  # 20 rows hold two batches of 8; a cap above its rows changes nothing
    read = [order.rows_of_step(epoch, step) for epoch in range(3) for step in range(order.steps_per_epoch)]
    rows = [int(row) for batch in read for row in batch if row < 48]
    assert sorted(rows) == list(range(48))  # three epochs of 16 rows: each once before any again


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
            _config({"path": "a.csv", "epoch_rows": 7}),
            (80,),
            "data.sources: a.csv has epoch_rows 7; allowed: at least one global batch of 8",
        ),
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


def _write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def test_sources_with_different_negatives_are_one_set_of_rows(tmp_path: Path) -> None:
    pairs = [{"anchor": f"a{i}", "positive": f"b{i}"} for i in range(3)]
    hard = [{"anchor": f"c{i}", "positive": f"d{i}", "negative_2": f"e{i}", "negative_1": f"f{i}"} for i in range(3)]
    hard[1] = {"anchor": "c1", "positive": "d1", "negative_1": "f1"}
    sources = [_write(tmp_path / "pairs.jsonl", pairs), _write(tmp_path / "hard.jsonl", hard)]
    rows, facts = open_sources(sources, tmp_path / "cache")
    assert rows.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert rows.to_list() == [{"negative_1": None, "negative_2": None, **row} for row in pairs + hard]
    assert [f["rows"] for f in facts] == [3, 3]
    with pytest.raises(UserError) as caught:
        refuse_gaps(rows, facts, rows.column_names, "TripletLoss needs all")
    assert str(caught.value) == f"{tmp_path}/pairs.jsonl: row 1 has no negative_1; TripletLoss needs all"
    alone, facts = open_sources(sources[1:], tmp_path / "cache")
    with pytest.raises(UserError, match=r"hard\.jsonl: row 2 has no negative_2; TripletLoss"):
        refuse_gaps(alone, facts, alone.column_names, "TripletLoss needs all")
    refuse_gaps(alone, facts, ["anchor", "positive", "negative_1"], "")
    full = _write(tmp_path / "full.jsonl", [hard[0], hard[2]])
    with pytest.raises(UserError, match=r"pairs\.jsonl: row 1 has no negative_1; TripletLoss"):
        both, facts = open_sources([full, sources[0]], tmp_path / "cache")
        refuse_gaps(both, facts, both.column_names, "TripletLoss needs all")


def test_shards_of_the_same_age_with_other_rows_are_read_anew_and_in_any_folder(tmp_path: Path) -> None:
    folder = tmp_path / "b[1] *?"
    columns: Any = {"anchor": "text", "positive": "text", "negative": "text"}
    for age in ("old", "new"):
        shutil.rmtree(folder, ignore_errors=True)
        with ShardWriter(folder / "in", columns, source="s", license=None, made_by="t") as writer:
            writer.write({"anchor": f"{age} q", "positive": f"{age} p", "negative": f"{age} n"})
        for file in (folder / "in").iterdir():
            os.utime(file, (1e9, 1e9))  # as rsync and tar leave it
        rows, _ = open_sources([Source(path=str(folder / "in"))], tmp_path / "cache [x]")
        assert rows.to_list() == [{"anchor": f"{age} q", "positive": f"{age} p", "negative": f"{age} n"}]
    mapped = Source(path=str(folder / "in"), columns={"anchor": "anchor", "positive": "positive"})
    rows, _ = open_sources([mapped], tmp_path / "cache")
    assert rows.column_names == ["anchor", "positive"], "what the mapping leaves out stays out"
    with pytest.raises(UserError, match=r"got :: in the path"):
        open_sources([mapped], tmp_path / "a::b")


def test_other_columns_must_agree_and_be_whole(tmp_path: Path) -> None:
    sources = [
        _write(tmp_path / "pairs.jsonl", [{"anchor": "a", "positive": "b"}]),
        _write(tmp_path / "scored.jsonl", [{"anchor": "a", "positive": "b", "negative": "n", "score": 0.5}]),
    ]
    with pytest.raises(UserError, match=r"negatives apart: .*pairs.jsonl has anchor, positive, .*, score$"):
        open_sources(sources, tmp_path / "cache")
    scores = [[{"anchor": "a", "positive": "b", "score": score}] for score in (1.0, [1.0])]
    with pytest.raises(UserError, match=r"score is a number in all sources or a list in all, got both: .*0.jsonl"):
        open_sources([_write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(scores)], tmp_path / "cache")
    # Shards of another program may hold what the reader of files refuses.
    rows = datasets.Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", None]})
    with pytest.raises(UserError, match="x: row 2 has no positive; allowed in negatives only"):
        refuse_gaps(rows, [{"name": "x", "rows": 2}], rows.column_names, "allowed in negatives only")

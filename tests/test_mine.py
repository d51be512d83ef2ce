"""`nestling data mine` against sentence-transformers and numpy: python -m pytest tests/test_mine.py"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from data_tools import look
from data_tools.shards import ShardWriter
from launch.errors import exit_code
from launch.files import list_files
from tests import tiny_models
from trainer import mine

ROOT = Path(__file__).parents[1]
WORDS = ["contract", "court", "patient", "revenue", "file", "sorted", "list", "tax", "heart", "market", "of", "the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.minilm(tmp_path_factory.mktemp("mine") / "model")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Pairs with an anchor of two positives, a positive of two anchors and a copy in capitals."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + f" {i}" for i in range(240)]
    rows = list(zip(texts[:120], texts[120:], strict=True))
    return [*rows, (rows[0][0], "second positive 1"), ("another anchor", rows[1][1]), ("one more", rows[2][1].upper())]


@pytest.fixture
def shards(tmp_path: Path, pairs: list[tuple[str, str]]) -> Path:
    columns: Any = {"anchor": "text", "positive": "text"}
    with ShardWriter(tmp_path / "shards", columns, source="test", license=None, made_by="test") as writer:
        for anchor, positive in pairs:
            writer.write({"anchor": anchor, "positive": positive})
    return tmp_path / "shards"


def command(shards: Path, model: Path, out: Path, *options: str) -> list[str]:
    words = [str(shards), "--model", str(model), "--out", str(out), "--cache-dir", str(shards.parent / "cache")]
    return [*words, *options]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(sorted(folder.glob("shard-*.parquet"))).to_pylist()


def test_same_negatives_as_sentence_transformers(shards: Path, model: Path, pairs: Any, tmp_path: Path) -> None:
    options = ["--negatives", "3", "--window", "0", "122", "--relative-margin", "0.9999", "--max-score", "0.999"]
    assert exit_code(mine.main, command(shards, model, tmp_path / "out", *options)) == 0
    theirs = mine_hard_negatives(
        Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]}),
        SentenceTransformer(str(model), device="cpu"),
        range_max=120,
        relative_margin=0.0001,
        max_score=0.999,
        num_negatives=3,
        output_format="n-tuple",
        verbose=False,
    )
    found = {(row["anchor"], row["positive"]): row for row in theirs}
    single = {anchor for anchor, _ in pairs if sum(anchor == other for other, _ in pairs) == 1}
    compared = 0
    for row in rows_of(tmp_path / "out/train"):
        other = found.get((row["anchor"], row["positive"]))
        if other and row["anchor"] in single:  # for several positives they take the least score, we the row's own
            names = ("negative_1", "negative_2", "negative_3")
            # Texts that differ in case only have one vector, in any order; they take such a copy of the positive too.
            ours, others = ([side[name] and side[name].casefold() for name in names] for side in (row, other))
            if row["positive"].casefold() not in others:
                compared += 1
                assert ours == others
    assert compared > 15
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert manifest["columns"]["negative_3"] == "text" and manifest["columns"]["negative_scores"] == "floats"


def test_known_positives_and_equal_texts_are_never_negatives(
    shards: Path, model: Path, pairs: Any, tmp_path: Path
) -> None:
    options = ["--negatives", "5", "--window", "0", "121", "--relative-margin", "0"]
    assert exit_code(mine.main, command(shards, model, tmp_path / "out", *options)) == 0
    known: dict[str, set[str]] = {}
    for anchor, positive in pairs:
        known.setdefault(anchor, set()).add(positive.casefold())
    rows = rows_of(tmp_path / "out/train")
    assert len(rows) == len(pairs)
    for row in rows:
        negatives = [row[f"negative_{n}"] for n in range(1, 6)]
        assert None not in negatives and len(set(negatives)) == 5
        assert not known[row["anchor"]] & {text.casefold() for text in negatives}
        assert row["negative_scores"] == sorted(row["negative_scores"], reverse=True)
    table = pq.read_table(tmp_path / "out/decisions.parquet").to_pylist()
    assert sum(entry["verdict"] == "chosen" for entry in table) == 5 * len(rows)
    assert {entry["verdict"] for entry in table} <= set(mine.VERDICTS)


def test_rules() -> None:
    """Every rule by itself, in a ranking of which the result is plain."""
    cosine = np.array([[0.95, 0.9, 0.8, 0.7, 0.6, 0.5]])
    plain = {"negatives": 2, "window": [0, 6], "relative_margin": 0, "absolute_margin": None, "max_score": None}

    def chosen(excluded: int | None = None, key: Any = None, **rules: Any) -> list[int]:
        known = np.zeros(cosine.shape, bool)
        if excluded is not None:
            known[0, excluded] = True
        asked = argparse.Namespace(**{**plain, **rules})
        verdicts, places = mine.judge(np.arange(6)[None], cosine, known, np.array([0.9]), key, asked)
        assert sorted(np.flatnonzero(verdicts[0] == 7)) == sorted(p for p in places[0] if p >= 0)
        return places[0].tolist()

    assert chosen() == [0, 1]
    assert chosen(excluded=0) == [1, 2]
    assert chosen(window=[1, 6]) == [1, 2]
    assert chosen(excluded=0, window=[1, 6]) == [2, 3]  # ranks are counted without known positives
    assert chosen(relative_margin=0.95) == [2, 3]  # 0.9 * 0.95 = 0.855
    assert chosen(absolute_margin=0.25) == [4, 5]
    assert chosen(max_score=0.65) == [4, 5]
    assert chosen(max_score=0.55) == [5, -1]
    assert chosen(window=[0, 1]) == [0, -1]
    assert chosen(key=np.array([[6.0, 5, 4, 3, 2, 1]])) == [5, 4]


def test_random_draw_and_consistency(shards: Path, model: Path, tmp_path: Path) -> None:
    options = ["--sampling", "random", "--relative-margin", "0", "--negatives", "2"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert exit_code(mine.main, command(shards, model, tmp_path / name, *options, "--seed", seed)) == 0
    a, b, c = ([row["negative_1"] for row in rows_of(tmp_path / name / "train")] for name in "abc")
    assert a == b != c
    assert exit_code(mine.main, command(shards, model, tmp_path / "d", "--consistent", "5")) == 0
    card = json.loads((tmp_path / "d/card.json").read_text())
    assert sum(card["dropped"].values()) == 123 - len(rows_of(tmp_path / "d/train")) > 0
    encoder = SentenceTransformer(str(model), device="cpu")
    everything = list(dict.fromkeys(row["positive"] for row in rows_of(shards)))
    for row in rows_of(tmp_path / "d/train")[1:-3]:
        scores = encoder.similarity(encoder.encode([row["anchor"]]), encoder.encode(everything))[0].numpy()
        assert (scores > scores[everything.index(row["positive"])] + 1e-5).sum() < 5


def test_spellings_of_the_known_do_not_use_the_window_up(model: Path, tmp_path: Path) -> None:
    """40 spellings of a question with a positive each, two spellings of that: others are negatives all the same."""
    question = "how long does a market of the court stay?"
    spelled = [question[:i].upper() + question[i:] for i in range(40)]
    rows = [
        (text, f"contract tax {i // 2}".upper() if i % 2 else f"contract tax {i // 2}")
        for i, text in enumerate(spelled)
    ]
    rows += [(f"heart {i}", f"list of revenue {i}") for i in range(60)]
    columns: Any = {"anchor": "text", "positive": "text"}
    with ShardWriter(tmp_path / "in", columns, source="test", license=None, made_by="test") as writer:
        for anchor, positive in rows:
            writer.write({"anchor": anchor, "positive": positive})
    options = ["--negatives", "2", "--window", "0", "3", "--relative-margin", "0"]
    assert exit_code(mine.main, command(tmp_path / "in", model, tmp_path / "out", *options)) == 0
    for row in rows_of(tmp_path / "out/train"):
        assert row["negative_2"] is not None
        if row["anchor"] in spelled:
            assert row["negative_1"].startswith("list") and row["negative_2"].startswith("list")


def test_mistakes_and_damage(shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(mine.main, command(shards, model, tmp_path / "o", "--window", "0", "2")) == 2
    assert "--window: got 0 2 for 4 negatives" in capsys.readouterr().err
    assert exit_code(mine.main, command(shards, model, shards)) == 2
    (tmp_path / "file").touch()
    for words, says in (
        (["--seed", "-1"], "--seed: got -1"),
        (["--cache-dir", str(tmp_path / "file")], "cannot be made"),
    ):
        capsys.readouterr()
        assert exit_code(mine.main, command(shards, model, tmp_path / "o", *words)) == 2
        assert says in capsys.readouterr().err
    assert exit_code(mine.main, command(shards, model, tmp_path / "file/o")) == 2
    assert exit_code(look.main, ["verify", str(shards)]) == 0
    assert exit_code(look.main, ["stats", str(shards)]) == 0
    assert exit_code(look.main, ["show", str(shards), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "whole: 123 rows in 1 shards" in out and "anchor               123" in out and "row 1\n" in out
    file = shards / "shard-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert exit_code(look.main, ["verify", str(shards)]) == 3


@pytest.mark.slow
def test_killed_and_in_two_processes_gives_the_same_bytes(shards: Path, model: Path, tmp_path: Path) -> None:
    assert exit_code(mine.main, command(shards, model, tmp_path / "one")) == 0
    clean = {name: value for name, value in os.environ.items() if "RANK" not in name}
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def start(out: Path, rank: int, cache: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "trainer.mine", *command(shards, model, out)[:-1], str(cache)]
        environment = {**clean, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return subprocess.Popen(words, cwd=ROOT, env=environment)

    for attempt in range(3, 100, 4):
        both = [start(tmp_path / "two", rank, tmp_path / "cache2") for rank in (0, 1)]
        begin = time.monotonic()
        while any(process.poll() is None for process in both) and time.monotonic() - begin < attempt:
            time.sleep(0.2)
        ended = [process.poll() for process in both]
        for process in both:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
        if ended == [0, 0]:
            break
    assert list_files(tmp_path / "two/train") == list_files(tmp_path / "one/train")

"""Batches that cannot be learnt from, in whole runs of real processes: `python -m pytest tests/test_bad_batches.py`."""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests import tiny_models
from tests.test_run import ENVIRONMENT, ROOT
from trainer import checkpoint
from trainer.sampler import DataOrder

POISON = "kidney"  # a word of the tiny tokenizer


def _processes(*words: list[str], folders: Sequence[Path] = ()) -> list[tuple[int, str, str]]:
    """Exit codes and outputs of `train.py` in one process per list of words, which find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = str(len(words))
    started = []
    for rank, arguments in enumerate(words):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        started.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *arguments],
                cwd=folders[rank] if folders else ROOT,
                env={**ENVIRONMENT, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(started, ended, strict=True)]


def _one_line(ended: list[tuple[int, str, str]]) -> str:
    """The line that a run of several processes ended with: code 2 everywhere, said once, no traceback."""
    assert [code for code, _, _ in ended] == [2] * len(ended), ended
    said = [line for _, _, err in ended for line in err.splitlines() if line.startswith("nestling: ")]
    assert len(said) == 1, said
    assert not any("Traceback" in out + err for _, out, err in ended), ended
    return said[0]


def _write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in rows))
    return path


def _plain(count: int, first: str = "the") -> list[tuple[str, str]]:
    """Different rows of words that the tiny tokenizer knows."""
    words = ["court", "held", "contract", "void", "net", "revenue", "patients", "with", "chronic", "disease"]
    return [(f"{first} {words[n // 10]} {words[n % 10]}", f"{words[n % 10]} {words[n // 10]}") for n in range(count)]


def _run_file(folder: Path, sources: list[Path], train: str = "") -> str:
    """A run of a tiny BERT with batches of 8 rows, where one word's embedding is not a number."""
    tiny_models.minilm(folder / "model")
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    (token,) = model.tokenizer(POISON, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model[0].get_submodule("model.embeddings.word_embeddings").weight[token] = torch.nan
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    path = folder / "run.yaml"
    path.write_text(
        f"""
model: {{path: {folder}/model, dropout: 0.0}}
data:
  sources: [{", ".join(f"{{path: {source}}}" for source in sources)}]
  cache_dir: {folder}/cache
train: {{run_dir: {folder}/run, global_batch_size: 8, micro_batch_tokens: 64, optim: sgd{train}}}
checkpoint: {{every: 1}}
"""
    )
    return str(path)


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_text_that_is_not_a_number_names_step_and_rows_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    order = DataOrder(42, 8, (16, 24))
    batches = [order.rows_of_step(0, step) for step in range(5)]
    step = next(number for number in range(2, 5) if batches[number].min() >= 16)  # a batch of the second source
    bad = np.sort(batches[step])[1:] - 16
    second = _plain(24, "net")
    for place, row in enumerate(bad):
        anchor, positive = second[row]
        second[row] = (f"{anchor} {POISON}", positive) if place % 2 else (anchor, f"{positive} {POISON}")
    sources = [_write(tmp_path / "one.jsonl", _plain(16)), _write(tmp_path / "two.jsonl", second)]
    run_file = _run_file(tmp_path, sources)
    line = _one_line(_processes([run_file], [run_file]))
    rows = ", ".join(f"{row + 1} of {sources[1]}" for row in bad[:5])
    assert f"step {step + 1}: non-finite loss, the embeddings of row {rows} and 2 more are not finite" in line
    assert f"{tmp_path}/run;" in line
    kept = checkpoint.find_latest(tmp_path / "run", pytest.fail)
    assert kept is not None and checkpoint.step_of(kept) == step
    assert len(_metrics(tmp_path / "run")) == step


def test_a_data_set_of_one_candidate_is_refused(tmp_path: Path) -> None:
    same = [(anchor, "Contract VOID" if n % 2 else "contract  void") for n, (anchor, _) in enumerate(_plain(16))]
    line = _one_line(_processes([_run_file(tmp_path, [_write(tmp_path / "one.jsonl", same)])]))
    assert "the positive of all 16 rows are the same text" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "evaluate.loss_batch_size: got 8, but the held-out sources have 7 rows"),
        (["loss.step=library"], "evaluate.loss_every: got 2, which only the exact step computes"),
    ],
    ids=["too few rows", "another step"],
)
def test_a_held_out_loss_that_cannot_be_had_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    run_file = _run_file(tmp_path, [_write(tmp_path / "one.jsonl", _plain(16))])
    held_out = _write(tmp_path / "held_out.jsonl", _plain(7, "net"))
    evaluate = f"evaluate={{sources: [{{path: {held_out}}}], loss_every: 2}}"
    assert message in _one_line(_processes([run_file, evaluate, *words]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_step_without_negatives_is_said_once_and_changes_nothing(tmp_path: Path) -> None:
    """Two batches of one question with its answers, which mask each other; the rows of a third can be told apart."""
    sources = [_write(tmp_path / "plain.jsonl", _plain(8))]
    for word in ("net", "void"):
        rows = [("the court held", f"{positive} {word}") for _, positive in _plain(8)]
        sources.append(_write(tmp_path / f"{word}.jsonl", rows))
    run_file = _run_file(tmp_path, sources)
    ended = _processes([run_file], [run_file])
    assert [code for code, _, _ in ended] == [0, 0], ended
    lines = _metrics(tmp_path / "run")
    idle = [line["step"] for line in lines if line["loss"] == 0 and line["grad_norm"] == 0]
    assert len(idle) == 2 and len(lines) == 3
    said = [line for _, _, err in ended for line in err.splitlines() if "negative left" in line]
    assert len(said) == 1
    assert f"step {idle[0]}: none of its 8 rows has a negative left (8 distinct candidates before masks)" in said[0]


@pytest.mark.slow
def test_three_processes_train_a_batch_of_two_rows_like_one(tmp_path: Path) -> None:
    """More ranks than rows; and texts that are cut are counted, once."""
    rows = _plain(6)
    rows[3] = (f"{rows[3][0]} " * 20, f"{rows[3][1]} " * 20)
    run_file = _run_file(tmp_path, [_write(tmp_path / "one.jsonl", rows)], ", max_steps: 3")
    curves = {}
    for size in (1, 3):
        words = [run_file, "train.global_batch_size=2", "model.max_seq_length=32", f"train.run_dir={tmp_path}/{size}"]
        ended = _processes(*[words] * size)
        assert [code for code, _, _ in ended] == [0] * size, ended
        curves[size] = [[line["loss"], line["grad_norm"]] for line in _metrics(tmp_path / str(size))]
        said = [line for _, out, _ in ended for line in out.splitlines() if "maximal length" in line]
        assert said == ["2 of 12 texts (16.7%) reach the maximal length; what is longer is cut (model.max_seq_length)"]
    assert len(curves[1]) == 3 and np.allclose(curves[1], curves[3], rtol=1e-4)


@pytest.mark.parametrize("other", ["config", "data"])
def test_ranks_with_another_config_or_other_rows_are_refused(tmp_path: Path, other: str) -> None:
    """As on two machines: one run file, each in a folder with its own copy of the data."""
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
        _write(folder / "rows.jsonl", _plain(16, "net" if other == "data" and folder.name == "there" else "the"))
    run_file = _run_file(tmp_path, [Path("rows.jsonl")])
    Path(run_file).write_text(Path(run_file).read_text().replace(f"cache_dir: {tmp_path}/", "cache_dir: "))
    changed = ["train.learning_rate=1e-3"] if other == "config" else []
    line = _one_line(_processes([run_file], [run_file, *changed], folders=folders))
    assert "rank 1: another config or other rows than rank 0" in line
    assert not (tmp_path / "run").exists()

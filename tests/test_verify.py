"""Verification of bundles: sound ones pass without torch, changed ones give lines, no traceback."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from launch.errors import CheckFailed
from launch.files import list_files, sha256_of
from tests.bundles import FACTS, tiny_bert
from trainer.export.bundle import export_bundle
from trainer.export.encoder import Encoder
from trainer.export.verify import inspect_bundle, verify

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sound(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(tiny_bert(minilm_folder), tmp_path_factory.mktemp("verify") / "bundle", FACTS)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


def reseal(bundle: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Make the hashes fit again, as a forger would, after `change` of the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.sha256").unlink()
    manifest["files"] = list_files(bundle)
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "manifest.sha256").write_text(f"{sha256_of(bundle / 'manifest.json')}  manifest.json\n")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.export.verify", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_sound_bundle_passes_in_a_process_without_torch(sound: Path):
    done = run(sound)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("ok")
    report = json.loads(run(sound, "--json").stdout)
    assert report["ok"] and report["problems"] == [] and report["dims"] == [32]
    assert report["golden_texts"] == 10 and 0 < report["golden_max_abs"] <= 1e-5
    assert report["files"] == sum(1 for p in sound.rglob("*") if p.is_file()) - 2
    sealed = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=sound, capture_output=True)
    assert sealed.returncode == 0


def test_encoder_and_verify_import_no_torch_and_no_transformers(sound: Path):
    program = (
        "import sys\nfrom trainer.export.verify import Encoder, verify\n"
        f"assert verify({str(sound)!r}) == []\nEncoder({str(sound)!r}).encode(['a'])\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'datasets', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def change_a_byte(bundle: Path, draw: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def every_changed_byte_is_reported(sound: Path, bundle: Path, rounds: int) -> None:
    draw = random.Random(rounds)
    files = sorted(p.relative_to(sound) for p in sound.rglob("*") if p.is_file())
    for number in range(rounds):
        name = files[number % len(files)]  # every file has its turn, the small ones too
        change_a_byte(bundle, draw, bundle / name)
        assert verify(bundle), f"round {number}: a changed byte in {name} went unnoticed"
        shutil.copyfile(sound / name, bundle / name)
    assert verify(bundle) == []


def test_every_changed_byte_is_reported(sound: Path, bundle: Path):
    every_changed_byte_is_reported(sound, bundle, 20)


@pytest.mark.slow
def test_every_one_of_a_thousand_changed_bytes_is_reported(sound: Path, bundle: Path):
    every_changed_byte_is_reported(sound, bundle, 1000)


def test_missing_surplus_and_shortened_files_are_reported(bundle: Path):
    (bundle / "surplus.py").write_text("print()")
    (bundle / "onnx/.hidden").write_text("")
    (bundle / "config.json").unlink()
    path = bundle / "onnx/model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    problems = "\n".join(verify(bundle))
    for wanted in ("'surplus.py': not in", "'onnx/.hidden': not in", "config.json: missing", "model.onnx: "):
        assert wanted in problems
    done = run(bundle)
    assert done.returncode == 3 and done.stderr == ""
    assert done.stdout.count("FAILED ") == 4


NAMES = [
    "../outside",
    "/etc/hostname",
    "onnx/../../outside",
    "./config.json",
    "onnx//model.onnx",
    "C:\\x",
    "a\\..\\b",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_folder_are_refused(bundle: Path, name: str):
    (bundle.parent / "outside").write_text("secret")

    def add(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"bytes": 6, "sha256": sha256_of(bundle.parent / "outside")}

    reseal(bundle, add)
    assert any("leaves the folder or is not in plain form" in problem for problem in verify(bundle))
    reseal(bundle, lambda manifest: manifest["onnx"].update(fp32=name))
    assert verify(bundle) == ["manifest.json: field 'onnx' is missing or malformed"]


@pytest.mark.parametrize("what", ["file", "folder", "manifest", "graph"])
def test_links_out_of_the_folder_are_refused(bundle: Path, what: str):
    outside = bundle.parent / "outside"
    names = {"file": "config.json", "folder": "onnx", "manifest": "manifest.json", "graph": "onnx/model.onnx"}
    (bundle / names[what]).rename(outside)
    (bundle / names[what]).symlink_to(outside)
    problems = verify(bundle)
    assert problems and all("link" in p or "not in" in p or "not a regular file" in p for p in problems)


def test_a_named_pipe_does_not_hang(bundle: Path):
    (bundle / "config.json").unlink()
    os.mkfifo(bundle / "config.json")
    assert "config.json: not a regular file" in verify(bundle)
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    assert verify(bundle) == ["manifest.json: not a regular file below 64 MiB"]


MANIFESTS = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 7}',
    b'{"format": "nestling-bundle/1"}', b'{"format": "nestling-bundle/2"}',
    b'{"format": "nestling-bundle/1", "files": []}', b'{"format": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("content", MANIFESTS, ids=range(len(MANIFESTS)))
def test_garbage_manifests_give_one_line(bundle: Path, content: bytes):
    (bundle / "manifest.json").write_bytes(content)
    assert len(verify(bundle)) == 1
    with pytest.raises(CheckFailed):
        Encoder(bundle)


FIELDS: list[tuple[str, Any]] = [
    ("width", -1), ("width", True), ("width", "32"), ("width", 31), ("dims", []), ("dims", [64]), ("dims", [0]),
    ("dims", "32"), ("prompts", {"query": ""}), ("prompts", {"query": 1, "document": ""}), ("onnx", {}),
    ("max_length", {"query": 10**30, "document": 9}), ("max_length", {"query": 1, "document": 9}),
    ("max_length", {"query": 3, "document": 3}), ("prompts", {"query": "other", "document": "other"}),
    ("tokenizer", {"pad_id": 10**9, "padding_side": "right", "truncation_side": "right"}), ("tokenizer", None),
    ("onnx", {"fp32": "tokenizer.json"}), ("files", {}), ("files", {"config.json": 3}),
]  # fmt: skip


@pytest.mark.parametrize("change", FIELDS, ids=str)
def test_forged_manifests_give_a_line(bundle: Path, change: tuple[str, Any]):
    reseal(bundle, lambda manifest: manifest.update({change[0]: change[1]}))
    problems = verify(bundle)
    assert problems
    assert all("\n" not in problem for problem in problems)


def graph(domain: str = "", location: str | None = None, kind: int = TensorProto.INT64) -> bytes:
    """A graph with the right names; its weight lies at `location` if given."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], float_data=[1.0])
    if location is not None:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["c", "axis"], ["token_embeddings"]),
        helper.make_node("Mul", ["c", "w"], ["sentence_embedding"], domain=domain),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    ids = [helper.make_tensor_value_info(n, kind, ["batch", "sequence"]) for n in ("input_ids", "attention_mask")]
    outputs = [
        helper.make_tensor_value_info("token_embeddings", TensorProto.FLOAT, ["batch", "sequence", 1]),
        helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", 32]),
    ]
    content = helper.make_graph(nodes, "g", ids, outputs, [axis, weight])
    sets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(content, opset_imports=sets, ir_version=10).SerializeToString()


def nested() -> bytes:
    """External data in a constant of a branch of a branch."""
    model = onnx.load_from_string(graph())
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    inner = helper.make_graph([helper.make_node("Constant", [], ["x"], value=tensor)], "i", [], [])
    outer = helper.make_graph([helper.make_node("If", ["b"], ["y"], then_branch=inner, else_branch=inner)], "o", [], [])
    model.graph.node.append(helper.make_node("If", ["b"], ["z"], then_branch=outer, else_branch=outer))
    return model.SerializeToString()


GRAPHS: dict[str, tuple[bytes, str]] = {
    "truncated": (graph()[:-7], "not an ONNX file|cannot load"),
    "empty": (b"", "not an ONNX file"),
    "text": (b"#!/bin/sh\necho no\n", "not an ONNX file"),
    "endless number": (b"\xff" * 64, "not an ONNX file"),
    "custom domain": (graph(domain="evil.ops"), "domain 'evil.ops' need a custom library"),
    "weights outside": (graph(location="../../secret"), "'../../secret', which is not in"),
    "weights at the root": (graph(location="/etc/hostname"), "'/etc/hostname', which is not in"),
    "weights not listed": (graph(location="weights.bin"), "'weights.bin', which is not in"),
    "weights in a branch": (nested(), "'../../secret', which is not in"),
    "float inputs": (graph(kind=TensorProto.FLOAT), r"input_ids is tensor\(float\)"),
    "wrong result": (graph(), "golden embeddings"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_hostile_graphs_give_a_line(bundle: Path, name: str):
    content, wanted = GRAPHS[name]
    (bundle / "onnx/model.onnx").write_bytes(content)
    reseal(bundle)
    problems = verify(bundle)
    assert any(re.search(wanted, problem) for problem in problems), problems
    done = run(bundle)
    assert done.returncode == 3 and "Traceback" not in done.stdout + done.stderr


def test_other_weights_are_told_by_the_golden_embeddings(bundle: Path):
    path = bundle / "onnx/model.onnx"
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("LayerNorm.weight"))
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    values[0] += 0.01
    tensor.raw_data = values.tobytes()
    onnx.save(model, path)
    reseal(bundle)
    report = inspect_bundle(bundle)
    assert any("golden embeddings: document texts at dim 32 differ by" in problem for problem in report.problems)
    assert report.golden_max_abs is not None and report.golden_max_abs > 1e-4


GOLDEN = [
    None,
    [],
    "x",
    [{}],
    [{"kind": "x", "text": "", "embedding": ""}],
    [{"kind": "query", "text": 1, "embedding": "!"}],
]


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_malformed_certificates_give_a_line(bundle: Path, golden: Any):
    (bundle / "parity.json").write_text(json.dumps({"golden": golden}))
    reseal(bundle)
    assert verify(bundle) == ["parity.json: golden embeddings are missing or malformed"]


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "x" * 100])
def test_malformed_tokenizers_give_a_line(bundle: Path, content: str):
    (bundle / "tokenizer.json").write_text(content)
    reseal(bundle)
    problems = verify(bundle)
    assert len(problems) == 1 and problems[0].startswith("tokenizer.json: cannot be read")


def test_what_is_no_folder_is_said(tmp_path: Path):
    assert "not a folder" in verify(tmp_path / "nothing")[0]
    assert verify(tmp_path) == ["manifest.json: cannot be read: No such file or directory"]
    assert run(tmp_path).returncode == 3

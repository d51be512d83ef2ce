"""Verification of bundles: sound ones pass without torch, changed ones give lines, no traceback."""

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper

from launch.errors import CheckFailed
from launch.files import list_files, sha256_of
from tests.bundles import change_somewhere
from trainer.export.encoder import Encoder
from trainer.export.verify import inspect_bundle, verify

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sound(tiny_bundle: Path) -> Path:
    return tiny_bundle


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


def one_line_each(folder: Path, some: bool = True) -> list[str]:
    """What verify has to say, each of it a line that a terminal can show."""
    problems = verify(folder)
    assert bool(problems) or not some
    assert [problem for problem in problems if not problem.isprintable() or not problem.isascii()] == []
    return problems


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.export.verify", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_sound_bundle_passes_in_a_process_without_torch(sound: Path):
    done = run(sound)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("ok")
    report = json.loads(run(sound, "--json").stdout)
    assert report["ok"] and report["problems"] == [] and report["dims"] == [32]
    assert report["golden_texts"] == 10 and 0 < report["golden_max_abs"]["fp32"] <= 1e-5
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


def test_every_one_of_200_changed_bytes_is_reported(sound: Path, bundle: Path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    draw = random.Random(seed)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    for number in range(200):
        path = files[number % len(files)]  # every file has its turn, the small ones too
        with path.open("r+b") as file:
            place = draw.randrange(path.stat().st_size)
            file.seek(place)
            (before,) = file.read(1)
            file.seek(place)
            file.write(bytes([before ^ draw.randrange(1, 256)]))
        assert verify(bundle), f"byte {place} of {path.relative_to(bundle)} changed unnoticed"
        shutil.copyfile(sound / path.relative_to(bundle), path)
    assert len(files) < 200 and verify(bundle) == []


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


class Watch:
    """Whether any process, native code included, opens or reads a file: the kernel's own word (inotify)."""

    def __init__(self, path: Path):
        self.path, libc = path, ctypes.CDLL(None)
        self.events = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self.events, os.fsencode(path), 0x1 | 0x20) > 0  # IN_ACCESS, IN_OPEN

    def touched(self) -> bool:
        try:
            return bool(os.read(self.events, 4096))
        except BlockingIOError:
            return False


@pytest.fixture
def outside(bundle: Path) -> Iterator[Path]:
    """A file beside the bundle that nothing may read, of the size and hash that a forger would state."""
    path = bundle.parent / "outside"
    path.write_bytes(b"secret")
    watch = Watch(path)
    yield path
    assert not watch.touched()
    path.read_bytes()
    assert watch.touched()
    os.close(watch.events)


NAMES = [
    "../outside", "onnx/../../outside", "/etc/hostname", "./config.json", "onnx//model.onnx", "onnx/", ".", "",
    "C:\\x", "C:x", "a\\..\\b", "\\\\host\\share", "a\0b", "a\nb", "config.json\n", "\ud800", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_leave_the_folder_are_refused(bundle: Path, outside: Path, name: str):
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    reseal(bundle, lambda manifest: manifest["files"].update({name: entry}))
    problems = one_line_each(bundle)
    if name == "x" * 5000:
        assert problems == [f"{bundle / name}: cannot be read: File name too long"]
    else:
        assert len(problems) == 1 and problems[0].startswith("manifest.json: a name in files is ")
    reseal(bundle, lambda manifest: manifest["onnx"].update(fp32=name))
    assert one_line_each(bundle)[0].startswith("manifest.json: onnx.fp32 is ")
    with pytest.raises(CheckFailed):
        Encoder(bundle)


LINKS = [
    "config.json", "manifest.json", "manifest.sha256", "parity.json", "tokenizer.json", "onnx/model.onnx", "1_Pooling",
    "onnx",
]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_the_folder_are_refused(bundle: Path, name: str):
    target = bundle.parent / "elsewhere"
    (bundle / name).rename(target)
    (bundle / name).symlink_to(target)
    watches = [Watch(path) for path in (target, *target.rglob("*")) if path.is_file()]
    assert watches and one_line_each(bundle)
    assert not any(watch.touched() for watch in watches)


@pytest.mark.parametrize("name", [name for name in LINKS if "." in name])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "terabyte"])
def test_what_is_no_plain_file_neither_hangs_nor_is_read(bundle: Path, name: str, kind: str):
    path = bundle / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    started = time.monotonic()
    assert any(problem.startswith(f"{name}: ") for problem in one_line_each(bundle))
    assert time.monotonic() - started < 10


MANIFESTS = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 7}',
    b'{"format": "nestling-bundle/1"}', b'{"format": "nestling-bundle/2"}',
    b'{"format": "nestling-bundle/1", "files": []}', b'{"format": NaN}', b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"width": ' + b"9" * 5000 + b"}", b'{"format": "nestling-bundle/1", "format": "nestling-bundle/1"}',
]  # fmt: skip


@pytest.mark.parametrize("content", MANIFESTS, ids=range(len(MANIFESTS)))
def test_garbage_manifests_give_one_line(bundle: Path, content: bytes):
    (bundle / "manifest.json").write_bytes(content)
    assert len(one_line_each(bundle)) == 1
    with pytest.raises(CheckFailed):
        Encoder(bundle)


def test_a_key_that_stands_twice_is_refused(bundle: Path):
    text = (bundle / "manifest.json").read_text()
    assert text.count('"width": 32') == 1
    (bundle / "manifest.json").write_text(text.replace('"width": 32', '"width": 64, "width": 32'))
    assert one_line_each(bundle) == ["manifest.json: not JSON: a key stands twice"]


FIELDS: list[tuple[str, Any]] = [
    ("model_fingerprint", "ab"), ("model_fingerprint", "G" * 64), ("model_fingerprint", 7),
    ("width", -1), ("width", True), ("width", "32"), ("width", 32.0), ("width", 31), ("width", 10**12), ("dims", []),
    ("dims", [64]), ("dims", [0]), ("dims", "32"), ("dims", [32] * 10**6), ("dims", [[32]]), ("dims", {"32": 32}),
    ("prompts", {"query": ""}), ("prompts", {"query": 1, "document": ""}), ("prompts", []), ("onnx", {}),
    ("prompts", {"query": "\ud800", "document": "\0"}), ("prompts", {"query": "x" * 10**5, "document": "other"}),
    ("max_length", {"query": 10**30, "document": 9}), ("max_length", {"query": 1, "document": 9}),
    ("max_length", {"query": 3, "document": 3}), ("prompts", {"query": "other", "document": "other"}),
    ("tokenizer", {"pad_id": 10**9, "padding_side": "right", "truncation_side": "right"}), ("tokenizer", None),
    ("tokenizer", {"pad_id": 0, "padding_side": [], "truncation_side": {}}), ("versions", {"\n": []}),
    ("onnx", {"fp32": "tokenizer.json"}), ("onnx", {"int8": "onnx/model.onnx"}), ("onnx", {"fp32": "absent.onnx"}),
    ("files", {}), ("files", {"config.json": 3}), ("files", {"config.json": {"bytes": -1, "sha256": ""}}),
    ("base_model", "x"), ("data", [{"name": "x"}]), ("base_model", {"name": "", "revision": "", "license": "\x1b"}),
]  # fmt: skip


@pytest.mark.parametrize("change", FIELDS, ids=lambda change: f"{change[0]} {change[1]!a:.40}")
def test_forged_manifests_give_a_line(bundle: Path, change: tuple[str, Any]):
    reseal(bundle, lambda manifest: manifest.update({change[0]: change[1]}))
    assert one_line_each(bundle)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_the_manifest_gives_lines(bundle: Path, sound: Path, data: st.DataObject):
    """Whatever stands in a place of the manifest, nothing is raised, and each problem is a line."""
    manifest = json.loads((sound / "manifest.json").read_text())
    change_somewhere(manifest, data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "manifest.sha256").write_text(f"{sha256_of(bundle / 'manifest.json')}  manifest.json\n")
    one_line_each(bundle, some=False)


def graph(
    domain: str = "",
    kind: int = TensorProto.INT64,
    shape: Sequence[Any] = ("batch", 32),
    result: int = TensorProto.FLOAT,
    further: Sequence[onnx.ValueInfoProto] = (),
    **external: str,
) -> onnx.ModelProto:
    """A graph with the right names and a weight, which lies in another file if `external` says where."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0] * 4)
    if external:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["c", "axis"], ["token_embeddings"]),
        helper.make_node("ReduceSum", ["w"], ["one"], keepdims=0),
        helper.make_node("Mul", ["c", "one"], ["product"], domain=domain),
        helper.make_node("Cast", ["product"], ["sentence_embedding"], to=result),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    ids = [helper.make_tensor_value_info(n, kind, ["batch", "sequence"]) for n in ("input_ids", "attention_mask")]
    outputs = [
        helper.make_tensor_value_info("token_embeddings", TensorProto.FLOAT, ["batch", "sequence", 1]),
        helper.make_tensor_value_info("sentence_embedding", result, shape),
    ]
    content = helper.make_graph(nodes, "g", [*ids, *further], outputs, [axis, weight])
    sets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(content, opset_imports=sets, ir_version=10)


def nested() -> onnx.ModelProto:
    """External data in a constant of a branch of a branch."""
    model = graph()
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../outside")
    inner = helper.make_graph([helper.make_node("Constant", [], ["x"], value=tensor)], "i", [], [])
    outer = helper.make_graph([helper.make_node("If", ["b"], ["y"], then_branch=inner, else_branch=inner)], "o", [], [])
    model.graph.node.append(helper.make_node("If", ["b"], ["z"], then_branch=outer, else_branch=outer))
    return model


def with_function() -> onnx.ModelProto:
    """A custom domain whose operator is a function of the model; what is in it takes another domain."""
    model = graph(domain="own")
    body = [helper.make_node("Mul", ["a", "b"], ["c"], domain="evil.ops")]
    sets = [helper.make_opsetid("", 18), helper.make_opsetid("evil.ops", 1)]
    model.functions.append(helper.make_function("own", "Mul", ["a", "b"], ["c"], body, sets))
    return model


def sequence() -> onnx.ModelProto:
    model = graph()
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.INT64, ["batch"]))
    model.graph.input[1].CopyFrom(helper.make_value_info("attention_mask", kind))
    return model


def without_shapes() -> onnx.ModelProto:
    model = graph()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    return model


def of_rank_3() -> onnx.ModelProto:
    model = graph(shape=["batch", "sequence", 32])
    model.graph.initializer.append(helper.make_tensor("sizes", TensorProto.INT64, [3], [1, 1, 32]))
    model.graph.node[-1].CopyFrom(helper.make_node("Expand", ["token_embeddings", "sizes"], ["sentence_embedding"]))
    return model


def endless() -> onnx.ModelProto:
    """A loop of 2^62 turns before the result."""
    model = graph()
    flag = helper.make_tensor_value_info("going", TensorProto.BOOL, [])
    inside = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["going"]), helper.make_node("Add", ["x", "one"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [flag, helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(helper.make_tensor("turns", TensorProto.INT64, [], [1 << 62]))
    model.graph.node.insert(4, helper.make_node("Loop", ["turns", "", "product"], ["looped"], body=inside))
    model.graph.node[5].input[0] = "looped"
    return model


def enormous() -> onnx.ModelProto:
    """A weight of 2^62 numbers of which none is there."""
    model = graph()
    model.graph.initializer[1].ClearField("float_data")
    model.graph.initializer[1].dims[:] = [1 << 62]
    return model


OTHER = helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"])
GRAPHS: dict[str, tuple[onnx.ModelProto | bytes, str]] = {
    "truncated": (graph().SerializeToString()[:-7], "not an ONNX file|cannot load"),
    "empty": (b"", "not an ONNX file"),
    "text": (b"#!/bin/sh\necho no\n", "not an ONNX file"),
    "endless number": (b"\xff" * 64, "not an ONNX file"),
    "names of no text": (
        graph().SerializeToString().replace(b"attention_mask", b"attention_\xb6\x80sk"),
        "cannot load",
    ),
    "deep": (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * 9, "not an ONNX file"),
    "custom domain": (graph(domain="evil.ops"), "domain 'evil.ops' need a custom library"),
    "custom domain in a function": (with_function(), "domain 'evil.ops' need a custom library"),
    "weights outside": (graph(location="../../outside"), "'../../outside', which is not in"),
    "weights at the root": (graph(location="/etc/hostname"), "'/etc/hostname', which is not in"),
    "weights not listed": (graph(location="weights.bin"), "'weights.bin', which is not in"),
    "weights by a detour": (graph(location="../onnx/model.onnx"), "'../onnx/model.onnx', which is not in"),
    "weights nowhere": (graph(location=""), "'', which is not in"),
    "weights in a branch": (nested(), "'../../outside', which is not in"),
    "weights beyond the end": (graph(location="data", offset="4"), "cannot load"),
    "weights far beyond the end": (graph(location="data", offset=str(1 << 62)), "cannot load"),
    "weights before the start": (graph(location="data", offset="-4"), "cannot load"),
    "more weights than there are": (graph(location="data", length=str(1 << 40)), "cannot load"),
    "weights by no number": (graph(location="data", offset="here"), "cannot load"),
    "enormous weight": (enormous(), "cannot load"),
    "float inputs": (graph(kind=TensorProto.FLOAT), r"input_ids is tensor\(float\)"),
    "sequence as input": (sequence(), r"attention_mask is seq\(tensor\(int64\)\)"),
    "another input": (graph(further=[OTHER]), "inputs and outputs are .*position_ids.*, allowed"),
    "half output": (graph(result=TensorProto.FLOAT16), r"sentence_embedding is tensor\(float16\)"),
    "output of another rank": (
        of_rank_3(),
        r"sentence_embedding is .*'sequence', 32\], allowed: .* of rank 2",
    ),
    "another width": (graph(shape=["batch", 31]), r"sentence_embedding is \['batch', 31\], allowed: \[batch, 32\]"),
    "no shapes": (without_shapes(), "input_ids is tensor"),
    "wrong result": (graph(), "golden embeddings"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_hostile_graphs_give_a_line(bundle: Path, outside: Path, name: str):
    content, wanted = GRAPHS[name]
    (bundle / "onnx/data").write_bytes(bytes(16))
    (bundle / "onnx/model.onnx").write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    reseal(bundle)
    problems = one_line_each(bundle)
    assert any(re.search(wanted, problem) for problem in problems), problems


def test_weights_through_a_link_are_refused(bundle: Path, outside: Path):
    (bundle / "onnx/model.onnx").write_bytes(graph(location="data").SerializeToString())
    (bundle / "onnx/data").write_bytes(b"secret")
    reseal(bundle)
    (bundle / "onnx/data").unlink()
    (bundle / "onnx/data").symlink_to(outside)
    assert one_line_each(bundle) == ["onnx/data: leaves the folder through a link"]


def test_the_command_ends_with_3_and_lines_for_what_is_hostile(bundle: Path):
    (bundle / "onnx/model.onnx").write_bytes(graph(domain="evil.ops").SerializeToString())
    reseal(bundle)
    done = run(bundle)
    assert done.returncode == 3 and done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["FAILED"]
    assert json.loads(run(bundle, "--json").stdout)["problems"][0].startswith("onnx/model.onnx: operators")


@pytest.mark.parametrize("kind", ["graph", "file"])
def test_what_has_no_end_fails_after_the_given_seconds(bundle: Path, kind: str):
    if kind == "graph":
        (bundle / "onnx/model.onnx").write_bytes(endless().SerializeToString())
        reseal(bundle)
    else:
        listed = {"config.json": {"bytes": 1 << 42, "sha256": "0" * 64}}
        reseal(bundle, lambda manifest: manifest["files"].update(listed))
        os.truncate(bundle / "config.json", 1 << 42)
    done = run(bundle, "--seconds", "1.5", "--json")
    assert done.returncode == 3 and done.stderr == ""
    assert json.loads(done.stdout)["problems"][0].startswith("not done after 1.5 s")


def test_weights_that_are_no_numbers_are_told_by_the_golden_embeddings(bundle: Path):
    path = bundle / "onnx/model.onnx"
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("LayerNorm.weight"))
    tensor.raw_data = np.full(32, np.nan, np.float32).tobytes()
    onnx.save(model, path)
    reseal(bundle)
    assert all("differ by nan" in problem for problem in one_line_each(bundle))


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
    assert any("golden embeddings: fp32, document texts at dim 32 differ by" in problem for problem in report.problems)
    assert report.golden_max_abs["fp32"] > 1e-4


GOLDEN = [
    None,
    [],
    "x",
    [{}],
    [{"kind": "x", "text": "", "embedding": ""}],
    [{"kind": "query", "text": 1, "embedding": "!"}],
    [{"kind": [], "text": "", "embedding": ""}],
    [{"kind": "query", "text": "", "embedding": "\u00e9"}],
    [{"kind": "query", "text": "", "embedding": "AAAA" * 10**6}],
]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden!a:.40}")
def test_malformed_certificates_give_a_line(bundle: Path, golden: Any):
    (bundle / "parity.json").write_text(json.dumps({"golden": golden}))
    reseal(bundle)
    assert verify(bundle) == ["parity.json: golden embeddings are missing or malformed"]


PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fw=="},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    },
}


@pytest.mark.parametrize("part", PANICS)
def test_tokenizers_that_make_their_library_panic_give_a_line(bundle: Path, part: str):
    settings = json.loads((bundle / "tokenizer.json").read_text()) | {part: PANICS[part]}
    (bundle / "tokenizer.json").write_text(json.dumps(settings))
    reseal(bundle)
    done = run(bundle)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert re.match("FAILED +(tokenizer.json: cannot be read|golden embeddings: fp32 cannot be computed)", done.stdout)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "x" * 100, "[" * 10**5, '{"added_tokens": "\\ud800"}'])
def test_malformed_tokenizers_give_a_line(bundle: Path, content: str):
    (bundle / "tokenizer.json").write_text(content)
    reseal(bundle)
    problems = one_line_each(bundle)
    assert len(problems) == 1 and problems[0].startswith("tokenizer.json: cannot be read")


def test_golden_texts_that_no_tokenizer_takes_give_a_line(bundle: Path):
    certificate = json.loads((bundle / "parity.json").read_text())
    certificate["golden"][0]["text"] = "\ud800"
    (bundle / "parity.json").write_text(json.dumps(certificate))
    reseal(bundle)
    assert one_line_each(bundle)[0].startswith("golden embeddings: ")


def test_of_files_outside_the_manifest_only_a_signature_is_allowed(bundle: Path):
    (bundle / "model.sig").write_text("{}")
    assert verify(bundle) == []
    (bundle / "onnx/model.sig").write_text("{}")
    assert one_line_each(bundle) == ["'onnx/model.sig': not in manifest.json"]


def test_what_is_no_folder_is_said(tmp_path: Path):
    assert "not a folder" in verify(tmp_path / "nothing")[0]
    assert verify(tmp_path) == ["manifest.json: cannot be read: No such file or directory"]
    assert run(tmp_path).returncode == 3

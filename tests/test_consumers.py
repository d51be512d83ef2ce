"""The consumers of a bundle: the snippets of docs/consumers.md run as they stand there, in fresh processes.

Their vectors are compared with those of sentence-transformers and the model that was exported. Those that install
packages are slow.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from sentence_transformers import SentenceTransformer
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from launch.errors import CheckFailed, UserError, exit_code
from tests.bundles import FACTS
from tests.conftest import Silent, serving
from tests.test_verify import reseal
from tests.tiny_models import BUILDERS
from trainer.export.bundle import ONNX_FILES, export_bundle
from trainer.export.cli import main
from trainer.export.encoder import Encoder
from trainer.export.precisions import write_fp16
from trainer.export.quantise import RECIPES, activation_ranges, write_int8
from trainer.export.triton import write_triton

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/consumers.md").read_text(encoding="utf-8")
QUERIES = ["how do I sort a list?", "naïve café, 東京 and москва 🚀", "who may end the contract " * 12]
DOCUMENTS = ["", "The list is sorted, smallest first.", "Both parties may end it within 30 days. " * 20, "Größe"]
ARRAYS = ("query_vectors", "document_vectors", "short_vectors")  # what the Python snippets compute
# Precision -> most that a component may differ, least cosine.
BOUNDS = {"fp32": (1e-5, 0.999999), "fp16": (3e-3, 0.9999), "int8": (0.1, 0.99)}
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # what Transformers.js calls them


def snippet(section: str, language: str) -> str:
    """The one block of `language` below the heading `section`."""
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    return block


def filled(code: str, **values: Any) -> str:
    """`code` with other values for the page's own; each stands there once, written as JSON."""
    own = {
        "bundle": "runs/demo/bundle",
        "precision": "fp32",
        "dim": 256,
        "server": "http://localhost:8000",
        "model": "faq_fp32",
        "queries": ["How do I renew a permit?"],
        "documents": ["Permits are renewed at the town hall.", "Closed on Mondays."],
    }
    for name, value in values.items():
        before, after = json.dumps(own[name]), json.dumps(value, ensure_ascii=False)
        assert code.count(before) == 1, f"{before} stands {code.count(before)} times in the snippet"
        code = code.replace(before, after)
    return code


def run_python(code: str, folder: Path, python: str = sys.executable, path: str | None = None) -> dict[str, Any]:
    """The three arrays that a Python snippet computes, by a process of its own that stands in `folder`."""
    code += f"\nimport json as j, numpy as n\nprint(j.dumps([n.asarray(a).tolist() for a in ({', '.join(ARRAYS)})]))\n"
    (folder / "snippet.py").write_text(code, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": path} if path else {}
    command = [python, "-P", "snippet.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(ARRAYS, json.loads(done.stdout.splitlines()[-1]), strict=True))


def check(vectors: dict[str, Any], model: SentenceTransformer, folder: Path, precision: str, **texts: Any) -> None:
    """Compare a consumer's vectors with those of `model`, which never was a bundle."""
    manifest = json.loads((folder / "manifest.json").read_text())
    texts = {"queries": QUERIES, "documents": DOCUMENTS, **texts}
    expected = []
    for kind, rows in (("query", texts["queries"]), ("document", texts["documents"])):
        model.max_seq_length = manifest["max_length"][kind]
        expected.append(model.encode(rows, prompt=manifest["prompts"][kind], normalize_embeddings=True))
    expected.append(expected[1][:, : manifest["dims"][-1]])
    expected[2] = expected[2] / np.linalg.norm(expected[2], axis=1, keepdims=True)
    most, least = BOUNDS[precision]
    for name, reference in zip(ARRAYS, expected, strict=True):
        found = np.array(vectors[name])
        assert found.shape == reference.shape, name
        lengths = np.linalg.norm(found, axis=1)
        assert np.abs(found - reference).max() <= most, name
        assert ((found * reference).sum(axis=1) / lengths).min() >= least, name
        assert np.abs(lengths - 1).max() < 2e-3, name
        assert precision == "fp32" or np.abs(found - reference).max() > 1e-5, "this is the fp32 file"


def with_all_precisions(bundle: Path, recipe: str) -> Path:
    """Add fp16 and int8 as exports write them to a bundle that has fp32 only; no queries choose the recipe."""
    source, encoder = bundle / ONNX_FILES["fp32"], Encoder(bundle)
    write_fp16(source, bundle / ONNX_FILES["fp16"])
    ranges = activation_ranges(source, encoder.tokenize(DOCUMENTS), encoder)
    write_int8(source, bundle / ONNX_FILES["int8"], ranges, **RECIPES[recipe])
    reseal(bundle, lambda manifest: manifest.update(onnx=ONNX_FILES))
    return bundle


@pytest.fixture(scope="module")
def tiny(
    prompted_bundle: tuple[SentenceTransformer, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentenceTransformer, Path]:
    """The tiny model and a bundle of it in every precision."""
    model, folder = prompted_bundle
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("consumers") / "bundle"))
    return model, with_all_precisions(copy, "row")


@pytest.fixture(scope="module")
def real(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceTransformer, Path]:
    """all-MiniLM and a bundle of it in every precision, exported in one go."""
    model = SentenceTransformer(str(minilm_folder), device="cpu")
    facts = dataclasses.replace(
        FACTS,
        prompts={"query": "query: ", "document": ""},
        max_length={"query": 64, "document": 128},
        dims=[384, 128],
    )
    folder = export_bundle(model, tmp_path_factory.mktemp("real") / "bundle", facts)
    return model, with_all_precisions(folder, "row")  # an export would take the recipe that is fastest here today


def run_onnxruntime(folder: Path, tmp_path: Path, precision: str, **values: Any) -> dict[str, Any]:
    code = filled(snippet("onnxruntime", "python"), bundle=str(folder), precision=precision, **values)
    absent = "import sys\nfor name in ('torch', 'transformers', 'launch', 'trainer'): sys.modules[name] = None\n"
    return run_python(absent + code, tmp_path)


def run_encoder(folder: Path, tmp_path: Path, precision: str, **values: Any) -> dict[str, Any]:
    code = filled(snippet("nestling's Encoder", "python"), bundle=str(folder), precision=precision, **values)
    return run_python(code, tmp_path, path=str(ROOT))


def run_sentence_transformers(folder: Path, tmp_path: Path, precision: str, **values: Any) -> dict[str, Any]:
    assert precision == "fp32"
    return run_python(filled(snippet("sentence-transformers", "python"), bundle=str(folder), **values), tmp_path)


@pytest.mark.parametrize("run", [run_onnxruntime, run_encoder])
@pytest.mark.parametrize("precision", BOUNDS)
def test_python_without_torch(
    tiny: tuple[SentenceTransformer, Path], tmp_path: Path, run: Callable[..., dict[str, Any]], precision: str
) -> None:
    model, folder = tiny
    vectors = run(folder, tmp_path, precision, dim=16, queries=QUERIES, documents=DOCUMENTS)
    check(vectors, model, folder, precision)


@pytest.mark.slow
def test_sentence_transformers(tiny: tuple[SentenceTransformer, Path], tmp_path: Path) -> None:
    model, folder = tiny
    vectors = run_sentence_transformers(folder, tmp_path, "fp32", dim=16, queries=QUERIES, documents=DOCUMENTS)
    check(vectors, model, folder, "fp32")


@pytest.mark.slow
def test_the_real_model_in_python(real: tuple[SentenceTransformer, Path], tmp_path: Path) -> None:
    model, folder = real
    for precision in BOUNDS:
        for run in (run_onnxruntime, run_encoder, run_sentence_transformers):
            if precision == "fp32" or run is not run_sentence_transformers:
                vectors = run(folder, tmp_path, precision, dim=128, queries=QUERIES, documents=DOCUMENTS)
                check(vectors, model, folder, precision)


@pytest.fixture(scope="module")
def fastembed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that was made as the page says."""
    folder = tmp_path_factory.mktemp("fastembed")
    theirs = ("huggingface_hub", "hf-xet", "httpx2", "httpcore2")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(theirs)]
    (folder / "constraints.txt").write_text("\n".join(pins))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PIP_CONSTRAINT"] = str(folder / "constraints.txt")
    command = ["bash", "-e", "-c", snippet("fastembed", "sh")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(folder / "fastembed/bin/python")


@pytest.mark.slow
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("size", ["tiny", "real"])
def test_fastembed(size: str, precision: str, fastembed: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model, folder = request.getfixturevalue(size)
    # It cuts at the larger of the two maximal lengths, as the page says: the long query stays out.
    values = {"precision": precision, "queries": QUERIES[:2], "documents": DOCUMENTS}
    dim = 16 if size == "tiny" else 128
    code = filled(snippet("fastembed", "python"), bundle=str(folder), dim=dim, **values)
    check(run_python(code, tmp_path, fastembed), model, folder, precision, queries=QUERIES[:2])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where Transformers.js is installed as the page says."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed here")
    folder = tmp_path_factory.mktemp("node")
    done = subprocess.run(["bash", "-c", snippet("Transformers.js", "sh")], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run_node(folder: Path, node: Path, precision: str, **texts: Any) -> dict[str, Any]:
    code = filled(snippet("Transformers.js", "js"), bundle=str(folder), precision=DTYPES[precision], **texts)
    code += "\nconsole.log(JSON.stringify([queryVectors, documentVectors, shortVectors]));"
    (node / "snippet.mjs").write_text(code, encoding="utf-8")
    done = subprocess.run(["node", "snippet.mjs"], cwd=node, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(ARRAYS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("size", ["tiny", "real"])
def test_transformers_js(size: str, precision: str, node: Path, request: pytest.FixtureRequest) -> None:
    model, folder = request.getfixturevalue(size)
    dim = 16 if size == "tiny" else 128
    vectors = run_node(folder, node, precision, dim=dim, queries=QUERIES, documents=DOCUMENTS)
    check(vectors, model, folder, precision)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "row"])
def test_int8_of_every_recipe(
    recipe: str, tiny: tuple[SentenceTransformer, Path], fastembed: str, node: Path, tmp_path: Path
) -> None:
    """Which one an export writes depends on its model and machine."""
    model, folder = tiny[0], with_all_precisions(Path(shutil.copytree(tiny[1], tmp_path / "bundle")), recipe)
    texts = {"dim": 16, "queries": QUERIES[:2], "documents": DOCUMENTS}
    check(run_node(folder, node, "int8", **texts), model, folder, "int8", queries=QUERIES[:2])
    code = filled(snippet("fastembed", "python"), bundle=str(folder), precision="int8", **texts)
    check(run_python(code, tmp_path, fastembed), model, folder, "int8", queries=QUERIES[:2])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "minilm"])
def test_every_architecture(name: str, fastembed: str, node: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(BUILDERS[name](tmp_path / "model")), device="cpu")
    prompts = {kind: model.prompts.get(kind) or f"{kind}: " for kind in ("query", "document")}
    facts = dataclasses.replace(FACTS, prompts=prompts, dims=[32, 16])
    folder = export_bundle(model, tmp_path / "bundle", facts)
    texts = {"dim": 16, "queries": QUERIES, "documents": DOCUMENTS}
    check(run_onnxruntime(folder, tmp_path, "fp32", **texts), model, folder, "fp32")
    check(run_node(folder, node, "fp32", **texts), model, folder, "fp32")
    code = filled(snippet("fastembed", "python"), bundle=str(folder), **texts)
    check(run_python(code, tmp_path, fastembed), model, folder, "fp32")


def parsed(folder: Path) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def served(folder: Path) -> onnxruntime.InferenceSession:
    """What Triton's onnxruntime backend loads of a model: 1/model.onnx, or model.onnx in a folder of that name."""
    path = folder / "1/model.onnx"
    return onnxruntime.InferenceSession(path / "model.onnx" if path.is_dir() else path)


@pytest.fixture(scope="module")
def repository(tiny: tuple[SentenceTransformer, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "faq"
    line = snippet("Triton", "sh").splitlines()[0].replace("runs/demo/bundle", str(tiny[1])).replace(" faq", f" {out}")
    nestling, export, *words = line.split()
    assert (nestling, export, exit_code(main, words)) == ("nestling", "export", 0)
    return out


TRITON = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}


@pytest.mark.parametrize("precision", BOUNDS)
def test_triton_s_config_is_that_of_the_graph(
    repository: Path, tiny: tuple[SentenceTransformer, Path], precision: str
) -> None:
    folder = repository / f"faq_{precision}"
    config, session = parsed(folder), served(folder)
    assert (config.name, config.backend) == (folder.name, "onnxruntime")
    graph = {item.name: item for item in (*session.get_inputs(), *session.get_outputs())}
    assert [tensor.name for tensor in config.output] == ["sentence_embedding"]
    assert {tensor.name for tensor in config.input} == {item.name for item in session.get_inputs()}
    for tensor in (*config.input, *config.output):
        batch, *axes = graph[tensor.name].shape
        assert isinstance(batch, str), "Triton batches along a first axis of any size"
        assert list(tensor.dims) == [-1 if isinstance(axis, str) else axis for axis in axes]
        assert DataType.Name(tensor.data_type) == TRITON[graph[tensor.name].type]
    assert config.max_batch_size == 64 and config.HasField("dynamic_batching")
    manifest = json.loads((tiny[1] / "manifest.json").read_text())
    assert config.parameters["model_fingerprint"].string_value == manifest["model_fingerprint"]
    assert sorted(path.name for path in repository.iterdir()) == ["faq_fp16", "faq_fp32", "faq_int8"]
    assert [path.name for path in (folder / "1").iterdir()] == ["model.onnx"]


@contextmanager
def stand_in(repository: Path) -> Iterator[str]:
    """A server that answers inference requests in JSON as Triton does, and refuses what config.pbtxt forbids."""

    def infer(name: str, request: Any) -> Any:
        config, session = parsed(repository / name), served(repository / name)
        wanted, given = ({tensor.name: tensor for tensor in config.input}, {t["name"]: t for t in request["inputs"]})
        assert wanted.keys() == given.keys(), f"inputs are {given.keys()}"
        feed = {}
        for key, tensor in given.items():
            rows, *axes = tensor["shape"]
            dims = wanted[key].dims
            assert 1 <= rows <= config.max_batch_size, f"batch of {rows}"
            assert len(axes) == len(dims) and all(d in (-1, axis) for d, axis in zip(dims, axes, strict=True)), axes
            assert "TYPE_" + tensor["datatype"] == DataType.Name(wanted[key].data_type)
            feed[key] = np.array(tensor["data"], np.int64).reshape(tensor["shape"])
        names = [tensor.name for tensor in config.output]
        results: list[Any] = session.run(names, feed)
        return {
            "outputs": [
                {"name": n, "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
                for n, array in zip(names, results, strict=True)
            ]
        }

    class Handler(Silent):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            try:
                version, models, name, verb = self.path.strip("/").split("/")
                assert (version, models, verb) == ("v2", "models", "infer"), self.path
                status, answer = 200, infer(name, body)
            except AssertionError as error:
                status, answer = 400, {"error": str(error)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    with serving(Handler) as address:
        yield address


@pytest.mark.parametrize("precision", BOUNDS)
def test_triton_s_client(
    repository: Path, tiny: tuple[SentenceTransformer, Path], tmp_path: Path, precision: str
) -> None:
    model, folder = tiny
    with stand_in(repository) as server:
        values = {"server": server, "model": f"faq_{precision}", "queries": QUERIES, "documents": DOCUMENTS}
        vectors = run_python(filled(snippet("Triton", "python"), bundle=str(folder), dim=16, **values), tmp_path)
    check(vectors, model, folder, precision)


def test_triton_may_join_requests_of_one_length(repository: Path) -> None:
    session = served(repository / "faq_fp32")
    draw = np.random.default_rng(0)
    requests = [
        {item.name: draw.integers(0, 2, (rows, 16)) for item in session.get_inputs()} | {"attention_mask": mask}
        for rows, mask in ((1, np.ones((1, 16), np.int64)), (3, np.tril(np.ones((3, 16), np.int64), 5)))
    ]
    joined = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
    apart = [session.run(["sentence_embedding"], request)[0] for request in requests]
    (together,) = session.run(["sentence_embedding"], joined)
    assert np.abs(np.concatenate(apart) - together).max() < 1e-6


def test_weights_beside_the_graph_are_a_folder_for_triton(
    tiny: tuple[SentenceTransformer, Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny[1], tmp_path / "bundle"))
    for name in ("model", "model_fp16"):
        model = onnx.load(bundle / f"onnx/{name}.onnx")
        (bundle / f"onnx/{name}.onnx").unlink()
        onnx.save(model, bundle / f"onnx/{name}.onnx", save_as_external_data=True, location=f"{name}.onnx_data")
    reseal(bundle)
    write_triton(bundle, tmp_path / "out")
    for precision, data in (("fp32", "model.onnx_data"), ("fp16", "model_fp16.onnx_data")):
        folder = tmp_path / f"out/out_{precision}/1/model.onnx"
        assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", data]
    feed = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    (found,) = served(tmp_path / "out/out_fp32").run(["sentence_embedding"], feed)
    (expected,) = onnxruntime.InferenceSession(tiny[1] / "onnx/model.onnx").run(["sentence_embedding"], feed)
    assert np.array_equal(found, expected)
    assert (tmp_path / "out/out_int8/1/model.onnx").is_file()


def test_what_cannot_be_laid_out_for_triton_is_said(
    tiny: tuple[SentenceTransformer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        assert exit_code(main, [*words, "--layout", "triton"]) == 2
        return capsys.readouterr().err

    assert "no bundle, which `nestling export` makes without --layout; allowed: nestling" in told(str(tmp_path))
    assert "--out: missing; allowed: nestling export BUNDLE --layout triton --out DIR" in told(str(tiny[1]))
    run = tiny[1].parent  # a folder with bundle/ in it is what a run is
    assert exit_code(main, [str(run), "--layout", "triton", "--out", str(tmp_path / "there")]) == 0
    assert f"triton: tritonserver --model-repository={tmp_path}/there" in capsys.readouterr().out
    with pytest.raises(UserError, match="there: exists already"):
        write_triton(tiny[1], tmp_path / "there")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        write_triton(tiny[1], tmp_path / "file" / "out")
    bundle = Path(shutil.copytree(tiny[1], tmp_path / "bundle"))
    (bundle / "config.json").write_text("{}")
    with pytest.raises(CheckFailed, match=r"bundle: config\.json: "):
        write_triton(bundle, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file", "there"]


def test_text_embeddings_inference_finds_what_it_reads(tiny: tuple[SentenceTransformer, Path]) -> None:
    folder = tiny[1]

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text())

    # router/src/lib.rs: fields without which it does not start.
    config = read("config.json")
    assert config["architectures"] and isinstance(config["model_type"], str)
    assert not any(name.endswith("Classification") for name in config["architectures"])
    assert isinstance(config["max_position_embeddings"], int) and isinstance(config["pad_token_id"], int)
    assert read("sentence_bert_config.json")["max_seq_length"] == 64
    assert read("config_sentence_transformers.json")["prompts"] == {"query": "query: ", "document": "passage: "}
    pooling = read("1_Pooling/config.json")
    assert pooling["pooling_mode_mean_tokens"] is True and pooling["pooling_mode_cls_token"] is False
    # backends/ort/src/lib.rs: the file, fields of its config, what it feeds, the output that it takes as finished.
    assert not (folder / "model.onnx").exists()
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
    fed = {"input_ids", "attention_mask", "token_type_ids"}
    assert {item.name for item in session.get_inputs()} <= fed
    assert {item.type for item in session.get_inputs()} == {"tensor(int64)"}
    outputs = {item.name: item for item in session.get_outputs()}
    assert outputs["sentence_embedding"].type == "tensor(float)" and len(outputs["sentence_embedding"].shape) == 2
    assert {"hidden_size", "num_hidden_layers"} <= config.keys()
    assert read("tokenizer_config.json").get("padding_side", "right") in ("left", "right")


def test_the_page_names_the_versions_that_the_tests_run() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    table = {row.split("|")[1]: row for row in PAGE.splitlines() if row.startswith("| ")}
    for name, package in (("onnxruntime", "onnxruntime"), ("sentence-transformers", "sentence-transformers")):
        assert f"| {pins[package]}" in table[f" [{name}](#{name}) "]
    assert f"tokenizers {pins['tokenizers']} |" in table[" [onnxruntime](#onnxruntime) "]
    for section, command in (("fastembed", r"fastembed==(\S+)"), ("Transformers.js", r"transformers@(\S+)")):
        (version,) = re.findall(command, snippet(section, "sh"))
        assert f"| {version} " in next(row for name, row in table.items() if f"[{section}]" in name)
    for anchor in re.findall(r"\(#([^)]+)\)", PAGE):
        assert anchor in [
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall("^## (.*)", PAGE, re.M)
        ]

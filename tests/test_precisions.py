"""The smaller ONNX files of a bundle: what they may differ by, what they cost, and gates that can fail."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from jsonschema import Draft202012Validator
from onnx import numpy_helper
from sentence_transformers import SentenceTransformer

from launch.config import RunConfig
from launch.errors import CheckFailed, UserError
from tests.bundles import FACTS, gate, tiny_bert
from tests.test_manifest import SCHEMA
from tests.test_report import ATTACK, Page
from tests.test_verify import reseal
from tests.tiny_models import BUILDERS
from tests.vectors import ALONE
from trainer.embedder import BundleEmbedder
from trainer.evaluation import score
from trainer.export import parity
from trainer.export.bundle import export_bundle
from trainer.export.encoder import Encoder
from trainer.export.onnx import pipeline_copy
from trainer.export.precisions import write_fp16
from trainer.export.quantise import RECIPES, activation_ranges, choose_int8, int8_columns, outcome_of, told, write_int8
from trainer.export.verify import inspect_bundle, verify
from trainer.report import write_report
from trainer.retrieval import RetrievalSet

ROOT = Path(__file__).parent.parent
TEXTS = ["a question", "", "how do I renew a permit before it expires? " * 9, "Größe, naïve, 東京"]


@pytest.fixture(scope="module")
def half(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceTransformer, Path]:
    """A tiny model and its bundle in every precision; not to be changed."""
    model = tiny_bert(minilm_folder)
    chosen = {"precisions": ["fp16", "int8"], "retrieval": words(60), "max_ndcg_loss": 0.9}
    facts = dataclasses.replace(FACTS, dims=[16], **chosen)
    return model, export_bundle(model, tmp_path_factory.mktemp("half") / "bundle", facts)


def test_fp16_is_half_as_large_and_close_to_pytorch(half: tuple[SentenceTransformer, Path]) -> None:
    model, folder = half
    files = {
        precision: folder / "onnx" / name for precision, name in (("fp32", "model.onnx"), ("fp16", "model_fp16.onnx"))
    }
    assert files["fp16"].stat().st_size < 0.6 * files["fp32"].stat().st_size
    assert verify(folder) == []
    encoder = Encoder(folder, precision="fp16")
    expected = model.encode(TEXTS, normalize_embeddings=True)
    difference = np.abs(encoder.encode(TEXTS) - expected).max()
    assert 1e-5 < difference < 5e-3, "0 would be the fp32 file"
    graph = onnx.load(files["fp16"]).graph
    types = {t.name: t.data_type for t in graph.initializer if len(t.dims) == 2}
    assert onnx.TensorProto.FLOAT not in types.values() and onnx.TensorProto.FLOAT16 in types.values()
    certificate = json.loads((folder / "parity.json").read_text())["precisions"]
    assert list(certificate) == ["fp32", "fp16", "int8"] and certificate["fp16"]["bound"] == 5e-3
    assert 1e-5 < max(certificate["fp16"]["max_abs_by_dim"].values()) <= 5e-3
    card = (folder / "README.md").read_text()
    assert "| `onnx/model_fp16.onnx` | fp16 | " in card and "| `onnx/model_quantized.onnx` | int8 | " in card
    found = json.loads((folder / "manifest.json").read_text())["quantisation"]
    assert found["outcome"] == "passed" and f"int8: {found['chosen']}: ndcg@10 loss " in card
    assert card.count("| fp32 |") == 2 and " | chosen |" in card
    Draft202012Validator(SCHEMA).validate(json.loads((folder / "manifest.json").read_text()))


def test_pooling_stays_within_the_range_of_fp16(half: tuple[SentenceTransformer, Path], tmp_path: Path) -> None:
    """Hidden states of some 2,000 over 64 tokens sum up beyond 65,504."""
    model = onnx.load(half[1] / "onnx/model.onnx")
    (norm,) = [t for t in model.graph.initializer if t.name.endswith("layer.1.output.LayerNorm.weight")]
    norm.CopyFrom(numpy_helper.from_array(1000 * numpy_helper.to_array(norm), norm.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    write_fp16(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")
    feed = {name: np.ones((1, 64), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    (whole, expected), (_, got) = (run(tmp_path / f"{name}.onnx", feed) for name in ("fp32", "fp16"))
    assert np.abs(whole).sum(1).max() > 65_504
    assert np.abs(got - expected).max() < 5e-3


def run(path: Path, feed: dict[str, np.ndarray]) -> list[Any]:
    return onnxruntime.InferenceSession(path).run(None, feed)  # type: ignore[return-value]


def change_half(path: Path, value: float) -> None:
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) == 2)
    values = numpy_helper.to_array(tensor).copy()
    values[101:110] = value
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_verify_computes_golden_embeddings_with_every_file(
    half: tuple[SentenceTransformer, Path], tmp_path: Path, value: float
) -> None:
    folder = Path(shutil.copytree(half[1], tmp_path / "bundle"))
    change_half(folder / "onnx/model_fp16.onnx", value)
    reseal(folder)
    report = inspect_bundle(folder)
    assert report.problems and all(p.startswith("golden embeddings: fp16, ") for p in report.problems)
    assert report.golden_max_abs["fp32"] <= 1e-5


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_the_gate_looks_at_every_file(half: tuple[SentenceTransformer, Path], tmp_path: Path, value: float) -> None:
    folder = Path(shutil.copytree(half[1], tmp_path / "bundle"))
    change_half(folder / "onnx/model_fp16.onnx", value)
    twin = pipeline_copy(half[0])
    twin.max_seq_length = 64
    wanted = r"^parity: fp16, .*: onnxruntime differs from PyTorch by \S+, allowed 5e-03; nothing published$"
    with pytest.raises(CheckFailed, match=wanted):
        gate(twin, folder, [32, 16], ["fp32", "fp16"])


def test_an_unknown_precision_in_a_manifest_gives_a_line(
    half: tuple[SentenceTransformer, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(half[1], tmp_path / "bundle"))
    reseal(folder, lambda manifest: manifest["onnx"].update(int4="onnx/model.onnx"))
    assert verify(folder) == ["manifest.json: a name in onnx is 'int4', allowed: fp32, fp16 or int8"]
    with pytest.raises(UserError, match="precision: got 'int4', the bundle has fp32, fp16, int8"):
        Encoder(half[1], precision="int4")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_fp16_of_every_architecture(name: str, tmp_path: Path) -> None:
    model = SentenceTransformer(str(BUILDERS[name](tmp_path / "model")), device="cpu")
    folder = export_bundle(model, tmp_path / "bundle", dataclasses.replace(FACTS, dims=[16], precisions=["fp16"]))
    assert verify(folder) == []


@pytest.fixture(scope="module")
def calibrated(half: tuple[SentenceTransformer, Path]) -> tuple[Path, dict[str, np.ndarray]]:
    """The fp32 graph and what its linear layers are given."""
    source, encoder = half[1] / "onnx/model.onnx", Encoder(half[1])
    tokens = [row for row in encoder.tokenize([*parity.TEXTS.values()]) if len(row[0])]
    return source, activation_ranges(source, tokens, encoder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_int8_files_are_small_and_close(
    calibrated: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, recipe: str
) -> None:
    source, ranges = calibrated
    write_int8(source, tmp_path / "int8.onnx", ranges, **RECIPES[recipe])
    assert (tmp_path / "int8.onnx").stat().st_size < 0.36 * source.stat().st_size
    ids = np.arange(2 * 40).reshape(2, 40) * 97 + 1000
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (_, expected), (_, got) = run(source, feed), run(tmp_path / "int8.onnx", feed)
    assert 1e-4 < np.abs(got - expected).max() < 0.06
    onnx.checker.check_model(onnx.load(tmp_path / "int8.onnx"))


@pytest.mark.parametrize("recipe", ["row", "row, narrowing layers in fp32", "static"])
def test_a_text_s_vector_does_not_depend_on_its_neighbours(
    calibrated: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, recipe: str
) -> None:
    source, ranges = calibrated
    write_int8(source, tmp_path / "int8.onnx", ranges, **RECIPES[recipe])
    ids = np.arange(8 * 40).reshape(8, 40) * 97 % 29000 + 1000
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    together = run(tmp_path / "int8.onnx", feed)[1]
    alone = run(tmp_path / "int8.onnx", {name: values[3:4] for name, values in feed.items()})[1]
    assert np.abs(together[3] - alone[0]).max() < 1e-5


def test_one_layer_is_what_numpy_computes(calibrated: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """Rows of very different sizes, each with a scale of its own; every product that 16 bits cannot hold is avoided."""
    draw = np.random.default_rng(0)
    x = (draw.normal(size=(2, 5, 64)) * 10.0 ** draw.integers(-3, 4, (2, 5, 1))).astype(np.float32)
    weight = draw.normal(size=(64, 48)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["token_embeddings"], name="layer")
    ports = [onnx.helper.make_tensor_value_info(n, 1, ["b", "s", k]) for n, k in (("x", 64), ("token_embeddings", 48))]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "fp32.onnx")
    write_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", {"x": np.abs(x).max(axis=(0, 1))}, activations="row")
    (got,) = run(tmp_path / "int8.onnx", {"x": x})
    expected = x.astype(np.float64) @ weight
    error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert 1e-4 < error.max() < 0.03


def test_no_two_products_leave_16_bits() -> None:
    draw = np.random.default_rng(0)
    for values in (draw.normal(size=(65, 40)), draw.uniform(0.9, 1, size=(64, 40)), np.zeros((3, 2))):
        integers, scale = int8_columns(values)
        wide = integers.astype(int)
        even, odd = wide[0::2][: len(wide) // 2], wide[1::2]
        for part in (np.maximum, np.minimum):
            assert np.abs(255 * (part(even, 0) + part(odd, 0))).max() < 2**15
        assert np.abs(wide * scale - values).max() <= 0.5001 * scale.max()


def words(count: int) -> RetrievalSet:
    """Queries that are the beginnings of documents."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(parity._WORDS, 12)) for _ in range(count)]
    return RetrievalSet([text[:30] for text in texts], texts, [{i: 1} for i in range(count)])


@pytest.mark.parametrize(("most", "outcome"), [(0.9, "passed"), (-0.9, "failed")])
def test_int8_is_chosen_and_judged(
    half: tuple[SentenceTransformer, Path], tmp_path: Path, most: float, outcome: str
) -> None:
    folder = Path(shutil.copytree(half[1], tmp_path / "bundle"))
    files = {"fp32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}
    reseal(folder, lambda manifest: manifest.update(onnx=files))
    whole = BundleEmbedder(folder)
    cases = parity.parity_cases(half[0], whole.encoder)
    check = partial(parity.measured, precision="int8", cases=cases, dims=[32, 16])
    scored = score(whole, words(60), [32, 16], batch_tokens=8192, world=ALONE)
    found, written = choose_int8(folder, files, whole.encoder, scored, words(60), most, check)
    assert [entry["recipe"] for entry in found["tried"]] == ["fp32", *RECIPES]
    assert (folder / files["int8"]).is_file() == (written is not None) == (found["outcome"] == "passed")
    assert found["queries"] == {"chosen on": 30, "judged on": 30} and found["documents"] == 60
    for entry in found["tried"]:
        assert set(entry["ndcg_by_dim"]) == {"32", "16"} and set(entry["milliseconds"]) == {"8", "32"}
    if outcome == "passed":
        assert written is not None and found["judged"]["ci95"][1] <= most
        again = BundleEmbedder(folder, "int8")  # the file that stays is the one that was judged
        assert written[0] == parity.measured(again.encoder, "int8", cases, [32, 16])
        whole_scores = score(again, words(60), [32, 16], batch_tokens=8192, world=ALONE).by_metric["float32", 32]
        np.testing.assert_array_equal(written[1].by_metric["float32", 32]["ndcg@10"], whole_scores["ndcg@10"])
        fit = [e for e in found["tried"][1:] if e["why"] == "chosen" or e["why"].startswith("slower than ")]
        fastest = min(fit, key=lambda e: np.prod([*e["milliseconds"].values()]))
        assert found["chosen"] == fastest["recipe"]
        assert found["judged"]["share"] == pytest.approx(independent_loss(folder, words(60)), abs=1e-5)
        assert [e["recipe"] for e in found["tried"][1:] if e["why"] == "chosen"] == [found["chosen"]]
        assert found["told"].startswith(f"int8: {found['chosen']}: ndcg@10 loss ")
    else:
        assert (found["outcome"], found["chosen"]) == ("failed", None)
        assert found["told"].startswith("int8: not written, no recipe is within -90.00% of ndcg@10: tensor loses ")


def test_int8_files_that_are_another_model_are_not_chosen(
    half: tuple[SentenceTransformer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is published without them."""
    monkeypatch.setitem(parity.BOUNDS, "int8", 1e-7)
    facts = dataclasses.replace(FACTS, precisions=["int8"], retrieval=words(20), max_ndcg_loss=0.9)
    folder = export_bundle(half[0], tmp_path / "bundle", facts)
    found = json.loads((folder / "manifest.json").read_text())
    assert "int8" not in found["onnx"] and not (folder / "onnx/model_quantized.onnx").exists()
    assert all("parity: int8, " in entry["why"] for entry in found["quantisation"]["tried"][1:])
    assert "within 90.00% of ndcg@10: tensor parity: int8, length 1" in found["quantisation"]["told"]
    assert verify(folder) == []


def test_the_manifest_and_card_say_how_good_each_file_is(half: tuple[SentenceTransformer, Path]) -> None:
    """Beside scores and places of plain numpy: one right answer each, so nDCG@10 is 1 / log2(1 + its place)."""
    manifest = json.loads((half[1] / "manifest.json").read_text())
    retrieval, card = words(60), (half[1] / "README.md").read_text()
    said = {(e["artifact"], e["dim"]): e for e in manifest["metrics"]}
    assert list(said) == [(f"onnx-{p}", dim) for p in manifest["onnx"] for dim in (32, 16)]
    for (artifact, dim), entry in said.items():
        encoder = Encoder(half[1], precision=artifact.removeprefix("onnx-"))
        queries, documents = (encoder.encode(t, dim=dim) for t in (retrieval.queries, retrieval.documents))
        scores = queries @ documents.T
        places = 1 + (scores > np.diag(scores)[:, None] + 1e-7).sum(axis=1)
        ndcg = np.where(places <= 10, 1 / np.log2(1 + places), 0)
        assert entry["value"] == pytest.approx(ndcg.mean(), abs=1e-3)
        assert (entry["queries"], entry["documents"], entry["metric"]) == (60, 60, "ndcg@10")
        assert f" {entry['value']:.4f} |" in card
    line = next(line for line in card.splitlines() if "| fp16 |" in line)
    assert line.endswith(f"| {said['onnx-fp16', 32]['value']:.4f} | {said['onnx-fp16', 16]['value']:.4f} |")
    assert "No retrieval evaluation was made" in card, "the table of base and tuned has no figures of files"


def test_the_report_shows_every_recipe(half: tuple[SentenceTransformer, Path], tmp_path: Path) -> None:
    """The page of a run whose bundle is a real one, but for a forged verdict that stays a text."""
    manifest = json.loads((half[1] / "manifest.json").read_text())
    found = manifest["quantisation"]
    found["tried"][1]["why"] = ATTACK
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    html = write_report(tmp_path).read_text()
    page = Page(html)
    assert found["told"] in page.words and ATTACK in page.words and not {"script", "img"} & set(page.tags)
    (rows,) = [table for table in tables(html) if table[0][0] == "recipe"]
    heads, *rows = rows
    assert heads[1:4] == ["MB", "ms at 8", "ms at 32"] and heads[-3:] == ["loss", "95 % interval", "verdict"]
    assert [row[0] for row in rows] == ["fp32", *RECIPES] and {len(row) for row in rows} == {len(heads)}
    for row, entry in zip(rows, found["tried"], strict=True):
        assert row[1] == f"{entry['bytes'] / 1e6:.3f}"
        assert row[2:4] == [f"{ms:.3f}" for ms in entry["milliseconds"].values()]
        assert row[4:6] == [f"{value:.3f}" for value in entry["ndcg_by_dim"].values()]
        if entry["recipe"] != "fp32":
            low, high = (f"{100 * end:.2f} %" for end in entry["loss"]["ci95"])
            assert row[6:8] == [f"{100 * entry['loss']['share']:.2f} %", f"{low} to {high}"]
    (files,) = [table for table in tables(html) if table[0][0] == "file"]
    assert [row[:2] for row in files[1:]] == [[file, precision] for precision, file in manifest["onnx"].items()]


def tables(html: str) -> list[list[list[str]]]:
    """Texts of the cells of every table."""
    cells = [
        [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table.*?</table>", html, re.DOTALL)
    ]
    return [[[unescape(cell) for cell in row] for row in table] for table in cells]


def independent_loss(folder: Path, retrieval: RetrievalSet) -> float:
    """Share of nDCG@10 that int8 loses on the odd queries, one right answer each: 1 / log2(1 + its place)."""
    means = []
    for precision in ("fp32", "int8"):
        encoder = Encoder(folder, precision=precision)
        queries, documents = encoder.encode(retrieval.queries, kind="query"), encoder.encode(retrieval.documents)
        scores = queries @ documents.T
        places = 1 + (scores > np.diag(scores)[:, None]).sum(axis=1)[1::2]
        means.append(np.where(places <= 10, 1 / np.log2(1 + places), 0).mean())
    return 1 - means[1] / means[0]


def test_the_manifest_says_what_memory_each_file_takes(half: tuple[SentenceTransformer, Path]) -> None:
    told = json.loads((half[1] / "manifest.json").read_text())
    longest = " ".join(["word"] * 64)
    code = (
        "import sys; from trainer.export.encoder import Encoder\n"
        f"Encoder(sys.argv[1], threads=1).encode([{longest!r}] * 129, batch_tokens=8192)\n"
        "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    run = [sys.executable, "-c", code, str(half[1])]
    peak = int(subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()[-1]) / 1024
    assert set(told["memory_mib"]) == set(told["onnx"]) == {"fp32", "fp16", "int8"}
    assert told["memory_mib"]["fp32"] == pytest.approx(peak, rel=0.15)


def test_a_relative_folder_is_the_one_of_the_user(
    half: tuple[SentenceTransformer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_bundle(half[0], Path("bundle"), FACTS)
    assert verify(tmp_path / "bundle") == []


def test_what_is_told() -> None:
    facts = {"chosen": "row", "metric": "ndcg@10", "most": 0.005, "queries": {"judged on": 500}, "tried": []}
    judged = {"share": 0.001, "ci95": [-0.006, 0.008]}
    text = told(facts | {"outcome": "not decidable", "judged": judged})
    assert "not decidable: row: ndcg@10 loss 0.10% [-0.60%, 0.80%] on 500 queries that did not choose it" in text
    assert text.endswith("some 3,062 queries in all would do")


@pytest.mark.parametrize(
    ("low", "high", "queries", "outcome"),
    [
        (0.0, 0.0, 10, "not decidable"),  # nothing changed for ten: 0.7^10 is 3 %, so 30 % of all may be hurt
        (0.0, 0.0, 599, "not decidable"),
        (0.0, 0.0, 600, "passed"),
        (-0.01, 0.006, 10_000, "not decidable"),
        (0.006, 0.01, 10, "failed"),
    ],
)
def test_the_verdict(low: float, high: float, queries: int, outcome: str) -> None:
    assert outcome_of(low, high, queries, 0.005) == outcome
    facts = {"chosen": "row", "metric": "ndcg@10", "most": 0.005, "queries": {"judged on": queries}, "tried": []}
    text = told(facts | {"outcome": outcome, "judged": {"share": low, "ci95": [low, high]}})
    assert ("some 1,200 queries in all would do" in text) is (outcome == "not decidable" and high == 0)


def test_int8_needs_queries(half: tuple[SentenceTransformer, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int8: got no queries to judge it on"):
        export_bundle(half[0], tmp_path / "bundle", dataclasses.replace(FACTS, precisions=["int8"]))
    config = {"model": {"path": "m"}, "data": {"sources": [{"path": "rows.jsonl"}]}, "train": {"global_batch_size": 4}}
    with pytest.raises(ValueError, match="int8 is judged on the queries of evaluate"):
        RunConfig.model_validate(config | {"export": {"precisions": ["int8"]}})


def test_a_bundle_of_fewer_dims_is_the_cut_model_everywhere(
    half: tuple[SentenceTransformer, Path], tmp_path: Path
) -> None:
    model, _ = half
    folder = export_bundle(model, tmp_path / "bundle", dataclasses.replace(FACTS, dims=[8], dim=16))
    assert verify(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["width"], manifest["dims"]) == (16, [16, 8])
    expected = model.encode(TEXTS)[:, :16]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(Encoder(folder).encode(TEXTS) - expected).max() <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of the older keys of the pooling
        loaded = SentenceTransformer(str(folder), device="cpu")
    assert np.abs(loaded.encode(TEXTS) - expected).max() <= 1e-5
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    assert pooling["pooling_mode"] == "mean"
    assert [key for key in pooling if pooling[key] is True and key.startswith("pooling_mode_")] == [
        "pooling_mode_mean_tokens"
    ]
    assert pooling["pooling_mode_cls_token"] is False
    assert len(model) == 3, "the model itself stays as it is"
    with pytest.raises(UserError, match="dim: got 33, the model has 32; allowed: 1 to 32"):
        export_bundle(model, tmp_path / "other", dataclasses.replace(FACTS, dim=33))

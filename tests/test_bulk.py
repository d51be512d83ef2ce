"""`nestling embed` against sentence-transformers' own encode and numpy written out; kills, processes, refusals."""

import contextlib
import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

from launch.errors import exit_code
from launch.files import sha256_of
from tests import tiny_models
from trainer import bulk
from trainer.embedder import ModelEmbedder, fingerprint
from trainer.export import cli as export_cli

ROOT = Path(__file__).parents[1]
WORDS = ["contract", "court", "patient", "revenue", "file", "sorted", "list", "na\u00efve", "\u6771\u4eac", "of", "the"]
BULK = [sys.executable, "-m", "trainer.bulk"]


def made(count: int) -> list[str]:
    """Texts of many lengths, some repeated, one empty, one beyond the model's 64 tokens."""
    draw = random.Random(count)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(count - 4)]
    return [*texts, "", texts[0], "word " * 99, texts[-1]]


def write(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.qwen3_embedding(tmp_path_factory.mktemp("bulk") / "model")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.jsonl", made(23))


def embed(model: Path, texts: Path, out: Path, *options: str) -> int:
    words = [model, texts, "--out", out, "--block-texts", "5", *options]
    return exit_code(bulk.main, [str(word) for word in words])


def stored(out: Path) -> np.ndarray:
    return np.load(out / "vectors.npy")


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize(("storage", "atol"), [("float32", 1e-6), ("float16", 5e-4)])
@pytest.mark.parametrize("dim", [None, 20])
def test_vectors_are_those_of_encode(
    model: Path, texts: Path, tmp_path: Path, storage: str, atol: float, dim: int | None
) -> None:
    options = [] if dim is None else ["--dim", str(dim)]
    assert embed(model, texts, tmp_path / "out", "--role", "query", "--vectors", storage, *options) == 0
    twin = SentenceTransformer(str(model), device="cpu")
    expected = twin.encode(made(23), prompt_name="query", normalize_embeddings=True, truncate_dim=dim)
    got = stored(tmp_path / "out")
    assert got.dtype == storage and got.shape == (23, dim or 32)
    np.testing.assert_allclose(got, expected, atol=atol)
    assert np.abs(got[:-1] - expected[1:]).max() > 0.1, "the order of rows would not matter"


def test_vectors_of_a_real_model_are_those_of_encode(minilm: Any, minilm_folder: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", made(12))
    assert embed(minilm_folder, texts, tmp_path / "out", "--dim", "128", "--batch-tokens", "300") == 0
    expected = minilm.encode(made(12), normalize_embeddings=True, truncate_dim=128)
    np.testing.assert_allclose(stored(tmp_path / "out"), expected, atol=1e-6)


def test_quantised_vectors_written_out(model: Path, texts: Path, tmp_path: Path) -> None:
    for storage in ("float32", "int8", "binary"):
        assert embed(model, texts, tmp_path / storage, "--dim", "20", "--vectors", storage) == 0
    whole = stored(tmp_path / "float32")
    codes, bits = stored(tmp_path / "int8"), stored(tmp_path / "binary")
    assert (codes.dtype, codes.shape, bits.dtype, bits.shape) == (np.int8, (23, 20), np.uint8, (23, 3))
    for vector, code, byte in zip(whole.tolist(), codes.tolist(), bits.tolist(), strict=True):
        largest = max(abs(number) for number in vector)
        assert max(map(abs, code)) == 127
        assert all(abs(c - number / largest * 127) <= 0.5 + 1e-4 for c, number in zip(code, vector, strict=True))
        signs = "".join("1" if number > 0 else "0" for number in vector) + "0000"
        assert byte == [int(signs[i : i + 8], 2) for i in (0, 8, 16)]
    assert "largest number" in manifest(tmp_path / "int8")["decoded"]


def _as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["id", "text"])
        table.writeheader()
        table.writerows(rows)


INPUTS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "texts.csv": _as_csv,
    "texts.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("\n".join(map(json.dumps, rows)).encode())  # no line break at the end
    ),
    "texts.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_kind_of_file(model: Path, texts: Path, tmp_path: Path, name: str) -> None:
    rows = [{"id": i - 5, "text": text} for i, text in enumerate(made(23))]
    INPUTS[name](tmp_path / name, rows)
    assert embed(model, texts, tmp_path / "expected") == 0
    assert embed(model, tmp_path / name, tmp_path / "out", "--id-column", "id") == 0
    assert np.array_equal(stored(tmp_path / "out"), stored(tmp_path / "expected"))
    lines = (tmp_path / "out/ids.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [str(i - 5) for i in range(23)]
    assert not (tmp_path / "expected/ids.jsonl").exists()


@pytest.mark.parametrize("storage", ["float32", "float16", "int8", "binary"])
def test_parquet_holds_the_same_vectors(model: Path, texts: Path, tmp_path: Path, storage: str) -> None:
    assert embed(model, texts, tmp_path / "npy", "--vectors", storage) == 0
    for out, options, key in (("ids", ["--id-column", "id"], "id"), ("rows", [], "row")):
        assert embed(model, texts, tmp_path / out, "--vectors", storage, "--format", "parquet", *options) == 0
        names = sorted(path.name for path in (tmp_path / out).iterdir())
        assert names == ["manifest.json", *(f"vectors-0000{i}.parquet" for i in range(5))]
        table = pa.concat_tables(pq.read_table(tmp_path / out / name) for name in names[1:])
        assert table.column_names == [key, "vector"]
        assert table[key].to_pylist() == [f"d{i}" if key == "id" else i for i in range(23)]
        column = table["vector"].combine_chunks()
        expected = stored(tmp_path / "npy")
        assert column.type.list_size == expected.shape[1]
        got = column.flatten().to_numpy(zero_copy_only=False).reshape(expected.shape)
        assert got.dtype == expected.dtype and np.array_equal(got, expected)


def test_the_manifest_says_what_the_vectors_are(model: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "deep/out"
    assert embed(model, texts, out, "--role", "query", "--dim", "8", "--id-column", "id") == 0
    found = manifest(out)
    files = {name: {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)} for name in found["files"]}
    assert files == found["files"] and sorted(files) == ["ids.jsonl", "vectors.npy"]
    assert sorted(path.name for path in out.iterdir()) == ["ids.jsonl", "manifest.json", "vectors.npy"]
    expected = {
        "format": "nestling-vectors/1",
        "model": str(model),
        "model_fingerprint": fingerprint(SentenceTransformer(str(model), device="cpu")),
        "artifact": "pytorch",
        "role": "query",
        "prompt": "Instruct: Given a question, retrieve passages that answer it\nQuery:",
        "max_length": 64,
        "dim": 8,
        "vectors": "float32",
        "rows": 23,
        "input": str(texts),
        "input_sha256": sha256_of(texts),
    }
    assert {key: found[key] for key in expected} == expected
    assert "do not mix" in found["note"] and found["nestling"].startswith("0.")
    said = capsys.readouterr().out
    assert "23 of 23 texts embedded now" in said and "texts/s" in said and "do not mix" in said
    assert expected["model_fingerprint"][:12] in said


def test_a_complete_folder_is_left_alone_and_a_damaged_one_is_named(
    model: Path, texts: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert embed(model, texts, out) == 0
    stamps = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    capsys.readouterr()
    assert embed(model, texts, out) == 0
    assert "complete already" in capsys.readouterr().out
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()} == stamps
    os.truncate(out / "vectors.npy", 1000)
    assert embed(model, texts, out) == 2
    assert f"{out / 'vectors.npy'}: missing or cut off" in capsys.readouterr().err


def start(words: list[Any], **environment: str) -> "subprocess.Popen[str]":
    known = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD_SIZE" not in name}
    environment = known | {"OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    words = list(map(str, words))
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What a process wrote, after it has ended; one that does not is killed with its children."""
    try:
        return process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def launched(processes: int, *words: Any) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    process = start([*launcher, "-m", "trainer.bulk", *words])
    said, errors = end(process)
    assert process.returncode == 0, errors
    return said


def test_two_processes_and_one_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", made(61))
    options = ["--id-column", "id"]
    assert embed(model, texts, tmp_path / "1", *options) == 0
    launched(2, model, texts, "--out", tmp_path / "2", "--block-texts", 5, *options)
    for name in ("vectors.npy", "ids.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    expected = SentenceTransformer(str(model), device="cpu").encode(made(61), normalize_embeddings=True)
    np.testing.assert_allclose(stored(tmp_path / "2"), expected, atol=1e-6)


@pytest.fixture
def killed(model: Path, tmp_path: Path) -> Callable[[str], tuple[list[Any], Path]]:
    """Starts a job of 40 parts and kills it when it has some; the words to start it again, and its folder."""

    def job(file_format: str) -> tuple[list[Any], Path]:
        out, texts = tmp_path / "killed", write(tmp_path / "many.jsonl", made(400))
        # One text a batch: a second or more for all.
        options = ["--block-texts", "10", "--batch-tokens", "1", "--format", file_format]
        process = start([*BULK, model, texts, "--out", out, *options])
        third = out / ("parts/00002.npy" if file_format == "npy" else "vectors-00002.parquet")
        while not third.exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        end(process)
        assert not (out / "manifest.json").exists(), "it was done before it was killed"
        return [model, texts, *options], out

    return job


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    parts = (*out.glob("parts/0*.npy"), *out.glob("vectors-*.parquet"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts}


@pytest.mark.parametrize("file_format", ["npy", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_killed_job_embeds_only_what_is_missing(
    killed: Callable[[str], tuple[list[Any], Path]], tmp_path: Path, capsys: Any, file_format: str
) -> None:
    words, out = killed(file_format)
    before = stamps(out)
    assert 3 <= len(before) < 40
    bad = sorted(before)[1:3]
    os.truncate(next(out.rglob(bad[0])), 700)  # as a disk that was full would leave it
    short = next(out.rglob(bad[1]))  # whole, but not all rows
    if file_format == "npy":
        np.save(short, np.load(short)[1:])
    else:
        pq.write_table(pq.read_table(short)[1:], short)
    assert exit_code(bulk.main, [str(word) for word in [*words, "--out", out]]) == 0
    assert f"{400 - 10 * (len(before) - 2)} of 400 texts embedded now" in capsys.readouterr().out
    if file_format == "parquet":
        assert {name: stamp for name, stamp in stamps(out).items() if before.get(name) == stamp}.keys() == (
            before.keys() - set(bad)
        )
    assert exit_code(bulk.main, [str(word) for word in [*words, "--out", tmp_path / "whole"]]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_rank_does_its_own_blocks_and_rank_0_names_what_a_gone_rank_left(
    killed: Callable[[str], tuple[list[Any], Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, out = killed("npy")
    before = stamps(out)
    world = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert exit_code(bulk.main, [str(word) for word in [*words, "--out", out]]) == 0
    fresh = stamps(out).keys() - before.keys()
    assert sorted(fresh) == [f"{block:05d}.npy" for block in range(1, 40, 2) if f"{block:05d}.npy" not in before]
    gone = max(fresh)
    (out / "parts" / gone).unlink()
    # The shell stands for a launcher whose only living child is rank 0.
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    process = start([*shell, *BULK, *words, "--out", out], **world | {"RANK": "0", "LOCAL_RANK": "0"})
    _, errors = end(process)
    assert process.returncode == 2
    assert f"nestling: part {int(gone[:5])} is missing and no other process of the job lives" in errors
    assert sorted(stamps(out)) == [f"{block:05d}.npy" for block in range(40) if f"{block:05d}.npy" != gone]


def test_a_bundle_and_its_model_agree(model: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    bundle = tmp_path / "bundle"
    assert exit_code(export_cli.main, [str(model), "--out", str(bundle), "--dims", "32", "16"]) == 0
    for role in ("query", "document"):
        outs = [tmp_path / f"{name}-{role}" for name in ("model", "bundle")]
        for source, out in zip((model, bundle), outs, strict=True):
            assert embed(source, texts, out, "--dim", "16", "--role", role) == 0
        assert np.abs(stored(outs[0]) - stored(outs[1])).max() <= 1e-5
        first, second = map(manifest, outs)
        assert second["artifact"] == "onnx-fp32"
        for key in ("model_fingerprint", "prompt", "max_length"):
            assert first[key] == second[key]
    # The PyTorch weights that lie in a bundle are the same model too.
    assert fingerprint(SentenceTransformer(str(bundle), device="cpu")) == first["model_fingerprint"]
    capsys.readouterr()
    assert embed(bundle, texts, tmp_path / "out", "--dim", "8") == 2
    assert capsys.readouterr().err == f"nestling: --dim: got 8, {bundle} allows 32, 16\n"
    assert embed(bundle, texts, tmp_path / "out", "--precision", "int8") == 2
    assert "precision: got 'int8', the bundle has fp32" in capsys.readouterr().err
    assert embed(bundle, texts, outs[0], "--dim", "16", "--role", "document") == 2
    assert "holds vectors with artifact 'pytorch', got 'onnx-fp32'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fingerprint_is_the_models_own_whatever_was_embedded_before(model: Path) -> None:
    embedder = ModelEmbedder(SentenceTransformer(str(model), device="cpu"))
    before = embedder.fingerprint
    embedder.vectors(["one", "two words"], "query")
    assert embedder.fingerprint == before
    embedder.model.max_seq_length = 12
    assert embedder.fingerprint != before


OTHERS = [
    (["--role", "query"], "role 'document', got 'query'"),
    (["--dim", "8"], "dim 32, got 8"),
    (["--vectors", "int8"], "vectors 'float32', got 'int8'"),
    (["--format", "parquet"], "file_format 'npy', got 'parquet'"),
    (["--block-texts", "6"], "block_texts 5, got 6"),
    (["--id-column", "id"], "columns ['text'], got ['text', 'id']"),
]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "begun"])
def test_another_job_is_refused_in_a_folder_that_holds_vectors(
    model: Path, texts: Path, tmp_path: Path, capsys: Any, complete: bool
) -> None:
    out = tmp_path / "out"
    assert embed(model, texts, out) == 0
    if not complete:
        found = manifest(out)
        (out / "parts").mkdir()
        (out / "parts/job.json").write_text(json.dumps({k: v for k, v in found.items() if k != "files"}))
        (out / "manifest.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    for options, message in OTHERS:
        assert embed(model, texts, out, *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert f"choose another --out, or remove {out}" in error
    assert embed(tiny_models.minilm(tmp_path / "other"), texts, out) == 2
    assert "holds vectors with model_fingerprint" in capsys.readouterr().err
    write(texts, [*made(23)[:-1], "another end"])
    assert embed(model, texts, out) == 2
    assert "holds vectors with input_sha256" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


REFUSED: list[tuple[Any, list[str], str]] = [
    (["a", None], [], "texts.jsonl:2: 'text': got null, allowed: text; mend or drop the row"),
    (["a", 7], [], "texts.jsonl:2: 'text': got 7, allowed: text; mend or drop the row"),
    (["a", "b \ud800"], [], "texts.jsonl:2: 'text': got 'b \\ud800', allowed: text; mend or drop the row"),
    (["a"], ["--column", "txt"], "--column: {texts} has no 'txt', allowed: id, text; did you mean text?"),
    (["a"], ["--id-column", "ids"], "--id-column: {texts} has no 'ids', allowed: id, text; did you mean id?"),
    (["a", "b", "a"], ["--id-column", "text"], "texts.jsonl:3: id 'a' stands at {texts}:1 too, allowed: once"),
    ([], [], "{texts}: the file is empty; allowed: at least one row"),
    (["a"], ["--dim", "33"], "--dim: got 33, {model} allows 1 to 32"),
    (["a"], ["--dim", "0"], "--dim: got 0, {model} allows 1 to 32"),
    (["a"], ["--block-texts", "0"], "--block-texts: got 0, allowed: 1 or more"),
    (["a"], ["--precision", "fp32"], "--precision: got fp32 with {model}; allowed with a bundle only"),
]


@pytest.mark.parametrize(("content", "options", "message"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_refused_with_one_line(
    model: Path, tmp_path: Path, capsys: Any, content: list[Any], options: list[str], message: str
) -> None:
    texts = write(tmp_path / "texts.jsonl", content)
    assert embed(model, texts, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message.format(texts=texts, model=model) in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.npy")) and not (tmp_path / "out/manifest.json").exists()
    if "mend" in message:  # and the job begins when that is done
        assert embed(model, write(texts, ["a", "b"]), tmp_path / "out", *options) == 0


def test_refused_places(model: Path, texts: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "header.csv").write_text("text,id\n")
    assert embed(model, tmp_path / "header.csv", tmp_path / "out") == 2
    assert "header.csv: has no rows, allowed: at least 1" in capsys.readouterr().err
    assert embed(model, texts, texts) == 2
    assert f"--out: {texts} is a file" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert embed(model, texts, tmp_path / "mine") == 2
    assert f"--out: {tmp_path / 'mine'} holds thesis.tex" in capsys.readouterr().err
    assert embed(model, texts, texts / "below") == 2
    assert "Not a directory" in capsys.readouterr().err
    assert embed(model, tmp_path / "text.jsonl", tmp_path / "out") == 2
    assert "text.jsonl: no such file or folder; did you mean" in capsys.readouterr().err
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert embed(model, texts, tmp_path / "out") == 2
    assert "mpirun started 2 copies" in (error := capsys.readouterr().err)
    assert "ddp.yaml -m trainer.bulk MODEL TEXTS --out DIR" in error
    assert not (tmp_path / "out").exists()


def test_a_vector_that_is_not_finite_ends_the_job(model: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    twin = SentenceTransformer(str(model), device="cpu")
    with torch.no_grad():
        next(twin.parameters())[twin.tokenizer("court")["input_ids"][0]] = float("nan")
    twin.save(str(tmp_path / "broken"), create_model_card=False)
    bad = np.isnan(twin.encode(made(23), batch_size=1)).any(axis=1)
    assert not bad.all()
    assert embed(tmp_path / "broken", texts, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "its vector holds NaN or infinity" in error and error.count("\n") == 1
    assert f"texts.jsonl:{1 + bad.argmax()}:" in error
    assert not (tmp_path / "out/manifest.json").exists()


def test_an_input_that_changes_is_noticed(
    model: Path, texts: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = ModelEmbedder.vectors

    def slow(self: ModelEmbedder, *words: Any) -> Any:
        write(texts, ["changed"])
        return vectors(self, *words)

    monkeypatch.setattr(ModelEmbedder, "vectors", slow)
    assert embed(model, texts, tmp_path / "out") == 2
    assert "texts.jsonl: changed while it was read" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.npy"))

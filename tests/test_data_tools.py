"""Docstring pairs: what becomes one, what is dropped and why, and that no held-out copy stays in train."""

import ast
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_tools.docstrings import Package, find_packages, main, make
from data_tools.pairs import Pair, pairs_of, summary_of
from data_tools.shards import ShardWriter, read_manifest, verify_shards
from data_tools.split import code_identity, code_tokens, draw_order, near_copies, normalise, shingles
from launch.errors import UserError

ROOT = Path(__file__).parent.parent

SHARED = '''
def spread(values, weight=1.0):
    """{summary}"""
    total = 0.0
    for value in values:
        if value > 0:
            total += weight * value * value
        else:
            total -= weight * abs(value)
    mean = total / max(1, len(values))
    return [mean * value for value in values if value != mean]
'''


def function(i: int, summary: str = "") -> str:
    """A function of its own with enough tokens to be unlike the others."""
    draw = random.Random(i)
    names = [f"{draw.choice('abcdefgh')}{draw.randrange(10**6)}" for _ in range(6)]
    body = "\n".join(f"    {n} = {draw.choice(['sorted', 'len', 'sum'])}(x[{draw.randrange(99)}:])" for n in names)
    summary = summary or f"Compute the thing number {names[0]}."
    return f'def f{i}(x):\n    """{summary}"""\n{body}\n    return {names}\n'


def package(root: Path, name: str, files: dict[str, str | bytes]) -> Package:
    for path, text in files.items():
        target = root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Package(name, root / name, "1.0", "MIT")


def rows(folder: Path) -> list[dict]:
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def names(folder: Path) -> set[str]:
    return {row["name"] for row in rows(folder)}


def test_no_copy_of_held_out_code_survives_in_train(tmp_path):
    plain = SHARED.format(summary="Weight the positive values against the others.")
    copies = {
        "exact": plain,
        "commented": SHARED.format(summary="Another summary for the same code.").replace(
            "    total = 0.0\n", "    # a comment\n    total  =  0.0  # and another\n\n"
        ),
        "renamed": SHARED.format(summary="Some summary of a renamed function.").replace("spread", "vendored_spread"),
        "typed": SHARED.format(summary="Typed copy of the same function.").replace("values,", "values: list[float],"),
        "near": SHARED.format(summary="Slightly changed copy of the function.").replace("abs(value)", "abs(value - 1)"),
        "summary": function(900, "weight the  positive VALUES against the others."),
        "short": 'def last(self):\n    """Give the last of all items back."""\n    return self.items[-1]\n',
        "short and typed": 'def last(self: "Items") -> int:\n    """Say which is last of all."""\n'
        "    return self.items[-1]  # the last\n",
    }
    held = package(
        tmp_path,
        "held",
        {"a.py": plain + function(1) + copies["short"].replace("last", "end").replace("Give", "Hand")},
    )
    train = package(tmp_path, "train", {f"{name}.py": text for name, text in copies.items()} | {"own.py": function(2)})
    card = make([train], [held], tmp_path / "out")
    assert names(tmp_path / "out/train") == {"f2"}
    assert names(tmp_path / "out/held_out") == {"spread", "f1", "end"}
    assert not any(card["leaks_left"].values())
    # five copies are one function by the rules inside a side already, so each is tried by itself as well
    for name, text in copies.items():
        alone = package(tmp_path / f"alone_{name}", "alone", {"a.py": text, "own.py": function(2)})
        card = make([alone], [held], tmp_path / f"out_{name}")
        assert names(tmp_path / f"out_{name}/train") == {"f2"}, name
        assert sum(card["leaks_found"].values()) >= 1
        dropped = card["train"]["dropped"]
        assert sum(n for reason, n in dropped.items() if reason.startswith("held-out side has")) == 1, dropped


def test_a_draw_of_held_out_does_not_open_a_leak(tmp_path):
    held = package(tmp_path, "held", {"a.py": "".join(function(i) for i in range(20))})
    train = package(tmp_path, "train", {"a.py": "".join(function(i) for i in range(10, 30))})
    make([train], [held], tmp_path / "out", max_held_out=1)
    assert names(tmp_path / "out/train") == {f"f{i}" for i in range(20, 30)}
    assert len(rows(tmp_path / "out/held_out")) == 1


def documented(docstring: str, body: str = "return x + 1", head: str = "def a(x):") -> str:
    return f'{head}\n    """{docstring}"""\n    {body}\n'


def test_functions_without_use_are_counted_under_their_reason(tmp_path):
    turn = "Turn one thing into another."
    twice = function(5) + "class B:\n" + textwrap.indent(function(5, "Again the same."), "    ")
    cases = {
        "no docstring": "def a(x):\n    return x + 1\n",
        "dunder method": documented(turn, head="def __len__(self):"),
        "test function": documented(turn, head="def test_a(x):"),
        "overload": documented(turn, head="@typing.overload\ndef a(x: int):"),
        "trivial body": documented(turn, 'raise NotImplementedError("later")'),
        "no summary": documented("\n    Parameters\n    ----------\n    x : int\n    "),
        "summary of fewer than 3 words": documented("Add it."),
        "generic summary": documented("See base class for details."),
        "docstring is a template": documented("Return the %(klass)s of values."),
        "docstring on a line with code": 'def a(x): "Add one to the value."; return x + 1\n',
        "nested in another function": "def a(x):\n" + textwrap.indent(documented(turn), "    "),
        "function longer than 300 characters": documented(turn, "return " + "x + " * 99 + "1"),
        "file does not decode or parse": "def a(:\n",
        "copy of another function": twice,
        "copy but for name, comments and layout": function(6) + function(6, "Again the same one.").replace("f6", "g"),
        "summary of more than 3 functions": "".join(function(i, "Do the same as others.") for i in range(100, 104)),
    }
    latin = b"# coding: latin-1\n" + 'def latin(x):\n    """Caf\u00e9 serves the value."""\n    return x + 41\n'.encode(
        "latin-1"
    )
    files: dict[str, str | bytes] = {f"m{i}.py": text for i, text in enumerate(cases.values())}
    junk = {
        "bytes.py": b"\xff\xfe\x00",
        "tests/t.py": function(7),
        "_vendor/v.py": function(8),
        "latin.py": latin,
    }
    own = package(tmp_path, "own", {**files, **junk, "good.py": function(9)})
    held = package(tmp_path, "held", {"a.py": function(1)})
    card = make([own], [held], tmp_path / "out", max_chars=300)
    expected = dict.fromkeys(cases, 1) | {
        "file does not decode or parse": 2,
        "no docstring": 2,  # the function around the nested one has none either
        "summary of more than 3 functions": 4,
    }
    assert card["train"]["dropped"] == expected
    kept = names(tmp_path / "out/train")  # of two copies the draw says which stays
    assert {"latin", "f9"} < kept and len(kept & {"f5", "B.f5"}) == len(kept & {"f6", "g"}) == 1
    assert card["train"]["rows"] == 4
    assert read_manifest(tmp_path / "out/train").dropped == expected
    assert any(row["anchor"].startswith("Caf\u00e9") for row in rows(tmp_path / "out/train"))
    text = (tmp_path / "out/card.md").read_text()
    assert "| own | 1.0 | MIT | 4 |" in text and "| overload | 1 |" in text


def test_every_function_of_the_standard_library_is_accounted_for():
    """Positives are what the file holds without the docstring, by the parser's own reading of both."""
    checked = 0
    for module in (
        "argparse.py",
        "email/message.py",
        "statistics.py",
        "asyncio/base_events.py",
        "_pydecimal.py",
    ):
        source = (Path(os.__file__).parent / module).read_text(encoding="utf-8")
        defs = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        items = list(pairs_of(source, "stdlib", module))
        assert len(items) == len(defs)
        by_line = {n.lineno: n for n in defs}
        for item in items:
            if isinstance(item, Pair):
                node = by_line[item.line]
                assert item.name.rpartition(".")[2] == node.name
                node.decorator_list, node.body = [], node.body[1:]
                assert ast.dump(ast.parse(item.positive).body[0]) == ast.dump(node)
                checked += 1
    assert checked > 250


@pytest.mark.parametrize(
    "docstring, summary",
    [
        ("One line.", "One line."),
        ("\n    Over two\n    lines.\n\n    More.", "Over two lines."),
        ("Sum of :class:`~a.b.C` and ``x``.\n\n    >>> 1\n", "Sum of a.b.C and x."),
        ("Sum it.\n    :param x: what\n", "Sum it."),
        ("Sum it.\n    Args:\n        x: what", "Sum it."),
        ("Sum it.\n    >>> total(1)\n    1", "Sum it."),
        ("total(x, y) -> int\n\n    Sum it.", "Sum it."),
        ("x.total(y) -> int\n    Sum it.", "Sum it."),
        (".. deprecated:: 1.2\n\n    Sum it.", "Sum it."),
        ("Parameters\n    ----------\n    x : int\n\n    Other", ""),
        (">>> 1\n    1\n\n    Text", ""),
        ("", ""),
        ("Returns the value of notes: all of them.", "Returns the value of notes: all of them."),
    ],
)
def test_summaries(docstring, summary):
    assert summary_of(docstring) == summary


def test_long_summaries_end_with_a_sentence():
    text = "This is a sentence of some length. " * 40
    summary = summary_of(text)
    assert 200 < len(summary) <= 300 and summary.endswith("length.")


def test_near_copies_are_those_of_all_pairs():
    draw = random.Random(3)
    others = [frozenset(draw.sample(range(400), draw.randint(1, 60))) for _ in range(150)]
    texts = []
    for other in others:
        kept = set(draw.sample(sorted(other), max(1, int(len(other) * draw.uniform(0.7, 1)))))
        texts.append(frozenset(kept | set(draw.sample(range(400), draw.randint(0, 8)))))
    expected = {i for i, a in enumerate(texts) if any(len(a & b) / len(a | b) >= 0.8 for b in others)}
    assert 30 < len(expected) < 120
    found = near_copies(texts, others)
    assert set(found) == expected
    assert all(len(texts[i] & others[j]) / len(texts[i] | others[j]) >= 0.8 for i, j in found.items())
    five = frozenset(range(5))
    assert near_copies([five], [frozenset(range(4))]) == {0: 0}  # exactly 0.8


def test_identities():
    assert normalise(" \uff26ULL  width\n\u00df") == "full width ss"
    code = 'def f(a, b=1):\n    x = a + b  # note\n    return {"k": x}\n'
    same = "def g(a: int, b=2) -> dict:\n    x = (a +\n         b)\n    return {'k': x}\n"
    assert code_identity(code) == code_identity(same)
    assert code_identity(code) != code_identity(code.replace("a + b", "a - b"))
    assert code_identity(code) != code_identity(code.replace('"k"', '"j"'))
    assert code_tokens("def f(x): # no\n  return '#' + x") == ["def", *"(x):", "return", "#", "+", "x"]
    assert len(shingles(["a", "b"])) == 1 and len(shingles(list("abcdefg"))) == 3


def test_draws_depend_on_identity_and_seed_only():
    names = [f"p/{i}" for i in range(200)]
    order = [names[i] for i in draw_order(names, 1)]
    shuffled = random.Random(0).sample(names, 200)
    assert [shuffled[i] for i in draw_order(shuffled, 1)] == order != names
    assert [names[i] for i in draw_order(names, 2)] != order
    fewer = [name for name in names if name != order[0]]
    assert [fewer[i] for i in draw_order(fewer, 1)] == order[1:]  # an added function moves no other


def test_the_same_installation_gives_the_same_rows(tmp_path):
    train = package(tmp_path, "train", {f"m{i}.py": function(i) for i in range(30)})
    held = package(tmp_path, "held", {"a.py": function(1000)})
    cards = [make([train], [held], tmp_path / f"o{i}", max_train=10, seed=seed) for i, seed in enumerate((7, 7, 8))]
    prints = [card["train"]["fingerprint"] for card in cards]
    assert prints[0] == prints[1] != prints[2]
    assert cards[0]["train"]["dropped"]["not drawn"] == 20
    assert rows(tmp_path / "o0/train") == rows(tmp_path / "o1/train")


def test_a_finished_corpus_is_used_again_and_another_is_never_touched(tmp_path):
    train = package(tmp_path, "train", {"a.py": function(1)})
    held = package(tmp_path, "held", {"a.py": function(2)})
    out = tmp_path / "deep/out"
    first = make([train], [held], out)
    again = make([train], [held], out)
    assert first["made"] and not again["made"] and again["train"] == first["train"]
    with pytest.raises(UserError, match="exists, made with other settings"):
        make([train], [held], out, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    with pytest.raises(UserError, match="exists and is no finished corpus"):
        make([train], [held], tmp_path / "other")
    (tmp_path / "empty").mkdir()
    assert make([train], [held], tmp_path / "empty")["made"]
    shard = out / "train/shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged"):
        make([train], [held], out)


def test_one_package_on_both_sides_and_an_empty_side_are_refused(tmp_path):
    one = package(tmp_path, "one", {"a.py": function(1)})
    none = package(tmp_path, "none", {"a.py": "x = 1\n"})
    with pytest.raises(UserError, match="'one' is asked for on both sides"):
        make([one], [one], tmp_path / "out")
    with pytest.raises(UserError, match="no pairs are left for held_out from none"):
        make([one], [none], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))


def test_packages_are_found_by_import_and_distribution_name():
    [stdlib, numpy, sklearn] = find_packages(["stdlib", "numpy", "scikit-learn"])
    assert stdlib.root == Path(os.__file__).parent and stdlib.license == "PSF-2.0"
    assert numpy.license != "unknown" and numpy.version[0].isdigit()
    assert sklearn.name == "sklearn" and sklearn.root.is_dir()
    with pytest.raises(UserError, match=r"'nunpy' is no installed.*numpy") as caught:
        find_packages(["nunpy"])
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data_tools.docstrings", "--out", str(tmp_path / "out"), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run("--train", "packaging", "--held-out", "pluggy", "filelock", "--max-train", "20")
    assert done.returncode == 0, done.stderr
    assert "out/train: 20 pairs (packaging 20)" in done.stdout and "left out" in done.stdout
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert card["held_out"]["rows"] == len(rows(tmp_path / "out/held_out"))
    assert set(rows(tmp_path / "out/train")[0]) == {"anchor", "positive", "package", "path", "line", "name"}
    assert verify_shards(tmp_path / "out/train").rows == 20
    done = run("--train", "no_such_package")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="--seed: got -1"):
        main(["--out", str(tmp_path / "x"), "--seed", "-1"])


def test_shards_are_cut_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.shards._SHARD_BYTES", 100_000)
    data = [{"anchor": f"a{i}" * 20, "label": i - 500} for i in range(20_000)]
    facts = {"source": "s", "license": "MIT", "made_by": "m"}
    with ShardWriter(tmp_path / "cut", {"anchor": "text", "label": "int"}, **facts) as writer:
        for row in data:
            writer.write(row)
    manifest = verify_shards(tmp_path / "cut")
    assert len(manifest.shards) > 2 and manifest.rows == 20_000 and manifest.license == "MIT"
    assert rows(tmp_path / "cut") == data
    assert pq.ParquetFile(tmp_path / "cut/shard-00000.parquet").metadata.row_group(0).num_rows == 4096
    monkeypatch.undo()
    with ShardWriter(tmp_path / "whole", {"anchor": "text", "label": "int"}, **facts) as writer:
        for row in data:
            writer.write(row)
    assert read_manifest(tmp_path / "whole").fingerprint == manifest.fingerprint  # whatever the cut
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "dead", {"anchor": "text"}, **facts) as writer:
        writer.write({"anchor": "a"})
        raise RuntimeError
    with (
        pytest.raises(UserError, match="no rows"),
        ShardWriter(tmp_path / "none", {"anchor": "text"}, **facts),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]

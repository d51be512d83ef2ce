"""Docstring pairs: what becomes one, what is dropped and why, and that no held-out copy stays in train."""

import ast
import os
import random
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_tools import leaks, pipeline
from data_tools.config import Pipeline
from data_tools.packages import find_package, python_files
from data_tools.pairs import Pair, pairs_of, summary_of
from data_tools.shards import ShardWriter, read_manifest, verify_shards
from data_tools.split import NearCopies, forms, normalise
from launch.errors import UserError

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


def tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def make(train: Path, held: Path, out: Path, **more: Any) -> dict[str, Any]:
    """The card of a run with one folder of Python on each side."""
    code = {"pairs": "docstring-function"}
    sources = [{"path": str(held), "held_out": True, **code}, {"path": str(train), "held_out": False, **code}]
    config = {"out": str(out), "sources": sources, "workers": 1, **more}
    card = pipeline.run(Pipeline.model_validate(config))
    assert card is not None
    return card


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def names(folder: Path) -> set[str]:
    return {row["positive"].partition("(")[0].removeprefix("def ") for row in rows(folder)}


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
    last = copies["short"].replace("last", "end").replace("Give", "Hand")
    held = tree(tmp_path / "held", {"a.py": plain + function(1) + last})
    train = tree(tmp_path / "train", {f"{name}.py": text for name, text in copies.items()} | {"own.py": function(2)})
    card = make(train, held, tmp_path / "out")
    found = next(stage["dropped"] for stage in card["stages"] if stage["stage"] == "dedup")
    # All but the one that shares a summary only: those of the larger function, then of the small one.
    assert found == {"equal to an earlier pair": 1, "positive is a near-copy of an earlier one": 6}
    assert names(tmp_path / "out/train") == {"f2"}
    assert names(tmp_path / "out/held_out") == {"spread", "f1", "end"}
    # Of several copies only the first meets the search for leaks, which has to find each without the stage before it.
    texts = {name: next(pairs_of(text)) for name, text in copies.items()}
    held_out = [pair for pair in pairs_of(plain + function(1) + last) if isinstance(pair, Pair)]
    against = leaks.Evaluation.of(
        [(pair.name, text) for pair in held_out for text in (pair.anchor, pair.positive)], 13, 0.8
    )
    for name, pair in texts.items():
        assert isinstance(pair, Pair)
        assert against.leak(pair.anchor, 13) or against.leak(pair.positive, 13), name
    assert against.leak(held_out[0].positive, 13) == ("equal to a text of an evaluation set", 1)
    own = next(pairs_of(function(2)))
    assert isinstance(own, Pair) and not against.leak(own.anchor, 13) and not against.leak(own.positive, 13)


def test_a_near_copy_leaks_where_no_long_run_is_shared():
    words = [f"w{i}" for i in range(60)]
    changed = [*words[:30], "x", *words[31:]]
    against = leaks.Evaluation.of([("here", " ".join(words))], 1000, 0.8)
    assert against.leak(" ".join(changed), 1000) == ("near-copy of a text of an evaluation set", 0)  # 51 of 61 runs
    assert against.leak(" ".join([*changed[:10], "y", *changed[11:]]), 1000) is None  # 46 of 66


def documented(docstring: str, body: str = "return x + 1", head: str = "def a(x):") -> str:
    return f'{head}\n    """{docstring}"""\n    {body}\n'


def test_functions_without_use_are_counted_under_their_reason(tmp_path):
    turn = "Turn one thing into another."
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
        "file does not parse": "def a(:\n",
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
    own = tree(tmp_path / "own", {**files, **junk, "good.py": function(9)})
    held = tree(tmp_path / "held", {"a.py": function(1)})
    card = make(own, held, tmp_path / "out", read={"max_rejected": 0.2})
    dropped = {stage["stage"]: stage["dropped"] for stage in card["stages"]}
    assert dropped["read"] == {"not UTF-8": 2}
    # the function around the nested one has no docstring either
    assert dropped["pairs"] == dict.fromkeys(cases, 1) | {"no docstring": 2}
    [row] = rows(tmp_path / "out/train")
    assert row["positive"].startswith("def f9(") and row["place"].endswith("own/good.py:1")


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
        items = list(pairs_of(source))
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
    index = NearCopies(others, 0.8)
    found = {i: j for i, text in enumerate(texts) if (j := index.find(text)) is not None}
    assert set(found) == expected
    assert all(len(texts[i] & others[j]) / len(texts[i] | others[j]) >= 0.8 for i, j in found.items())
    assert NearCopies([frozenset(range(4))], 0.8).find(frozenset(range(5))) == 0  # exactly 0.8


def test_identities():
    assert normalise(" \uff26ULL  width\n\u00df") == "full width ss"
    code = 'def f(a, b=1):\n    x = a + b  # note\n    return {"k": x}\n'
    same = "def g(a: int, b=1) -> dict:\n    'Says what it does.'\n    x = (a +\n         b)\n    return {'k': x}\n"

    def compared(text: str) -> str:
        plain, form = forms(text)
        assert plain == normalise(text)
        return form

    assert compared(code) == compared(same) != normalise(code)
    assert compared(code) != compared(code.replace("a + b", "a - b"))
    assert compared(code) != compared(code.replace('"k"', '"j"'))
    assert compared("def  is no Python function") == "def is no python function"


def test_packages_are_found_by_import_and_distribution_name():
    stdlib, numpy, sklearn = map(find_package, ["stdlib", "numpy", "scikit-learn"])
    assert stdlib.root == Path(os.__file__).parent and stdlib.license == "PSF-2.0"
    assert numpy.license != "unknown" and numpy.version[0].isdigit()
    assert sklearn.root.name == "sklearn" and sklearn.root.is_dir()
    with pytest.raises(UserError, match=r"'nunpy' is no installed.*numpy") as caught:
        find_package("nunpy")
    assert "\n" not in str(caught.value)


def test_installed_packages_are_sources_and_each_side_names_its_own(tmp_path):
    sides = {"train": "packaging", "held_out": "filelock"}
    sources = [
        {"path": f"package:{name}", "pairs": "docstring-function", "held_out": side == "held_out"}
        for side, name in sides.items()
    ]
    card = pipeline.run(Pipeline.model_validate({"out": str(tmp_path / "out"), "sources": sources, "workers": 1}))
    for number, (side, name) in enumerate(sides.items()):
        manifest, package = read_manifest(tmp_path / "out" / side), find_package(name)
        assert manifest.source == f"package:{name} {package.version}" and manifest.license == package.license
        assert {row["document"].partition("#")[0] for row in rows(tmp_path / "out" / side)} == {f"package:{name}"}
        assert card and card["sources"][number]["name"] == manifest.source
        lost = [reason for stage in card["stages"] for reason in stage["dropped"].items()]
        assert lost and manifest.dropped == dict(lost)
        assert card["sources"][number]["license"] == package.license
        assert card["sources"][number]["read"] == len(python_files(package.root))


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

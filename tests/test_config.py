"""Run files: every error with its place, YAML 1.2, overrides, round trip, and all files under configs/."""

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config import RunConfig
from launch.errors import UserError
from launch.reader import read_run, resolved_yaml, run_directory, run_name, schema

ROOT = Path(__file__).parents[1]
GOOD = """\
model:
  path: owner/name
data:
  sources:
    - path: rows.jsonl
    - hub: owner/rows
train:
  global_batch_size: 64
"""


def _write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _lines(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The lines of the error, without the name of the file."""
    path = _write(folder, text)
    with pytest.raises(UserError) as caught:
        read_run(path, overrides)
    return [line.replace(f"{path}", "FILE") for line in str(caught.value).splitlines()]


def test_defaults_and_values(tmp_path: Path) -> None:
    run = read_run(_write(tmp_path, GOOD.replace("64", "64\n  learning_rate: 2e-5\n  epochs: 3\n  warmup_steps: 10")))
    assert run.train.learning_rate == 2e-5
    assert run.train.epochs == 3.0
    assert run.train.warmup_steps == 10
    assert isinstance(run.train.warmup_steps, int)
    assert run.loss.name == "CachedMultipleNegativesRankingLoss"
    assert [s.name for s in run.data.sources] == ["rows.jsonl", "hub:owner/rows"]
    assert run.evaluate is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("'12'", "12"),
        ("ON", "ON"),
    ],
)
def test_yaml_1_2_reads_as_text(tmp_path: Path, text: str, value: str) -> None:
    assert read_run(_write(tmp_path, GOOD), [f"model.path={text}"]).model.path == value


def test_all_errors_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = """\
model: {path: 12, max_seq_length: 1_000, trust_remote_code: yes, pooling: clss}
data:
  sources:
    - {path: a.csv, hub: x/y}
    - path: b.csv
      columns: {anker: a}
train:
  learing_rate: 1
  global_batch_size: 12x
  epochs: true
  warmup_steps: a
  max_steps: "10"
  max_seq_length: 3
  seed: 7
  seed: 8
  gradient_accumulation_steps: 4
checkpoint: null
evaluate: {}
"""
    assert _lines(tmp_path, text) == [
        "FILE:1: model.path: got 12 (int), allowed: text, not empty; put quotes around it if it is text",
        "FILE:1: model.trust_remote_code: got 'yes' (str), allowed: true or false; "
        "YAML 1.2 reads yes as text, write true",
        "FILE:1: model.max_seq_length: got '1_000' (str), allowed: integer >= 2 and <= 1000000 or null; "
        "write 1000 (YAML 1.2 has no separators in numbers)",
        "FILE:1: model.pooling: got 'clss' (str), allowed: one of mean, cls, max, lasttoken, weightedmean or null; "
        "did you mean cls?",
        "FILE:4: data.sources.0: give exactly one of path and hub",
        "FILE:6: data.sources.1.columns: 'anker' is no role; allowed: anchor, positive, negative, negative_1, "
        "negative_2 ..., score, label",
        "FILE:8: train.learing_rate: unknown key; did you mean learning_rate?",
        "FILE:9: train.global_batch_size: got '12x' (str), allowed: integer >= 1",
        "FILE:10: train.epochs: got true, allowed: number > 0",
        "FILE:11: train.warmup_steps: got 'a' (str), allowed: number >= 0",
        "FILE:12: train.max_steps: got '10' (str), allowed: integer >= 1 or null; write 10 (without quotes)",
        "FILE:13: train.max_seq_length: unknown key; did you mean model.max_seq_length?",
        "FILE:15: train.seed: this key stands here twice",
        "FILE:16: train.gradient_accumulation_steps: unknown key; it adds no negatives to a contrastive batch; "
        "set train.global_batch_size",
        "FILE:17: checkpoint: got null, allowed: a section with every, keep, remote",
        "FILE:18: evaluate: give exactly one of sources and beir",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "FILE: the file is empty"),
        (b"# only a comment\n", "FILE: the file is empty"),
        (b"- 1\n", "FILE:1: got \\[1\\] \\(list\\), allowed: sections"),
        (b"hello", "FILE:1: got 'hello' \\(str\\), allowed: sections"),
        (b"model:\n\tpath: x\n", "FILE:2: broken YAML: .*never with tabs"),
        (b"a: [1, 2\n", "FILE:1: broken YAML: "),
        (b"a: b: c\n", "FILE:1: broken YAML: mapping values are not allowed here"),
        (b"x: 1\ny: 'abc\n", "FILE:2: broken YAML: "),
        (b"model:\n  path: \xe9t\xe9\n", "FILE:2: got byte 0xe9, allowed: UTF-8 text"),
        (b"model: \x00", "FILE:1: broken YAML: "),
        (b"---\na: 1\n---\nb: 2\n", r"FILE:3: got a second document \(---\), allowed: one"),
        (b"a: " + b"[" * 50_000, "FILE:1: nested deeper than 20 levels"),
        (b"? [a]\n: 3\n", "FILE:1: a key must be text"),
        (b"x" * 1_000_001, "FILE: got 1,000,001 bytes, allowed: a run file of up to 1,000,000"),
    ],
)
def test_broken_files_have_one_line(tmp_path: Path, text: bytes, expected: str) -> None:
    [line] = _lines(tmp_path, text)
    assert re.match(expected, line), line


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("&a 3", "anchors (&) and aliases (*) are not read; write the value out"),
        ("*a", "anchors (&) and aliases (*) are not read; write the value out"),
        ("!!python/object:os.system x", "tags are not read, got tag:yaml.org,2002:python/object:os.system"),
        (".nan", "got '.nan', allowed: a finite number"),
        ("1e999", "got '1e999', allowed: a finite number"),
        ('"\\ud800"', "got half of a surrogate pair"),
    ],
)
def test_refused_values(tmp_path: Path, value: str, expected: str) -> None:
    [line] = _lines(tmp_path, GOOD + f"  seed: {value}\n")
    assert line.startswith(f"FILE:9: train.seed: {expected}")


def test_missing_sections_and_null_sections(tmp_path: Path) -> None:
    assert [line.split(";")[0] for line in _lines(tmp_path, "model:\ntrain: {seed: 1}\n")] == [
        "FILE:1: model: got null, allowed: a section with path, revision, trust_remote_code, max_seq_length, "
        "max_query_length, prompts ...",
        "FILE:1: data: required and missing",
        "FILE:2: train.global_batch_size: required and missing",
    ]


def test_files_that_are_no_files(tmp_path: Path) -> None:
    good = _write(tmp_path, GOOD)
    with pytest.raises(UserError, match=re.escape(f"no such file; did you mean {good}")):
        read_run(tmp_path / "rum.yaml")
    with pytest.raises(UserError, match="cannot read a run file from it: Is a directory"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"the folder .*/nowhere does not exist"):
        read_run(tmp_path / "nowhere" / "run.yaml")


def test_overrides(tmp_path: Path) -> None:
    run = read_run(
        _write(tmp_path, GOOD),
        [
            "train.seed=7",
            "train.seed=8",
            "data.sources.0.path=other.jsonl",
            "loss.arguments={scale: 30.0}",
            "loss.dims=[64, 32]",
            "loss.dims.1=16",
            "evaluate.sources=[{path: held.jsonl}]",
            "evaluate.max_queries=",
            "model.prompts.query='query: '",
            "train.max_grad_norm=null",
        ],
    )
    assert run.train.seed == 8
    assert run.data.sources[0].path == "other.jsonl"
    assert run.loss.arguments == {"scale": 30.0}
    assert run.loss.dims == [64, 16]
    assert run.evaluate is not None
    assert run.evaluate.max_queries is None
    assert run.model.prompts.query == "query: "
    assert run.train.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "allowed: section.key=value, for example train.seed=7"),
        ("train..seed=1", "allowed: section.key=value, for example train.seed=7"),
        ("trian.seed=3", "trian: unknown key; did you mean train?"),
        ("train.sed=3", "train.sed: unknown key; did you mean seed?"),
        ("train.seed=x", "train.seed: got 'x' (str), allowed: integer >= 0 and < 4294967296"),
        ("train.seed=[", "broken YAML: while parsing a flow node expected the node content"),
        ("data.sources.7.path=x", "got 7, allowed: a number from 0 to 1"),
        ("model.path.x=3", "nothing is below 'owner/name' (str)"),
        (
            "model.prompts.query=query: ",
            "model.prompts.query: got a mapping, allowed: text or null; put quotes",
        ),
        ("evaluate.max_queries=3", "evaluate: give exactly one of sources and beir"),
        ("loss.arguments={scale: 1, scale: 2}", "scale: this key stands here twice"),
    ],
)
def test_override_errors_name_the_override(tmp_path: Path, override: str, message: str) -> None:
    [line] = _lines(tmp_path, GOOD, override)
    assert line.startswith(f"override {override!r}: {message}")


def test_errors_of_file_and_overrides_come_together(tmp_path: Path) -> None:
    lines = _lines(tmp_path, GOOD.replace("64", "x"), "train.seed=-1", "model.path=")
    assert [line.split(":")[0] for line in lines] == [
        "FILE",
        "override 'train.seed=-1'",
        "override 'model.path='",
    ]
    assert _lines(tmp_path, GOOD.replace("64", "x"), "train.seed=-1", "train.global_batch_size=8") == [
        "override 'train.seed=-1': train.seed: got -1 (int), allowed: integer >= 0 and < 4294967296"
    ]


def test_remote_code_needs_a_pinned_commit(tmp_path: Path) -> None:
    [line] = _lines(tmp_path, GOOD, "model.trust_remote_code=true", "model.revision=main")
    assert "pin model.revision to a 40-digit commit, got 'main'" in line
    read_run(_write(tmp_path, GOOD), ["model.trust_remote_code=true", f"model.revision='{'0' * 40}'"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.sources.0.weight=2"],
            "data: hub:owner/rows has no weight and others have; give every source one, or n",
        ),
        (
            ["data.sources.0.weight=2", "data.sources.1.weight=1"],
            "data: got weights without epoch_steps; allowed: a weight for every source and epoch_steps, or neither",
        ),
        (
            ["data.sources.0.weight=2", "data.sources.1.weight=1", "data.epoch_steps=5", "data.sources.0.epoch_rows=8"],
            "has a weight and epoch_rows; its weight and epoch_steps say how much is read",
        ),
        (
            ["data.sources.0.epoch_rows=8", "loss.step=library"],
            "data.sources[].epoch_rows: for the exact step only; allowed with loss.step=exact",
        ),
        (["data.epoch_steps=5"], "data: got epoch_steps without weights; allowed: a weight for every source"),
        (["data.sources.0.weight=0"], "data.sources.0.weight: got 0 (int), allowed: number > 0 or null"),
        (
            ["data.sources.0.prompts.query='q: '", "loss.step=library"],
            "data.sources[].prompts: for the exact step only; allowed with loss.step=exact",
        ),
        (
            ["data.sources=[{path: a.csv, weight: 1}]", "data.epoch_steps=3", "loss.name=CoSENTLoss"],
            "data.epoch_steps: for the exact step only",
        ),
        (
            ["data.known_positives=[{path: a.csv}]", "loss.step=library"],
            "data.known_positives: for the exact step only; allowed with loss.step=exact",
        ),
        (
            ["data.known_positives=[{path: a.csv}]", "loss.mask_known_positives=false"],
            "data.known_positives: has no effect with loss.mask_known_positives=false; leave one out",
        ),
        (
            ["data.sources.0.path=http://host/a.csv"],
            "data.sources.0.path: got 'http://host/a.csv', allowed: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://",
        ),
        (
            ["checkpoint.remote=file://runs/one"],
            "checkpoint.remote: got 'file://runs/one', allowed: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, "
            "az://CONTAINER/PREFIX, file:///FOLDER",
        ),
        (["checkpoint.remote=s3://key:secret@bucket/x"], "checkpoint.remote: got 's3://...@bucket/x', allowed"),
        (["data.cache_url=bucket/cache"], "data.cache_url: got 'bucket/cache', allowed: s3://BUCKET/PREFIX"),
        (["evaluate.sources=[{path: a.csv, weight: 1}]"], "evaluate.sources.0.weight: unknown key"),
        (
            ["evaluate={sources: [{path: a.csv}], vectors: [float32], gate: [{vectors: int8, keeps: 0.9}]}"],
            "evaluate.gate: got vectors int8 of the set domain, allowed: float32",
        ),
        (
            [
                "evaluate={sources: [{path: a.csv}], general: {sources: [{path: b.csv}]}, "
                "gate: [{set: general, vectors: binary, keeps: 0.9}]}"
            ],
            "evaluate.gate: got vectors binary of the set general, allowed: float32",
        ),
    ],
)
def test_weights_and_prompts_of_sources(tmp_path: Path, overrides: list[str], message: str) -> None:
    [line] = _lines(tmp_path, GOOD, *overrides)
    assert message in line
    weights = ["data.sources.0.weight=2", "data.sources.1.weight=0.5", "data.epoch_steps=3"]
    run = read_run(_write(tmp_path, GOOD), weights)
    assert [source.weight for source in run.data.sources] == [2.0, 0.5]


def test_names(tmp_path: Path) -> None:
    run = read_run(_write(tmp_path, GOOD))
    assert run_name(Path("configs/a.b.yaml")) == "a.b"
    assert run_directory(run, Path("configs/demo.yaml")) == Path("runs/demo")
    run = read_run(_write(tmp_path, GOOD), ["train.run_dir=/x/y"])
    assert run_directory(run, Path("configs/demo.yaml")) == Path("/x/y")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/recipes/*.yaml")) + sorted(ROOT.glob("configs/demo.yaml")))
def test_every_run_file_parses_and_round_trips(path: Path, tmp_path: Path) -> None:
    run = read_run(path)
    assert read_run(_write(tmp_path, resolved_yaml(run))) == run


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text(string.printable, max_size=8)
_WORDS = st.sampled_from(
    ["yes", "null", "~", "1_0", "0o7", "0x1f", "1e5", ".5", ".nan", "-.inf", "-", "? x", "a: b", "#c", "&a", "*a"]
)
_NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none()
_VALUES = st.recursive(_TEXT | _WORDS | _NUMBERS, lambda v: st.lists(v) | st.dictionaries(_TEXT, v), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(_TEXT | _WORDS, _VALUES),
    _TEXT | _WORDS,
    st.lists(_TEXT.filter(bool), min_size=1, max_size=3),
)
def test_resolved_yaml_reads_back_equal(tmp_path_factory, arguments, prompt, paths) -> None:
    run = RunConfig.model_validate(
        {
            "model": {"path": "x", "prompts": {"query": prompt}},
            "data": {"sources": [{"path": path} for path in paths]},
            "loss": {"arguments": arguments},
            "train": {"global_batch_size": 8},
        }
    )
    assert read_run(_write(tmp_path_factory.mktemp("round"), resolved_yaml(run))) == run


def test_schema_describes_every_field() -> None:
    whole = json.loads(json.dumps(schema()))
    assert whole["$schema"].startswith("https://json-schema.org/")
    assert set(whole["properties"]) == set(RunConfig.model_fields)
    for section in (whole, *whole["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, name

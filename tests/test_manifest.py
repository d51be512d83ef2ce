"""The schema of manifest.json against the jsonschema package, a real bundle, and what the encoder accepts."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator

from launch.errors import CheckFailed
from tests.bundles import change_somewhere
from trainer.export.encoder import read_manifest

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "trainer/export/manifest.schema.json").read_text())


@pytest.fixture
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


def test_a_real_manifest_fits_the_schema_which_names_each_of_its_fields(bundle: Path):
    Draft202012Validator.check_schema(SCHEMA)
    manifest = json.loads((bundle / "manifest.json").read_text())
    Draft202012Validator(SCHEMA).validate(manifest)
    assert set(manifest) == set(SCHEMA["properties"])


def test_the_guide_names_every_field_and_every_file(bundle: Path):
    guide = (ROOT / "docs/bundle.md").read_text()
    files = {path.relative_to(bundle).parts[0] for path in bundle.rglob("*") if path.is_file()}
    assert [name for name in (*SCHEMA["properties"], *files) if f"`{name}" not in guide] == []


BROKEN: list[tuple[str, Any]] = [
    ("format", "nestling-bundle/2"), ("width", 0), ("dims", []), ("dims", [0]), ("prompts", {"query": ""}),
    ("model_fingerprint", "ab"), ("onnx", {}), ("onnx", {"fp32": "../x.onnx"}), ("files", {"../x": {}}),
    ("max_length", {"query": 1, "document": 9}), ("data", [{"name": "x"}]), ("base_model", {"name": "x"}),
    ("tokenizer", {"pad_id": 0, "padding_side": "up", "truncation_side": "left"}),
]  # fmt: skip


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_broken_manifests_fail_both(bundle: Path, tmp_path: Path, change: tuple[str, Any]):
    manifest = json.loads((bundle / "manifest.json").read_text()) | {change[0]: change[1]}
    assert not Draft202012Validator(SCHEMA).is_valid(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckFailed, match=rf"^manifest.json: [\w ]*{change[0]}"):
        read_manifest(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_encoder_reads_the_schema_as_jsonschema_does(bundle: Path, tmp_path: Path, data: st.DataObject):
    manifest = json.loads((bundle / "manifest.json").read_text())
    change_somewhere(manifest, data)
    text = json.dumps(manifest)
    (tmp_path / "manifest.json").write_text(text)
    try:
        read_manifest(tmp_path)
        accepted = True
    except CheckFailed as error:
        accepted = "dims are" in str(error)  # dims against width is beyond the schema's words
    # JSON Schema takes 32.0 for an integer and lets `$` stand before a last line break; neither is let in here.
    stricter = re.search(r"\d\.0\b|\de[+-]?\d|\\n\"", text) is not None
    valid = Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    assert accepted == valid or (stricter and valid)


def test_the_schema_is_in_the_wheel(tmp_path: Path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "data", "cache", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), source]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert json.loads(wheel.read("trainer/export/manifest.schema.json")) == SCHEMA

"""Licences in SPDX form and the bill of materials, against the official CycloneDX schema and pip's own list."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from license_expression import get_spdx_licensing
from packageurl import PackageURL

from data_tools.packages import spdx_license
from launch.config import Model
from launch.files import sha256_of
from trainer.export.card import model_card
from trainer.export.cli import read_license

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture
def sbom(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "sbom.cdx.json").read_text())


def test_the_official_schema_and_reader_take_it(bundle: Path, sbom: dict[str, Any]):
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str((bundle / "sbom.cdx.json").read_text()) is None
    assert validator.validate_str((bundle / "sbom.cdx.json").read_text().replace("SHA-256", "SHA-0")) is not None
    read: Any = Bom.from_json(sbom)  # type: ignore[attr-defined]
    assert len(read.components) == len(sbom["components"]) and read.metadata.component.type == "machine-learning-model"
    assert read.validate()


def test_it_names_the_model_its_base_and_its_data(bundle: Path, sbom: dict[str, Any]):
    model = sbom["metadata"]["component"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert model["type"] == "machine-learning-model" and model["version"] == manifest["model_fingerprint"]
    hashes = {part["name"]: part["hashes"][0]["content"] for part in model["components"]}
    assert {"model.safetensors", "onnx/model.onnx", "tokenizer.json"} <= hashes.keys()
    assert hashes == {name: sha256_of(bundle / name) for name in hashes}
    (base,) = model["pedigree"]["ancestors"]
    assert (base["name"], base["version"], base["licenses"]) == ("owner/name", "c0ffee", [{"expression": "MIT"}])
    data = {part["bom-ref"]: part for part in sbom["components"] if part["type"] == "data"}
    assert [part["name"] for part in data.values()] == ["own", "law", "chat"]
    assert [part["licenses"] for part in data.values()] == [
        [{"license": {"name": "unknown"}}], [{"expression": "CC-BY-4.0"}], [{"expression": "LicenseRef-llama3.1"}],
    ]  # fmt: skip
    assert [part["ref"] for part in model["modelCard"]["modelParameters"]["datasets"]] == list(data)


def test_it_lists_the_packages_that_pip_lists(sbom: dict[str, Any]):
    command = [sys.executable, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    packages = [part for part in sbom["components"] if part["type"] == "library"]
    urls = [PackageURL.from_string(part["purl"]) for part in packages]
    expected = {PackageURL("pypi", None, package["name"], package["version"]) for package in listed}
    assert set(urls) == expected and len(urls) == len(expected)
    (torch,) = [part for part in packages if part["name"] == "torch"]
    assert torch["bom-ref"] in sbom["dependencies"][0]["dependsOn"]


def test_another_process_gives_the_same_bytes(bundle: Path):
    program = (
        "import json, sys; from pathlib import Path; from launch.files import list_files\n"
        "from trainer.export.sbom import bill_of_materials\n"
        "folder = Path(sys.argv[1]); manifest = json.loads((folder / 'manifest.json').read_text())\n"
        "late = ('manifest.json', 'manifest.sha256', 'sbom.cdx.json')\n"
        "files = {name: entry for name, entry in list_files(folder).items() if name not in late}\n"
        "print(json.dumps(bill_of_materials(manifest, files), indent=1, ensure_ascii=False))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, str(bundle)]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert done.stdout == (bundle / "sbom.cdx.json").read_bytes()


NAMES = {
    "mit": "MIT", "apache-2.0": "Apache-2.0", "Apache-2.0": "Apache-2.0", "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "mit OR apache-2.0": "MIT OR Apache-2.0", "unlicense": "Unlicense", "bsd-3-clause": "BSD-3-Clause",
    "llama3.1": "LicenseRef-llama3.1", "other": "LicenseRef-other", "gemma": "LicenseRef-gemma",
    "Apache 2.0, see the file": "LicenseRef-Apache-2.0-see-the-file", "openrail++": "LicenseRef-openrail",
    "['mit', 'apache-2.0']": "LicenseRef-mit-apache-2.0", "licenseref-own": "LicenseRef-own",
    "unknown": "unknown", "": "unknown",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_licences_become_spdx(name: str):
    found = spdx_license(name)
    assert found == NAMES[name]
    if found != "unknown" and "LicenseRef" not in found:
        assert get_spdx_licensing().validate(found, strict=True).errors == []
    assert spdx_license(found) == found


def test_the_card_s_header_is_the_hub_s(bundle: Path):
    assert ModelCard.load(bundle / "README.md").data.license == "mit"
    text = (bundle / "README.md").read_text()
    assert (
        "Base model: MIT." in text and "| own | 3 | unknown |" in text and "| chat | 7 | LicenseRef-llama3.1 |" in text
    )
    certificate = json.loads((bundle / "parity.json").read_text())
    for license, header, name in (
        ("LicenseRef-llama3.1", "other", "llama3.1"),
        ("MIT AND Apache-2.0", "other", "mit-and-apache-2.0"),
        ("unknown", None, None),
    ):
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["base_model"]["license"] = license
        card = ModelCard(model_card(manifest, certificate))
        assert (card.data.license, card.data.to_dict().get("license_name")) == (header, name)
        assert f"Base model: {license}." in card.text


CARDS = {
    "license: mit": "mit", "license: 'apache-2.0' # free": "apache-2.0", "license: other\nlicense_name: own": "own",
    "license: other": "other", "tags: [a]": "unknown", "license: [mit, gpl-3.0]": "['mit', 'gpl-3.0']",
    "license: {": "unknown", "- a": "unknown", "": "unknown",
}  # fmt: skip


@pytest.mark.parametrize("header", CARDS)
def test_the_licence_of_the_base_model_s_card(tmp_path: Path, header: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# license: no\n")
    assert read_license(Model(path=str(tmp_path))) == CARDS[header]
    (tmp_path / "README.md").unlink()
    assert read_license(Model(path=str(tmp_path))) == "unknown"


def test_packages_of_a_corpus_keep_each_licence():
    assert spdx_license("(MIT OR Apache-2.0) AND PSF-2.0 AND LicenseRef-unknown").startswith("(MIT OR Apache-2.0) AND")

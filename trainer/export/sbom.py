"""What made a bundle, as a CycloneDX 1.6 bill of materials (sbom.cdx.json) that inventory and audit tools read.

Nothing in it is drawn or timed, so the same model exported in the same environment gives the same bytes.
"""

import importlib.metadata
from typing import Any
from urllib.parse import quote

from data_tools.packages import spdx_license

SBOM = "sbom.cdx.json"


def bill_of_materials(manifest: dict[str, Any], files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The model with the hashes of its `files`, its base model, its data and every Python package installed here."""
    base, name = manifest["base_model"], manifest["run_id"] or manifest["base_model"]["name"]
    data = [
        _part("data", source["name"], source["fingerprint"], source["license"], f"data:{number}")
        | {"data": [{"type": "dataset", "name": source["name"]}]}
        for number, source in enumerate(manifest["data"])
    ]
    model = _part("machine-learning-model", name, manifest["model_fingerprint"], base["license"], "model") | {
        "pedigree": {"ancestors": [_part("machine-learning-model", base["name"], base["revision"], base["license"])]},
        "modelCard": {
            "modelParameters": {"task": "sentence-similarity", "datasets": [{"ref": part["bom-ref"]} for part in data]}
        },
        "components": [
            {"type": "file", "name": path, "hashes": [{"alg": "SHA-256", "content": entry["sha256"]}]}
            for path, entry in files.items()
        ],
    }
    parts = data + _packages()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def _packages() -> list[dict[str, Any]]:
    found = {}
    for distribution in importlib.metadata.distributions():
        facts: Any = distribution.metadata  # an email.message.Message
        name = facts["Name"].lower().replace("_", "-")  # as package URLs have it
        purl = f"pkg:pypi/{name}@{quote(distribution.version, safe='')}"
        part = _part("library", name, distribution.version, spdx_license(facts.get("License-Expression")), purl)
        found.setdefault(purl, part | {"purl": purl})
    return [found[purl] for purl in sorted(found)]


def _part(kind: str, name: str, version: str | None, license: str, reference: str | None = None) -> dict[str, Any]:
    """A component; what is not known is left out, but of a licence it is said."""
    stated = {"license": {"name": "unknown"}} if license == "unknown" else {"expression": license}
    part = {"type": kind, "bom-ref": reference, "name": name, "version": version, "licenses": [stated]}
    return {key: value for key, value in part.items() if value is not None}

"""The model card of a bundle (README.md): what it is, how to load it, how good it is, which licences."""

import json
from pathlib import Path
from typing import Any

import jinja2

from trainer.export.encoder import KINDS


def model_card(manifest: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Markdown with the YAML header that the Hugging Face hub reads, made from the manifest alone."""
    results: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in manifest["metrics"]:
        text = f"{row['value']:.4f}"
        if row.get("ci95"):
            text += f" [{row['ci95'][0]:.4f}, {row['ci95'][1]:.4f}]"
        results.setdefault((row["model"], row["artifact"], row["dim"]), {})[row["metric"]] = text
    base = manifest["base_model"]["name"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["json"] = json.dumps
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        manifest,
        certificate=certificate,
        kinds=KINDS,
        # The hub knows owner/name; a folder or a package would be a broken link there.
        on_hub=base.count("/") == 1 and not base.startswith((".", "/", "package:")),
        metric_names=list(dict.fromkeys(row["metric"] for row in manifest["metrics"])),
        results=results,
    )

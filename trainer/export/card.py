"""The model card of a bundle (README.md): what it is, how to load it, how good it is, which licences."""

import json
from pathlib import Path
from typing import Any

import jinja2

from trainer.evaluation import MAIN_METRIC
from trainer.export.encoder import KINDS
from trainer.figures import of_files, rows_by_dim


def model_card(manifest: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Markdown with the YAML header that the Hugging Face hub reads, made from the manifest alone."""
    base = manifest["base_model"]["name"]
    judged = of_files(manifest["metrics"])
    evaluated = [entry for entry in manifest["metrics"] if entry not in judged]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["json"] = json.dumps
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        manifest,
        certificate=certificate,
        kinds=KINDS,
        # The hub knows owner/name; a folder or a package would be a broken link there.
        on_hub=base.count("/") == 1 and not base.startswith((".", "/", "package:")),
        metric=MAIN_METRIC,
        judged=judged,
        evaluated=evaluated,
        rows=rows_by_dim({"results": evaluated, "comparisons": manifest["comparisons"]}),
    )

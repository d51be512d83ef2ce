"""The model card of a bundle (README.md): what it is, how to load it, how good it is, which licences."""

import json
from typing import Any

from trainer.export.encoder import KINDS


def model_card(manifest: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Markdown with the YAML header that the Hugging Face hub reads, made from the manifest alone."""
    base = manifest["base_model"]
    header = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    # The hub knows owner/name; a folder or a package would be a broken link there.
    if base["name"].count("/") == 1 and not base["name"].startswith((".", "/", "package:")):
        header.append(f"base_model: {json.dumps(base['name'])}")
    if base["license"] != "unknown":
        header.append(f"license: {json.dumps(base['license'])}")
    header += ["tags: [sentence-transformers, feature-extraction, onnx, nestling]", "---", ""]
    dims = ", ".join(map(str, manifest["dims"]))
    small = manifest["dims"][-1]
    revision = f", revision {base['revision']}" if base["revision"] else ""
    parts = [
        "# Text embedding model",
        f"Fine-tuned from `{base['name']}`{revision} with nestling; run `{manifest['run_id']}`."
        if manifest["run_id"]
        else f"Exported from `{base['name']}`{revision} with nestling.",
        f"Embeddings have {manifest['width']} dimensions and length 1; compare them by dot product. "
        f"They may be cut to the first {dims} components if they are then scaled to length 1 again.",
        _inputs(manifest),
        "## Use",
        "With onnxruntime, numpy and tokenizers only (`pip install nestling`):",
        "```python\nfrom trainer.export.encoder import Encoder\n\n"
        'encoder = Encoder("PATH/OF/THIS/FOLDER")\n'
        'queries = encoder.encode(["a question"], kind="query")\n'
        'documents = encoder.encode(["a passage that answers it"], kind="document")\n'
        "similarity = queries @ documents.T\n"
        f'small = encoder.encode(["a passage that answers it"], dim={small})\n```',
        "With sentence-transformers:",
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("PATH/OF/THIS/FOLDER")\n'
        'queries = model.encode_query(["a question"])\n'
        'documents = model.encode_document(["a passage that answers it"])\n'
        "similarity = model.similarity(queries, documents)\n```",
        f"Any other runtime: `{manifest['onnx']['fp32']}` takes int64 {', '.join(manifest['inputs'])} "
        "[batch, sequence] and gives float32 token_embeddings and sentence_embedding (pooled, length 1).",
        "Check the folder with `python -m trainer.export.verify PATH/OF/THIS/FOLDER`.",
    ]
    parts += _numbers(manifest["metrics"])
    worst = max(certificate["max_abs_by_dim"].values())
    parts += [
        "## Parity",
        f"onnxruntime differs from PyTorch by at most {worst:.1e} per component over "
        f"{len(certificate['cases'])} cases and all dims "
        f"(allowed {certificate['bound']:.0e}); parity.json lists them.",
        *_licences(manifest),
    ]
    return "\n".join(header) + "\n\n".join(parts) + "\n"


def _inputs(manifest: dict[str, Any]) -> str:
    lines = ["| input | prompt before the text | longest, tokens |", "|---|---|---|"]
    for kind in KINDS:
        prompt = f"`{json.dumps(manifest['prompts'][kind])}`" if manifest["prompts"][kind] else "none"
        lines.append(f"| {kind} | {prompt} | {manifest['max_length'][kind]} |")
    return "\n".join(lines)


def _numbers(metrics: list[dict[str, Any]]) -> list[str]:
    """One table: a line per model, artifact and dim, a column per metric."""
    if not metrics:
        return ["## Quality", "No retrieval evaluation was made for this model."]
    names = list(dict.fromkeys(row["metric"] for row in metrics))
    table: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in metrics:
        text = f"{row['value']:.4f}"
        if row.get("ci95"):
            text += f" [{row['ci95'][0]:.4f}, {row['ci95'][1]:.4f}]"
        table.setdefault((row["model"], row["artifact"], row["dim"]), {})[row["metric"]] = text
    lines = [f"| model | artifact | dim | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for (model, artifact, dim), values in table.items():
        lines.append(f"| {model} | {artifact} | {dim} | {' | '.join(values.get(n, '') for n in names)} |")
    size = f"{metrics[0].get('queries')} held-out queries over {metrics[0].get('documents')} documents"
    return ["## Quality", f"Retrieval on {size}, with 95 % intervals:", "\n".join(lines)]


def _licences(manifest: dict[str, Any]) -> list[str]:
    base = manifest["base_model"]
    parts = ["## Licences and data", f"Base model: {base['license']}."]
    if manifest["data"]:
        lines = ["| trained on | rows | licence | fingerprint |", "|---|---|---|---|"]
        for source in manifest["data"]:
            licence = source.get("license") or "unknown"
            lines.append(f"| {source['name']} | {source['rows']} | {licence} | `{source['fingerprint']}` |")
        parts.append("\n".join(lines))
    return parts

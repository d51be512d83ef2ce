"""Write the bundle: ONNX graph, PyTorch weights, tokenizer, manifest, certificate and model card.

Everything is written to a partial folder beside the target and renamed only after the parity gate has passed,
so a folder with the final name is always a whole bundle. The layout is the one that onnxruntime,
sentence-transformers, fastembed and text-embeddings-inference load as it is.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from launch.errors import UserError
from launch.files import list_files, new_folder, sha256_of, write_json
from trainer.export.card import model_card
from trainer.export.encoder import FORMAT, KINDS, MANIFEST, TOKENIZER
from trainer.export.onnx import OUTPUTS, check_exportable, export_onnx, input_names, pipeline_copy
from trainer.export.parity import check_parity
from trainer.export.verify import PARITY, SEAL
from trainer.model import position_limit

# Precision -> file; a further precision is a further line here and a file that passes its own gate.
ONNX_FILES = {"fp32": "onnx/model.onnx"}
# What a tokenizer remembers of its last call or of the machine that saved it; none of it is ours to publish.
_TOKENIZER_LEFTOVERS = (
    "max_length",
    "stride",
    "truncation_strategy",
    "pad_to_multiple_of",
    "is_local",
    "local_files_only",
    "name_or_path",
)


@dataclass(frozen=True)
class BundleFacts:
    """What a bundle says about its model and cannot be read from the model itself."""

    base_model: str
    """Folder, hub name or package that training started from."""
    base_revision: str | None
    """Its commit, where it has one."""
    license: str
    """SPDX identifier of the base model's licence, or "unknown"."""
    prompts: dict[str, str]
    """query, document: text before every input of that kind, "" for none."""
    max_length: dict[str, int]
    """query, document: longest input in tokens, prompt and special tokens included."""
    dims: list[int]
    """Dimensions that embeddings may be cut to; the full width is always among them."""
    run_id: str | None = None
    """Key `run_id` of the run's run.json; None for a model that no run of nestling made."""
    data: list[dict[str, Any]] = field(default_factory=list)
    """{name, fingerprint, rows, license} of every source that the model was trained on."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """`results` of evaluation.json."""
    opset: int = 18
    """ONNX operator set."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version that made model and graph."""


def export_bundle(model: SentenceTransformer, out: Path, facts: BundleFacts) -> Path:
    """Publish `model` as the folder `out` and return it; `model` itself stays as it is.

    Raises UserError if `out` exists, a fact does not fit the model or a module cannot be exported, and
    CheckFailed if onnxruntime does not agree with PyTorch. In each case nothing is left behind.
    """
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already, allowed: a new folder; choose another --out or remove it")
    check_exportable(model)
    _check_lengths(model, facts.max_length)
    try:
        with new_folder(out) as partial:
            _write(pipeline_copy(model), partial, facts)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return out


def _write(twin: SentenceTransformer, folder: Path, facts: BundleFacts) -> None:
    width = twin.get_embedding_dimension()
    assert width is not None
    dims = sorted({width, *facts.dims}, reverse=True)
    if dims[0] > width or dims[-1] < 1:
        raise UserError(f"dims: got {facts.dims}, the model has {width}; allowed: 1 to {width}")
    twin.prompts.update(facts.prompts)
    longest = max(facts.max_length.values())
    encoder: Any = twin[0]
    twin.max_seq_length = longest
    for kind in KINDS:
        setattr(encoder, f"{kind}_length", length if (length := facts.max_length[kind]) < longest else None)
    twin.save(str(folder), create_model_card=False)
    _one_length(folder, encoder.tokenizer, longest)
    for name in ONNX_FILES.values():
        export_onnx(twin, folder / name, facts.opset)
    manifest = _manifest(twin, facts, dims)
    # The gate reads prompts, lengths and padding from the manifest, as every user of the bundle will.
    write_json(folder / MANIFEST, {**manifest, "files": {TOKENIZER: {"bytes": 0, "sha256": ""}}})
    certificate = check_parity(twin, folder, dims)
    write_json(folder / PARITY, certificate)
    (folder / "README.md").write_text(model_card(manifest, certificate), encoding="utf-8")
    (folder / MANIFEST).unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
    write_json(folder / MANIFEST, {**manifest, "files": list_files(folder)})
    (folder / SEAL).write_text(f"{sha256_of(folder / MANIFEST)}  {MANIFEST}\n", encoding="ascii")


def _manifest(model: SentenceTransformer, facts: BundleFacts, dims: list[int]) -> dict[str, Any]:
    encoder: Any = model[0]
    tokenizer = encoder.tokenizer
    pooling = [m.pooling_mode for m in model if isinstance(m, Pooling)]
    return {
        "format": FORMAT,
        "run_id": facts.run_id,
        "base_model": {"name": facts.base_model, "revision": facts.base_revision, "license": facts.license},
        "model_fingerprint": model_fingerprint(model, facts.prompts),
        "onnx": ONNX_FILES,
        "opset": facts.opset,
        "inputs": input_names(model),
        "outputs": list(OUTPUTS),
        "pooling": pooling[0] if len(pooling) == 1 else pooling,
        "similarity": "cosine; sentence_embedding has length 1 even if the PyTorch model does not normalise",
        "width": dims[0],
        "dims": dims,
        "prompts": {kind: facts.prompts[kind] for kind in KINDS},
        "max_length": {kind: facts.max_length[kind] for kind in KINDS},
        "tokenizer": {
            "pad_id": tokenizer.pad_token_id or 0,
            "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
        },
        "data": facts.data,
        "metrics": facts.metrics,
        "versions": facts.versions,
    }


def model_fingerprint(model: SentenceTransformer, prompts: dict[str, str]) -> str:
    """Hex SHA-256 over the fp32 weights in name order, then what else decides an embedding: modules, prompts.

    Two bundles with this fingerprint make vectors that can be compared with each other.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = np.ascontiguousarray(tensor.float().cpu().numpy())
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    modules: list[Any] = list(model)
    kinds = [type(module).__name__ for module in modules]
    settings = [module.get_config_dict() for module in modules[1:]]
    digest.update(json.dumps([kinds, settings, prompts], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _one_length(folder: Path, tokenizer: Any, longest: int) -> None:
    """Make every tokenizer file truncate at `longest` tokens and none of them pad to a fixed length."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(folder / TOKENIZER))
    fast.no_padding()
    fast.enable_truncation(max_length=longest, direction=tokenizer.truncation_side)
    fast.save(str(folder / TOKENIZER))
    path = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k not in _TOKENIZER_LEFTOVERS}
    write_json(path, settings | {"model_max_length": longest})
    path = folder / "sentence_bert_config.json"
    write_json(path, json.loads(path.read_text("utf-8")) | {"max_seq_length": longest})
    # transformers 5 no longer writes this file, fastembed reads it.
    write_json(folder / "special_tokens_map.json", {k: str(v) for k, v in tokenizer.special_tokens_map.items()})


def _check_lengths(model: SentenceTransformer, max_length: dict[str, int]) -> None:
    positions = position_limit(model)
    for kind in KINDS:
        length = max_length[kind]
        if length < 2 or (positions is not None and length > positions):
            raise UserError(
                f"maximal length of {kind} texts: got {length}, allowed: 2 to {positions or 'any'} "
                "(positions of the model); set model.max_seq_length"
            )

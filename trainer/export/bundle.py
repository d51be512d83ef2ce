"""Write the bundle: ONNX graph, PyTorch weights, tokenizer, manifest, certificate, bill of materials, model card.

Everything is written to a partial folder beside the target and renamed only after the parity gate has passed,
so a folder with the final name is always a whole bundle. The layout is the one that onnxruntime,
sentence-transformers, fastembed and text-embeddings-inference load as it is.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

from data_tools.packages import spdx_license
from launch.config_evaluate import BATCH_TOKENS
from launch.errors import UserError
from launch.files import list_files, new_folder, sha256_of, write_json
from launch.world import read_world
from trainer.embedder import BundleEmbedder, fingerprint
from trainer.evaluation import MAIN_METRIC, Scored, compare, score
from trainer.export.card import model_card
from trainer.export.encoder import FORMAT, KINDS, MANIFEST, TOKENIZER, read_manifest
from trainer.export.onnx import OUTPUTS, check_exportable, export_onnx, input_names, pipeline_copy
from trainer.export.parity import certificate, measured, parity_cases
from trainer.export.precisions import memory_mib, write_fp16
from trainer.export.quantise import choose_int8
from trainer.export.sbom import SBOM, bill_of_materials
from trainer.export.verify import PARITY, SEAL
from trainer.model import position_limit
from trainer.retrieval import RetrievalSet

# The names that Transformers.js looks for.
ONNX_FILES = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "int8": "onnx/model_quantized.onnx"}
# Ends of the older keys of a pooling, where they are not its name.
_OLDER = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}
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
    """The base model's licence as a hub card or SPDX names it, or "unknown"; the bundle has the SPDX form."""
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
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    """`comparisons` of evaluation.json."""
    opset: int = 18
    """ONNX operator set."""
    precisions: Sequence[str] = ("fp32",)
    """Keys of ONNX_FILES; fp32, from which the others are made, is always among them."""
    retrieval: RetrievalSet | None = None
    """What the ONNX files are judged on, None = they are not."""
    dim: int | None = None
    """The bundle's vectors are the first so many components, of length 1 again; None = all."""
    max_ndcg_loss: float = 0.005
    """Share of nDCG@10 that int8 may lose."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version that made model and graph."""


def export_bundle(model: SentenceTransformer, out: Path, facts: BundleFacts) -> Path:
    """Publish `model` as the folder `out` and return it; `model` itself stays as it is.

    Raises UserError if `out` exists, a fact does not fit the model or a module cannot be exported, and
    CheckFailed if onnxruntime does not agree with PyTorch. In each case nothing is left behind.
    """
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already, allowed: a new folder; choose another --out or remove it")
    if "int8" in facts.precisions and facts.retrieval is None:
        raise UserError("int8: got no queries to judge it on; allowed: the export of a run that has `evaluate`")
    check_exportable(model)
    _check_lengths(model, facts.max_length)
    try:
        with new_folder(out) as partial:
            _write(truncated(pipeline_copy(model), facts.dim), partial, facts)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return out


def truncated(model: SentenceTransformer, dim: int | None) -> SentenceTransformer:
    """`model` with a last step that keeps the first `dim` components at length 1; every runtime then does the same."""
    width = model.get_embedding_dimension()
    assert width is not None
    if dim is None:
        return model
    if not 1 <= dim <= width:
        raise UserError(f"dim: got {dim}, the model has {width}; allowed: 1 to {width}")
    cut = Dense(width, dim, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(dim, width))
    model.extend([cut, Normalize()])
    return model


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
    for path in folder.glob("*_Pooling/config.json"):
        # sentence-transformers 6 reads both forms, text-embeddings-inference the older one alone.
        settings = json.loads(path.read_text("utf-8"))
        chosen = settings["pooling_mode"]
        modes = [chosen] if isinstance(chosen, str) else chosen
        older = {f"pooling_mode_{_OLDER.get(mode, mode)}": mode in modes for mode in Pooling.POOLING_MODES}
        write_json(path, settings | older)
    onnx = {name: ONNX_FILES[name] for name in ONNX_FILES if name == "fp32" or name in facts.precisions}
    export_onnx(twin, folder / onnx["fp32"], facts.opset)
    manifest = _manifest(twin, facts, dims, onnx)
    # The gates read prompts, lengths and padding from the manifest, as every user of the bundle will.
    write_json(folder / MANIFEST, {**manifest, "files": {TOKENIZER: {"bytes": 0, "sha256": "0" * 64}}})
    parity = _judged(twin, folder, facts, manifest)
    # Only now: with the gates' sessions still open a large model would need the memory twice.
    manifest["memory_mib"] = {precision: memory_mib(folder, precision) for precision in onnx}
    write_json(folder / PARITY, parity)
    (folder / "README.md").write_text(model_card(manifest, parity), encoding="utf-8")
    (folder / MANIFEST).unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
    write_json(folder / SBOM, bill_of_materials(manifest, list_files(folder)))
    write_json(folder / MANIFEST, {**manifest, "files": list_files(folder)})
    read_manifest(folder)  # what no user of the bundle could read is not published
    (folder / SEAL).write_text(f"{sha256_of(folder / MANIFEST)}  {MANIFEST}\n", encoding="ascii")


def _judged(twin: SentenceTransformer, folder: Path, facts: BundleFacts, manifest: dict[str, Any]) -> dict[str, Any]:
    """Make the smaller files, let each file pass its gates, and complete `manifest`; returns the certificate."""
    onnx, dims, retrieval = manifest["onnx"], manifest["dims"], facts.retrieval
    whole = BundleEmbedder(folder)
    cases = parity_cases(twin, whole.encoder)
    parts: dict[str, Any] = {}
    scored: dict[str, Scored] = {}
    for precision in list(onnx):
        if precision == "fp16":
            write_fp16(folder / onnx["fp32"], folder / onnx[precision])
        if precision == "int8":
            assert retrieval is not None
            check = partial(measured, precision=precision, cases=cases, dims=dims)
            most = facts.max_ndcg_loss
            found, written = choose_int8(folder, onnx, whole.encoder, scored["fp32"], retrieval, most, check)
            manifest["quantisation"] = found
            print(found["told"], flush=True)
            if written is None:
                del onnx[precision]
                break
            parts[precision], scored[precision] = written
        else:
            embedder = whole if precision == "fp32" else BundleEmbedder(folder, precision)
            parts[precision] = measured(embedder.encoder, precision, cases, dims)
            if retrieval:
                scored[precision] = score(embedder, retrieval, dims, batch_tokens=BATCH_TOKENS, world=read_world({}))
        if retrieval:
            results = compare(retrieval, {"tuned": scored[precision]})["results"]
            manifest["metrics"] = [*manifest["metrics"], *(e for e in results if e["metric"] == MAIN_METRIC)]
    return certificate(twin, whole.encoder, parts)


def _manifest(model: SentenceTransformer, facts: BundleFacts, dims: list[int], onnx: dict[str, str]) -> dict[str, Any]:
    encoder: Any = model[0]
    tokenizer = encoder.tokenizer
    pooling = [m.pooling_mode for m in model if isinstance(m, Pooling)]
    return {
        "format": FORMAT,
        "run_id": facts.run_id,
        "base_model": {
            "name": facts.base_model,
            "revision": facts.base_revision,
            "license": spdx_license(facts.license),
        },
        "model_fingerprint": fingerprint(model),
        "onnx": onnx,
        "memory_mib": {},
        "quantisation": None,
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
        "data": [{**source, "license": spdx_license(source["license"])} for source in facts.data],
        "metrics": facts.metrics,
        "comparisons": facts.comparisons,
        "versions": facts.versions,
    }


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

"""`python -m trainer.export.cli MODEL_OR_RUN --out DIR`: a bundle from a model or from a finished run.

A run directory brings its prompts, dims, data and evaluation along; a bare model has only what it carries.
`BUNDLE --layout triton --out DIR` turns a bundle into what Triton serves.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import config as schema
from launch.config_evaluate import Evaluate
from launch.errors import UserError, exit_code
from launch.files import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from trainer.retrieval import RetrievalSet

_OPSETS = (18, 20, 21, 22, 23)
_MOST_DOCUMENTS = 10_000  # of a set without max_documents: one CPU embeds them with every file


def main(argv: Sequence[str]) -> int:
    """Export one bundle and print where it lies."""
    parser = argparse.ArgumentParser(prog="nestling export", description="Write the ONNX bundle of a model.")
    parser.add_argument("source", help="run directory, model folder, hub name or package:PACKAGE/FOLDER")
    parser.add_argument("--out", type=Path, help="new folder (default: bundle/ in the run directory)")
    parser.add_argument("--opset", type=int, choices=_OPSETS, help="ONNX operator set (default: the run's, or 18)")
    parser.add_argument("--dims", type=int, nargs="+", help="dims that users may cut to (default: the run's)")
    cut = "write a model of the first DIM components, of length 1 again (default: all)"
    parser.add_argument("--dim", type=int, help=cut)
    precisions = "ONNX files, fp32 always among them (default: the run's, or fp32)"
    choices = ("fp32", "fp16", "int8")
    parser.add_argument("--precision", nargs="+", choices=choices, help=precisions)
    queries = "queries that smaller files are judged on, int8 on half (default: the run's evaluate.max_queries)"
    parser.add_argument("--max-queries", type=int, help=queries)
    layout = "triton: what Triton serves, from a bundle or a run that has one (default: bundle)"
    parser.add_argument("--layout", choices=("bundle", "triton"), default="bundle", help=layout)
    arguments = parser.parse_args(argv)
    run_dir, out = Path(arguments.source), arguments.out
    if arguments.layout == "triton":
        return _triton(run_dir, out)
    if (run_dir / "run.json").is_file():
        chosen = {"dims": arguments.dims, "precisions": arguments.precision, "max_queries": arguments.max_queries}
        chosen["dim"] = arguments.dim
        out = export_run(run_dir, out or run_dir / "bundle", arguments.opset, **chosen)
    elif out is None:
        raise UserError("--out: missing; a model that is no run needs --out DIR, a folder that does not exist yet")
    else:
        settings = schema.Model(path=arguments.source)
        chosen = {"dims": arguments.dims or [], "precisions": arguments.precision or ["fp32"], "dim": arguments.dim}
        _publish(_load(settings), out, settings, opset=arguments.opset or 18, **chosen)
    print(f"bundle: {out}")
    print(f"check:  nestling verify {out}")
    return 0


def _triton(source: Path, out: Path | None) -> int:
    from trainer.export.triton import write_triton

    bundle = next((folder for folder in (source, source / "bundle") if (folder / "manifest.json").is_file()), None)
    if bundle is None or out is None:
        missing = "--out: missing" if bundle else f"{source}: no bundle, which `nestling export` makes without --layout"
        raise UserError(f"{missing}; allowed: nestling export BUNDLE --layout triton --out DIR")
    write_triton(bundle, out)
    print(f"triton: tritonserver --model-repository={out.absolute()}")
    return 0


def export_run(
    run_dir: Path,
    out: Path,
    opset: int | None = None,
    model: "SentenceTransformer | None" = None,
    dims: list[int] | None = None,
    precisions: list[str] | None = None,
    max_queries: int | None = None,
    dim: int | None = None,
) -> Path:
    """Publish the final model of a run as the bundle `out`; `model` spares loading it if the caller has it.

    Raises UserError for a run without a final model, and what `export_bundle` raises.
    """
    record = read_json(run_dir / "run.json")
    settings = schema.RunConfig.model_validate(record["config"])
    if model is None:
        if not (run_dir / "model").is_dir():
            raise UserError(f"{run_dir}: has no model/ yet; finish the run first, or give a model folder")
        own = settings.model.model_copy(update={"path": str(run_dir / "model"), "revision": None, "pooling": None})
        model = _load(own)
    evaluation = read_json(path) if (path := run_dir / "evaluation.json").is_file() else {}
    exported = settings.export or schema.Export()
    precisions = precisions or list(exported.precisions)
    retrieval = None
    if {*precisions} - {"fp32"} and (asked := settings.evaluate):
        try:
            retrieval = _judged_on(asked, settings, max_queries)
        except UserError as error:
            if "int8" in precisions:
                raise
            print(f"the ONNX files are not judged on queries: {error}", flush=True)
    return _publish(
        model,
        out,
        settings.model,
        license=exported.license,
        versions=record.get("versions", {}),
        run_id=record["run_id"],
        dims=dims or [own for own in settings.loss.dims or [] if own <= (dim or own)],
        dim=dim,
        data=[{k: source.get(k) for k in ("name", "fingerprint", "rows", "license")} for source in record["data"]],
        metrics=evaluation.get("results", []),
        comparisons=evaluation.get("comparisons", []),
        opset=opset or exported.opset,
        precisions=precisions,
        retrieval=retrieval,
        max_ndcg_loss=exported.max_ndcg_loss,
    )


def _judged_on(asked: Evaluate, settings: schema.RunConfig, max_queries: int | None) -> "RetrievalSet":
    """The run's evaluation set as the ONNX files are judged on it. Raises UserError where it is gone."""
    from trainer.retrieval import open_retrieval

    seed = settings.train.seed
    whole = open_retrieval(asked, Path(settings.data.cache_dir), seed)
    drawn = whole.draw(max_queries or asked.max_queries, None, seed)
    least = max(2 * (max_queries or 0), len(set().union(*drawn.relevant)))
    return drawn.draw(None, max(asked.max_documents or _MOST_DOCUMENTS, least), seed)


def _publish(
    model: "SentenceTransformer",
    out: Path,
    base: schema.Model,
    license: str | None = None,
    versions: Mapping[str, str] | None = None,
    **facts: Any,
) -> Path:
    """Export `model`, with what it and `base` say about themselves and further `facts` of BundleFacts; say licences."""
    from trainer import run_record
    from trainer.export.bundle import BundleFacts, export_bundle
    from trainer.model import ROLES, max_length_of, position_limit, prompt_of

    lengths, positions = {}, position_limit(model)
    for role in ROLES:
        known = [length for length in (max_length_of(model, role), positions) if length]
        if not known:
            raise UserError("model.max_seq_length: neither tokenizer nor encoder names a longest input; set it")
        lengths[role] = min(known)
    complete = BundleFacts(
        base_model=base.path,
        base_revision=base.revision,
        license=license or read_license(base),
        prompts={role: prompt_of(model, role) or "" for role in ROLES},
        max_length=lengths,
        versions={**(versions or {}), **run_record.versions()},
        **facts,
    )
    manifest = read_json(export_bundle(model, out, complete) / "manifest.json")
    named = {"base model": manifest["base_model"], **{source["name"]: source for source in manifest["data"]}}
    text = ", ".join(f"{name} {facts['license']}" for name, facts in named.items())
    unclear = "; of unknown and LicenseRef- ones read the terms before you pass the bundle on"
    print(f"licences: {text}" + unclear * ("unknown" in text or "LicenseRef-" in text))
    return out


def read_license(base: schema.Model) -> str:
    """The licence that the base model's own card names, "unknown" if there is no card or it names none."""
    import yaml
    from huggingface_hub import hf_hub_download, metadata_load

    from launch.preflight import resolve_model_path

    try:
        path = resolve_model_path(base.path)
        card = Path(path) / "README.md"
        if not Path(path).exists():
            card = Path(hf_hub_download(path, "README.md", revision=base.revision))
        facts = metadata_load(card) or {}
    except (UserError, OSError, ValueError, yaml.YAMLError):  # moved, offline, gated, without a card, a broken one
        return "unknown"
    named = facts.get("license")
    return str((facts.get("license_name") if named == "other" else None) or named or "unknown")


def _load(settings: schema.Model) -> "SentenceTransformer":
    from trainer.model import load_model, quiet_libraries

    quiet_libraries()
    return load_model(settings, "cpu")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

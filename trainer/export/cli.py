"""`python -m trainer.export.cli MODEL_OR_RUN --out DIR`: a bundle from a model or from a finished run.

A run directory brings its prompts, dims, data and evaluation along; a bare model has only what it carries.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import config as schema
from launch.errors import UserError, exit_code

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_OPSETS = (18, 20, 21, 22, 23)


def main(argv: Sequence[str]) -> int:
    """Export one bundle and print where it lies."""
    parser = argparse.ArgumentParser(prog="nestling export", description="Write the ONNX bundle of a model.")
    parser.add_argument("source", help="run directory, model folder, hub name or package:PACKAGE/FOLDER")
    parser.add_argument("--out", type=Path, help="new folder (default: bundle/ in the run directory)")
    parser.add_argument("--opset", type=int, choices=_OPSETS, help="ONNX operator set (default: the run's, or 18)")
    parser.add_argument("--dims", type=int, nargs="+", help="dims that users may cut to (default: the run's)")
    arguments = parser.parse_args(argv)
    run_dir = Path(arguments.source)
    if (run_dir / "run.json").is_file():
        out = arguments.out or run_dir / "bundle"
        export_run(run_dir, out, arguments.opset, dims=arguments.dims)
    else:
        if arguments.out is None:
            raise UserError("--out: missing; a model that is no run needs --out DIR, a folder that does not exist yet")
        out = arguments.out
        export_model(arguments.source, out, arguments.opset or 18, arguments.dims or [])
    print(f"bundle: {out}")
    print(f"check:  nestling verify {out}")
    return 0


def export_run(
    run_dir: Path,
    out: Path,
    opset: int | None = None,
    model: "SentenceTransformer | None" = None,
    dims: list[int] | None = None,
) -> Path:
    """Publish the final model of a run as the bundle `out`; `model` spares loading it if the caller has it.

    Raises UserError for a run without a final model, and what `export_bundle` raises.
    """
    record = _json(run_dir / "run.json")
    settings = schema.RunConfig.model_validate(record["config"])
    if model is None:
        if not (run_dir / "model").is_dir():
            raise UserError(f"{run_dir}: has no model/ yet; finish the run first, or give a model folder")
        own = settings.model.model_copy(update={"path": str(run_dir / "model"), "revision": None, "pooling": None})
        model = _load(own)
    evaluation = run_dir / "evaluation.json"
    exported = settings.export or schema.Export()
    return _publish(
        model,
        out,
        settings.model,
        license=exported.license,
        run_id=record["run_id"],
        dims=dims or settings.loss.dims or [],
        data=[{k: source.get(k) for k in ("name", "fingerprint", "rows", "license")} for source in record["data"]],
        metrics=_json(evaluation)["results"] if evaluation.is_file() else [],
        opset=opset or exported.opset,
        versions=record.get("versions", {}),
    )


def export_model(source: str, out: Path, opset: int, dims: list[int]) -> Path:
    """Publish a model that no run made; raises what `export_bundle` and loading raise."""
    settings = schema.Model(path=source)
    return _publish(
        _load(settings),
        out,
        settings,
        license=None,
        run_id=None,
        dims=dims,
        data=[],
        metrics=[],
        opset=opset,
        versions={},
    )


def _publish(
    model: "SentenceTransformer",
    out: Path,
    base: schema.Model,
    *,
    license: str | None,
    run_id: str | None,
    dims: list[int],
    data: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    opset: int,
    versions: dict[str, str],
) -> Path:
    from trainer import run_record
    from trainer.export.bundle import BundleFacts, export_bundle
    from trainer.model import ROLES, max_length_of, position_limit, prompt_of

    lengths = {}
    for role in ROLES:
        length = max_length_of(model, role)
        # A tokenizer without a limit of its own says 10^30.
        if length is None or length > 2**31 - 1:
            length = position_limit(model)
        if length is None:
            raise UserError("model.max_seq_length: neither tokenizer nor encoder names a longest input; set it")
        lengths[role] = min(length, position_limit(model) or length)
    facts = BundleFacts(
        base_model=base.path,
        base_revision=base.revision,
        run_id=run_id,
        license=license or read_license(base),
        prompts={role: prompt_of(model, role) or "" for role in ROLES},
        max_length=lengths,
        dims=dims,
        data=data,
        metrics=metrics,
        opset=opset,
        versions={**versions, **run_record.versions()},
    )
    return export_bundle(model, out, facts)


def read_license(base: schema.Model) -> str:
    """The licence that the base model's own card names, "unknown" if there is no card or it names none."""
    from launch.preflight import resolve_model_path

    try:
        path = resolve_model_path(base.path)
        card = Path(path) / "README.md"
        if not Path(path).exists():
            from huggingface_hub import hf_hub_download

            card = Path(hf_hub_download(path, "README.md", revision=base.revision))
        text = card.read_text("utf-8")
    except (UserError, OSError, ValueError):  # moved, offline, gated, or without a card
        return "unknown"
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", header[1], re.MULTILINE) if header else None
    return named[1] if named else "unknown"


def _load(settings: schema.Model) -> "SentenceTransformer":
    from trainer.model import load_model, quiet_libraries

    quiet_libraries()
    return load_model(settings, "cpu")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; the run directory is broken or not one") from error


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

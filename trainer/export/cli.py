"""`python -m trainer.export.cli MODEL_OR_RUN --out DIR`: a bundle from a model or from a finished run.

A run directory brings its prompts, dims, data and evaluation along; a bare model has only what it carries.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import config as schema
from launch.errors import UserError, exit_code
from launch.files import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_OPSETS = (18, 20, 21, 22, 23)
_UNLIMITED = 2**31  # a tokenizer without a limit of its own says 10^30


def main(argv: Sequence[str]) -> int:
    """Export one bundle and print where it lies."""
    parser = argparse.ArgumentParser(prog="nestling export", description="Write the ONNX bundle of a model.")
    parser.add_argument("source", help="run directory, model folder, hub name or package:PACKAGE/FOLDER")
    parser.add_argument("--out", type=Path, help="new folder (default: bundle/ in the run directory)")
    parser.add_argument("--opset", type=int, choices=_OPSETS, help="ONNX operator set (default: the run's, or 18)")
    parser.add_argument("--dims", type=int, nargs="+", help="dims that users may cut to (default: the run's)")
    arguments = parser.parse_args(argv)
    run_dir, out = Path(arguments.source), arguments.out
    if (run_dir / "run.json").is_file():
        out = export_run(run_dir, out or run_dir / "bundle", arguments.opset, dims=arguments.dims)
    elif out is None:
        raise UserError("--out: missing; a model that is no run needs --out DIR, a folder that does not exist yet")
    else:
        settings = schema.Model(path=arguments.source)
        _publish(_load(settings), out, settings, opset=arguments.opset or 18, dims=arguments.dims or [])
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
    record = read_json(run_dir / "run.json")
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
        versions=record.get("versions", {}),
        run_id=record["run_id"],
        dims=dims or settings.loss.dims or [],
        data=[{k: source.get(k) for k in ("name", "fingerprint", "rows", "license")} for source in record["data"]],
        metrics=read_json(evaluation)["results"] if evaluation.is_file() else [],
        opset=opset or exported.opset,
    )


def _publish(
    model: "SentenceTransformer",
    out: Path,
    base: schema.Model,
    license: str | None = None,
    versions: Mapping[str, str] | None = None,
    **facts: Any,
) -> Path:
    """Export `model`, with what it and `base` say about themselves and further `facts` of BundleFacts."""
    from trainer import run_record
    from trainer.export.bundle import BundleFacts, export_bundle
    from trainer.model import ROLES, max_length_of, position_limit, prompt_of

    lengths, positions = {}, position_limit(model)
    for role in ROLES:
        length = min(max_length_of(model, role) or _UNLIMITED, positions or _UNLIMITED)
        if length >= _UNLIMITED:
            raise UserError("model.max_seq_length: neither tokenizer nor encoder names a longest input; set it")
        lengths[role] = length
    known = BundleFacts(
        base_model=base.path,
        base_revision=base.revision,
        license=license or read_license(base),
        prompts={role: prompt_of(model, role) or "" for role in ROLES},
        max_length=lengths,
        versions={**(versions or {}), **run_record.versions()},
        **facts,
    )
    return export_bundle(model, out, known)


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


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

"""`nestling eval MODEL --on SET`: any model or bundle on any retrieval set, alone or beside a base model.

Under several processes: accelerate launch -m trainer.eval_cli MODEL --on SET ..., which share the corpus.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from launch.config_evaluate import BATCH_TOKENS, Gate, Vectors
from launch.errors import UserError, end_process
from launch.files import existing_above, write_json
from launch.world import World, check_processes, read_world
from launch.yaml12 import parse_yaml

_STORED: tuple[Vectors, ...] = ("float32", "int8", "binary")


def main(argv: Sequence[str]) -> int:
    """Print the table, and with --out write evaluation.json, evaluation_queries.json and report.html."""
    parser = argparse.ArgumentParser(prog="nestling eval", description="Judge a model by retrieval.")
    parser.add_argument("model", help="model folder, checkpoint, run, bundle, hub name or package:PACKAGE/FOLDER")
    kinds = "BEIR folder, JSON lines with query and relevant, or pairs: shards, .jsonl, .csv, .parquet"
    parser.add_argument("--on", type=Path, required=True, metavar="SET", help=kinds)
    parser.add_argument("--base", metavar="MODEL", help="compare with this one")
    parser.add_argument("--split", default="test", help="judgements of a BEIR folder (default: test)")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="anchor=... positive=...")
    parser.add_argument("--dims", type=int, nargs="+", default=[], help="default: full width")
    parser.add_argument("--vectors", nargs="+", choices=_STORED, default=list(_STORED), help="storages (default: all)")
    parser.add_argument("--max-queries", type=int, help="draw so many (default: all)")
    parser.add_argument("--max-documents", type=int, help="draw so many, relevant ones first (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of draws and intervals (default: 42)")
    parser.add_argument("--precision", help="ONNX file of a bundle (default: fp32)")
    parser.add_argument("--query-prompt", help="instead of the model's own")
    parser.add_argument("--document-prompt", help="instead of the model's own")
    batch = f"texts embedded together (default: {BATCH_TOKENS})"
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help=batch)
    gate = "as in evaluate.gate: {gain: 0} or {dim: 128, keeps: 0.98}"
    parser.add_argument("--gate", nargs="+", default=[], metavar="GATE", help=gate)
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="copies of sources (default: cache)")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json and report.html")
    arguments = parser.parse_args(argv)
    for name in ("max_queries", "max_documents", "batch_tokens"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {number}, allowed: 1 or more")
    if arguments.seed < 0:
        raise UserError(f"--seed: got {arguments.seed}, allowed: 0 or more")
    gates = _gates(arguments)
    if arguments.out and not existing_above(arguments.out).is_dir():
        raise UserError(f"--out: {arguments.out} is no folder and cannot be one")
    world = read_world()
    check_processes(world, "-m trainer.eval_cli MODEL --on SET")
    return _evaluate(arguments, gates, world)


def _evaluate(arguments: argparse.Namespace, gates: list[Gate], world: World) -> int:
    import torch
    from accelerate import PartialState

    from trainer.embedder import ModelEmbedder, open_embedder
    from trainer.evaluation import compare, examples, score
    from trainer.figures import table
    from trainer.gates import judge_gates, require_gates
    from trainer.model import quiet_libraries
    from trainer.report import write_report
    from trainer.retrieval import open_path

    quiet_libraries()
    columns = dict(pair.partition("=")[::2] for pair in arguments.columns) or None
    retrieval = open_path(arguments.on, arguments.split, columns, arguments.cache_dir)
    retrieval = retrieval.draw(arguments.max_queries, arguments.max_documents, arguments.seed)
    if world.rank == 0:
        print(f"evaluation: {len(retrieval.queries):,} queries over {len(retrieval.documents):,} documents", flush=True)
    state = PartialState(cpu=not torch.cuda.is_available()) if world.world_size > 1 else None
    device = str(state.device) if state else "cuda" if torch.cuda.is_available() else "cpu"
    names = {"base": arguments.base, "tuned": arguments.model} if arguments.base else {"tuned": arguments.model}
    scored, models = {}, {}
    for role, name in names.items():
        # The base of a bundle's int8 file is its fp32 one.
        embedder = open_embedder(name, device, arguments.precision if role == "tuned" else None)
        for kind in ("query", "document"):
            if (prompt := getattr(arguments, f"{kind}_prompt")) is not None:
                if not isinstance(embedder, ModelEmbedder):
                    raise UserError(f"--{kind}-prompt: {name} is a bundle, which brings its own; leave it out")
                embedder.model.prompts[kind] = prompt
        models[role] = {"name": name, "artifact": embedder.artifact, "fingerprint": embedder.fingerprint}
        last = role == "tuned"
        scored[role] = score(
            embedder,
            retrieval,
            arguments.dims,
            arguments.vectors if last else [],
            batch_tokens=arguments.batch_tokens,
            world=world,
            timed=last,
        )
    if state:
        state.destroy_process_group()
    if world.rank:
        return 0
    evaluation = compare(retrieval, scored, seed=arguments.seed)
    evaluation |= {"models": models, "gates": judge_gates(gates, {"domain": scored}, arguments.seed)}
    print(table(evaluation), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "evaluation.json", evaluation)
        write_json(arguments.out / "evaluation_queries.json", examples(retrieval, scored))
        print(f"report: {write_report(arguments.out)}")
    require_gates(evaluation["gates"])
    return 0


def _gates(arguments: argparse.Namespace) -> list[Gate]:
    """Gates of the command line; what they ask for is measured. Raises UserError."""
    gates = []
    for text in arguments.gate:
        try:
            gate = Gate.model_validate(parse_yaml(text, lambda line: (line, "--gate")).value)
        except ValidationError as error:
            what = error.errors()[0]
            where = ".".join(map(str, what["loc"]))
            raise UserError(f"--gate: got {text!r}: {where + ': ' if where else ''}{what['msg']}") from None
        if gate.gain is not None and not arguments.base:
            raise UserError(f"--gate: got {text!r}, which needs --base MODEL to compare with")
        if (gate.dim and gate.dim not in arguments.dims) or gate.vectors not in ("float32", *arguments.vectors):
            raise UserError(f"--gate: got {text!r}, allowed: what --dims and --vectors name")
        if gate.set != "domain":
            raise UserError(f"--gate: got {text!r}, allowed: the set that --on names, so leave set out")
        gates.append(gate)
    return gates


if __name__ == "__main__":
    end_process(main, sys.argv[1:], speaks=os.environ.get("RANK", "0") == "0")

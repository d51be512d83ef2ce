"""Mined hard negatives against random ones: nDCG@10 on held-out queries, all else equal.

python -m benchmarks.mined FOLDER    train.jsonl (anchor, positive) beside a BEIR set that shares no row with it;
without FOLDER docstring-function pairs of the standard library, of which 500 are held out.

all-MiniLM-L6-v2 on one thread: `nestling data mine` adds one negative a row from the rows' own positives; the other run
has one drawn at random from those that are no known positive. Same rows, order, steps and settings.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import Claim, finish, one_thread, options, progress, table
from benchmarks.sides import MINILM, docstring_pairs

_BATCH = 64
_TOKENS = 64
_RUN = """\
model: {{path: "{model}", max_seq_length: {tokens}}}
data: {{sources: [{{path: {data}}}], cache_dir: {folder}/cache}}
train: {{run_dir: {run_dir}, global_batch_size: {batch}, learning_rate: 5e-5, warmup_steps: 0.1, seed: {seed},
  micro_batch_tokens: 2048, graph_memory: 2.0, report_to: []}}
"""


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _docstrings(folder: Path) -> Path:
    """A FOLDER of its own: no two of the functions are near-copies."""
    pairs = docstring_pairs()
    held, trained = pairs[:500], pairs[500:]
    (folder / "qrels").mkdir(parents=True)
    _write(folder / "train.jsonl", [{"anchor": anchor, "positive": positive} for anchor, positive in trained])
    _write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": anchor} for i, (anchor, _) in enumerate(held)])
    _write(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": positive} for i, (_, positive) in enumerate(held)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(held)))]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def _negatives(rows: Sequence[dict[str, Any]], folder: Path, seed: int) -> dict[str, Path]:
    """Files with the rows and a negative each, by where the negatives come from; rows that got none are in neither."""
    import pyarrow.parquet as pq

    from data_tools.sources import import_source
    from launch.config_data import PlainSource
    from trainer import mine

    _write(folder / "pairs.jsonl", rows)
    shards = import_source(PlainSource(path=str(folder / "pairs.jsonl")), folder / "cache")
    words = [str(shards), "--model", MINILM, "--out", f"{folder}/mined", "--cache-dir", f"{folder}/cache"]
    mine.main([*words, "--negatives", "1", "--window", "0", "50", "--seed", str(seed)])
    found = pq.read_table(sorted((folder / "mined/train").glob("shard-*.parquet"))).to_pylist()
    names = ("anchor", "positive", "negative_1")
    mined = [{name: row[name] for name in names} for row in found if row["negative_1"]]
    known: dict[str, set[str]] = defaultdict(set)
    for row in mined:
        known[row["anchor"].casefold()].add(row["positive"])
    draw, texts = random.Random(seed), sorted({row["positive"] for row in mined})

    def drawn(row: dict[str, Any]) -> str:
        return next(
            text for text in iter(lambda: draw.choice(texts), None) if text not in known[row["anchor"].casefold()]
        )

    made = {"random": [{**row, "negative_1": drawn(row)} for row in mined], "mined": mined}
    for name, kept in made.items():
        _write(folder / f"{name}.jsonl", kept)
    return {name: folder / f"{name}.jsonl" for name in made}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", nargs="?")
    parser.add_argument(
        "--rows", type=int, default=40 * _BATCH, help="first rows of train.jsonl (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of weights, order and draws (default: %(default)s)")
    args = parser.parse_args(argv)
    one_thread()
    from launch.world import read_world
    from trainer.embedder import open_embedder
    from trainer.evaluation import compare, score
    from trainer.retrieval import open_path

    count = 4 * _BATCH if args.quick else args.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = args.folder or _docstrings(folder / "docstrings")
        with (given / "train.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(file, count)]
        models = {"base": MINILM}
        for kind, data in _negatives(rows, folder, args.seed).items():
            run, models[kind] = folder / f"{kind}.yaml", str(folder / "runs" / kind)
            facts = {"model": MINILM, "tokens": _TOKENS, "batch": _BATCH, "seed": args.seed, "folder": folder}
            run.write_text(_RUN.format(**facts, data=data, run_dir=models[kind]), encoding="utf-8")
            progress(f"training with {kind} negatives")
            subprocess.run([sys.executable, "train.py", str(run)], stdout=subprocess.DEVNULL, check=True)
        used = sum(1 for _ in (folder / "mined.jsonl").open(encoding="utf-8"))
        retrieval = open_path(given, "test", None, folder / "cache")
        if args.quick:
            retrieval = retrieval.draw(50, 200, args.seed)
        scored = {}
        for kind, model in models.items():
            progress(f"judging {kind}")
            scored[kind] = score(open_embedder(model, "cpu"), retrieval, [], batch_tokens=2048, world=read_world())
    compared = {one: compare(retrieval, {one: scored[one], "mined": scored["mined"]}) for one in ("base", "random")}
    lines = []
    claims = []
    where = (
        f"{given.name}: {len(retrieval.queries):,} queries over {len(retrieval.documents):,} documents, "
        f"{used // _BATCH} steps of {_BATCH} rows, one epoch, seed {args.seed}"
    )
    for one, found in compared.items():
        values = {e["model"]: e["value"] for e in found["results"] if e["metric"] == "ndcg@10"}
        entry = next(e for e in found["comparisons"] if e["metric"] == "ndcg@10")
        low, high = entry["ci95"]
        lines.append(
            [f"mined against {one}", values[one], values["mined"], entry["difference"], f"{low:+.4f}, {high:+.4f}"]
        )
        if one == "random":
            conditions = f"95 % interval {low:+.4f} to {high:+.4f}, {where}"
            claims.append(Claim("mined.ndcg_gain", entry["difference"], "nDCG@10", "higher", None, conditions))
    print()
    table(["comparison", "nDCG@10", "with mined", "difference", "95 % interval"], lines)
    return finish(claims, args)


if __name__ == "__main__":
    sys.exit(main())

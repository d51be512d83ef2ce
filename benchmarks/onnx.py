"""The ONNX files of a bundle against PyTorch in fp32: speed by length and batch, size, what int8 costs in retrieval.

Also `Encoder.encode` against sentence-transformers' own `encode`. all-MiniLM-L6-v2 on one thread; queries are summaries
of functions of the standard library, documents their code. Of all turns of each side the fastest counts. int8 is the
recipe that an export chooses by itself; where so many queries do not decide whether it may be written, it is here.

    python -m benchmarks.onnx [--quick] [--json FILE]
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RIVAL, Claim, finish, one_thread, options, progress, table
from benchmarks.sides import docstring_pairs, minilm
from launch.files import read_json, write_json

TORCH = "PyTorch fp32"
DIMS = (384, 128, 32)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = options(__doc__).parse_args(argv)
    one_thread()
    import torch

    from trainer.export.bundle import BundleFacts, export_bundle
    from trainer.export.encoder import Encoder

    queries, lengths, batches = (20, (32, 128), (1,)) if args.quick else (3000, (8, 32, 128, 512), (1, 8, 32))
    model, retrieval = minilm(512), _pairs(queries)
    with tempfile.TemporaryDirectory() as name:
        facts = BundleFacts(
            base_model="all-MiniLM-L6-v2",
            base_revision=None,
            license="apache-2.0",
            prompts={"query": "", "document": ""},
            max_length={"query": 48, "document": 512},
            dims=list(DIMS),
            precisions=["fp16", "int8"],
            retrieval=retrieval,
        )
        folder = export_bundle(model, Path(name) / "bundle", facts)
        progress("exported")
        manifest = read_json(folder / "manifest.json")
        found = manifest["quantisation"]
        sizes = {precision: manifest["files"][file]["bytes"] for precision, file in manifest["onnx"].items()}
        recipe = found["chosen"] or "row"
        if "int8" not in sizes:
            sizes["int8"] = _write_int8(folder, manifest, recipe)
        encoders = {precision: Encoder(folder, threads=1, precision=precision) for precision in sizes}

        def torch_run(ids: np.ndarray) -> Any:
            mask = torch.ones(ids.shape, dtype=torch.long)
            return model({"input_ids": torch.from_numpy(ids), "attention_mask": mask, "token_type_ids": 0 * mask})

        speed: dict[tuple[int, int], dict[str, float]] = {}
        for length in lengths:
            for batch in batches:
                ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
                rows = [(row, np.zeros_like(row)) for row in ids]
                sides: dict[str, Callable[[], Any]] = {TORCH: lambda ids=ids: torch_run(ids)}
                sides |= {p: lambda e=e, rows=rows: e.run(rows) for p, e in encoders.items()}
                with torch.inference_mode():
                    speed[length, batch] = _fastest(sides, 0.1 if args.quick else 2.0)
                progress(f"{batch} x {length} tokens")
        texts = (retrieval.queries + retrieval.documents)[: 40 if args.quick else 600]
        both = _fastest(
            {
                RIVAL: lambda: model.encode(texts, batch_size=32, show_progress_bar=False),
                "Encoder": lambda: encoders["fp32"].encode(texts, batch_tokens=1024),
            },
            1 if args.quick else 60,
        )
    table(
        ["tokens", "texts", *speed[lengths[0], 1], *(f"{p} times" for p in encoders)],
        [
            [
                length,
                batch,
                *(f"{1000 * s:.1f} ms" for s in times.values()),
                *(times[TORCH] / times[p] for p in encoders),
            ]
            for (length, batch), times in speed.items()
        ],
    )

    def mark(entry: dict[str, Any]) -> str:
        return "chosen" if entry["recipe"] == found["chosen"] else ""

    table(
        ["recipe", "MB", *(f"ndcg@10 at {dim}" for dim in DIMS), "loss", ""],
        [
            [e["recipe"], e["bytes"] / 1e6, *e["ndcg_by_dim"].values(), e.get("loss", {}).get("share", 0.0), mark(e)]
            for e in found["tried"]
        ],
    )
    reached = {(e["artifact"], e["dim"]): e["value"] for e in manifest["metrics"]}
    table(
        ["file", "MB", *(f"ndcg@10 at {dim}" for dim in DIMS)],
        [[p, size / 1e6, *(reached.get((f"onnx-{p}", dim), "-") for dim in DIMS)] for p, size in sizes.items()],
    )
    print(f"\n{found['told']}")
    judged, share = "no recipe was chosen", None
    if found["judged"]:
        share, (low, high) = found["judged"]["share"], found["judged"]["ci95"]
        on = found["queries"]["judged on"]
        judged = f"{found['outcome']}: paired interval [{low:.4f}, {high:.4f}] on {on:,} other queries"
    where = f"recipe {recipe}, one text, one thread"
    claims = [
        Claim(f"onnx.int8_speedup_{n}", speed[n, 1][TORCH] / speed[n, 1]["int8"], "times", "higher", TORCH, where)
        for n in (32, 128)
    ]
    claims += [
        Claim("onnx.int8_ndcg_loss", share, "share", "lower", "onnx fp32", judged),
        Claim(
            "onnx.encoder_over_sentence_transformers",
            both[RIVAL] / both["Encoder"],
            "times",
            "higher",
            RIVAL,
            f"{len(texts)} texts, batches of 32 and of 1,024 tokens, fp32, one thread",
        ),
        *(Claim(f"onnx.{p}_bytes", size, "bytes", "lower", None, "the file") for p, size in sizes.items()),
    ]
    return finish(claims, args)


def _pairs(count: int) -> Any:
    """`count` summaries and twice as many functions, of the standard library."""
    from trainer.retrieval import retrieval_set

    rows = [{"anchor": summary, "positive": code[:240]} for summary, code in docstring_pairs()]
    return retrieval_set(rows, count, 2 * count)


def _write_int8(folder: Path, manifest: dict[str, Any], recipe: str) -> int:
    """Write the int8 file of `recipe` into the bundle, as an export that may not does not; returns its bytes."""
    from trainer.export.encoder import Encoder
    from trainer.export.quantise import RECIPES, activation_ranges, write_int8

    whole, source, target = Encoder(folder), folder / manifest["onnx"]["fp32"], folder / "onnx/int8.onnx"
    shown = whole.tokenize([code[:240] for _, code in docstring_pairs()[:64]], "document")
    write_int8(source, target, activation_ranges(source, shown, whole), **RECIPES[recipe])
    manifest["onnx"]["int8"] = "onnx/int8.onnx"
    write_json(folder / "manifest.json", manifest)
    return target.stat().st_size


def _fastest(sides: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Seconds of the fastest call of each side; they take turns, at least three."""
    best = dict.fromkeys(sides, float("inf"))
    began, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - began < seconds * len(sides):
        for side, call in sides.items():
            start = time.perf_counter()
            call()
            best[side] = min(best[side], time.perf_counter() - start)
        turns += 1
    return best


if __name__ == "__main__":
    sys.exit(main())

"""Hard negatives: `nestling data mine SHARDS --model MODEL --out DIR`, in many processes
`accelerate launch [...] -m trainer.mine SHARDS --model MODEL --out DIR`.

Distinct texts are embedded once by trainer/bulk.py and kept below the cache folder under their content; blocks of
anchors are searched exactly, each block a file, so that a killed job goes on in any number of processes. Rank 0 then
chooses.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.progress import Progress
from data_tools.readers import read_parquet
from data_tools.runner import key_of
from data_tools.shards import Manifest, ShardWriter, verify_shards
from data_tools.split import hash_of, normalise
from launch.config_evaluate import BATCH_TOKENS
from launch.errors import UserError, end_process
from launch.files import exclusive, new_file, new_folder, read_json, remove_folder, write_json
from launch.world import World, check_processes, read_world
from trainer import bulk

_BLOCK = 2048  # anchors searched together: a pass over all documents each
_ROWS = 4096  # rows chosen for together
# Verdicts in the order in which they are given; the last is what is left.
VERDICTS = (
    "known positive or same text",
    "before the window",
    "beyond the window",
    "above the relative margin",
    "above the absolute margin",
    "above the score ceiling",
    "not drawn",
    "chosen",
)


def main(argv: Sequence[str]) -> int:
    """Mine, or what is missing of it."""
    asked = _arguments(argv)
    world = read_world()
    check_processes(world, "-m trainer.mine SHARDS --model MODEL --out DIR")
    first, last = asked.window
    if not 0 <= first < last or last - first < asked.negatives or asked.negatives < 1:
        raise UserError(
            f"--window: got {first} {last} for {asked.negatives} negatives, allowed: FIRST LAST with room for them"
        )
    if asked.out.exists():
        raise UserError(f"--out: {asked.out} exists, allowed: a new folder")
    if not 0 <= asked.seed < 2**64:
        raise UserError(f"--seed: got {asked.seed}, allowed: 0 to 2^64 - 1")
    manifest = verify_shards(asked.shards)
    from trainer.embedder import open_embedder
    from trainer.model import quiet_libraries

    try:  # now, not when all is embedded
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be made: {error.strerror}; give another --out or --cache-dir"
        ) from None
    quiet_libraries()
    if missing := {"anchor", "positive"} - set(manifest.columns):
        raise UserError(f"{asked.shards}: has no column {sorted(missing)[0]}, allowed: shards with anchor and positive")
    work = asked.cache_dir / "mining" / manifest.fingerprint[:32]
    with exclusive(asked.cache_dir / "mining" / f"{work.name}-{world.rank}.lock"):
        if world.rank == 0 and not work.exists():
            _collect(asked.shards, manifest, work)
        bulk.wait_for(work.exists, world, "no texts are collected")
        embedder = open_embedder(asked.model, bulk.device_of(world))
        facts, folders = read_json(work / "facts.json"), {}
        for side, role in (("anchors", "query"), ("documents", "document")):
            folders[side] = (
                asked.cache_dir / "vectors" / key_of(embedder.fingerprint, embedder.artifact, role, facts[side])[:32]
            )
            text = ["--role", role, "--batch-tokens", str(asked.batch_tokens), "--out", str(folders[side])]
            bulk.main([asked.model, str(work / f"{side}.jsonl"), *text], embedder)
            bulk.wait_for((folders[side] / "manifest.json").is_file, world, f"the vectors of {side} are missing")
        vectors = {side: np.load(folder / "vectors.npy", mmap_mode="c") for side, folder in folders.items()}
        rows = np.load(work / "rows.npz")
        depth = min(max(last, asked.consistent or 0) + _most_excluded(rows), len(vectors["documents"]))
        found = work / f"found-{key_of(embedder.fingerprint, embedder.artifact, depth)[:32]}"
        found.mkdir(exist_ok=True)
        _search(vectors["anchors"], vectors["documents"], depth, found, world)
        if world.rank:
            return 0
        _choose(asked, manifest, work, found, vectors, embedder.fingerprint)
    return 0


def _texts(shards: Path, manifest: Manifest, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    files = [shards / shard.name for shard in manifest.shards]
    for _, row in read_parquet(files, lambda _: columns, speaks=False):
        assert isinstance(row, dict)
        yield row


def _collect(shards: Path, manifest: Manifest, work: Path) -> None:
    """Distinct anchors and positives as files to embed, and which of them each row has.

    rows.npz: anchor and document int64 [rows], the number of each row's texts; anchor_id and document_id uint64, the
    identity of each distinct text but for case and white space. 32 bytes of memory a row.
    """
    kinds = {"anchors": "anchor", "documents": "positive"}
    with new_folder(work) as folder:
        arrays, facts = {}, {}
        for side, column in kinds.items():
            hashes = np.fromiter((hash_of(row[column]) for row in _texts(shards, manifest, [column])), np.uint64)
            _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
            order = np.argsort(first)  # distinct texts are numbered as they come
            number = np.empty(len(order), np.int64)
            number[order] = np.arange(len(order))
            name = "anchor" if side == "anchors" else "document"
            arrays[name] = number[inverse]
            identities = np.empty(len(order), np.uint64)
            digest, count = hashlib.sha256(), 0
            with (folder / f"{side}.jsonl").open("w", encoding="ascii") as file:
                for row, wanted in zip(_texts(shards, manifest, [column]), arrays[name].tolist(), strict=True):
                    if wanted == count:
                        line = json.dumps({"text": row[column]}) + "\n"
                        file.write(line)
                        digest.update(line.encode())
                        identities[count] = hash_of(normalise(row[column]))
                        count += 1
            arrays[f"{name}_id"] = identities
            facts[side] = digest.hexdigest()
        np.savez(folder / "rows.npz", **arrays)
        write_json(folder / "facts.json", facts)


def _most_excluded(rows: Mapping[str, np.ndarray]) -> int:
    """The most documents that are no negatives of an anchor: all spellings of its positives and of itself."""
    _, text, spellings = np.unique(rows["document_id"], return_inverse=True, return_counts=True)
    known = np.unique([rows["anchor_id"][rows["anchor"]], text[rows["document"]].astype(np.uint64)], axis=1)
    _, anchor = np.unique(known[0], return_inverse=True)
    return int(np.bincount(anchor, spellings[known[1].astype(np.int64)]).max() + spellings.max())


def _search(anchors: np.ndarray, documents: np.ndarray, depth: int, found: Path, world: World) -> None:
    """The `depth` nearest documents of each anchor, a file a block; rank 0 waits for the blocks of the others."""
    from trainer.search import search

    blocks = [found / f"{block:06d}.npz" for block in range(-(-len(anchors) // _BLOCK))]
    with Progress("searching", len(anchors), "anchors", world.rank == 0) as progress:
        for block in range(world.rank, len(blocks), world.world_size):
            if not blocks[block].exists():
                part = np.array(anchors[block * _BLOCK : (block + 1) * _BLOCK])
                near = search(part, documents, [part.shape[1]], depth)[part.shape[1]]
                with new_file(blocks[block]) as path, path.open("wb") as file:
                    np.savez(file, index=near.index.astype(np.int32), cosine=near.cosine)
            progress.to(min((block + 1) * _BLOCK, len(anchors)))
    if world.rank == 0:
        for path in blocks:
            bulk.wait_for(path.exists, world, f"block {path.name} is missing")


def judge(
    index: np.ndarray,
    cosine: np.ndarray,
    excluded: np.ndarray,
    positive: np.ndarray,
    key: np.ndarray | None,
    asked: argparse.Namespace,
) -> tuple[np.ndarray, np.ndarray]:
    """(verdicts int8 [n, k], columns of the chosen int64 [n, negatives], -1 where there are fewer).

    `index`, `cosine` [n, k] are the nearest documents, best first; `excluded` those that are known to be right;
    `positive` [n] the cosine of each row's own positive; `key` [n, k] orders a random draw, None = the nearest.
    """
    rank = np.cumsum(~excluded, axis=1) - 1  # counted without what is excluded
    own = positive[:, None]
    rules = [excluded, rank < asked.window[0], rank >= asked.window[1]]
    rules.append(cosine > own - np.abs(own) * (1 - asked.relative_margin) if asked.relative_margin else excluded)
    rules.append(cosine > own - asked.absolute_margin if asked.absolute_margin is not None else excluded)
    rules.append(cosine > asked.max_score if asked.max_score is not None else excluded)
    verdicts = np.select(rules, range(len(rules)), len(rules)).astype(np.int8)
    eligible = verdicts == len(rules)
    order = np.where(eligible, rank if key is None else key, np.inf)
    chosen = np.argsort(order, axis=1, kind="stable")[:, : asked.negatives]
    chosen = np.where(np.take_along_axis(eligible, chosen, 1), chosen, -1)
    rows, places = np.nonzero(chosen >= 0)
    verdicts[rows, chosen[rows, places]] = len(rules) + 1
    return verdicts, chosen


def _choose(
    asked: argparse.Namespace, manifest: Manifest, work: Path, found: Path, vectors: dict[str, Any], model: str
) -> None:
    """Write shards with negatives, the table of decisions and the card."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = dict(np.load(work / "rows.npz"))
    pairs = np.unique(_pair(rows["anchor_id"][rows["anchor"]], rows["document_id"][rows["document"]]))
    names = [f"negative_{n}" for n in range(1, asked.negatives + 1)]
    texts = _Lines(work / "documents.jsonl", len(rows["document_id"]))
    kinds: dict[str, Any] = {**manifest.columns, **dict.fromkeys(names, "text")}
    kinds |= {"positive_score": "float", "negative_scores": "floats"}
    counts, filled = Counter[str](), Counter[int]()
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("rank", pa.int32()),
            ("document", pa.int32()),
            ("score", pa.float32()),
            ("verdict", pa.dictionary(pa.int8(), pa.string())),
        ]
    )
    verdict_names = pa.array(VERDICTS)
    stream = _texts(asked.shards, manifest, list(manifest.columns))
    with new_folder(asked.out) as out, pq.ParquetWriter(out / "decisions.parquet", schema, compression="zstd") as table:
        made_by = f"nestling data mine --model {asked.model}"
        facts = {"source": manifest.source, "license": manifest.license, "made_by": made_by}
        with ShardWriter(out / "train", kinds, **facts) as writer:
            for start in range(0, manifest.rows, _ROWS):
                anchor, document = (rows[name][start : start + _ROWS] for name in ("anchor", "document"))
                index, cosine = _found(found, anchor)
                own = np.einsum(
                    "nd,nd->n",
                    vectors["anchors"][anchor].astype(np.float64),
                    vectors["documents"][document].astype(np.float64),
                )
                theirs, mine = rows["document_id"][index], rows["anchor_id"][anchor][:, None]
                excluded = np.isin(_pair(np.broadcast_to(mine, theirs.shape), theirs), pairs) | (theirs == mine)
                draw = _pair(theirs ^ np.uint64(asked.seed), np.broadcast_to(mine, theirs.shape))
                key = draw / 2.0**64 if asked.sampling == "random" else None
                verdicts, chosen = judge(index, cosine, excluded, own, key, asked)
                better = (~excluded & (cosine > own[:, None])).sum(axis=1)
                for i, row in zip(range(len(anchor)), stream, strict=False):
                    if asked.consistent and better[i] >= asked.consistent:
                        counts[f"positive not among the {asked.consistent} nearest of its anchor"] += 1
                        continue
                    places = [place for place in chosen[i].tolist() if place >= 0]
                    negatives = [texts[int(index[i, place])] for place in places]
                    filled[len(negatives)] += 1
                    negatives += [None] * (asked.negatives - len(negatives))
                    scores = [float(cosine[i, place]) for place in places] or None
                    writer.write(
                        {**row, **dict(zip(names, negatives, strict=True))}
                        | {"positive_score": float(own[i]), "negative_scores": scores}
                    )
                n, k = index.shape
                values = [np.repeat(np.arange(start, start + n), k), np.tile(np.arange(k, dtype=np.int32), n)]
                values += [index.ravel().astype(np.int32), cosine.ravel().astype(np.float32)]
                kinds_of = pa.DictionaryArray.from_arrays(pa.array(verdicts.ravel()), verdict_names)
                table.write_table(pa.table([*map(pa.array, values), kinds_of], schema=schema))
            writer.dropped = dict(counts)
        card = {
            "model": asked.model,
            "model_fingerprint": model,
            "shards": {"path": str(asked.shards), "fingerprint": manifest.fingerprint, "rows": manifest.rows},
            "settings": {k: v for k, v in vars(asked).items() if k not in ("out", "shards", "model", "cache_dir")},
            "rows_by_negatives": {str(n): filled[n] for n in sorted(filled)},
            "dropped": dict(counts),
        }
        write_json(out / "card.json", card)
    remove_folder(found)
    full, lost = filled[asked.negatives], sum(counts.values())
    kept = sum(filled.values())
    print(f"{asked.out / 'train'}: {kept:,} rows, {full:,} with {asked.negatives} negatives, {filled[0]:,} with none")
    if lost:
        print(f"  left out {lost:,}: {next(iter(counts))}")
    print(f"{asked.out / 'decisions.parquet'}: every document that was near an anchor, and why it was not chosen")


def _pair(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """64-bit hash of two identities, uint64, by the finaliser of MurmurHash3."""
    mixed = one * np.uint64(0x9E3779B97F4A7C15) + other
    mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return mixed ^ (mixed >> np.uint64(33))


def _found(folder: Path, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, cosine) [n, k] of these anchors from the files of their blocks."""
    index: Any = None
    cosine: Any = None
    for block in np.unique(anchors // _BLOCK):
        with np.load(folder / f"{block:06d}.npz") as part:
            here = np.flatnonzero(anchors // _BLOCK == block)
            if index is None:
                index = np.empty((len(anchors), part["index"].shape[1]), np.int64)
                cosine = np.empty(index.shape)
            index[here], cosine[here] = part["index"][anchors[here] % _BLOCK], part["cosine"][anchors[here] % _BLOCK]
    return index, cosine


class _Lines:
    """Texts of a file of JSON lines by number: 8 bytes a line in memory."""

    def __init__(self, path: Path, count: int):
        self._file = path.open("rb")
        self._starts = np.zeros(count + 1, np.int64)
        for number, line in enumerate(self._file, 1):
            self._starts[number] = self._starts[number - 1] + len(line)

    def __getitem__(self, number: int) -> str:
        self._file.seek(int(self._starts[number]))
        return json.loads(self._file.readline())["text"]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nestling data mine", description="Add hard negatives to shards.")
    parser.add_argument("shards", type=Path, help="folder of shards with anchor and positive")
    parser.add_argument("--model", required=True, help="model folder, run, bundle, hub name or package:PACKAGE/FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="new folder: train/, decisions.parquet, card.json")
    parser.add_argument("--negatives", type=int, default=4, metavar="N", help="of a row (default: 4)")
    window = "ranks that negatives come from, LAST excluded (default: 0 50)"
    parser.add_argument("--window", type=int, nargs=2, default=[0, 50], metavar=("FIRST", "LAST"), help=window)
    margin = "a negative's cosine is at most this share of the positive's, 0 = no such rule (default: 0.95)"
    parser.add_argument("--relative-margin", type=float, default=0.95, metavar="X", help=margin)
    parser.add_argument("--absolute-margin", type=float, metavar="X", help="... at most the positive's minus this")
    parser.add_argument("--max-score", type=float, metavar="X", help="... at most this")
    parser.add_argument("--sampling", choices=("top", "random"), default="top", help="in the window (default: top)")
    consistent = "leave out rows whose positive is not among the K nearest of its anchor"
    parser.add_argument("--consistent", type=int, metavar="K", help=consistent)
    parser.add_argument("--seed", type=int, default=42, help="of the random draw (default: 42)")
    batch = f"rows x longest of a batch (default: {BATCH_TOKENS})"
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help=batch)
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="vectors by content (default: cache)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    end_process(main, sys.argv[1:], speaks=os.environ.get("LOCAL_RANK", "0") == "0")

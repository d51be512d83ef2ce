"""Texts of a file -> vectors: `nestling embed MODEL TEXTS --out DIR`, in many processes
`accelerate launch [...] -m trainer.bulk MODEL TEXTS --out DIR`.

Blocks of consecutive rows are dealt to the processes, which send each other nothing: a block becomes a part file that
appears whole or not at all, and rank 0 joins the parts. So a killed job goes on with what is missing, in any number of
processes. While a job lasts, DIR/parts holds job.json (what decides the vectors), ids and parts.
"""

import argparse
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from data_tools.progress import Progress
from data_tools.readers import read_lines, read_parquet
from launch.cli import version
from launch.config_evaluate import BATCH_TOKENS
from launch.errors import UserError, end_process
from launch.files import exclusive, new_file, read_json, remove_folder, sha256_of, write_json
from launch.reader import did_you_mean
from launch.rows import SUFFIXES, TEXTS, kind_of
from launch.world import World, check_processes, read_world

if TYPE_CHECKING:
    from trainer.embedder import Embedder

FORMAT = "nestling-vectors/1"
_LOOK = 0.5  # seconds between two looks at what other processes have done
_NEXT = "the same command, also with another --batch-tokens, goes on with what is missing"
_MIX = "vectors of two model fingerprints do not mix: after a change of model embed the whole index again"
# How a stored vector is read.
DECODED = {
    "float32": "numbers as they are; every vector has length 1",
    "float16": "numbers rounded to float16; every vector has length 1 up to that",
    "int8": "each vector is scaled by its own largest number, which is 127 or -127; compare by cosine",
    "binary": "sign bits, 1 where a number is above 0, first bit highest (numpy.unpackbits)",
}


@dataclass(frozen=True)
class _Job:
    """What is to be done, and where its files lie."""

    texts: Path
    columns: list[str]  # of the text and, if asked for, the id
    out: Path
    facts: dict[str, Any]  # whatever decides the vectors and their cut into parts

    @property
    def parts(self) -> Path:
        """Folder that is there while the job lasts."""
        return self.out / "parts"

    def known(self) -> dict[str, Any] | None:
        """The manifest, else the job that is under way, else None. Raises UserError if that is another job."""
        for path in (self.out / "manifest.json", self.parts / "job.json"):
            if path.is_file():
                known = read_json(path)
                for key, got in self.facts.items():
                    if (had := known.get(key)) != got:
                        raise UserError(
                            f"{self.out}: holds vectors with {key} {had!r}, got {got!r}, allowed: the same; "
                            f"choose another --out, or remove {self.out} to embed all texts again"
                        )
                return known
        return None

    def part(self, block: int) -> Path:
        """Where a block's vectors lie; Parquet files stay there."""
        npy = self.facts["file_format"] == "npy"
        return self.parts / f"{block:05d}.npy" if npy else self.out / f"vectors-{block:05d}.parquet"

    def is_done(self, block: int, rows: int) -> bool:
        """Whether the part of `block` is there and whole; all blocks together have `rows`."""
        import pyarrow.parquet as pq

        path, size = self.part(block), self.facts["block_texts"]
        try:
            found = len(np.load(path, mmap_mode="r")) if path.suffix == ".npy" else pq.read_metadata(path).num_rows
        except (OSError, ValueError, EOFError):
            return False
        return found == min(size, rows - block * size)


def main(argv: Sequence[str], opened: "Embedder | None" = None) -> int:
    """Embed the texts of one file, or what is missing of them; `opened` is the model if it is loaded already."""
    asked = _arguments(argv)
    world = read_world()
    check_processes(world, "-m trainer.bulk MODEL TEXTS --out DIR")
    if asked.block_texts < 1:
        raise UserError(f"--block-texts: got {asked.block_texts}, allowed: 1 or more")
    if asked.out.exists() and not asked.out.is_dir():
        raise UserError(f"--out: {asked.out} is a file, allowed: a folder, new or of the same job")
    if kind_of(asked.texts) not in SUFFIXES:
        raise UserError(f"{asked.texts}: got a folder, allowed: a file ({', '.join(SUFFIXES)})")
    columns = [asked.column, *([asked.id_column] if asked.id_column else [])]
    if next(_rows(asked.texts, columns), None) is None:
        raise UserError(f"{asked.texts}: has no rows, allowed: at least 1")
    import torch

    from trainer.embedder import open_embedder
    from trainer.model import quiet_libraries

    quiet_libraries()
    embedder = opened or open_embedder(asked.model, device_of(world), asked.precision)
    dim = embedder.width if asked.dim is None else asked.dim
    if dim not in (embedder.dims or range(1, embedder.width + 1)):
        allowed = ", ".join(map(str, embedder.dims or ())) or f"1 to {embedder.width}"
        raise UserError(f"--dim: got {dim}, {asked.model} allows {allowed}")
    changed = asked.texts.stat().st_mtime_ns
    facts = {"format": FORMAT, "model_fingerprint": embedder.fingerprint, "artifact": embedder.artifact}
    facts |= {"role": asked.role, "dim": dim, "vectors": asked.vectors, "file_format": asked.format}
    facts |= {"input_sha256": sha256_of(asked.texts), "columns": columns, "block_texts": asked.block_texts}
    job = _Job(asked.texts, columns, asked.out, facts)
    known: dict[str, Any] = {}
    try:
        known = _begin(job, world)
        if "files" in known and world.rank == 0:
            print(f"{asked.out}: complete already, nothing to do")
        if "files" not in known:
            # The same command given twice at once: the second waits.
            with exclusive(job.parts / f"rank-{world.rank}.lock"):
                if "files" not in (job.known() or known):
                    _work(job, known["rows"], embedder, world, asked.batch_tokens, changed)
                    if world.rank == 0:
                        made_by = {"model": asked.model, "nestling": version(), **embedder.input_of(asked.role)}
                        _publish(job, known["rows"], made_by)
    except (UserError, OSError, torch.OutOfMemoryError) as failed:
        error = failed if isinstance(failed, UserError) else UserError(f"{failed}; {_NEXT}")
        if world.local_rank and known:  # it may be this rank's alone, and only the first of a machine speaks at the end
            print(f"nestling: {error}", file=sys.stderr, flush=True)
        raise error from None
    if world.rank == 0:
        _say(job)
    return 0


def _rows(path: Path, columns: Sequence[str], speaks: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Where each row stands, and its text and id. Raises UserError for a missing column and the first bad row."""

    def choose(found: Sequence[str]) -> Sequence[str]:
        for option, column in zip(("--column", "--id-column"), columns, strict=False):
            if column not in found:
                hint = did_you_mean(column, found)
                raise UserError(f"{option}: {path} has no {column!r}, allowed: {', '.join(found)}{hint}")
        return list(dict.fromkeys(columns))

    lines = path.name.endswith(TEXTS)
    for place, row in read_lines(path, choose, speaks) if lines else read_parquet([path], choose, speaks):
        where = f"{path}:{place}" if lines else f"{path}: row {place}"
        if isinstance(row, str):
            raise UserError(f"{where}: {row}")
        values: list[Any] = [row.get(column) for column in columns]
        values[1:] = [str(key) if type(key) is int else key for key in values[1:]]
        for column, value in zip(columns, values, strict=True):
            try:
                value.encode()
            except (AttributeError, UnicodeEncodeError):  # null or no text; half a surrogate pair
                got = "null" if value is None else repr(value)[:40]
                raise UserError(f"{where}: {column!r}: got {got}, allowed: text; mend or drop the row") from None
        yield where, values


def _begin(job: _Job, world: World) -> dict[str, Any]:
    """What is known of the job; a new one begins once rank 0 has read every row of the input."""
    known = job.known()
    if known is None and world.rank == 0:
        if job.out.is_dir() and (strays := [path.name for path in job.out.iterdir() if path != job.parts]):
            raise UserError(f"--out: {job.out} holds {strays[0]} and no vectors of ours, allowed: a new folder")
        job.parts.mkdir(parents=True, exist_ok=True)
        write_json(job.parts / "job.json", {**job.facts, "rows": _survey(job)})
    wait_for(lambda: job.known() is not None, world, "nothing is embedded yet")
    return job.known() or {}


def _survey(job: _Job) -> int:
    """How many rows there are. Writes ids, one JSON string a line; 8 bytes an id stay in memory.

    Raises UserError for a bad row and for an id that repeats.
    """
    hashes, count = array("q"), 0
    with new_file(job.parts / "ids.jsonl") as path, path.open("w", encoding="ascii") as file:
        for _, values in _rows(job.texts, job.columns, speaks=True):
            count += 1
            for key in values[1:]:
                hashes.append(hash(key))
                file.write(json.dumps(key) + "\n")
    found = np.frombuffer(hashes, dtype=np.int64)
    found.sort()
    twice, seen = set(found[1:][found[1:] == found[:-1]].tolist()), dict[str, str]()
    for where, values in _rows(job.texts, job.columns) if twice else ():
        if hash(values[1]) in twice and (first := seen.setdefault(values[1], where)) != where:
            raise UserError(f"{where}: id {values[1][:60]!r} stands at {first} too, allowed: once")
    return count


def _work(job: _Job, rows: int, embedder: Any, world: World, batch_tokens: int, changed: int) -> None:
    """Embed what is missing of this rank's blocks; rank 0 then waits for the parts of the others."""
    from trainer.embed import embed

    size, role, stream = job.facts["block_texts"], job.facts["role"], _rows(job.texts, job.columns)
    left = [block for block in range(-(-rows // size)) if not job.is_done(block, rows)]
    mine = {block for block in left if block % world.world_size == world.rank}
    begin = time.monotonic()
    with Progress(f"embedding {role} texts", rows, "texts", world.rank == 0) as progress:
        for block in range(max(mine, default=-1) + 1):
            taken = list(islice(stream, size))
            if block not in mine:
                continue
            vectors = embed(
                embedder,
                [values[0] for _, values in taken],
                role,
                batch_tokens=batch_tokens,
                world=read_world({}),
                told=lambda done, before=block * size: progress.to(before + done),
            )
            for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
                raise UserError(f"{taken[row][0]}: its vector holds NaN or infinity, allowed: numbers; mend the model")
            if job.texts.stat().st_mtime_ns != changed:
                raise UserError(f"{job.texts}: changed while it was read; remove {job.out} and run again")
            _write_part(job, block, vectors, [values[1:] for _, values in taken])
    if world.rank == 0:
        for block in left:
            wait_for(partial(job.is_done, block, rows), world, f"part {block} is missing")
        embedded = sum(min(size, rows - block * size) for block in left)
        speed = embedded / (time.monotonic() - begin)
        print(f"{embedded:,} of {rows:,} texts embedded now, {speed:,.0f} texts/s")


def _write_part(job: _Job, block: int, vectors: np.ndarray, ids: list[list[str]]) -> None:
    """Store float32 vectors [n, width] of one block, cut to the job's dim; an id is a list of one or none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trainer.export.encoder import truncate
    from trainer.search import quantise

    dim, stored_as = job.facts["dim"], job.facts["vectors"]
    cut = truncate(vectors, dim) if dim < vectors.shape[1] else vectors
    stored = cut.astype("<f2") if stored_as == "float16" else quantise(cut, stored_as)
    with new_file(job.part(block)) as path:
        if path.suffix == ".npy":
            return np.save(path, stored)
        first = block * job.facts["block_texts"]
        keys = {"id": [key for (key,) in ids]} if ids[0] else {"row": np.arange(first, first + len(ids))}
        column = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1])
        pq.write_table(pa.table({**keys, "vector": column}), path)


def _publish(job: _Job, rows: int, made_by: dict[str, Any]) -> None:
    """Join the parts, which are all there, and write the manifest last."""
    parts = [job.part(block) for block in range(-(-rows // job.facts["block_texts"]))]
    names = [part.name for part in parts]
    if parts[0].suffix == ".npy":
        first = np.load(parts[0], mmap_mode="r")
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (rows, first.shape[1])}
        with new_file(job.out / "vectors.npy") as path, path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part))
        names = ["vectors.npy", "ids.jsonl"][: len(job.columns)]
        if len(names) == 2 and (job.parts / "ids.jsonl").exists():  # else a killed process has moved it
            (job.parts / "ids.jsonl").replace(job.out / "ids.jsonl")
    files = {name: {"bytes": (job.out / name).stat().st_size, "sha256": sha256_of(job.out / name)} for name in names}
    facts = {**made_by, "rows": rows, "input": str(job.texts), "decoded": DECODED[job.facts["vectors"]], "note": _MIX}
    write_json(job.out / "manifest.json", {**job.facts, **facts, "files": files})


def _say(job: _Job) -> None:
    """Tell what a complete folder holds. Raises UserError if a file is not there as it was."""
    manifest = job.known() or {}
    for name, entry in manifest["files"].items():
        path = job.out / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: missing or cut off; remove {job.out} and run again")
    remove_folder(job.parts)
    what = "{rows:,} vectors of {role} texts, dim {dim}, {vectors}; model {model_fingerprint:.12} ({artifact})"
    print(f"{job.out}: {what.format(**manifest)}\n{_MIX}")


def wait_for(until: Callable[[], bool], world: World, problem: str) -> None:
    """Return when `until` holds. Raises UserError where the launcher has no other process that could bring it about."""
    while True:
        parent = psutil.Process().parent()  # looked at first: a process that has just ended has done its work
        is_alone = world.nodes == 1 and (parent is None or len(parent.children()) < 2)
        if until():
            return
        if is_alone:
            raise UserError(f"{problem} and no other process of the job lives; {_NEXT}")
        time.sleep(_LOOK)


def device_of(world: World) -> str:
    """This process's own GPU, or the CPU where there is none or accelerate is told to use it."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{world.local_rank % torch.cuda.device_count()}"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nestling embed", description="Embed the texts of a file.")
    parser.add_argument("model", help="run, model folder, checkpoint, bundle, hub name or package:PACKAGE/FOLDER")
    parser.add_argument("texts", type=Path, help=f"a file: {', '.join(SUFFIXES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder; one of the same job goes on where it stopped")
    parser.add_argument("--column", default="text", help="column of the texts (default: text)")
    parser.add_argument("--id-column", help="column of ids, which must differ; they are written as text")
    parser.add_argument("--role", choices=("document", "query"), default="document", help="(default: document)")
    parser.add_argument("--dim", type=int, help="leading dims to keep, scaled to length 1 again (default: all)")
    parser.add_argument("--vectors", choices=tuple(DECODED), default="float32", help="storage (default: float32)")
    parser.add_argument("--format", choices=("npy", "parquet"), default="npy", help="(default: npy)")
    parser.add_argument("--precision", help="which ONNX file of a bundle (default: fp32)")
    batch = f"rows x longest of a batch (default: {BATCH_TOKENS})"
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help=batch)
    parser.add_argument("--block-texts", type=int, default=32768, help="texts of a part (default: 32768)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    end_process(main, sys.argv[1:], speaks=os.environ.get("LOCAL_RANK", "0") == "0")

"""`nestling data run CONFIG.yaml`: sources -> clean, leak-proof shards with a data card, stage by stage.

Each stage is a plain function of one part (data_tools/runner.py runs them); what decides its bytes is its fingerprint,
so a stage whose inputs and settings are unchanged is skipped, and a killed one goes on.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools import chunk, corpus, dedup, leaks, quality
from data_tools.card import share_of, write_card
from data_tools.config import Pipeline
from data_tools.runner import Done, Output, key_of, run_stage
from data_tools.shards import ShardWriter, read_manifest
from launch.errors import UserError, exit_code
from launch.files import exclusive, new_file, read_json, remove_folder, sha256_of
from launch.reader import read_config

_VERSION = 3  # of the stages: a change of what they write changes it, so that nothing old is reused
STAGES = ("read", "pairs", "filter", "dedup", "split", "decontaminate", "shards")
_COLUMNS: dict[str, Any] = {
    "anchor": "text",
    "positive": "text",
    "document": "text",
    "place": "text",
    "start": "int",
    "end": "int",
}


@dataclass
class _Run:
    """The stages of one config that are done, in order."""

    config: Pipeline
    out: Path
    done: dict[str, Done] = field(default_factory=dict)

    def stage(self, name: str, work: Any, units: Sequence[Any], arguments: tuple[Any, ...], *decides: Any) -> Done:
        """Run a stage; `decides` is what its bytes depend on besides the stages before it."""
        before = [done.fingerprint for done in self.done.values()]
        self.done[name] = run_stage(
            self.out / "stages" / name,
            work,
            units,
            arguments,
            fingerprint=key_of(_VERSION, name, before, list(decides)),
            workers=self.config.workers,
            executor=self.config.executor,
        )
        return self.done[name]


def run(config: Pipeline, last: str = "shards") -> dict[str, Any] | None:
    """Run the stages up to `last`; the data card when all are done. Raises UserError."""
    out = Path(config.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "stages").is_dir():
        raise UserError(f"out: {out} holds other files, allowed: a new folder, or one that `nestling data run` made")
    try:
        (out / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {error.filename}: cannot be made: {error.strerror}; choose another folder") from None
    with exclusive(out / "stages" / "lock"):
        return _run(_Run(config, out), STAGES.index(last))


def _run(run: _Run, last: int) -> dict[str, Any] | None:
    config, out = run.config, run.out
    _read(run, "read", config.sources)
    steps = (_pairs, _filter, _dedup, _split, _decontaminate, _shards)
    for step in steps[:last]:
        step(run)
    return write_card(config, out, run.done) if last == len(steps) else None


def _read(run: _Run, name: str, sources: list[Any]) -> None:
    # Names of documents come from the config's address, also where a copy from an object store is read.
    local = [corpus.locate(source, run.out / "cache") for source in sources]
    units = [unit for number, source in enumerate(local) for unit in corpus.units_of(source, number)]
    settings = run.config.read
    facts = [source.model_dump(exclude={"path", "license"}) for source in sources]
    done = run.stage(
        name, corpus.read_stage, units, (sources, settings.max_row_bytes), units, facts, settings.max_row_bytes
    )
    rejected, rows = done.dropped.total(), done.rows
    rejects = run.out / ("rejects.jsonl" if name == "read" else f"rejects-{name}.jsonl")
    _join(done, "rejects.jsonl", rejects)
    if rejected > settings.max_rejected * (rows + rejected):
        raise UserError(
            f"read.max_rejected: {rejected:,} of {rows + rejected:,} rows are rejected, allowed: "
            f"{settings.max_rejected:.2%}; see {rejects}, mend the source or raise read.max_rejected"
        )
    if not rows:
        raise UserError(f"{', '.join(source.name for source in sources)}: no row to go on with; see {rejects}")


def _pairs(run: _Run) -> None:
    config = run.config
    tokenizer = chunk.tokenizer_file(config.chunk.tokenizer) if config.chunk else None
    limit = config.chunk.max_tokens if config.chunk else 0
    digest = sha256_of(tokenizer) if tokenizer else ""
    arguments = (config.sources, str(tokenizer or ""), limit)
    run.stage("pairs", chunk.pairs_stage, _parts(run, "read"), arguments, digest, limit)


def _filter(run: _Run) -> None:
    settings = run.config.filter
    run.stage("filter", quality.filter_stage, _parts(run, "pairs"), (settings,), settings.model_dump())


def _dedup(run: _Run) -> None:
    parts, near = run.done["filter"].parts, run.config.dedup.near
    signed = run.stage("sign", dedup.sign_stage, _parts(run, "filter"), (near,), near)
    sizes = [[task["facts"]["rows"], task["facts"]["keys"]] for task in signed.tasks]
    folder = str(signed.folder)
    units = dedup.match_units(sum(rows for rows, _ in sizes), sizes[0][1])
    matched = run.stage("match", dedup.match_stage, units, (folder, sizes, near))
    resolved = run.stage("resolve", dedup.resolve_stage, [None], (str(matched.folder), folder, sizes))
    firsts = [sum(rows for _, rows in parts[:number]) for number in range(len(parts))]
    rows = [[part, first, count] for (part, count), first in zip(parts, firsts, strict=True)]
    run.stage("dedup", dedup.dedup_stage, rows, (str(resolved.folder),))


def _split(run: _Run) -> None:
    settings = run.config.split
    sides = [source.held_out for source in run.config.sources]
    arguments = (str(run.done["resolve"].folder), settings.held_out, settings.seed, sides)
    run.stage("split", leaks.split_stage, _parts(run, "dedup"), arguments, settings.model_dump(), sides)


def _decontaminate(run: _Run) -> None:
    settings = run.config.decontaminate
    evaluation: list[str] = []
    if settings.against:
        _read(run, "evaluation", settings.against)
        evaluation = _parts(run, "evaluation")
    parts = _parts(run, "split")
    leaks.read_evaluation.cache_clear()
    arguments = (evaluation, parts, settings.ngram, settings.near)
    done = run.stage("decontaminate", leaks.decontaminate_stage, parts, arguments, settings.ngram, settings.near)
    _join(done, "leaks.jsonl", run.out / "leaks.jsonl")


def _shards(run: _Run) -> None:
    config, out = run.config, run.out
    for task, name in enumerate(("train", "held_out")):
        made = out / "stages" / "shards" / f"{task:05d}.json"
        if made.exists() and read_json(made)["facts"]["rows"] and not (out / name).exists():
            made.unlink()  # somebody removed what the task made
    named = [corpus.title_and_license(source) for source in config.sources]
    facts = ([title for title, _ in named], [spdx for _, spdx in named])
    lost = Counter[str]()
    for stage, done in run.done.items():
        lost += done.dropped if stage != "evaluation" else Counter()
    arguments = (str(out), _parts(run, "decontaminate"), *facts, dict(lost.most_common()))
    run.stage("shards", shards_stage, ["train", "held_out"], arguments, *facts)


def shards_stage(
    output: Output,
    side: str,
    out: str,
    parts: list[str],
    names: list[str],
    licenses: list[Any],
    dropped: dict[str, int],
) -> None:
    """The stage `shards`: rows of one side as a folder of shards below `out`; `dropped` is of both sides."""
    import pyarrow.parquet as pq

    folder = Path(out) / side
    remove_folder(folder)
    only = [("held_out", "=", side == "held_out")]
    kept = [0] * len(names)
    for part in parts:
        for source in pq.read_table(part, columns=["source"], filters=only)["source"].to_pylist():
            kept[source] += 1
    here = [number for number, count in enumerate(kept) if count]
    if not here:
        if side == "train":
            raise UserError("no pair is left for train; see the counts of each stage above")
        output.facts = {"rows": 0, "kept": kept, "fingerprint": None}
        return
    known = dict.fromkeys(licenses[number] or "LicenseRef-unknown" for number in here)
    spdx = " AND ".join(f"({name})" if " " in name and len(known) > 1 else name for name in known)
    titles = ", ".join(names[number] for number in here)
    with ShardWriter(folder, _COLUMNS, source=titles, license=spdx, made_by="nestling data run") as writer:
        writer.dropped = dropped
        for part in parts:
            for row in pq.read_table(part, filters=only).to_pylist():
                writer.write({name: row[name] for name in _COLUMNS})
    output.facts = {"rows": sum(kept), "kept": kept, "fingerprint": read_manifest(folder).fingerprint}


def _parts(run: _Run, name: str) -> list[str]:
    parts = [part for part, _ in run.done[name].parts]
    if not parts:
        reasons = ", ".join(f"{why} {count:,}" for why, count in run.done[name].dropped.most_common(3))
        raise UserError(f"{name}: no row is left{': ' + reasons if reasons else ''}; change that stage's settings")
    return parts


def _join(done: Done, name: str, target: Path) -> None:
    """One file of what every task noted."""
    with new_file(target) as path, path.open("wb") as file:
        for task in range(len(done.tasks)):
            file.write((done.folder / f"{task:05d}.{name}").read_bytes())


def main(argv: Sequence[str]) -> int:
    """`run` and one verb per stage; the stages before it are run or skipped."""
    verb, *rest = argv
    parser = argparse.ArgumentParser(prog=f"nestling data {verb}", description="Sources -> clean, leak-proof shards.")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(rest)
    config = read_config(args.config, args.overrides, Pipeline, "out and sources")
    card = run(config, "shards" if verb == "run" else verb)
    if card:
        share = f"{share_of(card):.1%} of all (split.held_out: {config.split.held_out})"
        print(f"{Path(config.out) / 'train'}: {card['train']['rows']:,} pairs")
        print(f"{Path(config.out) / 'held_out'}: {card['held_out']['rows']:,} pairs, {share}")
        print(f"{Path(config.out) / 'card.md'}: counts, reasons, licences; {card['leaks']:,} leaks in leaks.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

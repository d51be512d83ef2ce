"""Docstring -> function pairs from the Python standard library and installed packages: real data offline.

python -m data_tools.docstrings --out DIR     writes DIR/train, DIR/held_out (shard folders) and a data card.

Nothing of the packages is imported or run. Training and held-out packages are apart, and what they share
(copies and near-copies of code, equal summaries) is removed from the training side.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data_tools.packages import HELD_OUT, STDLIB, Package, find_packages, python_files
from data_tools.pairs import Pair, pairs_of
from data_tools.progress import Progress
from data_tools.shards import ColumnType, ShardWriter, read_manifest, verify_shards
from data_tools.split import NEAR_COPY, code_identity, code_tokens, draw_order, near_copies, normalise, shingles
from launch.errors import UserError, exit_code
from launch.files import new_folder, write_json

_SHARED_SUMMARY = 3  # functions of one side that may have the same summary
_SHOWN = ("max_train", "max_held_out", "max_chars", "seed", "python")  # settings named in the card's text
_COLUMNS: dict[str, ColumnType] = {field.name: "int" if field.type is int else "text" for field in fields(Pair)}


def collect(packages: Sequence[Package], dropped: Counter[str]) -> Iterator[Pair]:
    """All pairs of these packages; what gives none is counted in `dropped` under its reason."""
    files = [(package, path) for package in packages for path in python_files(package)]
    with Progress("parsing", len(files), "files") as progress:
        for done, (package, path) in enumerate(files):
            progress.to(done)
            relative = path.relative_to(package.root).as_posix()
            try:
                with tokenize.open(path) as file:  # the encoding that the file itself declares
                    source = file.read()
                found = list(pairs_of(source, package.name, relative))
            except (SyntaxError, ValueError, RecursionError):
                dropped["file does not decode or parse"] += 1
                continue
            except OSError:
                dropped["file cannot be read"] += 1
                continue
            for item in found:
                if isinstance(item, Pair):
                    yield item
                else:
                    dropped[item] += 1


class _Side:
    """Pairs of one side and what the comparisons need of each."""

    def __init__(self, packages: Sequence[Package], max_chars: int, seed: int):
        self.packages, self.dropped = packages, Counter[str]()
        found = list(collect(packages, self.dropped))
        order = draw_order((f"{p.package}/{p.path}:{p.line}:{p.name}" for p in found), seed)
        self.pairs = [found[i] for i in order]
        self.keep(lambda pair: len(pair.positive) <= max_chars, f"function longer than {max_chars} characters")
        for identity, reason in (
            (normalise, "copy of another function"),
            (code_identity, "copy but for name, comments and layout"),
        ):
            firsts = set({identity(pair.positive): pair for pair in reversed(self.pairs)}.values())
            self.keep(lambda pair, firsts=firsts: pair in firsts, reason)
        shared = Counter(normalise(pair.anchor) for pair in self.pairs)
        self.keep(
            lambda pair: shared[normalise(pair.anchor)] <= _SHARED_SUMMARY,
            f"summary of more than {_SHARED_SUMMARY} functions",
        )

    def keep(self, test: Callable[[Pair], bool], reason: str) -> None:
        """Keep the pairs that pass and count the others."""
        kept = [pair for pair in self.pairs if test(pair)]
        if len(kept) < len(self.pairs):
            self.dropped[reason] += len(self.pairs) - len(kept)
        self.pairs = kept

    def draw(self, most: int | None) -> None:
        """Keep the first `most` in the drawn order."""
        drawn = set(self.pairs[:most])
        self.keep(lambda pair: pair in drawn, "not drawn")


def leaks(train: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, set[Pair]]:
    """Reason -> training pairs that are on the held-out side too, in whole or nearly."""
    anchors = {normalise(pair.anchor) for pair in held_out}
    texts = {normalise(pair.positive) for pair in held_out}
    codes = {code_identity(pair.positive) for pair in held_out}
    near = near_copies(
        [shingles(code_tokens(pair.positive)) for pair in train],
        [shingles(code_tokens(pair.positive)) for pair in held_out],
    )
    return {
        "held-out side has this summary": {p for p in train if normalise(p.anchor) in anchors},
        "held-out side has this function": {p for p in train if normalise(p.positive) in texts},
        "held-out side has this code under another name or layout": {
            p for p in train if code_identity(p.positive) in codes
        },
        f"held-out side has a near-copy (Jaccard >= {NEAR_COPY})": {train[i] for i in near},
    }


def make(
    train: Sequence[Package],
    held_out: Sequence[Package],
    out: Path,
    *,
    max_train: int | None = None,
    max_held_out: int | None = None,
    max_chars: int = 4000,
    seed: int = 42,
) -> dict[str, Any]:
    """Write both sides and the data card to the folder `out`; returns the card, with `made` = false if they
    were there already from the same packages and settings.

    Raises UserError if a package is on both sides, a side stays empty, or `out` holds something else.
    """
    if both := set(train) & set(held_out):
        raise UserError(f"package {both.pop().name!r} is asked for on both sides; give it to one")
    settings = {
        "train": {package.name: package.version for package in train},
        "held_out": {package.name: package.version for package in held_out},
        "max_train": max_train,
        "max_held_out": max_held_out,
        "max_chars": max_chars,
        "seed": seed,
        "python": platform.python_version(),
    }
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        return {**_made_before(out, settings), "made": False}
    sides = {"train": _Side(train, max_chars, seed), "held_out": _Side(held_out, max_chars, seed)}
    # Against all of the held-out side, not only what is drawn: another draw of it stays clean too.
    against = sides["held_out"].pairs
    found = leaks(sides["train"].pairs, against)
    for reason, pairs in found.items():
        sides["train"].keep(lambda pair, pairs=pairs: pair not in pairs, reason)
    left = {reason: len(pairs) for reason, pairs in leaks(sides["train"].pairs, against).items()}
    assert not any(left.values()), left
    sides["train"].draw(max_train)
    sides["held_out"].draw(max_held_out)

    card: dict[str, Any] = {
        "settings": settings,
        "leaks_found": {reason: len(pairs) for reason, pairs in found.items()},
        "leaks_left": left,
    }
    with new_folder(out) as partial:
        for name, side in sides.items():
            card[name] = _write_side(side, partial / name, name)
        write_json(partial / "card.json", card)
        (partial / "card.md").write_text(card_text(card), encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, as seen above
    return {**card, "made": True}


def _made_before(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        card = json.loads((out / "card.json").read_text(encoding="utf-8"))
        same = card["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: exists and is no finished corpus; choose another --out or remove it") from None
    if not same:
        raise UserError(f"{out}: exists, made with other settings or packages; choose another --out or remove it")
    for name in ("train", "held_out"):
        verify_shards(out / name)
    return card


def _write_side(side: _Side, folder: Path, name: str) -> dict[str, Any]:
    if not side.pairs:
        packages = ", ".join(package.name for package in side.packages)
        raise UserError(f"no pairs are left for {name} from {packages}; allowed: packages with documented functions")
    kept = Counter(pair.package for pair in side.pairs)
    packages = [package for package in side.packages if kept[package.name]]
    licenses = ", ".join(f"{package.name}: {package.license}" for package in packages)
    with ShardWriter(
        folder,
        _COLUMNS,
        source=", ".join(f"{package.name} {package.version}" for package in packages),
        license=licenses,
        made_by="nestling data docstrings",
    ) as writer:
        writer.dropped = dict(sorted(side.dropped.items()))
        for pair in side.pairs:
            writer.write(asdict(pair))
    manifest = read_manifest(folder)
    return {
        "rows": manifest.rows,
        "fingerprint": manifest.fingerprint,
        "packages": [
            {"name": p.name, "version": p.version, "license": p.license, "rows": kept[p.name]} for p in side.packages
        ],
        "dropped": manifest.dropped,
    }


def card_text(card: dict[str, Any]) -> str:
    """The data card as Markdown."""
    lines = ["# Data card: docstring -> function pairs", ""]
    lines += ["Settings: " + ", ".join(f"{key} {card['settings'][key]}" for key in _SHOWN), ""]
    for name in ("train", "held_out"):
        side = card[name]
        lines += [f"## {name}: {side['rows']:,} rows", "", f"Fingerprint `{side['fingerprint']}`", ""]
        lines += ["| package | version | licence | rows |", "|---|---|---|---|"]
        lines += [f"| {p['name']} | {p['version']} | {p['license']} | {p['rows']:,} |" for p in side["packages"]]
        lines += ["", "| left out | functions or files |", "|---|---|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in side["dropped"].items()] + [""]
    lines += ["## Leak check, train against all of held-out", "", "| kind | found | left |", "|---|---|---|"]
    lines += [f"| {kind} | {count:,} | {card['leaks_left'][kind]:,} |" for kind, count in card["leaks_found"].items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """The command; prints one line per reason and side."""
    parser = argparse.ArgumentParser(prog="nestling data docstrings", description="Docstring -> function pairs.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: train/, held_out/, card.md")
    parser.add_argument("--train", nargs="+", default=[STDLIB], metavar="NAME", help="default: stdlib")
    parser.add_argument("--held-out", nargs="+", metavar="NAME", help=f"default: those installed of {HELD_OUT}")
    for name, words in (("--max-train", "rows drawn for training"), ("--max-held-out", "rows drawn as held-out")):
        parser.add_argument(name, type=_positive_integer, metavar="N", help=f"{words}; default: all")
    parser.add_argument("--max-chars", type=_positive_integer, default=4000, metavar="N", help="longest function kept")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the draw and the order")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed: got {args.seed}, allowed: 0 to 2**64 - 1")
    held_out = args.held_out
    if held_out is None:
        installed = importlib.metadata.packages_distributions()
        held_out = [name for name in HELD_OUT if name in installed and name not in args.train]
        if not held_out:
            raise UserError(f"none of {', '.join(HELD_OUT)} is installed; install one or give --held-out NAME")
    try:
        card = make(
            find_packages(args.train),
            find_packages(held_out),
            args.out,
            max_train=args.max_train,
            max_held_out=args.max_held_out,
            max_chars=args.max_chars,
            seed=args.seed,
        )
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: cannot be written: {error.strerror}") from None
    if not card["made"]:
        print(f"{args.out}: there already, made with the same settings from the same packages")
    for name in ("train", "held_out"):
        side = card[name]
        packages = ", ".join(f"{p['name']} {p['rows']:,}" for p in side["packages"])
        print(f"{args.out / name}: {side['rows']:,} pairs ({packages})")
        for reason, count in side["dropped"].items():
            print(f"  left out {count:,}: {reason}")
    print(f"{args.out / 'card.md'}: licences, versions, leak check (nothing of train is in held_out)")
    return 0


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

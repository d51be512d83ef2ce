"""`nestling data verify|stats|show DIR`: what a folder of shards holds, and whether it is what was written."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.readers import read_parquet
from data_tools.shards import read_manifest, verify_shards
from launch.errors import CheckFailed, UserError, exit_code


def main(argv: Sequence[str]) -> int:
    """Look at one folder; a damaged one is exit code 3."""
    verb, *rest = argv
    parser = argparse.ArgumentParser(prog=f"nestling data {verb}")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of shards")
    if verb == "show":
        parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many (default: 3)")
        parser.add_argument("--chars", type=int, default=300, metavar="N", help="of a text (default: 300)")
    args = parser.parse_args(rest)
    manifest = read_manifest(args.folder)
    files = [args.folder / shard.name for shard in manifest.shards]
    if verb == "verify":
        try:
            verify_shards(args.folder)
        except UserError as error:
            raise CheckFailed(str(error)) from None
        print(
            f"{args.folder}: whole: {manifest.rows:,} rows in {len(files)} shards, fingerprint {manifest.fingerprint}"
        )
    elif verb == "show":
        _show(files, args.rows, args.chars)
    else:
        print(f"{args.folder}: {manifest.rows:,} rows in {len(files)} shards; {manifest.source}; {manifest.license}")
        _count(files, [name for name, kind in manifest.columns.items() if kind == "text"])
    return 0


def _show(files: Sequence[Path], rows: int, chars: int) -> None:
    for place, row in read_parquet(files, lambda columns: columns, speaks=False):
        if place > rows or isinstance(row, str):
            break
        print(f"row {place}")
        for name, value in row.items():
            text = str(value)
            print(f"  {name}: {text[:chars]}{' ...' if len(text) > chars else ''}")


def _count(files: Sequence[Path], columns: Sequence[str]) -> None:
    lengths: dict[str, list[int]] = {name: [] for name in columns}
    for _, row in read_parquet(files, lambda _: columns):
        assert isinstance(row, dict)
        for name, value in row.items():
            if value is not None:
                lengths[name].append(len(value))
    print(f"{'column':<14}{'texts':>10}{'characters: least':>19}{'median':>9}{'95%':>9}{'most':>9}")
    for name, found in lengths.items():
        if found:
            least, middle, high, most = np.percentile(found, [0, 50, 95, 100])
            print(f"{name:<14}{len(found):>10,}{least:>19,.0f}{middle:>9,.0f}{high:>9,.0f}{most:>9,.0f}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

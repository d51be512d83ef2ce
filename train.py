"""Trains what a run file describes: accelerate launch train.py RUN.yaml [--fresh] [--force] [section.key=value ...]"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import errors, preflight, reader, world


def main(argv: Sequence[str]) -> int:
    words = [word for word in argv if word not in reader.FLAGS]
    if not words or words[0].startswith("-"):
        raise errors.UserError(world.USAGE)
    where, run_file = world.read_world(), Path(words[0])
    config = reader.read_run(run_file, words[1:])
    world.check_world(config, where)
    preflight.require_preflight(config, run_file)
    run_dir = reader.run_directory(config, run_file, is_fresh="--fresh" in argv)
    from trainer.main import run  # imports torch, so a mistake above answers at once

    return run(config, run_dir, list(argv), where, is_forced="--force" in argv)


if __name__ == "__main__":
    # Once per machine: a file may be missing on one of them only.
    errors.end_process(main, sys.argv[1:], speaks=os.environ.get("LOCAL_RANK", "0") == "0")

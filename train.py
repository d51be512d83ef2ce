"""Trains what a run file describes: accelerate launch train.py RUN.yaml [section.key=value ...]"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import errors, preflight, reader, world


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        raise errors.UserError(world.USAGE)
    where, run_file = world.read_world(), Path(argv[0])
    config = reader.read_run(run_file, argv[1:])
    world.check_world(config, where)
    preflight.require_preflight(config, run_file)
    from trainer.main import run  # imports torch, so a mistake above answers at once

    return run(config, run_file, list(argv), where)


if __name__ == "__main__":
    # Once per machine: a file may be missing on one of them only.
    errors.end_process(main, sys.argv[1:], speaks=os.environ.get("LOCAL_RANK", "0") == "0")

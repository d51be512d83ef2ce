"""Keeps a run going: starts its launcher, starts it again after a crash, and ends with the run's own exit code.

    nestling supervise accelerate launch --config_file X.yaml train.py RUN.yaml [section.key=value ...]

A launcher turns every code of its workers into 1; so each worker leaves its own code in a folder that the environment
names (`EXIT_CODES` of launch/errors.py). What the user must mend is not tried again.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.errors import EXIT_CHECK, EXIT_CODES, EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, UserError
from launch.files import read_json
from launch.reader import read_run, run_directory

_ALLOWED = "allowed: accelerate launch [...] train.py RUN.yaml [section.key=value ...]"
RESTARTS = 3  # after crashes, one after the other, without a new checkpoint between them
PAUSE = 5.0  # seconds before the first of them; each further one waits twice as long
MEMORY_MARKERS = "out_of_memory.*.json"


def supervise(command: Sequence[str], pause: float = PAUSE) -> int:
    """Run `command` until it is done or cannot go on; returns an exit code of launch/errors.py.

    A run that was out of memory goes on from its last checkpoint with half the micro-batches, without a pause.
    """
    words, run_dir = list(command), _run_dir(command)
    crashes, last = 0, _newest(run_dir)
    while True:
        _take_markers(run_dir)  # of a run that nobody supervised
        code = _start(words)
        if tokens := _take_markers(run_dir):
            words = [*command, f"train.micro_batch_tokens={min(tokens)}"]
            _say(f"out of memory; going on with {words[-1]}")
            continue
        if code != EXIT_CRASH:
            return code
        newest = _newest(run_dir)
        crashes, last = (1 if newest != last else crashes + 1), newest
        if crashes > RESTARTS:
            _say(f"the run crashed {crashes} times without a new checkpoint; see the output above")
            return EXIT_CRASH
        wait = pause * 2 ** (crashes - 1)
        _say(f"the run crashed; restart {crashes} of {RESTARTS} in {wait:.0f} s")
        time.sleep(wait)


def _run_dir(command: Sequence[str]) -> Path:
    scripts = [place for place, word in enumerate(command) if Path(word).name == "train.py"]
    if not scripts or len(command) <= scripts[0] + 1:
        raise UserError(f"supervise: got {' '.join(command) or 'no command'}; {_ALLOWED}")
    run_file = Path(command[scripts[0] + 1])
    return run_directory(read_run(run_file, command[scripts[0] + 2 :]), run_file)


def _start(words: Sequence[str]) -> int:
    """Run a launcher to its end; the worst code that a worker left, a crash where none says more."""
    with tempfile.TemporaryDirectory(prefix="nestling-") as folder:
        try:
            process = subprocess.Popen(words, env=os.environ | {EXIT_CODES: folder})
        except OSError as error:
            raise UserError(f"supervise: cannot start {words[0]}: {error.strerror}") from None
        stops: list[int] = []

        def stop(number: int, _: object) -> None:
            stops.append(number)
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            launcher = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        if launcher == 0:
            return EXIT_DONE
        codes = {int(file.read_text()) for file in Path(folder).iterdir()}
    stopped = [128 + number for number in stops[:1]]  # as a shell says it
    said = [code for code in (EXIT_USER, EXIT_CHECK, EXIT_PREEMPTED) if code in codes]
    return (said + stopped + [EXIT_CRASH])[0]


def _take_markers(run_dir: Path) -> list[int]:
    """Budgets that ranks out of memory asked for; their markers are removed."""
    markers = list(run_dir.glob(MEMORY_MARKERS))
    tokens = [read_json(marker)["micro_batch_tokens"] for marker in markers]
    for marker in markers:
        marker.unlink()
    return tokens


def _newest(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def _say(line: str) -> None:
    print(f"nestling supervise: {line}", file=sys.stderr, flush=True)

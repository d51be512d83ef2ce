"""Keeps a run going: starts its launcher, starts it again after a crash, and ends with the run's own exit code.

    nestling supervise accelerate launch --config_file X.yaml train.py RUN.yaml [--fresh] [section.key=value ...]

A launcher turns every code of its workers into 1; so each worker leaves its own code, and before it its number as a
process, in a folder that the environment names (`EXIT_CODES` of launch/errors.py). A signal to stop goes to the workers
alone: launchers kill what they pass one on to. What the user must mend is not tried again.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil

from launch.config import RunConfig
from launch.config_evaluate import unmet
from launch.errors import (
    EXIT_CHECK,
    EXIT_CODES,
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_USER,
    STOP_SIGNALS,
    UserError,
    signal_at_parents_end,
)
from launch.files import read_json
from launch.reader import FLAGS, read_run, run_directory

_ALLOWED = "allowed: accelerate launch [...] train.py RUN.yaml [section.key=value ...]"
RESTARTS = 3  # after crashes, one after the other, without a new checkpoint between them
PAUSE = 5.0  # seconds before the first of them; each further one waits twice as long
# Where several nodes meet: called before each start with the budget of micro-batches, or None; returns that of all.
Before = Callable[[int | None], int | None]


def supervise(
    command: Sequence[str], pause: float = PAUSE, before: Before | None = None, entered: "Stops | None" = None
) -> int:
    """Run `command` until it is done or cannot go on; returns an exit code of launch/errors.py.

    A run that was out of memory goes on from its last checkpoint with half the micro-batches, without a pause.
    `entered` is of who looks at signals himself before and after.
    """
    command, config, run_dir = _read(command)
    budget: int | None = None
    crashes, last = 0, _newest(run_dir)
    with nullcontext(entered) if entered else Stops() as stops:
        while True:
            if before:
                budget = before(budget)
            words = [*command, f"train.micro_batch_tokens={budget}"] if budget else command
            before_it = finished(run_dir)
            code, tokens = _start(words, stops, config.train.grace_seconds)
            if code in (EXIT_CRASH, EXIT_PREEMPTED) and finished(run_dir) not in (None, before_it):
                return code_of(run_dir)  # hit between its last word and its end
            if code != EXIT_CRASH and not tokens:
                return code
            if stops.came:
                return EXIT_PREEMPTED
            if tokens:
                budget = min(tokens)
                _say(f"out of memory; going on with train.micro_batch_tokens={budget}")
                continue
            newest = _newest(run_dir)
            crashes, last = (1 if newest != last else crashes + 1), newest
            if crashes > RESTARTS:
                _say(f"the run crashed {crashes} times without a new checkpoint; see the output above")
                return EXIT_CRASH
            wait = pause * 2 ** (crashes - 1)
            _say(f"the run crashed; restart {crashes} of {RESTARTS} in {wait:.0f} s")
            if stops.wait(wait):
                return EXIT_PREEMPTED


def _read(command: Sequence[str]) -> tuple[list[str], RunConfig, Path]:
    """The command as it is to be repeated, its config and its run folder."""
    scripts = [place for place, word in enumerate(command) if Path(word).name == "train.py"]
    if not scripts or len(command) <= scripts[0] + 1:
        raise UserError(f"supervise: got {' '.join(command) or 'no command'}; {_ALLOWED}")
    words = [word for word in command if word != "--fresh"]
    run_file = Path(words[scripts[0] + 1])
    config = read_run(run_file, [word for word in words[scripts[0] + 2 :] if word not in FLAGS])
    is_fresh = "--fresh" in command
    run_dir = run_directory(config, run_file, is_fresh)
    if is_fresh:  # once, not at every restart
        words.append(f"train.run_dir={run_dir}")
    return words, config, run_dir


class Stops:
    """Signals to stop, passed on to the workers that have begun, to the launcher where none has."""

    def __init__(self) -> None:
        self.came = False
        self.launcher: subprocess.Popen[bytes] | None = None
        self.folder = Path()

    def __enter__(self) -> "Stops":
        self._before = {number: signal.signal(number, self._pass_on) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: object) -> None:
        self.came = True
        workers = _workers(self.folder)
        for worker in workers:
            with suppress(psutil.Error):
                worker.send_signal(number)
        if not workers and self.launcher is not None:
            self.launcher.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Whether one comes within `seconds`."""
        end = time.monotonic() + seconds
        while not self.came and time.monotonic() < end:
            time.sleep(min(0.2, seconds))
        return self.came


def _start(words: Sequence[str], stops: Stops, grace: float) -> tuple[int, list[int]]:
    """Run a launcher to its end; the worst code that a worker left, a crash where none says more.

    And the budgets of micro-batches that ranks out of memory asked for.
    """
    with tempfile.TemporaryDirectory(prefix="nestling-") as folder:
        stops.folder = Path(folder)
        # torchrun kills its workers so long after it was told to stop, 30 s unless it is told more.
        limits = {EXIT_CODES: folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(grace + 10))}
        environment = os.environ | limits
        try:
            stops.launcher = subprocess.Popen(words, env=environment, preexec_fn=_as_launcher)  # noqa: PLW1509
            if stops.came:  # before there was one to pass it on to
                stops.launcher.terminate()
        except OSError as error:
            raise UserError(f"supervise: cannot start {words[0]}: {error.strerror}") from None
        launcher = stops.launcher.wait()
        stops.launcher = None
        # A launcher that was killed has left them behind; each was told so by the kernel, and saves.
        _, left = psutil.wait_procs([p for p in psutil.process_iter() if _is_of(p, folder)], timeout=grace)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left)
        # Of each rank that began pid.RANK, of each that ended RANK with its code.
        words_left = {kind: _words(Path(folder), kind) for kind in ("pid.", "memory.", "")}
    begun, tokens, codes = len(words_left["pid."]), words_left["memory."], words_left[""]
    return _code(launcher, codes, begun, stops.came), tokens


def _words(folder: Path, kind: str) -> list[int]:
    """What ranks left with `leave_word` of launch/errors.py."""
    files = [file for file in folder.iterdir() if file.name.rstrip("0123456789") == kind]
    return [int(text) for file in files if (text := file.read_text())]


def _code(launcher: int, codes: list[int], begun: int, is_stopped: bool) -> int:
    for code in (EXIT_USER, EXIT_CHECK):  # its launcher then has the other ranks stop
        if code in codes:
            return code
    if EXIT_PREEMPTED in codes:  # nobody asked for it where the launcher or a rank was killed
        has_crashed = launcher < 0 or len(codes) < begun or EXIT_CRASH in codes
        return EXIT_CRASH if has_crashed and not is_stopped else EXIT_PREEMPTED
    return EXIT_DONE if launcher == 0 else EXIT_CRASH


def _as_launcher() -> None:
    """A launcher ends with us, and answers no signal that a platform sends to everyone but means for the ranks."""
    signal_at_parents_end(signal.SIGTERM)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _workers(folder: Path) -> list[psutil.Process]:
    """The ranks that have begun."""
    found = []
    for number in _words(folder, "pid."):
        with suppress(psutil.Error):
            process = psutil.Process(number)
            if _is_of(process, str(folder)):  # and no other that was given its number
                found.append(process)
    return found


def _is_of(process: psutil.Process, folder: str) -> bool:
    """Whether a process is one of the launch whose codes lie in `folder`."""
    with suppress(psutil.Error):
        return process.environ().get(EXIT_CODES) == folder
    return False


def finished(run_dir: Path) -> str | None:
    """When the run of this folder was finished, None if it is not."""
    record = run_dir / "run.json"
    return read_json(record).get("finished") if record.exists() else None


def code_of(run_dir: Path) -> int:
    """The exit code of a finished run that could not give it: its gates stand in evaluation.json."""
    if not (run_dir / "report.html").exists():
        _say(f"the run is finished but for its report: nestling report {run_dir}")
    judged = run_dir / "evaluation.json"
    lines = unmet(read_json(judged).get("gates") or []) if judged.exists() else []
    for line in lines:
        _say(line)
    return EXIT_CHECK if lines else EXIT_DONE


def _newest(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def _say(line: str) -> None:
    print(f"nestling supervise: {line}", file=sys.stderr, flush=True)

"""A run that is told to stop: it saves once and ends so that the same command goes on from there.

SIGTERM, SIGUSR1 and SIGUSR2 ask for it. While a run trains they only set a flag, on which the ranks agree within a step
(trainer/gradcache.py); at any other time there is nothing to save and the run ends at once.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from launch.errors import STOP_SIGNALS, Preempted

_SAVING_SHARE = 0.1  # of the time, where checkpoints take longer than the grace period


class Stop:
    """Whether this process was told to stop. One per process, made in its main thread."""

    def __init__(self) -> None:
        self._number = 0
        self._is_deferred = False
        self._process = os.getpid()
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def asked(self) -> bool:
        """Whether a signal came."""
        return bool(self._number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal ends nothing: who does something that must not be cut short looks at `asked` himself."""
        self._is_deferred = True
        yield
        self._is_deferred = False

    def end_if_asked(self) -> None:
        """Raise Preempted for a signal that came while it was deferred and that nobody looked at."""
        if self._number:
            raise Preempted(f"{self}; the same command goes on from the last whole checkpoint, if there is one")

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self._number).name}" if self._number else "stopped with another rank"

    def _handle(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:  # a child that was forked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self._number:  # a second one changes nothing
            self._number = number
            if not self._is_deferred:
                self.end_if_asked()


class SaveInTime(TrainerCallback):
    """Saves more often where a checkpoint takes longer than what a stop leaves time for. All ranks."""

    def __init__(self, grace_seconds: float, every: int | None) -> None:
        self._grace, self._every = grace_seconds, every
        self._often: int | None = None
        self._since = time.monotonic()
        self._steps = 0

    def saved(self, seconds: float) -> str | None:
        """After a checkpoint that took `seconds`, the same on all ranks; a line to say, or None."""
        now = time.monotonic()
        step_seconds = (now - self._since - seconds) / max(1, self._steps)
        self._since, self._steps = now, 0
        if seconds <= self._grace or self._often is not None:
            return None
        self._often = math.ceil(seconds / _SAVING_SHARE / max(step_seconds, 1e-3))
        if self._every is not None and self._often >= self._every:
            return None
        return (
            f"a checkpoint took {seconds:.0f} s, a stop leaves {self._grace:g} s (train.grace_seconds): one every "
            f"{self._often:,} steps from here on, so that a stop loses no more than those"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps += 1
        control.should_save |= self._often is not None and self._steps >= self._often

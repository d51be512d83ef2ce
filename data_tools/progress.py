"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere, nothing for short work."""

import sys
import time
from contextlib import AbstractContextManager

_QUIET = 2.0  # seconds that work may take before anything is shown
_EVERY = 10.0  # seconds between two plain lines in a log file


class Progress(AbstractContextManager["Progress"]):
    """`label` names the work, `total` its amount in `unit`; silent unless it `speaks`; a context manager."""

    def __init__(self, label: str, total: int | None, unit: str, speaks: bool = True):
        from tqdm import tqdm

        self._label, self._total, self._unit, self._speaks = label, total, unit, speaks
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + _QUIET
        self._bar = tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=True,
            delay=_QUIET,
            leave=False,
            disable=not (speaks and self._terminal),
            file=sys.stderr,
        )

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def to(self, done: int) -> None:
        """The work has come to `done`, in the unit of `total`."""
        if self._terminal:
            self._bar.update(done - self._bar.n)
        elif self._speaks and time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            share = f" ({100 * done / self._total:.0f}%)" if self._total else ""
            print(f"{self._label}: {done:,} {self._unit}{share}", file=sys.stderr, flush=True)

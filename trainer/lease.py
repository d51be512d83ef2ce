"""A lease on the address that a run uploads to, so that two machines never write one run.

URL/lease.json says who holds it, with a number that grows with each holder, and is changed by compare-and-swap only.
The holder renews it; who sees it unchanged for TAKE_OVER seconds of his own monotonic clock takes it over. A holder
counts those seconds from before he sent his last renewal, so he stops writing before anybody can have taken over. No
wall clock is compared with another.

What remains: an upload that is stopped (SIGSTOP, a paused machine) in the middle of a request can finish it after the
take-over. It can damage a checkpoint of the same step, which is then seen by its checksums and not resumed from. In a
store that ignores conditions (no If-Match) two that begin in the same second both hold it until the next renewal.
"""

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.object_store import Version, persist, read_versioned, replace_object
from launch.errors import UserError
from launch.files import write_text

TAKE_OVER = 60.0  # seconds
_NAME = "lease.json"
_PATIENCE = 10  # seconds of trying again within one renewal


class Lease:
    """The lease on `url`. One per run, on rank 0, within the run folder's lock.

    `note` is a file that this makes in the run folder: a lease of the same folder on the same host is that of a process
    that is dead, or the folder would be locked, and is taken over at once.
    """

    def __init__(self, url: str, note: Path, take_over: float = TAKE_OVER) -> None:
        self._url, self._take_over = url, take_over
        if not note.exists():
            write_text(note, uuid.uuid4().hex)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._me = {"run": note.read_text(), "host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._number = self._renewals = 0
        self._sent = -math.inf  # monotonic seconds before the last renewal that succeeded
        self._lost: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self) -> None:
        """Get the lease and renew it in the background from here on; a dead holder's takes TAKE_OVER seconds.

        Raises UserError where a living process holds it (after TAKE_OVER / 4 seconds, when that has renewed it), and
        where the store does not answer.
        """
        seen: bytes | None = None
        since = 0.0
        while True:
            sent = time.monotonic()
            content, version = persist(lambda: read_versioned(self._url, _NAME))
            holder = _holder(content)
            is_own = [holder.get(key) for key in ("run", "host")] == [self._me[key] for key in ("run", "host")]
            is_dead = content == seen and time.monotonic() - since >= self._take_over
            if content is None or holder.get("released") or is_own or is_dead:
                self._number = holder.get("number", 0) + 1
                if persist(lambda version=version: self._write(version)):
                    break
            elif content != seen:
                if seen is not None:
                    raise UserError(
                        f"checkpoint.remote: {self._url} is in use by a run that is going on ({_named(holder)}); wait "
                        "for its end or stop it, or choose another: checkpoint.remote=URL"
                    )
                logging.getLogger("nestling").warning(
                    "%s is held by %s: looking for up to %g s whether that is alive",
                    self._url,
                    _named(holder),
                    self._take_over,
                )
                seen, since = content, time.monotonic()
            time.sleep(self._take_over / 60)
        self._sent = sent
        self._thread.start()

    def is_held(self) -> bool:
        """Whether this process may write at `url` now. False where it has not reached the store for a while, too."""
        return self._lost is None and time.monotonic() - self._sent < 0.75 * self._take_over

    def is_lost(self) -> bool:
        """Whether another process holds the lease, or did. Then it never comes back: this run must end."""
        return self._lost is not None

    @property
    def problem(self) -> str:
        """Who has the lease where it is lost, in one line."""
        return f"checkpoint.remote: {self._url} was taken over by another process of this run ({self._lost})"

    def release(self) -> None:
        """Stop renewing and let others have it at once. A store that does not answer lets them wait."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)  # what it still writes then fails: the version is another one
        if self._number and not self.is_lost():
            with suppress(UserError, OSError):
                content, version = read_versioned(self._url, _NAME, _PATIENCE)
                if self._is_mine(_holder(content)):
                    self._write(version, is_released=True)

    def _keep(self) -> None:
        pause = self._take_over / 4
        while not self._end.wait(pause) and not self.is_lost():
            pause = self._take_over / 4
            try:
                self._renew()
            except (UserError, OSError):  # whoever is there when the store answers again has the lease
                pause = self._take_over / 60

    def _renew(self) -> None:
        sent = time.monotonic()
        content, version = read_versioned(self._url, _NAME, _PATIENCE)
        holder = _holder(content)
        if content is not None and not self._is_mine(holder):
            self._lost = _named(holder)
        elif self._write(version):
            self._sent = sent

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return (holder.get("run"), holder.get("number")) == (self._me["run"], self._number)

    def _write(self, version: Version | None, is_released: bool = False) -> bool:
        self._renewals += 1  # each content is another one: S3 makes the version of it
        facts = {"number": self._number, "renewals": self._renewals, "released": is_released}
        return replace_object(self._url, _NAME, json.dumps(self._me | facts).encode(), version, _PATIENCE)


def _holder(content: bytes | None) -> dict[str, Any]:
    """What a lease says; nothing where it cannot be read."""
    try:
        holder = json.loads(content or b"{}")
        return holder if isinstance(holder, dict) and isinstance(holder.get("number"), int) else {}
    except ValueError:
        return {}


def _named(holder: dict[str, Any]) -> str:
    return f"host {holder.get('host', 'unknown')}, process {holder.get('pid')}, since {holder.get('since')}"

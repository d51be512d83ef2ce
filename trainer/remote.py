"""Checkpoints in an object store, from where a machine that has only the run file goes on.

URL/checkpoints/step-N/ has the files of the folder that trainer/checkpoint.py published, under the same names, and its
manifest last: without a manifest it is none, and what differs from its manifest is never resumed from. What a killed
process had sent of a file is not seen; S3 keeps it until the bucket's rule AbortIncompleteMultipartUpload.
"""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data_tools.object_store import (
    Damaged,
    delete_objects,
    fetch_folder,
    list_objects,
    publish_folder_to,
    read_object,
    write_object,
)
from launch.errors import UserError
from launch.files import exclusive, publish_folder, read_json, remove_folder, write_text
from trainer import collectives
from trainer.checkpoint import KEPT_AT_LEAST, MANIFEST, find_latest, folder_of, problem_with, step_of
from trainer.checkpoint import prune as prune_disk
from trainer.lease import Lease

_FOLDER = "checkpoints"
_WITH_RUN = ("run.json", "metrics.jsonl")  # what a run goes on with beside a checkpoint
_NAME = re.compile(rf"{_FOLDER}/step-(\d+)/(.+)")


class Remote:
    """A run's address in an object store: its lease, and a thread that uploads the newest checkpoint. Rank 0 only."""

    def __init__(self, url: str, run_dir: Path, lease: Lease) -> None:
        self._url, self._run_dir, self._lease = url, run_dir, lease
        self._condition = threading.Condition()
        self._waiting: list[tuple[Path, int, int | None]] = []  # folder, how many to keep, the best
        self.uploading: int | None = None  # a step whose folder must stay
        self._is_ending = False
        threading.Thread(target=self._work, name="upload", daemon=True).start()  # a hanging request ends with it

    def refuse_if_lost(self) -> None:
        """Raise UserError where another process has taken the address over."""
        if self._lease.is_lost():
            raise UserError(self._lease.problem)

    def write_record(self) -> None:
        """Upload what another machine needs of the run beside a checkpoint. Raises UserError."""
        for name in _WITH_RUN:
            if (path := self._run_dir / name).exists():
                write_object(self._url, name, path.read_bytes())

    def add(self, checkpoint: Path, keep: int, best: int | None) -> None:
        """Upload a checkpoint behind the training; one that still waits is left out for it, unless it is the best."""
        with self._condition:
            waiting = [one for one in self._waiting if step_of(one[0]) == best]
            self._waiting = [*waiting, (checkpoint, keep, best)]
            self.uploading = self.uploading or step_of(checkpoint)
            self._condition.notify_all()

    def is_idle(self, seconds: float) -> bool:
        """Whether all is uploaded, or will be within `seconds`, for which it waits."""
        with self._condition:
            return self._condition.wait_for(lambda: self.uploading is None, seconds)

    def finish(self, seconds: float) -> None:
        """Wait until all is uploaded, `seconds` at most; says what is not."""
        self.is_idle(seconds)
        with self._condition:
            self._is_ending = True
            if self.uploading is not None:
                logging.getLogger("nestling").warning("%s: the newest checkpoint is not uploaded", self._url)

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting)
                folder, keep, best = self._waiting.pop(0)
                self.uploading = step_of(folder)
            try:
                if not self._lease.is_held():
                    raise UserError(f"{self._url}: not reached for a while")
                self.write_record()  # first: with a checkpoint there, its lines are there too
                upload(self._url, folder, lambda: self._is_ending or not self._lease.is_held())
                prune(self._url, keep, best)
            except Exception as problem:  # whatever it is, `finish` waits for this thread
                text = "%s; the checkpoint is on this disk only, the next one is another try"
                logging.getLogger("nestling").warning(text, problem)
            with self._condition:
                self.uploading = step_of(self._waiting[0][0]) if self._waiting else None
                self._condition.notify_all()


@contextmanager
def opened(url: str, run_dir: Path, note: Path) -> Iterator[Remote]:
    """Hold the lease on `url`; a run folder without a run gets the record of the one that is there. Rank 0 only.

    `note` is trainer/lease.py's file in the run folder.

    Raises UserError where another process holds it, or where the store cannot be used.
    """
    lease = Lease(url, note)
    lease.acquire()
    try:
        if not (run_dir / _WITH_RUN[0]).exists():
            record, log = (read_object(url, name) for name in _WITH_RUN)
            if record and (its := json.loads(record).get("folder")) != run_dir.name:
                raise UserError(
                    f"checkpoint.remote: {url} has the run of a folder {its}, got {run_dir}; go on with that: "
                    "train.run_dir=FOLDER, or choose another address"
                )
            for name, content in zip(reversed(_WITH_RUN), (log, record), strict=True):
                if record and content is not None:  # the record last: with it the folder is that run's
                    write_text(run_dir / name, content.decode())
        yield Remote(url, run_dir, lease)
    finally:
        lease.release()


def newest_checkpoint(run_dir: Path, url: str | None) -> Path | None:
    """The newest whole checkpoint of this disk and of `url`, on this disk. All ranks must call, in the group.

    Raises UserError, on all ranks alike, where ranks have different ones, as on disks of their own of which one is new,
    and where there are some and none is whole.
    """
    warn = logging.getLogger("nestling").warning
    found = find_latest(run_dir, warn)
    is_damaged = found is None and any(run_dir.glob(f"{_FOLDER}/step-*"))
    if url and (there := newest(url)) is not None and (found is None or there > step_of(found)):
        fetched = fetch(url, there, run_dir, warn)  # an older one where that is damaged
        found = max((one for one in (found, fetched) if one), key=step_of, default=None)
        is_damaged |= found is None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def ends() -> tuple[int, int, int]:
        step = step_of(found) if found else -1
        return step, collectives.highest(step, device), -collectives.highest(-step, device)

    step, most, least = ends()
    if url and 0 <= least < most:  # a node's own disk has one whose upload came to no end
        found = fetch(url, least, run_dir, warn)
        step, most, least = ends()
    if most != least:
        raise UserError(
            f"{run_dir}: ranks have checkpoints of step {most} and {'none' if least < 0 else least}; allowed: one "
            "folder that all nodes share, or checkpoint.remote"
        )
    if most < 0 and collectives.highest(int(is_damaged), device):
        raise UserError(
            f"{run_dir}: no checkpoint is whole, see the lines above; begin anew in another folder: --fresh"
            + (", with another checkpoint.remote" if url else "")
        )
    for newer in (run_dir / _FOLDER).glob("step-*"):
        if step_of(newer) > step:  # damaged, or not every node's; it would stand where the next one of its step goes
            remove_folder(newer)
    if found and not (run_dir / _WITH_RUN[0]).exists():  # a disk without rank 0, whose writer prunes the others
        prune_disk(run_dir, KEPT_AT_LEAST)
    return found


def upload(url: str, checkpoint: Path, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Upload a published checkpoint; what an interrupted upload has brought there whole is not sent again.

    For the holder of the lease (trainer/lease.py), in one thread of rank 0; the folder must not be pruned meanwhile.
    Another checkpoint of this step is replaced: it is one that the run did not go on from. Raises UserError where it
    cannot be done, after some minutes of trying, and soon after `is_stopped()`: call again then, it goes on.
    """
    digests = {name: facts["sha256"] for name, facts in read_json(checkpoint / MANIFEST)["files"].items()}
    publish_folder_to(f"{url}/{_FOLDER}/{checkpoint.name}", checkpoint, digests, is_stopped)


def newest(url: str) -> int | None:
    """Step of the newest whole checkpoint there, None if there is none. Raises UserError where the store fails."""
    return max(_whole(_listed(url)), default=None)


def fetch(url: str, step: int, run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Bring the checkpoint of `step` into the run folder, verified, or the next older one that is whole.

    Each damaged one is named through `warn`; None where none is left. Any process may call, of a node one fetches and
    the others wait. Raises UserError where the store does not answer or the disk cannot be written: nothing older is
    taken then. What was fetched before a kill is not fetched again.
    """
    try:
        with exclusive(run_dir / _FOLDER / ".fetch.lock"):
            listed = _listed(url)
            for one in sorted((s for s in _whole(listed) if s <= step), reverse=True):
                try:
                    return _fetch(f"{url}/{_FOLDER}/step-{one}", one, listed[one], folder_of(run_dir, one))
                except Damaged as problem:
                    for partial in (run_dir / _FOLDER).glob(f".partial-{one}-*"):
                        remove_folder(partial)
                    warn(f"{problem}; falling back to an older checkpoint")
        return None
    except OSError as error:
        raise UserError(f"{error.filename or run_dir}: cannot be written: {error.strerror}") from None


def prune(url: str, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints (two at least) and `best`, and older halves of others.

    For the holder of the lease, in the thread that uploads. Raises UserError where the store fails: try the next time.
    """
    listed = _listed(url)
    whole = sorted(_whole(listed))
    old = [step for step in whole if step != best][: -max(keep, KEPT_AT_LEAST)]
    halves = [step for step in listed if step not in whole and step < max(whole, default=0)]
    for step in old + halves:
        where = f"{url}/{_FOLDER}/step-{step}"
        # The manifest first: what is removed in part is not taken for whole.
        delete_objects(where, [MANIFEST])
        delete_objects(where, [name for name in listed[step] if name != MANIFEST])


def _listed(url: str) -> dict[int, dict[str, int]]:
    """Step -> name -> size in bytes of every object of a checkpoint."""
    found: dict[int, dict[str, int]] = {}
    for path, size in list_objects(url, _FOLDER).items():
        if match := _NAME.fullmatch(path):
            found.setdefault(int(match[1]), {})[match[2]] = size
    return found


def _whole(listed: dict[int, dict[str, int]]) -> list[int]:
    return [step for step, sizes in listed.items() if MANIFEST in sizes]


def _fetch(where: str, step: int, sizes: dict[str, int], final: Path) -> Path:
    if problem_with(final) is None:
        return final
    content = read_object(where, MANIFEST)
    try:
        manifest = json.loads(content or "")
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        its_step = manifest["step"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{where}/{MANIFEST}: broken") from None
    if its_step != step:
        raise Damaged(f"{where}/{MANIFEST}: is of step {its_step}")
    for name, (size, _) in files.items():  # a name that the store has listed has no .. in it
        if sizes.get(name) != size:
            raise Damaged(f"{where}/{name}: has {sizes.get(name, 'no')} bytes instead of {size}")
    # A partial folder is of this content alone, so that a second try may go on in it.
    partial = final.with_name(f".partial-{step}-{hashlib.sha256(content or b'').hexdigest()[:16]}")
    fetch_folder(where, partial, {name: digest for name, (_, digest) in files.items()})
    (partial / MANIFEST).write_bytes(content or b"")
    remove_folder(final)  # a damaged one
    publish_folder(partial, final)
    return final

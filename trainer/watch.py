"""Ends a run within seconds where one of its ranks raises, is killed or stands still, and says so in one line.

Otherwise the other ranks wait in a collective until its time-out, half an hour, or each prints the traceback of a
collective that broke. Every rank notes where it is in a small file that the ranks of its node map into memory, and a
thread in each reads them all: gloo and NCCL wait without the interpreter's lock. Each node sees its own ranks only.
"""

import fcntl
import mmap
import multiprocessing
import os
import re
import select
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import psutil
import torch.distributed as dist

from launch.errors import EXIT_CRASH, CheckFailed, Preempted, UserError, leave
from launch.world import World

# FAILED: by an error that all ranks are to have alike. SAID: this rank has said, or is about to say, why the run ends.
_RUNNING, _ENDED, _FAILED, _TERMINATED, _SAID = range(5)
_STATE, _PLACE, _SIZE = struct.Struct("=q"), struct.Struct("=3q2?32s"), 128
_LOOK = 0.5  # seconds between two looks; the death of a process wakes at once where there are pidfds
_PATIENCE = 10.0  # seconds for what may hang at the end of a process
_GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_NEXT = "the same command goes on from the last whole checkpoint"
_BROKEN = re.compile(r"gloo|NCCL|nccl|by peer|Broken pipe", re.IGNORECASE)


class _Place(NamedTuple):
    """Where a rank is. `moves` counts alike on all ranks, `signs` also what only tells that a rank is alive."""

    moves: int
    signs: int
    step: int
    is_watched: bool
    is_waiting: bool
    phase: bytes

    def __str__(self) -> str:
        phase = self.phase.rstrip(b"\0").decode()
        return f"at step {self.step} in {phase}" if self.step else f"in {phase}"


class _Peer:
    """A rank of this node, which this one may be."""

    def __init__(self, rank: int, pid: int, path: str) -> None:
        self.rank, self.process = rank, psutil.Process(pid)
        self.file = os.open(path, os.O_RDWR)
        self.board = mmap.mmap(self.file, _SIZE)
        self.signs, self.idle, self.failed = -1, 0.0, 0.0  # the last two in seconds that were looked at

    def state(self) -> int:
        return _STATE.unpack_from(self.board)[0]

    def place(self) -> _Place:
        return _Place(*_PLACE.unpack_from(self.board, _STATE.size))

    def status(self) -> str:
        with suppress(psutil.NoSuchProcess):
            return self.process.status()
        return psutil.STATUS_DEAD

    def has_stopped_worker(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            return any(child.status() == psutil.STATUS_STOPPED for child in self.process.children())
        return False

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in (*self.process.children(recursive=True), self.process):
                process.kill()


_Placed = list[tuple[_Peer, _Place]]


class _Watch:
    """This rank's notes and the thread that reads those of all."""

    def __init__(self, world: World, stall_seconds: float | None, grace_seconds: float) -> None:
        self._world, self._stall, self._lock = world, stall_seconds, threading.Lock()
        self._left, self._is_over = {_TERMINATED: grace_seconds, _SAID: _PATIENCE}, False  # seconds until it is ended
        file, path = tempfile.mkstemp(prefix="nestling-")
        try:
            os.write(file, bytes(_SIZE))
            self._board = mmap.mmap(file, _SIZE)
            self.moves = self.signs = self.step = 0
            self.is_watched = self.is_waiting = False
            self.phase = "start"
            self.note()
            # Who can open the file and is in the same namespace of pids is on this node.
            mine = (world.rank, os.getpid(), path, _pid_namespace())
            all_of_them: list[Any] = [mine] * world.world_size
            if world.world_size > 1:
                dist.all_gather_object(all_of_them, mine)
            self._peers: list[_Peer] = []
            for *peer, namespace in all_of_them:
                if namespace == mine[-1]:
                    with suppress(OSError, psutil.NoSuchProcess):
                        self._peers.append(_Peer(*peer))
            if world.world_size > 1:
                dist.barrier()  # all have opened it
        finally:
            os.unlink(path)
            os.close(file)
        self._me = next(peer for peer in self._peers if peer.rank == world.rank)
        self._others = [peer for peer in self._peers if peer is not self._me]
        self._poll = select.poll()
        for peer in self._others:
            with suppress(AttributeError, OSError):  # Linux only
                self._poll.register(os.pidfd_open(peer.process.pid), select.POLLIN)
        # SIGTERM asks a run to save and stop, and torchrun ends the siblings of a rank that failed by it: the thread
        # hears of the signal while the main thread waits in a collective, and sees which of the two it was.
        self._signals, written = os.pipe()
        os.set_blocking(written, False)
        self._poll.register(self._signals, select.POLLIN)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def note(self) -> None:
        """Let the others see where this rank is now."""
        self.signs += 1
        place = self.moves, self.signs, self.step, self.is_watched, self.is_waiting, self.phase.encode()
        _PLACE.pack_into(self._board, _STATE.size, *place)

    def end(self, state: int) -> None:
        """Note how this rank has ended, so that the others do not miss it if it did so with them."""
        self._is_over = True
        _STATE.pack_into(self._board, 0, state)
        signal.set_wakeup_fd(-1)

    def fail(self, error: Exception) -> None:
        """Say an error that all ranks are to have, where the first rank of the node, which would, does not have it."""
        _STATE.pack_into(self._board, 0, _FAILED)
        if self._me is not self._peers[0]:
            time.sleep(2 * _LOOK)
            if self._peers[0].state() == _RUNNING and self._claim():
                _say(str(error))

    def explain(self, error: BaseException) -> NoReturn:
        """End this process, whose main thread raised: with a traceback where it is the first cause, else quietly."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises where a loader worker is ended, as below
        if "DataLoader worker (pid" in str(error) and "Caught" not in str(error):
            self._end(f"a loader worker of rank {self._world.rank} was killed {self._me.place()}; {_NEXT}")
        time.sleep(2 * _LOOK)  # the thread ends this process where another rank was the cause
        if any(peer.state() == _FAILED for peer in self._others) or not self._claim():
            self._end()
        if self._world.nodes > 1 and _BROKEN.search(str(error)):
            text = f"a rank of another node ended while this node was {self._me.place()}; see there"
        else:
            traceback.print_exception(error)
            text = f"rank {self._world.rank} raised {type(error).__name__} {self._me.place()}; its traceback is above"
        _say(f"{text}; {_NEXT}")
        _end_workers()
        leave(EXIT_CRASH)

    def _claim(self) -> bool:
        """Whether this rank is the one of its node that says why the run ends: the first that asks is."""
        with self._lock, suppress(BlockingIOError):
            fcntl.flock(self._peers[0].file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if all(peer.state() != _SAID for peer in self._peers):
                _STATE.pack_into(self._board, 0, _SAID)
                return True
        return False

    def _end(self, line: str = "", culprits: Sequence[_Peer] = ()) -> NoReturn:
        """End this process, without its exit functions, which may wait for others; say `line` if no other rank has."""
        if line and self._claim():
            _say(line)
            for peer in culprits:
                if peer is not self._me:
                    peer.kill()
        else:  # the launcher names the process that ends first, which should be the cause
            deadline = time.monotonic() + _PATIENCE / 2
            said = [peer for peer in self._peers if peer.state() == _SAID]  # this one, where its other thread has
            while any(peer.status() not in _GONE for peer in said) and time.monotonic() < deadline:
                time.sleep(_LOOK / 10)
        _end_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CRASH)

    def _look(self) -> None:
        """The thread. Time counts by looks, so that a job which is suspended as a whole has not stood still."""
        last = time.monotonic()
        while not self._is_over:
            mine = self._me.state()
            for descriptor, _ in self._poll.poll(1000 * _LOOK):
                if descriptor != self._signals:
                    self._poll.unregister(descriptor)
                elif signal.SIGTERM in os.read(descriptor, 4096) and mine == _RUNNING:
                    _STATE.pack_into(self._board, 0, _TERMINATED)
            now = time.monotonic()
            passed, last = min(now - last, 2 * _LOOK), now
            if mine in self._left:
                self._left[mine] -= passed
                if self._left[mine] < 0:
                    _end_workers()
                    os._exit(EXIT_CRASH if mine == _SAID else 128 + signal.SIGTERM)
            if mine != _SAID:
                self._judge(passed)

    def _judge(self, passed: float) -> None:
        """End this process where the run cannot go on."""
        for peer in self._others:
            is_gone, state = peer.status() in _GONE, peer.state()  # in this order: the state is then its last
            if is_gone and state in (_RUNNING, _TERMINATED):
                if state == _TERMINATED == self._me.state():  # all were told; the main thread may be about to answer
                    self._left[state] = min(self._left[state], _PATIENCE)
                    continue
                how = "was told to stop" if state == _TERMINATED else "was killed"
                self._end(f"rank {peer.rank} {how} {peer.place()}; {_NEXT}")
            if state == _FAILED:
                peer.failed += passed
            if state == _SAID or peer.failed > _PATIENCE:
                self._end()
        places = [(peer, peer.place()) for peer in self._peers if peer.state() != _ENDED]
        for peer, place in places:
            peer.idle = peer.idle + passed if place.is_watched and place.signs == peer.signs else 0.0
            peer.signs = place.signs
        behind = [(peer, place) for peer, place in places if place.moves == min(p.moves for _, p in places)]
        if self._stall and behind and all(peer.idle >= self._stall for peer, _ in behind):
            self._end_stalled(behind, places)

    def _end_stalled(self, behind: _Placed, places: _Placed) -> None:
        """`behind` came less far than the others of this node, which are all in `places`."""
        stopped = [(peer, place) for peer, place in places if peer.status() == psutil.STATUS_STOPPED]
        culprits = stopped or [(peer, place) for peer, place in behind if not place.is_waiting]
        is_sure = bool(stopped) or len(culprits) < len(places) or self._world.world_size == 1
        who = "rank " + ", ".join(str(peer.rank) for peer, _ in culprits or behind)
        another = "another node" if self._world.nodes > 1 else "another"
        if not culprits:
            who += f" waits for {another}, which"
        elif not is_sure:  # in a collective of the engine
            who += f" or {another}"
        elif culprits[0][0].has_stopped_worker():
            who = f"a loader worker of {who}"
        line = (
            f"{who} has stood still for {self._stall:g} s (train.stall_seconds) {(culprits or behind)[0][1]}; {_NEXT}"
        )
        self._end(line, [peer for peer, _ in culprits])


_own: _Watch | None = None


def begin(world: World, stall_seconds: float | None, grace_seconds: float) -> None:
    """Watch the ranks of this node from here on. All ranks must call, in their main threads and in the group.

    A rank that SIGTERM asked to stop is ended after `grace_seconds`.
    """
    global _own  # noqa: PLW0603  (a process has one place, which every part of a step may note)
    _own = _Watch(world, stall_seconds, grace_seconds)
    os.register_at_fork(after_in_child=_forget)


def at(phase: str, step: int | None = None, is_watched: bool = True) -> None:
    """This rank is in `phase` of `step`, from 1; None = the same. Unless watched, it may stand still.

    All ranks must call, in the same order. No collective, a microsecond.
    """
    if _own is not None:
        _own.moves += 1
        _own.phase, _own.is_watched = phase, is_watched
        _own.step = _own.step if step is None else step
        _own.note()


def sign() -> None:
    """This rank is alive within its phase. Any rank may call."""
    if _own is not None:
        _own.note()


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, this rank waits for others. Any rank may enter."""
    if _own is not None:
        _own.is_waiting = True
        _own.note()
    yield
    if _own is not None:
        _own.is_waiting = False
        _own.note()


@contextmanager
def watched() -> Iterator[None]:
    """What a rank raises inside after `begin` ends it here, said once for all ranks. All ranks must enter."""
    state = _FAILED
    try:
        yield
        state = _ENDED
    except (UserError, CheckFailed) as error:
        if _own is not None:
            _own.fail(error)
        raise
    except (KeyboardInterrupt, Preempted):
        state = _TERMINATED
        raise
    except BaseException as error:
        if _own is not None:
            _own.explain(error)
        raise
    finally:
        if _own is not None:
            _own.end(state)


def _say(line: str) -> None:
    text = "".join(f"nestling: {part}\n" for part in line.splitlines())
    os.write(2, text.encode())  # whole, and without a lock that the main thread may hold


def _end_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _forget() -> None:
    """In a loader worker: its signals are its own."""
    global _own  # noqa: PLW0603
    if _own is not None:
        _own = None
        signal.set_wakeup_fd(-1)


def _pid_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""

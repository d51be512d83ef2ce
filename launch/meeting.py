"""Nodes meet before each start of a run: all have come, all are equal, and they agree on what they start.

Node 0 listens, the others come; each says what it has as one line of JSON, node 0 compares and answers all alike. A
node that leaves for good with an error says so there, so that the others do not wait for it; one whose part is done
waits there for node 0, which evaluates and exports on: if that must begin again, it needs all.
"""

import contextlib
import json
import select
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.errors import EXIT_DONE, EXIT_USER, Preempted, UserError

LONGEST_LINE = 100_000  # bytes; facts are a few hundred
CLOCKS = 10.0  # seconds that clocks may differ: object stores refuse requests at 900
_TURN = 0.2  # seconds between looks at whether this node was told to stop


class NotMet(Exception):
    """Nodes did not come in time, which the user may not have to mend: the platform starts them again."""


class Left(Exception):
    """Another node has left for good; `code` is its exit code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def meet(
    nodes: int,
    rank: int,
    address: tuple[str, int],
    facts: dict[str, Any],
    seconds: float,
    is_stopped: Callable[[], bool] = bool,
    shared: Path | None = None,
) -> dict[str, Any]:
    """Facts of node 0 with the lowest `budget` of all. Every node must call, node 0 at `address`.

    facts["same"] must be equal on all nodes, key by key; facts["end"] and facts["why"] say that a node leaves, with
    which exit code. EXIT_DONE says that its part is done: node 0's is the run's, and the answer's "end" then; where it
    is None, all begin. `shared` is a folder that all must see, where node 0 puts a file for as long as they meet.

    Raises UserError where nodes differ, Left where one leaves, NotMet where they do not come within `seconds`, and
    Preempted where this node is stopped meanwhile.
    """
    facts = {"rank": rank, "end": None, "why": "", "budget": None, **facts}
    end = time.monotonic() + seconds
    if rank:
        answer = _come(address, facts, end, is_stopped)
    else:
        answer = _receive(nodes, address[1], facts, end, is_stopped, shared)
    if answer["end"] == EXIT_USER and answer.get("differ"):
        raise UserError(answer["why"])
    if answer["end"]:
        raise Left(answer["end"], answer["why"])
    if answer["end"] == EXIT_DONE != facts["end"]:
        raise Left(EXIT_DONE, "node 0 has finished the run")
    return answer


def _come(
    address: tuple[str, int], facts: dict[str, Any], end: float, is_stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Go to node 0, again and again until it answers."""
    while True:
        with contextlib.suppress(OSError, ValueError), socket.create_connection(address, timeout=5) as link:
            lines = _Lines(link)
            greeting = _wait(lines, end, is_stopped)
            sees = greeting["file"] is None or Path(greeting["file"]).exists()
            lines.send(facts | {"sees": sees, "clock": time.time()})
            return _wait(lines, end, is_stopped)
        _look(end, is_stopped, f"node 0 does not answer at {address[0]}:{address[1]}")
        time.sleep(_TURN)


def _receive(
    nodes: int, port: int, own: dict[str, Any], end: float, is_stopped: Callable[[], bool], shared: Path | None
) -> dict[str, Any]:
    """Wait for the others, compare, answer."""
    try:
        listener = socket.create_server(("", port), backlog=nodes)
    except OSError as error:
        raise UserError(f"port: node 0 cannot listen on {port}: {error.strerror}; choose another: --port") from None
    file = shared and shared / f".nestling-meeting-{uuid.uuid4().hex}"
    came: dict[int, tuple[_Lines, dict[str, Any]]] = {}
    strangers: list[_Lines] = []
    with listener, contextlib.ExitStack() as links:
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            links.callback(file.unlink, missing_ok=True)
        while len(came) < nodes - 1:
            if own["end"] is not None and time.monotonic() > end:  # those who came are to know
                break
            missing = [str(rank) for rank in range(1, nodes) if rank not in came]
            _look(end, is_stopped, f"node {', '.join(missing)} of {nodes} did not come")
            ready, _, _ = select.select([listener, *strangers, *(lines for lines, _ in came.values())], [], [], _TURN)
            for one in ready:
                if isinstance(one, socket.socket):
                    link, _ = listener.accept()
                    links.enter_context(link)
                    lines = _Lines(link)
                    with contextlib.suppress(OSError):
                        lines.send({"file": file and str(file)})
                        strangers.append(lines)
                    continue
                facts = one.receive()
                if one in strangers:
                    strangers.remove(one)
                    if facts and _is_of(facts, own, nodes):
                        facts["late"] = time.time() - facts["clock"]
                        came[facts["rank"]] = one, facts
                else:  # it is gone, or says more than it has to
                    came = {rank: (lines, facts) for rank, (lines, facts) in came.items() if lines is not one}
        answer = _verdict(own, {rank: facts for rank, (_, facts) in sorted(came.items())}, shared)
        for lines, _ in came.values():
            with contextlib.suppress(OSError):
                lines.send(answer)
    return answer


def _is_of(facts: dict[str, Any], own: dict[str, Any], nodes: int) -> bool:
    """Whether a stranger is a node of this job: a port is open to whoever finds it."""
    same, clock = facts.get("same"), facts.get("clock")
    return (
        {*own} <= {*facts}
        and facts["rank"] in range(1, nodes)
        and isinstance(same, dict)
        and same.get("job") == own["same"]["job"]
        and isinstance(clock, float)
    )


def _verdict(own: dict[str, Any], others: dict[int, dict[str, Any]], shared: Path | None) -> dict[str, Any]:
    if own["end"] == EXIT_DONE:  # whatever came after that
        return own
    everyone = {0: own, **others}
    leaving = {rank: facts for rank, facts in everyone.items() if facts["end"]}
    if leaving:
        rank, facts = min(leaving.items(), key=lambda item: (-item[1]["end"], item[0]))
        return {"end": facts["end"], "why": f"node {rank} has left with exit code {facts['end']}: {facts['why']}"}
    problems = []
    for rank, facts in others.items():
        for key in {**own["same"], **facts["same"]}:
            mine, its = own["same"].get(key), facts["same"].get(key)
            if mine != its:
                problems.append(f"{key}: node {rank} has {its}, node 0 has {mine}; allowed: the same on all nodes")
        if abs(facts["late"]) > CLOCKS:
            problems.append(f"clock: node {rank} is {-facts['late']:+.0f} s from node 0, allowed: {CLOCKS:.0f} s")
        if not facts.get("sees"):
            problems.append(
                f"train.run_dir: node {rank} does not see what node 0 writes in {shared}; allowed: a folder that all "
                "nodes share, or checkpoint.remote"
            )
    if problems:
        return {"end": EXIT_USER, "why": "\n".join(problems), "differ": True}
    budgets = [facts["budget"] for facts in everyone.values() if facts["budget"] is not None]
    return own | {"budget": min(budgets, default=None)}


def _wait(lines: "_Lines", end: float, is_stopped: Callable[[], bool]) -> dict[str, Any]:
    while not select.select([lines], [], [], _TURN)[0]:
        _look(end, is_stopped, "node 0 waits for others")
    answer = lines.receive()
    if answer is None:
        raise ConnectionError
    return answer


def _look(end: float, is_stopped: Callable[[], bool], what: str) -> None:
    if is_stopped():
        raise Preempted("stopped while nodes met; the same command goes on")
    if time.monotonic() > end:
        raise NotMet(f"meeting: {what} in time; see the other nodes' logs, their network and the port of node 0")


class _Lines:
    """A connection that carries one JSON object a line, either way."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        link.settimeout(10)

    def fileno(self) -> int:
        return self._link.fileno()

    def send(self, value: dict[str, Any]) -> None:
        self._link.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """One object; None from a stranger who does not speak so, and from one who has hung up."""
        text = b""
        with contextlib.suppress(OSError, ValueError):
            while not text.endswith(b"\n") and len(text) < LONGEST_LINE:
                part = self._link.recv(4096)
                if not part:
                    return None
                text += part
            value = json.loads(text)
            return value if isinstance(value, dict) else None
        return None

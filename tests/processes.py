"""The processes of a run, wherever they are in its tree, found by a variable that it was started with."""

import os

import psutil

MARK = "NESTLING_TEST"
OWN = str(os.getpid())  # of a test's processes


def marked(mark: str = OWN) -> list[psutil.Process]:
    """Every living process that has MARK=mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks(mark: str = OWN) -> dict[int, psutil.Process]:
    """Its workers by their ranks, without what those have started."""
    found = {}
    for process in marked(mark):
        try:
            parent, rank = process.parent(), process.environ().get("RANK")
            if rank and parent and not parent.environ().get("RANK"):
                found[int(rank)] = process
        except psutil.Error:
            continue
    return found


def kill(mark: str = OWN) -> int:
    """Kill them all, those that they start meanwhile too; how many there were at first."""
    first = left = marked(mark)
    while left:
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=5)
        left = marked(mark)
    return len(first)

"""What all benchmarks share: the command line, timing and memory, tables, and the JSON with claims.

A benchmark measures us and sentence-transformers in one run, on the same rows, with one thread each, warm.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

RIVAL = "sentence-transformers"
T = TypeVar("T")
_BEGAN = time.perf_counter()


@dataclass(frozen=True)
class Claim:
    """One measured number of the README."""

    name: str
    value: float | None  # None = not known on this machine, which the conditions say
    unit: str
    better: Literal["higher", "lower"]
    rival: str | None
    conditions: str


@dataclass(frozen=True)
class Cost:
    """Seconds that a piece of work took."""

    cpu: float
    wall: float


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="scaled down, under a minute on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and claims here")
    return parser


def one_thread() -> None:
    """One thread for torch and the tokenizer, no progress bars, no network. Call it before any model is loaded."""
    os.environ |= {"RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def timed(work: Callable[[], T]) -> tuple[T, Cost]:
    """Result and cost of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, Cost(time.process_time() - cpu, time.perf_counter() - wall)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in aligned columns; floats get three significant digits."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
    print(flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def progress(text: str) -> None:
    """Print a line with the seconds since the benchmark began."""
    print(f"{time.perf_counter() - _BEGAN:5.0f} s  {text}", flush=True)


def finish(claims: Sequence[Claim], args: argparse.Namespace) -> int:
    """Print the claims of a run with these options and write them to its JSON file; returns the exit code."""
    if args.quick:
        claims = [replace(claim, conditions=f"scaled down (--quick): {claim.conditions}") for claim in claims]
    print()
    lines = [[c.name, "not known" if c.value is None else c.value, c.unit, c.conditions] for c in claims]
    table(["claim", "value", "unit", "conditions"], lines)
    if args.json is not None:
        names = ("torch", "sentence-transformers", "transformers", "numpy")
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
        facts = {"machine": _machine(), "versions": versions, "claims": [asdict(claim) for claim in claims]}
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def against_rival(name: str, theirs: tuple[Cost, int], ours: tuple[Cost, int], where: str) -> list[Claim]:
    """Claims NAME.speedup and NAME.memory_ratio of two sides' cost and extra bytes, each in a fresh process."""
    ratios = {
        "speedup": (theirs[0].cpu / ours[0].cpu, "CPU time"),
        "memory_ratio": (theirs[1] / ours[1], "peak extra resident memory in a fresh process"),
    }
    return [
        Claim(f"{name}.{key}", value, "times", "higher", RIVAL, f"{what}, {where}")
        for key, (value, what) in ratios.items()
    ]


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def reset_peak() -> int:
    """Set the kernel's peak of resident memory back to what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Highest resident memory of this process since it began or `reset_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Result of a call in a new process with one thread, whose memory holds nothing of what ran before."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=one_thread) as pool:
        result = pool.apply(function, arguments)
        pool.close()
        pool.join()  # leaving the block would kill it
        return result

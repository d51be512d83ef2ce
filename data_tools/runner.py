"""Runs one stage by datatrove's executors: tasks that each write their own files; resumable, skipped when unchanged.

A stage lies in its own folder. `stage.json` holds the fingerprint of everything that decides its bytes; NNNNN.json
appears when task NNNNN has written all its files, so a killed stage goes on with what is missing.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.progress import Progress
from launch.errors import UserError
from launch.files import digest_of, new_file, read_json, remove_folder, write_json
from launch.preflight import require_extra

PART_ROWS = 20_000  # of one part: what a task of the next stage holds in memory
_PART_BYTES = 32 << 20  # ... and of its texts


@dataclass
class Output:
    """What a task writes: parts of rows, rejects, counts."""

    folder: Path
    task: int
    counts: Counter[str] = field(default_factory=Counter)  # reason -> rows that were left out
    facts: dict[str, Any] = field(default_factory=dict)  # whatever else the next stage or the card needs
    parts: list[list[Any]] = field(default_factory=list)  # [name, rows]

    def write(self, rows: Iterable[Mapping[str, Any]], schema: Mapping[str, str]) -> None:
        """Stream rows into parts; `schema` maps columns to Arrow types."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = pa.schema([(name, kind) for name, kind in schema.items()])
        for group in _groups(rows):
            name = f"{self.task:05d}-{len(self.parts):05d}.parquet"
            with new_file(self.folder / name) as path:
                pq.write_table(pa.Table.from_pylist(group, types), path, compression="zstd")
            self.parts.append([name, len(group)])

    def note(self, name: str, records: Sequence[Any]) -> None:
        """Write records that people read, one JSON line each, to the task's own file NNNNN.`name`."""
        with new_file(self.folder / f"{self.task:05d}.{name}") as path, path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)


def _groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(group) == PART_ROWS or size >= _PART_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class Task:
    """One task of a stage as datatrove calls it: picklable, with no state but its arguments."""

    folder: Path
    work: Callable[..., None]
    arguments: tuple[Any, ...]  # of all tasks of the stage
    units: Path  # a JSON list, one entry a task

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _silence()  # in the worker, before datatrove writes its log to the terminal

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Do the task unless it is done."""
        done = self.folder / f"{rank:05d}.json"
        if not done.exists():
            output = Output(self.folder, rank)
            self.work(output, read_json(self.units)[rank], *self.arguments)
            counts = dict(sorted(output.counts.items()))
            write_json(done, {"parts": output.parts, "dropped": counts, "facts": output.facts})


@dataclass(frozen=True)
class Done:
    """A finished stage."""

    folder: Path
    fingerprint: str
    tasks: list[dict[str, Any]]  # what each task wrote beside its parts

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Path and rows of every part, in order."""
        return [(str(self.folder / name), rows) for task in self.tasks for name, rows in task["parts"]]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(rows for _, rows in self.parts)

    @property
    def dropped(self) -> Counter[str]:
        """Rows that were left out, by reason."""
        return sum((Counter(task["dropped"]) for task in self.tasks), Counter[str]())


def run_stage(
    folder: Path,
    work: Callable[..., None],
    units: Sequence[Any],
    arguments: tuple[Any, ...] = (),
    *,
    fingerprint: str,
    workers: int,
    executor: str = "local",
) -> Done:
    """`work(output, unit, *arguments)` for each of `units` (JSON values), in any order and any process.

    Nothing is done if the folder holds all of it under the same `fingerprint`; another fingerprint empties it.
    """
    stamp = folder / "stage.json"
    if not stamp.is_file() or read_json(stamp) != fingerprint:
        remove_folder(folder)
        folder.mkdir(parents=True)
        write_json(folder / "units.json", list(units))
        write_json(stamp, fingerprint)
    names = [folder / f"{task:05d}.json" for task in range(len(units))]
    left = sum(not name.exists() for name in names)
    if left:
        with _watched(folder, len(units)):
            _execute(Task(folder, work, arguments, folder / "units.json"), len(units), min(workers, left), executor)
    state = (
        "unchanged, skipped" if not left else "done" if left == len(units) else f"went on, {left} tasks were missing"
    )
    done = Done(folder, fingerprint, [read_json(name) for name in names])
    lost = done.dropped.total()
    print(f"{folder.name}: {state}: {done.rows:,} rows, {lost:,} left out" if done.parts else f"{folder.name}: {state}")
    return done


def _execute(task: Task, tasks: int, workers: int, executor: str) -> None:
    require_extra("datatrove", "data", "nestling data")
    _silence()
    where: dict[str, Any] = {"pipeline": [task], "tasks": tasks, "logging_dir": str(task.folder / "log")}
    where["skip_completed"] = False  # NNNNN.json decides
    if executor == "ray":
        require_extra("ray", "ray", "executor: ray")
        from datatrove.executor import RayPipelineExecutor

        RayPipelineExecutor(**where, workers=workers).run()
    else:
        import multiprocess
        from datatrove.executor import LocalPipelineExecutor

        # Loaded once and not by each worker of each stage.
        modules = ["data_tools.corpus", "data_tools.dedup", "datatrove.executor", "pyarrow.parquet"]
        multiprocess.set_forkserver_preload(modules)  # pyright: ignore[reportAttributeAccessIssue]
        LocalPipelineExecutor(**where, workers=workers).run()
    if missing := [rank for rank in range(tasks) if not (task.folder / f"{rank:05d}.json").exists()]:
        raise UserError(f"{task.folder.name}: task {missing[0]} failed; see {task.folder}/log, then run again")


def _silence() -> None:
    from loguru import logger

    logger.disable("datatrove")


class _watched:
    """Shows how many tasks are done while the block runs."""

    def __init__(self, folder: Path, tasks: int):
        self._folder, self._tasks, self._over = folder, tasks, threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with Progress(self._folder.name, self._tasks, "tasks") as progress:
            while not self._over.wait(0.5):
                progress.to(sum(1 for _ in self._folder.glob("[0-9]*[0-9].json")))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def key_of(*parts: Any) -> str:
    """A fingerprint of JSON values."""
    return digest_of(parts)

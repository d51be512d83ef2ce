"""Runs a top-level function in several real processes that share a gloo process group.

`run(function, world_size, *arguments)` calls `function(rank, *arguments)` in each and returns their results
by rank. An exception of any rank, a dead process or a time-out ends them all and fails the caller.
"""

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def run(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """Results of `function(rank, *arguments)` of all ranks; function and arguments must be picklable."""
    # A server that has imported torch once forks the processes: each starts in milliseconds, without threads.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "sentence_transformers"])
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(theirs, f"{folder}/store", (rank, world_size), function, arguments)
            )
            process.start()
            theirs.close()
            pipes[ours] = rank
            processes.append(process)
        deadline = time.monotonic() + timeout
        try:
            while pipes:
                ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
                assert ready, f"ranks {sorted(pipes.values())} did not end within {timeout} s"
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    rank = pipes.pop(pipe)
                    try:
                        ok, results[rank] = pipe.recv()
                    except EOFError:
                        raise AssertionError(f"rank {rank} died") from None
                    assert ok, f"rank {rank}:\n{results[rank]}"
        finally:
            for process in processes:
                process.join(5 if not pipes else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
    return [results[rank] for rank in range(world_size)]


def _main(
    pipe: Connection,
    store: str,
    place: tuple[int, int],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world_size = place
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        answer = True, function(rank, *arguments)
        dist.destroy_process_group()
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send(answer)
    pipe.close()

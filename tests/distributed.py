"""Runs a top-level function in several real processes that share a process group, gloo's on CPUs or NCCL's on GPUs.

`run(function, world_size, *arguments)` calls `function(rank, *arguments)` in each and returns their results
by rank. An exception of any rank, a dead process or a time-out ends them all and fails the caller.
"""

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

Backend = Literal["gloo", "nccl"]


def run(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    backend: Backend = "gloo",
    timeout: float = 240,
) -> list[Any]:
    """Results of `function(rank, *arguments)` of all ranks; function and arguments must be picklable.

    Under nccl rank r has the CUDA device r for its own, so there must be `world_size` of them.
    """
    if backend == "nccl":
        context = mp.get_context("spawn")  # CUDA does not outlive a fork of a process that has looked for devices
    else:
        # A server that has imported torch once forks the processes: each starts in milliseconds, without threads.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "sentence_transformers"])
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(theirs, f"{folder}/store", backend, (rank, world_size), function, arguments)
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


def device() -> Any:
    """The torch.device of this process: its own GPU under nccl, else the CPU. No collective."""
    import torch
    import torch.distributed as dist

    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _main(
    pipe: Connection,
    store: str,
    backend: Backend,
    place: tuple[int, int],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world_size = place
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
        answer = True, function(rank, *arguments)
        dist.destroy_process_group()
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send(answer)
    pipe.close()

"""The world of a run: which process this is, and whether as many were started as were asked for.

accelerate starts one process, without an error, in cases where more were asked for; each would train alone on
a batch that is not the one of the run file. So what the launcher was told is read from its command line.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.config import RunConfig
from launch.errors import UserError
from launch.yaml12 import parse_yaml

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# Starters that run a command N times without these variables, and what they call N.
_COPIES = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}
_START = "accelerate launch --config_file configs/accelerate"
USAGE = f"""\
usage: {_START}/cpu.yaml train.py RUN.yaml [--fresh] [--force] [section.key=value ...]
next:  nestling data run configs/data/demo.yaml
       nestling check configs/demo.yaml
       {_START}/cpu.yaml train.py configs/demo.yaml"""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    nodes: int


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """The world from torchrun's variables; one process where none is set.

    Raises UserError where only some are set, or where they contradict each other.
    """
    found = {name: environment[name] for name in _TORCHRUN if environment.get(name)}
    if not found:
        return World(rank=0, local_rank=0, world_size=1, local_world_size=1, nodes=1)
    if missing := [name for name in _TORCHRUN if name not in found]:
        raise UserError(
            f"environment: got {', '.join(found)} without {', '.join(missing)}, allowed: all or none; "
            f"start with {_START}/ddp.yaml train.py RUN.yaml, or unset them"
        )
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    if not all(value.isascii() and value.isdecimal() for value in found.values()):
        raise UserError(f"environment: got {shown}, allowed: integers >= 0")
    rank, local_rank, size, local_size = (int(value) for value in found.values())
    if not (local_rank <= rank < size and local_rank < local_size <= size):
        raise UserError(f"environment: got {shown}, allowed: ranks below their world sizes")
    return World(rank, local_rank, size, local_size, nodes=-(-size // local_size))


def check_world(config: RunConfig, world: World) -> None:
    """Raise UserError where the number of processes is not what the run file or the launcher's flags say."""
    check_processes(world, "train.py RUN.yaml")
    if config.train.world_size not in (None, world.world_size):
        number = config.train.world_size
        raise UserError(
            f"train.world_size: the run file asks for {number} processes, got {world.world_size}; start with "
            f"{_START}/cpu.yaml --num_processes {number} (CPU) or ddp.yaml (GPU) train.py RUN.yaml, "
            f"or write train.world_size={world.world_size}"
        )


def check_processes(world: World, program: str) -> None:
    """Raise UserError where the number of processes is not what the launcher's flags say; `program` is what it runs."""
    if asked := requested_processes():
        number, origin = asked
        if number != world.world_size:
            raise UserError(
                f"processes: {origin} asks for {number}, got {world.world_size}; {_why(world)}; start with "
                f"{_START}/cpu.yaml --num_processes {number} (CPU) or ddp.yaml (GPU) {program}"
            )
    if world.world_size == 1 and not any(map(os.environ.get, _TORCHRUN)):
        for variable, starter in _COPIES.items():
            copies = os.environ.get(variable, "1")
            if asked is None and copies.isdecimal() and int(copies) > 1:
                raise UserError(
                    f"processes: {starter} started {copies} copies ({variable}) that know nothing of each "
                    f"other, allowed: one per machine, which runs {_START}/ddp.yaml {program}"
                )


def engine_asked_for() -> Literal["FSDP", "DEEPSPEED"] | None:
    """The engine of the launcher's file, None for one process or DDP. accelerate hands it over in the environment."""
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("1", "true"):
            return engine
    return None


def requested_processes() -> tuple[int, str] | None:
    """How many processes the nearest launcher above this process was told to start, and where it says so.

    None without a launcher, or where it was not told (`accelerate launch` alone, `--nproc_per_node gpu`).
    """
    import psutil

    try:
        parents = psutil.Process().parents()
    except psutil.Error:
        return None
    for process in parents:
        try:
            words = process.cmdline()
            verb = launcher_arguments(words)
            if verb is None:
                continue
            environment = process.environ()
            folder = Path(process.cwd())
        except (psutil.Error, OSError):
            continue
        launcher, arguments = verb
        if launcher == "torchrun":
            return _torchrun_processes(arguments, environment)
        return _accelerate_processes(arguments, environment, folder)
    return None


def launcher_arguments(words: Sequence[str]) -> tuple[str, dict[str, str]] | None:
    """("accelerate" or "torchrun", its flags before the script) of a command line; None for any other."""
    for place, word in enumerate(words[:4]):
        after = words[place + 1 :]
        name = Path(word).name
        if name == "accelerate" and after[:1] == ["launch"]:
            return "accelerate", _flags(after[1:])
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return "accelerate", _flags(after)
        if name == "torchrun" or word in ("torch.distributed.run", "torch.distributed.launch"):
            return "torchrun", _flags(after)
    return None


def _flags(words: Sequence[str]) -> dict[str, str]:
    """Flags by name with _ for -, up to the script; a flag without a value has ""."""
    flags: dict[str, str] = {}
    last = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            last = name.replace("-", "_")
            flags[last] = value
            last = None if equals else last
        elif word.endswith(".py") or word == "-m":
            break
        elif last is not None:
            flags[last], last = word, None
    return flags


def _accelerate_processes(
    flags: Mapping[str, str], environment: Mapping[str, str], folder: Path
) -> tuple[int, str] | None:
    if flags.get("num_processes", "").isdecimal():
        return int(flags["num_processes"]), f"accelerate launch --num_processes {flags['num_processes']}"
    if not {"PET_NNODES", "PET_NPROC_PER_NODE"}.isdisjoint(environment) and "config_file" not in flags:
        return _torchrun_processes({}, environment)  # Kubeflow sets these; accelerate does not read them
    if "config_file" in flags:
        path = folder / flags["config_file"]
    elif "cpu" in flags:  # accelerate then leaves its default file aside
        return None
    else:
        home = environment.get("HF_HOME")
        cache = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        path = Path(home or f"{cache}/huggingface").expanduser() / "accelerate/default_config.yaml"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), lambda line: (line, f"{path}:{line}")).value
    except (OSError, ValueError, UserError):
        return None
    number = values.get("num_processes") if isinstance(values, dict) else None
    return (number, f"num_processes in {path}") if isinstance(number, int) else None


def _torchrun_processes(flags: Mapping[str, str], environment: Mapping[str, str]) -> tuple[int, str] | None:
    """torchrun also reads each flag from PET_NAME; its default is one process on one machine."""
    number = 1
    words = []
    for name in ("nnodes", "nproc_per_node"):
        value = flags.get(name) or environment.get(f"PET_{name.upper()}") or "1"
        least, _, most = value.partition(":")
        if not least.isdecimal() or (most and most != least):
            return None
        number *= int(least)
        words.append(f"--{name} {value}")
    return number, f"torchrun {' '.join(words)}"


def _why(world: World) -> str:
    if world.world_size > 1:
        return "another launcher stands between"
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true"):
        return (
            "accelerate starts one process for --cpu and for distributed_type MULTI_CPU or NO unless mpirun is set up"
        )
    return "accelerate starts one process unless distributed_type is MULTI_GPU, FSDP or DEEPSPEED"

"""Worlds from the environment, and refusal of runs that a launcher started with fewer processes than asked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config import RunConfig
from launch.errors import UserError
from launch.world import World, check_world, launcher_arguments, read_world

ROOT = Path(__file__).parents[1]
SCRIPT = """\
import sys
from launch.config import RunConfig
from launch.errors import exit_code
from launch.world import check_world, read_world

def main(argv):
    world = read_world()
    config = RunConfig.model_validate(
        {"model": {"path": "x"}, "data": {"sources": [{"path": "x"}]}, "train": {"global_batch_size": 8}}
    )
    check_world(config, world)
    sys.stdout.write(f"rank {world.rank} of {world.world_size} on {world.nodes}\\n")

if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
"""
# Stands between as `accelerate launch` and `torchrun` do, by its name, and starts its script once.
LAUNCHER = """\
import subprocess, sys
script = next(word for word in sys.argv if word.endswith(".py"))
sys.exit(subprocess.run([sys.executable, script]).returncode)
"""
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def _environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith(("ACCELERATE", "PET_"))}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HOME": "/nonexistent"} | more


def _config(world_size: int | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "x"},
            "data": {"sources": [{"path": "x"}]},
            "train": {"global_batch_size": 8, "world_size": world_size},
        }
    )


def test_world_from_the_environment() -> None:
    assert read_world({}) == World(0, 0, 1, 1, 1)
    values = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert read_world(values) == World(9, 1, 16, 8, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "got RANK, WORLD_SIZE without LOCAL_RANK, LOCAL_WORLD_SIZE"),
        (dict.fromkeys(TORCHRUN, "x"), "allowed: integers >= 0"),
        (dict.fromkeys(TORCHRUN, "2"), "allowed: ranks below their world sizes"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"},
            "below their world sizes",
        ),
    ],
)
def test_half_a_world_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_world(values)


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("python /b/accelerate launch --num_processes 4 t.py --num_processes 8", {"num_processes": "4"}),
        ("/b/accelerate-launch --num-processes=4 --cpu t.py", {"num_processes": "4", "cpu": ""}),
        (
            "python -m accelerate.commands.launch --cpu --config_file c.yaml t.py",
            {"cpu": "", "config_file": "c.yaml"},
        ),
        ("python /b/torchrun --nproc-per-node 2 --nnodes=2 t.py", {"nproc_per_node": "2", "nnodes": "2"}),
        (
            "python -m torch.distributed.run --standalone --nproc_per_node 3 -m x",
            {"standalone": "", "nproc_per_node": "3"},
        ),
        ("python train.py --num_processes 3", None),
        ("accelerate config", None),
    ],
)
def test_launcher_command_lines(line: str, flags: dict[str, str] | None) -> None:
    found = launcher_arguments(line.split())
    assert (found[1] if found else None) == flags


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        (["torchrun", "--nproc_per_node=3"], {}, "torchrun --nnodes 1 --nproc_per_node 3 asks for 3, got 1"),
        (["torchrun"], {"PET_NPROC_PER_NODE": "2", "PET_NNODES": "4"}, "asks for 8, got 1"),
        (["accelerate", "launch"], {"PET_NPROC_PER_NODE": "2"}, "--nproc_per_node 2 asks for 2, got 1"),
        (
            ["accelerate", "launch", "--config_file", "c.yaml"],
            {},
            "num_processes in .*/c.yaml asks for 5, got 1",
        ),
        (
            ["accelerate", "launch"],
            {"HF_HOME": "home"},
            "num_processes in .*default_config.yaml asks for 6, got 1",
        ),
        (["accelerate", "launch", "--cpu"], {"HF_HOME": "home"}, None),
        (["torchrun", "--nproc_per_node", "gpu"], {}, None),
        (["torchrun", "--nproc_per_node", "1"], {}, None),
        ([], {"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 copies"),
        ([], {}, None),
    ],
)
def test_what_launchers_above_were_told(
    tmp_path: Path, command: list[str], environment: dict[str, str], message: str | None
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "c.yaml").write_text("num_processes: 5\n")
    (tmp_path / "home/accelerate").mkdir(parents=True)
    (tmp_path / "home/accelerate/default_config.yaml").write_text("num_processes: 6\n")
    environment = {k: str(tmp_path / v) if k == "HF_HOME" else v for k, v in environment.items()}
    words = [sys.executable, *command, "script.py"]
    if command:
        (tmp_path / command[0]).write_text(LAUNCHER)
    done = subprocess.run(words, cwd=tmp_path, env=_environment(**environment), capture_output=True, text=True)
    if message is None:
        assert (done.returncode, done.stdout) == (0, "rank 0 of 1 on 1\n"), done.stderr
    else:
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert line.startswith("nestling: processes: ")
        assert re.search(message, line), line


def test_world_size_of_the_run_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    check_world(_config(1), World(0, 0, 1, 1, 1))
    with pytest.raises(UserError, match=r"asks for 2 processes, got 1; .*--num_processes 2 .*train.world_size=1"):
        check_world(_config(2), World(0, 0, 1, 1, 1))


def _accelerate(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "script.py"]
    return subprocess.run(command, cwd=folder, env=_environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)


def test_accelerate_really_starts_one_process_and_that_is_refused(tmp_path: Path) -> None:
    done = _accelerate(tmp_path, "--cpu", "--num_processes", "2")
    assert done.returncode != 0
    assert "rank" not in done.stdout
    [line] = [line for line in done.stderr.splitlines() if line.startswith("nestling: ")]
    assert "accelerate launch --num_processes 2 asks for 2, got 1; accelerate starts one process for --cpu" in line
    assert "configs/accelerate/cpu.yaml" in line


def test_our_cpu_file_really_starts_two(tmp_path: Path) -> None:
    done = _accelerate(tmp_path, "--config_file", str(ROOT / "configs/accelerate/cpu.yaml"))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 on 1", "rank 1 of 2 on 1"]

"""The entry on each node of every platform: its variables -> one `Nodes`, checks, then the supervised run.

    python -m launch.node [--nodes N] [--gpus-per-node G] [--accelerate FILE] RUN.yaml [section.key=value ...]

A world that is not what was asked for never trains: platforms and accelerate start one process of each, or the same
world twice, without an error. The exit code is the run's (launch/errors.py); 75 = run this again.
"""

import argparse
import hashlib
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch import errors, preflight, reader
from launch.config import RunConfig
from launch.config_launch import PORT
from launch.errors import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, UserError
from launch.files import digest_of, read_json, sha256_of
from launch.meeting import Left, NotMet, meet
from launch.supervise import Stops, code_of, finished, supervise

ROOT = Path(__file__).resolve().parents[1]
USAGE = (
    "usage: python -m launch.node [--nodes N] [--gpus-per-node G] [--accelerate FILE] RUN.yaml [section.key=value ...]"
)
WAIT = 1800.0  # seconds for all nodes to come: a cluster may have to make machines
# Variables of platforms by what they say; the first platform whose rank is there counts, NESTLING_* before all.
PLATFORMS: dict[str, dict[str, str]] = {
    "Kubeflow": dict(rank="PET_NODE_RANK", nodes="PET_NNODES", gpus="PET_NPROC_PER_NODE")
    | dict(head="PET_MASTER_ADDR", port="PET_MASTER_PORT"),
    "Kubernetes": dict(rank="JOB_COMPLETION_INDEX"),
    "SkyPilot": dict(rank="SKYPILOT_NODE_RANK", nodes="SKYPILOT_NUM_NODES", gpus="SKYPILOT_NUM_GPUS_PER_NODE")
    | dict(head="SKYPILOT_NODE_IPS", job="SKYPILOT_TASK_ID"),
    "Slurm": dict(rank="SLURM_NODEID", nodes="SLURM_STEP_NUM_NODES", gpus="SLURM_GPUS_ON_NODE")
    | dict(job="SLURM_JOB_ID", attempt="SLURM_RESTART_COUNT"),
    "AWS Batch": dict(rank="AWS_BATCH_JOB_NODE_INDEX", nodes="AWS_BATCH_JOB_NUM_NODES", job="AWS_BATCH_JOB_ID")
    # Node 0 is not told its own address.
    | dict(head="AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS", attempt="AWS_BATCH_JOB_ATTEMPT"),
    "RunPod": dict(rank="NODE_RANK", nodes="NUM_NODES", gpus="NUM_TRAINERS", head="MASTER_ADDR", port="MASTER_PORT"),
}
_SAME_VERSIONS = ("torch", "transformers", "sentence-transformers", "accelerate", "deepspeed")
_EDGE = 1 << 20  # bytes at either end of a data file that its fingerprint reads


@dataclass(frozen=True)
class Nodes:
    """This node among those of the run."""

    platform: str
    nodes: int
    rank: int
    gpus: int  # of this node, 0 = CPU
    head: str  # address of node 0
    port: int  # on which nodes meet; the next one is torch's
    job: str  # the same on all nodes of a job
    attempt: int
    grace: float  # seconds from a signal to stop until the platform kills

    def __str__(self) -> str:
        what = f"{self.gpus} GPUs" if self.gpus else "the CPU"
        where = f" of {self.nodes}, node 0 is {self.head}:{self.port}" if self.nodes > 1 else ""
        return f"node {self.rank}{where}, {what}, {self.platform}, job {self.job}, attempt {self.attempt}"


def main(words: Sequence[str]) -> int:
    """Run this node's part; returns an exit code. Raises UserError for what the user can mend."""
    given = _arguments(words)
    config = reader.read_run(given.run_file, [w for w in given.words if w not in reader.FLAGS])
    here = read_nodes(given, config.train.grace_seconds)
    _say(str(here))
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # torchrun's; accelerate reads some of them
    run_dir = reader.run_directory(config, given.run_file, "--fresh" in given.words)
    if "--fresh" in given.words:  # once, not at every start
        given.words = [*(word for word in given.words if word != "--fresh"), f"train.run_dir={run_dir}"]
    with Stops() as stops:
        if here.nodes == 1:
            check_node(here)
            preflight.require_preflight(config, given.run_file)
            return supervise(command(here, given), entered=stops)
        if _is_finished(run_dir, config):
            _say(f"{run_dir} holds this run, which is finished")
            return code_of(run_dir)
        shared = run_dir.absolute().parent if config.checkpoint.remote is None else None
        try:
            return _as_one_of_many(here, given, config, _Meetings(here, given.wait, stops, shared))
        except (Left, NotMet) as error:
            _say(str(error))
            return getattr(error, "code", EXIT_CRASH)
        except errors.Preempted as error:
            _say(str(error))
            return EXIT_PREEMPTED


def _as_one_of_many(here: Nodes, given: argparse.Namespace, config: RunConfig, meetings: "_Meetings") -> int:
    try:
        check_node(here)
        preflight.require_preflight(config, given.run_file)
        meetings.same |= same_everywhere(here, config)
        code = EXIT_DONE
        while code == EXIT_DONE and not meetings.is_over:
            code = supervise(command(here, given), before=meetings.before, entered=meetings.stops)
            if code == EXIT_DONE:
                meetings.at_the_end()
    except UserError as error:
        meetings.leave(error.code, str(error))
        raise
    if code != EXIT_DONE:
        meetings.leave(code, "see its log")
    return code


class _Meetings:
    """This node's meetings with the others."""

    def __init__(self, here: Nodes, wait: float, stops: Stops, shared: Path | None) -> None:
        self._here, self._wait, self._shared = here, wait, shared
        self.stops, self.same, self.is_over = stops, {"job": here.job}, False
        self._agreed: list[int | None] = []  # the budget of a start that nodes agreed on at an end

    def before(self, budget: int | None) -> int | None:
        """Meet before a start, unless that was agreed at an end; returns the budget of all."""
        return self._agreed.pop() if self._agreed else self._meet({"budget": budget}, self._wait)["budget"]

    def at_the_end(self) -> None:
        """Wait until node 0 has finished the run, which is over then, or begins again, and with it all."""
        if self._here.rank:
            _say("done; waiting for node 0, which evaluates and exports")
            answer = self._meet({"end": EXIT_DONE}, math.inf)  # an export may take hours
        else:  # the others wait for it already, and nothing changes that the run is finished
            self.leave(EXIT_DONE, "")
            answer = {"end": EXIT_DONE}
        self.is_over = answer["end"] == EXIT_DONE
        if not self.is_over:
            self._agreed.append(answer["budget"])

    def leave(self, code: int, why: str) -> None:
        """Tell the others, which would wait, that this node does not come again."""
        # Ranks of others may take their grace to end; those that were told to stop too do not come.
        seconds = 10 if code == EXIT_PREEMPTED else self._here.grace + 60
        with suppress(Left, NotMet, UserError, OSError):
            self._meet({"end": code, "why": why.partition("\n")[0]}, seconds, bool)

    def _meet(self, facts: dict[str, Any], seconds: float, is_stopped: Callable[[], bool] | None = None) -> Any:
        here, is_stopped = self._here, is_stopped or (lambda: self.stops.came)
        facts = {"same": self.same, **facts}
        return meet(here.nodes, here.rank, (here.head, here.port), facts, seconds, is_stopped, self._shared)


def _is_finished(run_dir: Path, config: RunConfig) -> bool:
    """Whether this very run is finished: a platform may start a node again that nobody waits for any more."""
    if not finished(run_dir):
        return False
    was, now = read_json(run_dir / "run.json").get("config", {}), config.model_dump(mode="json")
    for one in (was, now):
        one.get("train", {}).pop("micro_batch_tokens", None)  # which may have been lowered
    return was == now


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.node", description=__doc__, usage=USAGE.partition(": ")[2])
    parser.add_argument("--nodes", type=int, help="of the whole job; a platform that says another number is an error")
    parser.add_argument("--gpus-per-node", type=int, help="0 = CPU; default: all that this machine has")
    parser.add_argument("--accelerate", metavar="FILE", help="for accelerate launch; chooses the engine")
    parser.add_argument("--port", type=int, default=PORT, help="of node 0, and the next one")
    parser.add_argument("--wait", type=float, default=WAIT, metavar="SECONDS", help="for all nodes to come")
    parser.add_argument("run_file", type=Path, nargs="?")
    given, rest = parser.parse_known_args(words)
    if given.run_file is None:
        raise UserError(USAGE)
    if odd := [word for word in rest if word.startswith("-") and word not in reader.FLAGS]:
        raise UserError(f"launch.node: got {odd[0]}; {USAGE}")
    given.words = rest
    return given


def read_nodes(given: argparse.Namespace, grace: float, environment: Mapping[str, str] = os.environ) -> Nodes:
    """This node from the platform's variables; raises UserError where they are not what was asked for."""
    names = {"rank": "NESTLING_NODE_RANK"}
    found = "one node" if not environment.get("NESTLING_NODE_RANK") else "NESTLING_NODE_RANK"
    for name, variables in PLATFORMS.items():
        if environment.get(variables["rank"]) and found == "one node":
            found, names = name, variables

    def value(key: str, otherwise: Any) -> Any:
        own = f"NESTLING_{'NODE_RANK' if key == 'rank' else key.upper()}"
        text = environment.get(own) or environment.get(names.get(key, ""))
        return (str(text), own if environment.get(own) else names[key]) if text else (otherwise, "")

    def number(key: str, otherwise: int) -> tuple[int, str]:
        text, name = value(key, otherwise)
        if name and not text.isdecimal():
            raise UserError(f"{name}: got {text!r}, allowed: a whole number; {found} should set it")
        return int(text), name

    nodes, name = number("nodes", given.nodes or 1)
    if given.nodes not in (None, nodes):
        raise UserError(
            f"nodes: {given.nodes} were asked for, {found} gives {nodes} ({name}={nodes}); start as many as that, or "
            f"nestling launch --nodes {nodes}"
        )
    rank, name = number("rank", 0)
    if rank >= nodes:
        raise UserError(f"{name}: got {rank}, allowed: 0 to {nodes - 1}; --nodes, or NESTLING_NODES, says how many")
    if nodes > 1 and not name:
        variables = ", ".join(v["rank"] for v in PLATFORMS.values())
        raise UserError(
            f"nodes: {nodes} were asked for, and nothing says which of them this is; allowed: NESTLING_NODE_RANK, or "
            f"one of {variables}"
        )
    copies, _, _ = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")
    if found == "Slurm" and copies != "1":
        raise UserError(
            f"srun: got {copies} tasks a node, allowed: 1 (--ntasks-per-node=1), which starts all processes"
        )
    head, _ = value("head", "127.0.0.1" if nodes == 1 or not rank else None)
    if head is None:
        raise UserError("NESTLING_HEAD: missing; allowed: the address of the node whose rank is 0")
    has, name = number("gpus", -1)
    asked = given.gpus_per_node if given.gpus_per_node is not None else has if has >= 0 else gpus_here()
    if given.gpus_per_node and has >= 0 and has < given.gpus_per_node:
        raise UserError(f"gpus: {given.gpus_per_node} were asked for, {found} gives {has} ({name}={has})")
    port = number("port", given.port)[0]
    job, _, _ = str(value("job", "0")[0]).partition("#")  # behind it AWS Batch has the node's number
    attempt = number("attempt", 0)[0]
    return Nodes(found, nodes, rank, asked, str(head).split()[0], port, job, attempt, grace)


def gpus_here() -> int:
    """NVIDIA GPUs that a process of this node may use, by nvidia-smi and CUDA_VISIBLE_DEVICES; no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise UserError("nvidia-smi: no answer in 60 s; the driver of this node hangs, take another node") from None
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return count if visible is None else min(count, len([one for one in visible.split(",") if one.strip()]))


def check_node(here: Nodes) -> None:
    """Raise UserError for what this node lacks: GPUs, or the network card that NCCL or gloo are told to take."""
    if here.gpus and (found := gpus_here()) < here.gpus:
        raise UserError(f"gpus: {here.gpus} were asked for, node {here.rank} has {found} (nvidia-smi -L)")
    cards = psutil.net_if_addrs()
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(name, "")
        prefixes = [] if wanted.startswith("^") else [one.lstrip("=") for one in wanted.split(",") if one]
        if prefixes and not any(card.startswith(prefix) for card in cards for prefix in prefixes):
            raise UserError(f"{name}: got {wanted!r}, node {here.rank} has {', '.join(cards)}; allowed: one of these")


def same_everywhere(here: Nodes, config: RunConfig) -> dict[str, Any]:
    """What all nodes must have alike: numbers, code, config, data, versions, NCCL's settings."""
    files = sorted(p for name in ("launch", "data_tools", "trainer") for p in (ROOT / name).rglob("*.py"))
    code = hashlib.sha256("".join(f"{p.relative_to(ROOT)} {sha256_of(p)}" for p in files).encode()).hexdigest()
    settings = digest_of(config.model_dump(mode="json"))
    versions = {"python": platform.python_version()}
    for name in _SAME_VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    sources = [*config.data.sources, *(config.data.known_positives or [])]
    data = {f"data {s.path}": _fingerprint(Path(s.path)) for s in sources if s.path and not s.url}
    nccl = {name: text for name, text in os.environ.items() if name.startswith("NCCL_")}
    own = {"job": here.job, "nodes": here.nodes, "gpus": here.gpus, "code": code[:12], "run file": settings[:12]}
    return own | versions | data | nccl


def _fingerprint(path: Path) -> str:
    """Of a data file or folder, by sizes and by the ends of its files: a node must not read a terabyte twice."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_EDGE))
            content.seek(max(0, size - _EDGE))
            digest.update(content.read(_EDGE))
    return digest.hexdigest()[:12]


def command(here: Nodes, given: argparse.Namespace) -> list[str]:
    """accelerate launch with the numbers of this world."""
    processes = here.nodes * max(1, here.gpus)
    name = "single" if processes == 1 else "ddp" if here.gpus else "cpu"
    file = given.accelerate or str(ROOT / f"configs/accelerate/{name}.yaml")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    words += ["--num_processes", str(processes), "--num_machines", str(here.nodes), "--machine_rank", str(here.rank)]
    words += ["--main_process_port", str(here.port + 1)]
    words += ["--main_process_ip", here.head] if here.nodes > 1 else []
    return [*words, str(ROOT / "train.py"), str(given.run_file), *given.words]


def _say(line: str) -> None:
    print(f"nestling node: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main, sys.argv[1:]))

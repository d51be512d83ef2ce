"""`nestling launch TARGET RUN.yaml`: prints the file that starts a run on a platform, or hands it over.

Nothing of a platform is imported; what is printed can be kept, changed and submitted by hand.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import kubernetes, skypilot, slurm
from launch.config_launch import Env, Kubernetes, Launch, Local
from launch.errors import EXIT_CRASH, EXIT_DONE, UserError
from launch.job import Job, exports, script, wrapped
from launch.reader import did_you_mean, read_run

# What hands a file over, the file's place being FILE, and its own name for where it comes from.
SUBMIT = {
    "local": ["bash", "FILE"],
    "slurm": ["sbatch", "FILE"],
    "kubernetes": ["kubectl", "apply", "--filename", "FILE"],
    "skypilot": ["sky", "jobs", "launch", "--yes", "FILE"],
}
TARGETS = ("local", "slurm", "kubernetes", "skypilot", "env")
_FLAGS = ("nodes", "gpus_per_node")


def main(words: Sequence[str]) -> int:
    """Print or submit; returns an exit code. Raises UserError for what the user can mend."""
    first = next((word for word in words if not word.startswith("-")), "local")
    if first not in TARGETS:
        raise UserError(f"launch: got {first!r}, allowed: {', '.join(TARGETS)}{did_you_mean(first, TARGETS)}")
    given = arguments().parse_intermixed_args(words)
    job, target = prepare(given, ["nestling", "launch", *words])
    text = RENDER[given.target](job, target)
    if not given.submit:
        sys.stdout.write(text)
        return EXIT_DONE
    return submit(given.target, text, getattr(target, "secrets", []) if given.target == "skypilot" else [])


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="nestling launch", description="Start a run on a platform.")
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nodes", type=int, metavar="N", help="in place of launch.TARGET.nodes")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="in place of launch.TARGET.gpus_per_node")
    parser.add_argument("--spot", action="store_true", help="preemptible machines; slurm, kubernetes, skypilot")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print the file that would be submitted (the default)")
    what.add_argument("--submit", action="store_true", help="hand it over to bash, sbatch, kubectl or sky")
    return parser


def prepare(given: argparse.Namespace, command: Sequence[str]) -> tuple[Job, Any]:
    """The run and its section of the target, flags applied; raises UserError with a line per problem."""
    name = given.target
    # Before the flags, which would make a section of their own.
    sections = read_run(given.run_file, given.overrides).launch or Launch()
    others = [other for other in TARGETS if getattr(sections, other) is not None]
    if others and name not in others:
        raise UserError(
            f"launch.{name}: missing; {given.run_file} has launch.{', launch.'.join(others)}; add the section, or "
            f"nestling launch {others[0]} {given.run_file}"
        )
    flags = [f"launch.{name}.{key}={getattr(given, key)}" for key in _FLAGS if getattr(given, key) is not None]
    flags += [f"launch.{name}.spot=true"] if given.spot else []
    if name not in others:
        flags = flags or [f"launch.{name}={{}}"]
    config = read_run(given.run_file, [*given.overrides, *flags])
    target: Any = getattr(config.launch, name)
    job = Job(config, given.run_file, list(given.overrides), shlex.join(command))
    if target.gpus_per_node is None and not isinstance(target, Local | Env):
        raise UserError(f"launch.{name}.gpus_per_node: required; allowed: --gpus-per-node G, 0 for the CPU")
    if not job.run_file.resolve().is_relative_to(Path.cwd()) and name == "skypilot":
        raise UserError(f"{job.run_file}: lies outside this folder, which is what SkyPilot copies; move it here")
    lost = name == "skypilot" or (isinstance(target, Kubernetes) and not target.volumes)
    if lost and getattr(target, "spot", False) and config.checkpoint.remote is None:
        raise UserError(
            "checkpoint.remote: null with spot machines, whose disks go with them; allowed: "
            f"checkpoint.remote=s3://BUCKET/runs/{job.name}" + (", or launch.kubernetes.volumes" * (name[0] == "k"))
        )
    return job, target


def submit(name: str, text: str, secrets: Sequence[str] = ()) -> int:
    """Hand a rendered file over to the platform's own command; `secrets` are variables whose values it takes along."""
    if name not in SUBMIT:
        raise UserError("launch env: nothing to submit to; --print gives the script that each node of the service runs")
    program = SUBMIT[name][0]
    if shutil.which(program) is None:
        raise UserError(
            f"launch {name}: the command {program} is not installed here; install it, or --print the file and hand it "
            f"over where it is: {' '.join(SUBMIT[name])}"
        )
    with tempfile.NamedTemporaryFile("w", prefix=f"nestling-{name}-", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        words = [word.replace("FILE", file.name) for word in SUBMIT[name]]
        words += [word for secret in secrets for word in ("--secret", secret)]
        code = subprocess.run(words, check=False).returncode
    return code if name == "local" or code == 0 else EXIT_CRASH


_ONE_NODE = ["One node, this machine. Exit codes: 0 done, 75 stopped and saved: run it again."]
_EACH_NODE = [
    "Run this on each node, in a checkout; it ends with 75 where it is to be run again.",
    "docs/launch/env.md says what services set by themselves; what they do not, set here:",
    "  NESTLING_NODE_RANK  0 to nodes - 1",
    "  NESTLING_HEAD       address of the node whose rank is 0",
    "  NESTLING_JOB        the same on all nodes of one job, another for each job",
]


def _shell(job: Job, target: Local | Env) -> str:
    body = ["set -euo pipefail", *exports(target), f"exec {wrapped(job.node_command(target))}"]
    return script(job, _ONE_NODE if isinstance(target, Local) else _EACH_NODE, body)


RENDER: dict[str, Callable[[Job, Any], str]] = {
    "local": _shell,
    "slurm": slurm.render,
    "kubernetes": kubernetes.render,
    "skypilot": skypilot.render,
    "env": _shell,
}

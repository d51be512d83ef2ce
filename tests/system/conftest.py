"""Platforms for real on this machine: `make test-system`, as root on Debian. Skipped with a reason elsewhere."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import free_port

PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge", "ip": "iproute2"}
NODES = ("nestling1", "nestling2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def debian() -> None:
    """Debian's packages of what is tried here, installed where they are missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing and shutil.which("apt-get") is None:
        pytest.skip(f"needs Debian's {', '.join(missing)}")
    if missing:
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "stdout": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update", "-qq"], check=True, **quiet)
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *missing], check=True, **quiet)


def until(done: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@dataclass
class Cluster:
    """A Slurm of two nodes, both this machine, with its own munge; nothing of the machine's own is touched."""

    folder: Path
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *words: str, **more: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            words, env=self.environment | more, cwd=self.folder, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                words, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def state(self, job: str, key: str = "JobState") -> str:
        """A value of `scontrol show job`."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-8000:] for path in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="session")
def cluster(debian: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = Cluster(tmp_path_factory.mktemp("slurm"))
    folder = one.folder
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)  # munge's socket is for all
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    ports = [free_port() for _ in range(3)]
    nodes = "".join(
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN\n"
        for name, port in zip(NODES, ports, strict=False)
    )
    (folder / "slurm.conf").write_text(
        f"""ClusterName=nestling
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={ports[2]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=10
MinJobAge=600
{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""
    )
    (folder / "state").mkdir()
    hosts, before = Path("/etc/hosts"), Path("/etc/hosts").read_text()
    hosts.write_text(before.rstrip("\n") + f"\n127.0.0.1 {' '.join(NODES)}\n")
    try:
        munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        munge += [f"--key-file={folder}/key", f"--seed-file={folder}/munge.seed"]
        one.start("munged", "munged", "--foreground", "--force", *munge)
        until((folder / "munge.socket").exists, 20, "munge")
        one.start("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for name in NODES:
            one.start_node(name)
        until(lambda: _idle(one) == 2, 60, f"Slurm: {one.log()}")
        yield one
    finally:
        hosts.write_text(before)
        for daemon in reversed(one.daemons.values()):
            daemon.terminate()
        for daemon in one.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle(cluster: Cluster) -> int:
    try:
        return cluster.call("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
    except subprocess.CalledProcessError:
        return 0

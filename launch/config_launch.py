"""The run's config, continued: where it runs, a section for each target of `nestling launch`."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from launch.config_data import Section

Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]
Word = Annotated[str, Field(pattern=r"^[^\s]+$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
PORT = 29500  # torch's own default
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


class Target(Section):
    """What every target has."""

    nodes: int = Field(default=1, ge=1, le=10_000)
    """Machines."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs of each, one process a GPU; 0 = one process on the CPU, null = as many as there are, where that is known
    only on the machine (local, env)."""
    max_nodes: Annotated[int, Field(ge=1)] | None = None
    """Quota: more nodes than these are refused before anything is submitted; null = none is known."""
    accelerate: Word | None = None
    """File for accelerate launch, which chooses the engine; null = configs/accelerate/ddp.yaml, on a CPU cpu.yaml."""
    port: int = Field(default=PORT, ge=1024, le=65534)
    """TCP port of node 0 on which nodes meet; the next one is for torch."""
    python: Word = ".venv/bin/python"
    """Python that has nestling installed, on the node."""
    environment: dict[Variable, Line] = {}
    """Further environment of the run, for example {NCCL_SOCKET_IFNAME: eth0}; no secrets."""

    @field_validator("environment")
    @classmethod
    def _without_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        if found := [name for name in environment if _SECRET.search(name)]:
            raise ValueError(
                f"environment: got {found[0]}, a secret, which would stand in the file that is submitted; allowed: the "
                "platform's own way for secrets (kubernetes.secrets, skypilot.secrets, your login's environment)"
            )
        return environment

    @model_validator(mode="after")
    def _within_the_quota(self) -> "Target":
        if self.max_nodes is not None and self.nodes > self.max_nodes:
            raise ValueError(f"nodes: got {self.nodes}, allowed: 1 to {self.max_nodes} (max_nodes, the quota)")
        return self


class Local(Target):
    """This machine."""

    nodes: Literal[1] = 1
    """One."""


class Env(Target):
    """Any service that starts a command on each node and tells it node count, rank and head address."""


class Slurm(Target):
    """A batch job of a Slurm cluster."""

    partition: Word | None = None
    """Partition; null = the cluster's default."""
    spot: bool = False
    """Run in `spot_partition`, whose jobs are preempted."""
    spot_partition: Word | None = None
    """Partition of preemptible jobs."""
    account: Word | None = None
    """Account that is charged; null = the user's default."""
    qos: Word | None = None
    """Quality of service; null = the default."""
    constraint: Word | None = None
    """Features that nodes must have."""
    gpu: Word | None = None
    """Type of GPU as the cluster names it; null = any."""
    cpus_per_node: Annotated[int, Field(ge=1)] | None = None
    """CPUs of each node; null = the cluster's default."""
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    """Memory of each node, for example 200G; "0" = all, null = the cluster's default."""
    time: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    """Longest time of one turn as [days-]hours:minutes:seconds; before its end the run saves and is queued again."""
    workdir: Line | None = None
    """Folder of the checkout, on a file system that all nodes share; null = where sbatch is called."""
    setup: list[Line] = []
    """Shell lines before the run, for example [module load cuda]."""

    @model_validator(mode="after")
    def _spot_has_a_partition(self) -> "Slurm":
        if self.spot and self.spot_partition is None:
            raise ValueError("spot: needs spot_partition, the cluster's partition of preemptible jobs")
        return self


class Kubernetes(Target):
    """A Job of Kubernetes, or a TrainJob of Kubeflow Trainer."""

    image: Word
    """Image of the Dockerfile, with its registry and tag or digest."""
    kind: Literal["Job", "TrainJob"] = "Job"
    """A plain indexed Job, or a TrainJob with a runtime of its own, where Kubeflow Trainer 2 is installed."""
    python: Word = "python"
    """Python in the image."""
    namespace: Word | None = None
    """Namespace; null = that of the context."""
    spot: bool = False
    """Run on preemptible nodes: `spot_selector` and `spot_tolerations` are added."""
    spot_selector: dict[str, str] = {}
    """Labels of preemptible nodes, for example {cloud.google.com/gke-spot: "true"}."""
    spot_tolerations: list[Word] = []
    """Keys of their taints."""
    node_selector: dict[str, str] = {}
    """Labels that nodes must have, for example {cloud.google.com/gke-accelerator: nvidia-h100-80gb}."""
    gpu_resource: Word = "nvidia.com/gpu"
    """Resource that the device plug-in offers."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs of each pod; null = no request."""
    memory: Annotated[str, Field(pattern=r"^\d+[MGT]i$")] | None = None
    """Memory of each pod, for example 200Gi; null = no request."""
    shared_memory: str = Field(default="16Gi", pattern=r"^\d+[MGT]i$")
    """Size of /dev/shm, which NCCL and loader workers need."""
    volumes: dict[Word, Annotated[str, Field(pattern=r"^/[^\s]*$")]] = {}
    """Claims of volumes that all pods share, and where they are mounted, for example {runs: /app/runs}."""
    secrets: list[Word] = []
    """Names of Secrets whose keys become environment variables (HF_TOKEN, AWS_ACCESS_KEY_ID ...)."""
    service_account: Word | None = None
    """Service account, for access to an object store without keys; null = the namespace's default."""
    retries: int = Field(default=6, ge=0)
    """Failed pods until the job fails; preempted ones do not count."""

    @model_validator(mode="after")
    def _spot_is_known(self) -> "Kubernetes":
        if self.spot and not self.spot_selector:
            raise ValueError("spot: needs spot_selector, the labels of the cluster's preemptible nodes")
        return self


class Skypilot(Target):
    """A managed job of SkyPilot."""

    gpu: Word | None = None
    """GPU as SkyPilot names it (sky show-gpus), for example H100; needed unless gpus_per_node is 0."""
    infra: Word | None = None
    """Where to look, for example aws, gcp/us-central1, kubernetes; null = the cheapest that you have access to."""
    spot: bool = False
    """Spot instances."""
    cpus: Annotated[str, Field(pattern=r"^\d+\+?$")] | None = None
    """CPUs of each node, for example 16+; null = what comes with the GPUs."""
    memory: Annotated[str, Field(pattern=r"^\d+\+?$")] | None = None
    """Memory of each node in GiB, for example 128+; null = what comes with the GPUs."""
    disk_size: int = Field(default=256, ge=1)
    """Disk of each node in GiB."""
    retries: int = Field(default=3, ge=0)
    """Crashes after which the job is started again; preemptions do not count."""
    secrets: list[Variable] = []
    """Environment variables of yours that the job gets as secrets, for example [HF_TOKEN, AWS_SECRET_ACCESS_KEY]."""
    setup: list[Line] = [
        "python3 -m venv .venv",
        '.venv/bin/pip install --constraint constraints.txt --editable ".[train,cloud]"',
    ]
    """Shell lines on a new machine, in a copy of this folder."""

    @model_validator(mode="after")
    def _gpu_is_named(self) -> "Skypilot":
        if self.gpus_per_node and self.gpu is None:
            raise ValueError("gpu: required with gpus_per_node, by SkyPilot's name, for example H100")
        return self


class Launch(Section):
    """Where the run runs: one section for each target of `nestling launch` that it is meant for."""

    local: Local | None = None
    """This machine."""
    slurm: Slurm | None = None
    """A batch job of a Slurm cluster."""
    kubernetes: Kubernetes | None = None
    """A Job of Kubernetes, or a TrainJob of Kubeflow Trainer."""
    skypilot: Skypilot | None = None
    """A managed job of SkyPilot."""
    env: Env | None = None
    """Any service that starts a command on each node and tells it node count, rank and head address."""

"""The files of Kubernetes: a plain indexed Job, or a TrainJob of Kubeflow Trainer 2 with a runtime of its own.

Both start the node entry in each pod. A pod that ends with 75, or is taken away, is made again without counting.
"""

from pathlib import PurePosixPath
from typing import Any

from launch.config_launch import Kubernetes
from launch.errors import EXIT_CHECK, EXIT_PREEMPTED, EXIT_USER
from launch.job import Job, yaml_text

_FOLDER = PurePosixPath("/app/run")  # where the run file lies in the pod
_USER = 10001  # of the Dockerfile


def render(job: Job, target: Kubernetes) -> str:
    """The file that kubectl takes."""
    named: dict[str, Any] = {"name": job.name, "labels": {"app.kubernetes.io/name": "nestling"}}
    named |= {"namespace": target.namespace} if target.namespace else {}
    run_file = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": named,
        "data": {job.run_file.name: job.run_file.read_text(encoding="utf-8")},
    }
    documents = _train_job(job, target, named) if target.kind == "TrainJob" else _job(job, target, named)
    return f"# {job.command}\n" + yaml_text(run_file, *documents)


def _job(job: Job, target: Kubernetes, named: dict[str, Any]) -> list[dict[str, Any]]:
    head = {"NESTLING_NODES": str(target.nodes), "NESTLING_HEAD": f"{job.name}-0.{job.name}"}
    pod = _pod(job, target, "nestling", {**head, "NESTLING_JOB": job.name})
    pod["subdomain"] = job.name
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": named,
        "spec": {
            "clusterIP": "None",  # gives each pod a name of its own
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": job.name},
        },
    }
    spec = {"completions": target.nodes, "parallelism": target.nodes, "completionMode": "Indexed"}
    spec |= _failures(target, "nestling") | {"template": {"spec": pod}}
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": named, "spec": spec}]


def _train_job(job: Job, target: Kubernetes, named: dict[str, Any]) -> list[dict[str, Any]]:
    pod = _pod(job, target, "node", {"NESTLING_JOB": job.name})
    node = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": _failures(target, "node") | {"template": {"spec": pod}},
        },
    }
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": named,
        "spec": {
            "mlPolicy": {"numNodes": target.nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": {"maxRestarts": target.retries}, "replicatedJobs": [node]}},
        },
    }
    train_job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": named,
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
            "trainer": {"numNodes": target.nodes, "numProcPerNode": target.gpus_per_node or 1},
        },
    }
    return [runtime, train_job]


def _failures(target: Kubernetes, container: str) -> dict[str, Any]:
    """A pod that was stopped is made again, a user error or a failed check ends the job, the rest counts."""
    codes = {"containerName": container, "operator": "In"}
    rules = [
        {"action": "Ignore", "onExitCodes": codes | {"values": [EXIT_PREEMPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": codes | {"values": [EXIT_USER, EXIT_CHECK]}},
    ]
    return {"backoffLimit": target.retries, "podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": rules}}


def _pod(job: Job, target: Kubernetes, container: str, environment: dict[str, str]) -> dict[str, Any]:
    limits: dict[str, Any] = {target.gpu_resource: target.gpus_per_node} if target.gpus_per_node else {}
    limits |= {"cpu": target.cpus} if target.cpus else {}
    limits |= {"memory": target.memory} if target.memory else {}
    mounts = [
        {"name": "run-file", "mountPath": str(_FOLDER), "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    memory = {"medium": "Memory", "sizeLimit": target.shared_memory}
    volumes: list[dict[str, Any]] = [
        {"name": "run-file", "configMap": {"name": job.name}},
        {"name": "shared-memory", "emptyDir": memory},
    ]
    for claim, place in target.volumes.items():
        mounts.append({"name": claim, "mountPath": place})
        volumes.append({"name": claim, "persistentVolumeClaim": {"claimName": claim}})
    variables = target.environment | environment
    body: dict[str, Any] = {
        "name": container,
        "image": target.image,
        "command": job.node_command(target, str(_FOLDER / job.run_file.name)),
        "env": [{"name": name, "value": value} for name, value in variables.items()],
    }
    body |= {"envFrom": [{"secretRef": {"name": name}} for name in target.secrets]} if target.secrets else {}
    body |= {"resources": {"limits": limits}} if limits else {}
    body |= {"securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
    selector = target.node_selector | (target.spot_selector if target.spot else {})
    taints = [
        *([target.gpu_resource] if target.gpus_per_node else []),
        *(target.spot_tolerations if target.spot else []),
    ]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the Job makes another pod, by its rules
        "terminationGracePeriodSeconds": job.grace,
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER},
    }
    pod |= {"serviceAccountName": target.service_account} if target.service_account else {}
    pod |= {"nodeSelector": selector} if selector else {}
    pod |= {"tolerations": [{"key": key, "operator": "Exists"} for key in taints]} if taints else {}
    return pod | {"containers": [body | {"volumeMounts": mounts}], "volumes": volumes}

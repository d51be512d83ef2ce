"""The batch script of Slurm. docs/launch/slurm.md tells what happens when, minute by minute."""

import shlex

from launch.config_launch import Slurm
from launch.job import Job, exports, script, wrapped

_KEPT = "set -uo pipefail"
_RUN = """\
NESTLING_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NESTLING_HEAD

# Slurm tells this shell to stop; it tells the run, which saves and ends with 75: queue it again.
trap 'scancel --signal=USR2 "$SLURM_JOB_ID.0"' USR2
COMMAND &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
  wait "$step"
  code=$?
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code\""""


def render(job: Job, target: Slurm) -> str:
    """The script that sbatch takes."""
    partition = target.spot_partition if target.spot else target.partition
    kind = f"{target.gpu}:" if target.gpu else ""
    options = {
        "job-name": job.name,
        "nodes": target.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": f"{kind}{target.gpus_per_node}" if target.gpus_per_node else None,
        "cpus-per-task": target.cpus_per_node,
        "mem": target.memory,
        "partition": partition,
        "account": target.account,
        "qos": target.qos,
        "constraint": target.constraint,
        "time": target.time,
        "signal": f"B:USR2@{job.grace + 60}",  # Slurm looks once a minute
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={job.grace + 60}"]
    srun += [f"--cpus-per-task={target.cpus_per_node}"] if target.cpus_per_node else []
    run = _RUN.replace("COMMAND", f"{shlex.join(srun)} \\\n  {wrapped(job.node_command(target))}")
    folder = [f"cd {shlex.quote(target.workdir)} || exit 2"] if target.workdir else []
    return script(job, [], [*lines, "#SBATCH --requeue", _KEPT, *folder, *target.setup, *exports(target), run])

"""The task file of SkyPilot, for `sky jobs launch`: a managed job, which is started elsewhere when its machines go."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from launch.config_launch import Skypilot
from launch.errors import EXIT_PREEMPTED, UserError
from launch.job import Job, wrapped, yaml_text

# For SkyPilot's own Python: the cheapest offer of a GPU in its catalogue, for one GPU and hour.
_PRICE = """\
import sys
from sky import catalog
gpu, number, kind, cloud, region = sys.argv[1:]
found = catalog.list_accelerators(
    name_filter=f"^{gpu}$", region_filter=region or None, quantity_filter=int(number) or None, clouds=cloud or None
)
prices = [getattr(one, kind) / one.accelerator_count for offers in found.values() for one in offers]
prices = [price for price in prices if price > 0]
print(min(prices) if prices else sys.exit("no such offer"))
"""


def price_per_hour(target: Skypilot) -> float | None:
    """US dollars of one GPU for an hour, by the catalogue of the SkyPilot whose `sky` is found; None without one.

    SkyPilot fetches its catalogue when it is missing or old. Raises UserError where there is no price in it.
    """
    program = shutil.which("sky")
    if program is None or target.gpu is None:
        return None
    cloud, region = [*(target.infra or "").split("/"), ""][:2]
    kind = "spot_price" if target.spot else "price"
    python = Path(program).resolve().parent / "python"
    words = [python, "-c", _PRICE, target.gpu, str(target.gpus_per_node or 0), kind, cloud, region]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        return float(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UserError(f"no {kind} of {target.gpu} in SkyPilot's catalogue: {said}; give --price-per-hour") from None


def render(job: Job, target: Skypilot) -> str:
    """The file that sky takes."""
    recovery = {"max_restarts_on_errors": target.retries, "recover_on_exit_codes": [EXIT_PREEMPTED]}
    resources: dict[str, Any] = {
        "infra": target.infra,
        "accelerators": f"{target.gpu}:{target.gpus_per_node}" if target.gpus_per_node else None,
        "cpus": target.cpus,
        "memory": target.memory,
        "use_spot": target.spot,
        "disk_size": target.disk_size,
        "job_recovery": recovery,
    }
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": target.nodes,
        "resources": {key: value for key, value in resources.items() if value is not None},
        "workdir": ".",
    }
    task |= {"envs": dict(target.environment)} if target.environment else {}
    task |= {"secrets": dict.fromkeys(target.secrets)} if target.secrets else {}
    task |= {"setup": "set -e\n" + "".join(f"{line}\n" for line in target.setup)} if target.setup else {}
    task |= {"run": f"exec {wrapped(job.node_command(target))}\n"}
    given = "".join(f" --secret {name}" for name in target.secrets)
    return f"# {job.command}\n# sky jobs launch{given} FILE\n" + yaml_text(task)

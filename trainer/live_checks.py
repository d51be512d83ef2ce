"""Live checks: the world, the engine and the precision that the libraries made are those that were asked for.

accelerate and DeepSpeed replace what they cannot do without an error: plain DDP for FSDP, one process for many, one
precision for another. Each of them trains something that was not asked for.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from launch.config import RunConfig
from launch.errors import UserError
from launch.world import World, engine_asked_for

_ON_CPU = "allowed on a CPU: configs/accelerate/single.yaml or cpu.yaml"


def check_backend() -> None:
    """Raise UserError for FSDP1, and where accelerate would leave the engine out. Before the arguments exist.

    Without an accelerator it trains plain DDP or one process for FSDP, and DeepSpeed first compiles for minutes.
    """
    prepare: Any = PartialState._prepare_backend  # what the next `Accelerator` of this process does
    asked, version = engine_asked_for(), os.environ.get("FSDP_VERSION", "1")
    if asked == "FSDP" and version != "2":
        raise UserError(f"fsdp_config.fsdp_version: got {version}, allowed: 2, as in configs/accelerate/fsdp2.yaml")
    if asked and prepare(None, False, False, None)[0] is None:
        raise UserError(f"engine: got {asked} on a machine without a GPU, where accelerate leaves it out; {_ON_CPU}")


def check_live(args: Any, world: World, config: RunConfig, facts: list[dict[str, Any]]) -> None:
    """Raise UserError for a world that is not what was started, and for ranks that differ. All ranks must call."""
    got = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if got != world.world_size:
        raise UserError(
            f"world size: the launcher started {world.world_size} processes, but they formed a group of {got}; "
            "start with accelerate launch --config_file configs/accelerate/cpu.yaml (CPU) or ddp.yaml (GPU)"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"devices: one process sees {args.n_gpu} GPUs and would train DataParallel, which is another loss; "
            "start one process per GPU: accelerate launch --config_file configs/accelerate/ddp.yaml train.py RUN.yaml"
        )
    if config.train.precision == "fp16" and args.device.type == "cpu":
        raise UserError(
            "train.precision: got fp16 on a CPU, where accelerate silently computes fp32; allowed here: fp32, bf16"
        )
    if got > 1:
        fingerprints = [f["fingerprint"] for f in facts]
        mine = hashlib.sha256(json.dumps([config.model_dump(mode="json"), fingerprints]).encode()).hexdigest()
        others: list[Any] = [None] * got
        torch.distributed.all_gather_object(others, mine)
        if odd := [str(rank) for rank, other in enumerate(others) if other != others[0]]:
            raise UserError(
                f"rank {', '.join(odd)}: another config or other rows than rank 0; every node needs the same run file "
                "and the same data"
            )


def check_shared_folder(run_dir: Path, world: World) -> None:
    """Raise UserError where a node does not see the run folder of rank 0. All ranks must call."""
    if world.nodes == 1:
        return
    mark: list[Any] = [f".seen-{uuid.uuid4().hex}"]
    torch.distributed.broadcast_object_list(mark)
    mine = run_dir / mark[0]
    if world.rank == 0:
        mine.touch()
    seen: list[Any] = [None] * world.world_size
    torch.distributed.barrier()
    torch.distributed.all_gather_object(seen, mine.exists())
    if world.rank == 0:
        mine.unlink()
    if not all(seen):
        raise UserError(
            f"train.run_dir: rank {seen.index(False)} does not see what rank 0 writes in {run_dir}, and each writes a "
            "part of a checkpoint; allowed: a folder that all nodes share, or the exact step under DDP"
        )


def check_precision(config: RunConfig) -> None:
    """Raise UserError where the launcher asks for another precision than the run file. Before the arguments exist."""
    asked = {"no": "fp32"}.get(word := os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), word)
    if asked not in ("fp32", config.train.precision):
        raise UserError(
            f"precision: the launcher asks for {asked}, the run file for {config.train.precision}; "
            f"set train.precision={asked} or launch with --mixed_precision no"
        )


def check_engine(accelerator: Accelerator, config: RunConfig) -> None:
    """Raise UserError where the engine is not the one of the launcher's file, or trains otherwise than the run file."""
    asked, got = engine_asked_for(), accelerator.distributed_type
    if asked and got != DistributedType(asked):
        raise UserError(f"engine: the launcher's file asks for {asked}, accelerate made {got.value}; {_ON_CPU}")
    if asked == "DEEPSPEED":
        settings: dict[str, Any] = getattr(accelerator.state.deepspeed_plugin, "deepspeed_config", {})
        stage = settings.get("zero_optimization", {}).get("stage", 0)
        if stage not in (1, 2, 3):
            raise UserError(
                f"zero_optimization.stage: got {stage}, allowed: 1, 2, 3; stage 0 is configs/accelerate/ddp.yaml"
            )
        for key in ("optimizer", "scheduler"):
            if key in settings:
                raise UserError(f"DeepSpeed's file: got {key}, which would replace the run file's; take it out")
        train = config.train
        decided = {  # "auto" has become the run file's value by now; what is not there has DeepSpeed's default
            "gradient_accumulation_steps": (settings.get("gradient_accumulation_steps", 1), 1),
            "gradient_clipping": (settings.get("gradient_clipping", 1.0), train.max_grad_norm or 0.0),
            "bf16.enabled": (settings.get("bf16", {}).get("enabled", False), train.precision == "bf16"),
            "fp16.enabled": (settings.get("fp16", {}).get("enabled", False), train.precision == "fp16"),
        }
        sums = settings.get("data_types", {}).get("grad_accum_dtype")
        if train.precision != "fp32" and sums != "fp32":
            raise UserError(
                f"DeepSpeed's file: got data_types.grad_accum_dtype {sums}, which adds the gradients of micro-batches "
                f'up in {train.precision}; write "data_types": {{"grad_accum_dtype": "fp32"}}'
            )
        for key, (value, own) in decided.items():
            if value != own:
                raise UserError(f'DeepSpeed\'s file: got {key} {value}, the run file says {own}; write "auto" there')
    if asked and not config.loss.is_exact and config.loss.name.startswith("Cached"):
        raise UserError(
            f"loss.name: got {config.loss.name} in sentence-transformers' own code, which is wrong or fails under "
            f"{asked}; allowed there: loss.step=exact, or a launcher's file of DDP"
        )

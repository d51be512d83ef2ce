"""Any model under any engine, on CPUs (gloo) and GPUs (NCCL) alike, and what the engine holds of it as whole vectors.

Precision is what accelerate makes of `mixed_precision`: fp32 without TF32, or bf16 and fp16 as autocast around the
forward (one process, DDP), with FSDP2's policy and our change of it beside it, or as DeepSpeed's low weights over fp32
masters. fp16 has a scaler, which DeepSpeed brings itself.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import device
from trainer.weights import name_layers

ROOT = Path(__file__).parent.parent
Precision = Literal["fp32", "bf16", "fp16"]
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
ONE_MODE = ("single", "ddp")  # what knows no lean mode
_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, _NO_GPU])]


def ranks_of(name: str, backend: str, on_cpu: int = 2) -> int:
    """Processes that an engine is tested with: as many as there are GPUs, or `on_cpu`."""
    if name == "single":
        return 1
    return on_cpu if backend == "gloo" else torch.cuda.device_count()


def as_torchrun(rank: int) -> None:
    """What DeepSpeed reads of the environment, also where the process group is there."""
    size = str(dist.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_SIZE": size}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def under_autocast(model: nn.Module, precision: Precision) -> None:
    """Put accelerate's autocast, which gives fp32 embeddings, around the model's forward."""
    model.forward = convert_outputs_to_fp32(torch.autocast(device().type, LOW[precision])(model.forward))


def prepared(
    name: str,
    model: nn.Module,
    layers: Iterable[nn.Module],
    learning_rate: float,
    clip: float = 0.0,
    precision: Precision = "fp32",
    scale: int = 10,
) -> Any:
    """`model`, whose weights are fp32, as the engine has it; `layers` are groups of their own. All ranks must call.

    DeepSpeed gets its own SGD with `learning_rate` and clips the gradient's norm at `clip`, 0 = not at all; its scaler
    of fp16 begins with 2^`scale`.
    """
    torch.set_float32_matmul_precision("highest")
    model.to(device())
    if precision in LOW and not name.startswith("zero"):
        under_autocast(model, precision)
    if name == "single":
        return model
    if name == "ddp":
        return DistributedDataParallel(model)
    if name == "fsdp2":
        layers = list(layers)
        low = MixedPrecisionPolicy(*[LOW[precision]] * 3) if precision in LOW else None
        plugin = SimpleNamespace(mixed_precision_policy=low)  # as accelerate makes it
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
        name_layers(plugin, model)  # pyright: ignore[reportArgumentType]
        policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    from tests.cpu_engines import quiet_deepspeed

    quiet_deepspeed(device().type)
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate)
    stage = {"stage": int(name[-1]), "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": stage,
        "gradient_clipping": clip,
    }
    if precision in LOW:
        ours = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
        scaler = {"initial_scale_power": scale, "hysteresis": 1} if precision == "fp16" else {}
        config |= {precision: {"enabled": True, **scaler}, "data_types": ours["data_types"]}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def whole(name: str, model: nn.Module, what: Literal["grad", "weight"]) -> Tensor:
    """Gradients or fp32 weights of all parameters, fp64 on the CPU [parameters]. All ranks must call."""
    parts = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("zero"):
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

            part = safe_get_full_grad(parameter) if what == "grad" else safe_get_full_fp32_param(parameter)
        else:
            part = parameter.grad if what == "grad" else parameter.detach()
        parts.append(part.full_tensor() if isinstance(part, DTensor) else part.clone())
    return flat(parts)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of them, fp64 on the CPU."""
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])


def distance(one: Tensor, other: Tensor, truth: Tensor) -> float:
    """||one - other|| / ||truth||."""
    return float((one - other).norm() / truth.norm())

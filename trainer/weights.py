"""Whole weights out of any engine and into one: what is saved, evaluated and exported has them under plain names."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from launch.errors import UserError
from trainer import collectives


def name_layers(plugin: Any, model: SentenceTransformer) -> None:
    """Tell accelerate's FSDP plugin which layers are groups of their own, unless the launcher's file does, and in mixed
    precision to add gradients up in fp32.

    It asks the model for them, which a SentenceTransformer does not answer: it would gather all weights at once,
    without a word. Raises UserError where the encoder does not name its layers.
    """
    # accelerate takes the last child called Norm-something for a layer norm and shards it; Normalize cannot be.
    setattr(model, "base_model_prefix", "0")  # noqa: B010  (a Module to the type checker)
    if not plugin.transformer_cls_names_to_wrap:
        encoder: Any = model[0]
        names = getattr(getattr(encoder, "auto_model", None), "_no_split_modules", None)
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(names or ()))
    if not plugin.transformer_cls_names_to_wrap:
        raise UserError(
            "fsdp_config.fsdp_transformer_layer_cls_to_wrap: not given, and the encoder does not name its layers; "
            "write the class of a layer there, for example BertLayer"
        )
    _refuse_shared(model, plugin.transformer_cls_names_to_wrap)
    if (policy := plugin.mixed_precision_policy) is not None:
        # accelerate would add gradients up in the precision of the encoder.
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)


def _refuse_shared(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise UserError where a weight is one of two layers, which are groups of their own: FSDP2 shards it twice."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, layer in model.named_modules():
        if type(layer).__name__ in layers:
            inside = Counter(id(p) for module in layer.modules() for p in module.parameters(recurse=False))
            for name, parameter in layer.named_parameters():
                if inside[id(parameter)] < holders[id(parameter)]:
                    raise UserError(
                        f"model.path: {path}.{name} is a weight of another layer too, which FSDP2 cannot hold; "
                        "allowed: configs/accelerate/ddp.yaml, zero1.yaml, zero2.yaml or zero3.yaml"
                    )


def is_sharded(prepared: Any) -> bool:
    """Whether an engine holds weights in shards or in another precision than fp32: FSDP2 and DeepSpeed do."""
    return isinstance(prepared, FSDPModule) or hasattr(prepared, "zero_optimization_stage")


def whole_weights(prepared: Any) -> dict[str, Tensor]:
    """What a sharded engine trains of the model, fp32 on the CPU, on rank 0; elsewhere it may be empty.

    Frozen weights, and buffers in low precision, may be left out: DeepSpeed has them rounded only. All ranks must call,
    between steps. Needs room for all weights in the memory of rank 0's machine.
    """
    if isinstance(prepared, FSDPModule):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model: Any = prepared
        weights: dict[str, Any] = get_model_state_dict(model, options=options)
        return weights
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, value in prepared.module.named_parameters(remove_duplicate=False):
        if value.requires_grad:
            whole: Any = safe_get_full_fp32_param(value)
            if collectives.rank() == 0:
                weights[name] = whole.float().cpu().clone()
    if collectives.rank() == 0:
        names = prepared.module.state_dict().keys()
        rounded = torch.bfloat16, torch.float16
        weights |= {n: b for n, b in prepared.module.named_buffers() if n in names and b.dtype not in rounded}
    return weights


def load_whole(prepared: Any, weights: dict[str, Tensor]) -> None:
    """Put `weights`, whole and on every rank, into an FSDP2 model; what they do not name stays. All ranks must call."""
    set_model_state_dict(prepared, {**weights}, options=StateDictOptions(full_state_dict=True, strict=False))


def spread(model: SentenceTransformer) -> None:
    """Put the weights of rank 0's `model` into every rank's, tensor by tensor. All ranks must call."""
    if collectives.world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def average(model: nn.Module, other: nn.Module, share: float) -> None:
    """Put (1 - share) of `model`'s weights and `share` of `other`'s into `model` (Wortsman et al., 2022, WiSE-FT).

    Both have the same parameters, whole and in fp32; buffers stay the model's own.
    """
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(theirs[name].to(parameter.device), share)

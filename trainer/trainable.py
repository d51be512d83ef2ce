"""Which parameters of a model are trained: all, all but frozen ones, or LoRA adapters beside its frozen layers.

Adapters are peft's, put in by transformers; what is saved, evaluated and exported has them merged, so that nobody else
needs to know them. A checkpoint holds them unmerged too: a run goes on from these.
"""

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel

from launch import config as schema
from launch.errors import UserError
from launch.reader import did_you_mean
from trainer.model import freeze_unused

ADAPTERS = "lora.safetensors"


def choose_trained(model: SentenceTransformer, settings: schema.Model, seed: int) -> list[str]:
    """Freeze what no embedding depends on and what `settings` says, add its adapters; returns the names of the former.

    Raises UserError as `freeze` and `add_adapters`.
    """
    unused = freeze_unused(model)
    if settings.freeze:
        freeze(model, settings.freeze)
    if settings.lora:
        add_adapters(model, settings.lora, seed)
    return unused


def freeze(model: SentenceTransformer, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names hold one of `patterns` as whole dotted parts.

    Raises UserError for a pattern that fits no parameter, and where nothing is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [parameter for name, parameter in named if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
        if not found:
            close = did_you_mean(pattern, sorted({part for name, _ in named for part in name.split(".")}))
            raise UserError(
                f"model.freeze: got {pattern!r}, which fits no parameter; allowed: whole dotted parts of their names, "
                f"such as {named[-1][0]}{close}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise UserError(f"model.freeze: got {', '.join(patterns)}, which leaves nothing to train; leave some of it out")


def add_adapters(model: SentenceTransformer, settings: schema.Lora, seed: int) -> None:
    """Freeze all of `model` and put fp32 adapters beside its linear layers, drawn from `seed`: alike on every rank.

    Raises UserError where the encoder has no such layers.
    """
    from peft import LoraConfig

    encoder = getattr(model[0], "auto_model", None)
    if not isinstance(encoder, PreTrainedModel):
        raise UserError(
            f"model.lora: got a {type(model[0]).__name__}; allowed: a model whose first module is a transformer"
        )
    # BERT's pooler is a linear layer that no embedding depends on.
    modules = encoder.named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear) and "pooler" not in name.split(".")]
    targets = settings.target_modules or linear
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"model.lora.target_modules: got {target!r}, which no linear layer is called; allowed: "
                f"{', '.join(known)}, or longer ends of their names{did_you_mean(target, known)}"
            )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  (divided by the rank, nothing else)
                lora_dropout=settings.dropout,
                target_modules=[name for name in linear if any(f".{name}".endswith(f".{t}") for t in targets)],
            )
        )


def merged(model: SentenceTransformer) -> SentenceTransformer:
    """`model` itself, or where it has adapters a copy whose plain layers hold them. No collective."""
    if not getattr(getattr(model[0], "auto_model", None), "_hf_peft_config_loaded", False):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = copy.deepcopy(model)
    encoder: Any = whole[0].auto_model
    for name, module in list(encoder.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            encoder.set_submodule(name, module.get_base_layer())
    del encoder.peft_config
    encoder._hf_peft_config_loaded = False
    return whole


def save_adapters(model: SentenceTransformer, folder: Path) -> None:
    """Write the adapters of `model`, unmerged, into `folder`; nothing where it has none."""
    if adapters := {name: value.contiguous() for name, value in model.state_dict().items() if ".lora_" in name}:
        save_file(adapters, folder / ADAPTERS)


def read_adapters(folder: Path) -> dict[str, Tensor]:
    """What `save_adapters` wrote, on the CPU."""
    return load_file(folder / ADAPTERS)

"""The model of a run: loaded from a folder, a hub name or an installed package, with what the run file overrides.

Roles have names throughout: `query` is what an anchor is, `document` what positives and negatives are.
"""

import json
import logging
import os
import warnings
from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import is_sentence_transformer_model
from transformers.utils import logging as transformers_logging

from launch import config as schema
from launch.errors import UserError
from launch.preflight import resolve_model_path

Role = Literal["query", "document"]
ROLES: tuple[Role, Role] = ("query", "document")
_UNLIMITED = 1 << 20  # tokens; a tokenizer without a limit of its own says 10^30


def load_model(settings: schema.Model, device: str) -> SentenceTransformer:
    """The model in fp32 on `device`, prompts and maximal lengths set as `settings` says.

    Raises UserError if the weights cannot be found or read, or if an override does not fit the model.
    """
    path = resolve_model_path(settings.path)
    model_kwargs: dict[str, Any] = {"dtype": "float32"}
    if settings.attention:
        model_kwargs["attn_implementation"] = settings.attention
    try:
        model = SentenceTransformer(
            path,
            device=device,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            model_kwargs=model_kwargs,
        )
        if settings.pooling is not None and not is_sentence_transformer_model(path, revision=settings.revision):
            # Bare weights get mean pooling from the library; the run file names another.
            encoder: Any = model[0]
            width = encoder.get_embedding_dimension()
            model = SentenceTransformer(modules=[encoder, Pooling(width, settings.pooling), Normalize()], device=device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path: cannot load {settings.path!r}: {reason}") from error
    if settings.pooling is not None and _pooling(model) != settings.pooling:
        raise UserError(
            f"model.pooling: {settings.path!r} comes with pooling {_pooling(model)!r}, got {settings.pooling!r}; "
            f"leave it out to keep the model's own"
        )
    _set_lengths(model, settings)
    for role in ROLES:
        if (prompt := getattr(settings.prompts, role)) is not None:
            model.prompts[role] = prompt
    if settings.dropout is not None:
        _set_dropout(model, settings.dropout)
    return model


def prompt_of(model: SentenceTransformer, role: Role) -> str | None:
    """Text that goes before every input of this role, None if the model has none.

    The same choice as sentence-transformers' `encode_query` and `encode_document`: a document may also be called
    passage or corpus, and a model may name a default.
    """
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    found = [model.prompts[name] for name in (*names, model.default_prompt_name) if name in model.prompts]
    return found[0] or None if found else None


def max_length_of(model: SentenceTransformer, role: Role) -> int | None:
    """Longest input of this role in tokens, special tokens and prompt included; None = unlimited."""
    length = getattr(model[0], f"{role}_length", None) or model.max_seq_length
    return length if length and length < _UNLIMITED else None


def tokenizer_settings(model: SentenceTransformer) -> Any:
    """What decides how a text is cut into tokens, as a JSON value, but for the maximal lengths and the side of a cut.

    Truncation and padding in the tokenizer itself are left from its last call.
    """
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None} if backend else repr(model.tokenizer)


def freeze_unused(model: SentenceTransformer) -> list[str]:
    """Freeze parameters that no embedding depends on, and return their names.

    BERT's pooler head never gets a gradient: DDP with `find_unused_parameters=False` would wait for it for
    ever, and FSDP2 cannot load an optimiser that has no state for it.
    """
    frozen = []
    for name, parameter in model.named_parameters():
        if ".pooler." in name and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def position_limit(model: SentenceTransformer) -> int | None:
    """Longest input in tokens that the encoder has positions for; None if its config names none."""
    encoder: Any = model[0]
    positions = getattr(encoder.auto_model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 2:
        return None
    # RoBERTa's family counts positions from padding_idx + 1, so its table holds that many fewer.
    offsets = [getattr(getattr(m, "position_embeddings", None), "padding_idx", None) for m in encoder.modules()]
    return positions - max((offset + 1 for offset in offsets if isinstance(offset, int)), default=0)


def _pooling(model: SentenceTransformer) -> str:
    for module in model:
        if isinstance(module, Pooling):
            mode = module.pooling_mode
            return mode if isinstance(mode, str) else "+".join(mode)
    return "none"


def _set_lengths(model: SentenceTransformer, settings: schema.Model) -> None:
    positions = position_limit(model)
    for key in ("max_seq_length", "max_query_length"):
        length = getattr(settings, key)
        if length is not None and positions is not None and length > positions:
            raise UserError(
                f"model.{key}: got {length}, the model has {positions} positions; allowed: 2 to {positions}"
            )
    if settings.max_seq_length is not None:
        model.max_seq_length = settings.max_seq_length
    if settings.max_query_length is not None:
        if model.max_seq_length and settings.max_query_length > model.max_seq_length:
            raise UserError(
                f"model.max_query_length: got {settings.max_query_length}, allowed: up to the maximal length "
                f"{model.max_seq_length}; set model.max_seq_length too"
            )
        setattr(model[0], "query_length", settings.max_query_length)  # noqa: B010  (a Module to the type checker)


def _set_dropout(model: SentenceTransformer, probability: float) -> None:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        # Attention modules of transformers read the probability from an attribute at each call.
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
    config = getattr(model[0], "auto_model", None)
    config = getattr(config, "config", None)
    for name in vars(config) if config is not None else ():
        if name.endswith(("dropout", "dropout_prob")) and isinstance(getattr(config, name), int | float):
            setattr(config, name, probability)


def describe(model: SentenceTransformer) -> dict[str, Any]:
    """Width, lengths, prompts and size of the model, for run.json and the log."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "width": model.get_embedding_dimension(),
        "pooling": _pooling(model),
        "max_length": {role: max_length_of(model, role) for role in ROLES},
        "prompts": json.loads(json.dumps(model.prompts)),
    }


def quiet_libraries() -> None:
    """Keep the libraries' hints and bars out of the log; nestling prints its own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="nestling: %(message)s")
    # What one library calls in another by its older name is not the user's to mend.
    for message in ("`broadcast_buffers` is deprecated", ".*gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)

"""The whole embedding pipeline as one ONNX graph: encoder, pooling, dense layers, L2 normalisation.

The graph is exported from an fp32 copy, so the model that is handed in keeps its weights, dtype and mode; the copy has
eager attention meanwhile. Stack traces that the exporter writes into every node are taken out again:
they hold paths of the machine and make two exports of one model differ.
"""

import copy
import inspect
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)
from torch.nn.functional import normalize

from launch.errors import UserError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("token_embeddings", "sentence_embedding")
# Protobuf cannot hold 2 GiB; 64 MiB are left for the graph itself.
EXTERNAL_ABOVE = 2**31 - 2**26


def export_onnx(model: SentenceTransformer, path: Path, opset: int, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write `model`, which pipeline_copy made, to `path` as ONNX.

    Weights of more than `external_above` bytes go beside it (`<name>_data`).
    Inputs are int64 [batch, sequence]: input_ids, attention_mask and, where tokenizer and encoder know them,
    token_type_ids. Outputs are float32: token_embeddings [batch, sequence, hidden], then sentence_embedding
    [batch, width], always of length 1. Raises UserError if a module cannot be exported.
    """
    import onnx_ir

    encoder: Any = model[0]
    attention = encoder.auto_model.config._attn_implementation
    encoder.auto_model.set_attn_implementation("eager")
    features = model.preprocess(["one", "a text with a few more words"])
    names = input_names(model)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                _Graph(model).eval(),
                kwargs={name: features[name] for name in names},
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=list(OUTPUTS),
                dynamic_shapes={name: {0: batch, 1: sequence} for name in names},
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever the model's own code raised
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        name = type(encoder.auto_model).__name__
        raise UserError(f"export: {name} cannot be exported to ONNX opset {opset}: {reason}") from error
    finally:
        encoder.auto_model.set_attn_implementation(attention)
    assert program is not None
    graph = program.model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    program.model.metadata_props.clear()
    size = sum(tensor.nbytes for value in graph.initializers.values() if (tensor := value.const_value))
    external = f"{path.name}_data" if size > external_above else None
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(program.model, path, external_data=external)


def check_exportable(model: SentenceTransformer) -> None:
    """Raise UserError, naming the module, if a module of the pipeline has no place in the graph."""
    encoder = model[0]
    if not isinstance(encoder, Transformer):
        raise UserError(f"export: module 0 is {type(encoder).__name__}, allowed: Transformer")
    if set(encoder.modality_config) != {"text"} or encoder.modality_config["text"]["method"] != "forward":
        raise UserError(
            f"export: module 0 (Transformer) takes {', '.join(map(str, encoder.modality_config))}, allowed: plain text"
        )
    if encoder.query_expansion is not None:
        raise UserError("export: module 0 (Transformer) expands queries, allowed: query_expansion null")
    if getattr(encoder.auto_model, "_hf_peft_config_loaded", False) or hasattr(encoder.auto_model, "peft_config"):
        raise UserError("export: module 0 (Transformer) holds an adapter; merge it into the weights first")
    if encoder.tokenizer is None or not encoder.tokenizer.is_fast:
        raise UserError("export: the tokenizer has no tokenizer.json form, allowed: fast tokenizers")
    for index, module in enumerate(list(model)[1:], start=1):
        if not isinstance(module, Pooling | Dense | LayerNorm | Normalize | Dropout):
            raise UserError(
                f"export: module {index} is {type(module).__name__}, "
                "allowed after the Transformer: Pooling, Dense, LayerNorm, Normalize, Dropout"
            )
        if isinstance(module, Pooling) and not module.include_prompt:
            raise UserError(
                f"export: module {index} (Pooling) leaves the prompt out, which the graph's inputs "
                "cannot say; got include_prompt false, allowed: true"
            )
    if not any(isinstance(module, Pooling) for module in model):
        raise UserError("export: the model has no Pooling module, so there is no sentence embedding")


def pipeline_copy(model: SentenceTransformer) -> SentenceTransformer:
    """A copy of the pipeline in fp32 on the CPU, in eval mode; prompts and lengths as in `model`."""
    modules = [copy.deepcopy(module).to(device="cpu", dtype=torch.float32) for module in model]
    twin = SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts={name: prompt or "" for name, prompt in model.prompts.items()},
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    return twin.eval()


def input_names(model: SentenceTransformer) -> list[str]:
    """The graph's inputs: what the tokenizer makes and the encoder takes, in the order of INPUTS."""
    features = model.preprocess(["one"])
    encoder: Any = model[0]
    taken = inspect.signature(encoder.auto_model.forward).parameters
    return [name for name in INPUTS if name in features and name in taken]


class _Graph(torch.nn.Module):
    """The modules of a SentenceTransformer with tensors instead of a feature dict at both ends."""

    def __init__(self, pipeline: SentenceTransformer) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(pipeline)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        for step in self.steps:
            features = step(features)
        return features["token_embeddings"], normalize(features["sentence_embedding"], p=2.0, dim=-1)


@contextmanager
def _quiet() -> Any:
    """Silence the exporter's remarks on operators and axis names, none of which a user can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

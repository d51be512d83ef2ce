"""A bundle as the model repository of NVIDIA Triton: `nestling export BUNDLE --layout triton --out DIR`.

`tritonserver --model-repository=DIR` then serves one model per precision of the bundle, DIR_fp32 and so on. Triton
takes tokens: the client needs the bundle's tokenizer.json and manifest.json (docs/consumers.md).
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import UserError
from launch.files import new_folder
from trainer.export.publish import require_whole

if TYPE_CHECKING:
    import onnx

MAX_BATCH = 64  # texts of one forward pass; Triton refuses larger requests and joins smaller ones up to it
# The backend computes and copies every output that is listed, asked for or not: token embeddings are left out.
OUTPUT = "sentence_embedding"


def write_triton(bundle: Path, out: Path) -> None:
    """Write the new folder `out`: `<out>_<precision>/config.pbtxt` and `1/model.onnx` for every ONNX file of `bundle`.

    Raises CheckFailed for a bundle that does not verify and UserError if `out` exists; then nothing is left behind.
    """
    manifest = require_whole(bundle)
    try:
        with new_folder(out.absolute()) as partial:
            for precision, file in manifest["onnx"].items():
                _write_model(
                    partial / f"{out.absolute().name}_{precision}", bundle / file, manifest["model_fingerprint"]
                )
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None


def _write_model(folder: Path, source: Path, fingerprint: str) -> None:
    import onnx

    graph = onnx.load(source, load_external_data=False).graph
    beside = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    # A model of several files is a folder that is called as the one file would be.
    version = folder / "1" / ("model.onnx" if beside else "")
    version.mkdir(parents=True)
    shutil.copyfile(source, version / "model.onnx")
    for location in beside:
        shutil.copyfile(source.parent / location, version / location)
    (folder / "config.pbtxt").write_text(_config(folder.name, graph, fingerprint), encoding="utf-8")


def _config(name: str, graph: "onnx.GraphProto", fingerprint: str) -> str:
    """Triton's ModelConfig as protobuf text."""
    outputs = [value for value in graph.output if value.name == OUTPUT]
    lines = [
        f"name: {json.dumps(name, ensure_ascii=False)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH}",
        *(f"input {{ {_tensor(value)} }}" for value in graph.input),
        *(f"output {{ {_tensor(value)} }}" for value in outputs),
        "dynamic_batching { }",
        f'parameters {{ key: "model_fingerprint" value {{ string_value: "{fingerprint}" }} }}',
    ]
    return "\n".join(lines) + "\n"


def _tensor(value: "onnx.ValueInfoProto") -> str:
    """Name, type and dims of a graph's input or output without its first axis, which is Triton's batch."""
    from onnx import TensorProto

    types = {"INT64": "TYPE_INT64", "FLOAT": "TYPE_FP32"}
    tensor = value.type.tensor_type
    dims = [axis.dim_value or -1 for axis in tensor.shape.dim[1:]]  # a named axis has any size
    return f'name: "{value.name}" data_type: {types[TensorProto.DataType.Name(tensor.elem_type)]} dims: {dims}'

"""The smaller ONNX files of a bundle, made from its fp32 graph: half precision; what memory each file takes."""

import subprocess
import sys
from pathlib import Path

import onnx

from trainer.export.onnx import EXTERNAL_ABOVE, OUTPUTS

_NEED = r"""
import re, sys
from trainer.export.encoder import Encoder
encoder = Encoder(sys.argv[1], threads=1, precision=sys.argv[2])
longest = max(encoder.max_length.values())
encoder.encode(["word " * longest] * (8192 // longest + 1))
with open("/proc/self/status") as file:  # what getrusage says includes the process that started this one
    print(re.search(r"VmHWM:\s+(\d+)", file.read())[1])
"""
# RMSNorm as the exporter writes it: squares of hidden states in the hundreds leave the range of fp16 (65,504).
_SQUARES = ["Pow", "ReduceMean", "Sqrt", "Reciprocal"]


def write_fp16(source: Path, target: Path) -> None:
    """Write the graph `source` with an encoder in fp16; inputs stay int64, outputs float32.

    Squares of RMSNorm and all after the token embeddings stay fp32: they would overflow, and cost next to nothing.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(source)
    encoder = ancestors(model.graph, OUTPUTS[0])
    means = {node.output[0] for node in model.graph.node if node.op_type == "ReduceMean"}
    blocked = [node.name for node in model.graph.node if node.name not in encoder or means & {*node.input}]
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=DEFAULT_OP_BLOCK_LIST + _SQUARES,
        node_block_list=blocked,
    )
    # Between two nodes in fp32 the converter goes down to fp16 and up again.
    down = {name for node in half.graph.node for name in node.output if name.endswith("_cast_to_fp16")}
    for node in half.graph.node:
        for place, name in enumerate(node.input):
            if (direct := name.removesuffix("_cast_to_fp32") + "_cast_to_fp16") in down and name.endswith("_fp32"):
                node.input[place] = direct
    save(half, target)


def memory_mib(folder: Path, precision: str) -> int | None:
    """Peak memory in MiB of a process of one thread that embeds a batch of 8,192 tokens of the longest texts with this
    file, Python and onnxruntime included; None where the system does not tell (only Linux does)."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-c", _NEED, str(folder.absolute()), precision]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return -(-int(told.stdout) // 1024)


def ancestors(graph: onnx.GraphProto, value: str) -> set[str]:
    """Names of the nodes that `value` is computed from."""
    producer = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    waiting = [value]
    while waiting:
        node = producer.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting += node.input
    return found


def save(model: onnx.ModelProto, path: Path, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a graph; weights of more than `external_above` bytes go beside it (`<name>_data`)."""
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > external_above
    location = {"save_as_external_data": True, "location": f"{path.name}_data"} if external else {}
    onnx.save(model, path, **location)

"""Model FLOP/s utilisation: the share of a device's peak that the model's own arithmetic takes.

Counted are forward and backward over real tokens; what is padding or computed again counts as lost time.
"""

import re

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

# Dense peak in TFLOP/s by the device's name, from the makers' data sheets; the first that fits counts.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"H[12]00.* NVL", {"bf16": 835, "fp16": 835, "fp32": 60}),
    (r"H200", {"bf16": 989, "fp16": 989, "fp32": 67}),
    (r"H100.* PCIe", {"bf16": 756, "fp16": 756, "fp32": 51}),
    (r"H100", {"bf16": 989, "fp16": 989, "fp32": 67}),
    (r"A100", {"bf16": 312, "fp16": 312, "fp32": 19.5}),
    (r"L40S", {"bf16": 362, "fp16": 362, "fp32": 91.6}),
    (r"L4", {"bf16": 121, "fp16": 121, "fp32": 30.3}),
    (r"A10", {"bf16": 125, "fp16": 125, "fp32": 31.2}),
    (r"RTX 4090", {"bf16": 165.2, "fp16": 165.2, "fp32": 82.6}),
    (r"V100", {"fp16": 125, "fp32": 15.7}),
    (r"T4", {"fp16": 65, "fp32": 8.1}),
)


def peak(name: str, precision: str) -> float | None:
    """Dense FLOP/s of a CUDA device in bf16, fp16 or fp32 (without TF32); None where it is not known."""
    known = (by_precision for word, by_precision in _PEAKS if re.search(rf"\b{word}\b", name))
    value = next(known, {}).get(precision)
    return None if value is None else value * 1e12


def of_training(model: SentenceTransformer) -> tuple[float, float] | None:
    """FLOPs of forward and backward for each token, and for each squared length of a text; None if unknown.

    2 in the forward pass for each parameter but embeddings, 2 for its gradient where it is trained, 2 for that of its
    input from the first trained one on; attention takes 4 * layers * width and twice that in the backward pass (Kaplan
    et al., 2020: 6 and 12 where all is trained). Its width is heads * head_dim where the config has one
    (Qwen3-Embedding-0.6B: twice its hidden size). What a causal mask hides counts too.
    """
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if layers is None or width is None:
        return None
    if head := getattr(config, "head_dim", None):
        width = head * getattr(config, "num_attention_heads", width // head)
    tables = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    used = [p for name, p in model.named_parameters() if p not in tables and ".pooler." not in name]
    trained = sum(p.numel() for p in used if p.requires_grad)
    total = sum(p.numel() for p in used)
    # The embeddings come first: where they are trained every layer's input needs its gradient.
    first = 0 if any(p.requires_grad for p in tables) else next((i for i, p in enumerate(used) if p.requires_grad), 0)
    reached = sum(p.numel() for p in used[first:])
    return 2.0 * (total + trained + reached), 4.0 * layers * width * (1 + 2 * reached / total)


def device_peak(device: torch.device, precision: str) -> float | None:
    """`peak` of this process's device; None on a CPU."""
    return peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None

"""FLOPs of training against torch's own counter, peaks by device name: `python -m pytest tests/test_flops.py`."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode

from trainer.flops import device_peak, of_training, peak
from trainer.model import freeze_unused


@pytest.mark.parametrize("words", [3, 200])
def test_flops_of_forward_and_backward_are_those_that_torch_counts(minilm: SentenceTransformer, words: int) -> None:
    freeze_unused(minilm)
    minilm[0].auto_model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    features = minilm.preprocess(["word " * words] * 4)
    texts, length = features["input_ids"].shape
    assert features["attention_mask"].all() and length == words + 2
    with FlopCounterMode(display=False) as counted:
        minilm(features)["sentence_embedding"].sum().backward()
    known = of_training(minilm)
    assert known is not None
    ours = known[0] * texts * length + known[1] * texts * length**2
    # The first layer's input needs no gradient but its weights do; norms and biases are counted as multiplied.
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp16", 65),
        ("A card of next year", "bf16", None),
    ],
)
def test_peaks_by_device_name(name: str, precision: str, teraflops: float | None) -> None:
    assert peak(name, precision) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_a_cpu_has_no_peak() -> None:
    assert device_peak(torch.device("cpu"), "fp32") is None

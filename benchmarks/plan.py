"""What `nestling plan` predicts of memory and FLOPs, against real steps on the CPU.

    python -m benchmarks.plan [--quick] [--json FILE]

Memory: the resident memory that a step of ours adds to a process that has torch loaded, at its highest, against the
prediction. FLOPs: those that torch counts over fake tensors against the analytic count of trainer/flops.py.
Sanity: hours that the plan predicts for runs whose hours were published; no claim, since the lengths of their texts
were not.
"""

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, NomicBertConfig

from benchmarks.common import Claim, finish, in_fresh_process, one_thread, options, peak, progress, reset_peak, table
from benchmarks.sides import MINILM, MadeBatch, objective, tiny_model
from launch import config
from launch.preflight import resolve_model_path
from trainer.batching import Plan, make_plan
from trainer.fake import FakeEncoder
from trainer.flops import of_training
from trainer.flops import peak as peak_flops
from trainer.plan import GPUS, flops_of, memory_of, network_of

# Width, layers, vocabulary; MiniLM is the real one.
MODELS = {"small": (256, 4, 8000), "MiniLM": (384, 6, 30522), "wide": (512, 3, 16000)}
# Rows, tokens of a micro-batch, longest text, shares of the width that are dims. The last two were not used while the
# prediction was written.
SETTINGS = (
    (256, 16384, 128, (1.0,)),
    (512, 12288, 96, (1.0, 0.5)),
    (128, 16384, 256, (1.0, 0.5, 0.25)),
    (768, 24576, 64, (1.0,)),
)
QUICK = [("small", 0)]
# Runs with published hours: width, layers, inner width of the model; GPU, GPUs; rows, steps, tokens of a text; hours.
# E5 (Wang et al., 2022, arXiv 2212.03533): "{16; 32; 64} V100 GPUs and {1; 1; 2} days for the {small, base, large}
# models", 20,000 steps of 32,768 pairs of up to 128 tokens, which all texts are taken to have here.
# nomic-embed-text-v1 (Nussbaum et al., 2024, arXiv 2402.01613): one pass over 235M pairs in batches of 16,384, "3 and a
# half days" on 8 H100; texts of up to 2,048 tokens, the upper bound; their mean is not published.
PUBLISHED = {
    "E5 small": ((384, 12, 1536), "v100", 16, 32768, 20000, 128, 24),
    "E5 base": ((768, 12, 3072), "v100", 32, 32768, 20000, 128, 24),
    "E5 large": ((1024, 24, 4096), "v100", 64, 32768, 20000, 128, 48),
    "nomic, 512 tokens": ((768, 12, 3072), "h100", 8, 16384, 235_000_000 // 16384, 512, 84),
    "nomic, 2,048 tokens": ((768, 12, 3072), "h100", 8, 16384, 235_000_000 // 16384, 2048, 84),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and measure every model with every setting."""
    args = options(__doc__).parse_args(argv)
    # Freed blocks of more than a MiB go back to the system at once, so that what is resident is what is held.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    one_thread()
    cases = QUICK if args.quick else [(name, setting) for name in MODELS for setting in range(len(SETTINGS))]
    rows, memory, flops = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, setting in cases:
            place = Path(folder) / name
            _model(name, place)
            measured = in_fresh_process(_measure, name, place, setting)
            path = MINILM if name == "MiniLM" else str(place)
            encoder = FakeEncoder(config.Model(path=path, max_seq_length=256, dropout=0.0))
            plan = _plan(setting)
            dims = _dims(encoder.width, setting)
            predicted = memory_of(encoder, plan, len(dims), device="cpu").peak
            own = of_training(_model(name, place))
            assert own is not None
            lengths = plan.lengths[0].astype(float)
            analytic = float((own[0] * lengths + own[1] * lengths**2).sum())
            counted = flops_of(encoder, plan)[1]
            memory = max(memory, abs(predicted / measured - 1))
            flops = max(flops, abs(counted / analytic - 1))
            rows.append(
                [name, setting + 1, predicted / 2**20, measured / 2**20, predicted / measured, counted / analytic]
            )
            progress(f"{name}, setting {setting + 1}: predicted / measured {predicted / measured:.3f}")
    table(["model", "setting", "predicted MiB", "measured MiB", "ratio", "FLOPs counted / analytic"], rows)
    _sanity([*PUBLISHED][:1] if args.quick else PUBLISHED)
    conditions = (
        f"{len({row[0] for row in rows})} models x {len({row[1] for row in rows})} batch settings, fp32 on a CPU"
    )
    claims = [
        Claim("plan.max_memory_deviation", memory, "share", "lower", None, conditions),
        Claim("plan.max_flops_deviation", flops, "share", "lower", None, conditions),
    ]
    return finish(claims, args)


def _sanity(names: Iterable[str]) -> None:
    """Print what the plan predicts for published runs, on one machine's network, without kept graphs."""
    rows = []
    for name in names:
        (width, layers, inner), gpu, gpus, batch, steps, tokens, hours = PUBLISHED[name]
        with tempfile.TemporaryDirectory() as folder:
            kind: Any = NomicBertConfig if "nomic" in name else BertConfig
            sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
            kind(**sizes, num_attention_heads=width // 64).save_pretrained(folder)
            AutoTokenizer.from_pretrained(resolve_model_path(MINILM)).save_pretrained(folder)
            encoder = FakeEncoder(config.Model(path=folder))
            ids, lengths = np.arange(2 * batch).reshape(batch, 2), np.full((batch, 2), tokens)
            plan = make_plan(ids, ids, lengths, world_size=gpus, micro_batch_tokens=32768, masks=False)
            device, _, speed = GPUS[gpu]
            top = peak_flops(device, "bf16") or peak_flops(device, "fp16") or 1.0
            step = flops_of(encoder, plan)[0] / (0.35 * top) + network_of(encoder, plan, "ddp") / (speed * 1e9)
        rows.append([name, f"{gpus} {device}", tokens, steps * step / 3600, hours, steps * step / 3600 / hours])
    table(["sanity, no claim", "on", "tokens of a text", "predicted hours at 35 %", "published", "ratio"], rows)


def _dims(width: int, setting: int) -> list[int]:
    return [int(width * share) for share in SETTINGS[setting][3]]


def _plan(setting: int) -> Plan:
    rows, tokens, longest, _ = SETTINGS[setting]
    return MadeBatch(rows, 2, longest).plan(1, tokens)


def _model(name: str, folder: Path) -> Any:
    """The model itself, without dropout; made once where it has random weights."""
    if name == "MiniLM":
        from trainer.model import freeze_unused, load_model

        model = load_model(config.Model(path=MINILM, max_seq_length=256), "cpu").eval()
        freeze_unused(model)
        return model
    width, layers, vocabulary = MODELS[name]
    return tiny_model(folder, width, layers, 256, heads=width // 64, vocabulary_size=vocabulary)


def _measure(name: str, folder: Path, setting: int) -> int:
    """Bytes that a second step adds at its highest to what a process holds before it has a model. One process."""
    from trainer.engines import Single
    from trainer.gradcache import GradCache

    rows, _, longest, _ = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as warm:  # what a first step loads is not the step's
        _steps(tiny_model(Path(warm) / "model", 64, 1, 64), MadeBatch(8, 2, 64), 256, [64])
    batch = MadeBatch(rows, 2, longest)
    plan = batch.plan(1, SETTINGS[setting][1])
    before = reset_peak()
    model = _model(name, folder)
    gradcache = GradCache(Single(model), objective(_dims(model.get_embedding_dimension(), setting)), seed=0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for number in range(2):
        if number:
            reset_peak()
        gradcache.step(plan, lambda texts: _features(batch.lengths.ravel()[texts]), number)
        optimiser.step()
        optimiser.zero_grad()
    return peak() - before


def _features(lengths: np.ndarray) -> dict[str, torch.Tensor]:
    """Texts of these lengths in tokens, whatever the model's tokenizer would make of their words."""
    mask = (torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]).long()
    return {"input_ids": 1000 * mask, "attention_mask": mask}


def _steps(model: Any, batch: MadeBatch, tokens: int, dims: list[int]) -> None:
    from trainer.engines import Single
    from trainer.gradcache import GradCache

    gradcache = GradCache(Single(model), objective(dims), seed=0)
    gradcache.step(batch.plan(1, tokens), lambda texts: batch.features(model, texts), 0)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()


if __name__ == "__main__":
    sys.exit(main())

"""`nestling plan RUN.yaml --gpu h100 --gpus 8`: memory, time, network and price of a run, without a GPU or weights.

Activations and FLOPs are those of torch's own fake tensors and counter (trainer/fake.py), micro-batches those of the
run's own plan over lengths of its rows. What an engine holds and sends is arithmetic on the sizes of the parameters.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from data_tools.shards import MANIFEST, read_manifest
from launch.config import EXACT_LOSSES, RunConfig
from launch.errors import UserError, exit_code
from launch.reader import did_you_mean, read_run
from launch.skypilot import price_per_hour
from trainer.batching import OVERHEAD_TOKENS, Plan, make_plan
from trainer.data import data_order, open_sources, steps_of_run, text_columns
from trainer.fake import FakeEncoder, length_of
from trainer.flops import peak
from trainer.infonce import tile_lines
from trainer.model import ROLES, prompt_of
from trainer.sampler import share_out
from trainer.tokens import role_of

GIB = 1 << 30
# Name for trainer/flops.py, memory in GiB, GB/s that one GPU sends to others of its machine; makers' data sheets.
GPUS: dict[str, tuple[str, float, float]] = {
    "h200": ("H200", 141, 450),
    "h100": ("H100", 80, 450),
    "a100": ("A100", 80, 300),
    "a100-40": ("A100", 40, 300),
    "l40s": ("L40S", 48, 32),
    "l4": ("L4", 24, 32),
    "a10": ("A10", 24, 32),
    "rtx4090": ("RTX 4090", 24, 32),
    "v100": ("V100", 32, 150),
    "t4": ("T4", 16, 16),
}
RESERVE = 0.9  # of a GPU's memory; the rest is the driver's, NCCL's and what lies between blocks
# Bytes of optimiser state for each trained parameter.
_STATES = {"sgd": 0, "adafactor": 0, "adamw_bnb_8bit": 2, "lion_32bit": 4, "rmsprop": 4, "adagrad": 4}
_SAMPLE = 2000  # rows whose lengths stand for all
ENGINES = ("ddp", "fsdp2 fast", "fsdp2 lean", "zero1 fast", "zero2 lean", "zero3 lean")


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part. Not all are there at once; `peak` is the highest point of a step."""

    weights: float
    gradients: float
    optimiser: float
    reduction: float  # buffers of the engine
    activations: float  # of the largest micro-batch
    kept_graphs: float
    embeddings: float  # all of the loss stage's, and their gradients
    tile: float
    cached: float  # gradients at this rank's embeddings, over the replay
    update: float  # temporaries of the optimiser

    @property
    def peak(self) -> float:
        """The highest of loss stage, replay and optimiser's step; gradients begin with the replay."""
        loss = self.kept_graphs + self.embeddings + self.tile
        replay = self.kept_graphs + self.gradients + self.reduction + self.activations + self.cached
        return self.weights + self.optimiser + max(loss, replay, self.gradients + self.update)


def memory_of(
    encoder: FakeEncoder,
    plan: Plan,
    dims: int,
    engine: str = "single",
    optim: str = "adamw_torch",
    kept: float = 0.0,
    device: str = "cuda",
) -> Memory:
    """Memory of a rank of `plan`; the whole batch's candidates are scored in tiles of this device's kind."""
    n, (size, trained) = plan.world_size, encoder.sizes
    whole, gradient, group = 4.0 * size, 4.0 * trained, 4.0 * size / encoder.layers
    states = _STATES.get(optim, 8) * float(trained)
    kind, _, mode = engine.partition(" ")
    weights, reduction = whole, 0.0
    if kind == "ddp" and n > 1:
        reduction = gradient  # its buckets are copies
    elif kind in ("fsdp2", "zero3"):
        weights = whole / n + (whole if mode == "fast" else 2 * group)
        reduction, states = group, states / n
    elif kind.startswith("zero"):
        weights, reduction, states = whole + whole / n, group, states / n
    if mode == "lean":
        gradient = gradient / n + group
    width, slots, anchors = 4.0 * encoder.width, len(plan.is_anchor), int(plan.is_anchor.sum())
    candidates = (slots - anchors) * n
    # Embeddings, those sent, both roles in place, the gradients of both: see trainer/infonce.py.
    embeddings = width * (2 * slots + anchors + 2 * candidates)
    lines = min(anchors, tile_lines(candidates, dims, device))
    m = int(plan.padded.max(0).argmax())
    rows, length = int(np.diff(plan.cuts)[m]), int(plan.lengths[:, plan.cuts[m]].max())
    activations = float(encoder.activations(rows, length))
    tile, cached = 4.0 * (dims + 1) * lines * candidates, width * slots
    update = gradient if device == "cuda" else 0.0  # torch updates all parameters at once there, one by one on a CPU
    return Memory(weights, gradient, states, reduction, activations, kept, embeddings, tile, cached, update)


def flops_of(encoder: FakeEncoder, plan: Plan, rank: int = 0) -> tuple[float, float]:
    """FLOPs of a rank's step as it is computed, with padding and the second forward; and those of the model alone."""
    rows, longest = np.diff(plan.cuts), np.maximum.reduceat(plan.lengths[rank], plan.cuts[:-1])
    lengths = plan.lengths[rank].astype(float)

    def count(name: str, weight: Any, length: Any) -> float:
        token, square = encoder.flops[name]
        return float((weight * (token * length + square * length**2)).sum())

    done = count("both", rows, longest.astype(float))
    if len(rows) > 1:  # a batch of one micro-batch runs once
        done += count("forward", rows, longest.astype(float))
    return done, count("both", 1.0, lengths)


def network_of(encoder: FakeEncoder, plan: Plan, engine: str) -> float:
    """Bytes that one GPU sends in a step: the ring's share of gradients, weights and embeddings."""
    n, (size, trained), micro_batches = plan.world_size, encoder.sizes, len(plan.cuts) - 1
    kind, _, mode = engine.partition(" ")
    times = micro_batches if mode == "lean" else 1
    sent = 8.0 * trained if kind == "ddp" else 4.0 * trained * times
    if kind in ("fsdp2", "zero3"):
        sent += 4.0 * size * (3 * micro_batches if mode == "lean" else 1)
    elif kind != "ddp":
        sent += 4.0 * size
    candidates = int((~plan.is_anchor).sum()) * n
    return (n - 1) / n * (sent + 2 * 4.0 * encoder.width * candidates)


def rows_of(config: RunConfig, model: SentenceTransformer) -> tuple[np.ndarray, str, int | None]:
    """Lengths of a sample of rows [rows, columns], where they are from, and the steps of the run, None if unknown.

    Rows are counted as the run counts them: by the manifests of shards; other files are read into `data.cache_dir`,
    where the run finds them. Raises UserError as `data_order`.
    """
    sources, longest = config.data.sources, {role: length_of(model, role) for role in ROLES}
    places = [Path(source.path) for source in sources if source.path and not source.url]
    in_shards = all((place / MANIFEST).is_file() for place in places)
    most = config.data.max_rows
    with tempfile.TemporaryDirectory() as folder:
        cache_dir = Path(folder if in_shards else config.data.cache_dir)
        read = min(_SAMPLE, most or _SAMPLE) if in_shards else most
        try:
            if len(places) < len(sources):
                raise UserError("rows are not on this disk")
            rows, facts = open_sources(sources, cache_dir, read)
        except (UserError, OSError) as error:
            why = str(error).splitlines()[0]
            return np.array([[*longest.values()]]), f"texts of full length ({why})", config.train.max_steps
        here = [fact["rows"] for fact in facts]
        if in_shards:
            whole = [read_manifest(place).rows for place in places]
            facts = [fact | {"rows": min(number, most or number)} for fact, number in zip(facts, whole, strict=True)]
        order = data_order(config, facts)
        # As many of each source as its share of the batches.
        starts, shares, draw = np.cumsum([0, *here]), share_out(_SAMPLE, order.batches), np.random.default_rng(0)
        drawn = [s + np.resize(draw.permutation(n), m) for s, n, m in zip(starts, here, shares, strict=False)]
        sample = rows.select(np.concatenate(drawn))
        lengths = []
        for column in text_columns(sample.column_names):
            role = role_of(column)
            texts = [(prompt_of(model, role) or "") + (text or "") for text in sample[column]]
            ids = model.tokenizer(texts, truncation=True, max_length=longest[role])["input_ids"]
            lengths.append([len(one) for one in ids])
    origin = f"{min(_SAMPLE, sum(here)):,} rows of the data"
    return np.array(lengths).T, origin, steps_of_run(config, order.steps_per_epoch)


def main(argv: Sequence[str]) -> int:
    """Print the plan, or write it as JSON. Raises UserError for an unknown GPU and an engine that cannot fit."""
    parser = argparse.ArgumentParser(prog="nestling plan", description="Memory, time, network and price of a run.")
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpu", required=True, help=", ".join(GPUS))
    parser.add_argument("--gpus", type=int, default=1, help="of all machines together")
    parser.add_argument("--engine", choices=ENGINES, help="one line if it cannot fit (default: all are compared)")
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of the peak FLOP/s (default: 0.35)")
    parser.add_argument("--network", type=float, metavar="GB/s", help="one GPU to others (default: within a machine)")
    parser.add_argument("--price-per-hour", type=float, metavar="PRICE", help="of one GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_intermixed_args(argv)
    config = read_run(given.run_file, given.overrides)
    if given.gpu not in GPUS:
        raise UserError(f"--gpu: got {given.gpu!r}, allowed: {', '.join(GPUS)}{did_you_mean(given.gpu, GPUS)}")
    network, price = 1.0 if given.network is None else given.network, given.price_per_hour or 0.0
    if given.gpus < 1 or not 0 < given.utilisation <= 1 or not 0 < network < math.inf or not 0 <= price < math.inf:
        allowed = "--gpus: allowed: 1 or more; --utilisation: above 0, up to 1; --network: above 0"
        raise UserError(f"{allowed}; --price-per-hour: 0 or more")
    if not config.loss.is_exact:
        raise UserError(
            f"loss: got {config.loss.name} in sentence-transformers' own code, of which plan knows nothing; allowed: "
            f"loss.step=exact, loss.name={' or '.join(EXACT_LOSSES)}"
        )
    found = make(config, given)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def make(config: RunConfig, given: argparse.Namespace) -> dict[str, Any]:
    """The plan of a run as plain values; bytes, seconds and FLOPs are of one GPU."""
    train, (name, gib, speed) = config.train, GPUS[given.gpu]
    room = RESERVE * gib * GIB
    encoder = FakeEncoder(config.model, train.gradient_checkpointing, train.precision == "bf16")
    longest = max(length_of(encoder.model, role) for role in ROLES)
    sample, origin, steps = rows_of(config, encoder.model)
    lengths = np.random.default_rng(0).permutation(np.resize(sample, (train.global_batch_size, sample.shape[1])))
    ids = np.arange(lengths.size).reshape(lengths.shape)
    step = make_plan(
        ids,
        ids,
        lengths,
        world_size=given.gpus,
        micro_batch_tokens=train.micro_batch_tokens,
        overhead_tokens=OVERHEAD_TOKENS["cuda"],
        masks=False,
    )
    dims = len(config.loss.dims or [1])
    done, own = flops_of(encoder, step)
    top = peak(name, train.precision) or peak(name, "fp32") or 0.0
    kept = 0.0 if train.graph_memory == "auto" else train.graph_memory * GIB
    engines = []
    for engine in [given.engine] if given.engine else ENGINES if given.gpus > 1 else ENGINES[:1]:
        memory = memory_of(encoder, step, dims, engine, train.optim, kept)
        least = memory.peak - memory.activations + encoder.activations(1, longest)
        per_token = encoder.activations(16, longest) / (16 * longest)
        tokens = int((room - memory.peak + memory.activations) / per_token)
        if given.engine and least > room:
            raise UserError(
                f"memory: {engine} needs {least / GIB:.1f} GiB for one text of {longest:,} tokens, {given.gpu} has "
                f"{room / GIB:.1f} ({RESERVE:.0%} of it); allowed: another engine, more GPUs, shorter texts"
            )
        sent = network_of(encoder, step, engine) if given.gpus > 1 else 0.0
        sending = sent / ((given.network or speed) * 1e9)
        engines.append(
            {
                "engine": engine,
                "fits": memory.peak <= room,
                "peak": memory.peak,
                "memory": asdict(memory),
                "largest_micro_batch_tokens": max(0, tokens) if least <= room else 0,
                "network_bytes": sent,
                "network_seconds": sending,
                "step_seconds": done / (top * given.utilisation) + sending,
            }
        )
    fitting = [one for one in engines if one["fits"]]
    fastest = min(fitting, key=lambda one: one["step_seconds"], default=None)
    hours = fastest["step_seconds"] * steps / 3600 if fastest and steps else None
    an_hour, currency = price_of(config, given.price_per_hour)
    return {
        "parameters": encoder.sizes[0],
        "trained": encoder.sizes[1],
        "gpu": given.gpu,
        "gpus": given.gpus,
        "lengths": origin,
        "negatives_per_anchor": train.global_batch_size * (lengths.shape[1] - 1) - 1,
        "micro_batches": len(step.cuts) - 1,
        "flops_per_step": done,
        "model_flops_per_step": own,
        "utilisation": given.utilisation,
        "engines": engines,
        "fastest_that_fits": fastest and fastest["engine"],
        "steps": steps,
        "hours": hours,
        "price": hours * an_hour * given.gpus if hours and an_hour is not None else None,
        "price_in": currency,
    }


def price_of(config: RunConfig, given: float | None) -> tuple[float | None, str]:
    """The price of one GPU for an hour, None if it is not known, and its currency or why."""
    target = config.launch and config.launch.skypilot
    if given is not None:
        return given, "in the currency of --price-per-hour"
    try:
        if target and (price := price_per_hour(target)):
            return price, "in US dollars by SkyPilot's catalogue"
    except UserError as error:
        return None, str(error)
    return None, "give --price-per-hour, or launch.skypilot.gpu where SkyPilot is installed"


def _print(found: dict[str, Any]) -> None:
    print(f"model: {found['parameters']:,} parameters, {found['trained']:,} trained; lengths: {found['lengths']}")
    print(
        f"step: {found['micro_batches']:,} micro-batches a GPU, {found['negatives_per_anchor']:,} negatives per anchor "
        f"before masks, {found['flops_per_step'] / 1e12:,.1f} TFLOP a GPU at {found['utilisation']:.0%} of the peak"
    )
    parts = list(found["engines"][0]["memory"])
    print(f"\nGiB of one of {found['gpus']} x {found['gpu']}, and what of it is")
    print("engine      fits   peak  " + "  ".join(f"{part.replace('_', ' '):>11}" for part in parts))
    for one in found["engines"]:
        cells = "  ".join(f"{value / GIB:11.2f}" for value in one["memory"].values())
        print(f"{one['engine']:<10}  {'yes' if one['fits'] else 'no':<4}  {one['peak'] / GIB:5.1f}  {cells}")
    print("\nengine      largest micro_batch_tokens  network MB  network s  step s")
    for one in found["engines"]:
        print(
            f"{one['engine']:<10}  {one['largest_micro_batch_tokens']:26,}  {one['network_bytes'] / 1e6:10,.0f}  "
            f"{one['network_seconds']:9.3f}  {one['step_seconds']:6.2f}"
        )
    print(f"\nfastest that fits: {found['fastest_that_fits'] or 'none; lower train.micro_batch_tokens, see the table'}")
    if found["steps"] is None:
        print("steps, hours and price: unknown while the rows are not on this disk; give train.max_steps")
    if found["hours"] is not None:
        price = "price unknown:" if found["price"] is None else f"{found['price']:,.2f}"
        print(f"{found['steps']:,} steps: {found['hours']:.2f} hours, {price} {found['price_in']}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

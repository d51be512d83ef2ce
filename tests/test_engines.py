"""Every engine against sentence-transformers in one process: `python -m pytest tests/test_engines.py`.

On gloo with CPUs, and with `-m gpu` on NCCL with all GPUs that there are. Truth is ST's own loss in fp64 on the whole
batch and plain SGD; equality in fp32 is 1e-5 of the whole vector. Two gradients in bf16 or fp16 are equal where they
are no further apart than twice what ST's own is off the truth.
"""

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from launch.config import Lora
from launch.errors import UserError
from tests.distributed import Backend, device, run
from tests.engines import (
    BACKENDS,
    ENGINES,
    LOW,
    ONE_MODE,
    Precision,
    as_torchrun,
    distance,
    flat,
    prepared,
    ranks_of,
    under_autocast,
    whole,
)
from tests.test_gradcache import OBJECTIVE, WIDTH, Batch, TinyEncoder, _st_gradient
from trainer.engines import FSDP2, Engine, ZeRO, engine_of
from trainer.gradcache import GradCache, StepAbandoned
from trainer.trainable import add_adapters, freeze
from trainer.weights import name_layers

LEARNING_RATE, STEPS, CLIP = 0.05, 3, 2.0


@dataclass(frozen=True)
class Case:
    """One way to train."""

    mode: str
    columns: int
    checkpointing: bool
    clipping: bool
    kept: int  # graphs
    precision: Precision = "fp32"
    trains: str = "all"  # or "adapters", "upper", "tied tables", "tied layers"


CASES = [Case(*values) for values in itertools.product(("fast", "lean"), (2, 3), (False, True), (False, True), (0, 2))]
# Every pair of values of two settings is in one of these.
PAIRWISE = [
    Case("fast", 2, False, False, 0),
    Case("fast", 3, True, True, 2),
    Case("lean", 2, True, True, 0),
    Case("lean", 3, False, False, 2),
    Case("fast", 2, True, False, 2),
    Case("lean", 3, True, False, 0),
    Case("lean", 2, False, True, 2),
    Case("fast", 3, False, True, 0),
]
IN_LOW = [replace(case, precision=low) for case in (PAIRWISE[1], PAIRWISE[3]) for low in ("bf16", "fp16")]


# Every parameter that is trained, under each mode; what is frozen has no gradient.
PARTS = [Case("fast", 2, True, True, 2, trains="adapters"), Case("lean", 3, False, True, 0, trains="adapters")]
PARTS += [Case("fast", 3, False, True, 2, trains="upper"), Case("lean", 2, True, True, 0, trains="upper")]
TIED = [Case(mode, 2, False, True, 0, trains="tied tables") for mode in ("fast", "lean")]


class WithAdapters(TinyEncoder):
    """With LoRA beside all linear layers, both of an adapter's matrices random: one that is zero has the other no
    gradient."""

    def __init__(self) -> None:
        super().__init__()
        add_adapters(self, Lora(rank=3, alpha=3.0), seed=0)  # pyright: ignore[reportArgumentType]
        for name, weight in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        self.double()

    def __getitem__(self, index: int) -> Any:
        return SimpleNamespace(auto_model=self.bert)

    def add_adapter(self, settings: Any) -> None:
        self.bert.add_adapter(settings)


class UpperHalf(TinyEncoder):
    """With frozen embeddings and a frozen first layer: whole groups of FSDP2 without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        freeze(self, ["embeddings", "layer.0"])  # pyright: ignore[reportArgumentType]


class TiedTables(TinyEncoder):
    """With a second module that has the weight of the word embeddings, in the same group of FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.also = nn.Embedding(60, WIDTH).double()
        self.also.weight = self.bert.embeddings.word_embeddings.weight

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = super().forward(features)["sentence_embedding"]
        return {**features, "sentence_embedding": embedding + self.also(features["input_ids"][:, 0])}


class TiedLayers(TinyEncoder):
    """With a weight that two layers share, which are groups of their own."""

    def __init__(self) -> None:
        super().__init__()
        lower, upper = self.bert.encoder.layer
        upper.intermediate.dense.weight = lower.intermediate.dense.weight  # pyright: ignore[reportAttributeAccessIssue]


MODELS = {
    "all": TinyEncoder,
    "adapters": WithAdapters,
    "upper": UpperHalf,
    "tied tables": TiedTables,
    "tied layers": TiedLayers,
}


def _model(case: Case) -> TinyEncoder:
    return MODELS[case.trains]()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _batches(columns: int, world_size: int) -> list[Batch]:
    # 11 rows, or more where ranks would get too few of them: no world size divides them, and ranks get unequal texts.
    rows = max(11, 3 * world_size - 1)
    return [Batch(rows, columns, max(40, 10 * world_size), seed) for seed in range(STEPS)]


def _truth(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and its norm of the first batch, and the weights' change over all steps."""
    model = _model(case).to(device())
    before = flat(_trained(model))
    first: Any = None
    for batch in _batches(case.columns, dist.get_world_size()):
        gradient = flat([_st_gradient(model, batch, slice(None), gather=False)[1]])
        first = gradient if first is None else first
        if case.clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with torch.no_grad():
            for parameter in _trained(model):
                parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
    return first, first.norm(), flat(_trained(model)) - before


def _in_low_precision(name: str, case: Case) -> Tensor:
    """ST's own gradient of the first batch in bf16 or fp16, as the engine computes: by autocast, or with weights in it.

    fp16 at this size needs no scaler: autocast has the small gradients in fp32, and none is below fp16's smallest."""
    model = TinyEncoder().float().to(device())
    if name.startswith("zero"):
        model.to(LOW[case.precision])
    else:
        under_autocast(model, case.precision)
    batch = _batches(case.columns, dist.get_world_size())[0]
    return flat([_st_gradient(model, batch, slice(None), gather=False)[1]])


def _prepared(name: str, case: Case) -> tuple[Any, nn.Module]:
    """The model as an engine has it, and the module with its parameters."""
    model = _model(case).float()
    if case.checkpointing:
        model.bert.gradient_checkpointing_enable({"use_reentrant": False})
    clip = CLIP if case.clipping else 0.0
    return prepared(name, model, model.bert.encoder.layer, LEARNING_RATE, clip, case.precision), model


def _train(name: str, case: Case) -> dict[str, float]:
    """Errors of gradient, its norm and of the weights' change over all steps, as rank 0 sees them.

    In bf16 and fp16 in units of what ST's own gradient in it is off, and without the weights.
    """
    torch.manual_seed(0)
    wrapper, model = _prepared(name, case)
    before, seen = whole(name, model, "weight"), {}
    scaler = GradScaler(device().type, 2.0**10, enabled=case.precision == "fp16" and not name.startswith("zero"))
    optimizer = torch.optim.SGD(_trained(model))  # for what the scaler keeps
    engine = engine_of(wrapper, lambda loss: scaler.scale(loss).backward(), case.mode)
    assert type(engine).__name__.lower() == name.rstrip("123") or name in ("fsdp2",)
    step_of_deepspeed = getattr(wrapper, "step", None)

    def look_and_step() -> None:
        scale = float(wrapper.optimizer.loss_scale) if case.precision == "fp16" else 1.0  # its step takes it out
        seen.setdefault("gradient", whole(name, model, "grad") / scale)
        step_of_deepspeed()
        seen.setdefault("norm", wrapper.get_global_grad_norm())

    if isinstance(engine, ZeRO):
        wrapper.step = look_and_step
    _leave_a_step(engine, case)
    for number, batch in enumerate(_batches(case.columns, dist.get_world_size())):
        plan = batch.plan(dist.get_world_size(), 24, overhead_tokens=1)
        assert len(plan.cuts) > 4, "too few micro-batches to tell"
        GradCache(engine, OBJECTIVE, seed=1, kept=case.kept).step(plan, batch.features, step=number)
        if isinstance(engine, ZeRO):
            continue
        scaler.unscale_(optimizer)
        seen.setdefault("gradient", whole(name, model, "grad"))
        if case.clipping:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            seen.setdefault("norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        with torch.no_grad():
            for parameter in _trained(model):
                parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                parameter.grad = None
        scaler.update()
    gradient, norm, change = _truth(case)
    if case.precision in LOW:
        theirs = _in_low_precision(name, case)
        off = distance(theirs, gradient, gradient)
        return {
            "theirs": off,
            "apart": distance(seen["gradient"], theirs, gradient) / off,
            "gradient": distance(seen["gradient"], gradient, gradient) / off,
        }
    errors = {
        "gradient": distance(seen["gradient"], gradient, gradient),
        "largest": float((seen["gradient"] - gradient).abs().max() / gradient.abs().max()),
        "weights": distance(whole(name, model, "weight") - before, change, change),
    }
    if case.clipping:
        errors["norm"] = abs(float(seen["norm"]) / float(norm) - 1)
    return errors


def _leave_a_step(engine: Engine, case: Case) -> None:
    """Leave a step: nothing of it may be in the next one, or the engine refuses that."""
    batch, is_sharded = Batch(9, case.columns, 40, seed=9), isinstance(engine, FSDP2 | ZeRO)
    asked = iter([is_sharded, True])  # after pass 1, or before the last replay
    step = GradCache(engine, OBJECTIVE, seed=1, kept=case.kept, stop_asked=lambda: next(asked))
    with pytest.raises(StepAbandoned):
        step.step(batch.plan(dist.get_world_size(), 24, overhead_tokens=1), batch.features, step=0)
    engine.abandon()


def _left_in_its_replays(rank: int, name: str) -> None:
    as_torchrun(rank)
    case = PAIRWISE[0]
    wrapper, _ = _prepared(name, case)
    engine = engine_of(wrapper, lambda loss: loss.backward(), case.mode)
    batch = _batches(case.columns, dist.get_world_size())[0]
    plan, asked = batch.plan(dist.get_world_size(), 24, overhead_tokens=1), iter([False, True])
    with pytest.raises(StepAbandoned):
        GradCache(engine, OBJECTIVE, 1, stop_asked=lambda: next(asked)).step(plan, batch.features, step=0)
    engine.abandon()
    with pytest.raises(RuntimeError, match="left in the middle of a step"):
        GradCache(engine, OBJECTIVE, 1).step(plan, batch.features, step=0)


def _cases(rank: int, name: str, cases: list[Case]) -> list[dict[str, float]]:
    as_torchrun(rank)
    return [_train(name, case) for case in cases]


def _check(name: str, world_size: int, cases: list[Case], backend: Backend = "gloo") -> None:
    cases = [case for case in cases if name not in ONE_MODE or case.mode == "fast"]
    for case, *by_rank in zip(cases, *run(_cases, world_size, name, cases, backend=backend, timeout=900), strict=True):
        for errors in by_rank:
            if case.precision in LOW:
                assert errors["theirs"] < 0.1, (case, errors)  # or the bound would allow anything
                assert max(errors["apart"], errors["gradient"]) <= 2, (case, errors)
            else:
                assert all(error <= 1e-5 for error in errors.values()), (case, errors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENGINES)
def test_gradient_and_steps_are_those_of_one_process(name: str, backend: Backend) -> None:
    few = [*PAIRWISE[:4], *IN_LOW[:2], *PARTS, TIED[0]]
    cases = few if backend == "gloo" else [*PAIRWISE, *IN_LOW, *PARTS, *TIED]
    if name in ("ddp", "zero2"):  # refused under FSDP2, below
        cases.append(Case("fast", 2, False, True, 0, trains="tied layers"))
    _check(name, ranks_of(name, backend), cases, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_an_engine_left_in_its_replays_takes_no_further_step(name: str, backend: Backend) -> None:
    run(_left_in_its_replays, ranks_of(name, backend), name, backend=backend)


def _overflow(rank: int, name: str) -> list[tuple[bool, float]]:
    """After each of two steps, of which the first overflows: whether the weights moved, and the scale."""
    as_torchrun(rank)
    case = replace(PAIRWISE[2], precision="fp16", clipping=False)
    model, is_zero = TinyEncoder().float(), name.startswith("zero")
    wrapper = prepared(name, model, model.bert.encoder.layer, LEARNING_RATE, precision="fp16", scale=11)
    scaler = GradScaler(device().type, 2.0**11, enabled=not is_zero)
    engine = engine_of(wrapper, lambda loss: scaler.scale(loss).backward(), case.mode)
    optimizer, states = torch.optim.SGD(model.parameters(), LEARNING_RATE), []
    for number, batch in enumerate(_batches(case.columns, dist.get_world_size())[:2]):
        before = whole(name, model, "weight")
        plan = batch.plan(dist.get_world_size(), 24, overhead_tokens=1)
        too_far = number == 0 and is_zero and rank == 1
        objective = replace(OBJECTIVE, weights=[1e6 if too_far else w for w in OBJECTIVE.weights])
        GradCache(engine, objective, seed=1).step(plan, batch.features, step=number)
        if not is_zero:
            if number == 0 and rank == 1:  # in this rank's shard alone, or in what the reduction gave it
                gradient: Any = next(p.grad for p in model.parameters() if p.ndim == 2)
                (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scale = wrapper.optimizer.loss_scale if is_zero else scaler.get_scale()
        states.append((not torch.equal(whole(name, model, "weight"), before), float(scale)))
    return states


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fsdp2", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_rank_that_overflows_in_fp16_has_all_of_them_skip_the_step(name: str, backend: Backend) -> None:
    for states in run(_overflow, ranks_of(name, backend), name, backend=backend):
        assert states == [(False, 2.0**10), (True, 2.0**10)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_batches_of_any_number_of_gpus_have_enough_micro_batches(world_size: int) -> None:
    for batch in (*_batches(2, world_size), *_batches(3, world_size)):
        assert len(batch.plan(world_size, 24, overhead_tokens=1).cuts) > 4


def _errors_in_bf16(rank: int, name: str) -> tuple[float, float]:
    """How far our gradient in bf16 is from the one in fp64, and how far sentence-transformers' own is."""
    as_torchrun(rank)
    # Some hundred micro-batches a rank: gradients added up in bf16 would be 1.45 times as far off.
    case, batch, seen = replace(PAIRWISE[0], precision="bf16"), Batch(400, 2, 720, seed=3), []
    wrapper, model = _prepared(name, case)
    engine = engine_of(wrapper, lambda loss: loss.backward(), case.mode)
    if isinstance(engine, ZeRO):
        assert engine.mode == "lean"
        wrapper.step = lambda: seen.append(whole(name, model, "grad"))
    plan = batch.plan(dist.get_world_size(), 26, overhead_tokens=1)
    GradCache(engine, OBJECTIVE, seed=1).step(plan, batch.features, step=0)
    ours = seen[0] if seen else whole(name, model, "grad")
    truth = flat([_st_gradient(_model(case), batch, slice(None), gather=False)[1]])
    with torch.autocast("cpu", torch.bfloat16):
        theirs = flat([_st_gradient(_model(case).float(), batch, slice(None), gather=False)[1]])
    return distance(ours, truth, truth), distance(theirs, truth, truth)


@pytest.mark.parametrize(
    "name", ["fsdp2", "zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero3"))]
)
def test_a_gradient_in_bf16_is_as_near_as_that_of_sentence_transformers(name: str) -> None:
    for ours, theirs in run(_errors_in_bf16, 2, name):
        assert 0.001 < ours <= 1.25 * theirs, (ours, theirs)


def test_a_weight_of_two_layers_is_refused_under_fsdp2() -> None:
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=["BertLayer"], mixed_precision_policy=None)
    name_layers(plugin, TiedTables())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"layer.0.intermediate.dense.weight is a weight of another layer too"):
        name_layers(plugin, TiedLayers())  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ENGINES)
def test_gradient_and_steps_in_every_case(name: str, world_size: int) -> None:
    if name != "single" or world_size == 1:
        _check(name, world_size, [*CASES, *IN_LOW])

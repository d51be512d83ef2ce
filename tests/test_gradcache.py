"""The step's gradient against ST in real processes: `python -m pytest tests/test_gradcache.py`.

Truth is ST's own MatryoshkaLoss(CachedMultipleNegativesRankingLoss) with a small BERT in fp64, where equality
means 1e-12; with masks it is the loss written out row by row.
"""

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

from tests.distributed import device, run
from tests.test_infonce import SCORINGS, _by_rows
from trainer import collectives
from trainer.batching import Plan, make_plan
from trainer.engines import DDP, Engine, Single
from trainer.gradcache import GradCache, Outcome, StepAbandoned
from trainer.infonce import Objective
from trainer.targets import Scoring

WIDTH = 16
OBJECTIVE = Objective(scale=20.0, dims=[16, 12, 4], weights=[1.0, 0.7, 0.4])


class TinyEncoder(nn.Module):
    """A random BERT with mean pooling, fp64; as much of a SentenceTransformer as the losses use."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=60,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.double().train()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"]
        tokens = self.bert(input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(tokens.dtype)
        return {**features, "sentence_embedding": (tokens * weight).sum(1) / weight.sum(1)}

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def __getitem__(self, index: int) -> nn.Module:
        return nn.Identity()


class Batch:
    """Rows of texts with their tokens: `distinct` says how many texts there are to draw from."""

    def __init__(self, rows: int, columns: int, distinct: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.ids = draw.integers(0, distinct, (rows, columns))
        self.tokens = [draw.integers(1, 60, draw.integers(2, 13)) for _ in range(distinct)]
        self.lengths = np.array([len(t) for t in self.tokens])[self.ids]

    def plan(self, world_size: int, budget: int, masks: bool = False, apart: bool = False, **more: Any) -> Plan:
        ids, sizes = self.ids, {"world_size": world_size, "micro_batch_tokens": budget}
        return make_plan(ids, ids, self.lengths, **sizes, masks=masks, separate_roles=apart, **more)

    def features(self, texts: np.ndarray) -> dict[str, Tensor]:
        """Model inputs of texts by number, padded to the longest, on this process's device."""
        tokens = [self.tokens[i] for i in self.ids.ravel()[texts]]
        ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.int64)
        for line, text in zip(ids, tokens, strict=True):
            line[: len(text)] = torch.from_numpy(text)
        ids = ids.to(device())
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def column(self, k: int, rows: slice) -> dict[str, Tensor]:
        """Model inputs of a column, as a data collator would hand them to ST."""
        return self.features(np.arange(self.ids.size).reshape(self.ids.shape)[rows, k])


def _st_gradient(
    model: nn.Module, batch: Batch, rows: slice, gather: bool, scoring: Scoring = OBJECTIVE.scoring
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of ST on these rows of the batch; `model` may be wrapped in DDP."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    cached = CachedMultipleNegativesRankingLoss(
        inner,
        scale=OBJECTIVE.scale,
        mini_batch_size=3,
        gather_across_devices=gather,
        directions=scoring.directions,
        partition_mode=scoring.partition_mode,
        hardness_mode=scoring.hardness_mode,
        hardness_strength=scoring.hardness_strength,
    )
    loss = MatryoshkaLoss(inner, cached, list(OBJECTIVE.dims), list(OBJECTIVE.weights))
    cached.model = model  # what the Trainer does after wrapping
    model.zero_grad()
    value = loss([batch.column(k, rows) for k in range(batch.ids.shape[1])], torch.empty(0))
    value.backward()
    return value.detach(), _gradient(model)


def _our_gradient(
    engine: Engine, model: nn.Module, batch: Batch, plan: Plan, kept: int = 0, objective: Objective = OBJECTIVE
) -> tuple[Tensor, Tensor]:
    """Loss, mean over ranks, and gradient of one step."""
    model.zero_grad()
    outcome = GradCache(engine, objective, seed=1, kept=kept).step(plan, batch.features, step=5)
    return _mean(outcome.loss), _gradient(model)


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _mean(value: Tensor) -> Tensor:
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value / collectives.world_size()


def _equal(ours: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], what: object) -> None:
    """Equality as DESIGN defines it, in fp64."""
    (value, gradient), (true_value, true_gradient) = ours, truth
    assert abs(value - true_value) <= 1e-12 * abs(true_value), (what, value, true_value)
    assert gradient.shape == true_gradient.shape
    error = (gradient - true_gradient).norm() / true_gradient.norm()
    assert error <= 1e-12, (what, error)
    assert (gradient - true_gradient).abs().max() <= 1e-12 * true_gradient.abs().max(), what


def _engine(dropout: float = 0.0) -> tuple[Engine, nn.Module]:
    model = TinyEncoder(dropout)
    if not dist.is_initialized():
        return Single(model), model
    wrapper = DistributedDataParallel(model)
    return DDP(wrapper), wrapper


def _equality_cases() -> Iterator[tuple[Batch, int, int, bool]]:
    """Batch, budget, kept graphs, separate roles."""
    batches = [
        Batch(rows, columns, distinct, seed=columns)
        for (rows, columns), distinct in itertools.product([(12, 2), (13, 3), (8, 5)], [9, 500])
    ]
    settings = [(1, 0, False), (40, 0, False), (40, 2, False), (40, 99, True), (10**6, 0, False)]
    for batch, (budget, kept, separate_roles) in itertools.product(batches, settings):
        yield batch, budget, kept, separate_roles


def _equal_to_st(rank: int, world_size: int) -> int:
    """ST in one process on the whole batch, and ST's gathering DDP where it can cut the batch."""
    engine, model = _engine()
    alone = TinyEncoder()
    truths: dict[Batch, tuple[Tensor, Tensor]] = {}
    cases = 0
    for batch, budget, kept, separate_roles in _equality_cases():
        rows = len(batch.ids)
        if batch not in truths:
            truths[batch] = _st_gradient(alone, batch, slice(None), gather=False)
            if rows % world_size == 0:
                share = rows // world_size
                value, gradient = _st_gradient(model, batch, slice(rank * share, (rank + 1) * share), gather=True)
                _equal((_mean(value), gradient), truths[batch], "ST against itself")
        plan = batch.plan(world_size, budget, apart=separate_roles)
        ours = _our_gradient(engine, model, batch, plan, kept)
        _equal(ours, truths[batch], (batch.ids.shape, budget, kept))
        cases += 1
    return cases


def test_one_process_equals_sentence_transformers() -> None:
    assert _equal_to_st(0, 1) == 30


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_equal_sentence_transformers(world_size: int) -> None:
    assert run(_equal_to_st, world_size, world_size) == [30] * world_size


def _directions_equal_st(rank: int, world_size: int) -> None:
    engine, model = _engine()
    for batch, scoring in itertools.product([Batch(12, 3, 9), Batch(13, 2, 500)], SCORINGS):
        truth = _st_gradient(TinyEncoder(), batch, slice(None), gather=False, scoring=scoring)
        plan = batch.plan(world_size, 40, scoring=scoring)
        objective = dataclasses.replace(OBJECTIVE, scoring=scoring)
        _equal(_our_gradient(engine, model, batch, plan, 2, objective), truth, scoring)


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_direction_equals_sentence_transformers_on_any_number_of_processes(world_size: int) -> None:
    run(_directions_equal_st, world_size, world_size)


def _masked_truth(batch: Batch) -> tuple[Tensor, Tensor]:
    model = TinyEncoder()
    numbers = np.array([int(np.flatnonzero(batch.ids.ravel() == i)[0]) for i in np.unique(batch.ids)])
    embeddings = model(batch.features(numbers))["sentence_embedding"]
    of_text = embeddings.new_zeros(len(batch.tokens), WIDTH)
    of_text[np.unique(batch.ids)] = embeddings
    value = _by_rows(batch.ids, batch.ids, of_text, of_text, OBJECTIVE, here=batch.ids >= 0)
    value.backward()
    return value.detach(), _gradient(model)


def _masks_equal(rank: int, world_size: int) -> float:
    engine, model = _engine()
    shares = []
    for batch, budget in itertools.product([Batch(9, 2, 12), Batch(7, 4, 30)], [40, 10**6]):
        plan = batch.plan(world_size, budget, masks=True)
        shares.append(plan.masked_share)
        _equal(_our_gradient(engine, model, batch, plan), _masked_truth(batch), (batch.ids.shape, budget))
    return min(shares)


@pytest.mark.parametrize("world_size", [1, 3])
def test_masks_equal_rows_written_out(world_size: int) -> None:
    assert min(run(_masks_equal, world_size, world_size)) > 0.01


def _kept_graphs(rank: int, world_size: int) -> int:
    engine, model = _engine(dropout=0.1)
    batch = Batch(16, 3, 500)
    plan = batch.plan(world_size, 30)
    micro_batches = len(plan.cuts) - 1
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    first = _our_gradient(engine, model, batch, plan, kept=0)
    for kept in (micro_batches // 2, micro_batches):
        value, gradient = _our_gradient(engine, model, batch, plan, kept=kept)
        assert torch.equal(gradient, first[1]) and torch.equal(value, first[0]), kept
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert str(states[2]) == str(np.random.get_state())
    # Dropout is really on and drawn anew at each step and for each seed.
    for seed, step in ((1, 6), (2, 5)):
        model.zero_grad()
        GradCache(engine, OBJECTIVE, seed).step(plan, batch.features, step)
        assert (_gradient(model) - first[1]).norm() > 1e-2 * first[1].norm()
    return micro_batches


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropout_with_kept_graphs_is_bit_identical(world_size: int) -> None:
    assert min(run(_kept_graphs, world_size, world_size)) >= 4


def _forwards(rank: int, world_size: int) -> list[int]:
    _, model = _engine(dropout=0.1)
    batch = Batch(10, 2, 500)
    seen, seeds = [], []

    class Watching(DDP):
        def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
            seeds.append(torch.initial_seed())
            seen.append(super().forward(features, synchronise))
            return seen[-1]

    assert isinstance(model, DistributedDataParallel)
    _our_gradient(Watching(model), model, batch, batch.plan(world_size, 30))
    half = len(seen) // 2
    assert half >= 3 and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    return seeds


def test_passes_share_dropout_and_micro_batches_and_ranks_do_not() -> None:
    seeds = run(_forwards, 2, 2)
    half = len(seeds[0]) // 2
    assert all(by_rank[:half] == by_rank[half:] for by_rank in seeds)
    assert len({seed for by_rank in seeds for seed in by_rank}) == 2 * half


def _wrong_place(rank: int, world_size: int) -> list[float]:
    """Errors where the reduction hangs on the wrong forward, which raises nothing."""
    _, wrapper = _engine()
    assert isinstance(wrapper, DistributedDataParallel)
    batch = Batch(12, 2, 500)
    plan = batch.plan(world_size, 30)
    assert len(plan.cuts) > 4
    _, truth = _st_gradient(TinyEncoder(), batch, slice(None), gather=False)

    class First(DDP):
        """Reduces at the first replay instead of the last."""

        done = False

        def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
            first = torch.is_grad_enabled() and not self.done
            self.done |= first
            return super().forward(features, first)

    class Never(DDP):
        """Forwards within no_sync, last backward outside of it."""

        def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
            with wrapper.no_sync():
                return super().forward(features, synchronise)

    errors = []
    for engine in (DDP(wrapper), First(wrapper), Never(wrapper)):
        _, gradient = _our_gradient(engine, wrapper, batch, plan)
        errors.append(float((gradient - truth).norm() / truth.norm()))
    return errors


def test_synchronising_at_the_wrong_place_is_seen() -> None:
    for right, first, never in run(_wrong_place, 2, 2):
        assert right < 1e-12 and first > 0.1 and never > 0.1


def _counted(rank: int, world_size: int) -> list[dict[str, int]]:
    engine, _ = _engine()
    counts: list[dict[str, int]] = []

    def counting(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[-1][name] = counts[-1].get(name, 0) + 1
            return call(*args, **kwargs)

        return counted

    names = [n for n in ("all_gather_single", "all_gather", "reduce_scatter_single", "all_reduce", "broadcast")]
    for name in names:
        setattr(dist, name, counting(name))
    for batch, budget in itertools.product([Batch(12, 2, 500), Batch(8, 5, 500)], [30, 10**6]):
        counts.append({})
        GradCache(engine, OBJECTIVE, 1).step(batch.plan(world_size, budget), batch.features, 0)
    counts.append({})
    objective = dataclasses.replace(OBJECTIVE, scoring=SCORINGS[0])
    GradCache(engine, objective, 1).step(batch.plan(world_size, 30, scoring=SCORINGS[0]), batch.features, 0)
    return counts


def test_a_step_has_one_gather_one_scatter_and_two_agreements() -> None:
    once = {"all_gather_single": 1, "reduce_scatter_single": 1, "all_reduce": 2}
    assert run(_counted, 2, 2) == [[once] * 5] * 2


def _abandoned(rank: int, world_size: int) -> list[str]:
    engine, model = _engine()
    batch = Batch(12, 2, 500)
    plan = batch.plan(world_size, 30)
    reasons = []

    class Broken(DDP):
        """The anchors of rank 1 are not finite."""

        def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
            return super().forward(features, synchronise) * (torch.nan if rank == 1 else 1)

    assert isinstance(model, DistributedDataParallel)
    asked_late = iter([False, True])
    for used, stop in (
        (engine, lambda: rank == 1),
        (engine, lambda: rank == 0 and next(asked_late)),
        (Broken(model), bool),
    ):
        with pytest.raises(StepAbandoned) as caught:
            GradCache(used, OBJECTIVE, 1, stop_asked=stop).step(plan, batch.features, 0)
        reasons.append(caught.value.reason)
    truth = _st_gradient(TinyEncoder(), batch, slice(None), gather=False)
    _equal(_our_gradient(engine, model, batch, plan), truth, "the engine is whole afterwards")
    return reasons


def test_all_ranks_leave_a_step_together() -> None:
    assert run(_abandoned, 2, 2) == [["stop asked", "stop asked", "non-finite loss"]] * 2


def _sgd(rank: int, world_size: int) -> float:
    engine, model = _engine()
    _, truth = _engine()
    batches = [Batch(8, 3, 30, seed=s) for s in range(5)]
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, truth))
    share = slice(4 * rank, 4 * rank + 4)
    for batch in batches:
        _our_gradient(engine, model, batch, batch.plan(world_size, 40))
        _st_gradient(truth, batch, share, gather=True)
        ours.step()
        theirs.step()
    pairs = zip(model.parameters(), truth.parameters(), TinyEncoder().parameters(), strict=True)
    moved = [(float((a - b).norm()), float((b - start).norm())) for a, b, start in pairs]
    return sum(a**2 for a, _ in moved) ** 0.5 / sum(b**2 for _, b in moved) ** 0.5


def test_five_sgd_steps_equal_sentence_transformers() -> None:
    assert max(run(_sgd, 2, 2)) < 1e-10


def test_evaluation_loss_equals_the_loss_of_a_step_and_leaves_no_gradient() -> None:
    engine, model = _engine()
    batch = Batch(12, 3, 30)
    step: Outcome = GradCache(engine, OBJECTIVE, 1).step(batch.plan(1, 40), batch.features, 0)
    untouched = copy.deepcopy(model)
    untouched.zero_grad()
    loss = GradCache(Single(untouched), OBJECTIVE, 1).loss(batch.plan(1, 25), batch.features)
    assert abs(loss.value - step.loss) < 1e-12 and (loss.by_dim - step.loss_by_dim).abs().max() < 1e-12
    assert set(step.seconds) == {"embed", "loss", "replay"}
    assert all(p.grad is None for p in untouched.parameters())


def _fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one gives up")
    dist.barrier()  # waits for ever


def test_the_helper_shows_the_error_of_any_rank() -> None:
    with pytest.raises(AssertionError, match="rank one gives up"):
        run(_fails, 2)

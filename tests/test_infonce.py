"""Fused InfoNCE against ST and against rows written out: `python -m pytest tests/test_infonce.py`."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
)
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.batching import Plan, make_plan
from trainer.infonce import Loss, Objective, infonce
from trainer.targets import Scoring

WIDTH = 24


class _Model(nn.Module):
    """As much of a model as ST's losses ask for when they only calculate."""

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def __getitem__(self, index: int) -> nn.Module:
        return nn.Identity()


def _batch(
    rows: int, columns: int, distinct: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Which text each row holds [rows, columns], and embeddings of the texts as anchor and as candidate."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(distinct, (rows, columns), generator=draw).numpy()
    anchors = torch.randn(distinct, WIDTH, generator=draw, dtype=dtype)
    return ids, anchors, torch.randn(distinct, WIDTH, generator=draw, dtype=dtype) + anchors / 3


def _ours(
    plan: Plan,
    ids: np.ndarray,
    anchors: Tensor,
    candidates: Tensor,
    objective: Objective,
    *,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Loss]]:
    """Loss and gradients by text, all ranks one after the other in this process."""
    text = torch.from_numpy(ids.ravel()[plan.texts])  # [ranks, slots]
    columns = text[:, ~plan.is_anchor].ravel()
    da, dc, losses = torch.zeros_like(anchors), torch.zeros_like(candidates), []
    for rank in range(plan.world_size):
        lines = text[:, plan.is_anchor].ravel() if plan.by_row else text[rank, plan.is_anchor]
        loss = infonce(anchors[lines], candidates[columns], plan.targets(rank), objective, tile)
        da.index_add_(0, lines, loss.anchor_gradient / plan.world_size)
        dc.index_add_(0, columns, loss.candidate_gradient / plan.world_size)
        losses.append(loss)
    return torch.stack([loss.value for loss in losses]).mean(), da, dc, losses


def _st_loss(ids: np.ndarray, leaf: list[Tensor], objective: Objective) -> Tensor:
    """ST's loss over rows that hold these texts, with its gradients added to the leaves: anchors, candidates."""
    scoring = objective.scoring
    cached = CachedMultipleNegativesRankingLoss(
        _Model(),  # type: ignore[arg-type]
        scale=objective.scale,
        mini_batch_size=7,
        directions=scoring.directions,
        partition_mode=scoring.partition_mode,
        hardness_mode=scoring.hardness_mode,
        hardness_strength=scoring.hardness_strength,
    )
    truth = MatryoshkaLoss(_Model(), cached, list(objective.dims), list(objective.weights))  # type: ignore[arg-type]
    # As embedded micro-batches, so that repeated texts add their gradients.
    columns = [leaf[min(k, 1)][torch.from_numpy(ids[:, k])] for k in range(ids.shape[1])]
    cut = [[column.detach().requires_grad_()] for column in columns]
    value = truth.loss.calculate_loss(cut, None, with_backward=True)  # type: ignore[operator]
    for column, (leaves,) in zip(columns, cut, strict=True):
        column.backward(leaves.grad)
    return value


def _distance(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("dims", [[24], [16], [24, 16, 4, 1], [20, 8]])
@pytest.mark.parametrize("distinct", [7, 1000])
def test_equal_to_sentence_transformers(columns: int, dims: list[int], distinct: int) -> None:
    ids, anchors, candidates = _batch(30, columns, distinct)
    weights = [1.0, 0.5, 0.25, 2.0][: len(dims)]
    leaf = [x.clone().requires_grad_() for x in (anchors, candidates)]
    value = _st_loss(ids, leaf, Objective(15.0, dims, weights))
    lengths = ids % 9 + 1
    for world_size, tile in ((1, None), (3, 4)):
        plan = make_plan(ids, ids, lengths, world_size=world_size, micro_batch_tokens=40, masks=False)
        ours, da, dc, losses = _ours(plan, ids, anchors, candidates, Objective(15.0, dims, weights), tile=tile)
        assert abs(ours - value) < 1e-12 * abs(value)
        assert _distance(da, leaf[0].grad) < 1e-12 and _distance(dc, leaf[1].grad) < 1e-12  # type: ignore[arg-type]
        by_dim = torch.stack([loss.by_dim for loss in losses]).mean(0)
        assert abs(by_dim @ torch.tensor(weights, dtype=by_dim.dtype) - ours) < 1e-12 * abs(ours)


def _by_rows(
    ids: np.ndarray,
    texts: np.ndarray,
    anchors: Tensor,
    candidates: Tensor,
    objective: Objective,
    *,
    here: np.ndarray,
    masks: bool = True,
    known: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """The loss row by row, entry by entry, as DESIGN's table of masks says it for each direction."""
    rows, columns = ids.shape
    scoring = objective.scoring
    right = [
        {texts[s, 1] for s in range(rows) if texts[s, 0] == texts[r, 0]} | {p for a, p in known if a == texts[r, 0]}
        for r in range(rows)
    ]
    held = [(s, k) for s in range(rows) for k in range(1, columns) if here[s, k]]

    def harder(r: int, entry: tuple[int, int]) -> bool:
        in_batch, own_negative = entry[0] != r, entry[0] == r and entry[1] > 1
        return {
            None: False,
            "in_batch_negatives": in_batch,
            "hard_negatives": own_negative,
            "all_negatives": in_batch or own_negative,
        }[scoring.hardness_mode]

    def stays(direction: str, r: int, s: int, k: int) -> bool:
        if direction == "query_to_doc":
            return (s, k) == (r, 1) or not masks or texts[s, k] not in right[r] | {texts[r, 0]}
        if direction == "doc_to_query":
            return s == r or not masks or texts[r, 1] not in right[s]
        if direction == "query_to_query":
            return s != r and (not masks or (texts[s, 0] != texts[r, 0] and not right[s] & right[r]))
        return s != r and (not masks or texts[s, k] not in right[r])

    total = anchors.new_zeros(())
    for dim, weight in zip(objective.dims, objective.weights, strict=True):
        q, c = normalize(anchors[:, :dim]), normalize(candidates[:, :dim])
        for r in range(rows):
            logits = []
            for direction in scoring.directions:
                x = q[ids[r, 0]] if direction.startswith("query") else c[ids[r, 1]]
                others = [(s, 0) for s in range(rows)] if direction.endswith("query") else held
                block = []
                for s, k in others:
                    if stays(direction, r, s, k):
                        cosine = x @ (c if k else q)[ids[s, k]]
                        strength = scoring.hardness_strength * (direction == "query_to_doc" and harder(r, (s, k)))
                        block.append(objective.scale * cosine + strength * cosine.detach())
                logits.append(torch.stack(block) if block else anchors.new_full((1,), -torch.inf))
            if scoring.partition_mode == "joint":
                normaliser = torch.cat(logits).logsumexp(0)
            else:
                normaliser = torch.stack([block.logsumexp(0) for block in logits]).mean()
            total = total + weight * (normaliser - objective.scale * (q[ids[r, 0]] @ c[ids[r, 1]])) / rows
    return total


SCORINGS = [
    Scoring(("query_to_doc", "doc_to_query"), "per_direction"),
    Scoring(("query_to_doc", "doc_to_query")),
    Scoring(("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")),
    Scoring(("query_to_doc", "doc_to_doc")),
    Scoring(hardness_mode="in_batch_negatives", hardness_strength=9.0),
    Scoring(("query_to_doc", "query_to_query"), hardness_mode="hard_negatives", hardness_strength=5.0),
    Scoring(("query_to_doc", "doc_to_query"), "per_direction", hardness_mode="all_negatives", hardness_strength=3.0),
]


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
@pytest.mark.parametrize(("columns", "distinct", "scale"), [(2, 11, 15.0), (4, 9, 70.0), (3, 1000, 15.0)])
def test_directions_and_hardness_equal_sentence_transformers(
    scoring: Scoring, columns: int, distinct: int, scale: float
) -> None:
    ids, anchors, candidates = _batch(18, columns, distinct)
    leaf = [x.clone().requires_grad_() for x in (anchors, candidates)]
    objective = Objective(scale, [24, 8], [1.0, 0.5], scoring)
    value = _st_loss(ids, leaf, objective)
    for world_size, tile in ((1, None), (3, 4)):
        plan = make_plan(
            ids, ids, ids % 9 + 1, world_size=world_size, micro_batch_tokens=40, masks=False, scoring=scoring
        )
        ours, da, dc, _ = _ours(plan, ids, anchors, candidates, objective, tile=tile)
        assert abs(ours - value) < 1e-12 * abs(value)
        assert _distance(da, leaf[0].grad) < 1e-12 and _distance(dc, leaf[1].grad) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("scoring", [Scoring(), *SCORINGS], ids=str)
@pytest.mark.parametrize(("columns", "distinct"), [(2, 9), (2, 60), (3, 12), (4, 25)])
def test_masks_equal_to_rows_written_out(scoring: Scoring, columns: int, distinct: int) -> None:
    ids, anchors, candidates = _batch(14, columns, distinct, seed=columns)
    texts = ids // 2  # two texts are one to the masks
    lengths = ids % 9 + 1
    lengths[:, 2:][np.random.default_rng(1).random((14, columns - 2)) < 0.4] = 0  # rows with fewer negatives
    objective = Objective(12.0, [24, 8], [1.0, 0.3], scoring)
    # A table that names a candidate of another row, and a text that the batch does not hold for two of its anchors.
    known = [(texts[0, 0], texts[5, 1]), (texts[1, 0], 777), (texts[2, 0], 777)]
    for table in ([], known):
        leaf = [x.clone().requires_grad_() for x in (anchors, candidates)]
        value = _by_rows(ids, texts, leaf[0], leaf[1], objective, here=lengths > 0, known=table)
        value.backward()
        pairs = np.array(table, dtype=texts.dtype).reshape(-1, 2)
        for world_size in (1, 3):
            plan = make_plan(
                ids,
                texts,
                lengths,
                world_size=world_size,
                micro_batch_tokens=40,
                scoring=scoring,
                known=(pairs[:, 0], pairs[:, 1]),
            )
            ours, da, dc, _ = _ours(plan, ids, anchors, candidates, objective, tile=2)
            assert abs(ours - value) < 1e-12
            assert _distance(da, leaf[0].grad) < 1e-12  # type: ignore[arg-type]
            assert _distance(dc, leaf[1].grad) < 1e-12  # type: ignore[arg-type]


def test_masks_change_nothing_where_there_is_nothing_to_mask() -> None:
    ids = np.arange(40).reshape(20, 2)
    _, anchors, candidates = _batch(1, 2, 40)
    both = []
    for masks in (True, False):
        plan = make_plan(ids, ids, ids % 5 + 1, world_size=2, micro_batch_tokens=20, masks=masks)
        assert plan.masked_share == 0
        both.append(_ours(plan, ids, anchors, candidates, Objective(20.0, [24, 6], [1.0, 1.0]))[:3])
    for on, off in zip(*both, strict=True):
        assert _distance(on, off) < 1e-13


def test_finite_where_every_candidate_is_masked() -> None:
    ids = np.array([[0, 1], [0, 2], [0, 1]])
    _, anchors, candidates = _batch(1, 2, 3)
    plan = make_plan(ids, ids, np.ones_like(ids), world_size=2, micro_batch_tokens=9)
    value, da, dc, _ = _ours(plan, ids, anchors, candidates, Objective(20.0, [24], [1.0]))
    assert value == 0 and (da == 0).all() and (dc == 0).all()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e6])
def test_finite_at_any_scale(masks: bool, scale: float) -> None:
    ids, anchors, candidates = _batch(40, 3, 50, dtype=torch.float32)
    plan = make_plan(ids, ids, ids % 9 + 1, world_size=1, micro_batch_tokens=40, masks=masks)
    objective = Objective(scale, [24, 8], [1.0, 1.0])
    single = _ours(plan, ids, anchors, candidates, objective)[:3]
    double = _ours(plan, ids, anchors.double(), candidates.double(), objective)[:3]
    for ours, truth in zip(single, double, strict=True):
        assert ours.dtype == torch.float32 and ours.isfinite().all()
        assert _distance(ours, truth) < 1e-5 * max(1.0, scale / 100)


def test_zero_embeddings_are_normalised_as_torch_does() -> None:
    ids = np.arange(12).reshape(6, 2)
    _, anchors, candidates = _batch(1, 2, 12)
    anchors[0], candidates[3, :8] = 0, 0
    anchors[2] *= 1e-14  # a norm below torch's 1e-12 is a constant
    objective = Objective(20.0, [24, 8], [1.0, 1.0])
    leaf = [x.clone().requires_grad_() for x in (anchors, candidates)]
    value = _by_rows(ids, ids, leaf[0], leaf[1], objective, here=ids >= 0)
    value.backward()
    plan = make_plan(ids, ids, np.ones_like(ids), world_size=1, micro_batch_tokens=9)
    ours, da, dc, _ = _ours(plan, ids, anchors, candidates, objective)
    assert abs(ours - value) < 1e-12
    for gradient, truth in ((da, leaf[0].grad), (dc, leaf[1].grad)):
        assert truth is not None and gradient.isfinite().all()
        by_text = (gradient - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-3)
        assert by_text.max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_embeddings_are_scored_in_fp32(dtype: torch.dtype) -> None:
    ids, anchors, candidates = _batch(40, 2, 200, dtype=torch.float32)
    anchors, candidates = anchors.to(dtype), candidates.to(dtype)
    plan = make_plan(ids, ids, ids % 9 + 1, world_size=1, micro_batch_tokens=40)
    objective = Objective(20.0, [24, 8], [1.0, 1.0])
    text = torch.from_numpy(ids.ravel()[plan.texts[0]])
    q, c = anchors[text[plan.is_anchor]], candidates[text[~plan.is_anchor]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = infonce(q, c, plan.targets(0), objective)
    truth = infonce(q.double(), c.double(), plan.targets(0), objective)
    assert loss.anchor_gradient.dtype == loss.value.dtype == torch.float32
    assert _distance(loss.anchor_gradient, truth.anchor_gradient) < 1e-5
    assert _distance(loss.candidate_gradient, truth.candidate_gradient) < 1e-5


def test_inputs_are_left_alone_and_a_nan_shows() -> None:
    ids, anchors, candidates = _batch(10, 2, 30)
    plan = make_plan(ids, ids, np.ones_like(ids), world_size=1, micro_batch_tokens=9)
    before = anchors.clone(), candidates.clone()
    value = _ours(plan, ids, anchors, candidates, Objective(20.0, [24, 8], [1.0, 1.0]))[0]
    assert value.isfinite() and torch.equal(before[0], anchors) and torch.equal(before[1], candidates)
    candidates[ids[0, 1], 5] = torch.nan
    assert not _ours(plan, ids, anchors, candidates, Objective(20.0, [24, 8], [1.0, 1.0]))[0].isfinite()

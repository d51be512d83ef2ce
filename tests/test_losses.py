"""Losses by name: every name exists, arguments are checked strictly, values by dim add up.

`python -m pytest tests/test_losses.py`
"""

from typing import get_args

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from launch.config import Loss, LossName
from launch.errors import UserError
from trainer.losses import LossByDim, build_loss

MINIMAL = {
    "SoftmaxLoss": {"num_labels": 3},
    "GISTEmbedLoss": {"guide": "guide"},
    "CachedGISTEmbedLoss": {"guide": "guide"},
}
TEXTS = (["how to sort", "open a file", "a b c", "sum"], ["sorted(x)", "open(path)", "x y z", "sum(values)"])


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_named_loss_is_built_and_gives_a_gradient(name: str, minilm: SentenceTransformer) -> None:
    settings = Loss(name=name, arguments=MINIMAL.get(name, {}))
    loss = build_loss(settings, minilm, lambda _: minilm)
    columns = TEXTS[:1] if "Batch" in name and "Triplet" in name else TEXTS
    if name in ("TripletLoss", "MarginMSELoss", "DistillKLDivLoss"):
        columns = (*TEXTS, TEXTS[1][::-1])
    labels = torch.tensor([0, 1, 0, 1])
    if name in ("CosineSimilarityLoss", "CoSENTLoss", "AnglELoss", "MarginMSELoss"):
        labels = torch.tensor([1.0, 0.2, 0.4, 0.9])
    if name == "DistillKLDivLoss":
        labels = torch.rand(4, 2)
    minilm.train()
    minilm.zero_grad()
    value = loss([dict(minilm.preprocess(texts)) for texts in columns], labels)
    total = sum(value.values()) if isinstance(value, dict) else value
    total.backward()
    assert torch.isfinite(total)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in minilm.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Loss(arguments={"scal": 3.0}), "loss.arguments.scal: .* did you mean scale"),
        (Loss(name="SoftmaxLoss"), "SoftmaxLoss needs num_labels"),
        (Loss(arguments={"gather_across_devices": False}), "another loss"),
        (
            Loss(name="TripletLoss", arguments={"distance_metric": "cosin"}),
            "allowed: cosine, euclidean, manhattan",
        ),
        (Loss(dims=[768, 64]), "loss.dims: got 768, the model has 384"),
        (Loss(name="GISTEmbedLoss"), "needs guide"),
        (
            Loss(name="MultipleNegativesRankingLoss", arguments={"directions": ["nowhere"]}),
            "refuses its arguments",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(settings: Loss, message: str, minilm: SentenceTransformer) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_loss(settings, minilm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "CosineSimilarityLoss", "CoSENTLoss"])
def test_losses_by_dim_add_up_to_the_loss_and_equal_each_dim_alone(name: str, minilm: SentenceTransformer) -> None:
    loss = build_loss(Loss(name=name, dims=[384, 64, 32], dim_weights=[1.0, 0.5, 2.0]), minilm)
    by_dim = LossByDim(loss)
    labels = torch.tensor([1.0, 0.2, 0.4, 0.9])
    minilm.eval()
    features = [dict(minilm.preprocess(texts)) for texts in TEXTS]
    total = loss([dict(f) for f in features], labels)
    weighted = by_dim.values[384] + 0.5 * by_dim.values[64] + 2.0 * by_dim.values[32]
    assert total.item() == pytest.approx(weighted.item(), rel=1e-6)
    # Independent: the plain loss on a model that truncates its embeddings.
    truncated = SentenceTransformer(modules=[*list(minilm)], truncate_dim=64)
    plain = build_loss(Loss(name=name), truncated)
    vectors = [torch.nn.functional.normalize(minilm(dict(f))["sentence_embedding"][:, :64], dim=-1) for f in features]
    if hasattr(plain, "calculate_loss"):
        alone = plain.calculate_loss([[v] for v in vectors])
        assert by_dim.values[64].item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_classic_example_trains_the_loss_of_the_articles(minilm: SentenceTransformer) -> None:
    loss = build_loss(Loss(name="CosineSimilarityLoss", dims=[384, 128]), minilm)
    assert isinstance(loss, losses.MatryoshkaLoss)
    assert isinstance(loss.loss, losses.CosineSimilarityLoss)

"""The exact step's objective is what ST's own loss object holds: `python -m pytest tests/test_objective.py`."""

from typing import Any

import pytest
from torch import nn

from launch.config import Loss, Model, RunConfig, Train
from launch.config_data import Data, Source
from launch.errors import UserError
from trainer.losses import build_loss
from trainer.objective import SYMMETRIC, check_arguments, objective_of


class _Model(nn.Module):
    """As much of a SentenceTransformer as the constructors of the losses use."""

    def get_embedding_dimension(self) -> int:
        return 24

    def __getitem__(self, index: int) -> nn.Module:
        return nn.Identity()


def _config(**loss: Any) -> RunConfig:
    return RunConfig(
        model=Model(path="x"),
        data=Data(sources=[Source(path="x")]),
        loss=Loss(**loss),
        train=Train(global_batch_size=8),
    )


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"scale": 50.0, "directions": ["query_to_doc", "doc_to_query"], "partition_mode": "per_direction"},
    {"directions": ["doc_to_doc", "query_to_doc"], "hardness_mode": "all_negatives", "hardness_strength": 2.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 0.0},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("dims", [None, [24, 8]])
def test_arguments_mean_what_they_mean_to_sentence_transformers(
    arguments: dict[str, Any], dims: list[int] | None
) -> None:
    config = _config(arguments=arguments, dims=dims, dim_weights=dims and [1.0, 0.5])
    check_arguments(config)
    built: Any = build_loss(config.loss, _Model())  # type: ignore[arg-type]
    loss = built.loss if dims else built
    ours = objective_of(config, 24)
    assert config.loss.is_exact
    assert ours.scale == loss.scale and ours.scoring.partition_mode == loss.partition_mode
    assert set(ours.scoring.directions) == set(loss.directions)
    assert ours.scoring.hardness_strength == loss.hardness_strength
    assert ours.scoring.hardness_mode == (loss.hardness_mode if loss.hardness_strength else None)
    assert list(ours.dims) == (list(built.matryoshka_dims) if dims else [24])
    assert list(ours.weights) == (list(built.matryoshka_weights) if dims else [1.0])


def test_the_symmetric_loss_is_exact_too() -> None:
    config = _config(name=SYMMETRIC, arguments={"scale": 30.0})
    built: Any = build_loss(config.loss, _Model())  # type: ignore[arg-type]
    scoring = objective_of(config, 24).scoring
    assert config.loss.is_exact and (scoring.directions, scoring.partition_mode) == (
        built.directions,
        built.partition_mode,
    )
    assert not _config(name=SYMMETRIC, step="library").loss.is_exact


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"similarity_fct": "dot_score"}, ["similarity_fct", "dot_score", "cos_sim", "loss.step=library"]),
        ({"mini_batch_size": 32}, ["mini_batch_size", "train.micro_batch_tokens"]),
        ({"gather_across_devices": False}, ["gather_across_devices"]),
    ],
)
def test_what_the_exact_step_does_not_compute_is_refused(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments(_config(arguments=arguments))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)

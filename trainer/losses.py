"""sentence-transformers' own losses by name, with strictly checked arguments, with or without Matryoshka.

A run file holds numbers, strings and lists only; where a loss wants a function or a model, words stand for it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score
from torch import nn

from launch import config as schema
from launch.errors import UserError
from launch.reader import did_you_mean

_SIMILARITY = {"cos_sim": cos_sim, "dot_score": dot_score}
_DISTANCE = {name.lower(): getattr(losses.TripletDistanceMetric, name) for name in ("COSINE", "EUCLIDEAN", "MANHATTAN")}
_SIAMESE = {
    "cosine": losses.SiameseDistanceMetric.COSINE_DISTANCE,
    "euclidean": losses.SiameseDistanceMetric.EUCLIDEAN,
    "manhattan": losses.SiameseDistanceMetric.MANHATTAN,
}
_LABEL_DISTANCE = {
    "cosine": losses.BatchHardTripletLossDistanceFunction.cosine_distance,
    "euclidean": losses.BatchHardTripletLossDistanceFunction.eucledian_distance,
}
_OF_LOSS = {"TripletLoss": _DISTANCE, "ContrastiveLoss": _SIAMESE, "OnlineContrastiveLoss": _SIAMESE}


def build_loss(
    settings: schema.Loss, model: SentenceTransformer, load_guide: Callable[[str], SentenceTransformer] | None = None
) -> nn.Module:
    """The loss module that `settings` names, on `model`, wrapped in MatryoshkaLoss where dims are given.

    `load_guide` turns the `guide` argument of a GIST loss (a path) into a model. Negatives are always gathered
    over processes where the loss can: without it several processes would silently train another loss.
    Raises UserError for an argument that the class does not have or cannot take, or dims beyond the model.
    """
    cls = getattr(losses, settings.name)
    # Two losses share a constructor by inheritance, so the signature is the class's own view.
    parameters = {k: p for k, p in inspect.signature(cls.__init__).parameters.items() if k not in ("self", "model")}
    arguments: dict[str, Any] = {}
    for name, value in settings.arguments.items():
        if name not in parameters:
            raise UserError(
                f"loss.arguments.{name}: {settings.name} has no such argument; allowed: {', '.join(parameters)}"
                f"{did_you_mean(name, parameters)}"
            )
        arguments[name] = _argument(settings.name, name, value, load_guide)
    if "gather_across_devices" in parameters:
        if settings.arguments.get("gather_across_devices") is False:
            raise UserError(
                "loss.arguments.gather_across_devices: false trains another loss on each number of processes; "
                "leave it out: negatives are gathered over all processes"
            )
        arguments["gather_across_devices"] = True
    if "embedding_dimension" in parameters:
        arguments.setdefault("embedding_dimension", model.get_embedding_dimension())
    wanted = [k for k, p in parameters.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in wanted if name not in arguments]:
        raise UserError(f"loss.arguments: {settings.name} needs {', '.join(missing)}")
    width = model.get_embedding_dimension() or 0
    if settings.dims and settings.dims[0] > width:
        raise UserError(f"loss.dims: got {settings.dims[0]}, the model has {width} dimensions; allowed: up to {width}")
    try:
        loss = cls(model=model, **arguments)
        if settings.dims:
            weights = settings.dim_weights or [1.0] * len(settings.dims)
            loss = losses.MatryoshkaLoss(model, loss, settings.dims, weights)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss: {settings.name} refuses its arguments: {str(error).splitlines()[0]}") from error
    return loss


def _argument(loss: str, name: str, value: Any, load_guide: Callable[[str], SentenceTransformer] | None) -> Any:
    if name == "guide":
        if not isinstance(value, str) or load_guide is None:
            raise UserError(f"loss.arguments.guide: got {value!r}, allowed: path or hub name of a model")
        return load_guide(value)
    by_name = {"similarity_fct": _SIMILARITY, "distance_metric": _OF_LOSS.get(loss, _LABEL_DISTANCE)}
    if (table := by_name.get(name)) is not None:
        if value not in table:
            raise UserError(f"loss.arguments.{name}: got {value!r}, allowed: {', '.join(table)}")
        return table[value]
    if isinstance(value, list):  # ST compares directions as tuples
        return tuple(value)
    return value


class LossByDim:
    """Records the loss at each Matryoshka dim while a loss of sentence-transformers computes it.

    For a cached loss the value per dim is seen inside `calculate_loss`, for any other as the output of the
    wrapped loss, once per dim in descending order.
    """

    def __init__(self, loss: nn.Module) -> None:
        self.values: dict[int, Any] = {}
        if not isinstance(loss, losses.MatryoshkaLoss):
            return
        if loss.uses_gradient_cache:
            decorator: Any = loss.loss.calculate_loss
            decorator.fn = self._watch(decorator.fn)
        else:
            self._dims = loss.matryoshka_dims
            self._next = 0
            loss.register_forward_pre_hook(self._restart)
            loss.loss.register_forward_hook(self._record)

    def _watch(self, calculate: Callable[..., Any]) -> Callable[..., Any]:
        def watched(reps: list[list[Any]], *args: Any, **kwargs: Any) -> Any:
            value = calculate(reps, *args, **kwargs)
            self.values[reps[0][0].shape[-1]] = value.detach()
            return value

        return watched

    def _restart(self, *_: Any) -> None:
        self._next = 0

    def _record(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        total = torch.stack(list(output.values())).sum() if isinstance(output, dict) else output
        self.values[self._dims[self._next]] = total.detach()
        self._next += 1

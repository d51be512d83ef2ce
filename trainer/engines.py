"""When gradients are synchronised: one small class per engine, so that the step need not know which it has.

`model(features)` returns a dict with `sentence_embedding` [texts, width]; `backward` takes a scalar and
applies what the trainer wants applied (the scaler of fp16). All ranks run the same engine.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Engine(Protocol):
    """What a step asks of an engine."""

    def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
        """Embeddings [texts, width]. With `synchronise` the next backward reduces the gradients of all ranks:
        all ranks must do so together, exactly once a step and with the last forward."""
        ...

    def backward(self, surrogate: Tensor, /) -> None:
        """Add the gradient of a scalar to the parameters; reduces if the last forward said `synchronise`."""
        ...

    def finish(self) -> None:
        """After the last backward, with nothing that may raise in between. All ranks must call."""
        ...


def _call_backward(surrogate: Tensor) -> None:
    surrogate.backward()


class Single:
    """One process: nothing to synchronise."""

    def __init__(self, model: nn.Module, backward: Callable[[Tensor], None] = _call_backward) -> None:
        self._model = model
        self.backward = backward

    def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
        """See Engine."""
        return self._model(features)["sentence_embedding"]

    def finish(self) -> None:
        """See Engine."""


class DDP:
    """DistributedDataParallel, which decides at the forward whether the next backward reduces.

    So every forward but the last runs on the unwrapped model: its backwards, in whatever order, add to the
    gradients on this rank, and the one backward of the wrapper's forward reduces their sum. Deciding with
    `no_sync` around the backwards instead is silently wrong (relative error 0.8 to 1.2).
    """

    def __init__(self, model: DistributedDataParallel, backward: Callable[[Tensor], None] = _call_backward) -> None:
        self._model = model
        self.backward = backward

    def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
        """See Engine."""
        model = self._model if synchronise else self._model.module
        return model(features)["sentence_embedding"]

    def finish(self) -> None:
        """See Engine."""

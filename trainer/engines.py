"""When gradients are synchronised: one small class per engine, so that the step need not know which it has.

`model(features)` returns a dict with `sentence_embedding` [texts, width]; `backward` takes a scalar and
applies what the trainer wants applied (the scaler of fp16). All ranks run the same engine.

Fast mode synchronises once a step, for which each process holds the gathered parameters or whole gradients over the
step; lean mode synchronises in every replay and holds shards only. Both have the same gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

Mode = Literal["fast", "lean"]
# Up to where one rank alone may leave a step, because no collective of the engine has others waiting for it: in replays
# that do not synchronise too, in the first pass, or nowhere.
Leaves = Literal["replays", "first pass", "nowhere"]


class Engine(Protocol):
    """What a step asks of an engine."""

    mode: Mode  # lean engines keep no graphs: under ZeRO-3 their gradient would be silently wrong (0.3 of it)
    leaves: Leaves

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

    def abandon(self) -> None:
        """Leave a step at any place before `finish`. No collective: others may not come.

        One process and DDP lose the gradients and may go on. FSDP2 and ZeRO may do so only if no backward had begun:
        what their backwards had added up stays in buffers of theirs, so a further step is refused.
        """
        ...


def engine_of(model: nn.Module, backward: Callable[[Tensor], None], mode: Mode) -> Engine:
    """The engine that `accelerator.prepare` put around or into this model, which the launcher's file decides."""
    if isinstance(model, DistributedDataParallel):
        return DDP(model, backward)
    if isinstance(model, FSDPModule):
        return FSDP2(model, backward, mode)
    if hasattr(model, "zero_optimization_stage"):  # deepspeed need not be installed
        return ZeRO(model, mode)
    return Single(model, backward)


def _call_backward(surrogate: Tensor) -> None:
    surrogate.backward()


class Single:
    """One process: nothing to synchronise."""

    mode: Mode = "fast"
    leaves: Leaves = "replays"

    def __init__(self, model: nn.Module, backward: Callable[[Tensor], None] = _call_backward) -> None:
        self._model = model
        self.backward = backward

    def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
        """See Engine."""
        return self._model(features)["sentence_embedding"]

    def finish(self) -> None:
        """See Engine."""

    def abandon(self) -> None:
        """See Engine."""
        self._model.zero_grad()


class DDP:
    """DistributedDataParallel, which decides at the forward whether the next backward reduces.

    So every forward but the last runs on the unwrapped model: its backwards, in whatever order, add to the
    gradients on this rank, and the one backward of the wrapper's forward reduces their sum. Deciding with
    `no_sync` around the backwards instead is silently wrong (relative error 0.8 to 1.2).
    """

    mode: Mode = "fast"
    leaves: Leaves = "replays"

    def __init__(self, model: DistributedDataParallel, backward: Callable[[Tensor], None] = _call_backward) -> None:
        self._model = model
        self.backward = backward

    def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
        """See Engine."""
        model = self._model if synchronise else self._model.module
        return model(features)["sentence_embedding"]

    def finish(self) -> None:
        """See Engine."""

    def abandon(self) -> None:
        """See Engine."""
        self._model.zero_grad()


def _refuse_what_was_left(has_begun: bool) -> None:
    """A first pass, which has no graphs, while backwards of another step are not finished."""
    if has_begun and not torch.is_grad_enabled():
        raise RuntimeError("this engine was left in the middle of a step; its gradient would be in the next one")


class FSDP2:
    """fully_shard of torch, whose groups gather parameters and reduce gradients by flags that their hooks read.

    Fast: what is gathered stays so until the last backward, which reduces what all of them added up: one gather and
    one reduction of each group a step. Lean: the flags stay as they are, so that every forward and backward gathers
    and every backward reduces into the shards.
    """

    leaves: Leaves = "nowhere"

    def __init__(self, model: Any, backward: Callable[[Tensor], None] = _call_backward, mode: Mode = "fast") -> None:
        self._model, self._call_backward = model, backward
        self.mode: Mode = mode
        self._has_begun = False
        if mode == "fast":
            model.set_reshard_after_forward(False)

    def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
        """See Engine."""
        _refuse_what_was_left(self._has_begun)
        if self.mode == "fast":
            self._model.set_requires_gradient_sync(synchronise)
            self._model.set_is_last_backward(synchronise)
            self._model.set_reshard_after_backward(synchronise)
        return self._model(features)["sentence_embedding"]

    def backward(self, surrogate: Tensor, /) -> None:
        """See Engine."""
        self._has_begun = True
        self._call_backward(surrogate)

    def finish(self) -> None:
        """See Engine."""
        self._has_begun = False

    def abandon(self) -> None:
        """See Engine."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # weights are saved from shards
        self._model.zero_grad()


class ZeRO:
    """A DeepSpeed engine at stage 1, 2 or 3, which steps the optimiser itself.

    Calling its backward for each micro-batch is silently wrong at stage 1 (only the last one counts) unless the engine
    is told which is the last. Fast: all backwards lie within `coalesce_grad_reduction`, whose end reduces once. Lean,
    and where weights are bf16 or fp16, in which coalescing would add gradients up: each backward says whether it is the
    last, and stages 2 and 3 reduce into shards in each.
    """

    def __init__(self, model: Any, mode: Mode = "fast") -> None:
        self._model = model
        self.mode: Mode = mode if model.get_data_types()[0] == torch.float32 else "lean"
        # Stage 3 gathers the parameters of each layer in its forward.
        self.leaves: Leaves = "nowhere" if model.zero_optimization_stage() == 3 else "first pass"
        self._coalescing: AbstractContextManager[None] | None = None
        self._is_last = self._has_begun = False

    def forward(self, features: dict[str, Any], synchronise: bool) -> Tensor:
        """See Engine."""
        _refuse_what_was_left(self._has_begun)
        self._is_last = synchronise
        return self._model(features)["sentence_embedding"]

    def backward(self, surrogate: Tensor, /) -> None:
        """See Engine."""
        self._has_begun = True
        if self.mode == "lean":
            self._model.set_gradient_accumulation_boundary(self._is_last)
        elif self._coalescing is None:
            coalescing: AbstractContextManager[None] = self._model.coalesce_grad_reduction()
            coalescing.__enter__()
            self._coalescing = coalescing
        self._model.backward(surrogate, scale_wrt_gas=False)

    def finish(self) -> None:
        """See Engine."""
        if self._coalescing is not None:
            coalescing, self._coalescing = self._coalescing, None
            coalescing.__exit__(None, None, None)
        self._model.set_gradient_accumulation_boundary(True)
        self._model.step()
        self._has_begun = False

    def abandon(self) -> None:
        """See Engine."""
        if self._coalescing is not None:
            flushes = [name for name in dir(self._model) if name.startswith("_flush_coalesced_reduction")]
            assert flushes, "DeepSpeed names its flush otherwise"
            for name in flushes:  # the end of the context would wait for ranks that never come
                setattr(self._model, name, lambda _: None)
            coalescing, self._coalescing = self._coalescing, None
            coalescing.__exit__(None, None, None)
            for name in flushes:
                delattr(self._model, name)
        self._model.zero_grad()

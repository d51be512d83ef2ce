"""The exact step on a batch of any size, in the three steps of GradCache (Gao et al., 2021).

Embed all micro-batches without gradients; take the loss and its gradient at the embeddings; embed again with
gradients and back-propagate <embeddings, cached gradient>. Memory holds one micro-batch of activations, or as
many as it has room for: a graph kept from the first pass is not computed again. The last micro-batch, which
is the shortest, carries the synchronisation and is never kept.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from launch.errors import UserError
from trainer import collectives, watch
from trainer.batching import Plan
from trainer.engines import Engine
from trainer.infonce import Loss, Objective, infonce

_T = TypeVar("_T")
_STOP, _NON_FINITE, _FULL = 1, 2, 3
STOP_ASKED, OUT_OF_MEMORY = "stop asked", "out of memory"
_REASONS = {_STOP: STOP_ASKED, _NON_FINITE: "non-finite loss", _FULL: OUT_OF_MEMORY}


class StepAbandoned(Exception):
    """All ranks left the step at the same place, before gradients were synchronised; `reason` says why.

    `texts` are the numbers in the batch of this rank's texts whose embeddings are not finite.
    """

    def __init__(self, code: int, texts: np.ndarray | None = None) -> None:
        self.reason = _REASONS[code]
        self.texts = np.zeros(0, np.int64) if texts is None else texts
        super().__init__(self.reason)


@dataclass(frozen=True)
class Outcome:
    """What a step hands to the trainer; the gradient is on the parameters."""

    loss: Tensor  # []: its mean over ranks is the loss of the batch
    loss_by_dim: Tensor  # [dims], likewise
    seconds: dict[str, float]  # embed, loss, replay


@dataclass(frozen=True)
class GradCache:
    """One rank's step; `features(texts)` makes new model inputs of texts by their numbers in the batch."""

    engine: Engine
    objective: Objective
    seed: int
    kept: int = 0  # micro-batches whose graphs are kept, the same on all ranks
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    stop_asked: Callable[[], bool] = bool

    def step(self, plan: Plan, features: Callable[[np.ndarray], dict[str, Any]], step: int) -> Outcome:
        """Add the gradient of one global batch to the parameters. All ranks must call, with the same plan.

        Raises StepAbandoned on all ranks if one of them is asked to stop, has a loss that is not finite or is out of
        memory where the engine lets it leave; gradients are then left half done. Out of memory elsewhere raises
        torch.OutOfMemoryError on that rank alone, and the others wait for it.
        """
        rank = collectives.rank()
        micro_batches = plan.micro_batches(rank)
        last = len(micro_batches) - 1
        clock = [time.perf_counter()]

        def embed(index: int, graph: bool, synchronise: bool) -> Tensor:
            watch.sign()
            with torch.set_grad_enabled(graph), _dropout(self.seed, step, rank, index), self.autocast():
                return self.engine.forward(features(micro_batches[index]), synchronise)

        # 1. Embed.
        watch.at("embed")
        embedded = _attempt(lambda: self._embed_all(embed, plan), self.engine.leaves != "nowhere")
        self._agree(_FULL if embedded is None else 0)
        assert embedded is not None
        embeddings, kept = embedded
        del embedded
        clock.append(time.perf_counter())

        # 2. Loss and its gradient at the embeddings.
        watch.at("loss")
        is_anchor = torch.from_numpy(plan.is_anchor).to(embeddings.device)
        loss = self._loss(embeddings, is_anchor, plan)
        value, by_dim = loss.value, loss.by_dim
        cached = self._gradient_at_home(loss, is_anchor, plan)
        is_finite = embeddings.isfinite().all(1)
        del loss, embeddings  # as large as all embeddings each
        clock.append(time.perf_counter())

        # 3. Replay.
        watch.at("replay")
        gradients = cached.split(np.diff(plan.cuts).tolist())

        def replay(index: int) -> None:
            output = kept.pop(index) if index in kept else embed(index, True, synchronise=index == last)
            self.engine.backward(torch.dot(output.flatten().to(cached.dtype), gradients[index].flatten()))

        replayed = _attempt(lambda: [replay(index) for index in range(last)], self.engine.leaves == "replays")
        code = _FULL if replayed is None else 0 if value.isfinite() else _NON_FINITE
        self._agree(code, lambda: plan.texts[rank][~is_finite.cpu().numpy()])
        if _attempt(lambda: [replay(last)], collectives.world_size() == 1) is None:
            raise StepAbandoned(_FULL)
        self.engine.finish()
        watch.at("optimiser")
        clock.append(time.perf_counter())
        return Outcome(value, by_dim, dict(zip(("embed", "loss", "replay"), np.diff(clock).tolist(), strict=True)))

    def _embed_all(self, embed: Callable[[int, bool, bool], Tensor], plan: Plan) -> tuple[Tensor, dict[int, Tensor]]:
        """Embeddings of this rank's share [slots, width], and the outputs of those micro-batches whose graphs are kept.

        A batch that is one micro-batch is run once, through whatever synchronises.
        """
        last = len(plan.cuts) - 2
        keeps = min(self.kept, last) if self.engine.mode == "fast" else 0
        embeddings, kept = None, {}
        for index, (first, end) in enumerate(itertools.pairwise(plan.cuts.tolist())):
            output = embed(index, index < keeps or last == 0, last == 0)
            if embeddings is None:
                embeddings = output.new_empty(len(plan.is_anchor), output.shape[1])
            # A copy, so that outputs and their concatenation are not held at once.
            embeddings[first:end] = output.detach()
            if output.requires_grad:
                kept[index] = output
        assert embeddings is not None
        return embeddings, kept

    def _loss(self, embeddings: Tensor, is_anchor: Tensor, plan: Plan) -> Loss:
        """One gather: of the candidates, or of all texts where rows need the anchors of all ranks."""
        sent = embeddings if plan.by_row else embeddings[~is_anchor]
        candidates = collectives.gather_embeddings(sent)
        anchors = embeddings[is_anchor]
        if plan.by_row:
            of_all = is_anchor.repeat(plan.world_size)
            anchors, candidates = candidates[of_all], candidates[~of_all]
        try:
            return infonce(anchors, candidates, plan.targets(collectives.rank()), self.objective)
        except torch.OutOfMemoryError:
            raise UserError(
                f"train.global_batch_size: out of memory where {len(anchors):,} anchors are scored against "
                f"{len(candidates):,} candidates of the batch; allowed: a smaller batch, or more processes"
            ) from None

    def _gradient_at_home(self, loss: Loss, is_anchor: Tensor, plan: Plan) -> Tensor:
        """Gradient at this rank's embeddings [slots, width], in the order of slots. One scatter."""
        anchors, candidates = loss.anchor_gradient, loss.candidate_gradient
        if plan.by_row:
            return collectives.scatter_gradient(_merged(is_anchor.repeat(plan.world_size), anchors, candidates))
        return _merged(is_anchor, anchors, collectives.scatter_gradient(candidates))

    def _agree(self, code: int, texts: Callable[[], np.ndarray] | None = None) -> None:
        """Leave the step where one rank must, `texts` being those that are not finite. All ranks must call; 4 bytes."""
        if code := collectives.highest(code or (_STOP if self.stop_asked() else 0), _device()):
            raise StepAbandoned(code, texts and texts())

    @torch.no_grad()
    def loss(self, plan: Plan, features: Callable[[np.ndarray], dict[str, Any]]) -> Loss:
        """Loss of one global batch, for evaluation. All ranks must call, with the same plan."""
        rank = collectives.rank()
        micro_batches = plan.micro_batches(rank)

        def embed(index: int, _graph: bool, _synchronise: bool) -> Tensor:
            with self.autocast():
                return self.engine.forward(features(micro_batches[index]), synchronise=False)

        embeddings, _ = dataclasses.replace(self, kept=0)._embed_all(embed, plan)
        return self._loss(embeddings, torch.from_numpy(plan.is_anchor).to(embeddings.device), plan)


def _attempt(work: Callable[[], _T], may_leave: bool) -> _T | None:
    """What `work` returns; None where memory runs out and one rank alone `may_leave` what the others do."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if not may_leave:
            raise
        return None


def _merged(is_anchor: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
    merged = anchors.new_empty(len(is_anchor), anchors.shape[1])
    merged[is_anchor], merged[~is_anchor] = anchors, candidates
    return merged


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _dropout(*key: int) -> Iterator[None]:
    """Seed torch's generators from (seed, step, rank, index) for one forward and put them back after it."""
    seed = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(seed, "little"))
        yield

"""The exact step inside the Trainer: which engine runs it, what its graphs may hold, what is logged of it."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from launch.config import RunConfig
from launch.config_data import PlainSource, Source
from launch.errors import UserError
from launch.world import World
from trainer import collectives, flops, watch
from trainer.batching import OVERHEAD_TOKENS, make_plan
from trainer.data import data_order, text_columns
from trainer.engines import Mode, engine_of
from trainer.gradcache import OUT_OF_MEMORY, GradCache, Outcome, StepAbandoned
from trainer.known import KnownPositives, known_positives
from trainer.loader import Batch, BatchFeatures, Steps
from trainer.memory import GraphMemory, MemoryRanOut, fitting_tokens, free_bytes, halved, largest_micro_batch, say
from trainer.model import max_length_of
from trainer.objective import objective_of
from trainer.sampler import DataOrder
from trainer.step_sums import StepSums
from trainer.tokens import Padder, TokenCache, role_of, token_cache

_ROWS_NAMED = 5  # in a message: enough to find what is wrong with them
_ROWS_AT_ONCE = 1 << 20  # read of the cache: a few MB


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """Training rows as the exact step reads them, made before the process group exists."""

    cache: TokenCache
    order: DataOrder
    known: KnownPositives | None = None


class _InOrder(DataOrder):
    """Rows of one source as they come."""

    def rows_of_step(self, epoch: int, step: int) -> np.ndarray:
        return step * self.global_batch_size + np.arange(self.global_batch_size)


def tokenise_held_out(
    config: RunConfig, rows: Any, facts: list[dict[str, Any]], model: SentenceTransformer
) -> Tokenised:
    """Token cache and fixed order of the held-out pairs, as `tokenise`; raises UserError where they fill no batch."""
    assert config.evaluate is not None and config.evaluate.sources is not None
    size = config.evaluate.loss_batch_size or config.train.global_batch_size
    if len(rows) < size:
        raise UserError(
            f"evaluate.loss_batch_size: got {size:,}, but the held-out sources have {len(rows):,} rows; "
            f"allowed: 2 to {len(rows):,}"
        )
    cache = _token_cache(config, config.evaluate.sources, rows, facts, model)
    return Tokenised(cache, _InOrder(config.train.seed, size, (len(rows),)))


def tokenise(
    config: RunConfig,
    rows: Any,
    facts: list[dict[str, Any]],
    model: SentenceTransformer,
    known: tuple[Any, list[dict[str, Any]]] | None = None,
) -> Tokenised:
    """Token cache, data order and known positives of a run, of what `open_sources` gave for both lists of sources.

    Every process may call; one of a node builds, the others wait. Raises UserError as `data_order` and `token_cache`.
    """
    order = data_order(config, facts)
    cache = _token_cache(config, config.data.sources, rows, facts, model)
    return Tokenised(cache, order, known and known_positives(*known, Path(config.data.cache_dir)))


def _token_cache(
    config: RunConfig,
    sources: Sequence[PlainSource],
    rows: Any,
    facts: list[dict[str, Any]],
    model: SentenceTransformer,
) -> TokenCache:
    fingerprint = "+".join(fact["fingerprint"] for fact in facts)
    prompts = [source.prompts if isinstance(source, Source) else None for source in sources]
    parts = [(fact["rows"], prompt) for fact, prompt in zip(facts, prompts, strict=True)]
    columns, folder = text_columns(rows.column_names), Path(config.data.cache_dir)
    return token_cache(rows, fingerprint, columns, model, folder, parts, config.data.cache_url)


def check_candidates(data: Tokenised, masks: bool) -> None:
    """Raise UserError where all rows hold the same one candidate. Reads no more of the cache than it must."""
    for ids in (data.cache.token_id, data.cache.text_id) if masks else (data.cache.token_id,):
        starts = range(0, len(ids), _ROWS_AT_ONCE)
        # An absent negative has the identity 0.
        if all(np.isin(ids[start : start + _ROWS_AT_ONCE, 1:], (ids[0, 1], 0)).all() for start in starts):
            raise UserError(
                f"data.sources: the {', '.join(data.cache.columns[1:])} of all {len(ids):,} rows are the same text, so "
                "there is nothing to tell a positive from; allowed: at least two distinct texts"
            )


def at_the_limit(cache: TokenCache, model: SentenceTransformer) -> str | None:
    """One line on how many texts reach the maximal length, None if none does."""
    limits = np.array([max_length_of(model, role_of(column)) or np.inf for column in cache.columns])
    starts = range(0, len(cache), _ROWS_AT_ONCE)
    lengths = (cache.lengths(np.arange(start, min(start + _ROWS_AT_ONCE, len(cache)))) for start in starts)
    count = sum(int((some >= limits).sum()) for some in lengths)
    share = count / cache.token_id.size
    words = f"{count:,} of {cache.token_id.size:,} texts ({share:.1%}) reach the maximal length; what is longer is cut"
    return f"{words} (model.max_seq_length)" if count else None


class ExactStep:
    """One rank's exact step over a run. All ranks construct it with the same config and data."""

    def __init__(
        self,
        config: RunConfig,
        model: SentenceTransformer,
        data: Tokenised,
        world: World,
        stop_asked: Callable[[], bool],
        held_out: Tokenised | None = None,
    ) -> None:
        self._config, self._model, self._data, self._stop_asked = config, model, data, stop_asked
        width = model.get_embedding_dimension()
        assert width is not None
        self._objective = objective_of(config, width)
        self._padder = Padder(model)
        # A pooling that skips the prompt takes one prompt length per batch.
        self._apart = any(isinstance(m, Pooling) and not m.include_prompt for m in model)
        self._plan = partial(
            make_plan,
            world_size=world.world_size,
            overhead_tokens=OVERHEAD_TOKENS["cuda" if torch.cuda.is_available() else "cpu"],
            masks=config.loss.mask_known_positives,
            separate_roles=self._apart,
            scoring=self._objective.scoring,
        )
        self.steps = Steps(data.cache, data.order, self._plan, config.train.micro_batch_tokens, data.known)
        self._held_out = held_out
        self._held_out_loss: dict[str, float] = {}
        self._step: GradCache | None = None
        self._world, self._warned = world, False
        self._graphs = GraphMemory(config.train.graph_memory, world.local_world_size)
        self._ended = time.perf_counter()
        self._log = StepSums(flops.of_training(model), self._padder.flat)

    def run(self, model: nn.Module, batch: Batch, backward: Callable[[Tensor], None]) -> Tensor:
        """Loss of this rank (its mean over ranks is the batch's), gradients left on the parameters.

        All ranks must call. `model` is the prepared model, wrapped or not. Raises StepAbandoned on all ranks alike.
        """
        started = time.perf_counter()
        device = next(model.parameters()).device
        if self._step is None:
            self._begin(model, batch, backward, device)
        else:
            self._graphs.after_a_step(device)
        batch = self.steps.with_this_budget(batch)
        self._warn_of_nothing_to_learn(batch)
        outcome = None
        while outcome is None:
            kept = self._graphs.kept(batch.plan)
            outcome = self._attempt(batch, kept, device)
            if outcome is None:  # outside of the handler, whose traceback holds the graphs
                batch = self._with_less_memory(batch, kept, device)
        self._log.add(batch, kept, outcome.loss_by_dim, outcome.seconds, started - self._ended)
        self._ended = time.perf_counter()
        return outcome.loss

    def _begin(self, model: nn.Module, batch: Batch, backward: Callable[[Tensor], None], device: torch.device) -> None:
        """Before the first step. All ranks must call."""
        engine = engine_of(model, backward, self._mode(device))
        if self._config.train.engine_mode == "fast" and engine.mode == "lean":
            say("train.engine_mode: lean, since fast mode of ZeRO would add gradients up in low precision")
        self._step = GradCache(engine, self._objective, self._config.train.seed, stop_asked=self._stop_asked)
        self._log.peak = flops.device_peak(device, self._config.train.precision)
        if device.type == "cuda" and engine.leaves != "nowhere":  # a CPU's memory ends by the process being killed
            self.find_budget(device)
        plan = self.steps.with_this_budget(batch).plan
        texts = plan.micro_batches(collectives.rank())[0]
        self._graphs.measure(engine, self._model, self._features(batch, device)(texts))

    def find_budget(self, device: torch.device) -> None:
        """Halve the budget of micro-batches until the longest texts fit, both passes and what the optimiser will hold.

        All ranks must call. Raises UserError where one text does not fit.
        """
        cache = self._data.cache
        row, column, length = cache.longest_text()
        features = BatchFeatures(cache, self._padder, np.array([row]), device, self._apart)
        trained = [p for p in self._model.parameters() if p.requires_grad]

        def trial(tokens: int) -> None:
            texts = np.full(max(1, tokens // length), column)
            moments = [torch.empty_like(p) for p in trained for _ in range(2)]
            with torch.no_grad():
                self._model(features(texts))
            embeddings = self._model(features(texts))["sentence_embedding"]
            torch.autograd.grad(embeddings.sum(), trained, allow_unused=True)  # calls no hook of an engine
            del moments

        asked = self.steps.micro_batch_tokens
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            self.steps.micro_batch_tokens = fitting_tokens(trial, asked, length, device)
        if self.steps.micro_batch_tokens < asked:
            say(f"micro-batches: {asked:,} tokens do not fit, {self.steps.micro_batch_tokens:,} do")

    def _features(self, batch: Batch, device: torch.device) -> BatchFeatures:
        return BatchFeatures(self._data.cache, self._padder, batch.rows, device, self._apart)

    def _attempt(self, batch: Batch, kept: int, device: torch.device) -> Outcome | None:
        """The step, or None on all ranks where memory ran out in one of them and nothing is lost by that."""
        assert self._step is not None
        engine = self._step.engine
        try:
            step = dataclasses.replace(self._step, kept=kept)
            return step.step(batch.plan, self._features(batch, device), batch.step)
        except BaseException as error:
            engine.abandon()
            if isinstance(error, torch.OutOfMemoryError):
                raise MemoryRanOut(batch.step + 1, self._half_of(batch)) from error
            if not isinstance(error, StepAbandoned) or error.reason != OUT_OF_MEMORY:
                raise
            return None

    def _with_less_memory(self, batch: Batch, kept: int, device: torch.device) -> Batch:
        """The batch for another attempt, without kept graphs or with smaller micro-batches. All ranks must call."""
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if kept:
            self._graphs.keep_none()
            say(f"step {batch.step + 1}: out of memory with kept graphs; none is kept from here on")
            return batch
        self.steps.micro_batch_tokens = self._half_of(batch)
        had, has = largest_micro_batch(batch.plan), self.steps.micro_batch_tokens
        say(f"step {batch.step + 1}: out of memory with micro-batches of {had:,} tokens; {has:,} from here on")
        return self.steps.with_this_budget(batch)

    def _half_of(self, batch: Batch) -> int:
        """The budget after an error of memory; raises UserError where one text is all that a micro-batch had."""
        return halved(largest_micro_batch(batch.plan), self._data.cache.longest_text()[2])

    def metrics(self) -> dict[str, float]:
        """Means since the last call, for the log; losses by dim are means over ranks. All ranks must call."""
        held_out, self._held_out_loss = self._held_out_loss, {}
        return self._log.take(self._objective.dims) | held_out

    def measure_held_out(self) -> None:
        """Take the loss of the held-out pairs into the next `metrics`: eval_loss, and eval_loss_DIM unweighted.

        Without dropout, mean over the batches; nothing of the training changes. All ranks must call, after a step.
        """
        watch.at("held-out loss", is_watched=False)
        assert self._held_out is not None and self._config.evaluate is not None and self._step is not None
        data, device = self._held_out, next(self._model.parameters()).device
        steps = Steps(data.cache, data.order, self._plan, self._config.evaluate.batch_tokens, data.known)
        step = dataclasses.replace(self._step, stop_asked=bool)
        sums = torch.zeros(1 + len(self._objective.dims), dtype=torch.float64, device=device)
        self._model.eval()
        for number in range(len(steps)):
            batch = steps[number]["batch"]
            features = BatchFeatures(data.cache, self._padder, batch.rows, device, self._apart)
            loss = step.loss(batch.plan, features)
            sums += torch.cat([loss.value[None], loss.by_dim])
        self._model.train()
        if collectives.world_size() > 1:
            dist.all_reduce(sums)
        total, *by_dim = (sums / (len(steps) * collectives.world_size())).tolist()
        named = {f"eval_loss_{dim}": value for dim, value in zip(self._objective.dims, by_dim, strict=True)}
        self._held_out_loss = {"eval_loss": total} | named
        self._ended = time.perf_counter()

    def explain(self, error: StepAbandoned, batch: Batch, run_dir: Path) -> UserError:
        """The one line that a run ends with where the loss is not finite: the step and the rows. All ranks must call.

        A row is named by its place, from 1, among the rows that its source brought.
        """
        texts: list[Any] = [error.texts]
        if collectives.world_size() > 1:
            texts *= collectives.world_size()
            dist.all_gather_object(texts, error.texts)
        rows = np.unique(batch.rows[np.concatenate(texts) // len(self._data.cache.columns)])
        ends = np.cumsum(self._data.order.sizes)
        sources = [f" of {s.name}" if len(ends) > 1 else "" for s in self._config.data.sources]
        where = [(int(np.searchsorted(ends, row, side="right")), row) for row in rows[:_ROWS_NAMED].tolist()]
        named = ", ".join(f"{row - (ends[s - 1] if s else 0) + 1}{sources[s]}" for s, row in where)
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        found = f"the embeddings of row {named}{more} are not finite" if named else "all embeddings are finite"
        return UserError(
            f"step {batch.step + 1}: {error.reason}, {found}; nothing is saved over the last good checkpoint in "
            f"{run_dir}; look at these rows, lower train.learning_rate, or train in fp32 or bf16"
        )

    def _warn_of_nothing_to_learn(self, batch: Batch) -> None:
        """Say once that no row of a batch has a negative: such a step is harmless and teaches nothing."""
        candidates = int((batch.plan.all_targets.blocks[0].count > 0).sum())
        if (candidates < 2 or batch.plan.masked_share >= 1) and not self._warned:
            self._warned = True
            if collectives.rank() == 0:
                logging.getLogger("nestling").warning(
                    "step %d: none of its %d rows has a negative left (%d distinct candidates before masks), so it "
                    "teaches nothing; said once",
                    batch.step + 1,
                    len(batch.rows),
                    candidates,
                )

    def _mode(self, device: torch.device) -> Mode:
        """`train.engine_mode`; auto is fast where whole weights and gradients take less than half of the free memory
        of every process. All ranks must call."""
        asked = self._config.train.engine_mode
        if asked != "auto":
            return asked
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self._model.parameters()]
        needed = 4 * sum(size * (1 + trained) for size, trained in sizes)  # fp32; what is frozen has no gradient
        fits = needed < free_bytes(device, self._world.local_world_size) / 2
        return "lean" if collectives.highest(int(not fits), device) else "fast"

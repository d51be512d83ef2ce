"""Retrieval quality during training: on a subset that is drawn once, the best checkpoint kept, an early stop.

What was measured lies in metrics.jsonl; a resumed run reads there what was best before.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers import TrainerCallback

from launch.config import RunConfig
from launch.world import World
from trainer import watch
from trainer.embedder import ModelEmbedder
from trainer.evaluation import MAIN_METRIC, score
from trainer.retrieval import RetrievalSet

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Validation(TrainerCallback):
    """Evaluates every so many steps and after the last one. All ranks."""

    def __init__(
        self, config: RunConfig, subset: RetrievalSet, model: "SentenceTransformer", run_dir: Path, world: World
    ) -> None:
        """`model` is what the engine trains, its hooks included."""
        assert config.evaluate is not None and config.evaluate.every is not None
        self._settings, self._every, self._subset = config.evaluate, config.evaluate.every, subset
        self._dims, self._model, self._world = config.loss.dims or [], model, world
        self._log = run_dir / "metrics.jsonl"
        self._measured: dict[str, float] = {}
        self._history: list[tuple[int, float]] | None = None  # (step, value of `best`) of every evaluation so far

    @property
    def best_step(self) -> int | None:
        """The first step with the highest value, None where `evaluate.best` is not asked for or nothing measured."""
        history = self._history or ()
        return max(history, key=lambda seen: (seen[1], -seen[0]))[0] if self._settings.best and history else None

    def take(self) -> dict[str, float]:
        """What was measured since the last call, for the log: eval_METRIC_DIM."""
        measured, self._measured = self._measured, {}
        return measured

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._history = self._of_rank_0(self._read(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._history is not None
        step = state.global_step
        if step % self._every == 0 or step == state.max_steps:
            watch.at("evaluation", is_watched=False)
            embedder, tokens = ModelEmbedder(self._model), self._settings.batch_tokens
            scored = score(embedder, self._subset, self._dims, batch_tokens=tokens, world=self._world)
            metrics = dict.fromkeys((MAIN_METRIC, self._settings.best or MAIN_METRIC))
            self._measured = {
                f"eval_{metric}_{dim}": float(scored.by_metric["float32", dim][metric].mean())
                for metric in metrics
                for dim in scored.dims
            }
            control.should_log = True
            if self._settings.best:
                value = self._of_rank_0(self._measured[f"eval_{self._settings.best}_{scored.dims[0]}"])
                self._history.append((step, value))
                control.should_save |= self.best_step == step
        if self._settings.patience and self._history:
            since = sum(seen > (self.best_step or 0) for seen, _ in self._history)
            if since >= self._settings.patience:
                control.should_save = control.should_training_stop = True

    def _of_rank_0(self, mine: Any) -> Any:
        """Rank 0's on every rank: it alone may have the log, and the last digit of a mean differs between machines."""
        told = [mine]
        if self._world.world_size > 1:
            dist.broadcast_object_list(told, device=next(self._model.parameters()).device)
        return told[0]

    def _read(self, step: int) -> list[tuple[int, float]]:
        """The evaluations up to `step` that metrics.jsonl holds, which rank 0 alone may have."""
        history = []
        for line in self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else ():
            record = json.loads(line)
            values = [v for k, v in record.items() if k.startswith(f"eval_{self._settings.best}_")]
            if values and record["step"] <= step:
                history.append((record["step"], values[0]))  # the first is of the largest dim
        return history


def draw_subset(whole: RetrievalSet, final: RetrievalSet, config: RunConfig) -> tuple[RetrievalSet, dict[str, Any]]:
    """The subset of `whole` that is looked at during training, and what run.json says of it.

    Its queries are those that the final evaluation leaves out, as far as there are enough.
    """
    assert config.evaluate is not None
    asked = config.evaluate.subset_queries
    skip = max(0, min(len(final.queries), len(whole.queries) - asked))
    subset = whole.draw(asked, config.evaluate.subset_documents, config.train.seed, skip)
    facts = {
        "queries": len(subset.queries),
        "documents": len(subset.documents),
        "fingerprint": subset.fingerprint,
        "queries_of_final_evaluation": max(0, len(final.queries) - skip),
    }
    return subset, facts

"""A run's evaluation: which sets, which models, weights averaged with the base model's, gates."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import RunConfig
from launch.world import World
from trainer.embedder import ModelEmbedder
from trainer.evaluation import MAIN_METRIC, Scored, compare, examples, joined, score
from trainer.gates import judge_gates
from trainer.metrics import interval
from trainer.retrieval import RetrievalSet, open_retrieval
from trainer.validation import draw_subset
from trainer.weights import average

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Sets:
    """Retrieval sets of a run, by the name that results have them under; `subset` is looked at during training."""

    final: dict[str, RetrievalSet]
    subset: RetrievalSet | None = None
    subset_facts: dict[str, Any] = field(default_factory=dict)


def open_sets(config: RunConfig) -> Sets | None:
    """The sets that `config.evaluate` names, drawn; None where it is null. Needs no process group."""
    settings, seed, cache_dir = config.evaluate, config.train.seed, Path(config.data.cache_dir)
    if settings is None:
        return None
    whole = open_retrieval(settings, cache_dir, seed)
    final = {"domain": whole.draw(settings.max_queries, settings.max_documents, seed)}
    if general := settings.general:
        opened = open_retrieval(general, cache_dir, seed, "evaluate.general")
        final["general"] = opened.draw(general.max_queries, general.max_documents, seed)
    return Sets(final, *draw_subset(whole, final["domain"], config)) if settings.every else Sets(final)


def evaluate_run(
    config: RunConfig, sets: Sets, base: "SentenceTransformer", tuned: "SentenceTransformer", world: World
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The contents of evaluation.json and evaluation_queries.json on rank 0, None elsewhere. All ranks must call.

    `base` is left with other weights where averages are asked for.
    """
    settings, seed = config.evaluate, config.train.seed
    assert settings is not None
    tokens, dims = settings.batch_tokens, config.loss.dims or []
    scored: dict[str, dict[str, Scored]] = {}
    for name, retrieval in sets.final.items():
        own = name == "domain"
        before = score(ModelEmbedder(base), retrieval, dims, batch_tokens=tokens, world=world)
        stored = settings.vectors if own else []
        after = score(ModelEmbedder(tuned), retrieval, dims, stored, batch_tokens=tokens, world=world, timed=own)
        scored[name] = {"base": before, "tuned": after}
    averages = []
    weights = copy.deepcopy(base.state_dict()) if settings.averages else {}
    for share in settings.averages or ():
        base.load_state_dict(weights)
        average(base, tuned, 1 - share)
        for name, retrieval in sets.final.items():
            one = score(ModelEmbedder(base), retrieval, [], batch_tokens=tokens, world=world)
            values = one.by_metric["float32", one.dims[0]][MAIN_METRIC][:, None]
            (low,), (high,) = interval(values, seed=seed)
            entry = {"base_share": share, "set": name, "metric": MAIN_METRIC, "dim": one.dims[0]}
            averages.append(entry | {"value": float(values.mean()), "ci95": [float(low), float(high)]})
    if world.rank:
        return None
    evaluation = joined([compare(sets.final[name], both, name, seed) for name, both in scored.items()])
    evaluation |= {"gates": judge_gates(settings.gate, scored, seed), "averages": averages}
    return evaluation, examples(sets.final["domain"], scored["domain"])

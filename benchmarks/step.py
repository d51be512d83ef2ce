"""Whole training steps, tokens to gradient, against MatryoshkaLoss(CachedMultipleNegativesRankingLoss).

python -m benchmarks.step [--quick] [--json FILE] [--questions N]

Both sides train all-MiniLM-L6-v2 with five dims on the same tokenised rows, one thread, dropout off. Ours makes its
plan and slices its features within the time; the rival gets its padded columns as its collator makes them, at its best
mini-batch setting. Relative errors compare the whole gradients. The full run takes about 25 minutes.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import (
    RIVAL,
    Claim,
    Cost,
    docstring_pairs,
    finish,
    minilm,
    one_thread,
    options,
    questions,
    table,
    timed,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from trainer.tokens import TokenCache

DIMS = [384, 256, 128, 64, 32]
SCALE = 20.0
MICRO_BATCH_TOKENS = 8192  # the default of train.micro_batch_tokens
PLAN_ROWS = 2048
RANKS = (1, 8)  # that plans are made for


@dataclass(frozen=True)
class Setting:
    """How the rival cuts its mini-batches."""

    size: int = 32
    tokens: int | None = None

    def __str__(self) -> str:
        return f"mini_batch_num_tokens {self.tokens}" if self.tokens else f"mini_batch_size {self.size}"


@dataclass(frozen=True)
class Case:
    """Rows of one data set, cut to a maximal length."""

    name: str
    rows: Sequence[tuple[str, ...]]
    max_length: int
    settings: Sequence[Setting]
    chosen_on: int  # rows that the rival's best setting is found on
    repeats: int

    @property
    def columns(self) -> list[str]:
        """Column names in the trainer's order."""
        return ["anchor", "positive", *(f"negative_{i}" for i in range(1, len(self.rows[0]) - 1))]


@dataclass(frozen=True)
class Measured:
    """One step."""

    cost: Cost
    loss_stage: float  # wall seconds
    padded_tokens: int  # through the encoder with a graph: every text once
    gradient: "Tensor"
    loss: float


def _measure(model: "SentenceTransformer", step: Callable[[], tuple[float, float]]) -> Measured:
    """Run `step`, which returns its loss and the seconds of its loss stage, and see what it costs and computes."""
    import torch

    padded = 0

    def count(_: object, arguments: tuple[dict[str, "Tensor"], ...]) -> None:
        nonlocal padded
        padded += arguments[0]["input_ids"].numel() if torch.is_grad_enabled() else 0

    model.zero_grad(set_to_none=True)
    with model.register_forward_pre_hook(count):
        (loss, loss_stage), cost = timed(step)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return Measured(cost, loss_stage, padded, gradient, loss)


def rival_step(model: "SentenceTransformer", columns: list[dict[str, Any]], setting: Setting) -> Measured:
    """One step of sentence-transformers on its padded columns."""
    import torch
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

    cached = CachedMultipleNegativesRankingLoss(
        model, scale=SCALE, mini_batch_size=setting.size, mini_batch_num_tokens=setting.tokens
    )
    loss = MatryoshkaLoss(model, cached, DIMS)
    calculate: Any = cached.calculate_loss
    stage: list[Cost] = []

    def watched(*args: Any, **kwargs: Any) -> "Tensor":
        value, cost = timed(lambda: calculate(*args, **kwargs))
        stage.append(cost)
        return value

    setattr(cached, "calculate_loss", watched)  # noqa: B010  (a method to the type checker)

    def step() -> tuple[float, float]:
        value = loss(columns, torch.empty(0))
        value.backward()
        return float(value.detach()), stage[0].wall

    return _measure(model, step)


def our_step(model: "SentenceTransformer", cache: "TokenCache", rows: np.ndarray, keep_graphs: bool) -> Measured:
    """One step of ours, its plan included, with no graph kept or all of them."""
    import torch

    from trainer.engines import Single
    from trainer.gradcache import GradCache
    from trainer.infonce import Objective
    from trainer.loader import BatchFeatures
    from trainer.tokens import Padder

    padder = Padder(model)
    objective = Objective(SCALE, DIMS, [1.0] * len(DIMS))
    gradcache = GradCache(Single(model), objective, seed=0, kept=1 << 30 if keep_graphs else 0)

    def step() -> tuple[float, float]:
        plan = _plan(cache, rows)
        features = BatchFeatures(cache, padder, rows, torch.device("cpu"), False)
        outcome = gradcache.step(plan, features, 0)
        return float(outcome.loss), outcome.seconds["loss"]

    return _measure(model, step)


def _plan(cache: "TokenCache", rows: np.ndarray, world_size: int = 1) -> Any:
    from trainer.batching import make_plan

    return make_plan(
        cache.token_id[rows],
        cache.text_id[rows],
        cache.lengths(rows),
        world_size=world_size,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        masks=False,  # the rival has none
    )


def tokenised(case: Case, model: "SentenceTransformer", folder: Path) -> "TokenCache":
    """The token cache of a case's rows."""
    import datasets

    from trainer.tokens import token_cache

    texts = dict(zip(case.columns, map(list, zip(*case.rows, strict=True)), strict=True))
    return token_cache(datasets.Dataset.from_dict(texts), case.name, case.columns, model, folder)


def padded_columns(case: Case, model: "SentenceTransformer", rows: int) -> list[dict[str, Any]]:
    """The first rows as the rival's collator and trainer hand them to its loss."""
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    collator = SentenceTransformerDataCollator(model.preprocess)
    batch = collator([dict(zip(case.columns, row, strict=True)) for row in case.rows[:rows]])
    return [
        {key.removeprefix(f"{column}_"): value for key, value in batch.items() if key.startswith(f"{column}_")}
        for column in case.columns
    ]


def compare(case: Case, folder: Path) -> tuple[float, float, str]:
    """Measure one case and print it; returns the gains (no graph kept, all kept) and the conditions."""
    model = minilm(case.max_length)
    cache = tokenised(case, model, folder)
    columns = padded_columns(case, model, len(case.rows))
    everything = np.arange(len(case.rows))
    rival_step(model, padded_columns(case, model, 4), Setting(4))  # warm
    our_step(model, cache, everything[:4], keep_graphs=True)

    trials: list[tuple[Setting, Measured]] = []
    chosen_on = padded_columns(case, model, case.chosen_on)
    for setting in case.settings:
        trials.append((setting, rival_step(model, chosen_on, setting)))
        print(f"{case.name}: {case.chosen_on} rows, {setting}: {trials[-1][1].cost.cpu:.1f} CPU s", flush=True)
    best, trial = min(trials, key=lambda pair: pair[1].cost.cpu)
    rival = [trial] if case.chosen_on == len(case.rows) else []
    recompute, kept = [], []
    for _ in range(case.repeats):
        recompute.append(our_step(model, cache, everything, keep_graphs=False))
        kept.append(our_step(model, cache, everything, keep_graphs=True))
        if len(rival) < len(recompute):
            rival.append(rival_step(model, columns, best))
    print()
    theirs, ours, ours_kept = (min(runs, key=lambda run: run.cost.cpu) for runs in (rival, recompute, kept))
    table(
        [case.name, "CPU s", "wall s", "loss stage s", "padded tokens", "loss", "gradient: relative error"],
        [
            [name, run.cost.cpu, run.cost.wall, run.loss_stage, run.padded_tokens, run.loss, _error(run, theirs)]
            for name, run in (
                (f"{RIVAL}, {best}", theirs),
                ("ours, no graph kept", ours),
                ("ours, all graphs kept", ours_kept),
            )
        ],
    )
    gains = theirs.cost.cpu / ours.cost.cpu, theirs.cost.cpu / ours_kept.cost.cpu
    _split(case, cache, theirs, ours, ours_kept)
    conditions = (
        f"CPU time of a whole step, {len(case.rows):,} rows of {len(case.columns)} texts, maximal length "
        f"{case.max_length}, all-MiniLM-L6-v2, {len(DIMS)} dims, one thread, least of {case.repeats} runs "
        f"each; rival at {best}, best of {', '.join(map(str, case.settings))} on {case.chosen_on} rows; ours "
        f"{MICRO_BATCH_TOKENS} tokens a micro-batch; gradients agree to {_error(ours, theirs):.0e}"
    )
    return *gains, conditions


def _error(run: Measured, truth: Measured) -> float:
    return float((run.gradient - truth.gradient).norm() / truth.gradient.norm())


def _split(case: Case, cache: "TokenCache", theirs: Measured, ours: Measured, kept: Measured) -> None:
    """Print where the gain comes from."""
    rows = np.arange(len(case.rows))
    plan = _plan(cache, rows)
    real, padded = plan.tokens(0)
    everything = int(cache.lengths(rows).sum())
    table(
        ["part of the gain", "factor", "from"],
        [
            [
                "padding",
                theirs.padded_tokens / everything / (padded / real),
                f"padded over real {theirs.padded_tokens / everything:.3f} and {padded / real:.3f}",
            ],
            [
                "repetition",
                everything / real,
                f"{everything:,} and {real:,} real tokens; {rows.size * len(case.columns):,} texts, "
                f"{plan.distinct:,} distinct",
            ],
            ["kept graphs", ours.cost.cpu / kept.cost.cpu, f"{ours.cost.cpu:.1f} and {kept.cost.cpu:.1f} CPU s"],
            [
                "loss stage",
                theirs.loss_stage / ours.loss_stage,
                f"{theirs.loss_stage / theirs.cost.wall:.1%} and {ours.loss_stage / ours.cost.wall:.1%} of the step",
            ],
        ],
    )


def worst_padding(cases: Sequence[Case], batch: int, folder: Path) -> tuple[float, str]:
    """Largest padded over real tokens among the plans of all full batches of these cases, and which one it is."""
    lines, worst = [], (0.0, "")
    for case in cases:
        cache = tokenised(case, minilm(case.max_length), folder)
        for ranks in RANKS:
            for start in range(0, len(cache) - batch + 1, batch):
                plan, cost = timed(partial(_plan, cache, np.arange(start, start + batch), ranks))
                tokens = np.sum([plan.tokens(rank) for rank in range(ranks)], axis=0)
                ratio = float(tokens[1] / tokens[0])
                lines.append([f"{case.name}, rows {start:,} on", ranks, len(plan.cuts) - 1, ratio, cost.wall])
                worst = max(worst, (ratio, f"{case.name} on {ranks} ranks"))
    table([f"plan of {batch:,} rows", "ranks", "micro-batches", "padded / real", "seconds"], lines)
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument(
        "--questions", type=int, default=512, metavar="N", help="rows of the case with repeated texts; default 512"
    )
    args = parser.parse_args(argv)
    one_thread()
    pairs = docstring_pairs()
    sizes = [Setting(size) for size in (16, 32, 64, 128)]
    settings = [*sizes, Setting(tokens=2048), Setting(tokens=8192)]
    # A column of 64 rows has no mini-batch of 128.
    up_to_64 = [*sizes[:3], *settings[4:]]
    few = [Setting(4), Setting(tokens=512)]
    number = 12 if args.quick else args.questions
    asked, passages, corpus = questions(number)
    if args.quick:
        cases = [
            Case("docstring256", pairs[:8], 256, few, 8, 1),
            Case("docstring512", pairs[:4], 512, few, 4, 1),
            Case("repeated", asked, 32, few, 12, 1),
        ]
    else:
        cases = [
            Case("docstring256", pairs[:128], 256, settings, 128, 2),
            Case("docstring512", pairs[:64], 512, up_to_64, 64, 2),
            Case("repeated", asked, 64, up_to_64, min(64, number), 1),
        ]
    scaled = "scaled down (--quick): " if args.quick else ""
    claims = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            recompute, kept, conditions = compare(case, folder)
            if case.name == "repeated":
                conditions += f"; questions on {passages} passages, four negatives from {corpus} functions"
            names = [("recompute", recompute)] + [("kept", kept)] * (case.name != "repeated")
            claims += [
                Claim(f"step.{case.name}.speedup_{kind}", gain, "times", "higher", RIVAL, scaled + conditions)
                for kind, gain in names
            ]
        batch = PLAN_ROWS // 8 if args.quick else PLAN_ROWS
        rows = pairs[:batch] if args.quick else pairs
        plans = [Case(f"plan.docstring{length}", rows, length, [], 0, 0) for length in (256, 512)]
        plans.append(Case("plan.repeated", questions(batch)[0], 256, [], 0, 0))
        ratio, where = worst_padding(plans, batch, folder)
    claims.append(
        Claim(
            "step.padded_over_real_max",
            ratio,
            "padded tokens / real tokens",
            "lower",
            None,
            f"{scaled}plans of {batch:,} rows, {MICRO_BATCH_TOKENS} tokens a micro-batch, docstrings at 256 and 512 "
            f"tokens and repeated texts at 256, {' and '.join(map(str, RANKS))} ranks; the worst is {where}",
        )
    )
    return finish(claims, args.json)


if __name__ == "__main__":
    sys.exit(main())

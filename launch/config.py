"""The run's config: a typed, frozen model per section of a run file, every field documented where it stands.

`launch/reader.py` turns YAML and overrides into a `RunConfig`. `null` means off or "the model's own"; no
number stands for something else. `nestling config schema` prints the JSON schema made from this file.
"""

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from launch.config_data import Data, Prompts, Section, store_url
from launch.config_evaluate import Evaluate
from launch.config_launch import Launch

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
    grace_seconds: float = Field(default=60.0, gt=0)
    """Seconds that a run has from the signal to stop (SIGTERM, SIGUSR1, SIGUSR2) until it is killed. Where a checkpoint
    takes longer, there are more of them."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where metrics go beside metrics.jsonl; wandb and mlflow need their packages."""


class Checkpoint(Section):
    """Checkpoints during training."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; null = one at each end of an epoch. The last step always has one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk; two stay at least, so that there is one to fall back to."""
    remote: str | None = None
    """Folder of an object store (s3://BUCKET/..., gs://, az://, or file:///... for a file system that machines share)
    for this run alone: each checkpoint is uploaded behind the training, and another machine goes on from there.
    Credentials come from the environment. null = checkpoints stay in the run folder only."""

    @field_validator("remote")
    @classmethod
    def _known_store(cls, url: str | None) -> str | None:
        return url and store_url(url, with_folders=True)


class Export(Section):
    """The ONNX bundle."""

    precisions: list[Literal["fp32", "fp16", "int8"]] = Field(default=["fp32"], min_length=1)
    """Which ONNX files the bundle holds; fp32 is always among them. fp16 is half as large, for GPUs and browsers.
    int8 is a quarter as large and faster on CPUs; several ways are tried on the queries of `evaluate`."""
    max_ndcg_loss: float = Field(default=0.005, gt=0, lt=1)
    """Share of nDCG@10 at full width that int8 may lose against fp32. Where it surely loses more, or too few queries
    can tell, no int8 file is written."""
    opset: Literal[18, 20, 21, 22, 23] = 18
    """ONNX operator set."""
    average_with_base: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the base model's weights in the model that is evaluated, written to model/ and exported, the rest is
    tuned: less is forgotten and less is learnt (Wortsman et al., 2022). 0 = tuned weights alone."""
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
    launch: Launch | None = None
    """Where it runs, for `nestling launch`; null = each target's defaults."""

    @model_validator(mode="after")
    def _gates_can_be_measured(self) -> "RunConfig":
        for gate in self.evaluate.gate if self.evaluate else ():
            if gate.dim is not None and gate.dim not in (self.loss.dims or []):
                raise ValueError(f"evaluate.gate: got dim {gate.dim}, allowed: one of loss.dims {self.loss.dims or []}")
            stored = ["float32", *(self.evaluate.vectors if self.evaluate and gate.set == "domain" else ())]
            if gate.vectors not in stored:
                allowed = " or ".join(dict.fromkeys(stored))
                raise ValueError(f"evaluate.gate: got vectors {gate.vectors} of the set {gate.set}, allowed: {allowed}")
        return self

    @model_validator(mode="after")
    def _int8_can_be_judged(self) -> "RunConfig":
        if self.export and "int8" in self.export.precisions and not self.evaluate:
            raise ValueError("export.precisions: int8 is judged on the queries of evaluate, got none; add evaluate")
        return self

    @model_validator(mode="after")
    def _only_in_the_exact_step(self) -> "RunConfig":
        given = {
            "data.epoch_steps": self.data.epoch_steps,
            "data.sources[].epoch_rows": any(source.epoch_rows for source in self.data.sources),
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

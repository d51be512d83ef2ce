"""The run's config, continued: what the tuned model is judged by."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from launch.config_data import PlainSource, Section

Metric = Literal["ndcg@10", "mrr@10", "recall@10", "recall@100", "map@100"]
Vectors = Literal["float32", "int8", "binary"]
PASSED = "passed"  # outcome of a gate
BATCH_TOKENS = 4096  # rows x longest of what is embedded together; 8,192 took 20 % longer on a CPU


class RetrievalData(Section):
    """Queries, the corpus that is searched, and which of it answers them. Exactly one of sources and beir is given."""

    sources: Annotated[list[PlainSource], Field(min_length=1)] | None = None
    """Held-out pairs: distinct anchors are queries, distinct positives are the corpus that is searched."""
    beir: str | None = None
    """Folder in BEIR's form: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."""
    split: str = "test"
    """Which judgements of a BEIR folder are read."""
    max_queries: Annotated[int, Field(ge=1)] | None = 1000
    """Queries drawn (seeded); the corpus always stays whole. null = all."""
    max_documents: Annotated[int, Field(ge=1)] | None = None
    """Size that the corpus is drawn down to, relevant passages first; null = whole. Smaller is easier."""

    @model_validator(mode="after")
    def _one_origin(self) -> "RetrievalData":
        if (self.sources is None) == (self.beir is None):
            raise ValueError("give exactly one of sources and beir")
        return self


class Gate(Section):
    """What must surely hold of the tuned model: the end of the paired 95 % interval is looked at, not the point."""

    set: Literal["domain", "general"] = "domain"
    """Which retrieval set: evaluate's own, or evaluate.general."""
    metric: Metric = "ndcg@10"
    """Which metric."""
    dim: Annotated[int, Field(ge=1)] | None = None
    """One of loss.dims; null = full width."""
    vectors: Vectors = "float32"
    """How vectors are stored; with int8 and binary only `keeps` can be asked for."""
    gain: float | None = None
    """Tuned minus base is above this. 0 = better, and then p below 0.05 after correction too; -0.01 = loses less."""
    keeps: Annotated[float, Field(gt=0, le=1)] | None = None
    """At least this share of what the tuned model has at full width in float32."""

    @model_validator(mode="after")
    def _one_demand(self) -> "Gate":
        if (self.gain is None) == (self.keeps is None):
            raise ValueError("give exactly one of gain and keeps")
        if self.gain is not None and self.vectors != "float32":
            raise ValueError(f"gain: base and tuned are compared in float32 only, got vectors {self.vectors}")
        return self


def gate_line(outcome: Mapping[str, Any]) -> str:
    """An entry of `gates` in evaluation.json as people read it."""
    return f"gate {outcome['outcome']}: {outcome['gate']}: {outcome['found']}"


def unmet(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each gate that did not pass."""
    return [gate_line(outcome) for outcome in outcomes if outcome["outcome"] != PASSED]


class Evaluate(RetrievalData):
    """Retrieval evaluation of the base model and the tuned one after training, and on the way."""

    batch_tokens: int = Field(default=BATCH_TOKENS, ge=1)
    """Texts that are embedded together: rows x longest length stays below this."""
    vectors: list[Vectors] = Field(default=["float32", "int8", "binary"], min_length=1)
    """How vectors are stored; float32 is always among them. int8 is searched as it is, binary (1 bit a dim) by Hamming
    distance, the nearest of which int8 vectors rank again."""
    general: RetrievalData | None = None
    """A second set, of what the base model was good at: shows what it forgot. null = none."""
    averages: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] | None = None
    """Shares of the base model's weights at which the average of base and tuned weights is evaluated too."""
    gate: list[Gate] = []
    """What must hold; where it does not, or too few queries can tell, the run ends with exit code 3."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two evaluations during training, on a subset that is drawn once; null = none."""
    subset_queries: int = Field(default=200, ge=1)
    """Queries of that subset."""
    subset_documents: int = Field(default=2000, ge=2)
    """Documents of that subset, relevant ones first."""
    best: Metric | None = None
    """The checkpoint with the highest value of this metric at full width on the subset is kept and becomes the tuned
    model; null = the last step does."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Training stops after this many evaluations without a higher value of `best`; null = it never stops early."""
    loss_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two looks at the loss of the held-out pairs during training, without dropout; null = none. For
    the exact step."""
    loss_batch_size: Annotated[int, Field(ge=2)] | None = None
    """Rows that are scored against each other for that loss, in the order of the sources; rows that do not fill a
    batch are left out. null = train.global_batch_size, so that it compares with the training loss."""

    @model_validator(mode="after")
    def _goes_together(self) -> "Evaluate":
        if self.best and not self.every:
            raise ValueError("best: needs evaluations during training; set evaluate.every")
        if self.patience and not self.best:
            raise ValueError("patience: counts evaluations without a better one; set evaluate.best")
        if self.loss_every and self.sources is None:
            raise ValueError("loss_every: needs held-out pairs, which only evaluate.sources gives")
        if any(gate.set == "general" for gate in self.gate) and not self.general:
            raise ValueError("gate: asks for the set general, and evaluate.general is null")
        return self

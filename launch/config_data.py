"""The run's config, continued: where rows come from. `Section` is the base of every part of launch/config.py."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ROLE = re.compile(r"anchor|positive|negative(_[1-9][0-9]*)?|score|label")
STORE_URL = re.compile(r"(s3|gs|az)://[^/\s@]+(/\S*[^/\s])?")
FOLDER_URL = re.compile(r"file:///\S*[^/\s]")


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


def store_url(url: str, with_folders: bool = False) -> str:
    """Raises ValueError for what is no address in an object store, or, `with_folders`, of a folder file:///..."""
    if not (STORE_URL.fullmatch(url) or (with_folders and FOLDER_URL.fullmatch(url))):
        also = ", file:///FOLDER" if with_folders else ""
        shown = re.sub("//.*@", "//...@", url)  # before an @ people write passwords
        raise ValueError(f"got {shown!r}, allowed: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX{also}")
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
        return store_url(path) if path and "://" in path else path

    @property
    def url(self) -> str | None:
        """Its address in an object store, None for what is local or on the hub."""
        return self.path if self.path and "://" in self.path else None

    @property
    def name(self) -> str:
        """What messages call this source."""
        return self.path or f"hub:{self.hub}"


class Source(PlainSource):
    """Rows that the model is trained on; weight, epoch_rows and prompts are for the exact step only."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of an epoch's global batches that come from this source, relative to the other weights; all sources
    have one or none has. It goes on through its rows over epochs: none comes again before all have come."""
    epoch_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of an epoch that come from this source at most, in whole global batches; the next epoch goes on with its
    others. For sources without weights, which say the share themselves. null = all."""
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
        return url and store_url(url)

    @model_validator(mode="after")
    def _weights_go_with_steps(self) -> "Data":
        without = [source.name for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"{without[0]} has no weight and others have; give every source one, or none")
        if not without and (capped := [source.name for source in self.sources if source.epoch_rows]):
            raise ValueError(
                f"{capped[0]} has a weight and epoch_rows; its weight and epoch_steps say how much is read"
            )
        if bool(without) == (self.epoch_steps is not None):
            got = "epoch_steps without weights" if without else "weights without epoch_steps"
            raise ValueError(f"got {got}; allowed: a weight for every source and epoch_steps, or neither")
        return self

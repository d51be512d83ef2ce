"""The config of `nestling data run`: where documents and pairs come from, and what is done to them, stage by stage."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from launch.config_data import PlainSource, Section

ROLES = ("anchor", "positive", "id", "title", "text")
Share = Annotated[float, Field(ge=0, le=1)]


class CorpusSource(PlainSource):
    """Documents or pairs of one file, folder or data set."""

    path: str | None = None
    """.jsonl[.gz|.zst], .csv, .tsv or .parquet file, a folder with .txt, .md, .html, .rst or (docstring-function) .py
    files, a BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv), a folder of shards, a data set that Hugging
    Face datasets saved on disk, or package:NAME, the Python files of an installed package (package:stdlib: of the
    standard library; its licence is what its metadata says); a file or a folder of shards may lie in an object store
    (s3://, gs://, az://)."""
    split: str = "train"
    """Split of a data set from the hub or of a saved DatasetDict; of a BEIR folder (there without it: test)."""
    columns: dict[str, str] | None = None
    """Which column plays which role: anchor and positive (pairs: given), title and text (the others), id (names the
    document that a row belongs to). null = the columns are named by roles."""
    pairs: Literal["given", "title-body", "question-answer", "heading-section", "docstring-function"] = "given"
    """given: the columns anchor and positive. title-body: the title against the text. question-answer: questions of a
    FAQ (headings or lines that end in a question mark, Q:/A: lines) against what follows. heading-section: the headings
    above a section against it. docstring-function: the summary of a Python function against its code."""
    held_out: bool | None = None
    """true: all of it is held out; false: none of it; null = documents are drawn by split.held_out."""

    @field_validator("columns")
    @classmethod
    def _roles_exist(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        for role in columns or {}:
            if role not in ROLES:
                raise ValueError(f"{role!r} is no role here; allowed: {', '.join(ROLES)}")
        return columns


class Read(Section):
    """What is refused while reading."""

    max_row_bytes: Annotated[int, Field(ge=1)] = 4_000_000
    """Bytes of the longest line, cell or file that is taken; longer ones are rejected."""
    max_rejected: Share = 0.01
    """Share of all rows and files that may be rejected before the stage fails."""


class Chunk(Section):
    """How long texts are cut."""

    tokenizer: str
    """Folder of the model (its tokenizer.json counts the tokens), that file, or `package:PACKAGE/FOLDER`."""
    max_tokens: Annotated[int, Field(ge=8)] = 256
    """Tokens of the longest positive, special tokens included. Cut at headings, paragraphs and code blocks first."""


class Filter(Section):
    """Which pairs are left out one by one."""

    min_chars: Annotated[int, Field(ge=1)] = 10
    """Characters of the shortest positive that is kept."""
    max_chars: Annotated[int, Field(ge=1)] = 20_000
    """Characters of the longest positive that is kept."""
    languages: Annotated[list[str], Field(min_length=1)] | None = None
    """ISO 639-1 codes of the languages that are kept, for example [en, de]; null = all. Texts of fewer than 40
    characters are kept: no detector is sure of them."""
    boilerplate: bool = True
    """Leave out positives that are mostly repeated lines, symbols, notices of cookies, rights and scripts."""


class Dedup(Section):
    """Which pairs are copies of an earlier one."""

    near: Annotated[float, Field(ge=0.5, le=1)] | None = 0.8
    """Jaccard similarity of 5-word runs from which two positives are near-copies and the later one is left out
    (MinHash); equal positives with different anchors stay, the loss masks them. null = only equal pairs go."""


class Split(Section):
    """What is held out."""

    held_out: Share = 0.02
    """Share of the documents, with all their near-copies; 0 = none. What is held out stays so as data grows."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 42
    """Draws the documents."""


class Decontaminate(Section):
    """What training pairs must not share with evaluation sets; the held-out side always counts as one."""

    against: list[CorpusSource] = Field(default_factory=list)
    """Evaluation sets: BEIR folders (queries and their relevant documents), or any source of pairs."""
    ngram: Annotated[int, Field(ge=5)] = 13
    """Words in a row that a training text may not share with a text of an evaluation set."""
    near: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of 5-word runs from which a training text is a near-copy, found exactly."""


class Pipeline(Section):
    """From sources to shards."""

    out: str
    """Folder for everything that is written: train/, held_out/, card.md, rejects.jsonl, leaks.jsonl, stages/."""
    sources: list[CorpusSource] = Field(min_length=1)
    """Where documents and pairs come from, in this order; of copies the first is kept."""
    read: Read = Read()
    chunk: Chunk | None = None
    filter: Filter = Filter()
    dedup: Dedup = Dedup()
    split: Split = Split()
    decontaminate: Decontaminate = Decontaminate()
    workers: Annotated[int, Field(ge=1)] = 2
    """Processes that work at the same time; changes no byte of the result."""
    executor: Literal["local", "ray"] = "local"
    """What runs the tasks of a stage: processes of this machine, or a Ray cluster that sees `out` and the sources."""

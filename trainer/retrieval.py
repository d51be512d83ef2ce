"""Retrieval sets: queries, the documents that are searched, and which of them answer which query.

From held-out pairs, from a folder in BEIR's form, or from JSON lines with a query and its relevant passages.
"""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launch.config_data import PlainSource
from launch.config_evaluate import RetrievalData
from launch.errors import UserError
from launch.rows import kind_of, read_text
from trainer.data import open_sources


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, the documents that are searched, and the grade (1 and more) of those that answer a query by index."""

    queries: list[str]
    documents: list[str]
    relevant: list[dict[int, int]]
    name: str = "evaluate.sources"  # what messages call it

    def __post_init__(self) -> None:
        if not self.queries:
            raise UserError(f"{self.name}: no rows, so no queries; give held-out rows with anchor and positive")
        if len(self.documents) < 2:
            raise UserError(
                f"{self.name}: got {len(self.documents)} distinct document(s), allowed: at least 2, because a search "
                "in one document always finds it; give more held-out rows"
            )
        for query, documents in zip(self.queries, self.relevant, strict=True):
            if not documents or not all(0 <= d < len(self.documents) for d in documents):
                raise UserError(f"{self.name}: query {query[:80]!r} has no relevant document in the corpus")

    @property
    def fingerprint(self) -> str:
        """sha256 of texts and judgements in their order: what was judged on what."""
        digest = hashlib.sha256()
        for text in (*self.queries, *self.documents):
            digest.update(f"{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
        digest.update(repr([sorted(grades.items()) for grades in self.relevant]).encode())
        return digest.hexdigest()

    def draw(self, queries: int | None, documents: int | None, seed: int, skip: int = 0) -> "RetrievalSet":
        """At most so many queries and documents, None = all, in an order that follows a hash keyed by `seed`.

        The order of rows changes nothing. The first `skip` queries of that order are left out. Documents that answer a
        drawn query stay, others fill up. Raises UserError if the relevant ones alone are more than `documents`.
        """
        key = seed.to_bytes(16, "little", signed=True)

        def place(text: str) -> bytes:
            return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=16).digest()

        places = [place(text) for text in self.documents]
        order = sorted(range(len(self.queries)), key=lambda i: place(self.queries[i]))
        drawn = order[skip:][:queries]
        kept = set().union(*(self.relevant[i] for i in drawn))
        if documents is not None:
            if len(kept) > documents:
                raise UserError(
                    f"{self.name}: max_documents is {documents}, but {len(drawn)} queries have {len(kept)} relevant "
                    f"documents; allowed: at least {len(kept)}, or lower max_queries"
                )
            others = sorted(set(range(len(self.documents))) - kept, key=lambda d: places[d])
            kept.update(others[: documents - len(kept)])
        else:
            kept = set(range(len(self.documents)))
        searched = sorted(kept, key=lambda d: places[d])
        index = {d: place for place, d in enumerate(searched)}
        return dataclasses.replace(
            self,
            queries=[self.queries[i] for i in drawn],
            documents=[self.documents[d] for d in searched],
            relevant=[{index[d]: grade for d, grade in self.relevant[i].items()} for i in drawn],
        )


def retrieval_set(
    rows: Iterable[Mapping[str, Any]],
    max_queries: int | None = None,
    max_documents: int | None = None,
    seed: int = 0,
    name: str = "evaluate.sources",
) -> RetrievalSet:
    """Distinct anchors are queries, distinct positives documents; all positives of an anchor are relevant.

    Drawn as RetrievalSet.draw does. Raises UserError if there is no row or a row lacks a text.
    """
    answers: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows, 1):
        anchor, positive = row.get("anchor"), row.get("positive")
        if not isinstance(anchor, str) or not isinstance(positive, str):
            raise UserError(
                f"{name}: row {number} needs a text as anchor and as positive, got texts in "
                f"{', '.join(k for k, v in row.items() if isinstance(v, str)) or 'no column'}; "
                "set columns of the source"
            )
        answers.setdefault(anchor, {})[positive] = 1
    index: dict[str, int] = {}
    relevant = [{index.setdefault(text, len(index)): 1 for text in texts} for texts in answers.values()]
    return RetrievalSet(list(answers), list(index), relevant, name).draw(max_queries, max_documents, seed)


def read_beir(folder: Path, split: str = "test") -> RetrievalSet:
    """A folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv; title and text are joined by a space.

    Queries that this split does not judge are left out, and with a warning those that it gives no relevant document.
    Raises UserError for a missing file, an identifier that stands there twice, or one that does not exist.
    """
    documents = dict(_texts(folder / "corpus.jsonl"))
    queries = dict(_texts(folder / "queries.jsonl"))
    judgements = folder / "qrels" / f"{split}.tsv"
    if not judgements.is_file():
        found = ", ".join(sorted(file.stem for file in judgements.parent.glob("*.tsv"))) or "none"
        raise UserError(f"{judgements}: no such file; allowed splits: {found}")
    index = {identifier: place for place, identifier in enumerate(documents)}
    grades: dict[str, dict[int, int]] = {}
    for line, row in _rows(judgements):
        query, document = row.get("query-id", ""), row.get("corpus-id", "")
        for identifier, known, file in ((query, queries, "queries.jsonl"), (document, index, "corpus.jsonl")):
            if identifier not in known:
                raise UserError(
                    f"{judgements}:{line}: {identifier!r} is not in {folder / file}; columns of this file "
                    "are query-id, corpus-id and score"
                )
        if index[document] in grades.setdefault(query, {}):
            raise UserError(f"{judgements}:{line}: {query!r} and {document!r} are judged twice, allowed: once")
        if not re.fullmatch(r"-?[0-9]+", row.get("score", "")):
            raise UserError(f"{judgements}:{line}: score {row.get('score')!r} is no whole number")
        grades[query][index[document]] = int(row["score"])
    relevant = {query: {d: g for d, g in found.items() if g > 0} for query, found in grades.items()}
    without = [query for query, found in relevant.items() if not found]
    if without:
        logging.getLogger("nestling").warning(
            "%s: %d of %d queries have no relevant document and are left out, first %r",
            judgements,
            len(without),
            len(relevant),
            without[0],
        )
    judged = [query for query, found in relevant.items() if found]
    texts = [queries[query] for query in judged]
    return RetrievalSet(texts, list(documents.values()), [relevant[query] for query in judged], str(folder))


def read_judged(file: Path) -> RetrievalSet:
    """JSON lines with `query` and `relevant`, one text or a list of texts; the corpus is all of them together."""

    def pairs() -> Iterator[dict[str, Any]]:
        for line, row in _rows(file):
            relevant = row.get("relevant")
            relevant = [relevant] if isinstance(relevant, str) else relevant
            texts = [row.get("query"), *relevant] if isinstance(relevant, list) else []
            if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
                raise UserError(f"{file}:{line}: allowed: query, a text, and relevant, one text or more; none empty")
            yield from ({"anchor": texts[0], "positive": text} for text in texts[1:])

    return retrieval_set(pairs(), name=str(file))


def open_retrieval(data: RetrievalData, cache_dir: Path, seed: int, key: str = "evaluate") -> RetrievalSet:
    """The whole set that a run file names, in the order of its draw with `seed`, before anything is left out."""
    if data.beir is not None:
        return read_beir(Path(data.beir), data.split).draw(None, None, seed)
    rows, _ = open_sources(data.sources or [], cache_dir)
    return retrieval_set(rows, seed=seed, name=f"{key}.sources")


def open_path(path: Path, split: str, columns: dict[str, str] | None, cache_dir: Path) -> RetrievalSet:
    """The set that a path of the command line names: BEIR folder, JSON lines with query, or any source of pairs."""
    if (path / "corpus.jsonl").is_file():
        return read_beir(path, split)
    if path.is_file() and kind_of(path) == ".jsonl" and "query" in next(_rows(path), (0, {}))[1] and not columns:
        return read_judged(path)
    try:
        source = PlainSource(path=str(path), split=split, columns=columns)
    except ValidationError as error:
        raise UserError(f"--columns: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    rows, _ = open_sources([source], cache_dir)
    return retrieval_set(rows, name=str(path))


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """(identifier, text) of each row of corpus.jsonl or queries.jsonl."""
    known: set[str] = set()
    for line, row in _rows(file):
        identifier, text = row.get("_id"), row.get("text")
        if not isinstance(identifier, str) or not isinstance(text, str):
            raise UserError(f"{file}:{line}: needs texts _id and text, got {', '.join(row)}")
        if identifier in known:
            raise UserError(f"{file}:{line}: identifier {identifier!r} stands there twice, allowed: once")
        known.add(identifier)
        yield identifier, f"{row.get('title') or ''} {text}".strip()
    if not known:
        raise UserError(f"{file}: no row; allowed: at least one")


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a text file; a line that cannot be read is a UserError."""
    kind_of(file)
    for line, row in read_text(file, lambda columns: columns):
        if isinstance(row, str):
            raise UserError(f"{file}:{line}: {row}")
        yield line, row

"""Training pairs and evaluation sets kept apart: the stages `split` and `decontaminate`.

A document is held out if its own draw, or that of any document that it belongs to, falls below the share; documents
belong together where more than half of the texts of one are near-copies of texts of the other. Draws depend on the
document and the seed alone, so what is held out stays so when data is added behind.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.chunk import PAIR
from data_tools.runner import Output
from data_tools.split import NearCopies, forms, hash_of, word_runs

SIDED = {**PAIR, "held_out": "bool"}
_SHOWN = 200  # characters of a text in the list of leaks


def is_drawn(document: int, share: float, seed: int) -> bool:
    """Whether the document with this hash is drawn for the held-out side."""
    return hash_of(f"{seed}/{document}") < share * 2**64


def held_by_joins(joins: np.ndarray, share: float, seed: int) -> frozenset[int]:
    """Documents that are held out with another one: `joins` uint64 [m, 2] are pairs that belong together."""
    parents: dict[int, int] = {}

    def root(document: int) -> int:
        while (parent := parents.setdefault(document, document)) != document:
            parents[document] = document = parents[parent]
        return document

    for one, other in joins.tolist():
        parents[root(one)] = root(other)
    drawn = {root(document) for document in list(parents) if is_drawn(document, share, seed)}
    return frozenset(document for document in list(parents) if root(document) in drawn)


def split_stage(
    output: Output, part: str, resolved: str, share: float, seed: int, sides: Sequence[bool | None]
) -> None:
    """Rows of PAIR -> rows of SIDED; `sides` says of each source whether all of it is held out, None = drawn."""
    import pyarrow.parquet as pq

    joins = np.fromfile(Path(resolved) / "00000.joins", dtype=np.uint64).reshape(-1, 2)
    held = held_by_joins(joins, share, seed)

    def rows() -> Iterator[dict[str, Any]]:
        for row in pq.read_table(part).to_pylist():
            document, side = hash_of(row["document"]), sides[row["source"]]
            drawn = document in held or is_drawn(document, share, seed)
            yield {**row, "held_out": drawn if side is None else side}

    output.write(rows(), SIDED)


@dataclass(frozen=True)
class Evaluation:
    """Texts that training must not have, looked up three ways; `texts` has (place, text) of each."""

    texts: list[tuple[str, str]]
    equal: dict[str, int]
    runs: dict[str, int]
    near: NearCopies

    @staticmethod
    def of(texts: list[tuple[str, str]], ngram: int, near: float) -> "Evaluation":
        """The look-up of (place, text)."""
        equal: dict[str, int] = {}
        runs: dict[str, int] = {}
        sets = []
        for number, (_, text) in enumerate(texts):
            plain, form = forms(text)
            words = plain.split()
            equal.setdefault(form, number)
            if len(words) >= ngram:
                for run in word_runs(words, ngram):
                    runs.setdefault(run, number)
            sets.append(word_runs(form.split()))
        return Evaluation(texts, equal, runs, NearCopies(sets, near))

    def leak(self, text: str, ngram: int) -> tuple[str, int] | None:
        """Why a text leaks, and the number of the evaluation's text."""
        plain, form = forms(text)
        words = plain.split()
        if (found := self.equal.get(form)) is not None:
            return "equal to a text of an evaluation set", found
        if len(words) >= ngram:
            shared = [self.runs[run] for run in word_runs(words, ngram) if run in self.runs]
            if shared:
                return f"shares {ngram} words in a row with an evaluation set", min(shared)
        if (found := self.near.find(word_runs(form.split()))) is not None:
            return "near-copy of a text of an evaluation set", found
        return None


@lru_cache(maxsize=1)  # the tasks of one process ask for the same; its paths may hold other texts in the next run
def read_evaluation(parts: tuple[str, ...], sided: tuple[str, ...], ngram: int, near: float) -> Evaluation:
    import pyarrow.parquet as pq

    texts: dict[str, str] = {}  # text -> place: one anchor may stand in many rows
    for path in parts:
        for row in pq.read_table(path, columns=["place", "title", "text"]).to_pylist():
            texts.setdefault(row["title"], row["place"])
            texts.setdefault(row["text"], row["place"])
    for path in sided:
        rows = pq.read_table(path, columns=["place", "anchor", "positive"], filters=[("held_out", "=", True)])
        for row in rows.to_pylist():
            texts.setdefault(row["anchor"], f"held_out: {row['place']}")
            texts.setdefault(row["positive"], f"held_out: {row['place']}")
    return Evaluation.of([(place, text) for text, place in texts.items()], ngram, near)


def decontaminate_stage(
    output: Output, part: str, evaluation: Sequence[str], sided: Sequence[str], ngram: int, near: float
) -> None:
    """Rows of SIDED without the training rows that an evaluation set or the held-out side has; leaks.jsonl lists them.

    `evaluation` are parts of DOCUMENT rows, `sided` all parts that `split` wrote. Memory grows with the evaluation
    sets and the held-out side, not with the corpus.
    """
    import pyarrow.parquet as pq

    against = read_evaluation(tuple(evaluation), tuple(sided), ngram, near)
    leaks: list[dict[str, str]] = []
    kinds = Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for row in pq.read_table(part).to_pylist():
            found = None
            if not row["held_out"]:
                for role in ("anchor", "positive"):
                    if found := against.leak(row[role], ngram):
                        why, number = found
                        place, text = against.texts[number]
                        mine = {"place": row["place"], "role": role, "text": row[role][:_SHOWN]}
                        leaks.append({"reason": why, **mine, "against": place, "evaluation_text": text[:_SHOWN]})
                        kinds[why] += 1
                        break
            if not found:
                yield row

    output.write(rows(), SIDED)
    output.counts.update(kinds)
    output.note("leaks.jsonl", leaks)

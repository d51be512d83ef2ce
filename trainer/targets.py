"""What a step scores: which lines meet which distinct texts of the batch, how often, and what is left out.

A line is an anchor together with what all rows that share it have in common. With query_to_doc alone that is a distinct
anchor; other directions and hardness tell rows with equal anchors apart, so there a line is a row. A block scores the
lines' anchors or positives against all anchors or all candidates of the batch, as sentence-transformers names them:

| direction | row (anchor a, positive p), candidates of the row | left out of the denominator by masks |
|---|---|---|
| query_to_doc | a against all candidates | candidates but p itself whose text is in P(a) or is a's own |
| doc_to_query | p against all anchors | other anchors a' with p in P(a') |
| query_to_query | a against all anchors but itself | anchors with a's text, or whose P meets P(a) |
| doc_to_doc | p against all candidates of other rows | candidates in P(a) |

P(a) holds the texts of all positives that the batch, or a table of known positives, has for the text of a.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

Direction = Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
Pairs = tuple[np.ndarray, np.ndarray]
Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # line, column, count


@dataclass(frozen=True)
class Scoring:
    """Directions, softmax and hardness of the loss, by the names of sentence-transformers."""

    directions: tuple[Direction, ...] = ("query_to_doc",)
    partition_mode: Literal["joint", "per_direction"] = "joint"  # one softmax over all directions, or one each
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None
    hardness_strength: float = 0.0

    @property
    def by_row(self) -> bool:
        """Whether rows with equal anchors score apart, and every rank needs the anchors of all ranks."""
        return self.directions != ("query_to_doc",) or self.hardness_mode is not None


@dataclass(frozen=True)
class Table:
    """Sparse entries (line, column, count) by line: those of line i lie at start[i]:start[i + 1]."""

    start: np.ndarray  # int64 [lines + 1]
    column: np.ndarray  # int64 [entries], a text over all ranks
    count: np.ndarray  # int64 [entries]

    def part(self, first: int, end: int) -> "Table":
        """The lines first:end."""
        start = self.start[first : end + 1]
        entries = slice(start[0], start[-1])
        return Table(start - start[0], self.column[entries], self.count[entries])

    def entries(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Line (from 0), column and count of each entry of the lines first:end."""
        part = self.part(first, end)
        return np.repeat(np.arange(end - first), np.diff(part.start)), part.column, part.count


@dataclass(frozen=True)
class Block:
    """The lines' anchors or positives against all texts of one role."""

    from_anchors: bool
    to_anchors: bool
    count: np.ndarray  # int64 [columns]: times that the batch holds the text; 0 = filler
    changed: Table | None  # entries with another count for this line; 0 = left out


@dataclass(frozen=True)
class Targets:
    """What one rank scores."""

    anchor: np.ndarray  # int64 [lines]: the line's anchor, among those of this rank, of all ranks if by_row
    positives: Table  # candidates, count = rows that hold the line's anchor with this positive
    blocks: Sequence[Block]  # the first is query_to_doc
    positive_apart: bool  # a row's own positive is not among the entries of the first block
    own_negatives: Table | None  # candidates that join the first block with another hardness than its entries
    row_weight: float  # world_size / global_batch_size: the mean over ranks is then the mean over rows

    def part(self, first: int, end: int) -> "Targets":
        """The lines first:end."""
        return replace(
            self,
            anchor=self.anchor[first:end],
            positives=self.positives.part(first, end),
            blocks=[replace(b, changed=b.changed and b.changed.part(first, end)) for b in self.blocks],
            own_negatives=self.own_negatives and self.own_negatives.part(first, end),
        )


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, their texts as places: anchors and candidates of all ranks, numbered rank by rank."""

    anchor: np.ndarray  # int64 [rows]
    positive: np.ndarray  # int64 [rows]
    row: np.ndarray  # int64 [entries]: row of each candidate that a row holds, its positive first
    candidate: np.ndarray  # int64 [entries]
    anchor_count: np.ndarray  # int64 [anchors]: rows that hold the anchor; 0 = filler
    candidate_count: np.ndarray  # int64 [candidates]


class Fits:
    """What is right for what, as far as the batch and a table of known positives say; pairs of places, sorted.

    The model cannot tell apart what has equal tokens (cut at the maximal length), so a place has all of its texts and
    one that fits is enough.
    """

    def __init__(self, rows: Rows, anchor_text: np.ndarray, candidate_text: np.ndarray, known: Pairs | None) -> None:
        """`anchor_text` [rows] and `candidate_text` [entries] are text_ids; `known` (anchors', positives' text_ids)."""
        known = known or (anchor_text[:0], anchor_text[:0])
        parts = [anchor_text, candidate_text, known[0], known[1]]
        text = np.unique(np.concatenate(parts), return_inverse=True)[1]
        anchor, candidate, known_anchor, known_positive = np.split(text, np.cumsum([len(part) for part in parts[:-1]]))
        first = np.searchsorted(rows.row, np.arange(len(rows.anchor)))
        self._positives = unique_pairs(
            np.concatenate([anchor, known_anchor]), np.concatenate([candidate[first], known_positive])
        )[:2]
        self._same = anchor, anchor
        self._anchors = unique_pairs(rows.anchor, anchor)[:2]  # (place, text)
        self._candidates = unique_pairs(candidate, rows.candidate)[:2]  # (text, place)
        # (anchor, candidate): the candidate is in P(a) or is the anchor's own text.
        self.candidates = self._related(_both(self._positives, self._same))

    def _related(self, texts: Pairs) -> Pairs:
        return _compose(_compose(self._anchors, texts), self._candidates)

    @cached_property
    def positives(self) -> Pairs:
        """(anchor, candidate): the candidate is in P(a)."""
        return self._related(self._positives)

    def anchors(self) -> Pairs:
        """(anchor, anchor): they have a text or a positive in common."""
        texts = _both(_compose(self._positives, _turned(self._positives)), self._same)
        return _compose(_compose(self._anchors, texts), _turned(self._anchors))


def make_targets(rows: Rows, fits: Fits | None, scoring: Scoring, row_weight: float) -> Targets:
    """Targets of all ranks; `fits` None = masks are off. Lines are rows if scoring.by_row, else places of anchors."""
    if not scoring.by_row:
        lines = len(rows.anchor_count)
        hidden = fits and _least([(*fits.candidates, np.zeros_like(fits.candidates[0]))], lines)
        return Targets(
            anchor=np.arange(lines),
            positives=_counted(rows.anchor, rows.positive, lines),
            blocks=[Block(True, False, rows.candidate_count, hidden)],
            positive_apart=fits is not None,
            own_negatives=None,
            row_weight=row_weight,
        )
    lines = len(rows.anchor)
    number = np.arange(lines)
    own = _own_negatives(rows, fits, scoring)
    blocks = []
    for direction in dict.fromkeys(("query_to_doc", *scoring.directions)):
        to_anchors = direction.endswith("query")
        count = rows.anchor_count if to_anchors else rows.candidate_count
        changed = [_apart(taken, count)] if (taken := _taken(direction, rows, own)) else []
        if fits:
            changed.append(_hidden(direction, rows, fits))
        blocks.append(Block(direction.startswith("query"), to_anchors, count, _least(changed, lines)))
    return Targets(
        anchor=rows.anchor,
        positives=_counted(number, rows.positive, lines),
        blocks=blocks,
        positive_apart=True,
        own_negatives=_counted(*own, lines) if len(own[0]) else None,
        row_weight=row_weight,
    )


def _taken(direction: Direction, rows: Rows, own: Pairs) -> Pairs | None:
    """(row, text) that a row does not score among its entries, or scores apart; one entry each time it is held."""
    number = np.arange(len(rows.anchor))
    match direction:
        case "query_to_doc":
            return np.concatenate([number, own[0]]), np.concatenate([rows.positive, own[1]])
        case "doc_to_query":  # the own anchor stays
            return None
        case "query_to_query":
            return number, rows.anchor
        case "doc_to_doc":
            return rows.row, rows.candidate


def _apart(taken: Pairs, count: np.ndarray) -> Entries:
    line, column, times = unique_pairs(*taken)
    return line, column, count[column] - times


def _hidden(direction: Direction, rows: Rows, fits: Fits) -> Entries:
    """(row, text) with the count that masks leave of it."""
    match direction:
        case "query_to_doc":
            line, column = join(rows.anchor, fits.candidates)
        case "doc_to_query":
            line, column = join(rows.positive, _turned(fits.positives))
            return line, column, (column == rows.anchor[line]).astype(np.int64)  # the own anchor stays, once
        case "query_to_query":
            line, column = join(rows.anchor, fits.anchors())
        case "doc_to_doc":
            line, column = join(rows.anchor, fits.positives)
    return line, column, np.zeros_like(line)


def _own_negatives(rows: Rows, fits: Fits | None, scoring: Scoring) -> Pairs:
    """(row, candidate) of hard negatives whose hardness is not that of the first block's other entries."""
    negative = np.ones(len(rows.row), bool)
    negative[np.searchsorted(rows.row, np.arange(len(rows.anchor)))] = False
    if scoring.hardness_mode not in ("in_batch_negatives", "hard_negatives"):
        negative[:] = False
    row, candidate = rows.row[negative], rows.candidate[negative]
    if fits:
        width = len(rows.candidate_count)
        anchor, hidden = fits.candidates
        stays = ~np.isin(rows.anchor[row] * width + candidate, anchor * width + hidden)
        row, candidate = row[stays], candidate[stays]
    return row, candidate


def unique_pairs(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct pairs of small non-negative integers, sorted, and how often each occurs."""
    width = int(right.max(initial=0)) + 1
    pairs, count = np.unique(left * width + right, return_counts=True)
    return pairs // width, pairs % width, count


def _both(a: Pairs, b: Pairs) -> Pairs:
    return unique_pairs(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))[:2]


def _turned(pairs: Pairs) -> Pairs:
    return unique_pairs(pairs[1], pairs[0])[:2]


def _compose(first: Pairs, second: Pairs) -> Pairs:
    """Distinct (x, z) with (x, y) in `first` and (y, z) in `second`, which is sorted."""
    i, z = join(first[1], second)
    return unique_pairs(first[0][i], z)[:2]


def join(keys: np.ndarray, pairs: Pairs) -> Pairs:
    """All (i, z) with (keys[i], z) in `pairs`, which is sorted; by i."""
    begin = np.searchsorted(pairs[0], keys)
    matches = np.searchsorted(pairs[0], keys, side="right") - begin
    i = np.repeat(np.arange(len(keys)), matches)
    within = np.arange(len(i)) - np.repeat(np.cumsum(matches) - matches, matches)
    return i, pairs[1][begin[i] + within]


def _counted(line: np.ndarray, column: np.ndarray, lines: int) -> Table:
    """Count equal pairs and index them by line."""
    line, column, count = unique_pairs(line, column)
    return Table(np.searchsorted(line, np.arange(lines + 1)), column, count)


def _least(entries: Sequence[Entries], lines: int) -> Table | None:
    """The least count of each (line, column) as a table; None without entries."""
    if not entries:
        return None
    line, column, count = map(np.concatenate, zip(*entries, strict=True))
    order = np.lexsort((count, column, line))
    line, column, count = line[order], column[order], count[order]
    first = np.ones(len(line), bool)
    first[1:] = (np.diff(line) != 0) | (np.diff(column) != 0)
    return Table(np.searchsorted(line[first], np.arange(lines + 1)), column[first], count[first])

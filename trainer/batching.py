"""The plan of a step: which rank embeds which distinct text in which micro-batch, and what is scored.

Every rank makes the same plan from the same identities and lengths, without talking. The distinct texts
of each role are sorted by length and dealt in stripes of world_size texts, one per rank; a dynamic programme
over the stripes cuts micro-batches. So all ranks run equally many micro-batches of nearly the same shape.

A text is named by its number in the batch, row * columns + column. A rank embeds one text per slot; a slot
has the same role on every rank. Anchors and candidates of all ranks are numbered rank by rank, slot by slot.
"""

from dataclasses import dataclass

import numpy as np

# What starting one more micro-batch costs, in padded tokens of encoder time.
_OVERHEAD_TOKENS = 256
# Places where a full micro-batch may be cut: more save no padding, fewer would cost some.
_CUTS_PER_MICRO_BATCH = 24


@dataclass(frozen=True)
class Table:
    """Sparse entries (anchor, candidate, count) by anchor: those of anchor a lie at start[a]:start[a + 1]."""

    start: np.ndarray  # int64 [anchors + 1]
    candidate: np.ndarray  # int64 [entries], a column over all ranks
    count: np.ndarray  # int64 [entries]

    def of_rank(self, rank: int, anchors: int) -> "Table":
        """The part of a rank that scores `anchors` anchors."""
        start = self.start[rank * anchors : (rank + 1) * anchors + 1]
        part = slice(start[0], start[-1])
        return Table(start - start[0], self.candidate[part], self.count[part])


@dataclass(frozen=True)
class Targets:
    """What one rank scores: distinct anchors that it embeds against distinct candidates of all ranks."""

    anchor_rows: np.ndarray  # int64 [anchors]: rows that hold this anchor; 0 = filler
    candidate_count: np.ndarray  # int64 [candidates]: times that the batch holds it; 0 = filler
    positives: Table  # count = rows that hold this anchor with this positive
    masked: Table | None  # candidates left out of what an anchor's rows share; None = masks are off
    row_weight: float  # world_size / global_batch_size: the mean over ranks is then the mean over rows


@dataclass(frozen=True)
class Plan:
    """One global batch divided over `world_size` ranks."""

    texts: np.ndarray  # int64 [world_size, slots]: number of the text that a rank embeds
    lengths: np.ndarray  # int64 [world_size, slots]: its tokens
    is_anchor: np.ndarray  # bool [slots]
    cuts: np.ndarray  # int64 [micro_batches + 1]: micro-batch m holds slots cuts[m]:cuts[m + 1]
    all_targets: Targets  # of all ranks
    masked_share: float  # of all (row, candidate) entries but the rows' own positives

    @property
    def world_size(self) -> int:
        """Ranks that share the batch."""
        return len(self.texts)

    def micro_batches(self, rank: int) -> list[np.ndarray]:
        """Numbers of the texts in each micro-batch of this rank, longest first."""
        return np.split(self.texts[rank], self.cuts[1:-1])

    def targets(self, rank: int) -> Targets:
        """What this rank scores."""
        whole, anchors = self.all_targets, int(self.is_anchor.sum())
        return Targets(
            whole.anchor_rows[rank * anchors : (rank + 1) * anchors],
            whole.candidate_count,
            whole.positives.of_rank(rank, anchors),
            whole.masked and whole.masked.of_rank(rank, anchors),
            whole.row_weight,
        )

    def tokens(self, rank: int) -> tuple[int, int]:
        """Real and padded tokens of one pass over this rank's share."""
        longest = np.maximum.reduceat(self.lengths[rank], self.cuts[:-1])
        return int(self.lengths[rank].sum()), int(longest @ np.diff(self.cuts))


def make_plan(
    token_ids: np.ndarray,
    text_ids: np.ndarray,
    lengths: np.ndarray,
    *,
    world_size: int,
    micro_batch_tokens: int,
    masks: bool = True,
    separate_roles: bool = False,
) -> Plan:
    """Plan a global batch; all arrays are [rows, columns] of integers, columns anchor, positive, negatives.

    Equal `token_ids` (role and prompt belong to them) are embedded and scored once, equal `text_ids` are one
    text to `masks`, and a length of 0 says that the row has no such negative. A micro-batch keeps rows x
    longest <= micro_batch_tokens or is a single text; with `separate_roles` it holds texts of one role.
    """
    rows, columns = token_ids.shape
    assert columns >= 2 and (lengths[:, :2] > 0).all(), "every row needs an anchor and a positive"
    number = np.arange(rows * columns).reshape(rows, columns)
    here = lengths[:, 1:] > 0

    # Distinct texts of each role, and which of them every row holds.
    anchor_text, anchor = _distinct(token_ids[:, 0], lengths[:, 0], number[:, 0])
    candidate_text, candidate = _distinct(token_ids[:, 1:][here], lengths[:, 1:][here], number[:, 1:][here])
    positive = candidate[np.cumsum(here.sum(1)) - here.sum(1)]

    # Stripes [stripes, world_size] of distinct texts (-1 = filler), longest first, direction alternating.
    anchor_stripes = _stripes(len(anchor_text), world_size)
    candidate_stripes = _stripes(len(candidate_text), world_size)
    distinct = np.concatenate([anchor_stripes, candidate_stripes])
    texts = np.concatenate([anchor_text[anchor_stripes], candidate_text[candidate_stripes]])
    is_anchor = np.arange(len(distinct)) < len(anchor_stripes)
    length = lengths.ravel().astype(np.int64)
    order = np.argsort(-length[texts[:, 0]], kind="stable")
    longest = length[texts[order, 0]]
    for grid in (texts, distinct):
        grid[order[1::2]] = grid[order[1::2], ::-1]

    # Micro-batches are runs of stripes.
    parts = [is_anchor[order], ~is_anchor[order]] if separate_roles else [np.ones(len(order), bool)]
    runs = [run for part in parts for run in _cut(np.flatnonzero(part), longest, micro_batch_tokens)]
    runs.sort(key=lambda run: -longest[run[0]])
    order = order[np.concatenate(runs)]
    texts, distinct, is_anchor = texts[order], distinct[order], is_anchor[order]

    # From distinct texts to their places: anchors and candidates of all ranks in the order of slots.
    anchor_at, anchor_rows = _places(distinct[is_anchor], anchor)
    candidate_at, candidate_count = _places(distinct[~is_anchor], candidate)
    positives = _table(anchor_at[anchor], candidate_at[positive], len(anchor_rows))
    masked, masked_share = None, 0.0
    if masks:
        text = np.unique(text_ids, return_inverse=True)[1].reshape(rows, columns)
        a, c = _masked(text[:, 0], text[:, 1], text[:, 1:][here], anchor, candidate)
        masked = _table(anchor_at[a], candidate_at[c], len(anchor_rows))
        # Each row's own positive is among the entries and stays in its denominator.
        left_out = int(anchor_rows[anchor_at[a]] @ candidate_count[candidate_at[c]]) - rows
        masked_share = left_out / max(1, rows * (len(candidate) - 1))
    return Plan(
        texts=texts.T.copy(),
        lengths=length[texts].T.copy(),
        is_anchor=is_anchor,
        cuts=np.cumsum([0] + [len(run) for run in runs]),
        all_targets=Targets(anchor_rows, candidate_count, positives, masked, world_size / rows),
        masked_share=masked_share,
    )


def _distinct(token_ids: np.ndarray, lengths: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the distinct texts, longest first, and for each given text which of them it is."""
    _, first, member = np.unique(token_ids, return_index=True, return_inverse=True)
    order = np.argsort(-lengths[first].astype(np.int64), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return number[first[order]], place[member]


def _stripes(count: int, world_size: int) -> np.ndarray:
    """range(count) in lines of world_size, ending in -1, which stands for another copy of the last text."""
    return np.concatenate([np.arange(count), np.full(-count % world_size, -1)]).reshape(-1, world_size)


def _cut(stripes: np.ndarray, longest: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Cut stripes (descending lengths) into runs of least padded tokens, overhead counted.

    A run of n stripes costs n * longest and stays within the budget, or has one stripe.
    """
    lengths: list[int] = longest[stripes].tolist()
    points = [0]  # where a run may begin
    while points[-1] < len(lengths):
        step = micro_batch_tokens // lengths[points[-1]] // _CUTS_PER_MICRO_BATCH
        points.append(min(len(lengths), points[-1] + max(1, step)))
    last = len(points) - 1
    cost, following = [0] * len(points), [last] * len(points)
    for i in range(last - 1, -1, -1):
        start, length = points[i], lengths[points[i]]
        end = max(points[i + 1], start + micro_batch_tokens // length)
        best, j = 1 << 62, i + 1
        while j <= last and points[j] <= end:
            total = (points[j] - start) * length + cost[j]
            if total < best:
                best, following[i] = total, j
            j += 1
        cost[i] = best + _OVERHEAD_TOKENS
    cuts, i = [], following[0]
    while i < last:
        cuts.append(points[i])
        i = following[i]
    return np.split(stripes, cuts)


def _places(distinct: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each distinct text over all ranks, and how many members the text at each place has.

    `distinct` is [slots of this role, world_size].
    """
    by_place = distinct.T.ravel()
    real = by_place >= 0
    place = np.empty(real.sum(), np.int64)
    place[by_place[real]] = np.flatnonzero(real)
    return place, np.bincount(place[member], minlength=len(by_place))


def _masked(
    anchor_text: np.ndarray,  # [rows]
    positive_text: np.ndarray,  # [rows]
    candidate_text: np.ndarray,  # [candidate entries]
    anchor: np.ndarray,  # [rows]: distinct anchor
    candidate: np.ndarray,  # [candidate entries]: distinct candidate
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (distinct anchor, distinct candidate) where the candidate fits the anchor or is its own text.

    A text fits an anchor if some row of the batch has it as the positive of that anchor's text. The model
    cannot tell apart what has equal tokens (cut at the maximal length), so one such text is enough.
    """
    of_text, fitting, _ = _unique_pairs(
        np.concatenate([anchor_text, anchor_text]), np.concatenate([positive_text, anchor_text])
    )
    anchor_text, anchor, _ = _unique_pairs(anchor_text, anchor)
    candidate_text, candidate, _ = _unique_pairs(candidate_text, candidate)
    i, fit = _join(anchor_text, of_text)
    k, j = _join(fitting[fit], candidate_text)
    a, c, _ = _unique_pairs(anchor[i[k]], candidate[j])
    return a, c


def _unique_pairs(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct pairs of small non-negative integers, sorted, and how often each occurs."""
    width = int(right.max()) + 1
    pairs, count = np.unique(left * width + right, return_counts=True)
    return pairs // width, pairs % width, count


def _join(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with left[i] == right[j], by i; `right` is sorted."""
    first = np.searchsorted(right, left)
    matches = np.searchsorted(right, left, side="right") - first
    i = np.repeat(np.arange(len(left)), matches)
    within = np.arange(len(i)) - np.repeat(np.cumsum(matches) - matches, matches)
    return i, first[i] + within


def _table(anchor: np.ndarray, candidate: np.ndarray, anchors: int) -> Table:
    """Count equal pairs and index them by anchor."""
    anchor, candidate, count = _unique_pairs(anchor, candidate)
    return Table(np.searchsorted(anchor, np.arange(anchors + 1)), candidate, count)

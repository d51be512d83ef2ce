"""The plan of a step: which rank embeds which distinct text in which micro-batch, and what is scored.

Every rank makes the same plan from the same identities and lengths, without talking. The distinct texts
of each role are sorted by length and dealt in stripes of world_size texts, one per rank; a dynamic programme
over the stripes cuts micro-batches. So all ranks run equally many micro-batches of nearly the same shape.

A text is named by its number in the batch, row * columns + column. A rank embeds one text per slot; a slot
has the same role on every rank. Anchors and candidates of all ranks are numbered rank by rank, slot by slot.
"""

from dataclasses import dataclass, replace

import numpy as np

from trainer.targets import Fits, Pairs, Rows, Scoring, Targets, make_targets

# What one more micro-batch costs beside its tokens, in tokens of encoder time, by the device's kind: starting its
# kernels and adding its gradients to those that are there. Measured on a CPU; on CUDA a guess between models.
OVERHEAD_TOKENS = {"cpu": 32, "cuda": 256}
# Places where a full micro-batch may be cut, least and most: more save no padding. In a huge batch, where few suffice
# because neighbours are equally long, their sum stays near the third number, so that it is planned in half a second.
_CUTS_LEAST, _CUTS_MOST, _CUTS_IN_ALL = 12, 48, 16_384
_DEFAULT = Scoring()


@dataclass(frozen=True)
class Plan:
    """One global batch divided over `world_size` ranks."""

    texts: np.ndarray  # int64 [world_size, slots]: number of the text that a rank embeds
    lengths: np.ndarray  # int64 [world_size, slots]: its tokens
    is_anchor: np.ndarray  # bool [slots]
    cuts: np.ndarray  # int64 [micro_batches + 1]: micro-batch m holds slots cuts[m]:cuts[m + 1]
    all_targets: Targets  # of all ranks
    by_row: bool  # a rank scores a share of the rows against the anchors of all ranks, else the anchors that it embeds
    distinct_share: float  # distinct texts of each role / texts that the rows hold
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
        lines = len(self.all_targets.anchor)
        first, end = lines * rank // self.world_size, lines * (rank + 1) // self.world_size
        part = self.all_targets.part(first, end)
        return part if self.by_row else replace(part, anchor=part.anchor - first)

    @property
    def padded(self) -> np.ndarray:
        """Tokens of each micro-batch of each rank with its padding, int64 [world_size, micro_batches]."""
        return np.maximum.reduceat(self.lengths, self.cuts[:-1], axis=1) * np.diff(self.cuts)

    def tokens(self, rank: int) -> tuple[int, int]:
        """Real and padded tokens of one pass over this rank's share."""
        return int(self.lengths[rank].sum()), int(self.padded[rank].sum())


def make_plan(
    token_ids: np.ndarray,
    text_ids: np.ndarray,
    lengths: np.ndarray,
    *,
    world_size: int,
    micro_batch_tokens: int,
    overhead_tokens: int = OVERHEAD_TOKENS["cpu"],
    masks: bool = True,
    separate_roles: bool = False,
    scoring: Scoring = _DEFAULT,
    known: Pairs | None = None,
) -> Plan:
    """Plan a global batch; all arrays are [rows, columns] of integers, columns anchor, positive, negatives.

    Equal `token_ids` (role and prompt belong to them) are embedded and scored once, equal `text_ids` are one
    text to `masks`, and a length of 0 says that the row has no such negative. A micro-batch keeps rows x
    longest <= micro_batch_tokens or is a single text; one more is worth `overhead_tokens` of padding. With
    `separate_roles` it holds texts of one role. `known` are (text_ids of anchors, text_ids of positives), uint64
    [pairs] each, that are right although no row says so.
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
    runs = [run for part in parts for run in _cut(np.flatnonzero(part), longest, micro_batch_tokens, overhead_tokens)]
    runs.sort(key=lambda run: -longest[run[0]])
    order = order[np.concatenate(runs)]
    texts, distinct, is_anchor = texts[order], distinct[order], is_anchor[order]

    # From distinct texts to their places: anchors and candidates of all ranks in the order of slots.
    anchor_at, anchor_count = _places(distinct[is_anchor], anchor)
    candidate_at, candidate_count = _places(distinct[~is_anchor], candidate)
    held = np.nonzero(here)[0]  # row of each candidate
    batch = Rows(
        anchor_at[anchor], candidate_at[positive], held, candidate_at[candidate], anchor_count, candidate_count
    )
    fits = Fits(batch, text_ids[:, 0], text_ids[:, 1:][here], known) if masks else None
    targets = make_targets(batch, fits, scoring, world_size / rows)
    masked_share = 0.0
    if fits:
        a, c = fits.candidates
        # Each row's own positive is among the entries and stays in its denominator.
        masked_share = (int(anchor_count[a] @ candidate_count[c]) - rows) / max(1, rows * (len(candidate) - 1))
    return Plan(
        texts=texts.T.copy(),
        lengths=length[texts].T.copy(),
        is_anchor=is_anchor,
        cuts=np.cumsum([0] + [len(run) for run in runs]),
        all_targets=targets,
        by_row=scoring.by_row,
        distinct_share=(len(anchor_text) + len(candidate_text)) / (rows + len(candidate)),
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


def _cut(stripes: np.ndarray, longest: np.ndarray, micro_batch_tokens: int, overhead_tokens: int) -> list[np.ndarray]:
    """Cut stripes (descending lengths) into runs of least padded tokens, overhead counted.

    A run of n stripes costs n * longest and stays within the budget, or has one stripe.
    """
    lengths: list[int] = longest[stripes].tolist()
    cuts_each = min(_CUTS_MOST, max(_CUTS_LEAST, _CUTS_IN_ALL * micro_batch_tokens // max(1, sum(lengths))))
    points = [0]  # where a run may begin
    while points[-1] < len(lengths):
        step = micro_batch_tokens // lengths[points[-1]] // cuts_each
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
        cost[i] = best + overhead_tokens
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

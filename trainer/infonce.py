"""Fused Matryoshka InfoNCE: value and closed-form gradient at the embeddings, tile by tile, without autograd.

With x_k the first dims[k] entries of a line's text, y_k of a column's, s = scale <x_k, y_k> / (|x_k| |y_k|). A row
(a, p) costs log(exp(s_ap) + exp(U)) - s_ap, where exp(U) sums exp(s) over what the row's line scores; without masks U
holds p too and the row costs U - s_ap (van den Oord et al., 2018; Kusupati et al., 2022). A line scores the blocks of
its targets in one softmax, or in one each whose mean counts. Distinct texts are scored, weighted by how often the
batch holds them. Hardness adds strength * cosine, held constant, to logits (Lan et al., 2025, eq. 5).

The prefix products A_k = sum_{j<=k} X[:, s_j] Y[:, s_j]^T over the segments s_j between dims cost one full-width
matmul for all dims. With G_k the gradient at A_k, dX[:, s_j] = (sum_{k>=j} G_k) Y[:, s_j] less radial terms
(sum_y G_k A_k) x_k / |x_k|^2, and dY likewise: one full-width matmul each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer import watch
from trainer.targets import Scoring, Table, Targets

# Elements of a tile over all its buffers: 32 MB on a CPU, half a GB to keep a GPU busy. A matmul with fewer than
# 64 lines costs more than the memory it saves.
_TILE_ELEMENTS, _TILE_LINES = {"cpu": 1 << 23, "cuda": 1 << 27}, 64
# Elements of a strip, which goes through all that is done element by element while a CPU's cache holds it.
_STRIP_ELEMENTS = 1 << 17
_EPS = 1e-12  # a smaller norm counts as this, as in torch.nn.functional.normalize
# Logits within +-40 need no maximum taken off: 1e17 times the batch is far from what fp32 holds.
_SAFE_LOGIT = 40.0


@dataclass(frozen=True)
class Objective:
    """What is minimised: sum over dims of weight * InfoNCE of the embeddings cut to that dim."""

    scale: float  # 1 / temperature
    dims: Sequence[int]  # largest first
    weights: Sequence[float]
    scoring: Scoring = Scoring()  # noqa: RUF009  (frozen)


@dataclass(frozen=True)
class Loss:
    """Loss of one rank and its gradient at the embeddings."""

    value: Tensor  # []: sum of weight * by_dim
    by_dim: Tensor  # [dims]
    anchor_gradient: Tensor  # [anchors, width]
    candidate_gradient: Tensor  # [candidates, width]: what this rank's lines add


def infonce(
    anchors: Tensor, candidates: Tensor, targets: Targets, objective: Objective, tile: int | None = None
) -> Loss:
    """Score the lines of `targets`, which name their texts in `anchors` and `candidates` [texts, width].

    `candidates` are those of all ranks, `anchors` this rank's, or of all ranks too where `scoring.by_row`. The loss is
    targets.row_weight * (sum over the rows of these lines); its mean over ranks is the batch's. Computed in fp32, or
    fp64 for fp64 embeddings, whatever autocast says. Memory beside the gradients: `tile` lines of (dims + 1) x columns
    of all blocks. No collective.
    """
    with torch.no_grad(), torch.autocast(anchors.device.type, enabled=False):
        dtype = torch.promote_types(anchors.dtype, torch.float32)
        return _Kernel(anchors.to(dtype), candidates.to(dtype), targets, objective, tile).run()


def tile_lines(columns: int, dims: int, device: str) -> int:
    """Lines of a tile on this kind of device; its buffers hold (dims + 1) x columns elements a line."""
    return max(_TILE_LINES, _TILE_ELEMENTS.get(device, _TILE_ELEMENTS["cpu"]) // (columns * (dims + 1)))


class _Side:
    """Embeddings of one role and what is gathered at them."""

    def __init__(self, x: Tensor, segments: list[slice]) -> None:
        self.x, self.gradient = x, torch.zeros_like(x)
        squares = torch.stack([x[:, segment].square().sum(1) for segment in segments])
        self.norm = squares.flip(0).cumsum(0).flip(0).sqrt().clamp_min(_EPS)  # [dims, texts], of the first dims[k]
        self.radial = torch.zeros_like(self.norm)  # sums of G_k * A_k

    def take_off_radial(self, segments: list[slice]) -> None:
        """Take off the gradient along each prefix: a cosine ignores its length. A clamped norm is a constant."""
        share = torch.where(self.norm > _EPS, self.radial / self.norm.square(), 0).cumsum(0)  # this and larger dims
        for k, segment in enumerate(segments):
            self.gradient[:, segment].addcmul_(share[k, :, None], self.x[:, segment], value=-1)


@dataclass(frozen=True)
class _Entries:
    """Sparse entries of a tile."""

    line: Tensor  # int64 [entries], within the tile
    column: Tensor  # int64 [entries]
    value: Tensor  # [entries]: a count, or what a logit gains, or a gradient


class _Kernel:
    """One call of `infonce`. The columns of all blocks lie side by side, those of block b in spans[b]."""

    def __init__(self, anchors: Tensor, candidates: Tensor, targets: Targets, objective: Objective, tile: int | None):
        dims, scoring = objective.dims, objective.scoring
        assert list(dims) == sorted(set(dims), reverse=True) and dims[0] <= anchors.shape[1], dims
        self.targets, self.objective = targets, objective
        self.segments = [slice(first, end) for first, end in zip([*dims[1:], 0], dims, strict=True)]
        self.anchors, self.candidates = _Side(anchors, self.segments), _Side(candidates, self.segments)
        self.columns = [self.anchors if block.to_anchors else self.candidates for block in targets.blocks]
        ends = np.cumsum([len(side.x) for side in self.columns]).tolist()
        self.spans = [slice(first, end) for first, end in zip([0, *ends[:-1]], ends, strict=True)]
        joint = scoring.partition_mode == "joint"
        self.softmaxes = [slice(0, ends[-1])] if joint else self.spans
        self.softmax_of = [0 if joint else number for number in range(len(self.spans))]
        self.count = _like(np.concatenate([block.count for block in targets.blocks]), anchors)  # [columns]
        self.norm = torch.cat([side.norm for side in self.columns], 1)  # [dims, columns]
        # From cosine to logit. Hardness is held constant, so that the gradient has the scale alone.
        strength = scoring.hardness_strength if scoring.hardness_mode else 0.0
        all_harder = scoring.hardness_mode in ("in_batch_negatives", "all_negatives")
        self.sharpness = torch.full_like(self.count, objective.scale)
        self.sharpness[self.spans[0]] += strength if all_harder else 0.0
        self.own_sharpness = objective.scale + (0.0 if all_harder else strength)
        self.is_safe = objective.scale + strength <= _SAFE_LOGIT

        kind = anchors.device.type
        self.tile = min(len(targets.anchor), tile or tile_lines(ends[-1], len(dims), kind))
        self.strip = max(1, min(self.tile, _STRIP_ELEMENTS // ends[-1])) if kind == "cpu" else self.tile
        self.product = anchors.new_empty(self.tile, ends[-1])  # A_k
        self.gradient = anchors.new_empty(len(dims), self.tile, ends[-1])  # exp(s), then G_k
        self.work = anchors.new_empty(self.strip, ends[-1])
        self.radial = torch.zeros_like(self.norm)
        self.by_dim = anchors.new_zeros(len(dims))

    def run(self) -> Loss:
        """All tiles."""
        lines = len(self.targets.anchor)
        for begin in range(0, lines, self.tile):
            watch.sign()
            self._tile(slice(begin, min(begin + self.tile, lines)))
        for side, span in zip(self.columns, self.spans, strict=True):
            side.radial += self.radial[:, span]
        self.anchors.take_off_radial(self.segments)
        self.candidates.take_off_radial(self.segments)
        by_dim = self.by_dim * self.targets.row_weight
        value = by_dim @ by_dim.new_tensor(list(self.objective.weights))
        return Loss(value, by_dim, self.anchors.gradient, self.candidates.gradient)

    def _tile(self, here: slice) -> None:
        targets, size = self.targets, here.stop - here.start
        product, gradient = self.product[:size], self.gradient[:, :size]
        pairs = _entries(targets.positives, here, product)
        own = _entries(targets.own_negatives, here, product) if targets.own_negatives else None
        changed = self._changed(here)
        # By block: the side that its lines are of, and which texts of it. A line scored from its positive has one.
        anchor = torch.from_numpy(targets.anchor[here]).to(product.device)
        lines = [(self.anchors, anchor) if b.from_anchors else (self.candidates, pairs.column) for b in targets.blocks]
        x = [side.x[text] for side, text in lines]

        product.zero_()
        for k in reversed(range(len(self.segments))):
            segment = self.segments[k]
            for x_of, side, span in zip(x, self.columns, self.spans, strict=True):
                product[:, span].addmm_(x_of[:, segment], side.x[:, segment].T)  # A_k
            norms = [side.norm[k, text] for side, text in lines]
            total, shared = self._exponentials(k, product, norms, changed)
            push, pulls = self._rows(k, product, norms[0], shared, pairs, own)
            unit = targets.row_weight * self.objective.weights[k] * self.objective.scale
            total = unit * push / total.clamp_min_(torch.finfo(total.dtype).tiny)
            weights = [total[softmax] / norm for softmax, norm in zip(self.softmax_of, norms, strict=True)]
            for (side, text), radial in zip(lines, self._gradients(k, product, weights), strict=True):
                side.radial[k].index_add_(0, text, radial)
            for pull in pulls:
                at = pull.line, pull.column
                value = unit * pull.value / (norms[0][pull.line] * self.norm[k, pull.column])
                gradient[k].index_put_(at, value, accumulate=True)
                self.anchors.radial[k].index_add_(0, anchor[pull.line], value * product[at])
                self.radial[k].index_add_(0, pull.column, value * product[at])

        homes = [torch.zeros_like(x_of) for x_of in x]
        for k, segment in enumerate(self.segments):
            if k > 0:
                gradient[k].add_(gradient[k - 1])
            for x_of, home, side, span in zip(x, homes, self.columns, self.spans, strict=True):
                torch.mm(gradient[k, :, span], side.x[:, segment], out=home[:, segment])
                side.gradient[:, segment].addmm_(gradient[k, :, span].T, x_of[:, segment])
        for (side, text), home in zip(lines, homes, strict=True):
            side.gradient.index_add_(0, text, home)

    def _strips(self, size: int) -> list[slice]:
        return [slice(begin, min(begin + self.strip, size)) for begin in range(0, size, self.strip)]

    def _changed(self, here: slice) -> list[_Entries | None]:
        """By strip: entries whose count is not their column's, with what their logits gain by it; -inf leaves out."""
        strips = self._strips(here.stop - here.start)
        tables = [(b, span.start) for b, span in zip(self.targets.blocks, self.spans, strict=True) if b.changed]
        if not tables:
            return [None] * len(strips)
        parts = []
        for block, offset in tables:
            assert block.changed is not None
            line, column, count = block.changed.entries(here.start, here.stop)
            with np.errstate(divide="ignore"):
                parts.append((line, column + offset, np.log(count / block.count[column])))
        line, column, gain = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(line, kind="stable")
        bounds = np.searchsorted(line[order], [strip.start for strip in strips] + [strips[-1].stop])
        all_of_them = [torch.from_numpy(part[order]).to(self.count.device) for part in (line, column, gain)]
        return [
            _Entries(all_of_them[0][a:b] - strip.start, all_of_them[1][a:b], all_of_them[2][a:b].to(self.count.dtype))
            for strip, a, b in zip(strips, bounds[:-1], bounds[1:], strict=True)
        ]

    def _exponentials(
        self, k: int, product: Tensor, norms: list[Tensor], changed: list[_Entries | None]
    ) -> tuple[Tensor, Tensor]:
        """Leave exp(s - top) in gradient[k]; returns their weighted sums and U, [softmaxes, lines] each."""
        to_logit = self.sharpness / self.norm[k]
        total = product.new_empty(len(self.softmaxes), len(product))
        top = torch.zeros_like(total)
        for strip, entries in zip(self._strips(len(product)), changed, strict=True):
            s = torch.mul(product[strip], to_logit, out=self.gradient[k, strip])
            for span, norm in zip(self.spans, norms, strict=True):
                s[:, span].div_(norm[strip, None])
            if entries:
                s.index_put_((entries.line, entries.column), entries.value, accumulate=True)
            for number, columns in enumerate(self.softmaxes):
                if not self.is_safe:  # finite where everything is left out
                    torch.amax(s[:, columns], 1, out=top[number, strip]).clamp_min_(torch.finfo(s.dtype).min)
                    s[:, columns].sub_(top[number, strip, None])
                s[:, columns].exp_()
                torch.mv(s[:, columns], self.count[columns], out=total[number, strip])
        return total, total.log() + top

    def _rows(
        self, k: int, product: Tensor, norm: Tensor, shared: Tensor, pairs: _Entries, own: _Entries | None
    ) -> tuple[Tensor, list[_Entries]]:
        """Add the rows' loss. Returns what pushes the columns of each softmax, [softmaxes, lines], and what single
        entries of the first block get beside it."""

        def logit(entries: _Entries, sharpness: float) -> Tensor:
            at = entries.line, entries.column
            return product[at] * sharpness / (norm[entries.line] * self.norm[k, entries.column])

        rows, positive = pairs.value, logit(pairs, self.objective.scale)
        first = shared[0]
        if own is not None:  # what joins the shared sum in logits of its own
            harder = logit(own, self.own_sharpness)
            top = first.scatter_reduce(0, own.line, harder, "amax").clamp_min_(torch.finfo(harder.dtype).min)
            joined = (first - top).exp().index_add_(0, own.line, own.value * (harder - top[own.line]).exp())
            first = joined.log() + top
        margins = [first[pairs.line] - positive, *(other[pairs.line] - positive for other in shared[1:])]
        costs, shares = list(margins), [torch.ones_like(rows) for _ in margins]
        if self.targets.positive_apart:
            costs[0], shares[0] = -logsigmoid(-margins[0]), margins[0].sigmoid()
        pull = rows * torch.stack(shares) / len(shares)  # [softmaxes, pairs]
        self.by_dim[k] += rows @ torch.stack(costs).mean(0)
        push = torch.zeros_like(shared).index_add_(1, pairs.line, pull)
        pulls = [_Entries(pairs.line, pairs.column, -pull.sum(0))]
        if own is not None:
            pulls.append(
                _Entries(own.line, own.column, push[0, own.line] * own.value * (harder - first[own.line]).exp())
            )
            push[0] *= (shared[0] - first).exp()
        return push, pulls

    def _gradients(self, k: int, product: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Turn gradient[k] into G_k; returns the blocks' sums of G_k * A_k by line, and adds those by column."""
        by_column = self.count / self.norm[k]
        radial = [torch.empty_like(weight) for weight in weights]
        for strip in self._strips(len(product)):
            g = self.gradient[k, strip].mul_(by_column)
            for span, weight in zip(self.spans, weights, strict=True):
                g[:, span].mul_(weight[strip, None])
            work = torch.mul(g, product[strip], out=self.work[: len(g)])
            for span, sums in zip(self.spans, radial, strict=True):
                torch.sum(work[:, span], 1, out=sums[strip])
            self.radial[k] += work.sum(0)
        return radial


def _entries(table: Table, here: slice, like: Tensor) -> _Entries:
    """Entries of the lines `here` with counts as floats."""
    line, column, count = table.entries(here.start, here.stop)
    return _Entries(
        torch.from_numpy(line).to(like.device), torch.from_numpy(column).to(like.device), _like(count, like)
    )


def _like(numbers: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(tensor.device, tensor.dtype)

"""Fused Matryoshka InfoNCE: value and closed-form gradient at the embeddings, tile by tile, without autograd.

With q_k the first dims[k] entries of an anchor, c_k of a candidate, s = scale <q_k, c_k> / (|q_k| |c_k|). A
row (a, p) costs log(exp(s_ap) + exp(U_a)) - s_ap, where exp(U_a) sums exp(s_ac) over the candidates c that
all rows of a share; without masks U_a holds p too and the row costs U_a - s_ap (van den Oord et al., 2018;
Kusupati et al., 2022). Distinct texts are scored, weighted by how often the batch holds them.

The prefix products A_k = sum_{j<=k} Q[:, s_j] C[:, s_j]^T over the segments s_j between dims cost one
full-width matmul for all dims. With G_k the gradient at A_k, dQ[:, s_j] = (sum_{k>=j} G_k) C[:, s_j] less
radial terms (sum_c G_k A_k) q_k / |q_k|^2, and dC likewise: one full-width matmul each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.batching import Table, Targets

# Elements of a tile over all its buffers: 16 MB stay in a CPU's cache, half a GB keeps a GPU busy.
_TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
_EPS = 1e-12  # a smaller norm counts as this, as in torch.nn.functional.normalize


@dataclass(frozen=True)
class Objective:
    """What is minimised: sum over dims of weight * InfoNCE of the embeddings cut to that dim."""

    scale: float  # 1 / temperature
    dims: Sequence[int]  # largest first
    weights: Sequence[float]


@dataclass(frozen=True)
class Loss:
    """Loss of one rank and its gradient at the embeddings."""

    value: Tensor  # []: sum of weight * by_dim
    by_dim: Tensor  # [dims]
    anchor_gradient: Tensor  # [anchors, width]
    candidate_gradient: Tensor  # [candidates, width]: what this rank's anchors add


def infonce(
    anchors: Tensor, candidates: Tensor, targets: Targets, objective: Objective, tile: int | None = None
) -> Loss:
    """Score this rank's anchors [anchors, width] against the candidates of all ranks [candidates, width].

    The loss is targets.row_weight * (sum over the rows of these anchors); its mean over ranks is the batch's.
    Computed in fp32, or fp64 for fp64 embeddings, whatever autocast says. Memory beside the gradients: `tile`
    lines of (dims + 2) x candidates. No collective.
    """
    with torch.no_grad(), torch.autocast(anchors.device.type, enabled=False):
        dtype = torch.promote_types(anchors.dtype, torch.float32)
        return _infonce(anchors.to(dtype), candidates.to(dtype), targets, objective, tile)


def _infonce(q: Tensor, c: Tensor, targets: Targets, objective: Objective, tile: int | None) -> Loss:
    dims = objective.dims
    assert list(dims) == sorted(set(dims), reverse=True) and dims[0] <= q.shape[1], dims
    segments = [slice(first, end) for first, end in zip([*dims[1:], 0], dims, strict=True)]
    tile = min(len(q), tile or max(16, _TILE_ELEMENTS.get(q.device.type, 1 << 22) // (len(c) * (len(dims) + 2))))
    q_norm, c_norm = _prefix_norms(q, segments), _prefix_norms(c, segments)  # [dims, lines]
    q_radial, c_radial = torch.zeros_like(q_norm), torch.zeros_like(c_norm)  # sums of G_k * A_k
    dq, dc, by_dim = torch.zeros_like(q), torch.zeros_like(c), q.new_zeros(len(dims))
    product, work = q.new_empty(2, tile, len(c))
    gradients = q.new_empty(len(dims), tile, len(c))
    rows, count = _like(targets.anchor_rows, q), _like(targets.candidate_count, q)
    fillers = torch.from_numpy(np.flatnonzero(targets.candidate_count == 0)).to(q.device)

    for begin in range(0, len(q), tile):
        here = slice(begin, min(begin + tile, len(q)))
        size = here.stop - begin
        a, x, g = product[:size], work[:size], gradients[:, :size]
        line, candidate, rows_of_pair = _entries(targets.positives, here, q)
        hidden = _entries(targets.masked, here, q)[:2] if targets.masked else None
        a.zero_()
        for k in reversed(range(len(dims))):
            a.addmm_(q[here, segments[k]], c[:, segments[k]].T)  # A_k
            torch.mul(a, objective.scale / c_norm[k], out=x)
            x.div_(q_norm[k, here, None])
            positive = x[line, candidate]
            x[:, fillers] = -torch.inf
            if hidden:
                x[hidden] = -torch.inf
            top = x.amax(1).clamp_min_(torch.finfo(x.dtype).min)  # finite where everything is hidden
            x.sub_(top[:, None]).exp_()
            total = x @ count  # at least 1, or 0 where everything is hidden
            margin = positive - (total.log() + top)[line]  # s_ap - U_a

            # How hard each row pulls its positive, and an anchor's rows together push what they share.
            if hidden:
                by_dim[k] -= rows_of_pair @ logsigmoid(margin)
                pull = rows_of_pair * (-margin).sigmoid()
                push = rows.new_zeros(size).index_add_(0, line, pull)
            else:
                by_dim[k] -= rows_of_pair @ margin
                pull, push = rows_of_pair, rows[here]

            # G_k
            unit = targets.row_weight * objective.weights[k] * objective.scale
            torch.mul(x, count / c_norm[k], out=g[k])
            g[k].mul_((unit * push / (total.clamp_min(1) * q_norm[k, here]))[:, None])
            pull = -unit * pull / (q_norm[k, here][line] * c_norm[k, candidate])
            g[k].index_put_((line, candidate), pull, accumulate=True)
            torch.mul(g[k], a, out=x)
            q_radial[k, here] = x.sum(1)
            c_radial[k] += x.sum(0)
        for k, segment in enumerate(segments):
            if k > 0:
                g[k].add_(g[k - 1])
            torch.mm(g[k], c[:, segment], out=dq[here, segment])
            dc[:, segment].addmm_(g[k].T, q[here, segment])
    _take_off_radial(dq, q, q_norm, q_radial, segments)
    _take_off_radial(dc, c, c_norm, c_radial, segments)
    by_dim *= targets.row_weight
    return Loss(by_dim @ by_dim.new_tensor(list(objective.weights)), by_dim, dq, dc)


def _prefix_norms(x: Tensor, segments: list[slice]) -> Tensor:
    """Norms of the first dims[k] entries of each line, at least 1e-12, [dims, lines]."""
    squares = torch.stack([x[:, segment].square().sum(1) for segment in segments])
    return squares.flip(0).cumsum(0).flip(0).sqrt().clamp_min(_EPS)


def _take_off_radial(gradient: Tensor, x: Tensor, norm: Tensor, radial: Tensor, segments: list[slice]) -> None:
    """Take off the gradient along each prefix: a cosine ignores its length. A clamped norm is a constant."""
    share = torch.where(norm > _EPS, radial / norm.square(), 0).cumsum(0)  # over this and all larger dims
    for k, segment in enumerate(segments):
        gradient[:, segment].addcmul_(share[k, :, None], x[:, segment], value=-1)


def _entries(table: Table, here: slice, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of the anchors `here`: line within the tile, candidate, and count as floats."""
    start = table.start[here.start : here.stop + 1]
    part = slice(start[0], start[-1])
    line = torch.from_numpy(np.repeat(np.arange(len(start) - 1), np.diff(start)))
    candidate = torch.from_numpy(table.candidate[part])
    return line.to(like.device), candidate.to(like.device), _like(table.count[part], like)


def _like(numbers: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(tensor.device, tensor.dtype)

"""trainer/search.py against sorting all cosines in fp64, numpy's quantisation written out, and any number of ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.vectors import ALONE, problem
from trainer import search as module
from trainer.search import Share, quantise, search, search_stored

DIMS = [64, 32, 8]


def cosines_of(queries: np.ndarray, documents: np.ndarray, dim: int) -> np.ndarray:
    q, d = (v[:, :dim].astype(float) for v in (queries, documents))
    return (q / np.linalg.norm(q, axis=1)[:, None]) @ (d / np.linalg.norm(d, axis=1)[:, None]).T


@pytest.mark.parametrize("k", [1, 20, 100, 600])
def test_search_is_exact_and_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    _, asked, corpus = problem(documents=500)
    results = []
    for tiles in ((1, 1), (7, 19), (40, 499), (1024, 4096)):
        monkeypatch.setattr(module, "_QUERY_TILE", tiles[0])
        monkeypatch.setattr(module, "_DOCUMENT_TILE", tiles[1])
        results.append(search(asked, corpus, DIMS, k))
    for dim in DIMS:
        cosines = cosines_of(asked, corpus, dim)
        expected = np.argsort(-cosines, axis=1)[:, :k]
        for found in results:
            assert np.array_equal(found[dim].index, expected)
            np.testing.assert_allclose(found[dim].cosine, np.take_along_axis(cosines, expected, 1), atol=2e-12)
            assert np.array_equal(found[dim].cosine, results[0][dim].cosine), "bit for bit"


@pytest.mark.parametrize("tile", [7, 64, 4096])
def test_ties_go_to_the_smaller_index_in_every_tiling(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(module, "_DOCUMENT_TILE", tile)
    random = np.random.default_rng(1)
    base = random.normal(size=(9, 48)).astype(np.float32)
    which = random.integers(9, size=400)
    corpus = base[which]  # each vector about 44 times, at places that a BLAS kernel treats differently
    asked = random.normal(size=(11, 48)).astype(np.float32)
    for k in (20, 100):  # more ties than proposals, and less
        for dim in (48, 16):
            expected = [
                [i for group in best for i in np.flatnonzero(which == group)][:k]
                for best in np.argsort(-cosines_of(asked, base, dim), axis=1)
            ]
            assert search(asked, corpus, [dim], k)[dim].index.tolist() == expected
    collapsed = search(asked, np.ones((700, 48), np.float32), [48], 10)[48].index
    assert np.array_equal(collapsed, np.tile(np.arange(10), (11, 1)))
    nothing = search(np.zeros((1, 4), np.float32), np.eye(4, dtype=np.float32), [4], 2)[4]
    assert nothing.index.tolist() == [[0, 1]] and nothing.cosine.tolist() == [[0.0, 0.0]]


def test_what_fp32_cannot_tell_apart_is_decided_in_fp64() -> None:
    random = np.random.default_rng(4)
    asked = random.normal(size=(1, 64)).astype(np.float32)
    near = asked + random.normal(scale=3e-6, size=(300, 64))  # cosines of 1 - 1e-11: one number in fp32
    corpus = np.concatenate([random.normal(size=(500, 64)), near]).astype(np.float32)[random.permutation(800)]
    cosines = cosines_of(asked.astype(np.longdouble), corpus.astype(np.longdouble), 64)
    found = search(asked, corpus, [64], 50)[64]
    kept = np.sort(cosines[0])[::-1][:50]
    np.testing.assert_allclose(cosines[0][found.index[0]], kept, atol=2e-12)
    assert len(set(found.index[0].tolist())) == 50


def stored_by_hand(asked: np.ndarray, corpus: np.ndarray, dim: int, kind: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    def int8(vectors: np.ndarray) -> np.ndarray:
        return np.round(vectors / np.abs(vectors).max(axis=1, keepdims=True) * 127)

    if kind == "int8":
        cosines = cosines_of(int8(asked[:, :dim]), int8(corpus[:, :dim]), dim)
        order = np.argsort(-np.round(cosines, 11), axis=1, kind="stable")[:, :k]
        return order, np.take_along_axis(cosines, order, 1)
    distance = ((asked[:, None, :dim] > 0) != (corpus[None, :, :dim] > 0)).sum(axis=2)
    near = np.argsort(distance, axis=1, kind="stable")[:, : 4 * k]
    cosines = np.take_along_axis(cosines_of(asked[:, :dim], int8(corpus[:, :dim]), dim), near, 1)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(near, order, 1), np.take_along_axis(cosines, order, 1)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_stored_vectors_are_searched_as_written_out(kind: Any) -> None:
    _, asked, corpus = problem(documents=900)
    found = search_stored(asked, Share(np.arange(900), corpus), DIMS, kind, ALONE, k=30)
    for dim in DIMS:
        index, cosines = stored_by_hand(asked, corpus, dim, kind, 30)
        np.testing.assert_allclose(found[dim].cosine, cosines, atol=1e-6)
        assert (found[dim].index == index).mean() > 0.999, "but for ties of rounding"


def test_codes() -> None:
    vectors = np.array([[0.5, -0.25, 0.0], [0.0, 0.0, 0.0], [-3.0, 1.5, 0.1]], dtype=np.float32)
    assert quantise(vectors, "int8").tolist() == [[127, -64, 0], [0, 0, 0], [-127, 64, 4]]
    assert quantise(vectors, "binary").tolist() == [[0b10000000], [0], [0b01100000]]


def _rank(rank: int, folder: str, size: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size)
    _, asked, corpus = problem(documents=700)
    corpus[350:] = corpus[:350]  # every document twice, on two ranks
    mine = np.random.default_rng(0).permutation(700)[rank::size]
    mine.sort()
    world: Any = SimpleNamespace(rank=rank, world_size=size)
    for kind in ("float32", "int8", "binary"):
        found = search_stored(asked, Share(mine, corpus[mine]), DIMS, kind, world, k=30)
        np.save(f"{folder}/{kind}-{size}-{rank}.npy", np.stack([f.index for f in found.values()]))
    torch.distributed.destroy_process_group()


def test_any_number_of_ranks_finds_the_same(tmp_path: Path) -> None:
    for size in (2, 3):
        spawn(_rank, (str(tmp_path), size), nprocs=size)
    _, asked, corpus = problem(documents=700)
    corpus[350:] = corpus[:350]
    for kind in ("float32", "int8", "binary"):
        found = search_stored(asked, Share(np.arange(700), corpus), DIMS, kind, ALONE, k=30)
        expected = np.stack([f.index for f in found.values()])
        for size, rank in ((2, 0), (2, 1), (3, 2)):
            assert np.array_equal(np.load(tmp_path / f"{kind}-{size}-{rank}.npy"), expected), (kind, size, rank)

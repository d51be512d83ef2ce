"""trainer/embed.py against sentence-transformers' own encode, in one process and in two."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn

from tests import distributed
from tests.tiny_models import minilm
from trainer.embed import cuts, deal, embed_share
from trainer.embed import embed as embed_with
from trainer.embedder import ModelEmbedder

ALONE: Any = SimpleNamespace(rank=0, world_size=1)


def embed(model: Any, texts: list[str], role: Any, *, batch_tokens: int, world: Any = ALONE) -> np.ndarray:
    return embed_with(ModelEmbedder(model), texts, role, batch_tokens=batch_tokens, world=world)


def texts(count: int = 37) -> list[str]:
    """Texts of many lengths, some repeated, one empty, one beyond 256 tokens."""
    draw = random.Random(3)
    words = [
        "invoice",
        "cat",
        "quantum",
        "river",
        "na\u00efve",
        "\u6771\u4eac",
        "patient",
        "the",
        "of",
        "running",
    ]
    made = [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(count)]
    return [*made, "", made[0], made[len(made) // 2], "word " * 400, made[0]]


@pytest.mark.parametrize("budget", [1, 600, 10**9])
def test_equals_encode_whatever_the_budget(minilm: Any, budget: int) -> None:
    expected = minilm.encode(texts(), normalize_embeddings=True)
    got = embed(minilm, texts(), "document", batch_tokens=budget)
    assert got.dtype == np.float32 and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_prompt_length_and_kind_reach_the_model(minilm: Any) -> None:
    expected = minilm.encode(texts(9), prompt="query: ", normalize_embeddings=True)
    minilm.prompts["query"] = "query: "
    got = embed(minilm, texts(9), "query", batch_tokens=900)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    minilm.prompts.clear()
    minilm.max_seq_length = 12
    short = embed(minilm, texts(9), "query", batch_tokens=900)
    np.testing.assert_allclose(short, minilm.encode(texts(9), normalize_embeddings=True), atol=1e-6)
    assert np.abs(short - got).max() > 0.01


def test_vectors_of_a_model_that_does_not_normalise_have_unit_length_too(minilm: Any) -> None:
    del minilm[2]
    got = embed(minilm, texts(5), "document", batch_tokens=900)
    assert np.linalg.norm(minilm.encode(texts(5)), axis=1).min() > 1.5
    np.testing.assert_allclose(got, minilm.encode(texts(5), normalize_embeddings=True), atol=1e-6)


def test_distinct_texts_go_through_the_model_once_and_batches_keep_the_budget(minilm: Any) -> None:
    shapes = []
    minilm[0].register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape)))
    embed(minilm, texts() * 3, "document", batch_tokens=1024)
    assert sum(rows for rows, _ in shapes) == len(set(texts()))
    assert all(rows * longest <= 1024 for rows, longest in shapes)
    assert shapes == sorted(shapes, key=lambda shape: -shape[1])


def test_training_flags_and_gradients_are_left_alone(minilm: Any) -> None:
    minilm.train()
    minilm[1].eval()
    before = [module.training for module in minilm.modules()]
    got = embed(minilm, ["a", "b"], "document", batch_tokens=64)
    again = embed(minilm, ["a", "b"], "document", batch_tokens=64)
    assert np.array_equal(got, again), "dropout was on"
    assert [module.training for module in minilm.modules()] == before
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in minilm.parameters())


def test_nothing_to_embed(minilm: Any) -> None:
    got = embed(minilm, [], "document", batch_tokens=64)
    assert got.shape == (0, 384)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=200), st.integers(1, 9), st.integers(1, 4000))
def test_every_text_has_one_place_and_ranks_have_equal_work(lengths: list[int], ranks: int, budget: int) -> None:
    tokens = np.array(lengths)
    stripes = deal(tokens, ranks)
    assert set(stripes.ravel().tolist()) == set(range(len(tokens)))
    assert stripes.size - len(tokens) < ranks
    per_rank = tokens[stripes].sum(axis=0)
    assert per_rank.max() - per_rank.min() <= tokens.max()
    longest = tokens[stripes].max(axis=1)
    ranges = list(cuts(longest, budget))
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert ranges[-1][1] == len(stripes)
    for first, last in ranges:
        assert last - first == 1 or (last - first) * tokens[stripes[first:last]].max() <= budget


def test_alternating_stripes_even_out_falling_lengths() -> None:
    tokens = np.arange(1, 401)
    per_rank = tokens[deal(tokens, 4)].sum(axis=0)
    assert per_rank.tolist() == [20_050] * 4, "dealt in one direction, rank 0 would have 300 tokens more than rank 3"


def _rank(rank: int, folder: str, model_folder: str) -> None:
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = SentenceTransformer(model_folder, device="cpu")
    shapes = []
    model[0].register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape)))
    world: Any = SimpleNamespace(rank=rank, world_size=2)
    for count, budget in ((38, 600), (37, 50), (1, 10_000)):  # odd and even numbers of distinct texts
        got = embed(model, texts(count), "document", batch_tokens=budget, world=world)
        np.save(f"{folder}/{rank}-{count}.npy", got)
    np.save(f"{folder}/{rank}-shapes.npy", np.array(shapes))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_both_get_everything(minilm: Any, minilm_folder: Path, tmp_path: Path) -> None:
    spawn(_rank, (str(tmp_path), str(minilm_folder)), nprocs=2)
    for count in (38, 37, 1):
        expected = minilm.encode(texts(count), normalize_embeddings=True)
        first, second = (np.load(tmp_path / f"{rank}-{count}.npy") for rank in (0, 1))
        np.testing.assert_allclose(first, expected, atol=1e-6)
        assert np.array_equal(first, second)
    first, second = (np.load(tmp_path / f"{rank}-shapes.npy") for rank in (0, 1))
    assert len(first) == len(second), "an engine that gathers in the forward pass would hang"
    assert np.array_equal(first[:, 0], second[:, 0])
    alone = sum(len(set(texts(count))) for count in (38, 37, 1))
    assert first[:, 0].sum() <= alone / 2 + 3


def _shares(rank: int, model_folder: str, in_memory: int) -> tuple[list[Any], bool]:
    from sentence_transformers import SentenceTransformer

    import trainer.embed

    trainer.embed._IN_MEMORY = in_memory
    embedder = ModelEmbedder(SentenceTransformer(model_folder, device="cpu"))
    world: Any = SimpleNamespace(rank=rank, world_size=2)
    shares = [
        embed_share(embedder, texts(count), "document", batch_tokens=300, world=world)
        for count in (38, 37, 1)  # odd and even numbers of distinct texts, and one that all places have
    ]
    on_disk = all(isinstance(share.vectors, np.memmap) for share in shares)
    return [(share.index, np.array(share.vectors)) for share in shares], on_disk


def test_shares_of_two_processes_hold_each_text_once_in_memory_or_on_disk(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = minilm(tmp_path / "model")
    model = SentenceTransformer(str(folder), device="cpu")
    in_memory, on_disk = (distributed.run(_shares, 2, str(folder), limit) for limit in (1 << 30, 0))
    assert [disk for _, disk in (*in_memory, *on_disk)] == [False, False, True, True]
    for number, count in enumerate((38, 37, 1)):
        expected = model.encode(texts(count), normalize_embeddings=True)
        shares = [result[number] for result, _ in in_memory]
        owned = np.concatenate([index for index, _ in shares])
        assert sorted(owned.tolist()) == list(range(len(expected))), "each text is owned once over the ranks"
        for (index, vectors), (result, _) in zip(shares, on_disk, strict=True):
            assert vectors.dtype == np.float32 and vectors.shape == (len(index), 32)
            np.testing.assert_allclose(vectors, expected[index], atol=1e-6)
            assert np.array_equal(result[number][0], index) and np.array_equal(result[number][1], vectors)
    assert all(len(index) for index, _ in in_memory[1][0][:2]), "both ranks have work"

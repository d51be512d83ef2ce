"""The token cache holds exactly what the model's own preprocessing makes: `python -m pytest tests/test_tokens.py`."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import processors

from launch.config_data import Prompts
from launch.errors import UserError
from tests import tiny_models
from trainer.tokens import Padder, TokenCache, text_id, token_cache

TEXTS = [
    "plain words", "", "  spaced   out ", "Größe – naïve café",
    "日本語のテキスト", "שלום עולם", "🙂 emoji 👩‍🔬", "a" * 5000,
    "def f(x):\n\treturn x", "\x00control\x07", "word " * 700,
]  # fmt: skip


def _rows(count: int = 500) -> datasets.Dataset:
    draw = random.Random(0)
    texts = [draw.choice(TEXTS) + f" {draw.randrange(200)}" for _ in range(3 * count)]
    return datasets.Dataset.from_dict(
        {"anchor": texts[:count], "positive": texts[count : 2 * count], "negative": texts[2 * count :]}
    )


def _cache(model: SentenceTransformer, folder: Path, rows: datasets.Dataset, fingerprint: str = "f") -> TokenCache:
    return token_cache(rows, fingerprint, ["anchor", "positive", "negative"], model, folder)


def test_features_equal_the_models_own_preprocessing(minilm: SentenceTransformer, tmp_path: Path) -> None:
    minilm.prompts = {"query": "find: ", "document": ""}
    minilm[0].query_length = 16
    rows = _rows()
    cache = _cache(minilm, tmp_path, rows)
    padder = Padder(minilm)
    draw = random.Random(1)
    for column, name in enumerate(rows.column_names):
        picked = draw.sample(range(len(rows)), 20)
        role = "query" if name == "anchor" else "document"
        expected = minilm.preprocess([rows[i][name] for i in picked], prompt=minilm.prompts[role], task=role)
        features = padder(cache.texts(np.array(picked) * 3 + column), "cpu")
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            assert torch.equal(features[key], expected[key]), (name, key)
        lengths = cache.lengths(np.array(picked))[:, column]
        assert lengths.tolist() == expected["attention_mask"].sum(1).tolist()
    assert cache.lengths(np.arange(len(rows)))[:, 0].max() == 16


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_packed_features_equal_the_models_own_preprocessing(name: str, tmp_path: Path) -> None:
    """Where sentence-transformers flattens inputs (flash attention): keys, values and dtypes; the cache is the same."""
    model = SentenceTransformer(str(tiny_models.BUILDERS[name](tmp_path / "model")), device="cpu")
    model.prompts = {"query": "find: ", "document": ""}
    rows = datasets.Dataset.from_dict({c: tiny_models.SENTENCES for c in ("anchor", "positive", "negative")})
    padded = _cache(model, tmp_path / "padded", rows)
    assert not Padder(model).flat
    tiny_models.flatten(model)
    cache = _cache(model, tmp_path / "flat", rows)
    assert np.array_equal(cache.ids, padded.ids) and np.array_equal(cache.offsets, padded.offsets)
    padder = Padder(model)
    assert padder.flat
    for column, role in enumerate(("query", "document")):
        expected = model.preprocess(tiny_models.SENTENCES, prompt=model.prompts[role], task=role)
        assert "attention_mask" not in expected
        features = padder(cache.texts(np.arange(len(rows)) * 3 + column), "cpu")
        expected.pop("prompt_length", None)  # the loader adds it
        assert {*features} == {*expected}
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(features[key], value) and features[key].dtype == value.dtype, key
            else:
                assert features[key] == value, key


def test_identities_follow_tokens_role_and_normalised_text(minilm: SentenceTransformer, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {
            "anchor": ["Open a File", "open  a file", "x"],
            "positive": ["open a file", "read", "read"],
            "negative": ["ﬁle", "file", "read"],
        }
    )
    cache = _cache(minilm, tmp_path, rows)
    assert cache.token_id[0, 0] == cache.token_id[1, 0], "the tokenizer lower-cases and folds spaces"
    assert cache.token_id[0, 0] != cache.token_id[0, 1], "the same tokens in another role are another input"
    assert cache.token_id[1, 1] == cache.token_id[2, 1] == cache.token_id[2, 2]
    assert cache.text_id[0, 0] == cache.text_id[1, 0] == cache.text_id[0, 1]
    assert cache.text_id[0, 2] == cache.text_id[1, 2], "NFKC folds the ligature"
    assert text_id("a b") != text_id("ab")


def test_a_cache_of_other_data_prompt_or_length_is_not_used(minilm: SentenceTransformer, tmp_path: Path) -> None:
    rows = _rows(20)
    _cache(minilm, tmp_path, rows)
    _cache(minilm, tmp_path, rows, "other data")
    minilm.preprocess(["a tokenizer that has been used"])
    _cache(minilm, tmp_path, rows)
    minilm.prompts = {"query": "q: ", "document": ""}
    _cache(minilm, tmp_path, rows)
    minilm.max_seq_length = 8
    shorter = _cache(minilm, tmp_path, rows)
    assert shorter.lengths(np.arange(20)).max() == 8
    minilm.tokenizer.truncation_side = "left"
    try:
        other_ends = _cache(minilm, tmp_path, rows)
    finally:
        minilm.tokenizer.truncation_side = "right"
    assert not np.array_equal(other_ends.ids, shorter.ids)
    minilm[0].processing_kwargs = {"text": {"add_special_tokens": False}}
    try:
        _cache(minilm, tmp_path, rows)
    finally:
        minilm[0].processing_kwargs = {}
    assert len([p for p in (tmp_path / "tokens").iterdir() if p.is_dir()]) == 6


def test_each_source_is_tokenised_with_its_own_prompts(minilm: SentenceTransformer, tmp_path: Path) -> None:
    minilm.prompts = {"query": "find: ", "document": "text: "}
    rows, columns = _rows(40), ["anchor", "positive", "negative"]
    sources = [(7, None), (3, Prompts(query="which law: ")), (30, Prompts(query="", document="statute: "))]
    cache = token_cache(rows, "f", columns, minilm, tmp_path, sources)
    expected = {  # (query, document) by the number of the row
        **dict.fromkeys(range(7), ("find: ", "text: ")),
        **dict.fromkeys(range(7, 10), ("which law: ", "text: ")),
        **dict.fromkeys(range(10, 40), (None, "statute: ")),
    }
    for row, (query, document) in expected.items():
        for column, name in enumerate(columns):
            role, prompt = ("query", query) if name == "anchor" else ("document", document)
            (ids,) = cache.texts(np.array([row * 3 + column]))
            own = minilm.preprocess([rows[row][name]], prompt=prompt, task=role)["input_ids"][0]
            assert ids.tolist() == own.tolist(), (row, name)
    token_cache(rows, "f", columns, minilm, tmp_path, [(40, None)])
    token_cache(rows, "f", columns, minilm, tmp_path)
    assert len([p for p in (tmp_path / "tokens").iterdir() if p.is_dir()]) == 2


def test_prompts_of_two_lengths_are_refused_where_the_pooling_leaves_them_out(
    minilm: SentenceTransformer, tmp_path: Path
) -> None:
    rows, columns = _rows(4), ["anchor", "positive", "negative"]
    sources = [(2, Prompts(query="find: ")), (2, Prompts(query="find the law: "))]
    assert token_cache(rows, "f", columns, minilm, tmp_path, sources).prompt_length == {"query": None, "document": None}
    pooling: Any = minilm[1]
    pooling.include_prompt = False
    with pytest.raises(UserError, match="leaves the query prompt out, which works for one length") as caught:
        token_cache(rows, "f", columns, minilm, tmp_path / "other", sources)
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()
    same = [(2, Prompts(query="find: ")), (2, Prompts(query="seek: "))]
    length = token_cache(rows, "f", columns, minilm, tmp_path, same).prompt_length["query"]
    assert length == minilm.preprocess(["a"], prompt="find: ", task="query")["prompt_length"]


def test_a_cell_without_a_text_is_an_empty_span(minilm: SentenceTransformer, tmp_path: Path) -> None:
    full = _rows(9)
    some = [None if row in (0, 3, 8) else text for row, text in enumerate(full["negative"])]
    rows = full.remove_columns("negative").add_column("negative", some).add_column("negative_2", [None] * 9)
    whole = _cache(minilm, tmp_path, full)
    cache = token_cache(rows, "g", ["anchor", "positive", "negative", "negative_2"], minilm, tmp_path)
    here = np.array([[True, True, text is not None, False] for text in some])
    assert np.array_equal(cache.lengths(np.arange(9)) > 0, here)
    assert not cache.token_id[~here].any() and not cache.text_id[~here].any()
    for row, column in zip(*np.nonzero(here), strict=True):
        assert cache.token_id[row, column] == whole.token_id[row, column]
        assert cache.text_id[row, column] == whole.text_id[row, column]
        ids = cache.texts(np.array([row * 4 + column]))[0], whole.texts(np.array([row * 3 + column]))[0]
        assert np.array_equal(*ids)


def test_a_text_without_tokens_is_an_error(minilm: SentenceTransformer, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"], "negative": [None, "e"]})
    # A tokenizer that adds no special tokens makes nothing of a control character.
    minilm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    columns = ["anchor", "positive", "negative"]
    assert token_cache(rows, "f", columns, minilm, tmp_path).lengths(np.array([0, 1])).tolist() == [
        [1, 1, 0],
        [1, 1, 1],
    ]
    nothing = datasets.Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"], "negative": [None, "\x07"]})
    with pytest.raises(UserError, match="row 2, negative: the text has no tokens; allowed: at least one"):
        token_cache(nothing, "g", columns, minilm, tmp_path)


@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin", "token_id.bin", "text_id.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_built_again(minilm: SentenceTransformer, tmp_path: Path, name: str, damage: str) -> None:
    rows = _rows(40)
    before = _cache(minilm, tmp_path, rows)
    expected = np.array(before.ids), np.array(before.text_id)
    (folder,) = (p for p in (tmp_path / "tokens").iterdir() if p.is_dir())
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    again = _cache(minilm, tmp_path, rows)
    assert np.array_equal(again.ids, expected[0])
    assert np.array_equal(again.text_id, expected[1])


def test_a_full_disk_leaves_no_cache(minilm: SentenceTransformer, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes to read-only folders")
    folder = tmp_path / "tokens"
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.raises((UserError, PermissionError)):
        _cache(minilm, tmp_path, _rows(5))
    shutil.rmtree(folder, ignore_errors=True)

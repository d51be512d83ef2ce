"""Token ids of a bundle through `tokenizers` alone, against transformers with the tokenizer that was trained with."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.bundles import FACTS, tiny_bert
from trainer.export.bundle import export_bundle
from trainer.export.encoder import Encoder
from trainer.export.parity import TEXTS

LENGTHS = {"query": 11, "document": 48}
SHORT_DOCUMENTS = {"query": 48, "document": 11}
PADDED: dict[str, Any] = {
    "padding": {
        "strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    },
    "truncation": {"direction": "Left", "max_length": 9, "strategy": "OnlyFirst", "stride": 3},
}  # fmt: skip


def numbers_of(content: Any) -> Iterator[tuple[str, Any]]:
    """What nested JSON says about lengths and padding."""
    if isinstance(content, dict):
        for key, value in content.items():
            if "length" in key or key in ("padding", "pad_to_multiple_of", "stride", "max_seq_length"):
                yield key, value
            yield from numbers_of(value) if key != "vocab" else ()


@pytest.mark.parametrize(
    ("lengths", "side"),
    [
        pytest.param(LENGTHS, "right", id="right"),
        pytest.param(SHORT_DOCUMENTS, "left", id="left", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_training(tmp_path: Path, minilm_folder: Path, lengths: dict[str, int], side: str):
    """The trained tokenizer.json pads and cuts in ways of its own, which no caller wants."""
    folder = tmp_path / "model"
    tiny_bert(minilm_folder).save(str(folder), create_model_card=False)
    for name, further in (
        ("tokenizer.json", PADDED),
        ("tokenizer_config.json", {"truncation_side": side, "model_max_length": 60}),
    ):
        content = json.loads((folder / name).read_text()) | further
        (folder / name).write_text(json.dumps(content))
    trained = AutoTokenizer.from_pretrained(folder)
    prompts = {"query": "search for: ", "document": ""}
    facts = dataclasses.replace(FACTS, max_length=lengths, prompts=prompts)
    bundle = export_bundle(SentenceTransformer(str(folder), device="cpu"), tmp_path / "bundle", facts)

    encoder = Encoder(bundle)
    truncation_side = json.loads((bundle / "manifest.json").read_text())["tokenizer"]["truncation_side"]
    for kind, length in lengths.items():
        alone = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        if length < max(lengths.values()):  # the file itself cuts at the longer one
            alone.enable_truncation(length, direction=truncation_side)
        cut = 0
        for text in TEXTS.values():
            ((ids, types),) = encoder.tokenize([text], kind)
            expected = trained(prompts[kind] + text, truncation=True, max_length=length)
            assert alone.encode(prompts[kind] + text).ids == expected["input_ids"] == ids.tolist()
            assert types.tolist() == expected["token_type_ids"]
            cut += len(ids) == length
        assert 0 < cut < len(TEXTS)

    loaded = AutoTokenizer.from_pretrained(bundle)
    assert loaded.model_max_length == 48 and len(loaded("word " * 99, truncation=True)["input_ids"]) == 48
    stated = {
        (path.name, key): value
        for path in bundle.glob("*.json")
        if path.name not in ("config.json", "manifest.json", "parity.json", "sbom.cdx.json")
        for key, value in numbers_of(json.loads(path.read_text()))
    }
    short = next(kind for kind, length in lengths.items() if length == 11)
    assert {place: value for place, value in stated.items() if value} == {
        ("tokenizer.json", "max_length"): 48,
        ("tokenizer_config.json", "model_max_length"): 48,
        ("sentence_bert_config.json", "max_seq_length"): 48,
        ("sentence_bert_config.json", f"{short}_length"): 11,
    }

"""Parity of the export for the architectures that users fine-tune, with small random weights.

Tokenizers without a package that carries them are trained here in the form that each family uses.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests import tiny_models
from tests.bundles import FACTS, tiny_model
from trainer.export.bundle import export_bundle
from trainer.export.encoder import Encoder
from trainer.export.verify import verify

TEXTS = [
    "short",
    "a text of middling length, with commas",
    "long " * 300,
    "na\u00efve \u6771\u4eac \U0001f680",
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
QWEN = SMALL | {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}


def byte_level(eos: str | None, pad: str, side: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in Qwen and ModernBERT; `eos` is appended to every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = sorted({pad, eos or pad})
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["time year people way day man woman life world school"] * 3, trainer)
    if eos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, padding_side=side, model_max_length=64
    )


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model with XLM-R's special tokens, numbers and template."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = tiny_models.unigram(special, ["time year people way day man woman life world school, and more"], 3)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", model_max_length=64,
    )  # fmt: skip


def check(model: SentenceTransformer, folder: Path, facts: Any) -> Path:
    """Export through the gate, then compare with sentence-transformers once more over other texts."""
    bundle = export_bundle(model, folder / "bundle", facts)
    assert verify(bundle) == []
    loaded = SentenceTransformer(str(bundle), device="cpu")
    for kind in ("query", "document"):
        encode = loaded.encode_query if kind == "query" else loaded.encode_document
        expected = encode(TEXTS)
        for batch_tokens in (1, 100_000):
            got = Encoder(bundle).encode(TEXTS, kind=kind, batch_tokens=batch_tokens)
            assert np.abs(got - expected).max() <= 1e-5
        assert np.ptp(expected @ expected.T) > 1e-3  # embeddings that are all alike would agree by accident
    model.max_seq_length = facts.max_length["document"]
    own = model.encode(TEXTS, prompt=facts.prompts["document"])
    assert np.abs(loaded.encode_document(TEXTS) - own).max() <= 1e-6
    return bundle


@pytest.mark.parametrize("pooling", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
def test_bert(tmp_path: Path, minilm_folder: Path, pooling: str):
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = tiny_model(tmp_path / "m", tokenizer, pooling, model_type="bert", max_position_embeddings=64, **SMALL)
    prompts = {"query": "Represent this sentence for searching relevant passages: ", "document": ""}
    check(model, tmp_path, dataclasses.replace(FACTS, prompts=prompts, max_length={"query": 20, "document": 64}))


def test_qwen3_with_last_token_and_left_padding(tmp_path: Path):
    tokenizer = byte_level("<|endoftext|>", "<|pad|>", "left")
    model = tiny_model(tmp_path / "m", tokenizer, "lasttoken", model_type="qwen3", vocab_size=len(tokenizer), **QWEN)
    prompts = {"query": "Instruct: Given a question, retrieve passages\nQuery:", "document": ""}
    bundle = check(
        model,
        tmp_path,
        dataclasses.replace(FACTS, prompts=prompts, max_length={"query": 96, "document": 128}),
    )
    names = {item.name for item in Encoder(bundle)._session.get_inputs()}
    assert names == {"input_ids", "attention_mask"}


@pytest.mark.slow
def test_qwen3_whose_tokenizer_adds_nothing(tmp_path: Path):
    """The empty text has no token there: no embedding to compare, zeros from the Encoder, never NaN."""
    tokenizer = byte_level(None, "<|pad|>", "left")
    model = tiny_model(tmp_path / "m", tokenizer, "lasttoken", model_type="qwen3", vocab_size=len(tokenizer), **QWEN)
    bundle = check(model, tmp_path, FACTS)
    assert not Encoder(bundle).encode(["", "a"])[0].any()


def test_modernbert(tmp_path: Path):
    """Alternating local attention: texts longer than the window, rotary positions without a table."""
    tokenizer = byte_level("<|endoftext|>", "<|pad|>", "right")
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 256,
    }
    ends = {"cls_token_id": 0, "sep_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    settings |= SMALL | ends | {"num_hidden_layers": 4, "local_attention": 16, "global_attn_every_n_layers": 3}
    model = tiny_model(tmp_path / "m", tokenizer, "cls", model_type="modernbert", **settings)
    check(model, tmp_path, dataclasses.replace(FACTS, max_length={"query": 200, "document": 200}, dims=[16]))


@pytest.mark.parametrize("pooling", [pytest.param("mean", marks=pytest.mark.slow), "cls"])
def test_xlm_roberta(tmp_path: Path, pooling: str):
    """Positions start behind the padding index: 66 of them for 64 tokens (bge-m3, multilingual-e5)."""
    tokenizer = unigram()
    settings = SMALL | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 66,
        "pad_token_id": 1,
        "type_vocab_size": 1,
    }
    model = tiny_model(tmp_path / "m", tokenizer, pooling, model_type="xlm-roberta", **settings)
    check(model, tmp_path, dataclasses.replace(FACTS, prompts={"query": "query: ", "document": "passage: "}))


@pytest.mark.slow
def test_nomic_bert(tmp_path: Path, minilm_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = tiny_model(tmp_path / "m", tokenizer, "mean", model_type="nomic_bert", max_position_embeddings=128, **SMALL)
    prompts = {"query": "search_query: ", "document": "search_document: "}
    check(
        model,
        tmp_path,
        dataclasses.replace(FACTS, prompts=prompts, max_length={"query": 64, "document": 128}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eurobert", "distilbert", "mpnet", "roberta", "electra", "deberta-v2"])
def test_further_encoders(tmp_path: Path, minilm_folder: Path, kind: str):
    tokenizer: Any = AutoTokenizer.from_pretrained(minilm_folder)
    settings: dict[str, Any] = SMALL | {"max_position_embeddings": 66}
    if kind in ("roberta", "mpnet"):
        tokenizer = unigram()
        settings |= {"vocab_size": len(tokenizer), "pad_token_id": 1, "type_vocab_size": 1}
    if kind == "eurobert":
        settings |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 0}
    if kind == "distilbert":
        settings = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 66}
    model = tiny_model(tmp_path / "m", tokenizer, "mean", model_type=kind, **settings)
    check(model, tmp_path, FACTS)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 21, 22, 23])
def test_every_opset_that_a_run_file_allows(tmp_path: Path, minilm_folder: Path, opset: int):
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = tiny_model(tmp_path / "m", tokenizer, "mean", model_type="bert", max_position_embeddings=64, **SMALL)
    check(model, tmp_path, dataclasses.replace(FACTS, opset=opset))

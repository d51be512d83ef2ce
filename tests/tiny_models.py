"""The architectures of the recipes as small random models, made offline in a second each.

Every function writes a sentence-transformers folder with pooling, token types, padding side and special
tokens of the model that it stands for: `bge_base(tmp_path / "model")`. Hidden 32, 2 layers, 64 positions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as flash
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

MAX_LENGTH = 64
HIDDEN = 32
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SENTENCES = [
    "search_query: how do I sort a list of numbers?",
    "search_document: The function returns the sorted list, smallest first.",
    "Represent this sentence for searching relevant passages: open a file and read every line",
    "Instruct: Given a question, retrieve passages that answer it\nQuery:who may end the contract",
    "The court held that the contract was void; both parties may end it within 30 days.",
    "Patients with chronic kidney disease were given 5 mg twice a day.",
    "Net revenue rose by 12 % to $4.1 billion in the fiscal year 2023.",
    "def mean(values): return sum(values) / len(values)",
    "Ein Satz mit Umlauten: Größe, Übermut; naïve café, 東京 and москва.",
]


def minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2: BERT, mean pooling, normalised."""
    return _bert(folder, "mean")


def bge_base(folder: Path) -> Path:
    """bge-base-en-v1.5: BERT, [CLS] pooling, normalised."""
    return _bert(folder, "cls")


def nomic(folder: Path) -> Path:
    """nomic-embed-text-v1.5: NomicBERT (rotary positions, gated MLP), mean pooling, not normalised."""
    tokenizer = _wordpiece()
    config = NomicBertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH)
    return _write(folder, _seeded(NomicBertModel, config), tokenizer, "mean", normalize=False)


def modernbert(folder: Path) -> Path:
    """modernbert-embed-base: ModernBERT (every third layer attends globally), mean pooling, normalised."""
    tokenizer = _fast(
        _byte_level({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4}, "[CLS] $A [SEP]"),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    config = ModernBertConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        local_attention=8,  # far below the length of a text, so that the window matters
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )
    return _write(folder, _seeded(ModernBertModel, config), tokenizer, "mean")


def bge_m3(folder: Path) -> Path:
    """bge-m3: XLM-RoBERTa (padding id 1, positions from 2, no token types), <s> pooling, normalised."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core = unigram(special, SENTENCES, special.index("<unk>"))
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = ["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"]
    tokenizer = _fast(core, cls_token="<s>", sep_token="</s>", **dict(zip(names, special, strict=True)))
    config = XLMRobertaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH + 2,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return _write(folder, _seeded(XLMRobertaModel, config), tokenizer, "cls")


def qwen3_embedding(folder: Path) -> Path:
    """Qwen3-Embedding: causal Qwen3, left padding with its end token, last-token pooling, normalised."""
    end = "<|endoftext|>"
    tokenizer = _fast(_byte_level({end: 0}, f"$A {end}"), eos_token=end, pad_token=end, padding_side="left")
    config = Qwen3Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    prompts = {
        "query": "Instruct: Given a question, retrieve passages that answer it\nQuery:",
        "document": "",
    }
    return _write(folder, _seeded(Qwen3Model, config), tokenizer, "lasttoken", prompts=prompts)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    build.__name__: build for build in (minilm, bge_base, bge_m3, nomic, modernbert, qwen3_embedding)
}


def flatten(model: SentenceTransformer) -> None:
    """Make sentence-transformers believe that this model has flash attention, so that it packs texts unpadded.

    The attention that computes stays what it was. Of the models here only the causal one (qwen3_embedding) then
    answers right: transformers tells its packed texts apart by their positions.
    """
    encoder: Any = model[0]
    config, known = encoder.auto_model.config, flash.lazy_import_flash_attention
    computes = config._attn_implementation
    flash.lazy_import_flash_attention = lambda *_, **__: ((None, object(), None, None), None)
    config._attn_implementation = "flash_attention_2"
    try:
        encoder.unpad_inputs = None  # looks at the conditions again
    finally:
        flash.lazy_import_flash_attention, config._attn_implementation = known, computes
    assert encoder.can_flatten_inputs


def _bert(folder: Path, pooling: str) -> Path:
    tokenizer = _wordpiece()
    config = BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH)
    return _write(folder, _seeded(BertModel, config), tokenizer, pooling)


def unigram(special: list[str], sentences: list[str], unknown: int) -> Tokenizer:
    """A sentencepiece model of these sentences' letters and words."""
    normalizer, splitter = normalizers.NFKC(), pre_tokenizers.Metaspace()
    letters, words = _pieces(sentences, normalizer, splitter)
    pieces = [(piece, 0.0) for piece in special] + [(letter, -9.0) for letter in letters]
    pieces += [(word, -5.0) for word in words if len(word) > 1]
    core = Tokenizer(models.Unigram(pieces, unknown))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizer, splitter, decoders.Metaspace()
    return core


def _pieces(sentences: list[str], normalizer: Any, splitter: Any) -> tuple[list[str], list[str]]:
    """Letters and words, in order: what the library's trainers find differs from process to process."""
    found = [splitter.pre_tokenize_str(normalizer.normalize_str(sentence)) for sentence in sentences]
    words = sorted({word for sentence in found for word, _ in sentence})
    return sorted(set("".join(words))), words


def _wordpiece() -> Any:
    """Lower-casing WordPiece with BERT's special tokens and token types."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    letters, words = _pieces(SENTENCES, normalizer, splitter)
    parts = {word[:n] for word in words for n in (1, 2, 3)} | {f"##{word[-n:]}" for word in words for n in (2, 3)}
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words, *sorted(parts)])
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizer, splitter, decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return _fast(core, model_input_names=inputs, **dict(zip(names, special, strict=True)))


def _byte_level(special: dict[str, int], template: str) -> Tokenizer:
    """Byte-level BPE; `special` tokens come first, in the order of their ids."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    used = [(token, number) for token, number in special.items() if token in template]
    core.post_processor = processors.TemplateProcessing(template, special_tokens=used)
    return core


def _fast(core: Tokenizer, **settings: Any) -> Any:
    settings = {"model_input_names": ["input_ids", "attention_mask"], **settings}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=MAX_LENGTH, **settings)


def _seeded(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Random weights, larger than the usual 0.02: with those all embeddings would be nearly the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.2)
    return model


def _write(
    folder: Path,
    encoder: PreTrainedModel,
    tokenizer: Any,
    pooling: Any,
    *,
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
) -> Path:
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules: list[Any] = [
        Transformer(str(folder), max_seq_length=MAX_LENGTH),
        Pooling(HIDDEN, pooling_mode=pooling),
    ]
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder

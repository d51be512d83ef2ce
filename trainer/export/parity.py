"""The parity gate: onnxruntime with the bundle's files against sentence-transformers with the PyTorch model.

Graph cases feed the same token ids to both, which fixes lengths exactly; text cases go through both sides'
own tokenizers, prompts and truncation. The result is the certificate that the bundle carries (parity.json).
"""

import base64
import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from launch.errors import CheckFailed
from trainer.export.encoder import KINDS, Encoder, truncate

# Most that a component of an embedding of length 1 may differ. What int8 costs is judged by retrieval (quantise.py);
# its bound tells a file that computes something else.
BOUNDS = {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.25}
LENGTHS = (1, 2, 7, 31, 128)
_TOGETHER = 512  # tokens; longer texts are compared alone, padding others to them would only cost time
_WORDS = ["time", "year", "people", "way", "day", "thing", "life", "child", "world", "school", "state", "group"]
TEXTS = {
    "plain": "How do I renew a residence permit before it expires?",
    "empty": "",
    "white space": "  \t two  spaces \n and a line ",
    "emoji": "ship it \U0001f680\U0001f469\u200d\U0001f4bb now",
    "accents": "Cr\u00e8me br\u00fbl\u00e9e, \u00c5ngstr\u00f6m, nai\u0308ve, \u0141\u00f3d\u017a",
    "CJK": "\u6771\u4eac\u306b\u4f4f\u3093\u3067\u3044\u307e\u3059\u3002 \u4f60\u597d\uff0c\u4e16",
    "right to left": "\u05e9\u05dc\u05d5\u05dd 12 \u0645\u0631\u062d\u0628\u0627",
    "control characters": "a\x00b\x07c\x1b[0m\u200b\u00ad\ufeff\ufffd end",
    "special tokens": "[CLS] [SEP] <s> </s> <|endoftext|> [MASK]",
    "one long word": "x" * 300,
    "100,000 characters": " ".join(_WORDS * 2000)[:100_000],
}
GOLDEN = ("plain", "empty", "accents", "CJK", "emoji")


@dataclass(frozen=True)
class Case:
    """One comparison: what PyTorch gave, and how an encoder computes the same."""

    name: str
    run: Callable[[Encoder], list[np.ndarray]]
    """-> [embeddings float32 [n, width], hidden states of the real tokens]; the latter in graph cases only."""
    expected: list[np.ndarray]
    tokens: int | None = None


def parity_cases(model: SentenceTransformer, encoder: Encoder) -> list[Case]:
    """What `model` (fp32, CPU, eval mode) computes, to be compared with each file of the bundle of `encoder`."""
    return [*_graph_cases(model, encoder), *_text_cases(model, encoder)]


def certificate(model: SentenceTransformer, encoder: Encoder, precisions: dict[str, Any]) -> dict[str, Any]:
    """The contents of parity.json: what `measured` found of each file, and golden embeddings of `model`."""
    golden = []
    for kind in KINDS:
        for name in GOLDEN:
            # Where the tokenizer adds no token of its own, the empty text has none and no embedding.
            if len(encoder.tokenize([TEXTS[name]], kind)[0][0]):
                vector = _reference(model, [TEXTS[name]], kind)[0]
                encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
                golden.append({"kind": kind, "text": TEXTS[name], "embedding": encoded})
    return {
        "what": "max abs difference per component of onnxruntime to sentence-transformers, fp32 on the CPU",
        "cpu": cpu(),
        "precisions": precisions,
        "token_ids": "equal to sentence-transformers' own for every text",
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in TEXTS.items()},
        "golden": golden,
    }


def measured(encoder: Encoder, precision: str, cases: list[Case], dims: list[int]) -> dict[str, Any]:
    """The part of the certificate for one file; raises CheckFailed naming precision, case, dim and difference."""
    bound, worst, rows = BOUNDS[precision], dict.fromkeys(dims, 0.0), []
    for case in cases:
        got = case.run(encoder)
        row: dict[str, Any] = {"case": case.name}
        if case.tokens is not None:
            row["tokens"] = case.tokens
        differences = {}
        for dim in dims:
            differences[f"dim {dim}"] = float(np.abs(truncate(got[0], dim) - truncate(case.expected[0], dim)).max())
            worst[dim] = max(worst[dim], differences[f"dim {dim}"])
        row["max_abs"] = _rounded(max(differences.values()))
        if len(got) > 1:
            # Hidden states have no fixed scale (an untied last norm reaches hundreds): relative to their largest.
            scale = max(1.0, float(np.abs(case.expected[1]).max()))
            differences["token_embeddings"] = float(np.abs(got[1] - case.expected[1]).max()) / scale
            row["token_embeddings_max_rel"] = _rounded(differences["token_embeddings"])
        for what, difference in differences.items():
            if not difference <= bound:  # NaN is not
                raise CheckFailed(
                    f"parity: {precision}, {case.name}, {what}: onnxruntime differs from PyTorch by {difference:.1e}, "
                    f"allowed {bound:.0e}; nothing published"
                )
        rows.append(row)
    return {
        "bound": bound,
        "max_abs_by_dim": {str(dim): _rounded(value) for dim, value in worst.items()},
        "cases": rows,
    }


def _graph_cases(model: SentenceTransformer, encoder: Encoder) -> Iterator[Case]:
    import torch

    longest = max(encoder.max_length.values())
    ids, types = encoder.tokenize([TEXTS["100,000 characters"]], max(KINDS, key=encoder.max_length.__getitem__))[0]
    batches = {f"length {length}": [length] for length in (*LENGTHS, longest) if length <= longest}
    batches["batch of 7"] = [min(length, longest) for length in (128, 1, 2, 7, 31, 3, 64)]
    batches["batch of 32"] = [min(1 + row * 11 % 32, longest) for row in range(32)]

    def run(rows: list[tuple[np.ndarray, np.ndarray]], encoder: Encoder) -> list[np.ndarray]:
        tokens, embeddings = encoder.run(rows)
        return [embeddings, tokens[encoder.pad(rows)["attention_mask"] == 1]]

    for name, lengths in batches.items():
        # Rows start at different words, so that a graph that mixes up rows cannot pass.
        rows = [(np.roll(ids, -row)[:length], types[:length]) for row, length in enumerate(lengths)]
        feed = {key: torch.from_numpy(value) for key, value in encoder.pad(rows).items()}
        with torch.inference_mode():
            features = model(feed)
        hidden = features["token_embeddings"].numpy()[feed["attention_mask"].bool().numpy()]
        yield Case(name, partial(run, rows), [features["sentence_embedding"].numpy(), hidden])


def _text_cases(model: SentenceTransformer, encoder: Encoder) -> Iterator[Case]:
    for kind in KINDS:
        tokens = dict(zip(TEXTS, encoder.tokenize(list(TEXTS.values()), kind), strict=True))
        for name, (ids, types) in tokens.items():
            _same_tokens(model, name, kind, ids, types)
        # Where both roles are treated alike the second pass would repeat the first.
        alike = encoder.prompts["query"] == encoder.prompts["document"]
        if kind == "document" and alike and len(set(encoder.max_length.values())) == 1:
            continue
        names = [name for name, (ids, _) in tokens.items() if len(ids)]
        alone = {name: _reference(model, [TEXTS[name]], kind) for name in names}

        def run(chosen: list[str], kind: Any, encoder: Encoder) -> list[np.ndarray]:
            return [encoder.encode([TEXTS[name] for name in chosen], kind=kind, batch_tokens=1 << 30)]

        for name in names:
            yield Case(f"{kind}, {name}", partial(run, [name], kind), [alone[name]], len(tokens[name][0]))
        short = [name for name in names if len(tokens[name][0]) <= _TOGETHER]
        expected = np.concatenate([alone[name] for name in short])
        yield Case(f"{kind}, all together", partial(run, short, kind), [expected])


def _reference(model: SentenceTransformer, texts: list[str], kind: str) -> np.ndarray:
    """sentence-transformers' embeddings at full width, float32 [n, width], scaled to length 1."""
    encode = model.encode_query if kind == "query" else model.encode_document
    vectors = encode(texts, convert_to_numpy=True, show_progress_bar=False, truncate_dim=None)
    return truncate(np.asarray(vectors, np.float32), vectors.shape[1])


def _same_tokens(model: SentenceTransformer, name: str, kind: str, ids: np.ndarray, types: np.ndarray) -> None:
    features = model.preprocess([TEXTS[name]], prompt=model.prompts.get(kind) or None, task=kind)
    expected = features["input_ids"][0].numpy()
    same = np.array_equal(ids, expected)
    if same and "token_type_ids" in features:
        same = np.array_equal(types, features["token_type_ids"][0].numpy())
    if not same:
        raise CheckFailed(
            f"parity: {kind}, {name}: the {len(ids)} tokens of tokenizer.json are not the {len(expected)} of "
            "sentence-transformers; nothing published"
        )


def cpu() -> str:
    """Architecture and name of this machine's processor, with the vector units that int8 products depend on."""
    information = Path("/proc/cpuinfo")
    text = information.read_text("utf-8") if information.exists() else ""
    facts = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    units = [flag for flag in facts.get("flags", "").split() if flag in ("avx2", "avx512bw", "avx512_vnni", "avx_vnni")]
    return " ".join([platform.machine(), facts.get("model name", platform.processor()), *units])


def _rounded(difference: float) -> float:
    return float(f"{difference:.2g}")

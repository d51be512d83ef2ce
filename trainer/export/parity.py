"""The parity gate: onnxruntime with the bundle's files against sentence-transformers with the PyTorch model.

Graph cases feed the same token ids to both, which fixes lengths exactly; text cases go through both sides'
own tokenizers, prompts and truncation. The result is the certificate that the bundle carries (parity.json).
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from launch.errors import CheckFailed
from trainer.export.encoder import KINDS, Encoder, truncate

BOUND = 1e-5  # max abs per component of an embedding of length 1
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


def check_parity(model: SentenceTransformer, folder: Path, dims: list[int]) -> dict[str, Any]:
    """Compare `folder` (manifest, tokenizer, graph) with `model` (fp32, CPU, eval mode).

    Returns the certificate; raises CheckFailed naming the case, the dim and the difference.
    """
    encoder = Encoder(folder)
    worst = dict.fromkeys(dims, 0.0)
    cases = [*_graph_cases(model, encoder, worst), *_text_cases(model, encoder, worst)]
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
        "bound": BOUND,
        "max_abs_by_dim": {str(dim): _rounded(value) for dim, value in worst.items()},
        "cases": cases,
        "token_ids": "equal to sentence-transformers' own for every text",
        "golden": golden,
    }


def _graph_cases(model: SentenceTransformer, encoder: Encoder, worst: dict[int, float]) -> list[dict[str, Any]]:
    import torch

    longest = max(encoder.max_length.values())
    ids, types = encoder.tokenize([TEXTS["100,000 characters"]], max(KINDS, key=encoder.max_length.__getitem__))[0]
    batches = {f"length {length}": [length] for length in (*LENGTHS, longest) if length <= longest}
    batches["batch of 7"] = [min(length, longest) for length in (128, 1, 2, 7, 31, 3, 64)]
    batches["batch of 32"] = [min(1 + row * 11 % 32, longest) for row in range(32)]
    cases = []
    for name, lengths in batches.items():
        # Rows start at different words, so that a graph that mixes up rows cannot pass.
        rows = [(np.roll(ids, -row)[:length], types[:length]) for row, length in enumerate(lengths)]
        got_tokens, got = encoder.run(rows)
        feed = {key: torch.from_numpy(value) for key, value in encoder.pad(rows).items()}
        mask = feed["attention_mask"].bool().numpy()
        with torch.inference_mode():
            features = model(feed)
        expected_tokens = features["token_embeddings"].numpy()[mask]
        difference = _compare(name, got, features["sentence_embedding"].numpy(), worst)
        # Hidden states have no fixed scale (an untied last norm reaches hundreds): relative to their largest.
        scale = max(1.0, float(np.abs(expected_tokens).max()))
        hidden = float(np.abs(got_tokens[mask] - expected_tokens).max()) / scale
        if not hidden <= BOUND:
            raise _failed(name, "token_embeddings", hidden)
        cases.append({"case": name, "max_abs": _rounded(difference), "token_embeddings_max_rel": _rounded(hidden)})
    return cases


def _text_cases(model: SentenceTransformer, encoder: Encoder, worst: dict[int, float]) -> list[dict[str, Any]]:
    cases = []
    for kind in KINDS:
        tokens = dict(zip(TEXTS, encoder.tokenize(list(TEXTS.values()), kind), strict=True))
        for name, (ids, types) in tokens.items():
            _same_tokens(model, name, kind, ids, types)
        # Where both roles are treated alike the second pass would repeat the first.
        alike = encoder.prompts["query"] == encoder.prompts["document"]
        if kind == "document" and alike and len(set(encoder.max_length.values())) == 1:
            continue
        names = [name for name, (ids, _) in tokens.items() if len(ids)]
        alone = {name: _reference(model, [TEXTS[name]], kind)[0] for name in names}
        for name in names:
            got = encoder.encode([TEXTS[name]], kind=kind)
            difference = _compare(f"{kind}, {name}", got, alone[name][None], worst)
            cases.append({"case": f"{kind}, {name}", "tokens": len(tokens[name][0]), "max_abs": _rounded(difference)})
        short = [name for name in names if len(tokens[name][0]) <= _TOGETHER]
        got = encoder.encode([TEXTS[name] for name in short], kind=kind, batch_tokens=1 << 30)
        difference = _compare(f"{kind}, all together", got, np.stack([alone[name] for name in short]), worst)
        cases.append({"case": f"{kind}, all together", "max_abs": _rounded(difference)})
    return cases


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


def _compare(case: str, got: np.ndarray, expected: np.ndarray, worst: dict[int, float]) -> float:
    """Largest difference over all dims, both sides truncated and scaled to length 1; updates `worst`."""
    largest = 0.0
    for dim, before in worst.items():
        difference = float(np.abs(truncate(got, dim) - truncate(expected, dim)).max())
        if not difference <= BOUND:
            raise _failed(case, f"dim {dim}", difference)
        worst[dim] = max(before, difference)
        largest = max(largest, difference)
    return largest


def _failed(case: str, what: str, difference: float) -> CheckFailed:
    return CheckFailed(
        f"parity: {case}, {what}: onnxruntime differs from PyTorch by {difference:.1e}, allowed {BOUND:.0e}; "
        "nothing published"
    )


def _rounded(difference: float) -> float:
    return float(f"{difference:.2g}")

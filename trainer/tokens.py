"""The token cache: every text tokenised once, so that a step only slices and a plan reads no text.

Files of one cache folder, all for `rows` x `columns` texts in row-major order (text number = row * columns +
column): `ids.bin` int32 token ids without padding, `offsets.bin` int64 start of each text in ids (one more than
texts), `token_id.bin` and `text_id.bin` uint64. `token_id` is a hash of role and final token ids and decides what is
embedded once; `text_id` is a hash of the normalised text and decides masks. A cell without a text has length 0 and
identities 0. A cache is keyed by tokenizer, prompts, maximal lengths and data.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from data_tools.progress import Progress
from data_tools.split import normalise
from launch.config_data import Prompts
from launch.errors import UserError
from trainer.arrays import array_folder
from trainer.model import ROLES, Role, max_length_of, prompt_of, tokenizer_settings

FORMAT = 1
_ROWS_AT_ONCE = 2048  # rows tokenised together: enough for all cores, a few MB of padding
_TEXTS_AT_ONCE = 1 << 20  # whose lengths are read
_FILES: dict[str, type[np.generic]] = {
    "ids": np.int32,
    "offsets": np.int64,
    "token_id": np.uint64,
    "text_id": np.uint64,
}


def role_of(column: str) -> Role:
    """Anchors are queries, every other text column is a document."""
    return "query" if column == "anchor" else "document"


def text_id(text: str) -> int:
    """64-bit hash of a text, the same for texts that differ only in Unicode form (NFKC), case or white space."""
    return xxhash.xxh3_64_intdigest(normalise(text).encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class TokenCache:
    """Memory-mapped tokens of all rows; see the module's docstring for the layout."""

    columns: list[str]
    ids: np.ndarray
    offsets: np.ndarray
    token_id: np.ndarray  # [rows, columns] uint64
    text_id: np.ndarray  # [rows, columns] uint64
    prompt_length: dict[str, int | None]  # by role: tokens of the prompt, for poolings that leave it out

    def __len__(self) -> int:
        return len(self.token_id)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Token counts, int64 [len(rows), columns]."""
        first = rows[:, None] * len(self.columns) + np.arange(len(self.columns))
        return self.offsets[first + 1] - self.offsets[first]

    def longest_text(self) -> tuple[int, int, int]:
        """Row, column and token count of a text that no other is longer than. Reads all lengths, a few MB at once."""
        starts = range(0, len(self.offsets) - 1, _TEXTS_AT_ONCE)
        lengths = ((start, np.diff(self.offsets[start : start + _TEXTS_AT_ONCE + 1])) for start in starts)
        length, number = max((int(some.max()), start + int(some.argmax())) for start, some in lengths)
        return *divmod(number, len(self.columns)), length

    def texts(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Token ids of texts by text number, one int32 array each."""
        return [self.ids[self.offsets[n] : self.offsets[n + 1]] for n in numbers]


class Padder:
    """Turns token ids into the features of the model: padded on its own side, with mask and token types.

    Where sentence-transformers packs texts without padding (flash attention), `flat` is true and the features are
    those that its own module makes: one line of all tokens with the places where texts begin.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        tokenizer = model.tokenizer
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._left = tokenizer.padding_side == "left"
        self._types = "token_type_ids" in tokenizer.model_input_names
        self._encoder: Any = model[0]
        self.flat = bool(getattr(self._encoder, "can_flatten_inputs", False)) and bool(
            self._encoder._should_flatten_inputs("text", {})
        )

    def __call__(self, texts: Sequence[np.ndarray], device: torch.device | str) -> dict[str, Any]:
        """Features for `model(features)`: input_ids, attention_mask (, token_type_ids) int64 [texts, longest].

        Flat: input_ids, position_ids int64 [1, tokens], seq_idx int32 likewise, cu_seq_lens_q and _k int32 [texts + 1],
        max_length_q and _k as integers.
        """
        if self.flat:
            packed = self._encoder.data_collator([{"input_ids": text} for text in texts])
            del packed["labels"]
            packed["position_ids"] += self._encoder._flatten_position_offset
            return {
                k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in packed.items()
            } | {"modality": "text"}
        longest = max(len(t) for t in texts)
        ids = np.full((len(texts), longest), self._pad, np.int64)
        mask = np.zeros((len(texts), longest), np.int64)
        for row, text in enumerate(texts):
            place = slice(longest - len(text), None) if self._left else slice(0, len(text))
            ids[row, place] = text
            mask[row, place] = 1
        features: dict[str, Any] = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self._types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return {name: tensor.to(device, non_blocking=True) for name, tensor in features.items()} | {"modality": "text"}


# Rows that one source has, and its prompts by role.
Part = tuple[int, dict[Role, str | None]]


def token_cache(
    rows: Any,
    fingerprint: str,
    columns: Sequence[str],
    model: SentenceTransformer,
    cache_dir: Path,
    sources: Sequence[tuple[int, Prompts | None]] = (),
    cache_url: str | None = None,
) -> TokenCache:
    """Open the cache of these rows for this model, building it first where there is none that is whole.

    `rows` is a `datasets.Dataset` with the text `columns`; `fingerprint` stands for its content; `sources` says how
    many of its rows come from each source, and which prompts replace the model's there; `cache_url` is a folder of an
    object store that is asked first. Call it as `array_folder` says. Raises UserError for a text that has no tokens,
    for prompts that a pooling which leaves them out cannot tell apart, and as `array_folder` does.
    """
    parts: list[Part] = []
    for count, prompts in sources or [(len(rows), None)]:
        own = {role: getattr(prompts, role, None) for role in ROLES}
        parts.append(
            (count, {role: prompt_of(model, role) if (p := own[role]) is None else p or None for role in ROLES})
        )
    prompt_length = _prompt_lengths(model, parts)
    facts = _facts(fingerprint, columns, model, parts)
    arrays = array_folder(
        cache_dir / "tokens",
        facts,
        _FILES,
        lambda folder: _build(folder, rows, columns, model, parts),
        f"{cache_url}/tokens" if cache_url else None,
    )
    token_id, text_id = (arrays[name].reshape(-1, len(columns)) for name in ("token_id", "text_id"))
    return TokenCache(list(columns), arrays["ids"], arrays["offsets"], token_id, text_id, prompt_length)


def _facts(
    fingerprint: str, columns: Sequence[str], model: SentenceTransformer, parts: Sequence[Part]
) -> dict[str, Any]:
    module: Any = model[0]
    return {
        "format": FORMAT,
        "truncation_side": getattr(model.tokenizer, "truncation_side", None),
        "chat_template": getattr(model.tokenizer, "chat_template", None),
        "module": json.loads(json.dumps(module.get_config_dict(), default=str)),
        "data": fingerprint,
        "columns": list(columns),
        "tokenizer": xxhash.xxh3_128_hexdigest(json.dumps(tokenizer_settings(model)).encode()),
        "max_length": {role: max_length_of(model, role) for role in ROLES},
        "prompts": [prompts for _, prompts in parts],
    }


def _prompt_lengths(model: SentenceTransformer, parts: Sequence[Part]) -> dict[str, int | None]:
    """By role; where sources differ, None for a pooling that never asks."""
    lengths: dict[str, int | None] = {}
    for role in ROLES:
        found = set()
        for prompt in {prompts[role] for _, prompts in parts}:
            length = model.preprocess(["a"], prompt=prompt, task=role).get("prompt_length") if prompt else None
            found.add(None if length is None else int(length))
        if len(found) > 1 and any(isinstance(m, Pooling) and not m.include_prompt for m in model):
            raise UserError(
                f"data.sources[].prompts: the model's pooling leaves the {role} prompt out, which works for one length "
                "of prompt only; allowed: prompts of equally many tokens in all sources"
            )
        lengths[role] = found.pop() if len(found) == 1 else None
    return lengths


def _build(folder: Path, rows: Any, columns: Sequence[str], model: SentenceTransformer, parts: Sequence[Part]) -> None:
    # The tokenizer's own threads use all cores; off again before loader workers fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        files = {name: (folder / f"{name}.bin").open("wb") for name in _FILES}
        with Progress("tokenising", len(rows), "rows") as progress:
            np.zeros(1, np.int64).tofile(files["offsets"])
            end = 0
            for start, stop, prompts in _slices(parts):
                batch = rows[start:stop]
                by_column = [_tokenise(batch[c], role_of(c), model, prompts[role_of(c)]) for c in columns]
                texts = [text for row in zip(*by_column, strict=True) for text in row]
                words = [word for row in zip(*(batch[c] for c in columns), strict=True) for word in row]
                for i, (text, word) in enumerate(zip(texts, words, strict=True)):
                    if word is not None and not len(text):
                        row, column = divmod(i, len(columns))
                        where = f"row {start + row + 1}, {columns[column]}"
                        raise UserError(f"{where}: the text has no tokens; allowed: at least one")
                offsets = end + np.cumsum([len(t) for t in texts], dtype=np.int64)
                end = int(offsets[-1])
                np.concatenate(texts).tofile(files["ids"])
                offsets.tofile(files["offsets"])
                seeds = [role_of(column) == "query" for column in columns] * len(by_column[0])
                hashed = zip(texts, seeds, strict=True)
                tokens = (xxhash.xxh3_64_intdigest(t.tobytes(), int(s)) if len(t) else 0 for t, s in hashed)
                np.fromiter(tokens, np.uint64).tofile(files["token_id"])
                np.fromiter((0 if w is None else text_id(w) for w in words), np.uint64).tofile(files["text_id"])
                progress.to(stop)
        for file in files.values():
            file.close()
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _slices(parts: Sequence[Part]) -> Iterator[tuple[int, int, dict[Role, str | None]]]:
    """Runs of rows that are tokenised together: first row, row after the last, prompts."""
    end = 0
    for count, prompts in parts:
        start, end = end, end + count
        for first in range(start, end, _ROWS_AT_ONCE):
            yield first, min(end, first + _ROWS_AT_ONCE), prompts


def _tokenise(
    texts: Sequence[str | None], role: Role, model: SentenceTransformer, prompt: str | None
) -> list[np.ndarray]:
    """Final token ids as the model's own preprocessing makes them, prompt included, padding taken off; none of None."""
    if None in texts:
        present = [text for text in texts if text is not None]
        found = iter(_tokenise(present, role, model, prompt) if present else ())
        return [np.empty(0, np.int32) if text is None else next(found) for text in texts]
    features = model.preprocess(list(texts), prompt=prompt, task=role)
    if "cu_seq_lens_q" in features:  # packed without padding
        return np.split(features["input_ids"][0].numpy().astype(np.int32), features["cu_seq_lens_q"].numpy()[1:-1])
    ids = features["input_ids"].numpy().astype(np.int32)
    mask = features["attention_mask"].numpy().astype(bool)
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]

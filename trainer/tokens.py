"""The token cache: every text tokenised once, so that a step only slices and a plan reads no text.

Files of one cache folder, all for `rows` x `columns` texts in row-major order (text number = row * columns +
column): `ids.bin` int32 token ids without padding, `offsets.bin` int64 start of each text in ids (one more than
texts), `token_id.bin` and `text_id.bin` uint64. `token_id` is a hash of role and final token ids and decides what is
embedded once; `text_id` is a hash of the normalised text and decides masks. A cache is keyed by tokenizer, prompts,
maximal lengths and data; one whose files differ from its manifest is built again.
"""

import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from sentence_transformers import SentenceTransformer

from data_tools.progress import Progress
from launch.errors import UserError
from launch.files import exclusive, publish_folder, remove_folder, write_json
from trainer.model import ROLES, Role, max_length_of, prompt_of

FORMAT = 1
MANIFEST = "manifest.json"
_ROWS_AT_ONCE = 2048  # rows tokenised together: enough for all cores, a few MB of padding
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
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return xxhash.xxh3_64_intdigest(folded.encode("utf-8", "surrogatepass"))


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
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
        }
        if self._types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return {name: tensor.to(device, non_blocking=True) for name, tensor in features.items()} | {"modality": "text"}


def token_cache(
    rows: Any, fingerprint: str, columns: Sequence[str], model: SentenceTransformer, cache_dir: Path
) -> TokenCache:
    """Open the cache of these rows for this model, building it first where there is none that is whole.

    `rows` is a `datasets.Dataset` with the text `columns`; `fingerprint` stands for its content. Call it before the
    process group exists: the first process of a node builds, the others wait on a file lock. Raises UserError for a
    text that has no tokens.
    """
    facts = _facts(fingerprint, columns, model)
    key = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
    folder = cache_dir / "tokens" / key
    with exclusive(cache_dir / "tokens" / f".{key}.lock"):
        if not _is_whole(folder, facts):
            remove_folder(folder)
            _build(folder, facts, rows, columns, model)
    return _open(folder, list(columns), _prompt_lengths(model))


def _facts(fingerprint: str, columns: Sequence[str], model: SentenceTransformer) -> dict[str, Any]:
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    words = repr(model.tokenizer)
    if backend is not None:
        # Truncation and padding are left from the last call: the facts below say the lengths, and nothing is padded.
        words = json.dumps(
            {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        )
    return {
        "format": FORMAT,
        "data": fingerprint,
        "columns": list(columns),
        "tokenizer": xxhash.xxh3_128_hexdigest(words.encode()),
        "max_length": {role: max_length_of(model, role) for role in ROLES},
        "prompts": {role: prompt_of(model, role) for role in ROLES},
    }


def _prompt_lengths(model: SentenceTransformer) -> dict[str, int | None]:
    lengths: dict[str, int | None] = {}
    for role in ROLES:
        prompt = prompt_of(model, role)
        length = model.preprocess(["a"], prompt=prompt, task=role).get("prompt_length") if prompt else None
        lengths[role] = None if length is None else int(length)
    return lengths


def _is_whole(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the folder holds exactly what its manifest says, hash by hash, and was made for these facts."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["facts"] == facts and all(
            manifest["files"][name] == _hash(folder / f"{name}.bin") for name in _FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _open(folder: Path, columns: list[str], prompt_length: dict[str, int | None]) -> TokenCache:
    arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in _FILES.items()}
    return TokenCache(
        columns=columns,
        ids=arrays["ids"],
        offsets=arrays["offsets"],
        token_id=arrays["token_id"].reshape(-1, len(columns)),
        text_id=arrays["text_id"].reshape(-1, len(columns)),
        prompt_length=prompt_length,
    )


def _build(folder: Path, facts: dict[str, Any], rows: Any, columns: Sequence[str], model: SentenceTransformer) -> None:
    partial = folder.with_name(f".partial-{folder.name}")
    remove_folder(partial)
    partial.mkdir(parents=True)
    # The tokenizer's own threads use all cores; off again before loader workers fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        files = {name: (partial / f"{name}.bin").open("wb") for name in _FILES}
        with Progress("tokenising", len(rows), "rows") as progress:
            np.zeros(1, np.int64).tofile(files["offsets"])
            end = 0
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                batch = rows[start : start + _ROWS_AT_ONCE]
                by_column = [_tokenise(batch[column], column, model) for column in columns]
                texts = [column[i] for i in range(len(by_column[0])) for column in by_column]
                for i, text in enumerate(texts):
                    if not len(text):
                        row, column = divmod(i, len(columns))
                        raise UserError(
                            f"row {start + row + 1}, {columns[column]}: the text has no tokens; allowed: at least one"
                        )
                offsets = end + np.cumsum([len(t) for t in texts], dtype=np.int64)
                end = int(offsets[-1])
                np.concatenate(texts).tofile(files["ids"])
                offsets.tofile(files["offsets"])
                seeds = [role_of(column) == "query" for column in columns] * len(by_column[0])
                tokens = (xxhash.xxh3_64_intdigest(t.tobytes(), int(s)) for t, s in zip(texts, seeds, strict=True))
                np.fromiter(tokens, np.uint64).tofile(files["token_id"])
                normal = (text_id(batch[column][i]) for i in range(len(by_column[0])) for column in columns)
                np.fromiter(normal, np.uint64).tofile(files["text_id"])
                progress.to(start + len(by_column[0]))
        for file in files.values():
            file.close()
        write_json(partial / MANIFEST, {"facts": facts, "files": {n: _hash(partial / f"{n}.bin") for n in _FILES}})
        publish_folder(partial, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {partial}: {error.strerror}") from error
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        remove_folder(partial)


def _tokenise(texts: Sequence[str], column: str, model: SentenceTransformer) -> list[np.ndarray]:
    """Final token ids as the model's own preprocessing makes them, prompt included, padding taken off."""
    role = role_of(column)
    features = model.preprocess(list(texts), prompt=prompt_of(model, role), task=role)
    if "cu_seq_lens_q" in features:  # packed without padding
        return np.split(features["input_ids"][0].numpy().astype(np.int32), features["cu_seq_lens_q"].numpy()[1:-1])
    ids = features["input_ids"].numpy().astype(np.int32)
    mask = features["attention_mask"].numpy().astype(bool)
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]

"""Embed texts with a bundle: standard library, numpy, onnxruntime and tokenizers only.

    Encoder("bundle").encode(["first text", "second text"], dim=256, kind="document")

Prompts, maximal lengths and padding come from the bundle's manifest, so that a caller cannot get them wrong.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launch.errors import CheckFailed, UserError

FORMAT = "nestling-bundle/1"
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
KINDS = ("query", "document")
_JSON_LIMIT = 64 << 20  # bytes of a JSON file that are read before any hash of it is known


class Encoder:
    """Embed texts with a bundle through onnxruntime; the tokenizer, prompts and lengths are the bundle's.

    Raises CheckFailed if the bundle cannot be loaded. `threads` are the threads of one forward pass (None =
    onnxruntime's choice), `precision` is a key of the manifest's `onnx`.
    """

    def __init__(self, folder: str | Path, threads: int | None = None, precision: str = "fp32") -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        root = Path(folder)
        manifest = read_manifest(root)
        if precision not in manifest["onnx"]:
            raise UserError(f"precision: got {precision!r}, the bundle has {', '.join(manifest['onnx'])}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # an unreadable file is reported by us, once
        options.intra_op_num_threads = threads or 0  # 0 = its own choice
        name = manifest["onnx"][precision]
        try:
            self._session = onnxruntime.InferenceSession(
                root / name, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            self._inputs = [item.name for item in self._session.get_inputs()]
            problem = _signature_problem(self._session, manifest["width"])
        except Exception as error:  # onnxruntime has an exception class of its own per error code
            raise CheckFailed(f"{name}: onnxruntime cannot load it: {first_line(error)}") from None
        if problem is not None:
            raise CheckFailed(f"{name}: {problem}")
        self.width: int = manifest["width"]
        self.dims: list[int] = manifest["dims"]
        self.prompts: dict[str, str] = manifest["prompts"]
        self.max_length: dict[str, int] = manifest["max_length"]
        self._pad_id: int = manifest["tokenizer"]["pad_id"]
        self._left: bool = manifest["tokenizer"]["padding_side"] == "left"
        self._tokenizers: dict[int, Any] = {}
        try:
            for length in sorted(set(self.max_length.values())):
                tokenizer = Tokenizer.from_file(str(root / TOKENIZER))
                tokenizer.no_padding()
                tokenizer.enable_truncation(max_length=length, direction=manifest["tokenizer"]["truncation_side"])
                self._tokenizers[length] = tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exception, and a panic of its Rust is not even one
            raise CheckFailed(f"{TOKENIZER}: cannot be read: {first_line(error)}") from None

    def tokenize(self, texts: Sequence[str], kind: str = "document") -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids and type ids, int64 [length], of each text with its prompt, cut to the kind's length."""
        tokenizer = self._tokenizers[self.max_length[kind]]
        prompt = self.prompts[kind]
        tokens = []
        for start in range(0, len(texts), 1024):  # Encoding objects are many times larger than their ids
            for item in tokenizer.encode_batch([prompt + text for text in texts[start : start + 1024]]):
                tokens.append((np.array(item.ids, np.int64), np.array(item.type_ids, np.int64)))
        return tokens

    def encode(
        self,
        texts: Sequence[str],
        dim: int | None = None,
        kind: Literal["document", "query"] = "document",
        batch_tokens: int = 8192,
    ) -> np.ndarray:
        """Embeddings float32 [len(texts), dim] of length 1, in the order of `texts`.

        `dim` is one of the manifest's dims (None = full width): the first components, normalised again. Texts
        are embedded by length in batches with rows x longest <= batch_tokens (a longer text goes alone).
        A text without any token, possible only where the tokenizer adds none, gives zeros. Raises UserError
        for an unknown dim or kind.
        """
        if kind not in KINDS:
            raise UserError(f"kind: got {kind!r}, allowed: {', '.join(KINDS)}")
        if dim is not None and dim not in self.dims:
            raise UserError(f"dim: got {dim}, this bundle allows {', '.join(map(str, self.dims))}")
        if isinstance(texts, str):
            raise UserError("texts: got one string, allowed: a list of strings")
        tokens = self.tokenize(texts, kind)
        embeddings = np.zeros((len(texts), self.width), np.float32)
        for rows in _batches([len(ids) for ids, _ in tokens], batch_tokens):
            embeddings[rows] = self.run([tokens[row] for row in rows])[1]
        return embeddings if dim is None else truncate(embeddings, dim)

    def run(self, tokens: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """One forward pass: float32 token_embeddings [n, longest, hidden], sentence_embedding [n, width]."""
        outputs: Any = self._session.run(["token_embeddings", "sentence_embedding"], self.pad(tokens))
        return outputs

    def pad(self, tokens: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """The graph's inputs, int64 [n, longest], from rows of token ids and type ids."""
        longest = max(len(ids) for ids, _ in tokens)
        shape = (len(tokens), longest)
        feed = {
            "input_ids": np.full(shape, self._pad_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for row, (ids, types) in enumerate(tokens):
            where = slice(longest - len(ids), longest) if self._left else slice(0, len(ids))
            feed["input_ids"][row, where] = ids
            feed["attention_mask"][row, where] = 1
            feed["token_type_ids"][row, where] = types
        return {name: feed[name] for name in self._inputs}


def truncate(embeddings: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` components of each row, float32 [n, dim], scaled to length 1 (zero rows stay zero)."""
    cut = embeddings[:, :dim]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.float32(1e-12))


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, as manifest.schema.json describes it and with no link in a graph's path; raises CheckFailed."""
    if not root.is_dir():
        raise CheckFailed(f"{root}: not a folder; give the folder that holds {MANIFEST}")
    manifest = read_json(root, MANIFEST)
    if breach := _breach(manifest, _SCHEMA, ""):
        raise CheckFailed(f"{MANIFEST}: {breach}")
    if max(manifest["dims"]) > manifest["width"]:
        raise CheckFailed(f"{MANIFEST}: dims are {manifest['dims']}, allowed: 1 to the width {manifest['width']}")
    for name in manifest["onnx"].values():
        if not os.path.realpath(root / name).startswith(os.path.realpath(root) + os.sep):
            raise CheckFailed(f"{name}: leaves the folder through a link")
    return manifest


_SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("manifest.schema.json").read_text(encoding="utf-8"))
_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}


def _breach(value: Any, rule: Any, where: str) -> str | None:
    """The first place where `value` breaks `rule`, by those keywords of JSON Schema that the manifest's schema uses."""
    if rule is None:
        return None
    rule = _SCHEMA["$defs"].get(rule.get("$ref", "").rpartition("/")[2], rule)
    kind = type(value)
    if (
        kind not in [_TYPES[name] for name in rule["type"]]
        or (kind is int and not rule["minimum"] <= value <= rule["maximum"])
        or (kind is str and not re.fullmatch(rule.get("pattern", "(?s:.*)"), value))
        or (kind is list and not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)))
        or (kind is dict and len(value) < rule.get("minProperties", 0))
    ):
        got = f"{kind.__name__} of {len(value)}" if kind in (dict, list) else f"{value!a:.60}"
        return f"{where} is {got}, allowed: {rule['description']}"
    steps: list[tuple[Any, Any, str]] = []
    if kind is list:
        steps = [(item, rule["items"], f"{where}[{place}]") for place, item in enumerate(value)]
    if kind is dict:
        for name, item in value.items():
            own = rule.get("properties", {}).get(name, rule.get("additionalProperties"))
            steps.append((name, rule.get("propertyNames"), f"a name in {where}"))
            steps.append((item, own, f"{where}.{ascii(name)[1:-1]:.60}".lstrip(".")))
    absent = [
        f"{where}.{name} is missing".lstrip(".")
        for name in rule.get("required", ())
        if kind is dict and name not in value
    ]
    return next((breach for step in steps if (breach := _breach(*step))), absent[0] if absent else None)


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The object in the file `name`, in which no key stands twice; raises CheckFailed."""
    path = root / name
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _JSON_LIMIT:
            raise CheckFailed(f"{name}: not a regular file below {_JSON_LIMIT >> 20} MiB")
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise CheckFailed(f"{name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"{name}: not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckFailed(f"{name}: not a JSON object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):  # which of the two counts differs between readers of JSON
        raise ValueError("a key stands twice")
    return content


def _signature_problem(session: Any, width: int) -> str | None:
    """Why the graph is not [batch, sequence] int64 -> float32 token and sentence embeddings, or None."""
    ids, floats = "tensor(int64)", "tensor(float)"
    allowed = {"input_ids": (ids, 2), "attention_mask": (ids, 2), "token_type_ids": (ids, 2)}
    allowed |= {"token_embeddings": (floats, 3), "sentence_embedding": (floats, 2)}
    found = {item.name: item for item in (*session.get_inputs(), *session.get_outputs())}
    if not allowed.keys() - {"token_type_ids"} <= found.keys() <= allowed.keys():
        return f"inputs and outputs are {', '.join(map(ascii, found))}, allowed: {', '.join(allowed)}"
    for name, item in found.items():
        if (item.type, len(item.shape)) != allowed[name]:
            return f"{name} is {item.type} {item.shape}, allowed: {allowed[name][0]} of rank {allowed[name][1]}"
    if (shape := found["sentence_embedding"].shape)[1] != width:
        return f"sentence_embedding is {shape}, allowed: [batch, {width}]"
    return None


def _batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers by descending length, cut to rows x longest <= batch_tokens; empty rows are left out."""
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + rows]
        start += rows


def first_line(error: BaseException) -> str:
    """What an error says, as a line that a terminal can show: the names in it may be a forger's."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "".join(letter if " " <= letter <= "~" else ascii(letter)[1:-1] for letter in line)

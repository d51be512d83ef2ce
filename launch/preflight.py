"""Static checks of a run: all that files and settings can tell before a GPU hour is spent.

Nothing here imports torch or reads more than the first kilobytes of a file. `nestling check RUN.yaml` and
`train.py` report all problems at once.
"""

import csv
import gzip
import importlib.util
import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config import ROLE, Model, PlainSource, RunConfig
from launch.errors import UserError
from launch.reader import did_you_mean, near_file, run_directory

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")

# Roles that a loss needs beside `anchor`; `negative` also stands for negative_1, negative_2 ...
_PAIRS = ("positive",)
_SCORED, _LABELLED = ("positive", "score"), ("positive", "label")
NEEDED_ROLES: dict[str, tuple[str, ...]] = {
    "AnglELoss": _SCORED,
    "BatchAllTripletLoss": ("label",),
    "BatchHardSoftMarginTripletLoss": ("label",),
    "BatchHardTripletLoss": ("label",),
    "BatchSemiHardTripletLoss": ("label",),
    "CachedGISTEmbedLoss": _PAIRS,
    "CachedMultipleNegativesRankingLoss": _PAIRS,
    "CachedMultipleNegativesSymmetricRankingLoss": _PAIRS,
    "CoSENTLoss": _SCORED,
    "ContrastiveLoss": _LABELLED,
    "CosineSimilarityLoss": _SCORED,
    "DistillKLDivLoss": ("positive", "negative", "score"),
    "GISTEmbedLoss": _PAIRS,
    "MarginMSELoss": ("positive", "negative", "score"),
    "MegaBatchMarginLoss": _PAIRS,
    "MultipleNegativesRankingLoss": _PAIRS,
    "MultipleNegativesSymmetricRankingLoss": _PAIRS,
    "OnlineContrastiveLoss": _LABELLED,
    "SoftmaxLoss": _LABELLED,
    "TripletLoss": ("positive", "negative"),
}

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Names without an owner that the hub or sentence-transformers know.
_SHORT_NAME = re.compile(
    r"(all|multi-qa|msmarco|paraphrase|distiluse|gtr|sentence-t5|bert|distilbert|roberta|xlm-roberta|albert|"
    r"distilroberta|camembert|nli|stsb|LaBSE|average_word_embeddings|allenai-specter)(-[\w.-]+)?"
)
# Models with learnt absolute positions: a longer text is an index error. Some start counting at 2.
_POSITIONS_FROM = {
    "bert": 0,
    "distilbert": 0,
    "electra": 0,
    "mpnet": 2,
    "roberta": 2,
    "xlm-roberta": 2,
    "camembert": 2,
}
_HEAD = 1 << 16  # bytes of a text file that are read for its columns


def preflight(config: RunConfig, run_file: Path) -> list[str]:
    """Problems of a run, one line each; empty where none can be seen from here."""
    problems = []
    needed = NEEDED_ROLES[config.loss.name]
    for number, source in enumerate(config.data.sources):
        problems += _source_problems(source, f"data.sources.{number}", needed, config.loss.name)
    for number, source in enumerate(config.data.known_positives or []):
        problems += _source_problems(source, f"data.known_positives.{number}", _PAIRS, "a table of known positives")
    for number, source in enumerate(config.evaluate.sources if config.evaluate else []):
        problems += _source_problems(source, f"evaluate.sources.{number}", _PAIRS, "evaluation")
    optional = {
        "data.cache_url": (config.data.cache_url, "obstore", "cloud"),
        "model.lora": (config.model.lora, "peft", "lora"),
    }
    for key, (value, module, extra) in optional.items():
        try:
            if value is not None:
                require_extra(module, extra, key)
        except UserError as error:
            problems.append(str(error))
    folder = None
    try:
        resolved = Path(resolve_model_path(config.model.path))
        folder = resolved if resolved.is_dir() else None
    except UserError as error:
        problems.append(str(error))
    if folder is not None:
        problems += _model_problems(config.model, config.loss.dims or [], folder)
    return problems + _disk_problems(config, run_directory(config, run_file), folder)


def require_preflight(config: RunConfig, run_file: Path) -> None:
    """Raise UserError with one line per problem that `preflight` sees."""
    if problems := preflight(config, run_file):
        raise UserError("\n".join(problems))


def require_extra(module: str, extra: str, purpose: str) -> None:
    """Raise UserError with the line to install where the package that brings `module` is not there."""
    if importlib.util.find_spec(module) is None:
        what = f'"nestling[{extra}]"' if extra else "nestling"
        raise UserError(f"{purpose} needs the package {module}: pip install {what}")


def resolve_model_path(path: str) -> str:
    """The folder or hub name that `model.path` means; `package:PACKAGE/FOLDER` becomes a folder.

    The package is located, not imported. Raises UserError for what is neither a model nor a hub name.
    """
    if path.startswith("package:"):
        return str(_model_folder(_package_folder(path), path))
    local = Path(path).expanduser()
    if local.exists():
        return str(_model_folder(local, path))
    looks_local = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1 or "\\" in path
    is_hub_name = HUB_NAME.fullmatch(path) or _SHORT_NAME.fullmatch(path)
    beside = near_file(local) if local.parent.is_dir() and ("/" in path or not is_hub_name) else ""
    if looks_local or beside or not is_hub_name:
        raise UserError(
            f"model.path: got {path!r}, no such folder; allowed: a model folder, a hub name (owner/name) or "
            f"package:PACKAGE/FOLDER{beside or (near_file(local) if looks_local else '')}"
        )
    return path


def _package_folder(path: str) -> Path:
    package, _, inner = path.removeprefix("package:").partition("/")
    if not package.isidentifier():
        raise UserError(f"model.path: got {path!r}, allowed: package:PACKAGE/FOLDER, PACKAGE without dots")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = f"pip install {package.replace('_', '-')}"
        raise UserError(f"model.path: got {path!r}, but no package {package} is installed: {install}")
    return Path(spec.submodule_search_locations[0]) / inner


def _model_folder(folder: Path, given: str) -> Path:
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        return folder
    if not folder.exists():
        raise UserError(f"model.path: got {given!r}, {folder} does not exist{near_file(folder)}")
    if not folder.is_dir():
        raise UserError(f"model.path: got {given!r}, a file; allowed: the folder of a model")
    raise UserError(f"model.path: got {given!r}, a folder without config.json and modules.json")


def _source_problems(source: PlainSource, key: str, needed: Sequence[str], purpose: str) -> list[str]:
    columns: list[str] | None = None
    if source.path is not None:
        try:
            if source.url:
                require_extra("obstore", "cloud", source.name)
            else:
                columns = _columns(Path(source.path), source.split)
        except UserError as error:
            return [f"{key}: {error}"]
        except OSError as error:
            return [f"{key}: {source.path}: cannot be read: {error.strerror or error}"]
    if columns is None and source.columns is None:
        return []
    listed = ", ".join(columns or [])
    problems = []
    for role, column in (source.columns or {}).items():
        if columns is not None and column not in columns:
            problems.append(
                f"{key}.columns.{role}: {source.name} has no column {column!r}; allowed: {listed}"
                f"{did_you_mean(column, columns)}"
            )
    roles = list(source.columns) if source.columns else [name for name in columns or [] if ROLE.fullmatch(name)]
    for role in ("anchor", *needed):
        if not any(name == role or (role == "negative" and name.startswith("negative_")) for name in roles):
            has = f"its columns are {listed}" if columns else f"columns maps {', '.join(roles)}"
            problems.append(
                f"{key}: {purpose} needs a column {role}, {source.name} has none; {has}; "
                f"write columns: {{{', '.join(f'{r}: NAME' for r in ('anchor', *needed))}}}"
            )
    return problems


def _columns(path: Path, split: str) -> list[str] | None:
    """Column names of a source without reading it whole; None where that needs a library."""
    if not path.exists():
        hint = near_file(path)
        if path.name in ("train", "held_out") and "did you mean" not in hint:
            hint = f"; make it: nestling data docstrings --out {path.parent}"
        raise UserError(f"{path}: no such file or folder{hint}")
    if path.is_dir():
        return _folder_columns(path, split)
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path}: got suffix {path.suffix!r}, allowed: {', '.join(SUFFIXES)} or a folder of shards")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; allowed: at least one row")
    if suffix == ".parquet":
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(max(-4, -path.stat().st_size), os.SEEK_END)
            if head != b"PAR1" or file.read(4) != b"PAR1":
                raise UserError(f"{path}: no whole Parquet file (it starts and ends with PAR1); copy or write it again")
        return None
    text, whole = _head(path, suffix)
    if suffix in (".csv", ".tsv"):
        return _header(path, text, "\t" if suffix == ".tsv" else ",")
    line, newline, _ = text.strip().partition("\n")
    if not line:
        raise UserError(f"{path}: the file holds no row; allowed: one JSON object a line")
    if not (newline or whole):
        return None  # the first row alone is longer than what is read here
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its first row is no JSON ({error}); allowed: one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}: its first row is a {type(row).__name__}; allowed: one JSON object a line")
    return list(row)


def _folder_columns(path: Path, split: str) -> list[str] | None:
    if (path / "manifest.json").is_file():
        columns = _json(path / "manifest.json").get("columns")
        if not isinstance(columns, dict):
            raise UserError(f"{path}: its manifest.json lists no columns; allowed: a shard folder of `nestling data`")
        return list(columns)
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits") or []
        if split not in splits:
            raise UserError(f"{path}: has no split {split!r}; allowed: {', '.join(splits)}")
        path = path / split
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return list(_json(path / "dataset_info.json").get("features") or {}) or None
    files = [p for p in sorted(path.iterdir()) if p.name.endswith(SUFFIXES)]
    hint = f"; did you mean {files[0]}?" if files else ""
    raise UserError(f"{path}: folder without manifest.json (shards) or state.json (a saved data set){hint}")


def _head(path: Path, suffix: str) -> tuple[str, bool]:
    """The beginning of a text file, and whether that is all of it."""
    try:
        with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as file:
            raw = file.read(_HEAD)
            whole = not file.read(1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); copy it again") from None
    try:
        return raw.decode("utf-8-sig"), whole
    except UnicodeDecodeError as error:
        if not whole and error.start > len(raw) - 4:  # a character cut in two by the reading
            return raw[: error.start].decode("utf-8-sig"), whole
        line = raw.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{raw[error.start]:02x}"
        raise UserError(f"{path}:{line}: {got} is not UTF-8; convert it: iconv -f ENCODING -t UTF-8") from None


def _header(path: Path, text: str, separator: str) -> list[str]:
    rows = csv.reader(text.splitlines(keepends=True), delimiter=separator)
    try:
        header, first = next(rows, []), next(filter(None, rows), None)
    except csv.Error as error:
        raise UserError(f"{path}: broken beginning: {error}") from None
    if not any(header):
        raise UserError(f"{path}:1: the header is empty; allowed: column names in the first line")
    if first is None:
        raise UserError(f"{path}: a header without rows; allowed: at least one row")
    return header


def _json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, an empty one if there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return value if isinstance(value, dict) else {"items": value}


def _model_problems(model: Model, dims: Sequence[int], folder: Path) -> list[str]:
    problems = []
    try:
        settings = _encoder_settings(folder)
        width = _width(folder, settings)
    except UserError as error:
        return [f"model.path: {error}"]
    if width and (wide := [dim for dim in dims if dim > width]):
        problems.append(f"loss.dims: got {', '.join(map(str, wide))}, {model.path} has {width}; allowed: 1 to {width}")
    first = _POSITIONS_FROM.get(settings.get("model_type", ""))
    positions = settings.get("max_position_embeddings")
    if first is not None and isinstance(positions, int):
        for key in ("max_seq_length", "max_query_length"):
            length = getattr(model, key)
            if length is not None and length > positions - first:
                problems.append(
                    f"model.{key}: got {length}, {model.path} has positions for {positions - first}; "
                    f"allowed: 2 to {positions - first}"
                )
    if not _weights(folder):
        problems.append(f"model.path: {model.path} holds no weights; allowed: model.safetensors or pytorch_model.bin")
    return problems


def _width(folder: Path, settings: dict[str, Any]) -> int | None:
    """Width of the embeddings as far as configuration files tell."""
    width = next((settings[k] for k in ("hidden_size", "d_model", "dim", "n_embd") if k in settings), None)
    for module in _json(folder / "modules.json").get("items", ()):
        kind = str(module.get("type", "")).rpartition(".")[2]
        its = _json(folder / str(module.get("path", "")) / "config.json")
        if kind == "Pooling":
            one = its.get("embedding_dimension", its.get("word_embedding_dimension", width))
            flags = sum(value is True for key, value in its.items() if key.startswith("pooling_mode_"))
            modes = its.get("pooling_mode")
            parts = len(modes) if isinstance(modes, list) else 1 if modes else max(flags, 1)
            width = one * parts if isinstance(one, int) else None
        elif kind == "Dense":
            width = its.get("out_features", width)
    return width if isinstance(width, int) else None


def _encoder_settings(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json") or _json(folder / "0_Transformer" / "config.json")


def _weights(folder: Path) -> int:
    """Bytes of the model's weights, 0 if there are none."""
    for pattern in ("*.safetensors", "pytorch_model*.bin", "0_*/*.safetensors", "0_*/*.bin"):
        if size := sum(path.stat().st_size for path in folder.glob(pattern)):
            return size
    return 0


def _disk_problems(config: RunConfig, run_dir: Path, model: Path | None) -> list[str]:
    above = run_dir
    while not above.exists() and above != above.parent:
        above = above.parent
    elsewhere = "choose another: train.run_dir=FOLDER"
    if not above.is_dir():
        return [f"train.run_dir: {run_dir} cannot be made, {above} is a file; {elsewhere}"]
    if not os.access(above, os.W_OK | os.X_OK):
        return [f"train.run_dir: {above} is not writable; {elsewhere}"]
    weights = _weights(model) if model else 0
    # A checkpoint holds weights and up to two optimiser moments; while one is written there are `keep` + 1.
    # Then the final model, and a bundle with the weights twice: ONNX and safetensors.
    copies = 3 * (config.checkpoint.keep + 1) + 1 + (2 if config.export else 0)
    free = shutil.disk_usage(above).free
    if copies * weights > free:
        return [
            f"train.run_dir: {above} has {free / 2**30:.1f} GiB free, the run may need "
            f"{copies * weights / 2**30:.1f} ({copies} times the weights); {elsewhere}, or checkpoint.keep=1"
        ]
    return []

"""Static checks of a run: all that files and settings can tell before a GPU hour is spent.

Nothing here imports torch or reads more than the first kilobytes of a file. `nestling check RUN.yaml` and
`train.py` report all problems at once.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from launch.config import Model, RunConfig
from launch.config_data import PlainSource
from launch.errors import UserError
from launch.files import existing_above, read_json
from launch.reader import near_file, run_directory
from launch.rows import SAVED, SHARDS, TEXTS, column_problems, kind_of, read_text, saved_folder

# Losses by the roles that they need beside `anchor`; `negative` also stands for negative_1, negative_2 ...
_PAIRS = ("positive",)
_LOSSES: dict[tuple[str, ...], tuple[str, ...]] = {
    _PAIRS: (
        "CachedGISTEmbedLoss",
        "CachedMultipleNegativesRankingLoss",
        "CachedMultipleNegativesSymmetricRankingLoss",
        "GISTEmbedLoss",
        "MegaBatchMarginLoss",
        "MultipleNegativesRankingLoss",
        "MultipleNegativesSymmetricRankingLoss",
    ),
    ("positive", "score"): ("AnglELoss", "CoSENTLoss", "CosineSimilarityLoss"),
    ("positive", "label"): ("ContrastiveLoss", "OnlineContrastiveLoss", "SoftmaxLoss"),
    ("positive", "negative"): ("TripletLoss",),
    ("positive", "negative", "score"): ("DistillKLDivLoss", "MarginMSELoss"),
    ("label",): (
        "BatchAllTripletLoss",
        "BatchHardSoftMarginTripletLoss",
        "BatchHardTripletLoss",
        "BatchSemiHardTripletLoss",
    ),
}
NEEDED_ROLES = {name: roles for roles, names in _LOSSES.items() for name in names}

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Names without an owner that the hub or sentence-transformers know.
_SHORT_NAME = re.compile(
    r"(all|multi-qa|msmarco|paraphrase|distiluse|gtr|sentence-t5|bert|distilbert|roberta|xlm-roberta|albert|"
    r"distilroberta|camembert|nli|stsb|LaBSE|average_word_embeddings|allenai-specter)(-[\w.-]+)?"
)
# Models with learnt absolute positions: a longer text is an index error. Some start counting at 2.
_POSITIONS_FROM_0 = ("bert", "distilbert", "electra")
_POSITIONS_FROM_2 = ("mpnet", "roberta", "xlm-roberta", "camembert")
_LOOKED_AT = 100  # rows of a text file


def preflight(config: RunConfig, run_file: Path) -> list[str]:
    """Problems of a run, one line each; empty where none can be seen from here."""
    problems = []
    sets = {"evaluate": config.evaluate, "evaluate.general": config.evaluate and config.evaluate.general}
    held_out = [(f"{key}.sources", s.sources or [], _PAIRS, "evaluation") for key, s in sets.items() if s]
    for key, sources, needed, purpose in (
        ("data.sources", config.data.sources, NEEDED_ROLES[config.loss.name], config.loss.name),
        ("data.known_positives", config.data.known_positives or [], _PAIRS, "a table of known positives"),
        *held_out,
    ):
        for number, source in enumerate(sources):
            problems += _source_problems(source, f"{key}.{number}", needed, purpose)
    for key, data in sets.items():
        for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{data.split}.tsv") if data and data.beir else ():
            if not Path(data.beir, name).is_file():
                problems.append(f"{key}.beir: {data.beir} has no {name}; allowed: a folder in BEIR's form")
    for name in config.train.report_to:
        if importlib.util.find_spec(name) is None:
            problems.append(f"train.report_to: {name} needs its package: pip install {name}")
    optional = {
        "data.cache_url": (config.data.cache_url, "obstore", "cloud"),
        "checkpoint.remote": (config.checkpoint.remote, "obstore", "cloud"),
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
    local = Path(os.path.expanduser(path))  # Path.expanduser raises for a user that is not there
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
    if not package.isidentifier() or package == "__main__":
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
    try:
        if source.url:
            require_extra("obstore", "cloud", source.name)
        elif source.path is not None:
            columns = _columns(Path(source.path), source.split)
    except UserError as error:
        return [f"{key}: {error}"]
    except OSError as error:
        return [f"{key}: {source.path}: cannot be read: {error.strerror or error}"]
    if columns is None and source.columns is None:
        return []
    return [f"{key}: {problem}" for problem in column_problems(source, columns, needed, purpose)]


def _columns(path: Path, split: str) -> list[str] | None:
    """Column names of a local source without reading it whole; None where that needs a library."""
    kind = kind_of(path)
    if kind == SHARDS:
        columns = _json(path / "manifest.json").get("columns")
        if not isinstance(columns, dict):
            raise UserError(f"{path}: its manifest.json lists no columns; allowed: a shard folder of `nestling data`")
        return list(columns)
    if kind == SAVED:
        return list(_json(saved_folder(path, split) / "dataset_info.json").get("features") or {}) or None
    if kind in TEXTS:
        names: list[str] = []
        rows = list(islice(read_text(path, lambda columns: names.extend(columns) or columns), _LOOKED_AT))
        if not rows:
            raise UserError(f"{path}: has no rows; allowed: at least 1")
        if bad := next((row for row in rows if isinstance(row[1], str)), None):
            raise UserError(f"{path}:{bad[0]}: {bad[1]}")
        return names
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(-4, -path.stat().st_size), os.SEEK_END)
        if head != b"PAR1" or file.read(4) != b"PAR1":
            raise UserError(f"{path}: no whole Parquet file (it starts and ends with PAR1); copy or write it again")
    return None


def _json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, an empty one if there is no file."""
    value = read_json(path) if path.is_file() else {}
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
    kind, positions = settings.get("model_type", ""), settings.get("max_position_embeddings")
    if isinstance(positions, int) and kind in (*_POSITIONS_FROM_0, *_POSITIONS_FROM_2):
        positions -= 2 if kind in _POSITIONS_FROM_2 else 0
        for key in ("max_seq_length", "max_query_length"):
            length = getattr(model, key)
            if length is not None and length > positions:
                problems.append(
                    f"model.{key}: got {length}, {model.path} has positions for {positions}; allowed: 2 to {positions}"
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
    above = existing_above(run_dir)
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

"""Reads a run file and the overrides of the command line into a `RunConfig`, naming every error at once.

An override `section.key=value` is decoded by the same rules as the file. Messages are made from the JSON
schema, so that what is said to be allowed is what the fields of `launch/config.py` say.
"""

import difflib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from launch.config import RunConfig
from launch.errors import UserError
from launch.yaml12 import FLOAT, INTEGER, Document, KeyPath, dump_yaml, parse_yaml, shortened

# Keys of other trainers that people bring along, and what to write here.
FOREIGN = {
    "gradient_accumulation_steps": "it adds no negatives to a contrastive batch; set train.global_batch_size",
    "per_device_train_batch_size": "set train.global_batch_size, the rows of one batch over all processes",
    "mini_batch_size": "set train.global_batch_size; how it is cut changes memory and speed only",
    "batch_size": "set train.global_batch_size, the rows of one batch over all processes",
    "num_train_epochs": "did you mean train.epochs?",
    "matryoshka_dims": "did you mean loss.dims?",
    "warmup_ratio": "set train.warmup_steps to a number below 1",
    "model_name_or_path": "did you mean model.path?",
    "output_dir": "did you mean train.run_dir?",
    "lr": "did you mean train.learning_rate?",
    "bf16": "set train.precision to bf16",
    "fp16": "set train.precision to fp16",
}

Config = TypeVar("Config", bound=BaseModel)
FLAGS = ("--fresh", "--force")  # of train.py
LONGEST_FILE = 1_000_000  # bytes; a run file has a few thousand, so this is data given by mistake


def read_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `path` describes after `overrides`, as read_config reads it."""
    return read_config(path, overrides, RunConfig, "model, data and train")


def read_config(path: Path, overrides: Sequence[str], kind: type[Config], needed: str) -> Config:
    """What `path` describes after `overrides`; of two overrides of one key the last holds. `needed` names the sections
    that cannot be left out.

    Raises UserError with one line per error: place, dotted key, what was got, what is allowed.
    """
    document = parse_yaml(_read(path), lambda line: (line, f"{path}:{line}"))
    if not isinstance(document.value, dict):
        if document.value is None and not document.problems:
            raise UserError(f"{path}: the file is empty; it needs {needed}")
        if not document.problems:
            raise UserError(f"{path}:1: got {_got(document.value)}, allowed: sections ({needed} ...)")
        document.value = {}
    for number, override in enumerate(overrides):
        _apply(document, override, LONGEST_FILE + number)
    config = None
    try:
        config = kind.model_validate(document.value)
    except ValidationError as error:
        _explain(document, error, kind.model_json_schema())
    if document.problems or config is None:
        raise UserError("\n".join(dict.fromkeys(line for _, line in sorted(document.problems, key=lambda p: p[0]))))
    return config


def resolved_yaml(config: RunConfig) -> str:
    """Every field of `config` as YAML; reading it again gives an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def schema() -> dict[str, Any]:
    """JSON schema of a run file; editors that see `# yaml-language-server: $schema=FILE` complete from it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "title": "nestling run",
    }


def run_name(path: Path) -> str:
    """Name of a run: its file's name without .yaml."""
    return path.stem if path.suffix in (".yaml", ".yml") else path.name


def run_directory(config: RunConfig, path: Path, is_fresh: bool = False) -> Path:
    """Folder for everything that the run described by file `path` writes.

    `is_fresh`: the first of NAME, NAME-2, NAME-3 ... in which no run has begun. Every process finds the same: rank 0
    writes run.json after all have met.
    """
    folder = Path(config.train.run_dir) if config.train.run_dir else Path("runs") / run_name(path)
    if not is_fresh:
        return folder
    names = (folder.with_name(f"{folder.name}-{n}") if n > 1 else folder for n in itertools.count(1))
    return next(name for name in names if not (name / "run.json").exists())


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean WORD?` with the nearest of `words`, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def near_file(path: Path, suffixes: Sequence[str] = ()) -> str:
    """`; did you mean PATH?` among a missing file's neighbours that have one of `suffixes`, or nothing."""
    try:
        names = [p.name for p in path.parent.iterdir() if not suffixes or p.name.endswith(tuple(suffixes))]
    except OSError:
        return f"; the folder {path.parent} does not exist" if not path.parent.exists() else ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes() if not path.is_file() or path.stat().st_size <= LONGEST_FILE else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{near_file(path, ('.yaml', '.yml'))}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read a run file from it: {error.strerror}") from None
    if raw is None:
        raise UserError(f"{path}: got {path.stat().st_size:,} bytes, allowed: a run file of up to {LONGEST_FILE:,}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: got byte 0x{raw[error.start]:02x}, allowed: UTF-8 text") from None


def _apply(document: Document, override: str, order: int) -> None:
    """Write one override into the document, or note why that cannot be."""
    place = f"override {shortened(override)}"
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        message = f"{place}: allowed: section.key=value, for example train.seed=7"
        document.problems.append((order, message))
        return
    target: Any = document.value
    path: KeyPath = ()
    try:
        new = parse_yaml(text, lambda _: (order, place))
        for name in names[:-1]:
            step = _step(target, name)
            path = (*path, step)
            inner = target[step] if isinstance(step, int) else target.get(step)
            if inner is None:
                inner = target[step] = {}
                document.places[path] = (order, place)
            target = inner
        step = _step(target, names[-1])
    except UserError as error:
        reason = str(error).removeprefix(f"{place}: ")
        document.problems.append((order, f"{place}: {reason}"))
        return
    path = (*path, step)
    target[step] = new.value
    document.problems += new.problems
    document.places = {p: at for p, at in document.places.items() if p[: len(path)] != path}
    document.places |= {path + p: at for p, at in new.places.items()}
    document.reported |= {path + p for p in new.reported}


def _step(target: Any, name: str) -> str | int:
    """The key or list index that `name` of an override means below `target`."""
    if isinstance(target, dict):
        return name
    if not isinstance(target, list):
        raise UserError(f"nothing is below {_got(target)}")
    if name.isdecimal() and int(name[:9]) < len(target):
        return int(name)
    raise UserError(f"got {name}, allowed: a number from 0 to {len(target) - 1}")


def _explain(document: Document, error: ValidationError, whole: dict[str, Any]) -> None:
    """Turn pydantic's errors into our lines, one for each key; `whole` is the JSON schema."""
    for problem in error.errors(include_url=False):
        path: KeyPath = ()
        value: Any = document.value
        for step in problem["loc"]:  # beyond the data stand pydantic's names for the members of a union
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                break
            path = (*path, step)
        if problem["type"] == "missing":
            path = (*path, problem["loc"][-1])
        if path in document.reported:
            continue
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{_nearest_key(whole, path)}"
        elif problem["type"] == "missing":
            message = f"required and missing; allowed: {_allowed(whole, _schema_at(whole, path))}"
        elif problem["type"] == "value_error":
            message = " ".join(problem["msg"].removeprefix("Value error, ").split())
        else:
            node = _schema_at(whole, path)
            message = f"got {_got(value)}, allowed: {_allowed(whole, node)}{_habit(value, _members(whole, node))}"
        document.report(path, message)


def _members(whole: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a schema node, references resolved."""
    if "$ref" in node:
        node = whole["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return [m for option in node["anyOf"] for m in _members(whole, option)] if "anyOf" in node else [node]


def _schema_at(whole: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    node = whole
    for step in path:
        for member in _members(whole, node):
            inner = member.get("items") if isinstance(step, int) else member.get("properties", {}).get(step)
            inner = inner or member.get("additionalProperties")
            if isinstance(inner, dict):
                node = inner
                break
        else:
            return {}
    return node


def _allowed(whole: dict[str, Any], node: dict[str, Any]) -> str:
    """What a schema node allows, in words."""
    words = dict.fromkeys(_member_allows(whole, member) for member in _members(whole, node))
    return " or ".join(word for word in words if word.replace("integer", "number") == word or len(words) == 1
                       or word.replace("integer", "number") not in words)  # fmt: skip


def _member_allows(whole: dict[str, Any], node: dict[str, Any]) -> str:
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    kind = node.get("type", "any value")
    if "properties" in node:
        keys = list(node["properties"])
        return f"a section with {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}"
    if kind == "object":
        inner = node.get("additionalProperties")
        return "a mapping" + (f" from names to {_allowed(whole, inner)}" if isinstance(inner, dict) else "")
    if kind == "array":
        least, most = node.get("minItems", 0), node.get("maxItems")
        count = f"{least} items" if least == most else f"at least {least}" if least else ""
        return f"a list{' of ' + count if count else ''}, each {_allowed(whole, node['items'])}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {node[key]}" for key, sign in bounds.items() if key in node)
    name = {"string": "text", "boolean": "true or false"}.get(kind, kind)
    return f"{name} {limits}".strip() + (", not empty" if node.get("minLength") else "")


def _nearest_key(whole: dict[str, Any], path: KeyPath) -> str:
    """What an unknown key may have been meant to be."""
    key, parent = str(path[-1]), _members(whole, _schema_at(whole, path[:-1]))
    known = [name for member in parent for name in member.get("properties", {})]
    if key in FOREIGN:
        return f"; {FOREIGN[key]}"
    for section in whole["properties"]:
        if any(key in member.get("properties", {}) for member in _members(whole, whole["properties"][section])):
            return f"; did you mean {section}.{key}?"
    return did_you_mean(key, known) or f"; allowed: {', '.join(known)}"


def _habit(value: Any, members: list[dict[str, Any]]) -> str:
    """A hint for values that other formats read differently."""
    kinds = {member.get("type") for member in members}
    words = [str(word) for member in members for word in member.get("enum", ())]
    if not isinstance(value, str):
        wants_text = "string" in kinds and not isinstance(value, list) and value is not None
        return "; put quotes around it if it is text" if wants_text and not words else ""
    if "boolean" in kinds and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return f"; YAML 1.2 reads {value} as text, write {str(value.lower() in ('yes', 'on', 'y')).lower()}"
    if "null" in kinds and value.lower() in ("none", "nil", "undefined"):
        return "; write null"
    if kinds & {"integer", "number"}:
        plain = value.replace("_", "").replace(",", "").replace(" ", "")
        if INTEGER.fullmatch(plain) or FLOAT.fullmatch(plain):
            reason = "without quotes" if plain == value else "YAML 1.2 has no separators in numbers"
            return f"; write {plain} ({reason})"
    return did_you_mean(value, words)


def _got(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return shortened(json.dumps(value, ensure_ascii=False))[1:-1] + " (list)"
    return f"{shortened(value) if isinstance(value, str) else str(value)[:60]} ({type(value).__name__})"

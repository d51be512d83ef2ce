"""YAML 1.2 to plain values with the place of each, and back.

Values come from the parser's events by the core schema (`2e-5` is a number, `yes` and `1_000` are text), so
that duplicate keys, anchors and tags can be refused with their line.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from launch.errors import UserError

KeyPath = tuple[str | int, ...]
Place = Callable[[int], tuple[int, str]]  # line number -> sort key and words for messages

# https://yaml.org/spec/1.2.2/#1032-tag-resolution
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS = {word: value for value, words in {
    None: ("", "~", "null", "Null", "NULL"),
    True: ("true", "True", "TRUE"),
    False: ("false", "False", "FALSE"),
}.items() for word in words}  # fmt: skip
# Texts that are written without quotes, unless they would be read as a number or a word.
_PLAIN = re.compile(r"\.{0,2}/?[A-Za-z][A-Za-z0-9_./+-]*")

DEEPEST = 20


@dataclass
class Document:
    """Plain values of a file, where each came from, and what is wrong so far (sort key, line of text)."""

    value: Any = None
    places: dict[KeyPath, tuple[int, str]] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    reported: set[KeyPath] = field(default_factory=set)

    def report(self, path: KeyPath, message: str) -> None:
        """Note a problem at `path`, placed at the nearest key above it that has a place."""
        near = path
        while near not in self.places:
            near = near[:-1]
        order, place = self.places[near]
        name = f"{dotted(path)}: " if path else ""
        self.problems.append((order, f"{place}: {name}{message}"))
        self.reported.add(path)


def parse_yaml(text: str, at: Place) -> Document:
    """Values and places of one YAML text; raises UserError for broken YAML."""
    document = Document(places={(): at(1)})
    try:
        stream = iter(YAML(typ="safe", pure=True).parse(text))
        next(stream)
        if isinstance(next(stream), events.DocumentStartEvent):
            document.value = _build(next(stream), stream, (), document, at)
            next(stream)
            extra = next(stream)
            if not isinstance(extra, events.StreamEndEvent):
                line = extra.start_mark.line + 1
                raise UserError(f"{at(line)[1]}: got a second document (---), allowed: one")
    except MarkedYAMLError as error:
        what = " ".join(filter(None, (error.context, error.problem)))
        never_closed = "end of stream" in what or "stream end" in what
        mark = (never_closed and error.context_mark) or error.problem_mark or error.context_mark
        hint = "; indent with spaces, never with tabs" if "\\t" in what else ""
        raise UserError(f"{at(mark.line + 1 if mark else 1)[1]}: broken YAML: {what}{hint}") from None
    except YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = getattr(error, "reason", str(error).splitlines()[0])
        raise UserError(f"{at(line)[1]}: broken YAML: {reason}") from None
    return document


def _build(event: Any, stream: Iterator[Any], path: KeyPath, document: Document, at: Place) -> Any:
    """The value that starts with `event`."""
    line = event.start_mark.line + 1
    document.places.setdefault(path, at(line))
    if len(path) > DEEPEST:
        raise UserError(f"{at(line)[1]}: nested deeper than {DEEPEST} levels")
    if isinstance(event, events.AliasEvent) or event.anchor:
        document.report(path, "anchors (&) and aliases (*) are not read; write the value out")
    elif event.tag:
        document.report(path, f"tags are not read, got {event.tag}; write the value without it")
    if isinstance(event, events.AliasEvent):
        return None
    if isinstance(event, events.ScalarEvent):
        try:
            event.value.encode()  # refuses half a surrogate pair, which no file can hold
            return event.value if event.style else _plain(event.value)
        except UnicodeEncodeError:
            document.report(path, "got half of a surrogate pair, allowed: characters of Unicode")
            return None
        except ValueError:
            hint = "put quotes around it if it is text"
            document.report(path, f"got {shortened(event.value)}, allowed: a finite number; {hint}")
            return None
    if not isinstance(event, events.MappingStartEvent):
        items = []
        while not isinstance(event := next(stream), events.SequenceEndEvent):
            items.append(_build(event, stream, (*path, len(items)), document, at))
        return items
    values: dict[str, Any] = {}
    while not isinstance(event := next(stream), events.MappingEndEvent):
        line = event.start_mark.line + 1
        if not isinstance(event, events.ScalarEvent):
            raise UserError(f"{at(line)[1]}: a key must be text; got a list, a mapping or an alias")
        inner = (*path, event.value)
        if event.value in values:
            document.problems.append((at(line)[0], f"{at(line)[1]}: {dotted(inner)}: this key stands here twice"))
        document.places[inner] = at(line)
        values[event.value] = _build(next(stream), stream, inner, document, at)
    return values


def _plain(text: str) -> Any:
    """An unquoted scalar by the core schema of YAML 1.2; ValueError for a number that is not finite."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if FLOAT.fullmatch(text):
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if not math.isfinite(value):
            raise ValueError(text)
        return value
    return text


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def shortened(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57] + "...")


def dump_yaml(values: dict[str, Any]) -> str:
    """`values` as YAML; parsing it again gives equal values."""
    return "".join(f"{line}\n" for line in _block(values, ""))


def _block(values: dict[str, Any], indent: str) -> Iterator[str]:
    for key, value in values.items():
        name = f"{indent}{inline(key)}:"
        if isinstance(value, dict) and value:
            yield name
            yield from _block(value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(item, dict) and item for item in value):
            yield name
            for item in value:
                first, *rest = _block(item, indent + "    ")
                yield f"{indent}  - {first.strip()}"
                yield from rest
        else:
            yield f"{name} {inline(value)}"


def inline(value: Any) -> str:
    """A value in one line: JSON, which is YAML, or a plain text where that is read back as the same text."""
    # A text that looks like a number, be it one that is not finite, is quoted.
    looks_otherwise = isinstance(value, str) and (value in WORDS or INTEGER.fullmatch(value) or FLOAT.fullmatch(value))
    if isinstance(value, str) and _PLAIN.fullmatch(value) and not looks_otherwise:
        return value
    return re.sub(
        r"[^ -~\n]",
        lambda found: found[0] if found[0].isprintable() else f"\\U{ord(found[0]):08x}",
        json.dumps(value, ensure_ascii=False),
    )
